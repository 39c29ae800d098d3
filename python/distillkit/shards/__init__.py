"""Captured datasets on disk: Parquet shards with a header, a manifest and checksums (FORMAT.md beside this file)."""

from __future__ import annotations

from distillkit.shards.convert import convert, target_codec
from distillkit.shards.header import Header
from distillkit.shards.manifest import Manifest, ShardInfo, read_manifest
from distillkit.shards.merge import merge
from distillkit.shards.prior import load_prior
from distillkit.shards.reader import Dataset
from distillkit.shards.verify import VerifyReport, verify_dataset
from distillkit.shards.writer import ShardWriter, whole_shards

__all__ = [
    "Dataset",
    "Header",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "VerifyReport",
    "convert",
    "load_prior",
    "merge",
    "read_manifest",
    "target_codec",
    "verify_dataset",
    "whole_shards",
]
