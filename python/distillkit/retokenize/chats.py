"""Chats whose messages a capture kept, rendered with the student's own chat template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError
from distillkit.retokenize.alignment import Aligned
from distillkit.retokenize.token_map import Side, TokenMap
from distillkit.shards import Dataset
from distillkit.text.layouts import CHATS, PROMPTS, before_messages, chat_messages, find_layouts, read_messages, text_of
from distillkit.text.policy import capture_policy
from distillkit.text.rows import RowReader
from distillkit.types import Document, TokenDocument

__all__ = ["ChatReader"]

logger = logging.getLogger(__name__)

I64 = npt.NDArray[np.int64]

_Run = tuple[int, int, int]
"""Where the same bytes begin in the teacher's text and in the student's, and how many they are."""


class ChatReader:
    """Reads the messages that a capture kept beside its documents.

    What the messages say is the same in both texts, and with it what ends a turn; what the templates write around it
    differs. The student has rows where the texts are the same.

    Args:
        source: the dataset.
        token_map: the vocabularies.
    """

    def __init__(self, source: Dataset, token_map: TokenMap) -> None:
        capture, kept = source.header.capture, set(source.kept_schema.names)
        teacher, student = token_map.teacher.tokenizer, token_map.student.tokenizer
        layouts = [columns for columns in (*CHATS, *PROMPTS) if kept.issuperset(columns)]
        self.token_map = token_map
        self._readers: tuple[RowReader, RowReader] | None = None
        if not layouts or "loss_on" not in capture:
            return
        if not student.chat_template:
            logger.warning(
                "%s: keeps the messages of its chats, but the tokenizer %s has no chat template to render them with: "
                "they stay as the teacher's template wrote them",
                source.path,
                token_map.student.name,
            )
            return
        columns = capture.get("read_columns") or ()
        policy = capture_policy(capture["loss_on"], columns=columns, append_eos=bool(capture.get("append_eos")))
        sizes = len(token_map.teacher.strings), len(token_map.student.strings)
        self._policy = policy
        self._readers = RowReader(teacher, policy, sizes[0]), RowReader(student, policy, sizes[1])

    def read(self, document: Document) -> list[Aligned] | None:
        """A chat in the tokens of both; None if the document is none, or not all of a chat, or no messages were kept.

        Raises:
            InputError: the student's template rejects the messages.
        """
        if self._readers is None or document.columns is None or document.segment_lengths is not None:
            return None
        row = {name: value for name, value in document.columns.items() if value is not None}
        contents = self._contents(row, document.place)
        if not contents:
            return None
        teacher, student = (reader([(document.place, row)])[0] for reader in self._readers)
        # Another text, or a window of this one.
        if len(teacher) != 1 or len(student) != 1 or not np.array_equal(teacher[0].input_ids, document.input_ids):
            return None
        return [self._aligned(teacher[0], student[0], contents)]

    def _contents(self, row: dict[str, Any], where: str) -> list[bytes]:
        """What the messages say, in their order; nothing if the row is no chat."""
        try:
            layouts = find_layouts(row, where, self._policy.layouts)
        except InputError:
            # Only some columns of the rows were kept.
            return []
        columns = layouts[0] if layouts else ()
        if columns in PROMPTS and not isinstance(row[columns[0]], str):
            said = [read_messages(row[column], where, column) for column in columns]
            messages = before_messages(row, where, said[0]) + said[1]
        elif columns in CHATS:
            messages, _ = chat_messages(row, columns, where)
        else:
            return []
        return [text.encode() for text in (text_of(message).strip() for message in messages) if text]

    def _aligned(self, teacher: TokenDocument, student: TokenDocument, contents: Sequence[bytes]) -> Aligned:
        ids = [each.input_ids.astype(np.int64) for each in (teacher, student)]
        lengths = self.token_map.teacher_lengths[ids[0]], self.token_map.lengths(ids[1])
        ends = [np.cumsum(each) for each in lengths]
        runs = _runs(self.token_map.text_of(ids[0].tolist()), self.token_map.student_bytes(ids[1].tolist()), contents)
        starts, stops = _moved(ends[1] - lengths[1], ends[1], runs)
        own = Side(ids[1], starts, stops)
        return Aligned(Side(ids[0], ends[0] - lengths[0], ends[0]), own, 0, student.loss_mask)


def _runs(teacher: bytes, student: bytes, contents: Sequence[bytes]) -> list[_Run]:
    """Where both texts are the same: around each message's content, as far as they agree."""
    runs: list[_Run] = []
    ours = theirs = 0
    for content in contents:
        at, own = teacher.find(content, theirs), student.find(content, ours)
        if at < 0 or own < 0:
            continue
        before = _common(teacher[theirs:at][::-1], student[ours:own][::-1])
        at, own = at - before, own - before
        length = before + len(content)
        length += _common(teacher[at + length :], student[own + length :])
        runs.append((at, own, length))
        theirs, ours = at + length, own + length
    return runs


def _common(one: bytes, other: bytes) -> int:
    """Length of what two texts begin with."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(np.frombuffer(one[:most], np.uint8) != np.frombuffer(other[:most], np.uint8))
    return int(differ[0]) if len(differ) else most


def _moved(starts: I64, ends: I64, runs: Sequence[_Run]) -> tuple[I64, I64]:
    """Where the student's tokens are in the teacher's text; −1 for those that are not in it."""
    moved_starts, moved_ends = np.full_like(starts, -1), np.full_like(ends, -1)
    for at, own, length in runs:
        inside = (starts >= own) & (ends <= own + length) & (ends > starts)
        moved_starts[inside], moved_ends[inside] = starts[inside] - own + at, ends[inside] - own + at
    return moved_starts, moved_ends
