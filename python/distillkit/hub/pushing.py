"""Pushes a capture to the Hugging Face hub: shards first, then manifest and card.

Until the manifest is there, readers see an unfinished dataset. A push that was interrupted is run again, and leaves out
the shards that have arrived.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit import __version__
from distillkit.codec import Codec
from distillkit.configuration.cards import CARD
from distillkit.configuration.hub import hub_problem, is_hub_error
from distillkit.console import human_bytes, progress_bar
from distillkit.errors import CorruptDataError, DistillKitError, InputError, MismatchError
from distillkit.hub.dataset_card import CARD_MARK, dataset_card
from distillkit.shards import Dataset, Manifest, read_manifest, verify_dataset
from distillkit.shards.manifest import MANIFEST
from distillkit.shards.storage import Folder
from distillkit.shards.writer import is_dataset_file
from distillkit.types import Facts, Shown

__all__ = ["PushReport", "push"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_COMMIT_FILES, _COMMIT_BYTES = 64, 4 << 30
"""A commit has at most so many shards, and no more of them after so many bytes: an interrupted push loses one."""

_NOT_OURS_BUT_HARMLESS = (CARD, ".gitattributes", "LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True, repr=False)
class PushReport(Shown):
    """The result of a push.

    Attributes:
        repo: hub id of the dataset.
        url: its page.
        private: whether only its owner can read it.
        uploaded, uploaded_bytes: files that this push has sent, and their size.
        already_there: files that were there already, with the same content.
        card: "written", "unchanged", or "kept": someone else wrote it.
    """

    repo: str
    url: str
    private: bool
    uploaded: int
    uploaded_bytes: int
    already_there: int
    card: str

    def facts(self) -> Facts:
        return f"pushed: {self.repo} ({'private' if self.private else 'public'})", [
            ("sent", f"{self.uploaded:,} files, {human_bytes(self.uploaded_bytes)}"),
            ("there already", f"{self.already_there:,} files"),
            ("card", self.card),
            ("page", self.url),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return dict(self.__dict__)


def push(
    dataset: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = True,
    license: str | None = None,
    verify: bool = True,
    progress: bool = True,
) -> PushReport:
    """Push a captured dataset to the Hugging Face hub, with a card made from its header.

    The token is the one of `hf auth login` or HF_TOKEN. Called again with the same dataset, only what is missing is
    sent.

    Args:
        dataset: folder of a finished capture on this machine.
        repo: hub id of the dataset, OWNER/NAME; without OWNER, the user's own. It is created if it does not exist.
        private: whether a new repository can be read by its owner only. One that exists stays as it is.
        license: SPDX identifier for the card, such as `apache-2.0`.
        verify: read everything first, as `verify_dataset` does, and push nothing damaged.
        progress: show a progress bar, on stderr or in the notebook.

    Returns:
        What was sent.

    Raises:
        InputError: the dataset is not a finished capture on this machine.
        CorruptDataError: it is damaged.
        MismatchError: the repository holds other files, which are left alone.
        DistillKitError: the hub cannot be reached, or refuses; the message says what to do.
    """
    folder, manifest, codec = _finished(dataset)
    _check_login(repo)
    if verify:
        with progress_bar("checking documents", shown=progress) as advance:
            _verify(str(folder), advance)
    with _asking(repo), progress_bar("sending shards", shown=progress) as advance:
        from huggingface_hub import HfApi

        api = HfApi(library_name="distillkit", library_version=__version__)
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        remote = _Repository(api, url.repo_id)
        remote.check_content(manifest, folder)
        card = dataset_card(manifest, codec, remote.repo, license)
        return remote.send(folder, manifest, card.encode(), advance, str(url))


def _finished(dataset: str | os.PathLike[str]) -> tuple[Path, Manifest, Codec]:
    """Return the folder of a finished capture, its manifest and its codec."""
    folder = Folder(dataset)
    if folder.local_path is None:
        raise InputError(f"{folder}: a folder on this machine is pushed, not a URL; copy the dataset here first")
    opened = Dataset.open(folder.url)
    if opened.kind != "distillkit":
        raise InputError(
            f"{folder}: a published dataset has no description of itself; convert it first: distillkit-codec convert "
            f"{folder} SHARDS"
        )
    manifest = read_manifest(folder.url) if folder.local_path.is_dir() else None
    if manifest is None:
        raise InputError(f"{folder}: a single shard; push the dataset's folder, which has {MANIFEST}")
    return folder.local_path, manifest, opened.codec


def _check_login(repo: str) -> None:
    """Refuse what the hub would, before anything long.

    Raises:
        DistillKitError: the hub is not asked here, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise DistillKitError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if not get_token():
        raise DistillKitError(f"{repo}: there is no hub token; log in with `hf auth login`, or set HF_TOKEN")


def _verify(folder: str, progress: Progress) -> None:
    report = verify_dataset(folder, progress=progress)
    if not report.ok:
        shown = "\n".join(f"  {problem}" for problem in report.problems[:5])
        raise CorruptDataError(
            f"{folder} is damaged, so nothing was pushed:\n{shown}\nCapture the damaged shards again, or copy the "
            "dataset again from where it came from"
        )


@contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Turn the errors of the hub's client into messages that say what to do.

    Raises:
        DistillKitError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()  # they would collide with ours
    try:
        yield
    except DistillKitError:
        raise
    except Exception as error:
        if not is_hub_error(error):
            raise
        raise DistillKitError(f"{repo}: the hub: {hub_problem(error)}") from error
    finally:
        if not silent:
            enable_progress_bars()


class _Repository:
    """A dataset's repository on the hub, and what is in it."""

    def __init__(self, api: Any, repo: str) -> None:
        self._api, self.repo = api, repo
        tree = api.list_repo_tree(repo, repo_type="dataset", recursive=True)
        self.files: dict[str, Any] = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    def check_content(self, manifest: Manifest, folder: Path) -> None:
        """Refuse to mix this capture with something else.

        Raises:
            MismatchError: there are other files, or another capture.
        """
        ours = {MANIFEST, *(shard.file for shard in manifest.shards), *_beside(folder, manifest)}
        other = sorted(self.files.keys() - ours - {*_NOT_OURS_BUT_HARMLESS})
        if not other and MANIFEST in self.files and not self.has(folder / MANIFEST):
            other = [MANIFEST]
        if other:
            raise MismatchError(
                f"{self.repo} holds something else: {', '.join(other[:5])}{', …' if len(other) > 5 else ''} "
                f"({len(other)} files) do not belong to the capture in {folder}. Push to another repository, or remove "
                "these files there first"
            )

    def has(self, path: Path) -> bool:
        """Whether a file is in the repository with the same content; it is only read if its size is the same."""
        found = self.files.get(path.name)
        if found is None or found.size != path.stat().st_size:
            return False
        if found.lfs is not None:
            return bool(found.lfs.sha256 == _hash(path, hashlib.sha256()))
        header = f"blob {path.stat().st_size}\0".encode()  # as git names its blobs
        return bool(found.blob_id == _hash(path, hashlib.sha1(header, usedforsecurity=False)))

    def send(self, folder: Path, manifest: Manifest, card: bytes, progress: Progress, url: str) -> PushReport:
        """Send what is missing: shards, then manifest and card."""
        shards = [folder / shard.file for shard in manifest.shards]
        missing = [shard for shard in shards if not self.has(shard)]
        done = len(shards) - len(missing)
        progress(done, len(shards))
        for group in _groups(missing):
            self._commit({path.name: path for path in group}, f"Shards {group[0].name} to {group[-1].name}")
            done += len(group)
            progress(done, len(shards))
        rest = [*_beside(folder, manifest), MANIFEST]
        last: dict[str, Path | bytes] = {name: folder / name for name in rest if not self.has(folder / name)}
        state = self._state_of(card)
        if state == "written":
            last[CARD] = card
        if last:
            self._commit(last, "Manifest and card")
        sent = [*missing, *last.values()]
        return PushReport(
            repo=self.repo,
            url=url,
            private=bool(self._api.dataset_info(self.repo).private),
            uploaded=len(sent),
            uploaded_bytes=sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in sent),
            already_there=len(shards) + len(rest) - len(missing) - len({*last} - {CARD}),
            card=state,
        )

    def _state_of(self, card: bytes) -> str:
        """What happens to the card, see `PushReport`: one that someone else wrote is kept."""
        if CARD not in self.files:
            return "written"
        there = Path(self._api.hf_hub_download(self.repo, CARD, repo_type="dataset")).read_bytes()
        if CARD_MARK.encode() not in there:
            return "kept"
        return "unchanged" if there == card else "written"

    def _commit(self, files: Mapping[str, Path | bytes], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ]
        self._api.create_commit(self.repo, operations, commit_message=message, repo_type="dataset")


def _beside(folder: Path, manifest: Manifest) -> list[str]:
    """The names of a dataset's files besides manifest and shards."""
    known = {MANIFEST, *(shard.file for shard in manifest.shards)}
    return sorted(path.name for path in folder.iterdir() if is_dataset_file(path.name) and path.name not in known)


def _groups(shards: Sequence[Path]) -> Iterator[list[Path]]:
    """Divide shards into those of one commit each."""
    group: list[Path] = []
    size = 0
    for shard in shards:
        group.append(shard)
        size += shard.stat().st_size
        if len(group) == _COMMIT_FILES or size >= _COMMIT_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _hash(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())
