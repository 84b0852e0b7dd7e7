"""Cells that say where their content is instead of holding it: found at any depth, and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class OutsideCellError(ValueError):
    """Data of others name a file or an address in place of a cell."""


def outside_cells(table: pa.Table) -> Iterator[tuple[str, int, str]]:
    """Find cells that do not hold their content but say where it is."""
    for column in table.column_names:
        # Rows are counted over the chunks, for the sentence names the row of the table.
        start = 0
        for chunk in table.column(column).chunks:
            for row, path in _outside(chunk):
                yield column, start + row, path
            start += len(chunk)


def _outside(array: pa.Array) -> Iterator[tuple[int, str]]:
    """Positions in an array at which something is a path without its bytes."""
    # An extension type hides what it stores from the questions by type below.
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type):
        # `flatten` counts a null row as null in every field, so that what lies beneath it is not taken for content.
        fields = dict(zip((field.name for field in array.type), array.flatten()))
        if {"bytes", "path"} <= fields.keys():
            is_outside = pc.and_(pc.is_null(fields["bytes"]), pc.is_valid(fields["path"]))
            for row in np.flatnonzero(is_outside.to_numpy(zero_copy_only=False)).tolist():
                yield row, str(fields["path"][row].as_py())
        for values in fields.values():
            yield from _outside(values)
    elif pa.types.is_nested(array.type) and not pa.types.is_union(array.type):
        # A null list has no length, and `list_flatten` leaves its values out: both must skip it, or later rows shift.
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(len(array)), lengths)
        for position, path in _outside(pc.list_flatten(array)):
            yield int(rows[position]), path


def check_cells(
    table: pa.Table, what: str, advice: str, is_own: Callable[[str], bool] = lambda path: False, start: int = 0
) -> None:
    """Refuse data of others that would have us open a file of this machine, or an address, in place of a cell."""
    for column, row, path in outside_cells(table):
        if not is_own(path):
            raise OutsideCellError(
                f"{what} must hold the content of every cell, got the path {path[:200]!r} without content "
                f"in row {start + row} of column '{column}'. It was not opened. {advice}"
            )
