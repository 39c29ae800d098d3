"""Files of a few kilobytes that hold far more, one to a folder: `python -m support.bombs FOLDER`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from support.shards import make_documents, write

GOLDEN = Path(__file__).parent.parent / "golden"
SIZE = 400_000_000
"""Bytes that a bomb takes in memory."""


def bombs(folder: Path) -> Iterator[Path]:
    """Write them one after the other."""
    published = pq.read_table(GOLDEN / "upstream_v1" / "data_0.parquet").slice(0, 1)
    for name in ("input_ids", "compressed_logprobs"):
        yield written(folder / f"published-{name}", published, name, "data_0.parquet")
    write(folder / "whole", make_documents(1))
    whole = folder / "whole" / "data-00000.parquet"
    shard, metadata = pq.read_table(whole), pq.read_metadata(whole).metadata
    for name in ("input_ids", "teacher"):
        yield written(folder / f"shard-{name}", shard, name, "data-00000.parquet", metadata)
    shutil.rmtree(folder / "whole")
    text = pa.table({"text": pa.array(["x"], pa.large_string())})
    yield written(folder / "text", text, "text", "rows.parquet")
    saved = folder / "saved"
    saved.mkdir()
    large = blown_up(text, "text")
    write_arrow(saved / "data-00000-of-00001.arrow", large, compression="zstd")
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": null}')
    (saved / "dataset_info.json").write_text("{}")
    yield saved


def written(folder: Path, table: pa.Table, name: str, file: str, metadata: Any = None) -> Path:
    """A Parquet file of a table with a column blown up."""
    folder.mkdir()
    if name in ("input_ids", "compressed_logprobs") and metadata is None:
        shutil.copy(GOLDEN / "upstream_v1" / "compression_config.yaml", folder)
    large = blown_up(table, name)
    with pq.ParquetWriter(folder / file, large.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(large)
        writer.add_key_value_metadata({key: value for key, value in (metadata or {}).items() if key != b"ARROW:schema"})
    return folder


def write_arrow(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a file as `save_to_disk` does."""
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table)


def blown_up(table: pa.Table, name: str) -> pa.Table:
    """A table of one row with zeros in a column: one large value."""
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, zeros(field.type))


def zeros(kind: pa.DataType) -> pa.Array:
    """An array of one value."""
    if pa.types.is_large_binary(kind) or pa.types.is_large_string(kind):
        return pa.array([b"0" * SIZE], pa.large_binary()).cast(kind)
    if pa.types.is_nested(kind.value_type):
        width = 56
        inner = pa.ListArray.from_arrays(
            np.arange(0, SIZE // 2 + 1, width, dtype=np.int32), pa.array(np.zeros(SIZE // 2, np.uint8))
        )
        return pa.ListArray.from_arrays(pa.array([0, len(inner)], pa.int32()), inner).cast(kind)
    width = kind.value_type.bit_width // 8
    values = pa.array(np.zeros(SIZE // width, f"i{width}")).cast(kind.value_type)
    offsets = pa.array([0, len(values)], pa.int64() if pa.types.is_large_list(kind) else pa.int32())
    return (pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray).from_arrays(offsets, values)


if __name__ == "__main__":
    for _ in bombs(Path(sys.argv[1])):
        pass
