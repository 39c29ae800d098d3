"""The benchmark's own sample: the 256 most probable ids of the demo's teacher at 21,973 positions of real text.

    python benches/sample.py

Made once, in a few minutes, and kept in benches/.cache/, where `benches/bench.py` finds it.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import numpy as np

from distillkit.bench.sample import Sample, load_sample, save_sample

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benches" / ".cache"
K = 256
TOKENS, DOCUMENTS = 512, 43


def benchmark_sample() -> Sample:
    """The sample, made if it is not there."""
    path = CACHE / "sample.npz"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")
        unfinished = path.with_name("unfinished.npz")
        save_sample(unfinished, _make())
        unfinished.rename(path)
    return load_sample(path)


def _make() -> Sample:
    from pydoc_data.topics import topics

    # The teacher is unpacked as the demo does it.
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import TEACHER, make_teacher

    from distillkit.capture.engine_settings import HFSettings
    from distillkit.capture.teachers.base import RowRequest, ScoredDocument
    from distillkit.capture.teachers.hf import HFTeacher
    from distillkit.text.tokenizer import load_tokenizer
    from distillkit.types import TokenDocument

    started = time.perf_counter()
    folder = CACHE / TEACHER
    make_teacher(folder)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = np.asarray(load_tokenizer(str(folder))(text).input_ids, dtype=np.int32)
    pieces = [tokens[start : start + TOKENS] for start in range(0, DOCUMENTS * TOKENS, TOKENS)]
    documents = [TokenDocument(piece, f"piece {number}") for number, piece in enumerate(pieces)]
    teacher = HFTeacher(str(folder), HFSettings(batch_tokens=4 * TOKENS, head_rows=256))
    print(f"running {TEACHER} over {DOCUMENTS * TOKENS:,} tokens")
    rows = {
        result.index: result.rows
        for result in teacher.score(documents, RowRequest(K))
        if isinstance(result, ScoredDocument)
    }
    print(f"the sample took {time.perf_counter() - started:.0f} seconds")
    return Sample(
        np.concatenate([rows[number].ids for number in range(DOCUMENTS)]),
        np.concatenate([rows[number].logprobs for number in range(DOCUMENTS)]),
        teacher.head_size,
        f"real positions of {TEACHER} over the documentation of Python {platform.python_version()}",
    )


if __name__ == "__main__":
    found = benchmark_sample()
    print(f"{len(found):,} {found.about}, {found.k} ids each: {CACHE / 'sample.npz'}")
