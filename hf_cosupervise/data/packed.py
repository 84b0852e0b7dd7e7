"""Parquet files: how much the data are that a few bytes may stand for."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# A Parquet file may stand for so many times as much as it holds, and for any file that fits beside a model.
_MOST_RATIO, _MOST_UNPACKED, _CHUNK = 1_000, 4 << 30, 4096
_NUM_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}


def check_unpacked(path: Path) -> None:
    """Refuse a Parquet file of few bytes that stands for more than a disk: a billion equal values need a kilobyte."""
    most = max(_MOST_UNPACKED, _MOST_RATIO * path.stat().st_size)
    file = pq.ParquetFile(path)
    # An id is made for each row, whatever is in it.
    num_bytes, texts = 8 * file.metadata.num_rows, set()
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            num_bytes += _NUM_BYTES.get(column.physical_type, 0) * column.num_values
            # A text may be long, kept once, and in every row.
            if column.physical_type not in _NUM_BYTES and column.num_values * column.total_uncompressed_size > most:
                texts.add(column.path_in_schema)
    if num_bytes <= most and texts:
        num_bytes += _num_letters(path, sorted(texts), most)
    if num_bytes > most:
        raise ValueError(
            f"{path.stat().st_size:,} bytes that stand for {file.metadata.num_rows:,} rows of more than "
            f"{most / 1e9:,.0f} GB. If it is yours, give the data themselves, read by `datasets.Dataset.from_parquet`"
        )


def _num_letters(path: Path, columns: list[str], most: int) -> int:
    """How many bytes the texts of some columns have, or more than `most`; none of them is written out for that."""
    found = 0
    for column in columns:
        for batch in pq.ParquetFile(path, read_dictionary=[column]).iter_batches(_CHUNK, columns=[column]):
            for array in map(_innermost, batch.columns):
                if pa.types.is_dictionary(array.type):
                    lengths = pc.binary_length(array.dictionary).take(array.indices)
                    found += pc.sum(lengths).as_py() or 0
                else:
                    found += array.nbytes
            if found > most:
                return found
    return found


def _innermost(array: pa.Array) -> pa.Array:
    while pa.types.is_nested(array.type):
        array = array.field(0) if pa.types.is_struct(array.type) else array.flatten()
    return array
