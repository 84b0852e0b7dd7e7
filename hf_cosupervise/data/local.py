"""Data in plain files of this machine: a table, or a folder of images."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Image
from datasets.exceptions import DatasetsError
from datasets.utils.extract import Extractor
from PIL import Image as PILImage

from ..files import is_inside
from ..processes import join_processes
from .cells import check_cells
from .columns import is_numeric, shorten
from .inputs import read_header

logger = logging.getLogger(__name__)

TABLE_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# What systems leave in folders by themselves.
_NOT_MEANT = ("Thumbs.db", "desktop.ini")
# A Parquet file may stand for so many times as much as it holds, and for any file that fits beside a model.
_MOST_RATIO, _MOST_UNPACKED, _CHUNK = 1_000, 4 << 30, 4096
_NUM_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}


def is_table(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name is one of a file with a table."""
    return Path(name).suffix.lower() in TABLE_KINDS and not Path(name).is_dir()


def load_table(path: str | os.PathLike[str]) -> Dataset:
    """Read a CSV, TSV, JSON-lines or Parquet file; the first line of a CSV names its columns."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`dataset` must be a file, a folder or an id on the Hub, got no file '{path}'.")
    # By its bytes, as `datasets` does, which would unpack it: a megabyte may become a terabyte.
    if (packed := Extractor.infer_extractor_format(str(path))) is not None:
        raise ValueError(f"`dataset` must be a plain table, got an archive, '{path}' ({packed}). Unpack it first.")
    with _one_sentence(path):
        if path.suffix.lower() in (".csv", ".tsv"):
            data = _read_csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")
        elif path.suffix.lower() == ".parquet":
            _check_unpacked(path)
            data = Dataset.from_parquet(str(path))
        else:
            with path.open("rb") as file:  # pyarrow dies of a `null` where a row should be
                if file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"", b"{", b"["):
                    raise ValueError("it must hold one JSON object per line, or a list of them, and begins otherwise")
            data = Dataset.from_json(str(path))
    check_cells(data.data.table, f"The data in '{path}'", "Put the content in, or give a folder of images.")
    return data


def _read_csv(path: Path, separator: str) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    strange = [name for name in header if not name.strip() or is_numeric(name) or header.count(name) > 1]
    if strange or not header:
        raise ValueError(
            f"the first line must name the columns, each by a word of its own, and holds {shorten(header, 6)}. Write "
            "such a line"
        )
    # Nothing but an empty cell is missing: "NA" and "None" may be labels.
    data = Dataset.from_csv(str(path), sep=separator, encoding="utf-8-sig", keep_default_na=False, na_values=[""])
    if data.column_names != header:  # pandas takes a cell too many for the name of a row, and shifts the others
        raise ValueError(
            f"its lines have {len(data.column_names)} cells for the {len(header)} names {shorten(header, 6)} in the "
            "first one. Put cells that hold the separator in quotes"
        )
    return data


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    # What pandas, pyarrow and json raise are such; `datasets` finds no first line, or lists without end.
    except (DatasetsError, ValueError, StopIteration, RecursionError) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        reason = "it holds no data" if not reason or "corresponds to no data" in reason else reason
        raise ValueError(f"`dataset` must be a table that can be read, got '{path}': {reason}.") from error


def _check_unpacked(path: Path) -> None:
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


def load_images(folder: str | os.PathLike[str], *, with_labels: bool = False, on_error: str = "raise") -> Dataset:
    """List the images below a folder: `id` (the path in it), `image`, and as `label` the name of their own folders."""
    folder = Path(folder)
    known, images, others = PILImage.registered_extensions(), list[Path](), list[str]()
    for path in _walk(folder):
        if not is_inside(path, folder):
            raise ValueError(
                f"`dataset` must be a folder that holds its images itself, got '{folder}' with a link '{path.name}' "
                "that leads out of it. It was not opened; copy the image."
            )
        if path.is_dir():
            continue  # a link to images that are listed where they are
        # What is no plain file, such as a pipe, would be waited for.
        is_image = path.suffix.lower() in known and path.is_file()
        is_image = is_image and read_header(path)[0] not in ("", "EPS")  # which is a program
        images.append(path) if is_image else others.append(path.relative_to(folder).as_posix())
    found = f"{len(others)} files in '{folder}' that are none: {shorten(others, 5)}"
    if others and on_error == "raise":
        raise ValueError(
            f"`dataset` must be a folder of images, got {found}. Take them out, or leave them out by "
            "`on_error` 'missing'."
        )
    if others and images and join_processes().rank == 0:
        logger.warning(f"Of a folder of images were left out {found}. Take them out, or correct them.")
    if not images:
        raise ValueError(
            f"`dataset` must be a folder of images or one of `save_to_disk`, got neither in '{folder}'. "
            "Check the path."
        )
    columns: dict[str, list[Any]] = {
        "id": [path.relative_to(folder).as_posix() for path in images],
        "image": [str(path) for path in images],
    }
    with_labels = with_labels and all(path.parent != folder for path in images)
    if with_labels:
        columns["label"] = [path.parent.name for path in images]
    data = Dataset.from_dict(columns).cast_column("image", Image())
    return data.cast_column("label", ClassLabel(names=sorted(set(columns["label"])))) if with_labels else data


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for path in (Path(place, name) for name in folders) if path.is_symlink())
        yield from (Path(place, name) for name in sorted(files) if name[0] != "." and name not in _NOT_MEANT)
