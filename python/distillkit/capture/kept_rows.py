"""Rows of the teacher that a capture keeps in `.capture`, from learning its prior until their shard is written.

`rows-00000.json` says what `rows-00000.bin` has: the ids of all rows as uint32, then their log-probabilities as
float32, then those of the next tokens, if they are stored, then, of draws, the most probable ids of all rows as uint32;
all little-endian.

Shape legend: N rows of a shard's leading documents, k ids per row, T next tokens.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, Union

import numpy as np
import xxhash

from distillkit.capture.shard_plan import ShardPlan, read_json, rows_name, write_json
from distillkit.capture.teachers.base import RejectedDocument, ScoredDocument
from distillkit.errors import CorruptDataError, UnsupportedVersionError
from distillkit.shards import Header
from distillkit.types import Draws, SparseLogprobs

__all__ = ["BYTES_A_VALUE", "KeptRows", "ScoredOrRejected", "read_rows", "write_rows"]

logger = logging.getLogger(__name__)

ScoredOrRejected = Union[ScoredDocument, RejectedDocument]

BYTES_A_VALUE = 8
"""Bytes per value on disk: an id and a log-probability."""


@dataclass(frozen=True)
class KeptRows:
    """What the teacher said of a shard's leading documents.

    Attributes:
        header: header of the shards, with the teacher; it names no prior yet.
        results: the documents' results, in the order in which the teacher gave them: sums over them then have the same
            bytes as if it had just scored them.
    """

    header: Header
    results: tuple[ScoredOrRejected, ...]


def write_rows(plan: ShardPlan, number: int, kept: KeptRows) -> None:
    """Keep the rows of a shard's leading documents.

    Raises:
        OSError: they cannot be written.
    """
    scored = [result for result in kept.results if isinstance(result, ScoredDocument)]
    labels = [result.label_logprobs for result in scored if result.label_logprobs is not None]
    parts = [
        *(np.asarray(result.rows.ids, dtype="<u4") for result in scored),
        *(np.asarray(result.rows.logprobs, dtype="<f4") for result in scored),
        *(np.asarray(values, dtype="<f4") for values in labels),
        *(np.asarray(result.likely, dtype="<u4") for result in scored if result.likely is not None),
    ]
    data = b"".join(part.tobytes() for part in parts)
    plan.inside.write(rows_name(number, "bin"), data)
    content = {
        "header": kept.header.to_dict(),
        "planned": plan.shards[number].xxh3_128,
        "k": scored[0].rows.k if scored else 0,
        "draws": None if not scored or scored[0].rows.draws is None else asdict(scored[0].rows.draws),
        "likely": 0 if not scored or scored[0].likely is None else scored[0].likely.shape[1],
        "documents": [_described(result) for result in kept.results],
        "xxh3_128": xxhash.xxh3_128_hexdigest(data),
    }
    # Written last: rows are only there once they are whole.
    write_json(plan.inside, rows_name(number, "json"), content)


def read_rows(plan: ShardPlan, number: int) -> KeptRows | None:
    """The rows that are kept of a shard's leading documents; None if there are none, or damaged ones (with a warning).

    Raises:
        UnsupportedVersionError: a newer release has written them.
    """
    name = rows_name(number, "json")
    if plan.inside.size(name) is None:
        return None
    place = plan.inside.of(name)
    try:
        content = read_json(plan.inside, name)
        data = plan.inside.read(rows_name(number, "bin"), most=None) or b""
        return _parsed(plan, number, content, data)
    except UnsupportedVersionError:
        raise
    except (CorruptDataError, KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("%s: not the rows of its shard (%s). The teacher scores these documents again", place, error)
        return None


def _described(result: ScoredOrRejected) -> dict[str, Any]:
    """Which document, and its number of rows and of labels, or the reason of its refusal."""
    if isinstance(result, RejectedDocument):
        return {"index": result.index, "rejected": result.reason}
    labels = result.label_logprobs
    counts = {"rows": len(result.rows.ids), "labels": None if labels is None else len(labels)}
    return {"index": result.index, **counts}


def _parsed(plan: ShardPlan, number: int, content: dict[str, Any], data: bytes) -> KeptRows:
    """The rows that `write_rows` wrote.

    Raises:
        CorruptDataError, KeyError, TypeError, ValueError, AttributeError: they are damaged or of other documents.
    """
    found = xxhash.xxh3_128_hexdigest(data)
    if found != content["xxh3_128"]:
        raise CorruptDataError(f"the hash is {found}, expected {content['xxh3_128']!r:.200}")
    documents, k = content["documents"], content["k"]
    draws = None if content.get("draws") is None else Draws(**content["draws"])
    indices = [each["index"] for each in documents]
    if content["planned"] != plan.shards[number].xxh3_128 or sorted(indices) != [*range(plan.sample.get(number, 0))]:
        raise CorruptDataError("they are of other documents than those planned")
    described = [each for each in documents if "rejected" not in each]
    rows, labels = [each["rows"] for each in described], [each["labels"] or 0 for each in described]
    likely = content.get("likely", 0)
    if not all(type(count) is int and count >= 0 for count in (k, likely, *rows, *labels)):
        raise CorruptDataError("counts are not numbers of rows")
    values = sum(rows) * k
    if len(data) != values * BYTES_A_VALUE + 4 * (sum(labels) + sum(rows) * likely):
        raise CorruptDataError(f"{len(data)} bytes, expected {sum(rows)} rows of {k} ids")
    ids_Nk = np.frombuffer(data, "<u4", values).reshape(sum(rows), k)
    logprobs_Nk = np.frombuffer(data, "<f4", values, 4 * values).reshape(sum(rows), k)
    labels_T = np.frombuffer(data, "<f4", sum(labels), BYTES_A_VALUE * values)
    likely_Nn = np.frombuffer(data, "<u4", sum(rows) * likely, BYTES_A_VALUE * values + 4 * sum(labels))
    likely_Nn = likely_Nn.reshape(sum(rows), likely)
    results: list[ScoredOrRejected] = []
    row = label = 0
    for index, each in zip(indices, documents, strict=True):
        if "rejected" in each:
            results.append(RejectedDocument(index, str(each["rejected"])))
            continue
        part, theirs = slice(row, row + each["rows"]), slice(label, label + (each["labels"] or 0))
        stored = SparseLogprobs(ids_Nk[part].astype(np.int64), logprobs_Nk[part].astype(np.float32), draws)
        next_tokens = None if each["labels"] is None else labels_T[theirs].astype(np.float32)
        results.append(ScoredDocument(index, stored, next_tokens, likely_Nn[part].astype(np.int64) if likely else None))
        row, label = part.stop, theirs.stop
    return KeptRows(
        Header.from_dict(content["header"], where=plan.inside.of(rows_name(number, "json"))), tuple(results)
    )
