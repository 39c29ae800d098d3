"""Which files are read as text datasets, by their names; without the libraries that read them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["COMPRESSED", "DATA_FILES", "OTHER_DATA", "SUFFIXES", "format_suffix", "is_read"]

DATA_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = f"{', '.join(DATA_FILES)} (all but .parquet also compressed: {', '.join(COMPRESSED)})"

# Suffixes of data that are not read; a folder's other files, such as README.md, are nobody's data.
OTHER_DATA = (
    *(".arrow", ".feather", ".avro", ".orc", ".pkl", ".xlsx", ".jsonlines"),
    *(".lz4", ".zip", ".tar", ".tgz", ".7z", *COMPRESSED),
)


def format_suffix(file: Path) -> str:
    """Return the suffix that says the format, in lower case; in compressed files it is the one before the last."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED and suffixes[0] != ".parquet":
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def is_read(file: Path) -> bool:
    """Whether files of this name are read."""
    return format_suffix(file) in DATA_FILES
