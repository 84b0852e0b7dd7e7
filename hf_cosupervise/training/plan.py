"""The plan of one level: who speaks for which example, and which pseudolabels are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..method.assignment import NOBODY, fall_back
from ..method.metrics import accuracy, oracle_selection
from ..method.rejection import select_by_loss_rank, select_consistent
from ..pool.pseudolabels import PseudolabelPool
from ..processes import row_chunks
from ..students.student import Student
from .config import CoSupervisedConfig
from .plan_rules import (
    AssignFunction,
    KeepFunction,
    LevelAnswers,
    PlannedRows,
    StudentChunks,
    assign,
    assign_by_function,
    assign_by_neighbors,
    in_hierarchy,
    judge,
    level_assignment,
)


@dataclass
class LevelPlan:
    """Say what one level (or one round of it) trains on."""

    level: int
    round: int
    assigned_teacher: np.ndarray
    labels: np.ndarray
    keep_mask: np.ndarray
    metrics: dict[str, float]
    relabelled: np.ndarray | None = None

    @property
    def keep_rate(self) -> float:
        """`float`: Kept share of the examples with a pseudolabel; with what the student adds itself maybe above 1."""
        return int(self.keep_mask.sum()) / max(int((self.labels >= 0).sum()), 1)


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
    readable: np.ndarray | None = None,
) -> LevelPlan:
    """Assign a teacher to every example and select what to keep (the E-step and the rejection of one level)."""
    chunks: Iterable[tuple[slice, torch.Tensor | None]]
    # Not `or`: a process whose share is empty has no chunks, which is not the same as having no student.
    chunks = student_chunks if student_chunks is not None else ((part, None) for part in row_chunks(len(pool)))
    planned = []
    for part, log_probs in chunks:
        if log_probs is not None:
            check_predictions(f"level {level}", part, log_probs)
        answers = LevelAnswers(pool, level, part)
        parent = torch.from_numpy(np.asarray(previous[part], dtype=np.int64))
        # Assign: the level's own rule, or one of the user's, or what was chosen over neighbours before.
        if assign_func is not None and log_probs is not None:
            own = in_hierarchy(answers, assign_by_function(answers, log_probs, assign_func))
        # Positions within the level from here on become positions in the hierarchy, as those of the level above are.
        elif chosen is not None:
            own = in_hierarchy(answers, chosen[part])
        else:
            own = assign(answers, args, log_probs)
        # Where nobody of this level answers, who spoke at the level above goes on speaking.
        assigned = fall_back(own, parent)
        # Nobody speaks for an example that the student cannot read: it could neither judge nor learn it.
        if readable is not None:
            assigned = torch.where(torch.from_numpy(readable[part]), assigned, NOBODY)
        planned.append((part, judge(answers, args, assigned, parent, log_probs, keep_func)))
    # Reject: some tests rank an example among all, so they wait until every process has told of its share.
    rows = PlannedRows.concatenate(planned, len(pool), sum_over_processes)
    has_label = rows.labels >= 0  # a row that nobody has answered so far counts nowhere
    if not has_label.any():
        raise ValueError(
            f"No teacher up to level {level} answered any of the {len(pool)} examples. Check their labels."
        )
    keep_mask = has_label & (rows.passes_parent > 0)
    if level > 0:  # at the root there is no student, so nothing is rejected
        keep_mask &= _select(rows, args, has_label) if keep_func is None else rows.passes_others > 0
    relabelled = None
    if level > 0 and args.relabel_above is not None:
        # Only what was rejected: a pseudolabel that passed is not overruled by the student.
        sure = has_label & ~keep_mask & (rows.student_confidence >= args.relabel_above)
        relabelled = np.where(sure, rows.student_labels, -1)
        keep_mask |= sure
        rows.labels = np.where(sure, rows.student_labels, rows.labels)
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


def plan_by_student(
    pool: PseudolabelPool,
    level: int,
    args: CoSupervisedConfig,
    previous: np.ndarray,
    student: Student,
    sum_over_processes: Callable[[np.ndarray], np.ndarray],
    **options: Any,
) -> LevelPlan:
    """Plan a level below the root: ask the student, and where it is wanted the neighbours of each example too."""
    is_by_agreement = level_assignment(args, level, pool.hierarchy) == "agreement"
    if args.agreement_neighbors and options.get("assign_func") is None and is_by_agreement:
        near = student.nearest(args.agreement_neighbors)
        chosen = assign_by_neighbors(pool, level, args, student.judge_examples(), near, sum_over_processes)
        options["chosen"] = chosen
    options |= {"sum_over_processes": sum_over_processes, "readable": student.readable}
    return plan_level(pool, level, args, previous, student.judge_examples(), **options)


def check_predictions(before: str, part: slice, log_probs: torch.Tensor) -> None:
    """Refuse a student whose training diverged."""
    if torch.isnan(log_probs.sum()):
        raise ValueError(
            f"The student's predictions must be numbers, got NaN in rows {part.start}..{part.stop - 1} before "
            f"{before}: its training diverged. Lower `learning_rate`, or set `max_grad_norm`."
        )


def _select(rows: PlannedRows, args: CoSupervisedConfig, has_label: np.ndarray) -> np.ndarray:
    """What of the examples with a pseudolabel passes the tests that need the student, or all of the examples."""
    keep = has_label & (rows.passes_others > 0)
    # Each test ranks all that have a pseudolabel, not what the one before left: their order must not matter.
    if "top_k" in args.rejection:
        losses, agrees = torch.from_numpy(rows.losses), torch.from_numpy(rows.in_student_top_k > 0)
        keep &= select_consistent(losses, agrees, torch.from_numpy(has_label), args.rejection_rule).numpy()
    if "student_entropy" in args.rejection:
        # At least one, or a small share of few examples would end the run.
        num_keep = max(round(args.rejection_share * int(has_label.sum())), 1)
        entropy = torch.from_numpy(rows.student_entropy)
        keep &= select_by_loss_rank(entropy, num_keep, torch.from_numpy(has_label)).numpy()
    if "vote_entropy" in args.rejection:
        keep &= rows.vote_entropy <= np.median(rows.vote_entropy[has_label])
    return keep


def _describe(pool: PseudolabelPool, plan: LevelPlan, rows: PlannedRows, has_student: bool) -> dict[str, float]:
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
    # The keys of rejection have an older word, which trackers and histories hold.
    metrics["consistency/keep_rate"] = plan.keep_rate
    metrics["consistency/num_kept"] = float(plan.keep_mask.sum())
    if has_student:
        metrics["assignment/agreement"] = accuracy(rows.student_labels[has_label], plan.labels[has_label])
        metrics["consistency/top_k_agreement"] = float((rows.in_student_top_k[has_label] > 0).mean())
    return metrics | _describe_oracle(pool, plan)


def _describe_oracle(pool: PseudolabelPool, plan: LevelPlan) -> dict[str, float]:
    """Numbers that need ground truth, where the pool has it; none of them flows back into training."""
    oracle_labels = pool.oracle_labels
    if oracle_labels is None:
        return {}
    metrics = {
        f"oracle_selection/{name}": value
        for name, value in oracle_selection(plan.keep_mask, plan.labels, oracle_labels).items()
    }
    has_label = plan.labels >= 0
    metrics["oracle_pseudolabels/accuracy"] = accuracy(plan.labels[has_label], oracle_labels[has_label])
    scopes = pool.hierarchy.scope_mask(plan.level)
    if len(scopes) > 1 and not scopes.all():  # a teacher without a scope is right for every label
        inside = plan.assigned_teacher - pool.hierarchy.level_indices(plan.level)[0]
        own = (inside >= 0) & (inside < len(scopes))  # not those that fell back, nor an ensemble's
        if own.any():
            metrics["oracle_assignment/accuracy"] = float(scopes.numpy()[inside[own], oracle_labels[own]].mean())
    return metrics
