"""The exceptions that distillkit raises, in one hierarchy, and what their messages may quote.

The class says what is at fault: a configuration (`ConfigError`), the caller's arrays (`InputError`), stored bytes
(`CorruptDataError`, `TruncatedDataError`, `UnsupportedVersionError`), two things that do not belong together
(`MismatchError`), or a running teacher (`CaptureError`). The native module raises the same classes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from urllib.parse import quote

__all__ = [
    "CaptureError",
    "ConfigError",
    "CorruptDataError",
    "DistillKitError",
    "InputError",
    "MismatchError",
    "TruncatedDataError",
    "UnsupportedVersionError",
    "is_secret",
    "nearest",
    "printable",
    "redacted",
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


# -- what others wrote: secrets and control characters -----------------------------------------------------------------

# Not the special tokens of tokenizers, such as eos_token.
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!special_)token|(?:api)?key"
    r"|access[_-]?key[_-]?id|secret|pass(?:word|wd|phrase)?|pwd|credentials?|sig(?:nature)?|authorization)$",
    re.IGNORECASE,
)
_USER_OF_URL = re.compile(r"(?<=://)[^\s/?#'\"<>]+@")
_QUERY = re.compile(r"([?&;]([\w.%-]+)=)[^&;\s#'\"<>]+")
_KEYS = re.compile(
    r"\b((?:Bearer|Basic)\s+)(?=\S*[\d=]|\S{16})[\w.~+/=-]{4,}"
    r"|\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[bp]-)[\w-]{16,}",
    re.IGNORECASE,
)
_SHORTEST = 6
_HIDDEN = "***"


def is_secret(name: str) -> bool:
    """Whether a setting, query parameter or environment variable of this name holds a password, key or token."""
    return _SECRET_NAME.search(name) is not None


def redacted(text: str, *secrets: str) -> str:
    """Hide secrets in text that quotes a URL, a server or a setting, by ***.

    Hidden are the user and password of URLs, their signatures and tokens, authorization headers, keys of well-known
    services, the values of environment variables that `is_secret`, and the given ones.
    """
    known = [value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST]
    spelled = {spelling for value in (*known, *secrets) if value for spelling in (value, quote(value, ""))}
    for value in sorted(spelled, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    text = _USER_OF_URL.sub(f"{_HIDDEN}@", text)
    text = _QUERY.sub(lambda match: match[1] + _HIDDEN if is_secret(match[2]) else match[0], text)
    return _KEYS.sub(lambda match: (match[1] or "") + _HIDDEN, text)


# C0 and C1 but for tabs and line feeds; marks that reorder text; separators, invisible and tag characters; surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Write control characters, among them those of terminals, as their escapes, such as \\x1b; keep line feeds."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
