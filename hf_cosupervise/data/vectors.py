"""Inputs that are vectors: a column of lists of numbers, or several columns of numbers that are read as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value, concatenate_datasets

from .columns import find_input_column, has_input, is_numeric, is_vector_column, shorten

VECTOR_MODEL = "vector_classifier"  # the `model_type` of a student that reads vectors
VECTOR_INPUT = "vectors"  # what its `forward` takes
VECTOR_COLUMN = "vector"  # of vectors that are given as an array
_SEPARATOR = ","
# Differences and squares of larger numbers are none that float32 can hold.
_MOST = 1e18
_CHUNK = 8192


# ── several columns as one ──────────────────────────────────────────────────────────────────────────────────────────


def name_columns(columns: Any) -> Any:
    """Give the name of the vector of several columns, `"age, income"`: it tells by itself what the vector is of."""
    if not isinstance(columns, list | tuple) or not columns or not all(isinstance(name, str) for name in columns):
        return columns
    if wrong := [name for name in columns if _SEPARATOR in name and len(columns) > 1]:
        raise ValueError(f"Columns of a vector must have names without a comma, got {wrong[0]!r}. Rename it.")
    return ", ".join(columns)


def parts_of(dataset: Dataset, column: str | None) -> list[str]:
    """Name the columns that a name joins; none where it is one column's, or names others than those of the data."""
    if column is None or column in dataset.column_names or _SEPARATOR not in column:
        return []
    parts = [name.strip() for name in column.split(_SEPARATOR)]
    if len(set(parts)) < len(parts):
        raise ValueError(f"Columns of a vector must be named once each, got {shorten(parts)}. Leave one out.")
    return parts if set(parts) <= set(dataset.column_names) else []


def join_columns(dataset: Dataset, column: str | None) -> tuple[Dataset, str | None]:
    """Put the vectors of several columns into a column, where a name is of several; they stay beside it."""
    if not (parts := parts_of(dataset, column)):
        return dataset, column
    name = ", ".join(parts)
    if name in dataset.column_names:  # written with other spaces this time
        return dataset, name
    return _add_vectors(dataset, name, np.stack([_read_numbers(dataset, part) for part in parts], axis=1)), name


def with_input(dataset: Dataset, column: str) -> Dataset:
    """Give data with the column that a student reads, made of several where it is; a `ValueError` without them."""
    dataset, _ = join_columns(dataset, column)
    find_input_column(dataset, column)
    return dataset


def _read_numbers(dataset: Dataset, name: str) -> np.ndarray:
    """A column of numbers as float64, NaN where there is none."""
    cells = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    kinds = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null
    if not any(is_kind(cells.type) for is_kind in kinds):
        wrong = ((row, cell) for row, cell in enumerate(cells.to_pylist()) if not (cell is None or is_numeric(cell)))
        row, cell = next(wrong, (0, None))
        kind = str(cells.type).removeprefix("large_")
        raise TypeError(
            f"Columns that are read as one vector must hold numbers, got {kind} in '{name}', such as "
            f"{str(cell)[:40]!r} in row {row}. Correct its cells (an empty one is a missing number), or leave it out. "
            "Of several texts make one first: `dataset.map(lambda row: {'text': row['a'] + ' ' + row['b']})`."
        )
    return np.array(pc.fill_null(pc.cast(cells, pa.float64(), safe=False), np.nan), dtype=np.float64)


def vector_inputs(vectors: Any, inputs: Dataset | None = None) -> Dataset | None:
    """Put an array `(num_rows, num_features)` into a column `vector`, beside those of the inputs if there are any."""
    if vectors is None:
        return inputs
    try:
        array = np.asarray(vectors)
    except ValueError as error:
        raise ValueError(
            "`vectors` must be numbers of shape (num_rows, num_features), got rows of different lengths. Give a row "
            "of equally many numbers for each example."
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "biuf" or not array.shape[1]:
        raise ValueError(
            f"`vectors` must be numbers of shape (num_rows, num_features), got {array.dtype} of shape {array.shape}. "
            "Give a row of equally many numbers for each example."
        )
    if inputs is not None and (len(inputs) != len(array) or VECTOR_COLUMN in inputs.column_names):
        raise ValueError(
            f"`inputs` beside `vectors` must hold as many rows, {len(array)}, and no column '{VECTOR_COLUMN}', got "
            f"{len(inputs)} rows of {inputs.column_names}. Select the same examples, or give one of the two."
        )
    return _add_vectors(inputs, VECTOR_COLUMN, array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32))


def _add_vectors(dataset: Dataset | None, name: str, array: np.ndarray) -> Dataset:
    """Put an array into a column beside those of some data: as Arrow, without a list of each row."""
    cells = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
    column = Dataset(pa.table({name: cells}))
    return column if dataset is None else concatenate_datasets([dataset, column], axis=1)


# ── a column of vectors ─────────────────────────────────────────────────────────────────────────────────────────────


def stack_vectors(cells: Sequence[Any], num_features: int) -> np.ndarray:
    """Read cells as vectors, `(num_cells, num_features)` float32; a `ValueError` where one is of another length."""
    vectors = np.zeros((len(cells), num_features), dtype=np.float32)
    for row, cell in enumerate(cells):
        vectors[row] = np.asarray(cell, dtype=np.float32).ravel()
    return vectors


def check_vectors(dataset: Dataset, column: str, num_features: int | None = None) -> int:
    """See that all vectors of a column are of one length and finite, and give that length."""
    if not is_vector_column(dataset, column):
        raise ValueError(
            f"A student of vectors reads lists of numbers, or several columns of numbers, got column '{column}' of "
            f"{_describe(dataset.features[column])}. Name the right one by `input_column`, such as 'features' or "
            "'age, income'."
        )
    is_there = has_input(dataset, column)
    counts, is_finite = _scan(dataset, column)
    if not is_there.any():
        return num_features or 0
    own = int(np.bincount(counts[is_there]).argmax())  # as most of them, so that the row at fault is named
    if num_features is not None and own != num_features:
        raise ValueError(
            f"The student reads vectors of {num_features} numbers, got {own} in column '{column}'. Name another "
            "column, or make a student for these data."
        )
    if len(wrong := np.flatnonzero(is_there & (counts != own))):
        raise ValueError(
            f"Vectors in column '{column}' must all be of one length, {own} as most are, got one of "
            f"{counts[wrong[0]]} in row {wrong[0]} ({len(wrong)} such rows). Correct or leave out these rows."
        )
    if own == 0:
        raise ValueError(f"Vectors in column '{column}' must hold a number or more, got empty ones. Fill them.")
    if len(wrong := np.flatnonzero(is_there & ~is_finite)):
        [(_, values, _)] = _read_chunks(dataset.select(wrong[:1]), column)
        place = int(np.flatnonzero(~_is_usable(values))[0])
        parts = column.split(", ")
        where = f"'{parts[place]}'" if len(parts) == own > 1 else f"place {place}"
        raise ValueError(
            f"Vectors in column '{column}' must hold finite numbers below {_MOST:g}, got {values[place]} at {where} "
            f"of row {wrong[0]} ({len(wrong)} such rows). Fill what is missing, such as by the mean, or leave out "
            "these rows."
        )
    return own


def unreadable_vectors(dataset: Dataset, column: str) -> np.ndarray:
    """Find the rows that hold a vector which is empty, of another length than most, or not finite."""
    is_there, (counts, is_finite) = has_input(dataset, column), _scan(dataset, column)
    own = np.bincount(counts[is_there & (counts > 0)], minlength=1).argmax()
    return np.flatnonzero(is_there & ((counts != own) | ~is_finite | (counts == 0)))


def measure_vectors(dataset: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Give mean and standard deviation of each number of the vectors of a column that was checked, float64."""
    chunks = [values.reshape(np.count_nonzero(counts), -1) for _, values, counts in _read_chunks(dataset, column)]
    matrix = np.concatenate([chunk for chunk in chunks if len(chunk)])
    return matrix.mean(axis=0), matrix.std(axis=0)


def vector_digests(dataset: Dataset, column: str) -> list[str]:
    """Hash each vector by its numbers, many times as fast as by how they are written."""
    digests = []
    for _, values, counts in _read_chunks(dataset, column):
        ends = np.cumsum(counts)
        for start, end in zip((ends - counts).tolist(), ends.tolist()):
            digests.append(hashlib.blake2b(values[start:end].tobytes(), digest_size=16).hexdigest())
    return digests


def _scan(dataset: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """How many numbers each row holds, `(num_rows,)`, and whether all can be used."""
    counts, is_finite = np.zeros(len(dataset), dtype=np.int64), np.ones(len(dataset), dtype=bool)
    for start, values, own in _read_chunks(dataset, column):
        counts[start : start + len(own)] = own
        is_finite[start + np.repeat(np.arange(len(own)), own)[~_is_usable(values)]] = False
    return counts, is_finite


def _is_usable(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(values) < _MOST  # NaN is below nothing


def _read_chunks(dataset: Dataset, column: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The numbers of some rows one after another, and how many of them each row has: by Arrow, without a list."""
    view = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(dataset), _CHUNK):
        values, counts = _flatten(view[start : start + _CHUNK].column(column).combine_chunks())
        numbers = np.asarray(values.to_numpy(zero_copy_only=False))
        if numbers.dtype == object:  # of booleans some of which are missing
            numbers = np.array([np.nan if value is None else value for value in numbers])
        yield start, numbers.astype(np.float64), counts


def _flatten(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Leaves of lists at any depth, and how many each row has."""
    if isinstance(array, pa.ExtensionArray):  # of two dimensions and more
        array = array.storage
    if not pa.types.is_nested(array.type):
        return array, np.ones(len(array), dtype=np.int64)
    values, counts = _flatten(pc.list_flatten(array))  # which leaves out what lies beneath a null
    ends = np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64))
    edges = np.concatenate([[0], np.cumsum(counts)])
    return values, np.diff(edges[ends], prepend=0)


def _describe(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__
