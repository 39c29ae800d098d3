"""The exceptions that distillkit raises, in one hierarchy, and what their messages may quote.

The class says what is at fault: a configuration (`ConfigError`), the caller's arrays (`InputError`), stored bytes
(`CorruptDataError`, `TruncatedDataError`, `UnsupportedVersionError`), two things that do not belong together
(`MismatchError`), or a running teacher (`CaptureError`). The native module raises the same classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "ConfigError",
    "CorruptDataError",
    "DistillKitError",
    "InputError",
    "MismatchError",
    "TruncatedDataError",
    "UnsupportedVersionError",
    "nearest",
    "printable",
]


class DistillKitError(Exception):
    """Base class of every error that distillkit raises on purpose."""


class ConfigError(DistillKitError, ValueError):
    """A setting is unknown, missing or has an invalid value; the message names it by its dotted path."""


class InputError(DistillKitError, ValueError):
    """An array or argument has the wrong shape, dtype or values."""


class CorruptDataError(DistillKitError):
    """Stored bytes are inconsistent, or do not match their checksum or description."""


class TruncatedDataError(CorruptDataError):
    """Stored bytes end before they should."""


class UnsupportedVersionError(DistillKitError):
    """The data was written in a format version that this release cannot read."""


class MismatchError(DistillKitError):
    """Two things do not belong together: tokenizers, vocabularies, codecs, alignments, shards of different datasets."""


class CaptureError(DistillKitError):
    """A teacher returned something that cannot be stored."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a "did you mean" hint to append to a message: the closest known name, or "" if none is close."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


# C0 and C1 but for tabs and line feeds; marks that reorder text; separators, invisible and tag characters; surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Write control characters, among them those of terminals, as their escapes, such as \\x1b; keep line feeds."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
