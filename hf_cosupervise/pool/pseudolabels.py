"""The pool of pseudolabels: one plain dataset per teacher beside the inputs, joined on `id`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, List, concatenate_datasets
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..data.columns import read_labels, shorten
from ..files import check_free, file_digest, file_signature, is_inside, link_file, whole_folder, write_text
from ..hierarchy import Teacher, TeacherHierarchy
from ..hub.cards import pool_card, write_card
from ..hub.client import CARD, fetch_files, hub_errors, is_folder, open_repo, publish, resolve_commit
from ..method.aggregation import mean_probs
from ..method.assignment import NOBODY
from ..processes import join_processes
from .files import (
    FORMAT_VERSION,
    HEADER,
    INPUTS,
    dump_header,
    file_names,
    find_own_file,
    ids_digest,
    map_arrow,
    read_header,
    teacher_dataset,
    write_arrow,
)
from .hub import check_not_overtaken, no_pool
from .ids import check_id_values, match_ids, read_ids
from .top_k import check_top_k, decode_top_k, default_pool_k, dropped_mass, encode_top_k, scale_top_k

if TYPE_CHECKING:
    from .votes import PoolDescription

ORACLE_LABEL = "oracle_label"
ORACLE_DOMAIN = "oracle_domain"
_CHUNK = 8192
_DECODED = 1024  # rows of which all probabilities of all teachers are in memory at a time


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
        source (`Mapping[str, Any]`, *optional*):
            Where the data came from, as far as it is certain: `dataset` (a Hub id) and its `commit`, and if the pool
            is of all rows of them, `config` and `split`.
        input_column (`str`, *optional*):
            The column of the data that models read, where it is known: `inputs` may hold others, or not hold it.

    Attributes:
        repo_id (`str` or `None`):
            The data set on the Hub that the pool was loaded from.
        commit (`str` or `None`):
            Its commit, 40 hexadecimal digits.

    Raises:
        ValueError: If a teacher of the hierarchy is missing, ids are repeated, missing or differ between datasets, or
            a row of pseudolabels is not valid.
        TypeError: If `hierarchy` is no [`TeacherHierarchy`], or the data are no `datasets.Dataset`s.
    """

    def __init__(
        self,
        hierarchy: TeacherHierarchy,
        teachers: Mapping[str, Dataset],
        inputs: Dataset | None = None,
        facts: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        *,
        input_column: str | None = None,
    ) -> None:
        _check_kind(hierarchy, TeacherHierarchy, "hierarchy")
        _check_kind(inputs, Dataset, "inputs", optional=True)
        _check_kind(input_column, str, "input_column", optional=True)
        self.hierarchy = hierarchy
        self.input_column = input_column
        self.inputs = inputs
        self.facts: dict[str, Any] = dict(facts or {})
        self.source = None if source is None else dict(source)
        self.repo_id: str | None = None
        self.commit: str | None = None
        # Files that were mapped, and their digests where the header had them.
        self._inputs_file: tuple[Dataset, Path] | None = None
        self._digests: dict[tuple[int, ...], str | None] = {}
        self._check_teachers(teachers)
        self.teachers = {name: teachers[name] for name in hierarchy.names}
        self.ids = read_ids(inputs if inputs is not None else self.teachers[hierarchy.names[0]], "the pool")
        self._orders: dict[str, np.ndarray] = {}
        self._views = {name: self._open(name, dataset) for name, dataset in self.teachers.items()}
        self._oracle_labels = _read_oracle_labels(inputs, hierarchy.labels)

    def _check_teachers(self, teachers: Mapping[str, Dataset]) -> None:
        _check_kind(teachers, Mapping, "teachers")
        if missing := [name for name in self.hierarchy.names if name not in teachers]:
            levels = sorted({self.hierarchy.teachers[self.hierarchy.index(name)].level for name in missing})
            raise ValueError(
                f"The pool must hold pseudolabels of every teacher of the hierarchy, got none of {missing} "
                f"(level {levels}). Label the data with them by `build_pool`."
            )
        for name, dataset in teachers.items():
            _check_kind(dataset, Dataset, f"teachers[{name!r}]")
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
        ids = read_ids(dataset, f"'{name}'")
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

        Raises:
            KeyError: If no teacher has that name.
        """
        return self._view(name)[0]

    def label_probs(self, name: str) -> np.ndarray:
        """Give the probabilities of [`label_ids`], as a view of the Arrow file.

        Args:
            name (`str`):
                Name of a teacher.

        Returns:
            `np.ndarray` of shape `(num_examples, k)`, float16, read-only; all zero where there is no answer.

        Raises:
            KeyError: If no teacher has that name.
        """
        return self._view(name)[1]

    def stored(self, name: str, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Give a teacher's answers as they are kept, of which [`sparse`] makes all others.

        Args:
            name (`str`):
                Name of a teacher.
            rows (`np.ndarray` of int or `slice`):
                Which examples.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: label ids and float16 probabilities, both of shape `(num_rows, k)`.
        """
        rows, (label_ids, label_probs) = self._check_rows(rows), self._view(name)
        return label_ids[rows], label_probs[rows]

    def _view(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._views:
            self.hierarchy.index(name)  # says who is there
        return self._views[name]

    def _check_rows(self, rows: Any) -> Any:
        """Refuse rows that numpy would take for others, or for a mask."""
        if isinstance(rows, slice):
            return rows
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.size and rows.dtype.kind not in "iu":
            raise ValueError(
                f"`rows` must be positions of examples, integers of shape (num_rows,), got {rows.shape} of "
                f"{rows.dtype}. Of a mask, take `np.flatnonzero`."
            )
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise ValueError(
                f"`rows` must lie in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}. Count from 0, in this pool."
            )
        return rows.astype(np.int64, copy=False)

    def _check_sources(self, sources: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        sources, rows = np.asarray(sources), self._check_rows(np.asarray(rows))
        if sources.shape != rows.shape or sources.size and sources.dtype.kind not in "iu":
            raise ValueError(
                "`sources` and `rows` must be integers of one shape (num_rows,), got "
                f"{sources.shape} of {sources.dtype} and {rows.shape}. Give one source for each row."
            )
        return sources, rows

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
        return self.label_probs(name)[self._check_rows(rows), 0] > 0

    def hard_labels(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:  # noqa: B008
        """Give a teacher's most probable label of each example.

        Args:
            name (`str`):
                Name of a teacher.
            rows (`np.ndarray` of int or `slice`, *optional*):
                Which examples; all by default.

        Returns:
            `np.ndarray` of shape `(num_rows,)`, int64; -1 where there is no answer.
        """
        rows = self._check_rows(rows)
        return np.where(self.answered(name, rows), self.label_ids(name)[rows, 0].astype(np.int64), -1)

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
        rows = slice(None) if rows is None else self._check_rows(rows)
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
            ValueError: If a source is an ensemble or does not exist, or the shapes differ.
        """
        sources, rows = self._check_sources(sources, rows)
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

        Raises:
            ValueError: If a source does not exist, or the shapes differ.
        """
        sources, rows = self._check_sources(sources, rows)
        if (sources >= len(self.hierarchy.names)).any():
            labels = np.empty(len(rows), dtype=np.int64)
            for start in range(0, len(rows), _DECODED):
                part = slice(start, start + _DECODED)
                probs = self.pseudolabels(sources[part], rows[part])
                labels[part] = np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
            return labels
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

        Raises:
            ValueError: If a source does not exist, or the shapes differ.
        """
        sources, rows = self._check_sources(sources, rows)
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

        Raises:
            ValueError: If there is no such teacher or row.
        """
        names = self._names_of(indices)
        probs = np.stack([self.decode(name, rows) for name in names], axis=1)
        answered = np.stack([self.answered(name, rows) for name in names], axis=1)
        return torch.from_numpy(probs), torch.from_numpy(answered)

    def _names_of(self, indices: Sequence[int]) -> list[str]:
        names = self.hierarchy.names
        if not len(indices) or not set(indices) <= set(range(len(names))):
            raise ValueError(
                f"`indices` must be one or more positions of teachers in 0..{len(names) - 1}, got {list(indices)}. "
                "Take them from `hierarchy.level_indices`."
            )
        return [names[index] for index in indices]

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

        Raises:
            ValueError: If there is no such teacher or row.
        """
        views, rows = [self._views[name] for name in self._names_of(indices)], self._check_rows(rows)
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
            TypeError: If an argument is of another kind.
        """
        _check_kind(hierarchy, TeacherHierarchy, "hierarchy")
        _check_kind(predictions, Mapping, "predictions")
        _check_kind(inputs, Dataset, "inputs", optional=True)
        k = default_pool_k(hierarchy.num_labels) if pool_k is None else pool_k
        check_id_values(ids)
        if inputs is not None and len(inputs) != len(ids):
            raise ValueError(
                f"`inputs` must hold one row for each of the {len(ids)} ids, got {len(inputs)}. Select "
                "the same examples."
            )
        teachers, known = {}, {name: dict(known) for name, known in (facts or {}).items()}
        for name, probs in predictions.items():
            if np.shape(probs) != (len(ids), hierarchy.num_labels):
                raise ValueError(
                    f"Predictions of '{name}' must have shape {(len(ids), hierarchy.num_labels)}, "
                    f"got {np.shape(probs)}."
                )
            label_ids, label_probs = encode_top_k(probs, k, f"'{name}'")
            teachers[name] = teacher_dataset(ids, label_ids, label_probs)
            num_answered = max(int((label_probs[:, 0] > 0).sum()), 1)
            known.setdefault(name, {}).setdefault(
                "dropped_mass", dropped_mass(np.asarray(probs), label_ids) / num_answered
            )
        if inputs is not None and "id" not in inputs.column_names:
            inputs = inputs.add_column("id", list(ids))
        return cls(hierarchy, teachers, inputs, known)

    @classmethod
    def from_votes(
        cls, matrix: Any, names: Sequence[str], labels: Sequence[str], inputs: Dataset | None = None
    ) -> PseudolabelPool:
        """Make a pool of a matrix of votes, see [`pool_from_votes`]."""
        from .votes import pool_from_votes  # which makes pools: not before there is this class

        return pool_from_votes(matrix, names, labels, inputs)

    @classmethod
    def from_answers(
        cls, table: Any, labels: Sequence[str] | None = None, inputs: Dataset | None = None, **columns: str
    ) -> PseudolabelPool:
        """Make a pool of a long table of (item, worker, label), see [`pool_from_answers`]."""
        from .votes import pool_from_answers

        return pool_from_answers(table, labels, inputs, **columns)

    def with_aggregate(
        self, method: Any = "shared_majority", name: str | None = None, *, features: torch.Tensor | None = None
    ) -> PseudolabelPool:
        """Put a label model at the root and move the teachers a level down, see [`with_aggregate`]."""
        from .votes import with_aggregate

        return with_aggregate(self, method, name, features=features)

    def describe(self) -> PoolDescription:
        """Say what the teachers vote: print it for a table, see [`describe`]."""
        from .votes import describe

        return describe(self)

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
        _check_kind(hierarchy, TeacherHierarchy, "hierarchy")
        if hierarchy.labels != self.labels:
            raise ValueError(
                f"Both hierarchies must have the labels {shorten(self.labels)}, got {shorten(hierarchy.labels)}."
            )
        pool = PseudolabelPool(
            hierarchy, self.teachers, self.inputs, self.facts, self.source, input_column=self.input_column
        )
        pool.repo_id, pool.commit = self.repo_id, self.commit
        pool._inputs_file, pool._digests = self._inputs_file, self._digests
        return pool

    def select(self, rows: Sequence[int] | np.ndarray) -> PseudolabelPool:
        """Give the pool of some of its examples.

        Args:
            rows (`Sequence[int]`):
                Positions, in the order wanted.

        Returns:
            `PseudolabelPool`

        Raises:
            ValueError: If a row does not exist or is there twice.
        """
        rows = self._check_rows(np.asarray(rows))
        teachers = {
            name: dataset.select(self._orders[name][rows] if name in self._orders else rows)
            for name, dataset in self.teachers.items()
        }
        inputs = None if self.inputs is None else self.inputs.select(rows)
        return PseudolabelPool(
            self.hierarchy, teachers, inputs, self.facts, self.source, input_column=self.input_column
        )

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
        check_free(folder, "Load it, or choose another folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as temporary:
            files = self._write(temporary)
            for path, file in files.items():
                link_file(file, temporary / path)
            write_card(pool_card(self._card_facts()), temporary)
            write_text(temporary / HEADER, dump_header(self._header(files)))

    def _write(self, folder: Path, inputs: bool = True) -> dict[str, Path]:
        """Write the Arrow files that do not lie on disk already; where each file of the pool is now."""
        files: dict[str, Path] = {}
        for name, dataset in self.teachers.items():
            path = f"teachers/{name}/data.arrow"
            if (own := find_own_file(dataset, name)) is None:
                write_arrow(dataset, folder / path)
            files[path] = own or folder / path
        if inputs and self.inputs is not None:
            if (own := self._own_inputs()) is None:
                write_arrow(self.inputs, folder / INPUTS)
            files[INPUTS] = own or folder / INPUTS
        return files

    def _own_inputs(self) -> Path | None:
        """The file of a pool that holds the inputs as they are, if it is still the one that was mapped."""
        if self._inputs_file is None:
            return None
        dataset, path = self._inputs_file
        return path if dataset is self.inputs and path.is_file() and file_signature(path) in self._digests else None

    def _header(self, files: Mapping[str, Path]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "num_examples": len(self),
            "ids_digest": ids_digest(self.ids),
            "has_inputs": INPUTS in files,
            "pool_k": {name: int(self.label_ids(name).shape[1]) for name in self.hierarchy.names},
            "hierarchy": self.hierarchy.to_dict(),
            "facts": self.facts,
            **({} if self.source is None else {"source": self.source}),
            **({} if self.input_column is None else {"input_column": self.input_column}),
            "files": {
                path: [file.stat().st_size, self._digests.get(file_signature(file)) or file_digest(file)]
                for path, file in files.items()
            },
        }

    def _card_facts(self, inputs: bool = True) -> dict[str, Any]:
        teachers = [
            {
                "pool_k": int(self.label_ids(teacher.name).shape[1]),
                "answered": float(self.answered(teacher.name).mean()) if len(self) else None,
                **teacher.to_dict(),
                "model": self.published_model(teacher),
                **{
                    key: value
                    for key, value in self.facts.get(teacher.name, {}).items()
                    if key in ("kind", "revision", "commit", "dropped_mass")
                },
            }
            for teacher in self.hierarchy.teachers
        ]
        source = self.source or {}
        return {
            "teachers": teachers,
            "labels": list(self.labels),
            "num_examples": len(self),
            "input_columns": self.inputs.column_names if inputs and self.inputs is not None else None,
            "source_dataset": source.get("dataset"),
            "source_revision": source.get("commit"),
            "source_split": source.get("split"),
        }

    def published_model(self, teacher: Teacher) -> str | None:
        """Tell where others find a teacher.

        Args:
            teacher (`Teacher`):
                One of the hierarchy.

        Returns:
            `str`: Its Hub id, or its column; `None` for a folder and for whatever is not known to be on the Hub.
        """
        is_known = teacher.kind == "column" or self.facts.get(teacher.name, {}).get("commit") is not None
        return teacher.model if is_known else None

    def _published_hierarchy(self) -> dict[str, Any]:
        """The hierarchy for others: of a teacher in a folder only the last name, the rest is nobody's business."""
        hierarchy = self.hierarchy.to_dict()
        for teacher, known in zip(hierarchy["teachers"], self.hierarchy.teachers):
            # One that was labelled here and has no commit was in a folder, whether that still exists or not.
            is_local = "commit" in self.facts.get(known.name, {}) or is_folder(known.model)
            if is_local and self.published_model(known) is None:
                teacher["model"] = f"./{Path(known.model).name}"
        return hierarchy

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Pool of pseudolabels",
        inputs: bool = True,
        replace: bool = False,
        license: str | None = None,
        source_dataset: str | None = None,
        tags: Sequence[str] = (),
    ) -> CommitInfo:
        """Put the pool on the Hub as a data set, in one commit: all of it is there afterwards, or nothing.

        Pushed again with another teacher, only that teacher's file is uploaded. A card that was edited by hand is
        kept. Teachers in folders of this machine are named without their path. All processes of a launch must call
        it; the first one pushes.

        Args:
            repo_id (`str`):
                `name` or `user/name`; made where there is none.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to the user's or organisation's setting.
            token (`str`, *optional*):
                Instead of the token of the environment.
            revision (`str`, *optional*):
                Branch to push to, made where it does not exist. Defaults to the main branch.
            commit_message (`str`, *optional*, defaults to `"Pool of pseudolabels"`):
                Title of the commit.
            inputs (`bool`, *optional*, defaults to `True`):
                Whether the inputs go along. Without them, training needs the data as `train_dataset`; inputs of an
                earlier push are deleted, though its commit still holds them.
            replace (`bool`, *optional*, defaults to `False`):
                Delete what the repository's pool has and this one has not, teachers or the inputs; and overwrite what
                was pushed there since this pool was loaded.
            license (`str`, *optional*):
                Licence for the card, as the Hub names it (`"cc-by-4.0"`). This, `source_dataset` and `tags` stay as
                they were in a push before where they are not given.
            source_dataset (`str`, *optional*):
                Hub id of the data, for the card. Defaults to that of `source`.
            tags (`Sequence[str]`, *optional*):
                More tags for the card.

        Returns:
            `CommitInfo`: The commit; the last one, where nothing has changed.

        Raises:
            HfHubHTTPError: If the Hub refuses the push, also because somebody else pushed at the same moment, with a
                note on what to do; errors of `huggingface_hub` stay what they are, also where it cannot be reached.
            PermissionError: If the token may only read.
            ValueError: If the id cannot be one, or the repository holds something else that would be lost.
        """
        card = {"license": license, "source_dataset": source_dataset, "tags": list(tags)}
        push = partial(
            self._push,
            repo_id,
            private,
            token,
            revision,
            commit_message,
            inputs,
            replace,
            {key: value for key, value in card.items() if value},
        )
        return join_processes().on_first(push)

    def _push(
        self,
        repo_id: str,
        private: bool | None,
        token: str | None,
        revision: str | None,
        message: str,
        inputs: bool,
        replace: bool,
        card: dict[str, Any],
    ) -> CommitInfo:
        repo_id = open_repo(repo_id, what="The pool", repo_type="dataset", private=private, token=token)
        self._check_repo(repo_id, token, revision, inputs, replace)
        with tempfile.TemporaryDirectory(prefix="cosupervise-push-") as folder:
            files = self._write(Path(folder), inputs)
            header = self._header(files) | {"hierarchy": self._published_hierarchy()}
            # Writing may have taken long, and others may push too.
            header_there, parent = self._check_repo(repo_id, token, revision, inputs, replace)
            if parent != self.commit and repo_id == self.repo_id and not replace:
                check_not_overtaken(header_there, header, repo_id)
            there = header_there.get("card", {})
            card = {key: there[key] for key in ("license", "source_dataset", "tags") if key in there} | card
            facts = self._card_facts(inputs) | {"hub_dataset_id": repo_id, "hub_branch": revision}
            if card.get("source_dataset", facts["source_dataset"]) != facts["source_dataset"]:
                facts |= {"source_revision": None, "source_split": None}  # those of another data set
            contents = {CARD: pool_card(facts | card), HEADER: dump_header(header | ({"card": card} if card else {}))}
            return publish(
                {**files, **{path: text.encode("utf-8") for path, text in contents.items()}},
                repo_id,
                what="The pool",
                message=message,
                repo_type="dataset",
                replaced=["teachers/*", "inputs/*"],
                revision=revision,
                token=token,
                parent=parent,
            )

    def _check_repo(
        self, repo_id: str, token: str | None, revision: str | None, inputs: bool, replace: bool
    ) -> tuple[dict[str, Any], str]:
        """Refuse a repository in which a push would destroy something; its pool's header, if any, and its commit."""
        api, advice = HfApi(token=token), "Push to another repository, or delete this one."
        with hub_errors("The pool", repo_id, revision=revision, repo_type="dataset", writing=True):
            try:
                info = api.repo_info(repo_id, repo_type="dataset", revision=revision)
            except RevisionNotFoundError:  # the branch will be made of the main one
                info = api.repo_info(repo_id, repo_type="dataset")
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if HEADER not in names:
            if others := sorted(names - {CARD, ".gitattributes"}):
                raise ValueError(
                    f"'{repo_id}' must be new, empty or hold a pool, got the files {shorten(others)}. {advice}"
                )
            return {}, str(info.sha)
        folder = fetch_files(repo_id, str(info.sha), [HEADER], what="The pool", repo_type="dataset", token=token)
        header = read_header(folder / HEADER, repo_id)
        self._check_same(header, repo_id, advice)
        lost = [f"teacher '{teacher['name']}'" for teacher in header["hierarchy"]["teachers"]]
        lost = [name for name in lost if name not in {f"teacher '{known}'" for known in self.hierarchy.names}]
        if header["has_inputs"] and inputs and self.inputs is None:
            lost.append("the inputs")
        if lost and not replace:
            raise ValueError(
                f"The pool must hold everything that the one in '{repo_id}' holds, got one without {shorten(lost)}. "
                "Add it to this pool by `build_pool(..., reuse=...)`, or delete it there by `replace=True`."
            )
        return header, str(info.sha)

    def _check_same(self, header: Mapping[str, Any], repo_id: str, advice: str) -> None:
        """Refuse a pool of another task or of other examples."""
        if (labels := header["hierarchy"]["labels"]) != list(self.labels):
            raise ValueError(
                f"'{repo_id}' must hold a pool of the labels {shorten(self.labels)}, got one of {shorten(labels)}. "
                f"{advice}"
            )
        is_same = header["num_examples"] == len(self)
        if "ids_digest" in header:  # pools of older versions have none
            is_same = is_same and header["ids_digest"] == ids_digest(self.ids)
        if not is_same:
            raise ValueError(
                f"'{repo_id}' must hold a pool of the same {len(self)} examples in the same order, got one of "
                f"{header['num_examples']} examples with other ids or another order. {advice}"
            )

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        verify: bool = False,
    ) -> PseudolabelPool:
        """Open a pool that [`save`] or [`push_to_hub`] wrote; files are mapped, not read.

        Args:
            source (`str` or `os.PathLike`):
                Its folder, or the id of a data set on the Hub, of which only the pool's files are downloaded.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub. Defaults to the main branch.
            token (`str`, *optional*):
                Instead of the token of the environment.
            verify (`bool`, *optional*, defaults to `False`):
                Read every file and compare it with the digest in the header; sizes are always compared.

        Returns:
            `PseudolabelPool`: Its `repo_id` and `commit` say where on the Hub it is from.

        Raises:
            RevisionResolutionError: If the Hub cannot be reached and the cache does not hold the pool; this and other
                errors of `huggingface_hub` stay what they are, with a note on what to do.
            FileNotFoundError: If there is no pool, or a file of it is missing.
            RepositoryNotFoundError: If the repository is not there, is private or is gated.
            ValueError: If it was written by a newer version, a file is damaged, or its content is not valid.
        """
        if is_folder(source):
            if revision is not None:
                raise ValueError(f"`revision` is for pools on the Hub, got {revision!r} for '{source}'. Leave it out.")
            folder = Path(source)
            if not (folder / HEADER).is_file():
                raise FileNotFoundError(f"'{folder}' is not a pool: it has no '{HEADER}'. Make one with `build_pool`.")
            if not is_inside(folder / HEADER, folder):
                raise ValueError(
                    f"Pool '{folder}' must hold its '{HEADER}' itself, got a link. Copy it without links."
                )
            header = read_header(folder / HEADER, folder)
            return cls._map_files(
                folder, header, verify, f"'{folder}'", "Label the data again, or copy the whole folder."
            )
        repo_id = str(source)
        commit = resolve_commit(repo_id, revision, what="The pool", repo_type="dataset", token=token)
        fetch = partial(fetch_files, repo_id, commit, what="The pool", repo_type="dataset", token=token)
        folder = fetch([HEADER])
        if not (folder / HEADER).is_file():
            raise no_pool(repo_id, commit, token)
        header = read_header(folder / HEADER, repo_id)
        fetch(file_names(header))
        pool = cls._map_files(folder, header, verify, f"'{repo_id}' at {commit[:12]}", "Go online and load it again.")
        pool.repo_id, pool.commit = repo_id, commit
        return pool

    @classmethod
    def _map_files(cls, folder: Path, header: dict[str, Any], verify: bool, what: str, advice: str) -> PseudolabelPool:
        """Map the files of a pool that are all there by now."""
        if verify and not set(file_names(header)) <= set(header.get("files", {})):
            raise ValueError(
                f"Pool {what} must have digests to be verified, got one of an older version. Save it again."
            )
        hierarchy = TeacherHierarchy.from_dict(header["hierarchy"])
        datasets, digests = {}, {}
        for path in file_names(header):
            if not (folder / path).is_file():
                raise FileNotFoundError(f"Pool {what} lacks '{folder / path}'. {advice}")
            if not is_inside(folder / path, folder):
                raise ValueError(
                    f"Pool {what} must hold its files itself, got '{path}' as a link to somewhere else. It was not "
                    "opened; copy the whole pool without links."
                )
            size, digest = header.get("files", {}).get(path, (None, None))
            digests[file_signature(folder / path)] = digest
            datasets[path] = map_arrow(folder / path, size, digest, verify, what, advice)
        teachers = {name: datasets[f"teachers/{name}/data.arrow"] for name in hierarchy.names}
        try:
            pool = cls(
                hierarchy,
                teachers,
                datasets.get(INPUTS),
                header["facts"],
                header.get("source"),
                input_column=header.get("input_column"),
            )
        except ValueError as error:
            raise ValueError(f"Pool {what} must be as it was saved, got: {error} {advice}") from error
        if len(pool) != header["num_examples"]:
            raise ValueError(
                f"Pool {what} must hold {header['num_examples']} examples, got {len(pool)}. Label the data again."
            )
        pool._digests = digests
        if pool.inputs is not None:
            pool._inputs_file = (pool.inputs, folder / INPUTS)
        return pool


def _check_kind(value: Any, kind: type, name: str, *, optional: bool = False) -> None:
    if not (isinstance(value, kind) or optional and value is None):
        raise TypeError(f"`{name}` must be a `{kind.__name__}`, got {type(value).__name__}. Make one first.")


def _read_oracle_labels(inputs: Dataset | None, labels: Sequence[str]) -> np.ndarray | None:
    if inputs is None or ORACLE_LABEL not in inputs.column_names:
        return None
    return read_labels(inputs, ORACLE_LABEL, labels)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _matrix(dataset: Dataset, column: str, name: str) -> np.ndarray:
    """View a column of fixed-size lists as a matrix, without a copy where it is one chunk."""
    feature = dataset.features[column]
    is_list = isinstance(feature, List) and feature.length >= 1
    if not is_list or not _is_number(dataset.data.column(column).type.value_type):
        what = "numbers" if is_list else "one fixed length"
        raise ValueError(
            f"Column `{column}` of '{name}' must hold lists of {what}, got {feature}. Make it with `build_pool`."
        )
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
