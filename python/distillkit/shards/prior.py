"""The prior of a dataset in the compact format: `prior.bin` in its folder, or in a shard's footer (FORMAT.md §4)."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping

from distillkit.codec import Prior
from distillkit.configuration.urls import locate, without_trailing_slash
from distillkit.errors import CorruptDataError, InputError
from distillkit.shards.header import Header
from distillkit.shards.parquet import open_parquet
from distillkit.shards.storage import Folder

__all__ = ["PRIOR", "find_prior", "keep_prior", "load_prior", "prior_metadata"]

PRIOR = "prior.bin"
PRIOR_KEY = b"distillkit.prior"
_LARGEST = 128 << 20
"""Bytes; priors take about one MB."""


def load_prior(place: str | os.PathLike[str]) -> Prior:
    """Reads a prior, to encode other rows of the same teacher with it.

    Args:
        place: a `prior.bin`, the folder of a dataset, or one of its shards; a path or an fsspec URL.

    Raises:
        FileNotFoundError: there is no such file or folder.
        InputError: the dataset has no prior: it is in another format, or uses the built-in prior.
        CorruptDataError: the prior is missing, damaged, or that of another dataset.

    Example:
        >>> from distillkit.shards import load_prior
        >>> load_prior("compact").hash == load_prior("compact/prior.bin").hash
        True
    """
    name = without_trailing_slash(place)
    filesystem, inner = locate(name)
    if not filesystem.exists(inner):
        raise FileNotFoundError(2, "no such file or folder", name)
    if name.endswith(".parquet"):
        with open_parquet(name, any_size=True) as parquet:
            metadata = parquet.metadata.metadata
        found = find_prior(Header.from_metadata(metadata, where=name), metadata, name)
    elif filesystem.isdir(inner):
        found = _in_folder(Folder(name))
    else:
        folder, _, file = name.rpartition("/")
        found = _read(Folder(folder or "."), file)
    if found is None:
        raise InputError(f"{name}: has no {PRIOR}: it is in another format than compact, or has the built-in prior")
    return found


def find_prior(header: Header, metadata: Mapping[bytes, bytes] | None, path: str) -> Prior | None:
    """The prior that a shard's header names: from its footer, or from `prior.bin` beside it; None if it names none.

    Raises:
        CorruptDataError: it is missing, damaged, or that of another dataset; says what to do.
    """
    expected = header.prior
    if expected is None:
        return None
    folder, _, _ = path.rpartition("/")
    embedded = (metadata or {}).get(PRIOR_KEY)
    found = _in_folder(Folder(folder or ".")) if embedded is None else _decoded(embedded, path)
    if found is None:
        raise CorruptDataError(
            f"{Folder(folder or '.').of(PRIOR)} is missing, with which the rows were encoded: copy it from "
            f"where the dataset comes from (its hash is {expected}), or from another dataset with the same prior"
        )
    _check(found, expected)
    return found


def prior_metadata(prior: Prior) -> dict[bytes, bytes]:
    """Key-value metadata of a Parquet file that contains a prior. It is text, as some readers require."""
    return {PRIOR_KEY: base64.b64encode(prior.data)}


def keep_prior(folder: Folder, header: Header, prior: Prior | None) -> Prior | None:
    """Makes sure that a dataset's folder has the prior that its header names, before any shard is written.

    Args:
        prior: that prior; None if it is in the folder already.

    Returns:
        The prior; None if the header names none.

    Raises:
        InputError: there is none, or the one given is not what the header names.
        CorruptDataError: the folder has another one.
        OSError: it cannot be written.
    """
    expected = header.prior
    if expected is None:
        return None
    there = _in_folder(folder)
    if there is not None:
        _check(there, expected)
        return there
    if prior is None or prior.hash != expected:
        given = "none was given" if prior is None else f"that of {prior.source} is {prior.hash}"
        raise InputError(f"{folder}: the header names the prior {expected}, but {given}")
    folder.write(PRIOR, prior.data)
    return prior


def _in_folder(folder: Folder) -> Prior | None:
    return _read(folder, PRIOR)


def _read(folder: Folder, name: str) -> Prior | None:
    data = folder.read(name, most=_LARGEST)
    return None if data is None else Prior(data, folder.of(name))


def _decoded(text: bytes, path: str) -> Prior:
    if len(text) > 2 * _LARGEST:
        raise CorruptDataError(f"{path}: {PRIOR_KEY.decode()} in its metadata has {len(text):,} bytes")
    try:
        return Prior(base64.b64decode(text, validate=True), f"{path}, {PRIOR_KEY.decode()}")
    except binascii.Error as error:
        raise CorruptDataError(f"{path}: {PRIOR_KEY.decode()} in its metadata is damaged: {error}") from error


def _check(prior: Prior, expected: str) -> None:
    if prior.hash != expected:
        raise CorruptDataError(
            f"{prior.source}: its hash is {prior.hash}, but the dataset's rows were encoded with {expected}: it is "
            "damaged, or that of another dataset; copy the right one from where the dataset comes from"
        )
