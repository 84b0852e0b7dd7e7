"""By what rows are known: their content, whatever their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from .columns import check_column

_CHUNK = 1000


def row_keys(dataset: Dataset, column: str) -> list[str]:
    """Give each row a key that depends on its content only, so that it survives shuffling and selection."""
    seen: dict[str, int] = {}
    keys = []
    for digest in cell_digests(dataset, column):
        # Equal cells are told apart by how many came before: the first one keeps its key whatever follows.
        count = seen[digest] = seen.get(digest, -1) + 1
        keys.append(f"{digest}-{count}" if count else digest)
    return keys


def cell_digests(dataset: Dataset, column: str) -> list[str]:
    """Hash the raw content of each cell; equal cells have equal digests."""
    check_column(dataset, column)
    # As Arrow, so that images are hashed as stored and not decoded first.
    table_view = dataset.select_columns([column]).with_format("arrow")
    digests = []
    for start in range(0, len(dataset), _CHUNK):
        for cell in table_view[start : start + _CHUNK].column(column).to_pylist():
            digests.append(cell_digest(cell))
    return digests


def cell_digest(cell: Any) -> str:
    """Hash the raw content of one cell, as [`cell_digests`] does."""
    return hashlib.blake2b(_cell_bytes(cell), digest_size=16).hexdigest()


def _cell_bytes(cell: Any) -> bytes:
    if isinstance(cell, Mapping) and set(cell) == {"bytes", "path"}:  # an image, encoded or still a file
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return Path(cell["path"] or "").read_bytes()
        except (OSError, ValueError):  # whoever reads the image says so, and names the row
            return f"no file: {cell['path']}".encode()
    if isinstance(cell, str):
        return cell.encode("utf-8")
    if isinstance(cell, bytes):
        return cell
    # Sorted, since the order of keys in an object is no content.
    return json.dumps(cell, sort_keys=True, default=str).encode("utf-8")
