"""Public alias of `distillkit.codec.bits`."""

from __future__ import annotations

from distillkit.codec.bits import pack, packed_len, unpack

__all__ = ["pack", "packed_len", "unpack"]
