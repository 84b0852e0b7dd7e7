"""What is decided before one level is trained: who speaks for which example, and which pseudolabels are kept.

One pass over the student's predictions, a chunk at a time; only a few numbers per example are remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from .assignment import (
    NOBODY,
    agreement_scores,
    assign_by_chance,
    assign_by_domain,
    assign_by_scope,
    choose_lowest,
    fall_back,
    oracle_assign_by_domain,
    oracle_assign_by_loss,
    oracle_assign_by_scope,
)
from .config import CoSupervisedConfig
from .consistency import (
    default_top_k,
    in_top_k,
    parent_confident,
    parent_topk,
    pseudolabel_loss,
    select_by_loss_rank,
    select_consistent,
    student_entropy,
    vote_entropy,
)
from .metrics import agreement, oracle_selection
from .neighbors import mean_over_neighbors
from .pool import ORACLE_DOMAIN, PseudolabelPool

# Rows per chunk. Fixed, so that the same student gives the same numbers whatever the number of processes.
CHUNK_ROWS = 1024

StudentChunks = Iterable[tuple[slice, torch.Tensor]]
# A user's own assignment: from the student's log-probabilities `(rows, num_labels)`, the probabilities of the level's
# teachers `(rows, num_teachers, num_labels)` and who answered `(rows, num_teachers)`, to positions in it `(rows,)`.
AssignFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# A user's own rejection: from the student's log-probabilities and the pseudolabels, `(rows, num_labels)` both, to what
# is kept `(rows,)`.
KeepFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LevelPlan:
    """Say what one level (or one round of it) trains on.

    Args:
        level (`int`):
            Level, from 0.
        round (`int`):
            Round within the level, from 0.
        assigned_teacher (`np.ndarray` of shape `(num_examples,)`):
            Who speaks for each example, a position in `pool.source_names`; -1 for nobody.
        labels (`np.ndarray` of shape `(num_examples,)`):
            Hard pseudolabels; -1 where there is none.
        keep_mask (`np.ndarray` of shape `(num_examples,)`, bool):
            What is trained on.
        metrics (`dict[str, float]`):
            Numbers for the log.
        relabelled (`np.ndarray` of shape `(num_examples,)`, *optional*):
            The student's own label of rejected examples that are trained on with it; -1 for all others. These have it
            in `labels` too, and are in `keep_mask`.
    """

    level: int
    round: int
    assigned_teacher: np.ndarray
    labels: np.ndarray
    keep_mask: np.ndarray
    metrics: dict[str, float]
    relabelled: np.ndarray | None = None

    @property
    def keep_rate(self) -> float:
        """`float`: Kept share of the examples that have a pseudolabel, 0 to 1."""
        return int(self.keep_mask.sum()) / max(int((self.labels >= 0).sum()), 1)


@dataclass
class _Rows:
    """The few numbers remembered per example."""

    assigned: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    in_student_top_k: np.ndarray
    passes_parent: np.ndarray
    student_labels: np.ndarray
    student_entropy: np.ndarray
    student_confidence: np.ndarray
    passes_others: np.ndarray
    vote_entropy: np.ndarray

    @classmethod
    def empty(cls, num_examples: int) -> _Rows:
        integers, flags = np.int32, np.int8
        floats = np.float32
        kinds = (integers, integers, floats, flags, flags, integers, floats, floats, flags, floats)
        return cls(*(np.zeros(num_examples, dtype=kind) for kind in kinds))


def plan_level(
    pool: PseudolabelPool,
    level: int,
    args: CoSupervisedConfig,
    previous: np.ndarray,
    student_chunks: StudentChunks | None = None,
    *,
    round: int = 0,
    chosen: torch.Tensor | None = None,
    assign_func: AssignFunction | None = None,
    keep_func: KeepFunction | None = None,
    sum_over_processes: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> LevelPlan:
    """Assign a teacher to every example and select what to keep (the E-step and the rejection of one level).

    Args:
        pool (`PseudolabelPool`):
            What the teachers say.
        level (`int`):
            Level, from 0.
        args (`CoSupervisedConfig`):
            Assignment and rejection.
        previous (`np.ndarray` of shape `(num_examples,)`):
            `assigned_teacher` of the level above; all -1 at the root.
        student_chunks (`Iterable[tuple[slice, torch.Tensor]]`, *optional*):
            Consecutive rows and the student's log-probabilities `(rows, num_labels)` on them; this process's share.
            Not needed at the root, where there is no student to ask.
        round (`int`, *optional*, defaults to 0):
            Round within the level.
        chosen (`torch.LongTensor` of shape `(num_examples,)`, *optional*):
            What [`assign_by_neighbors`] gave, in place of the level's own assignment.
        assign_func (`Callable`, *optional*):
            Below the root in place of the level's own assignment, a chunk of rows at a time: see [`AssignFunction`].
        keep_func (`Callable`, *optional*):
            Below the root in place of the rejection, a chunk of rows at a time: see [`KeepFunction`].
        sum_over_processes (`Callable`, *optional*):
            Adds an array up over all processes, each of which has filled its own rows only.

    Returns:
        `LevelPlan`

    Raises:
        ValueError: If no example is left to train on, or a function gives what cannot be.

    Source:
        arXiv 2402.15505, released code; see [`assignment`] and [`consistency`] for what is ours.
    """
    rows = _Rows.empty(len(pool))
    chunks: Iterable[tuple[slice, torch.Tensor | None]]
    # Not `or`: a process whose share is empty has no chunks, which is not the same as having no student.
    chunks = student_chunks if student_chunks is not None else ((part, None) for part in row_chunks(len(pool)))
    for part, log_probs in chunks:
        inside = None if chosen is None else chosen[part]
        if assign_func is not None and log_probs is not None:
            inside = _assign_by_function(pool, level, part, log_probs, assign_func)
        _plan_chunk(rows, pool, level, args, previous, part, log_probs, inside, keep_func)
    rows = _Rows(*(sum_over_processes(values) for values in vars(rows).values()))
    has_label = rows.labels >= 0
    if not has_label.any():
        raise ValueError(
            f"No teacher up to level {level} answered any of the {len(pool)} examples. Check their labels."
        )
    keep_mask = has_label & (rows.passes_parent > 0)
    if level > 0:
        keep_mask &= _select(rows, args, has_label) if keep_func is None else rows.passes_others > 0
    relabelled = None
    if level > 0 and args.relabel_above is not None:
        own = has_label & ~keep_mask & (rows.student_confidence >= args.relabel_above)
        relabelled = np.where(own, rows.student_labels, -1)
        keep_mask |= own
        rows.labels = np.where(own, rows.student_labels, rows.labels)
    if not keep_mask.any():
        raise ValueError(
            f"Level {level} must keep at least one example, got none of {int(has_label.sum())}: student and teachers "
            f"never agree under `rejection` {args.rejection}. Use 'none', a larger `rejection_k`, or better teachers."
            if keep_func is None
            else f"`keep_func` must keep at least one example of level {level}, got none of {int(has_label.sum())}."
        )
    plan = LevelPlan(level, round, rows.assigned, rows.labels, keep_mask, {}, relabelled)
    plan.metrics = _describe(pool, plan, rows, level > 0)
    return plan


def _select(rows: _Rows, args: CoSupervisedConfig, has_label: np.ndarray) -> np.ndarray:
    """What of the examples with a pseudolabel passes the tests that need the student, or all of the examples."""
    keep = has_label & (rows.passes_others > 0)
    if "top_k" in args.rejection:
        losses, agrees = torch.from_numpy(rows.losses), torch.from_numpy(rows.in_student_top_k > 0)
        keep &= select_consistent(losses, agrees, torch.from_numpy(has_label), args.rejection_rule).numpy()
    if "student_entropy" in args.rejection:
        num_keep = max(round(args.rejection_share * int(has_label.sum())), 1)
        entropy = torch.from_numpy(rows.student_entropy)
        keep &= select_by_loss_rank(entropy, num_keep, torch.from_numpy(has_label)).numpy()
    if "vote_entropy" in args.rejection:
        keep &= rows.vote_entropy <= np.median(rows.vote_entropy[has_label])
    return keep


def level_assignment(args: CoSupervisedConfig, level: int) -> str:
    """Give the assignment of a level.

    Args:
        args (`CoSupervisedConfig`):
            `assignment` holds one name for all levels, or one per level.
        level (`int`):
            Level, from 0.

    Returns:
        `str`
    """
    return args.assignment[0] if len(args.assignment) == 1 else args.assignment[level]


def row_chunks(num_examples: int) -> list[slice]:
    """Cut rows into the chunks in which a level is planned.

    Args:
        num_examples (`int`):
            Number of rows.

    Returns:
        `list[slice]`: consecutive rows, `CHUNK_ROWS` each but for the last.
    """
    return [slice(start, min(start + CHUNK_ROWS, num_examples)) for start in range(0, num_examples, CHUNK_ROWS)]


def _plan_chunk(
    rows: _Rows,
    pool: PseudolabelPool,
    level: int,
    args: CoSupervisedConfig,
    previous: np.ndarray,
    part: slice,
    log_probs: torch.Tensor | None,
    chosen: torch.Tensor | None,
    keep_func: KeepFunction | None,
) -> None:
    """Fill the remembered numbers of one chunk."""
    if log_probs is not None and torch.isnan(log_probs.sum()):
        raise ValueError(
            f"The student's predictions must be numbers, got NaN in rows {part.start}..{part.stop - 1} before level "
            f"{level}: its training diverged. Lower `learning_rate`, or set `max_grad_norm`."
        )
    parent = torch.from_numpy(np.asarray(previous[part], dtype=np.int64))
    own = _assign(pool, level, args, part, log_probs) if chosen is None else _in_hierarchy(pool, level, chosen)
    assigned = fall_back(own, parent)
    positions = np.arange(part.start, part.stop)
    hard = pool.hard_pseudolabels(assigned.numpy(), positions)
    rows.assigned[part], rows.labels[part] = assigned, hard
    rows.passes_parent[part] = 1
    if log_probs is None:
        return
    labels = torch.from_numpy(hard).clamp(min=0)
    k = args.rejection_k or default_top_k(pool.hierarchy.num_labels)
    rows.losses[part] = pseudolabel_loss(log_probs, labels)
    rows.in_student_top_k[part] = in_top_k(log_probs, labels, k)
    rows.student_labels[part] = log_probs.numpy().argmax(axis=1)  # numpy promises ties to the first
    rows.passes_others[part] = 1
    if args.relabel_above is not None:
        rows.student_confidence[part] = log_probs.max(dim=1).values.exp()
    if keep_func is not None:
        pseudolabels = torch.from_numpy(pool.pseudolabels(assigned.numpy(), positions))
        rows.passes_others[part] = _check_function("keep_func", keep_func(log_probs, pseudolabels), part, torch.bool)
        return
    if "student_entropy" in args.rejection:
        rows.student_entropy[part] = student_entropy(log_probs)
    if "confidence_window" in args.rejection:
        confidence = pool.pseudolabels(assigned.numpy(), positions).max(axis=1)
        rows.passes_others[part] = (args.rejection_window[0] <= confidence) & (confidence <= args.rejection_window[1])
    if "vote_entropy" in args.rejection:
        votes = np.stack([pool.hard_labels(name, part) for name in pool.hierarchy.names], axis=1)
        rows.vote_entropy[part] = vote_entropy(torch.from_numpy(votes), pool.hierarchy.num_labels)
    if {"parent_topk", "parent_confident"} & set(args.rejection):
        own, above = (torch.from_numpy(pool.pseudolabels(who.numpy(), positions)) for who in (assigned, parent))
        rows.passes_parent[part] = _passes_parent(args, k, labels, own.max(dim=1).values, parent, above)


def _passes_parent(
    args: CoSupervisedConfig,
    k: int,
    labels: torch.Tensor,
    confidence: torch.Tensor,
    parent: torch.Tensor,
    parent_probs: torch.Tensor,
) -> torch.Tensor:
    """Check local against global; where nobody above has answered there is nothing to contradict."""
    passes = torch.ones_like(labels, dtype=torch.bool)
    if "parent_topk" in args.rejection:
        passes &= parent_topk(labels, parent_probs, k)
    if "parent_confident" in args.rejection:
        parent_labels = torch.from_numpy(parent_probs.numpy().argmax(axis=1))
        passes &= parent_confident(labels, confidence, parent_labels, parent_probs.max(dim=1).values)
    return passes | (parent == NOBODY)


def _assign(
    pool: PseudolabelPool, level: int, args: CoSupervisedConfig, part: slice, log_probs: torch.Tensor | None
) -> torch.Tensor:
    """Say who speaks, as positions in `pool.source_names`."""
    hierarchy, method = pool.hierarchy, level_assignment(args, level)
    indices = hierarchy.level_indices(level)
    answered = torch.from_numpy(np.stack([pool.answered(hierarchy.names[index], part) for index in indices], axis=1))
    if method == "ensemble" and len(indices) > 1:
        return torch.where(answered.any(dim=1), len(hierarchy.teachers) + level, NOBODY)
    if level == 0 and len(indices) > 1:
        raise ValueError(f"A root level of several teachers needs the assignment 'ensemble', got {method!r}.")
    if level == 0 or len(indices) == 1 and method == "ensemble":
        return torch.where(answered[:, 0], indices[0], NOBODY)
    if log_probs is None:
        raise ValueError(f"Level {level} is assigned by the student of the level above: give its `student_chunks`.")
    return _in_hierarchy(pool, level, _assign_inside(pool, level, args, method, part, log_probs, answered))


def _assign_by_function(
    pool: PseudolabelPool, level: int, part: slice, log_probs: torch.Tensor, function: AssignFunction
) -> torch.Tensor:
    """Ask the user's own assignment, and see that who shall speak has something to say."""
    teacher_probs, answered = pool.decode_level(pool.hierarchy.level_indices(level), part)
    chosen = _check_function("assign_func", function(log_probs, teacher_probs, answered), part, torch.long)
    num_teachers = answered.shape[1]
    if len(chosen) and not -1 <= int(chosen.min()) <= int(chosen.max()) < num_teachers:
        raise ValueError(
            f"`assign_func` must give positions of level {level}, 0..{num_teachers - 1}, or -1 for nobody, got "
            f"{int(chosen.min())}..{int(chosen.max())}."
        )
    silent = (chosen != NOBODY) & ~answered.gather(1, chosen.clamp(min=0).unsqueeze(1)).squeeze(1)
    if silent.any():
        raise ValueError(
            f"`assign_func` must choose teachers that answered, got {int(silent.sum())} of {len(chosen)} rows without "
            f"an answer, row {part.start + int(silent.nonzero()[0])} first. Look at its third argument, or give -1."
        )
    return chosen


def _check_function(name: str, found: object, part: slice, dtype: torch.dtype) -> torch.Tensor:
    """What a user's function gave, if it can be used."""
    shape, kind = (part.stop - part.start,), "booleans" if dtype is torch.bool else "integers"
    if not isinstance(found, torch.Tensor) or found.shape != shape or found.dtype is not dtype:
        given = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"`{name}` must give a tensor of {kind} ({dtype}) of shape {shape}, got {given}.")
    return found.cpu()


def _in_hierarchy(pool: PseudolabelPool, level: int, inside: torch.Tensor) -> torch.Tensor:
    """Positions within a level as positions in the hierarchy."""
    return torch.where(inside == NOBODY, NOBODY, inside + pool.hierarchy.level_indices(level)[0])


def assign_by_neighbors(
    pool: PseudolabelPool,
    level: int,
    args: CoSupervisedConfig,
    student_chunks: StudentChunks,
    neighbors: torch.Tensor,
    sum_over_processes: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> torch.Tensor:
    """Choose the teacher that the student agrees with most on an example and on those next to it.

    Args:
        pool (`PseudolabelPool`):
            What the teachers say.
        level (`int`):
            Level, from 1.
        args (`CoSupervisedConfig`):
            `agreement_rule` and `agreement_min_prob`.
        student_chunks (`Iterable[tuple[slice, torch.Tensor]]`):
            See [`plan_level`].
        neighbors (`torch.LongTensor` of shape `(num_examples, k)`):
            What [`nearest_neighbors`] gives for the pool.
        sum_over_processes (`Callable`, *optional*):
            See [`plan_level`].

    Returns:
        `torch.LongTensor` of shape `(num_examples,)`: position in the level (ties to the first), or -1 where none of
        its teachers answered the example.

    Source:
        Ours: [`agreement_scores`] averaged by [`mean_over_neighbors`].
    """
    indices = pool.hierarchy.level_indices(level)
    names = [pool.hierarchy.names[index] for index in indices]
    scores = np.zeros((len(pool), len(indices)), dtype=np.float32)
    for part, log_probs in student_chunks:
        scores[part] = _agreement_scores(pool, level, args, part, log_probs)
    answered = torch.from_numpy(np.stack([pool.answered(name) for name in names], axis=1))
    smoothed = mean_over_neighbors(torch.from_numpy(sum_over_processes(scores)), neighbors, answered)
    return choose_lowest(smoothed, answered)


def _agreement_scores(
    pool: PseudolabelPool, level: int, args: CoSupervisedConfig, part: slice, log_probs: torch.Tensor
) -> torch.Tensor:
    """How far each teacher of a level is from the student, `(num_rows, num_teachers)`."""
    indices, rule, min_prob = pool.hierarchy.level_indices(level), args.agreement_rule, args.agreement_min_prob
    if not pool.has_one_k:
        return agreement_scores(log_probs, pool.decode_level(indices, part)[0], rule, min_prob)
    ids, probs, rest = pool.sparse_level(indices, part)
    return agreement_scores(log_probs, probs, rule, min_prob, label_ids=ids, rest_probs=rest)


def _assign_inside(
    pool: PseudolabelPool,
    level: int,
    args: CoSupervisedConfig,
    method: str,
    part: slice,
    log_probs: torch.Tensor,
    answered: torch.Tensor,
) -> torch.Tensor:
    hierarchy = pool.hierarchy
    if method == "scope":
        student_labels = torch.from_numpy(log_probs.numpy().argmax(axis=1))
        return assign_by_scope(student_labels, hierarchy.scope_mask(level), answered)
    if method == "agreement":
        return choose_lowest(_agreement_scores(pool, level, args, part, log_probs), answered)
    if method == "random":
        # By chunk, which is cut alike for any number of processes.
        seed = np.random.SeedSequence([int(args.data_seed or 0), level, part.start]).generate_state(1)[0]
        return assign_by_chance(answered, torch.Generator().manual_seed(int(seed)))
    domains = [teacher.domains for teacher in hierarchy.levels[level]]
    if method == "metadata":
        return assign_by_domain(_texts(pool, str(args.metadata_column), part), domains, answered)
    if method == "oracle_domain":
        return oracle_assign_by_domain(_texts(pool, ORACLE_DOMAIN, part), domains, answered)
    oracle_labels = torch.from_numpy(_oracle_labels(pool)[part])
    if method == "oracle_scope":
        return oracle_assign_by_scope(oracle_labels, hierarchy.scope_mask(level), answered)
    probs, _ = pool.decode_level(hierarchy.level_indices(level), part)
    return oracle_assign_by_loss(oracle_labels, probs, answered)


def _texts(pool: PseudolabelPool, column: str, part: slice) -> list[str]:
    return [str(value) for value in pool.column(column, part)]


def _oracle_labels(pool: PseudolabelPool) -> np.ndarray:
    labels = pool.oracle_labels
    if labels is None:
        raise ValueError("Oracle assignment needs `oracle_label` in the pool. Build it with `oracle_column`.")
    return labels


def _describe(pool: PseudolabelPool, plan: LevelPlan, rows: _Rows, has_student: bool) -> dict[str, float]:
    """Sum a level up in numbers under stable keys."""
    has_label = plan.labels >= 0
    num_labelled = int(has_label.sum())
    used = np.bincount(plan.assigned_teacher[has_label], minlength=len(pool.source_names)).tolist()
    shown = [pool.hierarchy.names[index] for index in pool.hierarchy.level_indices(plan.level)]
    if used[len(pool.hierarchy.teachers) + plan.level]:  # the ensemble speaks in their place
        shown = []
    metrics = {
        f"assignment/{name}": count / num_labelled
        for name, count in zip(pool.source_names, used)
        if count or name in shown
    }
    metrics["consistency/keep_rate"] = plan.keep_rate
    metrics["consistency/num_kept"] = float(plan.keep_mask.sum())
    if has_student:
        metrics["assignment/agreement"] = agreement(rows.student_labels[has_label], plan.labels[has_label])
        metrics["consistency/top_k_agreement"] = float((rows.in_student_top_k[has_label] > 0).mean())
    return metrics | _describe_oracle(pool, plan)


def _describe_oracle(pool: PseudolabelPool, plan: LevelPlan) -> dict[str, float]:
    """Numbers that need ground truth, where the pool has it; none of them flows back into training."""
    oracle_labels = pool.oracle_labels
    if oracle_labels is None:
        return {}
    metrics = {f"oracle_selection/{name}": value for name, value in
               oracle_selection(plan.keep_mask, plan.labels, oracle_labels).items()}  # fmt: skip
    has_label = plan.labels >= 0
    metrics["oracle_pseudolabels/accuracy"] = agreement(plan.labels[has_label], oracle_labels[has_label])
    scopes = pool.hierarchy.scope_mask(plan.level)
    if len(scopes) > 1 and not scopes.all():
        inside = plan.assigned_teacher - pool.hierarchy.level_indices(plan.level)[0]
        own = (inside >= 0) & (inside < len(scopes))
        if own.any():
            metrics["oracle_assignment/accuracy"] = float(scopes.numpy()[inside[own], oracle_labels[own]].mean())
    return metrics
