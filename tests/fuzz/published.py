"""Fuzzes the importer of published datasets: one file of a small dataset, which the first byte of an input chooses.

See `make fuzz`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["distillkit"]):
    import numpy as np

    from distillkit.errors import DistillKitError
    from distillkit.shards import Dataset

sys.path.append(str(Path(__file__).parent.parent))
from support.campaigns import Published, PublishedArrow

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm"))
PARTS = {
    b"p": (Published, "data_0.parquet"),
    b"y": (Published, "compression_config.yaml"),
    b"a": (PublishedArrow, "data_0.arrow"),
    b"s": (PublishedArrow, "state.json"),
}


def one_input(data: bytes) -> None:
    campaign, name = PARTS.get(data[:1], PARTS[b"p"])
    folder = FOLDER / campaign.__name__ / "set"
    whole = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(data[1:])
        for document, rows in Dataset.open(folder).decoded():
            if len(document.input_ids) and not np.isfinite(rows.logprobs).all():
                raise ValueError("a log-probability that is not finite")
    except (DistillKitError, OSError):
        pass
    finally:
        (folder / name).write_bytes(whole)


def main() -> None:
    for campaign in (Published, PublishedArrow):
        campaign(FOLDER / campaign.__name__)
    if len(sys.argv) > 2 and sys.argv[1] == "seeds":
        for kind, (campaign, name) in PARTS.items():
            data = kind + (FOLDER / campaign.__name__ / "set" / name).read_bytes()
            (Path(sys.argv[2]) / kind.decode()).write_bytes(data)
        shutil.rmtree(FOLDER)
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
