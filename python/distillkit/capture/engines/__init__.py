"""Teachers that score documents: one interface, one module an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from distillkit.capture.text import TokenDocument
from distillkit.types import SparseLogprobs

__all__ = ["Teacher"]


class Teacher(Protocol):
    """A running teacher."""

    @property
    def head_size(self) -> int:
        """Width of the logits; at least the tokenizer's vocabulary."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a header says of the teacher: name, revision, dtype."""

    def score(self, documents: Sequence[TokenDocument], k: int) -> Iterator[tuple[int, SparseLogprobs]]:
        """Yield (index of the document, its rows) for every document, in any order.

        The rows are numpy, (L − 1, k): row t is the distribution after tokens 0…t. They depend on these documents
        alone, so that a capture that starts again writes the same bytes.

        Raises:
            CaptureError: the teacher gave something that can't be stored; it names document and position.
        """
