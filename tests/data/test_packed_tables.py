"""Parquet files of a few bytes that stand for more than a disk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_cosupervise.data import local
from hf_cosupervise.data.local import load_table

MANY = 400_000
LONG = "x" * 100_000


def same(text: str | bytes, count: int) -> pa.Array:
    """One text in every row, which is kept once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int32)), pa.array([text]))


def lists(values: pa.Array, length: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), values)


BOMBS: dict[str, Callable[[], pa.Array]] = {
    "numbers": lambda: pa.array(np.zeros(MANY, dtype=np.int64)),
    "bools": lambda: pa.array(np.zeros(MANY, dtype=bool)),
    "nothing": lambda: pa.nulls(MANY, pa.string()),
    "words": lambda: same("the same word", MANY),
    "texts": lambda: same(LONG, 1_000),
    "bytes": lambda: same(LONG.encode(), 1_000),
    "lists": lambda: lists(pa.array(np.zeros(MANY, dtype=np.float64)), 1_000),
    "lists-of-texts": lambda: lists(pa.array([LONG] * 100), 10),
    "images": lambda: pa.StructArray.from_arrays([pa.array([LONG.encode()] * 100), pa.nulls(100)], ["bytes", "path"]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_stands_for_much(name, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MOST_UNPACKED", 1 << 20)
    monkeypatch.setattr(local, "_MOST_RATIO", 100)
    monkeypatch.setattr(local.Dataset, "from_parquet", None)  # nothing is unpacked
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": BOMBS[name]()}), path, compression="zstd")
    with pytest.raises(ValueError, match=r"got '.*data.parquet': [0-9,]+ bytes that stand for [0-9,]+ rows of more "):
        load_table(path)


def test_real_tables_are_no_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MOST_UNPACKED", 1 << 20)
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "text": pa.array([f"a text {number} of its own" for number in range(20_000)]),
            "same": same("the same words in every row", 20_000),
            "vector": lists(pa.array(rng.normal(size=200_000)), 10),
            "nothing": pa.nulls(20_000, pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "data.parquet", compression="zstd")
    assert len(load_table(tmp_path / "data.parquet")) == 20_000
