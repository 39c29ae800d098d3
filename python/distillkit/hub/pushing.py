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
from distillkit.shards.manifest import MANIFEST, is_shard_name
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
        private: whether only its owner can read the repository. One that exists stays as it is, and if it is public,
            nothing is pushed unless this is false.
        license: SPDX identifier for the card, such as `apache-2.0`.
        verify: read everything first, as `verify_dataset` does, and push nothing damaged.
        progress: show a progress bar, on stderr or in the notebook.

    Returns:
        What was sent.

    Raises:
        InputError: the dataset is not a finished capture on this machine.
        CorruptDataError: it is damaged.
        MismatchError: the repository holds other files, which are left alone; or it is public, and `private` is true.
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
        remote = _Repository(api, url.repo_id, _files(folder, manifest))
        remote.check(private=private)
        card = dataset_card(manifest, codec, remote.repo, license)
        return remote.send(card.encode(), advance, str(url))


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
    """A dataset's repository on the hub, compared with a capture.

    Args:
        api: the hub's client.
        repo: hub id.
        capture: the capture's files by name, in the order in which they are sent.
    """

    def __init__(self, api: Any, repo: str, capture: Mapping[str, Path]) -> None:
        self._api, self.repo, self._capture = api, repo, capture
        tree = api.list_repo_tree(repo, repo_type="dataset", recursive=True)
        self._there: dict[str, Any] = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        self._same = {name for name, path in capture.items() if name in self._there and self._equal(name, path)}
        self.private = bool(api.dataset_info(repo).private)

    def check(self, *, private: bool) -> None:
        """Refuse to publish what should be private, and to mix this capture with something else.

        Raises:
            MismatchError: it is public, or has other files or another capture.
        """
        if private and not self.private:
            raise MismatchError(
                f"{self.repo} is public, and the push is to be private: add --public (private=False) to publish the "
                "capture there, make the repository private in its settings, or choose another one"
            )
        other = sorted(self._there.keys() - self._same - {*_NOT_OURS_BUT_HARMLESS})
        if other:
            raise MismatchError(
                f"{self.repo} holds something else: {len(other)} of its files are not those of this capture, such as "
                f"{', '.join(other[:5])}. Push to another repository, or remove these files there first"
            )

    def _equal(self, name: str, path: Path) -> bool:
        """Whether a file there has the same content; it is only read here if its size is the same."""
        found, size = self._there[name], path.stat().st_size
        if found.size != size:
            return False
        if found.lfs is not None:
            return bool(found.lfs.sha256 == _hash(path, hashlib.sha256()))
        named_by_git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        return bool(found.blob_id == _hash(path, named_by_git))

    def send(self, card: bytes, progress: Progress, url: str) -> PushReport:
        """Send what is missing: shards, then manifest and card."""
        missing = {name: path for name, path in self._capture.items() if name not in self._same}
        shards = [path for name, path in missing.items() if is_shard_name(name)]
        done = total = sum(map(is_shard_name, self._capture))
        done -= len(shards)
        progress(done, total)
        for group in _groups(shards):
            self._commit({path.name: path for path in group}, f"Shards {group[0].name} to {group[-1].name}")
            done += len(group)
            progress(done, total)
        last: dict[str, Path | bytes] = {name: path for name, path in missing.items() if not is_shard_name(name)}
        state = self._state_of(card)
        if state == "written":
            last[CARD] = card
        if last:
            self._commit(last, "Manifest and card")
        sent = [*shards, *last.values()]
        return PushReport(
            repo=self.repo,
            url=url,
            private=self.private,
            uploaded=len(sent),
            uploaded_bytes=sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in sent),
            already_there=len(self._same),
            card=state,
        )

    def _state_of(self, card: bytes) -> str:
        """What happens to the card, see `PushReport`: one that someone else wrote is kept."""
        if CARD not in self._there:
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


def _files(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """A capture's files by name: its shards, what its format keeps beside them, and the manifest."""
    shards = [shard.file for shard in manifest.shards]
    beside = [path.name for path in folder.iterdir() if is_dataset_file(path.name)]
    names = [*shards, *sorted({*beside} - {*shards, MANIFEST}), MANIFEST]
    return {name: folder / name for name in names}


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
