"""Where a student differs most from its teacher on held-out documents: single positions, and whole documents.

At most `_POSITIONS` positions of an evaluation are kept, with a few tokens each, whatever the size of the data.

Shape legend: N counted positions of a batch, b most probable tokens (`PositionDetails`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import gather_object

from distillkit.losses.fused import PositionDetails
from distillkit.training.data.examples import DocumentSource
from distillkit.training.data.mixture import JoinedDocuments

__all__ = ["Differences"]

_POSITIONS, _PER_DOCUMENT, _DOCUMENTS = 40, 3, 10
# Tokens shown before a position, and of the beginning of a document.
_CONTEXT, _BEGINNING = 32, 24


@dataclass
class _Total:
    """Sums over the positions of a document."""

    positions: int = 0
    kl: float = 0.0
    agreeing: int = 0

    def add(self, positions: int, kl: float, agreeing: int) -> None:
        self.positions += positions
        self.kl += kl
        self.agreeing += agreeing


@dataclass(frozen=True)
class _Position:
    """A position that is kept: token ids and log-probabilities, best first."""

    document: int
    position: int
    kl: float
    before: list[int]
    next: int
    teacher: list[tuple[int, float, float]]
    student: list[tuple[int, float]]


class Differences:
    """Collects the positions and documents of an evaluation at which the student's KL from its teacher is largest.

    Positions whose KL is not finite are left out.
    """

    def __init__(self) -> None:
        self._totals: dict[int, _Total] = {}
        self._worst: list[_Position] = []

    def add(self, batch: Mapping[str, Any], details: PositionDetails | None) -> None:
        """Add the positions of a batch, as the collator makes it."""
        if details is None:
            return
        kl = details.kl.double().cpu().numpy()
        agreeing = torch.eq(details.student_ids[:, 0], details.teacher_ids[:, 0]).cpu().numpy()
        documents = batch["places"][:, 0].cpu().numpy()
        finite = np.isfinite(kl)
        floor = self._worst[-1].kl if len(self._worst) == _POSITIONS else -math.inf
        chosen: list[int] = []
        for document in np.unique(documents[finite]).tolist():
            at = np.flatnonzero(finite & (documents == document))
            total = self._totals.setdefault(document, _Total())
            total.add(len(at), float(kl[at].sum()), int(agreeing[at].sum()))
            largest = at[np.argsort(-kl[at], kind="stable")[:_PER_DOCUMENT]]
            chosen += largest[kl[largest] > floor].tolist()
        self._keep([*self._worst, *_positions(batch, details, chosen)])

    def _keep(self, found: Iterable[_Position]) -> None:
        """Keep the positions with the largest KL, of which each document has only a few."""
        kept: list[_Position] = []
        seen: dict[int, int] = {}
        for each in sorted(found, key=lambda each: (-each.kl, each.document, each.position)):
            seen[each.document] = seen.get(each.document, 0) + 1
            if seen[each.document] <= _PER_DOCUMENT and len(kept) < _POSITIONS:
                kept.append(each)
        self._worst = kept

    def gather(self) -> None:
        """Merge those of all processes. Every process must call this."""
        gathered = gather_object([(self._totals, self._worst)])
        if len(gathered) == 1:
            return
        self._totals = {}
        for totals, _ in gathered:
            for document, other in totals.items():
                total = self._totals.setdefault(document, _Total())
                total.add(other.positions, other.kl, other.agreeing)
        self._keep([each for _, worst in gathered for each in worst])

    def to_dict(self, source: DocumentSource, tokenizer: Any) -> dict[str, Any]:
        """Return positions and documents as JSON values, the largest KL first.

        Args:
            source: the held-out documents.
            tokenizer: gives the texts; None leaves them out.

        Returns:
            positions: `document` and `position` (in the source), `kl` (nats), `before` (the text before, up to 32
                tokens), `next` (the true next token), `teacher` and `student` (up to 5 tokens each, the most probable
                first; tokens are `id`, `text` and `p`, those of the teacher with `student_p`).
            documents: the 10 documents with the largest mean KL: `document`, `positions`, `kl`, `top1_agreement`, and
                `text`, their beginning.
            Of several datasets, both have `dataset`, the number of one, and `document` is the number there.
        """

        def text(ids: list[int]) -> str | None:
            return None if tokenizer is None else str(tokenizer.decode(ids))

        def place(document: int) -> dict[str, Any]:
            if not isinstance(source, JoinedDocuments):
                return {"document": document}
            number, inside = source.place(document)
            return {"dataset": number, "document": inside}

        means = sorted(self._totals.items(), key=lambda item: (-item[1].kl / item[1].positions, item[0]))
        return {
            "positions": [
                {
                    **place(each.document),
                    "position": each.position,
                    "kl": each.kl,
                    "before": text(each.before),
                    "next": {"id": each.next, "text": text([each.next])},
                    "teacher": [
                        {"id": token, "text": text([token]), "p": math.exp(logprob), "student_p": math.exp(student)}
                        for token, logprob, student in each.teacher
                    ],
                    "student": [
                        {"id": token, "text": text([token]), "p": math.exp(logprob)} for token, logprob in each.student
                    ],
                }
                for each in self._worst
            ],
            "documents": [
                {
                    **place(document),
                    "positions": total.positions,
                    "kl": total.kl / total.positions,
                    "top1_agreement": total.agreeing / total.positions,
                    "text": text(source[document].input_ids[:_BEGINNING].tolist()),
                }
                for document, total in means[:_DOCUMENTS]
            ],
        }


def _positions(batch: Mapping[str, Any], details: PositionDetails, chosen: list[int]) -> list[_Position]:
    """Return some positions of a batch, with what surrounds them."""
    if not chosen:
        return []
    index = torch.tensor(chosen, device=details.kl.device)
    kept = PositionDetails(*(each[index].cpu() for each in details))
    rows = batch["rows"][index].cpu().numpy()
    places = batch["places"][index].cpu().tolist()
    ids, offsets, labels = (batch[name].flatten().cpu().numpy() for name in ("input_ids", "position_ids", "labels"))
    found = []
    for number, (row, (document, position)) in enumerate(zip(rows.tolist(), places, strict=True)):
        known = torch.isfinite(kept.teacher_logprobs[number]).tolist()
        teacher = zip(
            kept.teacher_ids[number].tolist(),
            kept.teacher_logprobs[number].tolist(),
            kept.student_of_teacher[number].tolist(),
            strict=True,
        )
        student = zip(kept.student_ids[number].tolist(), kept.student_logprobs[number].tolist(), strict=True)
        found.append(
            _Position(
                document=document,
                position=position,
                kl=float(kept.kl[number]),
                before=_before(ids, offsets, row),
                next=int(labels[row + 1]),
                teacher=[token for token, there in zip(teacher, known, strict=True) if there],
                student=list(student),
            )
        )
    return found


def _before(ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], row: int) -> list[int]:
    """The tokens of the same packed document up to a position, the last ones of them."""
    start = max(row - int(offsets[row]), row + 1 - _CONTEXT)
    return [int(token) for token in ids[start : row + 1]]
