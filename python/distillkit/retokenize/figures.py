"""What became of a dataset's positions and their probability when it was retokenised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from distillkit.errors import CorruptDataError
from distillkit.retokenize.token_map import MappedRows
from distillkit.shards import Header
from distillkit.shards.header import MEASURED
from distillkit.types import Facts, Shown

__all__ = ["Figures"]


@dataclass
class Sums:
    """Over the rows of one side, for the text of which both have rows.

    Attributes:
        rows: their number.
        mass: probability that they store.
        bits: what the text takes by them.
        bytes: of that text, without special tokens.
    """

    mass: float = 0.0
    rows: float = 0.0
    bits: float = 0.0
    bytes: float = 0.0

    def add(self, other: Sums) -> None:
        """Adds those of other rows."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def mean_mass(self) -> float:
        """Probability that a row stores, on average."""
        return self.mass / max(self.rows, 1)

    @property
    def bits_per_byte(self) -> float:
        """An id that a row does not store has an even share of its missing mass."""
        return self.bits / max(self.bytes, 1)


_SIDES = ("teacher", "student")
_COUNTS = ("documents", "left_out", "teacher_tokens", "student_tokens", "aligned", "inside", "without_row")


@dataclass(repr=False)
class Figures(Shown):
    """Counts and sums over documents.

    Attributes:
        documents, left_out: documents written, and those that have fewer than two of the student's tokens.
        teacher_tokens, student_tokens: tokens of the documents.
        aligned, inside, without_row: the student's positions by where they are: at the beginning of a teacher's token,
            inside one, or where the teacher has no row.
        teacher, student: see `Sums`.
        unmapped: how often each special token of the teacher occurs whose name is text for the student.
    """

    documents: int = 0
    left_out: int = 0
    teacher_tokens: int = 0
    student_tokens: int = 0
    aligned: int = 0
    inside: int = 0
    without_row: int = 0
    teacher: Sums = field(default_factory=Sums)
    student: Sums = field(default_factory=Sums)
    unmapped: dict[str, int] = field(default_factory=dict)

    def add(self, mapped: MappedRows) -> None:
        """Adds the rows of a document."""
        counts = np.bincount(mapped.kinds, minlength=3).tolist()
        for name, count in zip(("without_row", "aligned", "inside"), counts, strict=True):
            setattr(self, name, getattr(self, name) + count)
        for name, sums in zip(_SIDES, mapped.sums.reshape(2, 4).tolist(), strict=True):
            getattr(self, name).add(Sums(*sums))

    def merge(self, other: Figures) -> None:
        """Adds what was counted over other documents."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _SIDES:
            getattr(self, name).add(getattr(other, name))
        for name, count in other.unmapped.items():
            self.unmapped[name] = self.unmapped.get(name, 0) + count

    # -- what they say -------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> int:
        """The student's positions."""
        return self.aligned + self.inside + self.without_row

    def facts(self) -> Facts:
        """What is shown."""
        share = {name: getattr(self, name) / max(self.positions, 1) for name in ("aligned", "inside", "without_row")}
        teacher, student = self.teacher.bits_per_byte, self.student.bits_per_byte
        change = f", {student / teacher - 1:+.2%}" if teacher else ""
        rows = [
            ("documents", f"{self.documents:,}" + (f", and {self.left_out:,} too short" if self.left_out else "")),
            ("tokens", f"{self.student_tokens:,}, from {self.teacher_tokens:,} of the teacher"),
            ("positions", f"{share['aligned']:.1%} at a teacher's token, {share['inside']:.1%} inside one"),
            ("", f"{share['without_row']:.2%} without a row, left out of losses"),
            ("stored mass", f"{self.student.mean_mass:.2%} on average, from {self.teacher.mean_mass:.2%}"),
            ("bits per byte", f"{student:.4f} by these rows, {teacher:.4f} by the teacher's{change}"),
        ]
        if self.unmapped:
            names = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.unmapped.items()))
            rows.append(("special tokens", f"unknown to the student, written as text: {names}"))
        return "retokenised", rows

    # -- in a header ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """For the header of a shard or a manifest."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        for name in _SIDES:
            sums = getattr(self, name)
            found[name] = {**asdict(sums), "mean_mass": sums.mean_mass, "bits_per_byte": sums.bits_per_byte}
        return {**found, "unmapped": self.unmapped}

    @staticmethod
    def from_header(header: Header) -> Figures | None:
        """Those in a header; None if it has none.

        Raises:
            CorruptDataError: they are not what `to_dict` gives.
        """
        measured = header.capture.get(MEASURED)
        if measured is None:
            return None
        try:
            found: dict[str, Any] = {name: int(measured[name]) for name in _COUNTS}
            found |= {
                name: Sums(**{each.name: float(measured[name][each.name]) for each in fields(Sums)}) for name in _SIDES
            }
            unmapped = {str(name): int(count) for name, count in measured["unmapped"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptDataError(
                f"the header's capture.{MEASURED} is {measured!r:.200}, expected counts, teacher, student and unmapped"
            ) from error
        return Figures(**found, unmapped=unmapped)
