"""Pools of pseudolabels: what each teacher says is its most probable labels, read as arrays in many ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from ..data.columns import read_labels
from ..data.vectors import VECTOR_COLUMN, vector_inputs
from ..hierarchy import TeacherHierarchy
from ..method.aggregation import mean_probs
from ..method.assignment import NOBODY
from .base import TeacherPool, check_kind
from .files import teacher_dataset, view_matrix
from .ids import check_id_values
from .top_k import check_top_k, decode_top_k, default_pool_k, dropped_mass, encode_top_k, scale_top_k

if TYPE_CHECKING:
    from .votes import PoolDescription

ORACLE_LABEL = "oracle_label"
ORACLE_DOMAIN = "oracle_domain"
AGGREGATE = "is_aggregate"  # the fact of a teacher that is made of the others
_CHUNK = 8192
_HASHED = 2**16
_DECODED = 1024  # rows of which all probabilities of all teachers are in memory at a time


class PseudolabelPool(TeacherPool):
    """Hold the pseudolabels of every teacher, see [`TeacherPool`] for the arguments, and read them as arrays.

    Each teacher has a dataset of `id`, `label_ids` and `label_probs` (its most probable labels, float16, descending);
    a row of zeros means that the teacher has no answer. `inputs` holds `id`, what the models read, and where they are
    known `oracle_label` and `oracle_domain`, which nothing but `oracle_…` functions reads.

    Methods that read take the `name` of a teacher (another one is a `KeyError`), and as `rows` which examples:
    positions in an array of integers, or a slice. `sources` say who speaks for each row, as positions of
    `source_names`, -1 for nobody, in an array of the same shape `(num_rows,)`.

    Raises:
        ValueError: If a row of pseudolabels is not valid, or as [`TeacherPool`].
    """

    columns = ("label_ids", "label_probs")
    answers = "Pseudolabels"
    has_labels = True

    _views: dict[str, tuple[np.ndarray, np.ndarray]]

    def _read_inputs(self) -> None:
        # Read at once: a label that the task does not have is refused here, not in the analysis after training.
        self._oracle_labels: np.ndarray | None = None
        if self.inputs is not None and ORACLE_LABEL in self.inputs.column_names:
            self._oracle_labels = read_labels(self.inputs, ORACLE_LABEL, self.hierarchy.labels)

    def _open(self, name: str, dataset: Dataset) -> None:
        """Map the two columns as arrays, in the order of the pool's ids."""
        label_ids, label_probs = view_matrix(dataset, "label_ids", name), view_matrix(dataset, "label_probs", name)
        for start in range(0, max(len(dataset), 1), _CHUNK):  # a chunk at a time: the check must not fill the memory
            chunk = slice(start, start + _CHUNK)
            check_top_k(label_ids[chunk], label_probs[chunk], self.hierarchy.num_labels, name)
        super()._open(name, dataset)
        if (rows := self._orders.get(name)) is not None:
            # The only copy of a teacher's labels, and only where its dataset stands in another order than the pool.
            label_ids, label_probs = label_ids[rows], label_probs[rows]
        self._views[name] = label_ids, label_probs

    def _own_header(self) -> dict[str, Any]:
        return {"pool_k": {name: self.label_ids(name).shape[1] for name in self.hierarchy.names}}

    def _own_card_facts(self, name: str) -> dict[str, Any]:
        answered = float(self.answered(name).mean()) if len(self) else None
        return {"pool_k": self.label_ids(name).shape[1], "answered": answered}

    def __repr__(self) -> str:
        inputs = "none" if self.inputs is None else self.inputs.column_names
        return f"PseudolabelPool({len(self)} examples, {self.hierarchy!r}, inputs: {inputs})"

    @property
    def labels(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The task's label names."""
        return self.hierarchy.labels

    @cached_property
    def digest(self) -> str:
        """`str`: Tells this pool from others by what is trained on: ids, hierarchy and every stored pseudolabel."""
        teachers = [
            (teacher.name, teacher.level, teacher.scope, teacher.domains) for teacher in self.hierarchy.teachers
        ]
        digest = hashlib.blake2b(json.dumps([self.labels, teachers]).encode(), digest_size=8)
        digest.update("\n".join(map(str, self.ids.tolist())).encode())
        for values in (values for name in self.hierarchy.names for values in self._view(name)):
            digest.update(f"{values.dtype} {values.shape}".encode())
            for start in range(0, len(values), _HASHED):  # parts, because a pool may be larger than memory
                digest.update(np.ascontiguousarray(values[start : start + _HASHED]).data)
        return digest.hexdigest()

    @property
    def oracle_labels(self) -> np.ndarray | None:
        """`np.ndarray` of shape `(num_examples,)`: Ground truth where it was declared, for analysis only."""
        return self._oracle_labels

    def label_ids(self, name: str) -> np.ndarray:
        """Give a teacher's most probable labels `(num_examples, k)`, a read-only view of the Arrow file."""
        return self._view(name)[0]

    def label_probs(self, name: str) -> np.ndarray:
        """Give the probabilities of [`label_ids`], float16, descending; all zero where there is no answer."""
        return self._view(name)[1]

    def stored(self, name: str, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Give a teacher's label ids and float16 probabilities `(num_rows, k)` as they are kept."""
        rows, (label_ids, label_probs) = self._check_rows(rows), self._view(name)
        return label_ids[rows], label_probs[rows]

    def _view(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._views:
            self.hierarchy.index(name)  # says who is there
        return self._views[name]

    def _check_sources(self, sources: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        sources, rows = np.asarray(sources), self._check_rows(np.asarray(rows))
        if sources.shape != rows.shape or sources.size and sources.dtype.kind not in "iu":
            raise ValueError(
                "`sources` and `rows` must be integers of one shape (num_rows,), got "
                f"{sources.shape} of {sources.dtype} and {rows.shape}. Give one source for each row."
            )
        return sources, rows

    def answered(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:  # noqa: B008
        """Tell which examples a teacher answered, bool `(num_rows,)`."""
        # Probabilities descend, so that the first one tells; a row without an answer is all zero.
        return self.label_probs(name)[self._check_rows(rows), 0] > 0

    def hard_labels(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:  # noqa: B008
        """Give a teacher's most probable label of each example, int64 `(num_rows,)`; -1 where it has no answer."""
        rows = self._check_rows(rows)
        # Stored ids are of the smallest unsigned type, which has no -1.
        return np.where(self.answered(name, rows), self.label_ids(name)[rows, 0].astype(np.int64), -1)

    def decode(self, name: str, rows: np.ndarray | slice | None = None) -> np.ndarray:
        """Give full probabilities of a teacher, float32 `(num_rows, num_labels)`; all zero without an answer."""
        rows = slice(None) if rows is None else self._check_rows(rows)
        return decode_top_k(self.label_ids(name)[rows], self.label_probs(name)[rows], self.hierarchy.num_labels)

    @property
    def source_names(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: Who can speak for an example: the teachers, then the ensemble of each level."""
        return (*self.hierarchy.names, *(f"ensemble-{level}" for level in range(self.hierarchy.num_levels)))

    def gather(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the stored row of the teacher that speaks for each example; ensembles have none.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: label ids and float16 probabilities, both of shape `(num_rows, k)`, most
            probable first; all zero where nobody speaks, and where a teacher keeps fewer labels than another. A source
            that is an ensemble or does not exist, or shapes that differ, are a `ValueError`.
        """
        sources, rows = self._check_sources(sources, rows)
        names = self.hierarchy.names
        # (num_rows, largest k): a teacher that keeps fewer is padded by zeros, which say nothing.
        shape = (len(rows), max(ids.shape[1] for ids, _ in self._views.values()))
        label_ids, label_probs = (
            # Pools that were put together may store ids of one teacher in 8 bits and of another in 16.
            np.zeros(shape, dtype=np.result_type(*{view.dtype for view in views}))
            for views in zip(*self._views.values())
        )
        # All rows of a teacher together, and each source looked at once.
        for source in np.unique(sources).tolist():
            if not NOBODY <= source < len(names):
                raise ValueError(f"`sources` must be teachers (0..{len(names) - 1}) or -1 for nobody, got {source}.")
            if source != NOBODY:
                here = np.flatnonzero(sources == source)
                ids, probs = self._views[names[source]]
                label_ids[here, : ids.shape[1]] = ids.take(rows[here], axis=0)
                label_probs[here, : ids.shape[1]] = probs.take(rows[here], axis=0)
        return label_ids, label_probs

    def hard_pseudolabels(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Give the most probable label of each example by whoever speaks for it.

        Returns:
            `np.ndarray` of shape `(num_rows,)`, int64: ties to the lowest label, -1 where nobody speaks.

        Raises:
            ValueError: If a source does not exist, or the shapes differ.
        """
        sources, rows = self._check_sources(sources, rows)
        # What an ensemble says is stored nowhere: it has to be decoded and averaged, a part at a time.
        if (sources >= len(self.hierarchy.names)).any():
            labels = np.empty(len(rows), dtype=np.int64)
            for start in range(0, len(rows), _DECODED):
                part = slice(start, start + _DECODED)
                probs = self.pseudolabels(sources[part], rows[part])
                # The argmax of a row of zeros is label 0, which nobody said.
                labels[part] = np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
            return labels
        label_ids, label_probs = self.gather(sources, rows)
        return np.where(label_probs[:, 0] > 0, label_ids[:, 0].astype(np.int64), -1)

    def sparse_pseudolabels(
        self, sources: np.ndarray, rows: np.ndarray, *, hard: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give the pseudolabel of each example by the teacher that speaks for it, without the labels left out.

        With `hard`, the most probable label gets 1 instead of probabilities. A `ValueError` if teachers keep different
        numbers of labels, or as [`gather`].

        Returns:
            `tuple[np.ndarray, np.ndarray, np.ndarray]`: label ids `(num_rows, k)` int64, their probabilities
            `(num_rows, k)` float32 and the probability of each other label `(num_rows,)` float32.
        """
        # Padding would look like stored labels of probability 0, where the rest has more: only the first of them, as
        # `hard` takes, is safe.
        if not (hard or self.has_one_k):
            sizes = {name: self.label_ids(name).shape[1] for name in self.hierarchy.names}
            raise ValueError(f"All teachers must keep equally many labels, got {sizes}. Use `pseudolabels`.")
        label_ids, stored = self.gather(sources, rows)
        if hard:
            # The sign keeps a row without an answer at 0; all others get 1, and the rest of the labels nothing.
            label_ids, stored = label_ids[:, :1], np.sign(stored[:, :1])
        probs, rest_probs = scale_top_k(stored, self.hierarchy.num_labels)
        return label_ids.astype(np.int64), probs, rest_probs

    def pseudolabels(self, sources: np.ndarray, rows: np.ndarray, *, hard: bool = False) -> np.ndarray:
        """Give the pseudolabel of each example by whoever speaks for it, `(num_rows, num_labels)` in float32.

        Rows sum to 1, or are all zero where nobody speaks; with `hard`, the most probable label (ties to the lowest)
        gets 1. A source that does not exist, or shapes that differ, are a `ValueError`.
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
            # All rows of one source together: decoding is a few large array operations then.
            here = np.flatnonzero(sources == source)
            if source < len(names):
                probs[here] = self.decode(names[source], rows[here])
            else:
                level = self.hierarchy.level_indices(source - len(names))
                probs[here] = mean_probs(*self.decode_level(level, rows[here])).numpy()
        if hard:
            # `argmax` names label 0 for rows of zeros as well, which the product sets back to nothing.
            one_hot = np.zeros_like(probs)
            one_hot[np.arange(len(rows)), probs.argmax(axis=1)] = 1.0
            return one_hot * (probs.sum(axis=1, keepdims=True) > 0)
        return probs

    def decode_level(self, indices: Sequence[int], rows: np.ndarray | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Give full probability vectors of several teachers by their positions in the hierarchy.

        Returns:
            `tuple[torch.Tensor, torch.BoolTensor]`: probabilities `(num_rows, num_teachers, num_labels)`, and who
            answered `(num_rows, num_teachers)`; a `ValueError` if there is no such teacher or row.
        """
        names = self.hierarchy.names
        if not len(indices) or not set(indices) <= set(range(len(names))):
            raise ValueError(
                f"`indices` must be one or more positions of teachers in 0..{len(names) - 1}, got {list(indices)}. "
                "Take them from `hierarchy.level_indices`."
            )
        names = tuple(names[index] for index in indices)
        answered = np.stack([self.answered(name, rows) for name in names], axis=1)
        probs = np.empty((*answered.shape, self.hierarchy.num_labels), dtype=np.float32)
        # One teacher at a time: all of them beside the array that they are put into would be twice as much.
        for position, name in enumerate(names):
            probs[:, position] = self.decode(name, rows)
        return torch.from_numpy(probs), torch.from_numpy(answered)

    @property
    def has_one_k(self) -> bool:
        """`bool`: Whether all teachers keep equally many labels, so that their rows fit into one array."""
        return len({label_ids.shape[1] for label_ids, _ in self._views.values()}) == 1

    @classmethod
    def from_predictions(
        cls,
        hierarchy: Any,
        ids: Any = None,
        predictions: Any = None,
        *,
        names: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        inputs: Dataset | None = None,
        vectors: Any = None,
        pool_k: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> PseudolabelPool:
        """Build a pool from probabilities that are already at hand: `(hierarchy, ids, …)` or `(probs, names, labels)`.

        Args:
            hierarchy (`TeacherHierarchy`):
                The teachers. Where all are of level 0, their probabilities can stand in its place: `predictions`, or
                an array `(num_examples, num_teachers, num_labels)`; then `names` and `labels` follow.
            ids (`Sequence[int]` or `Sequence[str]` of length `num_examples`, *optional*):
                Unique id of each example. Defaults to those of the inputs, or else to 0, 1 and so on.
            predictions (`Mapping[str, np.ndarray]`):
                By teacher name, probabilities of shape `(num_examples, num_labels)`; a row of zeros is no answer.
            names (`Sequence[str]`, *optional*):
                The teachers of probabilities in place of a hierarchy; a mapping tells them itself.
            labels (`Sequence[str]`, *optional*):
                The task's label names, beside such probabilities.
            inputs (`datasets.Dataset`, *optional*):
                The inputs; an `id` column is added where there is none.
            vectors (`np.ndarray` of shape `(num_examples, num_features)`, *optional*):
                Inputs that are vectors, which the student reads; beside `inputs`, they are put into them as `vector`.
            pool_k (`int`, *optional*):
                How many labels to keep per row, 1 to `num_labels`. Defaults to `min(16, num_labels)`.
            facts (`Mapping[str, Any]`, *optional*):
                See [`PseudolabelPool`].

        Raises:
            ValueError: If shapes, ids or probabilities do not fit. A `TypeError` if an argument is of another kind.
        """
        check_kind(inputs, Dataset, "inputs", optional=True)
        if isinstance(hierarchy, Mapping | np.ndarray | torch.Tensor):
            from .votes import flat_predictions

            names, labels = ids if names is None else names, predictions if labels is None else labels
            hierarchy, predictions = flat_predictions(hierarchy, names, labels)
            ids = None
        check_kind(hierarchy, TeacherHierarchy, "hierarchy")
        check_kind(predictions, Mapping, "predictions")
        inputs = vector_inputs(vectors, inputs)
        if ids is None and inputs is not None and "id" in inputs.column_names:
            ids = list(inputs["id"][:])
        elif ids is None:
            ids = range(len(next(iter(predictions.values()), ())))
        k = default_pool_k(hierarchy.num_labels) if pool_k is None else pool_k
        check_id_values(ids)
        if inputs is not None and len(inputs) != len(ids):
            raise ValueError(
                f"`inputs` must hold one row for each of the {len(ids)} ids, got {len(inputs)}. Select "
                "the same examples."
            )
        # Copies, since a fact is added to them below, and the caller's are not ours to change.
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
            # A share that the caller measured on full probabilities counts more than one of what is given here.
            known.setdefault(name, {}).setdefault(
                "dropped_mass", dropped_mass(np.asarray(probs), label_ids) / num_answered
            )
        if inputs is not None and "id" not in inputs.column_names:
            inputs = inputs.add_column("id", list(ids))
        return cls(hierarchy, teachers, inputs, known, input_column=None if vectors is None else VECTOR_COLUMN)

    @classmethod
    def from_votes(
        cls,
        matrix: Any,
        names: Sequence[str],
        labels: Sequence[str],
        inputs: Dataset | None = None,
        *,
        vectors: Any = None,
    ) -> PseudolabelPool:
        """Make a pool of a matrix of votes, see [`pool_from_votes`]."""
        # `votes` makes pools, so it can be imported only when this class is there; so in the other methods.
        from .votes import pool_from_votes

        return pool_from_votes(matrix, names, labels, inputs, vectors)

    @classmethod
    def from_answers(
        cls, table: Any, labels: Sequence[str] | None = None, inputs: Dataset | None = None, **columns: Any
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

    def to_dataset(self) -> Dataset:
        """Give the wide view for looking at: inputs, and per teacher its most probable label and probability.

        Returns:
            `datasets.Dataset`: `id`, the inputs' columns, `<teacher>_label` (a name, `None` without an answer) and
            `<teacher>_prob`.
        """
        # The inputs bring their own `id`, and two columns of one name cannot be joined.
        columns: dict[str, Any] = {} if self.inputs is not None else {"id": self.ids.tolist()}
        for name in self.hierarchy.names:
            columns[f"{name}_label"] = [None if label < 0 else self.labels[label] for label in self.hard_labels(name)]
            columns[f"{name}_prob"] = self.label_probs(name)[:, 0].astype(np.float32)
        wide = Dataset.from_dict(columns)
        return wide if self.inputs is None else concatenate_datasets([self.inputs, wide], axis=1)
