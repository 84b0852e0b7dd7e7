"""The files of a pool: a header that says what must be there, and Arrow files that are mapped, linked and checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.table import embed_table_storage, table_cast

from ..data.cells import check_cells
from ..files import file_digest, is_inside, load_json
from ..hierarchy import TeacherHierarchy

FORMAT_VERSION = 1
HEADER = "pool.json"
INPUTS = "inputs/data.arrow"
_INPUTS_FOLDER = "inputs"
# In the schema of a file: the folder that it was written to, which is its teacher's name. Older files have none.
_OWNER = b"hf_cosupervise.owner"
_FILE = re.compile(r"(inputs|teachers/[A-Za-z0-9][A-Za-z0-9._-]*)/data\.arrow")
_CHUNK = 8192
# What Arrow and `datasets` make of bytes that are no such file; neither says so in one kind of error.
_UNREADABLE = (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError)
# What every header holds, and what pools of older versions lack.
_NEEDED = {"num_examples": int, "has_inputs": bool, "hierarchy": dict, "facts": dict}
_OPTIONAL = {"files": dict, "source": dict, "ids_digest": str, "card": dict, "input_column": str}
# What of the facts the card is made of.
_FACTS = {"kind": str, "revision": str, "commit": str, "dropped_mass": int | float}
_FACTS |= {"num_outside": int, "num_rescaled": int}


def teacher_dataset(ids: Sequence[Any] | np.ndarray, label_ids: np.ndarray, label_probs: np.ndarray) -> Dataset:
    """Wrap one teacher's pseudolabels as a dataset of fixed-size lists."""
    if label_ids.ndim != 2 or not (len(ids), label_ids.shape[1]) == label_ids.shape == label_probs.shape:
        raise ValueError(
            f"Pseudolabels of {len(ids)} examples must have shape ({len(ids)}, k), got {label_ids.shape} and "
            f"{label_probs.shape}. Give one row per id."
        )
    # A fixed length is what lets the values be viewed as one matrix; lists of any length would need their offsets.
    k = label_ids.shape[1]
    features = Features(
        {
            "id": Value("string" if len(ids) and isinstance(ids[0], str) else "int64"),
            "label_ids": List(Value(str(label_ids.dtype)), length=k),
            "label_probs": List(Value("float16"), length=k),
        }
    )
    id_array = pa.array(ids.tolist() if isinstance(ids, np.ndarray) else list(ids), type=features["id"].pa_type)
    schema = features.arrow_schema
    lists = [
        pa.FixedSizeListArray.from_arrays(
            # From the array's own memory, that of a mapped file as well: nothing is copied.
            pa.Array.from_buffers(field.type.value_type, values.size, [None, pa.py_buffer(values)]),
            type=field.type,
        )
        for field, values in zip(
            list(schema)[1:], (np.ascontiguousarray(label_ids), np.ascontiguousarray(label_probs))
        )
    ]
    digest = hashlib.blake2b(digest_size=8)
    for buffer in (buffer for array in (id_array, *lists) for buffer in array.buffers() if buffer is not None):
        digest.update(buffer)
    # Without a fingerprint of ours, `datasets` makes one of a pickled copy of the whole table.
    return Dataset(pa.Table.from_arrays([id_array, *lists], schema=schema), fingerprint=digest.hexdigest())


def write_teacher(
    path: Path, ids: Sequence[Any] | np.ndarray, pieces: Iterable[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write one teacher's pseudolabels to an Arrow file of a single chunk, without holding them in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written piece by piece, the Arrow file would have as many chunks, of which no view of all can be had. So the
    # pieces grow in plain files, which are mapped and written as one.
    raw = (path.with_suffix(".ids"), path.with_suffix(".probs"))
    with open(raw[0], "wb") as ids_file, open(raw[1], "wb") as probs_file:
        for label_ids, label_probs in pieces:
            ids_file.write(label_ids.tobytes())
            probs_file.write(label_probs.tobytes())
    # The types are those of the last piece: all pieces of a teacher are encoded with one k and one number of labels.
    shape = (len(ids), label_ids.shape[1])
    views = [np.memmap(file, part.dtype, "r", shape=shape) for file, part in zip(raw, (label_ids, label_probs))]
    write_arrow(teacher_dataset(ids, *views), path)
    for file in raw:
        file.unlink()


def write_arrow(dataset: Dataset, path: Path) -> None:
    """Write a dataset to one Arrow file of a single chunk, so that it can be mapped and viewed without a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a teacher says is narrow and becomes one chunk, which can be viewed as an array without a copy; images would
    # need all of them in memory for that, and nobody views those.
    batch = 1000 if path.parent.name == _INPUTS_FOLDER else len(dataset)
    schema = dataset.features.arrow_schema
    owned = schema.with_metadata({**schema.metadata, _OWNER: path.parent.name.encode("utf-8")})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, owned) as writer:
        for start in range(0, len(dataset), max(batch, 1)):
            # Bytes of image files go in: a pool that names paths of this machine could be read nowhere else.
            table = embed_table_storage(table_cast(dataset.with_format("arrow")[start : start + batch], schema))
            writer.write_table(table.combine_chunks())


def _is_owner(path: Path, name: str) -> bool:
    """Tell whether a file was written for a name, as far as it knows; a loaded data set does not know any more."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        # Files of older versions name no owner: they are let through, as whoever reads them asks for.
        return (reader.schema.metadata or {}).get(_OWNER, name.encode("utf-8")) == name.encode("utf-8")


def find_own_file(dataset: Dataset, name: str) -> Path | None:
    """Find the file of one chunk that holds this teacher's dataset and nothing else, as it is on disk now."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # A selection maps the file of the whole, and what is concatenated maps several: neither file is this dataset.
    if dataset._indices is not None or len(files) != 1:
        return None
    if not files[0].is_file() or not _is_owner(files[0], name):
        return None
    # Renamed columns or another file put in its place since show only in the content. Compared on mapped memory.
    whole = Dataset.from_file(str(files[0]))
    is_one_chunk = whole.data.column("id").num_chunks == 1
    return files[0] if is_one_chunk and whole.data.table.equals(dataset.data.table, check_metadata=True) else None


def map_file(
    folder: Path, name: str, size: int | None, digest: str | None, verify: bool, what: str, advice: str
) -> Dataset:
    """Map a file of a pool, of which the header may know what it must be."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"Pool {what} lacks '{path}'. {advice}")
    # Before anything is opened: a pool from the Hub or a mail may hold links to files of this machine.
    if not is_inside(path, folder):
        raise ValueError(
            f"Pool {what} must hold its files itself, got '{name}' as a link to somewhere else. It was not "
            "opened; copy the whole pool without links."
        )
    found, found_size = "", path.stat().st_size
    if size not in (None, found_size):
        found = f"{found_size} bytes instead of {size}"
    # Reads the whole file, which `load` promises not to do unless it is asked.
    elif verify and file_digest(path) != digest:
        found = "other content than its digest tells"
    else:
        try:
            dataset = Dataset.from_file(str(path))
            # Arrow follows wrong offsets blindly. This looks at all of them, and at 10 GB of text in a second.
            dataset.data.validate(full=True)
            found = "" if _is_owner(path, path.parent.name) else "what was written as another file of a pool"
        except _UNREADABLE as error:
            found = f"{type(error).__name__}: {str(error).rstrip('.')}"
    # Outside of the `try`, whose `except` would turn this refusal into a damaged file to be fetched again.
    if not found:
        check_cells(
            dataset.data.table, f"'{path.name}' of pool {what}", "Use no pool of that origin, or have it built anew."
        )
        return dataset
    raise ValueError(
        f"'{path}' of pool {what} must be the Arrow file that was written, got {found}. Delete '{path.resolve()}'. "
        f"{advice}"
    )


def view_matrix(dataset: Dataset, column: str, name: str) -> np.ndarray:
    """View a column of fixed-size lists as a matrix, without a copy where it is one chunk."""
    feature = dataset.features[column]
    is_list = isinstance(feature, List) and feature.length >= 1
    kind = dataset.data.column(column).type.value_type if is_list else pa.null()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        what = "numbers" if is_list else "one fixed length"
        raise ValueError(
            f"Column `{column}` of '{name}' must hold lists of {what}, got {feature}. Make it with `build_pool`."
        )
    chunks = dataset.data.column(column).chunks
    if any(chunk.null_count or chunk.flatten().null_count for chunk in chunks):
        # Arrow leaves null rows out of the flat values, which would shift every later row.
        raise ValueError(f"Column `{column}` of '{name}' must hold no nulls. A missing answer is a row of zeros.")
    parts = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, feature.length) for chunk in chunks]
    # A table without rows has no chunk, but its k is needed all the same.
    if not parts:
        return np.zeros((0, feature.length), dtype=feature.feature.dtype)
    matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
    # A selection keeps the whole table and the positions wanted of it.
    return matrix if dataset._indices is None else matrix[dataset._indices.column(0).to_numpy()]


# ── the header ──────────────────────────────────────────────────────────────────────────────────────────────────────


def dump_header(header: Mapping[str, Any]) -> str:
    """Give a header as the text of its file."""
    return json.dumps(header, indent=2) + "\n"


def open_folder(folder: Path) -> dict[str, Any]:
    """Read the header of a pool in a folder."""
    if not (folder / HEADER).is_file():
        raise FileNotFoundError(f"'{folder}' is not a pool: it has no '{HEADER}'. Make one with `build_pool`.")
    if not is_inside(folder / HEADER, folder):
        raise ValueError(f"Pool '{folder}' must hold its '{HEADER}' itself, got a link. Copy it without links.")
    return read_header(folder / HEADER, folder)


def read_header(path: Path, what: str | Path) -> dict[str, Any]:
    """Read a header that anybody may have written."""
    try:
        header = load_json(path)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # JSON can spell what is no text
    except (ValueError, RecursionError) as error:
        raise _bad_header(what, f"no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad_header(what, f"a {type(header).__name__}")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"Pool '{what}' must have format version {FORMAT_VERSION}, got {header.get('format_version')}. "
            "Update hf_cosupervise, or label the data again."
        )
    kinds = _NEEDED | {key: kind for key, kind in _OPTIONAL.items() if key in header}
    if wrong := [key for key, kind in kinds.items() if not isinstance(header.get(key), kind)]:
        raise _bad_header(what, f"no {kinds[wrong[0]].__name__} as `{wrong[0]}`")
    if not all(isinstance(facts, dict) for facts in header["facts"].values()):
        raise _bad_header(what, "`facts` that are no dictionary per teacher")
    for facts in header["facts"].values():
        if wrong := [key for key, kind in _FACTS.items() if not isinstance(facts.get(key), kind | None)]:
            raise _bad_header(what, f"{facts[wrong[0]]!r} as `{wrong[0]}` among `facts`")
        # A mean of what rows that sum to 1 within `SUM_TOLERANCE` have lost.
        if not 0 <= (facts.get("dropped_mass") or 0) <= 1.01:
            raise _bad_header(what, "a `dropped_mass` that is no share among `facts`")
    if not all(isinstance(value, str) for value in header.get("source", {}).values()):
        raise _bad_header(what, "a `source` that is not all text")
    for entry in header.get("files", {}).values():
        if not (isinstance(entry, list) and list(map(type, entry)) == [int, str]):
            raise _bad_header(what, f"{entry!r} among `files`")
    teachers = header["hierarchy"].get("teachers")
    if not (isinstance(teachers, list) and all(isinstance(teacher, dict) for teacher in teachers)):
        raise _bad_header(what, "no list of teachers")
    if any(isinstance(level := teacher.get("level"), int) and level >= len(teachers) for teacher in teachers):
        raise _bad_header(what, f"levels that {len(teachers)} teachers cannot fill")
    try:
        # There and back, so that two headers of one hierarchy are equal however they spell its defaults.
        header["hierarchy"] = TeacherHierarchy.from_dict(header["hierarchy"]).to_dict()
    except (ValueError, TypeError) as error:
        raise _bad_header(what, str(error).rstrip(".")) from error
    # Names become paths: '../' or an absolute one must not get as far as a folder.
    if unknown := [name for name in header.get("files", {}) if not _FILE.fullmatch(name)]:
        raise _bad_header(what, f"{unknown[0]!r} among `files`, which is no file of a pool")
    return header


def _bad_header(what: str | Path, found: str) -> ValueError:
    return ValueError(
        f"'{HEADER}' of pool '{what}' must be a header that `save` wrote, got {found}. Copy the whole pool again, or "
        "delete it."
    )


def file_names(header: Mapping[str, Any]) -> list[str]:
    """Tell which Arrow files a pool has."""
    names = [f"teachers/{teacher['name']}/data.arrow" for teacher in header["hierarchy"]["teachers"]]
    return [*names, INPUTS] if header["has_inputs"] else names


def ids_digest(ids: np.ndarray) -> str:
    """Hash ids in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(ids), _CHUNK):
        # `repr` tells the text '1' from the number 1, and the line break tells 1, 23 from 12, 3.
        digest.update("".join(f"{value!r}\n" for value in ids[start : start + _CHUNK].tolist()).encode("utf-8"))
    return digest.hexdigest()
