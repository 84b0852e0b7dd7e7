"""The pseudolabels of one level, row by row: what students are trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ..method.linear_head import SparseTargets
from ..pool.pseudolabels import PseudolabelPool
from ..processes import CHUNK_ROWS
from .plan import LevelPlan

# Pseudolabels of a level are decoded once where they fit in this many bytes, else batch by batch.
_MAX_DECODED_BYTES = 2**30


def level_targets(
    pool: PseudolabelPool, plan: LevelPlan, hard: bool, *, may_be_sparse: bool
) -> Callable[[np.ndarray], Any]:
    """Give a function of rows of the pool, as [`DataCollatorForCoSupervision`] takes one."""
    read = _sparse_pseudolabels if may_be_sparse and _pays_sparse(pool, plan) else _pseudolabels
    # A partial of plain functions, which workers of any start method can pickle; no method of an object.
    return partial(read, pool, plan, hard)


def _pseudolabels(pool: PseudolabelPool, plan: LevelPlan, hard: bool, rows: np.ndarray) -> np.ndarray:
    """Give what is trained on; a plain function, so that workers of any start method can take it along."""
    probs = pool.pseudolabels(plan.assigned_teacher[rows], rows, hard=hard)
    if plan.relabelled is not None:
        own = plan.relabelled[rows]  # the student's own label, -1 where the teacher's stays
        probs[own >= 0] = np.eye(probs.shape[1], dtype=np.float32)[own[own >= 0]]
    return probs


def _sparse_pseudolabels(
    pool: PseudolabelPool, plan: LevelPlan, hard: bool, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the same without the labels that the teachers left out."""
    return pool.sparse_pseudolabels(plan.assigned_teacher[rows], rows, hard=hard)


def _pays_sparse(pool: PseudolabelPool, plan: LevelPlan) -> bool:
    """Tell whether rows of k labels are cheaper than rows of all; an ensemble has no stored rows."""
    num_teachers = len(pool.hierarchy.teachers)
    k = pool.label_ids(pool.hierarchy.names[0]).shape[1]
    is_narrow = pool.has_one_k and 4 * k <= pool.hierarchy.num_labels
    return is_narrow and plan.relabelled is None and bool((plan.assigned_teacher < num_teachers).all())


def look_up(
    read: Callable[[np.ndarray], tuple[torch.Tensor, ...]], kept: np.ndarray, num_examples: int
) -> Callable[[torch.Tensor], torch.Tensor | SparseTargets]:
    """Give what is read of rows as a function of them: decoded once where it fits in memory, else batch by batch."""
    # One row tells how large all would be, sparse or dense.
    first = read(kept[:1])
    if num_examples * sum(values.nbytes for values in first) > _MAX_DECODED_BYTES:
        return lambda rows: _as_targets(read(rows.cpu().numpy()))
    # Rows that are not kept have a place too, so that a row of the pool is found without a second index.
    table = [values.new_zeros(num_examples, *values.shape[1:]) for values in first]
    for part in np.array_split(kept, max(len(kept) // CHUNK_ROWS, 1)):
        for values, wanted in zip(table, read(part)):
            values[torch.from_numpy(part).to(values.device)] = wanted
    return lambda rows: _as_targets(tuple(values.index_select(0, rows) for values in table))


def _as_targets(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor | SparseTargets:
    return tensors[0] if len(tensors) == 1 else SparseTargets(*tensors)
