"""Keeps secrets out of everything that is shown, logged or written: tokens, keys, and passwords in URLs."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

__all__ = ["REDACTED", "is_secret", "redacted", "secret_paths", "without_secrets"]

REDACTED = "***"

# Names of secret settings, as the last words of a key: hub_token, aws_secret_access_key, X-Amz-Signature.
_WORDS = "token|password|passwd|pwd|secret|api_?key|access_?key|secret_?key|private_?key|signature|sig"
_WORDS += "|credential|credentials|authorization|cookie"
_SECRET = re.compile(rf"(?i)(?:.*[^a-z])?(?:{_WORDS})|sas|.*[a-z](?:Token|Password|Secret|Key)")
# Special tokens of a tokenizer.
_OF_TEXT = re.compile(r"(?i)(?:.*_)?(?:eos|bos|pad|unk|sep|cls|mask|image|video|audio|boi|eoi|stop|special|next)_token")
# user:password@, and user@ too where it is not an account name of ssh or git: tokens are given like this. A URL taken
# as a path has one slash left.
_USER = re.compile(r"(?i)(\b[a-z][a-z0-9+.\-]*:/{1,2})([^\s/?#@:'\"]*):([^\s/?#'\"]*)@")
_BARE_USER = re.compile(r"(?i)(\bhttps?:/{1,2})([^\s/?#@:'\"]+)@")
_PARAMETER = re.compile(r"(?i)([?&;])([\w.\-]+)=([^\s&;#'\")\]}]+)")
_ENTRY = re.compile(r"""(['"])([\w.\-]+)\1(\s*:\s*)(['"])((?:\\.|(?!\4).)*)\4""")
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,})"
    r"|(?i:\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/\-]{8,}=*"
)


def is_secret(name: object) -> bool:
    """Whether a setting of this name, or of this dotted path, holds a secret."""
    text = str(name).rpartition(".")[2]
    return _SECRET.fullmatch(text) is not None and _OF_TEXT.fullmatch(text) is None


# Shorter values of environment variables may be words.
_SHORTEST = 8


def redacted(text: str, *secrets: str) -> str:
    """Return a text without its secrets: passwords in URLs, signed parameters, `'token': '…'`, known kinds of keys, the
    values of environment variables with secret names, and the given ones.

    Example:
        >>> redacted("https://me:s3cret@example.com/data?token=abc&split=train")
        'https://me:***@example.com/data?token=***&split=train'
    """
    known = [value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret(name)]
    spelled = {spelling for value in (*known, *secrets) if value for spelling in _spellings(value)}
    for value in sorted(spelled, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    text = _USER.sub(rf"\1\2:{REDACTED}@", text)
    text = _BARE_USER.sub(rf"\1{REDACTED}@", text)
    text = _PARAMETER.sub(lambda found: f"{found[1]}{found[2]}={_or_hidden(found[2], found[3])}", text)
    text = _ENTRY.sub(
        lambda found: f"{found[1]}{found[2]}{found[1]}{found[3]}{found[4]}{_or_hidden(found[2], found[5])}{found[4]}",
        text,
    )
    return _KNOWN.sub(REDACTED, text)


def _spellings(value: str) -> tuple[str, ...]:
    """Return how a value may be written: as it is, in a URL, in JSON, in HTML, and in base64 as of basic access."""
    quoted = quote(value, "")
    encoded = base64.b64encode(value.encode(errors="replace")).decode().rstrip("=")
    return value, quoted, quote(quoted, ""), value.replace("/", "\\/"), html.escape(value), encoded


def _or_hidden(name: str, value: str) -> str:
    return REDACTED if value and is_secret(name) else value


def without_secrets(value: Any) -> Any:
    """Return settings without their secrets, at any depth: entries with secret names are left out, texts are redacted.

    `token: true`, which asks for the token of this machine, is kept.
    """
    if isinstance(value, Mapping):
        return {name: without_secrets(part) for name, part in value.items() if not _holds_secret(name, part)}
    if isinstance(value, (list, tuple)):
        return [without_secrets(part) for part in value]
    return redacted(value) if isinstance(value, str) else value


def secret_paths(value: Any, path: str = "") -> list[str]:
    """Return the dotted paths of the entries that `without_secrets` leaves out."""
    if not isinstance(value, Mapping):
        return []
    found: list[str] = []
    for name, part in value.items():
        inner = f"{path}.{name}" if path else str(name)
        found += [inner] if _holds_secret(name, part) else secret_paths(part, inner)
    return found


def _holds_secret(name: object, value: object) -> bool:
    return is_secret(name) and value is not None and not isinstance(value, bool)
