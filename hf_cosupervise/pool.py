"""The pool of pseudolabels: one plain dataset per teacher beside the inputs, joined on `id`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from .aggregation import mean_probs
from .assignment import NOBODY
from .cards import pool_card, write_card
from .inputs import read_labels
from .sparse import check_top_k, decode_top_k, default_pool_k, dropped_mass, encode_top_k, scale_top_k
from .teachers import TeacherHierarchy

FORMAT_VERSION = 1
ORACLE_LABEL = "oracle_label"
ORACLE_DOMAIN = "oracle_domain"
_HEADER = "pool.json"
_CHUNK = 8192


class PseudolabelPool:
    """Hold what every teacher says about every example, as `datasets.Dataset`s that map files from disk.

    Each teacher has a dataset of `id`, `label_ids` and `label_probs` (its most probable labels, float16, descending);
    a row of zeros means that the teacher has no answer. `inputs` holds `id`, what the models read, and where they are
    known `oracle_label` and `oracle_domain`, which nothing but `oracle_…` functions reads.

    Args:
        hierarchy (`TeacherHierarchy`):
            The teachers, each of which has a dataset.
        teachers (`Mapping[str, datasets.Dataset]`):
            Dataset of each teacher by its name.
        inputs (`datasets.Dataset`, *optional*):
            `id` and the inputs. Without it, training needs a `train_dataset` with the same ids.
        facts (`Mapping[str, Any]`, *optional*):
            What is known about each teacher's run, JSON values by teacher name.

    Raises:
        ValueError: If a teacher of the hierarchy is missing, ids are repeated, missing or differ between datasets, or
            a row of pseudolabels is not valid.
    """

    def __init__(
        self,
        hierarchy: TeacherHierarchy,
        teachers: Mapping[str, Dataset],
        inputs: Dataset | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.hierarchy = hierarchy
        self.inputs = inputs
        self.facts: dict[str, Any] = dict(facts or {})
        self._check_teachers(teachers)
        self.teachers = {name: teachers[name] for name in hierarchy.names}
        self.ids = _read_ids(inputs if inputs is not None else self.teachers[hierarchy.names[0]], "the pool")
        self._orders: dict[str, np.ndarray] = {}
        self._views = {name: self._open(name, dataset) for name, dataset in self.teachers.items()}
        self._oracle_labels = _read_oracle_labels(inputs, hierarchy.labels)

    def _check_teachers(self, teachers: Mapping[str, Dataset]) -> None:
        if missing := [name for name in self.hierarchy.names if name not in teachers]:
            levels = sorted({self.hierarchy.teachers[self.hierarchy.index(name)].level for name in missing})
            raise ValueError(
                f"The pool must hold pseudolabels of every teacher of the hierarchy, got none of {missing} "
                f"(level {levels}). Label the data with them by `build_pool`."
            )
        for name, dataset in teachers.items():
            if lacking := [
                column for column in ("id", "label_ids", "label_probs") if column not in dataset.column_names
            ]:
                raise ValueError(
                    f"Pseudolabels of '{name}' must have the columns id, label_ids and label_probs, got no {lacking}."
                )

    def _open(self, name: str, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Map the two columns as arrays, in the order of the pool's ids."""
        label_ids, label_probs = _matrix(dataset, "label_ids", name), _matrix(dataset, "label_probs", name)
        for start in range(0, max(len(dataset), 1), _CHUNK):  # a chunk at a time: the check must not fill the memory
            chunk = slice(start, start + _CHUNK)
            check_top_k(label_ids[chunk], label_probs[chunk], self.hierarchy.num_labels, name)
        ids = _read_ids(dataset, f"'{name}'")
        if not np.array_equal(ids, self.ids):
            rows = self._orders[name] = match_ids(ids, self.ids, f"Pseudolabels of '{name}'")
            label_ids, label_probs = label_ids[rows], label_probs[rows]
        return label_ids, label_probs

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        inputs = "none" if self.inputs is None else self.inputs.column_names
        return f"PseudolabelPool({len(self)} examples, {self.hierarchy!r}, inputs: {inputs})"

    @property
    def labels(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The task's label names."""
        return self.hierarchy.labels

    @property
    def oracle_labels(self) -> np.ndarray | None:
        """`np.ndarray` of shape `(num_examples,)`: Ground truth where it was declared, for analysis only."""
        return self._oracle_labels

    def column(self, name: str, rows: slice = slice(None)) -> list[Any]:  # noqa: B008  # a slice cannot change
        """Give a metadata column of the inputs.

        Args:
            name (`str`):
                Its name.
            rows (`slice`, *optional*):
                Which examples; all by default.

        Returns:
            `list`: One value per example.

        Raises:
            ValueError: If there is no such column.
        """
        columns = [] if self.inputs is None else self.inputs.column_names
        if self.inputs is None or name not in columns:
            raise ValueError(
                f"The pool's inputs must have a column {name!r}, got {columns}. Build the pool from data with it."
            )
        return list(self.inputs.select_columns([name])[rows][name])

    def label_ids(self, name: str) -> np.ndarray:
        """Give a teacher's most probable labels, as a view of the Arrow file.

        Args:
            name (`str`):
                Name of a teacher.

        Returns:
            `np.ndarray` of shape `(num_examples, k)`, read-only, most probable first.
        """
        return self._views[name][0]

    def label_probs(self, name: str) -> np.ndarray:
        """Give the probabilities of [`label_ids`], as a view of the Arrow file.

        Args:
            name (`str`):
                Name of a teacher.

        Returns:
            `np.ndarray` of shape `(num_examples, k)`, float16, read-only; all zero where there is no answer.
        """
        return self._views[name][1]

    def answered(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:  # noqa: B008
        """Tell which examples a teacher answered.

        Args:
            name (`str`):
                Name of a teacher.
            rows (`np.ndarray` of int or `slice`, *optional*):
                Which examples; all by default.

        Returns:
            `np.ndarray` of shape `(num_rows,)`, bool.
        """
        return self.label_probs(name)[rows, 0] > 0

    def hard_labels(self, name: str) -> np.ndarray:
        """Give a teacher's most probable label of each example.

        Args:
            name (`str`):
                Name of a teacher.

        Returns:
            `np.ndarray` of shape `(num_examples,)`, int64; -1 where there is no answer.
        """
        return np.where(self.answered(name), self.label_ids(name)[:, 0].astype(np.int64), -1)

    def decode(self, name: str, rows: np.ndarray | slice | None = None) -> np.ndarray:
        """Give full probability vectors of a teacher.

        Args:
            name (`str`):
                Name of a teacher.
            rows (`np.ndarray` of int or `slice`, *optional*):
                Which examples; all by default.

        Returns:
            `np.ndarray` of shape `(num_rows, num_labels)`, float32: rows sum to 1, all zero without an answer.
        """
        rows = slice(None) if rows is None else rows
        return decode_top_k(self.label_ids(name)[rows], self.label_probs(name)[rows], self.hierarchy.num_labels)

    @property
    def source_names(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: Who can speak for an example: the teachers, then the ensemble of each level."""
        return (*self.hierarchy.names, *(f"ensemble-{level}" for level in range(self.hierarchy.num_levels)))

    def gather(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the stored row of the teacher that speaks for each example, read from the views of the Arrow files.

        Args:
            sources (`np.ndarray` of shape `(num_rows,)`):
                Positions of teachers in `source_names`, -1 for nobody; no ensemble, which has no stored rows.
            rows (`np.ndarray` of shape `(num_rows,)`):
                Which examples.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: label ids and float16 probabilities, both of shape `(num_rows, k)`, most
            probable first; all zero where nobody speaks. A teacher that keeps fewer labels than another is padded
            with zeros.

        Raises:
            ValueError: If a source is an ensemble or does not exist.
        """
        names = self.hierarchy.names
        order = np.argsort(sources, kind="stable")
        ordered_rows, ordered_sources = rows[order], sources[order]
        shape = (len(rows), max(ids.shape[1] for ids, _ in self._views.values()))
        label_ids, label_probs = (
            np.zeros(shape, dtype=np.result_type(*{view.dtype for view in views}))
            for views in zip(*self._views.values())
        )
        starts = np.flatnonzero(np.diff(ordered_sources, prepend=np.iinfo(np.int64).min))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)]):
            source = int(ordered_sources[start])
            if not NOBODY <= source < len(names):
                raise ValueError(f"`sources` must be teachers (0..{len(names) - 1}) or -1 for nobody, got {source}.")
            if source != NOBODY:
                ids, probs = self._views[names[source]]
                label_ids[start:stop, : ids.shape[1]] = ids.take(ordered_rows[start:stop], axis=0)
                label_probs[start:stop, : ids.shape[1]] = probs.take(ordered_rows[start:stop], axis=0)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return label_ids.take(back, axis=0), label_probs.take(back, axis=0)

    def hard_pseudolabels(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Give the most probable label of each example by whoever speaks for it.

        Args:
            sources (`np.ndarray` of shape `(num_rows,)`):
                Positions in `source_names`, -1 for nobody.
            rows (`np.ndarray` of shape `(num_rows,)`):
                Which examples.

        Returns:
            `np.ndarray` of shape `(num_rows,)`, int64: ties to the lowest label, -1 where nobody speaks.
        """
        if (sources >= len(self.hierarchy.names)).any():
            probs = self.pseudolabels(sources, rows)
            return np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
        label_ids, label_probs = self.gather(sources, rows)
        return np.where(label_probs[:, 0] > 0, label_ids[:, 0].astype(np.int64), -1)

    def sparse_pseudolabels(
        self, sources: np.ndarray, rows: np.ndarray, *, hard: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give the pseudolabel of each example by the teacher that speaks for it, without the labels left out.

        Args:
            sources (`np.ndarray` of shape `(num_rows,)`):
                Positions of teachers, -1 for nobody, as [`gather`] takes them. All must keep equally many labels.
            rows (`np.ndarray` of shape `(num_rows,)`):
                Which examples.
            hard (`bool`, *optional*, defaults to `False`):
                Give 1 to the most probable label instead of probabilities.

        Returns:
            `tuple[np.ndarray, np.ndarray, np.ndarray]`: label ids `(num_rows, k)` int64, their probabilities
            `(num_rows, k)` float32 and the probability of each other label `(num_rows,)` float32.

        Raises:
            ValueError: If teachers keep different numbers of labels, or as [`gather`].
        """
        if not (hard or self.has_one_k):
            sizes = {name: self.label_ids(name).shape[1] for name in self.hierarchy.names}
            raise ValueError(f"All teachers must keep equally many labels, got {sizes}. Use `pseudolabels`.")
        label_ids, stored = self.gather(sources, rows)
        if hard:
            label_ids, stored = label_ids[:, :1], np.sign(stored[:, :1])
        probs, rest_probs = scale_top_k(stored, self.hierarchy.num_labels)
        return label_ids.astype(np.int64), probs, rest_probs

    def pseudolabels(self, sources: np.ndarray, rows: np.ndarray, *, hard: bool = False) -> np.ndarray:
        """Give the pseudolabel of each example by whoever speaks for it.

        Args:
            sources (`np.ndarray` of shape `(num_rows,)`):
                Positions in `source_names`, -1 for nobody.
            rows (`np.ndarray` of shape `(num_rows,)`):
                Which examples.
            hard (`bool`, *optional*, defaults to `False`):
                Give 1 to the most probable label (ties to the lowest) instead of probabilities.

        Returns:
            `np.ndarray` of shape `(num_rows, num_labels)`, float32: rows sum to 1, all zero where nobody speaks.
        """
        names = self.hierarchy.names
        probs = np.zeros((len(rows), self.hierarchy.num_labels), dtype=np.float32)
        for source in np.unique(sources[sources != NOBODY]).tolist():
            if not 0 <= source < len(self.source_names):
                raise ValueError(
                    f"`sources` must be positions in `source_names` (0..{len(self.source_names) - 1}) or -1 for "
                    f"nobody, got {source}."
                )
            here = np.flatnonzero(sources == source)
            if source < len(names):
                probs[here] = self.decode(names[source], rows[here])
            else:
                level = self.hierarchy.level_indices(source - len(names))
                probs[here] = mean_probs(*self.decode_level(level, rows[here])).numpy()
        if hard:
            one_hot = np.zeros_like(probs)
            one_hot[np.arange(len(rows)), probs.argmax(axis=1)] = 1.0
            return one_hot * (probs.sum(axis=1, keepdims=True) > 0)
        return probs

    def decode_level(self, indices: Sequence[int], rows: np.ndarray | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Give full probability vectors of several teachers.

        Args:
            indices (`Sequence[int]`):
                Positions of the teachers in the hierarchy.
            rows (`np.ndarray` of int or `slice`):
                Which examples.

        Returns:
            `tuple[torch.Tensor, torch.BoolTensor]`: probabilities `(num_rows, num_teachers, num_labels)`, and who
            answered `(num_rows, num_teachers)`.
        """
        names = [self.hierarchy.names[index] for index in indices]
        probs = np.stack([self.decode(name, rows) for name in names], axis=1)
        answered = np.stack([self.answered(name, rows) for name in names], axis=1)
        return torch.from_numpy(probs), torch.from_numpy(answered)

    @property
    def has_one_k(self) -> bool:
        """`bool`: Whether all teachers keep equally many labels, so that their rows fit into one array."""
        return len({label_ids.shape[1] for label_ids, _ in self._views.values()}) == 1

    def sparse_level(
        self, indices: Sequence[int], rows: np.ndarray | slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give the stored labels of several teachers that keep equally many, without the labels left out.

        Args:
            indices (`Sequence[int]`):
                Positions of the teachers in the hierarchy.
            rows (`np.ndarray` of int or `slice`):
                Which examples.

        Returns:
            `tuple[torch.LongTensor, torch.Tensor, torch.Tensor]`: label ids and their probabilities
            `(num_rows, num_teachers, k)`, and the probability of each other label `(num_rows, num_teachers)`.
        """
        views = [self._views[self.hierarchy.names[index]] for index in indices]
        label_ids = np.stack([ids[rows] for ids, _ in views], axis=1).astype(np.int64)
        scaled = [scale_top_k(stored[rows], self.hierarchy.num_labels) for _, stored in views]
        probs, rest_probs = (np.stack(parts, axis=1) for parts in zip(*scaled))
        return torch.from_numpy(label_ids), torch.from_numpy(probs), torch.from_numpy(rest_probs)

    @classmethod
    def from_predictions(
        cls,
        hierarchy: TeacherHierarchy,
        ids: Sequence[Any] | np.ndarray,
        predictions: Mapping[str, np.ndarray],
        *,
        inputs: Dataset | None = None,
        pool_k: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> PseudolabelPool:
        """Build a pool from probabilities that are already at hand.

        Args:
            hierarchy (`TeacherHierarchy`):
                The teachers.
            ids (`Sequence[int]` or `Sequence[str]` of length `num_examples`):
                Unique id of each example.
            predictions (`Mapping[str, np.ndarray]`):
                By teacher name, probabilities of shape `(num_examples, num_labels)`; a row of zeros is no answer.
            inputs (`datasets.Dataset`, *optional*):
                The inputs; an `id` column is added where there is none.
            pool_k (`int`, *optional*):
                How many labels to keep per row, 1 to `num_labels`. Defaults to `min(16, num_labels)`.
            facts (`Mapping[str, Any]`, *optional*):
                See [`PseudolabelPool`].

        Returns:
            `PseudolabelPool`

        Raises:
            ValueError: If shapes, ids or probabilities do not fit.
        """
        k = default_pool_k(hierarchy.num_labels) if pool_k is None else pool_k
        if np.asarray(ids).dtype.kind not in "iuU" and len(ids):
            raise ValueError(f"`ids` must be integers or strings, got {ids[0]!r}. Number the examples.")
        if inputs is not None and len(inputs) != len(ids):
            raise ValueError(f"`inputs` must hold one row for each of the {len(ids)} ids, got {len(inputs)}.")
        teachers, known = {}, {name: dict(known) for name, known in (facts or {}).items()}
        for name, probs in predictions.items():
            if np.shape(probs) != (len(ids), hierarchy.num_labels):
                raise ValueError(
                    f"Predictions of '{name}' must have shape {(len(ids), hierarchy.num_labels)}, "
                    f"got {np.shape(probs)}."
                )
            label_ids, label_probs = encode_top_k(probs, k)
            teachers[name] = teacher_dataset(ids, label_ids, label_probs)
            num_answered = max(int((label_probs[:, 0] > 0).sum()), 1)
            known.setdefault(name, {}).setdefault(
                "dropped_mass", dropped_mass(np.asarray(probs), label_ids) / num_answered
            )
        if inputs is not None and "id" not in inputs.column_names:
            inputs = inputs.add_column("id", list(ids))
        return cls(hierarchy, teachers, inputs, known)

    def with_hierarchy(self, hierarchy: TeacherHierarchy) -> PseudolabelPool:
        """Give the same pseudolabels under another hierarchy: fewer teachers, or other levels. Nothing is copied.

        Args:
            hierarchy (`TeacherHierarchy`):
                Teachers of this pool, with the same labels.

        Returns:
            `PseudolabelPool`

        Raises:
            ValueError: If the labels differ or a teacher is not in the pool.
        """
        if hierarchy.labels != self.labels:
            raise ValueError(
                f"Both hierarchies must have the labels {list(self.labels)}, got {list(hierarchy.labels)}."
            )
        return PseudolabelPool(hierarchy, self.teachers, self.inputs, self.facts)

    def select(self, rows: Sequence[int] | np.ndarray) -> PseudolabelPool:
        """Give the pool of some of its examples.

        Args:
            rows (`Sequence[int]`):
                Positions, in the order wanted.

        Returns:
            `PseudolabelPool`
        """
        rows = np.asarray(rows, dtype=np.int64)
        teachers = {
            name: dataset.select(self._orders[name][rows] if name in self._orders else rows)
            for name, dataset in self.teachers.items()
        }
        inputs = None if self.inputs is None else self.inputs.select(rows)
        return PseudolabelPool(self.hierarchy, teachers, inputs, self.facts)

    def to_dataset(self) -> Dataset:
        """Give the wide view for looking at: inputs, and per teacher its most probable label and probability.

        Returns:
            `datasets.Dataset`: `id`, the inputs' columns, `<teacher>_label` (a name, `None` without an answer) and
            `<teacher>_prob`.
        """
        columns: dict[str, Any] = {} if self.inputs is not None else {"id": self.ids.tolist()}
        for name in self.hierarchy.names:
            columns[f"{name}_label"] = [None if label < 0 else self.labels[label] for label in self.hard_labels(name)]
            columns[f"{name}_prob"] = self.label_probs(name)[:, 0].astype(np.float32)
        wide = Dataset.from_dict(columns)
        return wide if self.inputs is None else concatenate_datasets([self.inputs, wide], axis=1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the pool to a folder that does not exist yet, whole or not at all.

        Args:
            folder (`str` or `os.PathLike`):
                Folder to make: `pool.json`, `inputs/data.arrow`, `teachers/<name>/data.arrow`, a data-set card.

        Raises:
            FileExistsError: If there is something at that path already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"'{folder}' must not exist or be empty, got files there. Load it, or choose another folder."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, dataset in self.teachers.items():
                write_arrow(dataset, temporary / "teachers" / name / "data.arrow")
            if self.inputs is not None:
                write_arrow(self.inputs, temporary / "inputs" / "data.arrow")
            write_card(pool_card(self._card_facts()), temporary)
            (temporary / _HEADER).write_text(json.dumps(self._header(), indent=2) + "\n", encoding="utf-8")
            os.chmod(temporary, 0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _header(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "num_examples": len(self),
            "has_inputs": self.inputs is not None,
            "pool_k": {name: int(self.label_ids(name).shape[1]) for name in self.hierarchy.names},
            "hierarchy": self.hierarchy.to_dict(),
            "facts": self.facts,
        }

    def _card_facts(self) -> dict[str, Any]:
        teachers = [
            {
                "pool_k": int(self.label_ids(teacher.name).shape[1]),
                "answered": float(self.answered(teacher.name).mean()) if len(self) else None,
                **teacher.to_dict(),
                **{
                    key: value
                    for key, value in self.facts.get(teacher.name, {}).items()
                    if key in ("kind", "revision", "dropped_mass")
                },
            }
            for teacher in self.hierarchy.teachers
        ]
        columns = None if self.inputs is None else self.inputs.column_names
        return {"teachers": teachers, "labels": list(self.labels), "num_examples": len(self), "input_columns": columns}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PseudolabelPool:
        """Open a pool that [`save`] wrote; files are mapped, not read.

        Args:
            folder (`str` or `os.PathLike`):
                Its folder.

        Returns:
            `PseudolabelPool`

        Raises:
            FileNotFoundError: If there is no pool in the folder, or a file of it is missing.
            ValueError: If it was written by a newer version, or its content is not valid.
        """
        folder = Path(folder)
        if not (folder / _HEADER).is_file():
            raise FileNotFoundError(f"'{folder}' is not a pool: it has no '{_HEADER}'. Make one with `build_pool`.")
        header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"Pool '{folder}' must have format version {FORMAT_VERSION}, got {header.get('format_version')}. "
                "Update hf_cosupervise, or label the data again."
            )
        hierarchy = TeacherHierarchy.from_dict(header["hierarchy"])
        teachers = {name: _read_arrow(folder / "teachers" / name / "data.arrow") for name in hierarchy.names}
        inputs = _read_arrow(folder / "inputs" / "data.arrow") if header["has_inputs"] else None
        pool = cls(hierarchy, teachers, inputs, header["facts"])
        if len(pool) != header["num_examples"]:
            raise ValueError(
                f"Pool '{folder}' must hold {header['num_examples']} examples, got {len(pool)}. Label the data again."
            )
        return pool


def teacher_dataset(ids: Sequence[Any] | np.ndarray, label_ids: np.ndarray, label_probs: np.ndarray) -> Dataset:
    """Wrap one teacher's pseudolabels as a dataset of fixed-size lists.

    Args:
        ids (`Sequence[int]` or `Sequence[str]` of length `num_examples`):
            Id of each example.
        label_ids (`np.ndarray` of shape `(num_examples, k)`):
            Label ids.
        label_probs (`np.ndarray` of shape `(num_examples, k)`, float16):
            Their probabilities.

    Returns:
        `datasets.Dataset` of `id`, `label_ids` and `label_probs`, in one Arrow chunk.
    """
    k = label_ids.shape[1]
    features = Features(
        {
            "id": Value("string" if len(ids) and isinstance(ids[0], str) else "int64"),
            "label_ids": List(Value(str(label_ids.dtype)), length=k),
            "label_probs": List(Value("float16"), length=k),
        }
    )
    id_array = pa.array(list(ids) if not isinstance(ids, np.ndarray) else ids.tolist(), type=features["id"].pa_type)
    schema = features.arrow_schema
    lists = [
        pa.FixedSizeListArray.from_arrays(
            pa.Array.from_buffers(field.type.value_type, values.size, [None, pa.py_buffer(values)]), type=field.type
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
    """Write one teacher's pseudolabels to an Arrow file of a single chunk, without holding them in memory.

    Args:
        path (`pathlib.Path`):
            File to write; its folder is made.
        ids (`Sequence[int]` or `Sequence[str]` of length `num_examples`):
            Id of each example.
        pieces (`Iterable[tuple[np.ndarray, np.ndarray]]`):
            Label ids and float16 probabilities, each `(num_rows, k)`, of at least one row and `num_examples` in all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = (path.with_suffix(".ids"), path.with_suffix(".probs"))
    with open(raw[0], "wb") as ids_file, open(raw[1], "wb") as probs_file:
        for label_ids, label_probs in pieces:
            ids_file.write(label_ids.tobytes())
            probs_file.write(label_probs.tobytes())
    shape = (len(ids), label_ids.shape[1])
    views = [np.memmap(file, part.dtype, "r", shape=shape) for file, part in zip(raw, (label_ids, label_probs))]
    write_arrow(teacher_dataset(ids, *views), path)
    for file in raw:
        file.unlink()


def write_arrow(dataset: Dataset, path: Path) -> None:
    """Write a dataset to one Arrow file of a single chunk, so that it can be mapped and viewed without a copy.

    Pseudolabels that lie in a file of their own already are linked from there where the disk allows it: files of a
    pool are replaced, never changed.

    Args:
        dataset (`datasets.Dataset`):
            What to write; images that are still files are read in.
        path (`pathlib.Path`):
            File to write; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (source := _own_file(dataset)) is not None:
        try:
            os.link(source, path)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, path)
        return
    # Narrow tables become one chunk; images would need all of them in memory for that, and nobody views those.
    batch = len(dataset) if "label_ids" in dataset.column_names else 1000
    with ArrowWriter(
        path=str(path), features=dataset.features, writer_batch_size=max(batch, 1), embed_local_files=True
    ) as writer:
        for start in range(0, len(dataset), max(batch, 1)):
            writer.write_table(dataset.with_format("arrow")[start : start + batch])
        writer.finalize()


def _own_file(dataset: Dataset) -> Path | None:
    """The file of one chunk that holds these pseudolabels and nothing else, as it is on disk now."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if "label_ids" not in dataset.column_names or dataset._indices is not None or len(files) != 1:
        return None
    if not files[0].is_file():
        return None
    whole = Dataset.from_file(str(files[0]))
    is_one_chunk = whole.data.column("label_ids").num_chunks == 1
    return files[0] if is_one_chunk and whole.data.table.equals(dataset.data.table, check_metadata=True) else None


def match_ids(ids: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
    """Find the rows that hold the wanted ids.

    Args:
        ids (`np.ndarray` of shape `(num_rows,)`):
            Unique ids.
        wanted (`np.ndarray` of shape `(num_wanted,)`):
            Unique ids, each of which must be there.
        what (`str`):
            Who is searched, for the error.

    Returns:
        `np.ndarray` of shape `(num_wanted,)`: `ids[rows] == wanted`.

    Raises:
        ValueError: If an id is missing.
    """
    positions = {value: row for row, value in enumerate(ids.tolist())}
    rows = [positions.get(value, -1) for value in wanted.tolist()]
    if missing := [value for value, row in zip(wanted.tolist(), rows) if row < 0]:
        raise ValueError(
            f"{what} must hold every id of the other side, got {len(missing)} missing of {len(wanted)} (such as "
            f"{missing[0]!r}). Use the data that the pool was built from."
        )
    return np.asarray(rows, dtype=np.int64)


def _read_ids(dataset: Dataset, what: str) -> np.ndarray:
    if "id" not in dataset.column_names:
        raise ValueError(f"Every dataset of a pool needs an `id` column, {what} got {dataset.column_names}.")
    column = (
        dataset.with_format("arrow")[:].column("id") if len(dataset) else pa.chunked_array([pa.array([], pa.int64())])
    )
    if column.null_count:
        raise ValueError(f"Ids of {what} must not be missing, got {column.null_count} empty ones.")
    ids = column.to_numpy() if pa.types.is_integer(column.type) else np.asarray(column.to_pylist())
    if len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        first = int(np.flatnonzero(counts > 1)[0])
        raise ValueError(
            f"Ids of {what} must be unique, got {values[first].item()!r} {counts[first]} times "
            f"({int((counts > 1).sum())} repeated in all)."
        )
    return ids


def _read_oracle_labels(inputs: Dataset | None, labels: Sequence[str]) -> np.ndarray | None:
    if inputs is None or ORACLE_LABEL not in inputs.column_names:
        return None
    return read_labels(inputs, ORACLE_LABEL, labels)


def _matrix(dataset: Dataset, column: str, name: str) -> np.ndarray:
    """View a column of fixed-size lists as a matrix, without a copy where it is one chunk."""
    feature = dataset.features[column]
    if not isinstance(feature, List) or feature.length < 1:
        raise ValueError(f"Column `{column}` of '{name}' must hold lists of one fixed length, got {feature}.")
    chunks = dataset.data.column(column).chunks
    if any(chunk.null_count or chunk.flatten().null_count for chunk in chunks):
        # Arrow leaves null rows out of the flat values, which would shift every later row.
        raise ValueError(f"Column `{column}` of '{name}' must hold no nulls. A missing answer is a row of zeros.")
    parts = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, feature.length) for chunk in chunks]
    if not parts:
        return np.zeros((0, feature.length), dtype=feature.feature.dtype)
    matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
    # A selection keeps the whole table and the positions wanted of it.
    return matrix if dataset._indices is None else matrix[dataset._indices.column(0).to_numpy()]


def _read_arrow(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"The pool lacks '{path}'. Label the data again, or copy the whole folder.")
    return Dataset.from_file(str(path))
