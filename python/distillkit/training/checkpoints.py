"""Checkpoints with receipts: what is in them, whether they are whole, and of which run they are.

A checkpoint's receipt, `distillkit_checkpoint.json`, is written last. It has the size and hash of each of the other
files, and what decides the run's student (`distillkit.training.identity`). A checkpoint without one was not finished.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distillkit.configuration.places import neighbour
from distillkit.errors import ConfigError
from distillkit.shards import os_files
from distillkit.shards.json_text import canonical_json
from distillkit.shards.storage import TEMPORARY_PREFIX

if TYPE_CHECKING:
    from distillkit.training.config.schema import RunConfig

__all__ = [
    "RECEIPT",
    "Checkpoint",
    "CheckpointError",
    "checked",
    "checkpoint_of",
    "checkpoints_in",
    "discard",
    "newest_checkpoint",
    "open_checkpoint",
    "write_receipt",
]

logger = logging.getLogger(__name__)

RECEIPT = "distillkit_checkpoint.json"
_FORMAT, _VERSION = "distillkit-checkpoint", 1
# transformers removes this file itself, once a checkpoint that it saves on SIGTERM is complete.
_SENTINEL = "checkpoint-is-incomplete.txt"


class CheckpointError(ConfigError):
    """A checkpoint cannot be resumed from; the message names it and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was completely written.

    Attributes:
        folder: its folder.
        step: the step after which it was saved.
        identity: what decides the student of its run; see `identity_of`.
        resumable: whether training can go on from it; otherwise it has only the model.
        files: size and hash of each file, by its path in the folder.
    """

    folder: Path
    step: int
    identity: Mapping[str, Any]
    resumable: bool
    files: Mapping[str, tuple[int, str]]

    def check_sizes(self) -> None:
        """Compare the files with the receipt, without reading them.

        Raises:
            CheckpointError: a file is missing or has another size.
        """
        for name, (size, _) in self.files.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise CheckpointError(f"{self.folder}: {name} is missing")
            if found != size:
                raise CheckpointError(f"{path} has {found:,} bytes, expected {size:,}: it was changed or cut off")

    def check_content(self) -> None:
        """Compare the files with the receipt, byte by byte.

        Raises:
            CheckpointError: a file is missing or was changed.
        """
        self.check_sizes()
        found = _hashes(self.folder, list(self.files))
        for name, (_, expected) in self.files.items():
            if found[name] != expected:
                raise CheckpointError(
                    f"{self.folder / name} was changed since it was saved: hash {found[name]}, expected {expected}"
                )


def write_receipt(folder: Path, step: int, identity: Mapping[str, Any], *, resumable: bool) -> None:
    """Mark a checkpoint as complete. Its other files must not change afterwards.

    Args:
        folder: the checkpoint, with all its other files.
        step, identity, resumable: see `Checkpoint`.

    Raises:
        OSError: a file cannot be read, or the receipt not be written.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in (RECEIPT, _SENTINEL)]
    # The receipt must not survive a crash that its files do not.
    for name in names:
        os_files.sync(folder / name)
    hashes = _hashes(folder, names)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "run": dict(identity),
        "resumable": resumable,
        "files": {name: [(folder / name).stat().st_size, hashes[name]] for name in names},
    }
    temporary = folder / f"{TEMPORARY_PREFIX}{RECEIPT}"
    temporary.write_text(canonical_json({**content, "xxh3": _hash(content)}), encoding="utf-8")
    os_files.sync(temporary)
    os.replace(temporary, folder / RECEIPT)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's receipt.

    Raises:
        CheckpointError: there is none, so the checkpoint is incomplete, or it is damaged.
    """
    place = folder / RECEIPT
    if (folder / _SENTINEL).exists() or not place.is_file():
        raise CheckpointError(
            f"{folder} is incomplete: it has no {RECEIPT}, which is written last. The run was stopped while it saved "
            "this checkpoint, or it was not saved by this release of distillkit"
        )
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        found = content.pop("xxh3")
        if found != _hash(content) or content["format"] != _FORMAT:
            raise CheckpointError(f"{place} was changed since it was written: its hash differs")
        if content["version"] > _VERSION:
            raise CheckpointError(f"{place}: version {content['version']}; this release reads up to {_VERSION}")
        files = {name: (int(size), str(hashed)) for name, (size, hashed) in content["files"].items()}
        return Checkpoint(folder, int(content["step"]), content["run"], bool(content["resumable"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{place} is not a checkpoint's receipt: {error!r}") from error


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """Yield the folders of an output folder's checkpoints, whole or not, the newest first."""
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*") if _numbered(path)]
    for _, path in sorted(numbered, reverse=True):
        yield path


def newest_checkpoint(folder: Path, *, content: bool = False) -> Checkpoint | None:
    """Find the newest checkpoint that training can go on from, and warn of those that are passed over.

    Args:
        folder: the output folder.
        content: compare the contents of files with their hashes; without it only their sizes, and nothing is logged.

    Raises:
        CheckpointError: there are checkpoints, but none to go on from; names each with its reason.
    """
    damaged: list[CheckpointError] = []
    for path in checkpoints_in(folder):
        try:
            checkpoint = checked(path, content=content)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for reason in damaged if content else ():
            logger.warning("%s. Going on from the checkpoint before it, %s", reason, path)
        return checkpoint
    if damaged:
        reasons = "\n".join(f"  {reason}" for reason in damaged)
        raise CheckpointError(f"{folder} has no checkpoint to go on from:\n{reasons}")
    return None


def checked(folder: Path, *, content: bool) -> Checkpoint:
    """Open a checkpoint, and check that training can go on from it.

    Raises:
        CheckpointError: it cannot.
    """
    checkpoint = open_checkpoint(folder)
    if not checkpoint.resumable:
        raise CheckpointError(
            f"{folder} has only the model, without the optimizer's state, since it was saved with "
            "training_args.save_only_model: true; training cannot go on from it"
        )
    if content:
        checkpoint.check_content()
    else:
        checkpoint.check_sizes()
    return checkpoint


def checkpoint_of(config: RunConfig, *, content: bool = False) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None.

    Args:
        config: the run's configuration.
        content: compare the contents of its files with their hashes, not only their sizes.

    Raises:
        ConfigError: the configuration asks for a checkpoint that does not exist, or there is no whole one.
    """
    wanted, key = config.training_args.get("resume_from_checkpoint"), "training_args.resume_from_checkpoint"
    if not wanted:
        return None
    try:
        if wanted is True:
            found = newest_checkpoint(Path(config.output_path), content=content)
        else:
            found = _named_checkpoint(wanted, content=content)
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {key}: {error}") from error
    if found is None:
        raise ConfigError(f"{config.source}: {key}: {config.output_path} contains no checkpoint; remove this setting")
    return found


def _named_checkpoint(name: str, *, content: bool) -> Checkpoint:
    """Return the checkpoint in a folder.

    Raises:
        ConfigError: there is no whole one.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {name!r}{neighbour(name)}")
    inside = next(checkpoints_in(folder), None)
    if inside is not None:
        raise ConfigError(f"{name!r} is not a checkpoint, but has some in it, such as {inside}")
    return checked(folder, content=content)


def discard(folder: Path) -> None:
    """Remove a checkpoint, its receipt first, so that no rest of it is taken for a whole one."""
    (folder / RECEIPT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _numbered(path: Path) -> bool:
    return path.is_dir() and path.name.rpartition("-")[2].isdecimal()


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: _file_hash(folder / name), names), strict=True))


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _hash(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(canonical_json(content).encode())
