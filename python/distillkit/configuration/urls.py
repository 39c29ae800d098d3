"""Tells paths from URLs, in one place, for everything that is read or written."""

from __future__ import annotations

import os
import re

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from distillkit.errors import InputError

__all__ = ["is_on_hub", "is_url", "locate", "without_trailing_slash"]

_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://")
_ROOT = re.compile(rf"{_URL.pattern}|/|~/")
_CHAINED_URL = re.compile(r"(\w+::)+[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is an fsspec URL. Everything else is a local path, whatever characters it contains."""
    return _URL.match(str(os.fspath(place))) is not None


def is_on_hub(place: str | os.PathLike[str]) -> bool:
    """Whether a place is the URL of a repository on the Hugging Face hub, or of a file in one."""
    url = _URL.match(str(os.fspath(place)))
    return url is not None and url["protocol"] == "hf"


def without_trailing_slash(place: str | os.PathLike[str]) -> str:
    """A path or URL without slashes at its end, save those that are all of it: `/`, `~/` and `memory://` stay."""
    name = str(os.fspath(place))
    root = _ROOT.match(name)
    kept = root.end() if root else 0
    return name[:kept] + name[kept:].rstrip("/")


def locate(place: str | os.PathLike[str]) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or an fsspec URL, and the path in that file system.

    Names are taken as they are. fsspec itself reads `a::b` as a chain of URLs, also in local paths and keys of objects,
    and would then read, write or remove something else.

    Raises:
        InputError: an empty name, a URL of no place, or a name with a NUL character; a chained URL; a kind of storage
            that fsspec does not know or that a URL alone does not describe, one whose package is not installed, or one
            that cannot be reached.
    """
    name = str(os.fspath(place))
    # Only memory has a root: s3:// needs a bucket, http:// a host.
    if not name or "\0" in name or (name.endswith("://") and name != "memory://"):
        raise InputError(f"{name!r} is not the name of a file or folder")
    if _CHAINED_URL.match(name):
        raise InputError(f"{name}: chained URLs are not supported; give the URL of the data itself")
    url = _URL.match(name)
    if url is None:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(name) if name.startswith("~/") else name)
    protocol = url["protocol"]
    try:
        kind = fsspec.get_filesystem_class(protocol)
        return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(name)), str(kind._strip_protocol(name))
    except ImportError as error:
        hint = "; pip install 'distillkit[hub]'" if protocol == "hf" else ""
        raise InputError(f"{name} cannot be opened: {error}{hint}") from error
    except (ValueError, TypeError, OSError) as error:  # some connect at once
        raise InputError(f"{name} cannot be opened: {error}") from error
