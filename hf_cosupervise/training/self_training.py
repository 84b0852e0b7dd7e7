"""Self-training after the last level: the student labels itself what no teacher answered, and what was rejected."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from ..method.linear_head import linear_logits
from ..method.metrics import accuracy
from ..method.rejection import student_entropy
from ..method.self_training import growing_share, select_surest, why_stop
from ..pool.pseudolabels import PseudolabelPool
from ..students.student import Student
from .config import CoSupervisedConfig
from .plan import LevelPlan, check_predictions
from .run import TrainingRun

# What a record tells of a round.
NUM_ADDED, NUM_LEFT_OUT = "self_training/num_added", "self_training/num_left_out"
AGREEMENT, CHANGE = "self_training/agreement", "self_training/changed"


class SelfTraining:
    """Plan the rounds of self-training, which follow the last level as one more.

    A round trains a fresh student on what the last level kept, with its pseudolabels, and on a part of the rows left
    out, with the student's own labels: those that second opinions share, the surest of each label first.
    """

    def __init__(self, pool: PseudolabelPool, args: CoSupervisedConfig, student: Student, run: TrainingRun) -> None:
        self.pool, self.args, self.student, self.run = pool, args, student, run
        self._planned: dict[int, LevelPlan] = {}  # asked whether to stop, the student need not be asked again

    def why_stop(self, round: int) -> str | None:
        """Tell why a round should not be trained, if it should not; gives what [`plan`] gives next."""
        self._planned.clear()  # of a run that was cut off in between
        plan = self.plan(round)
        if not plan.metrics[NUM_LEFT_OUT]:
            return "no example was rejected or without an answer"
        if not plan.metrics[NUM_ADDED]:
            return "no label was shared by second opinions"
        self._planned[round] = plan
        before = [record[AGREEMENT] for record in self.run.history.records if AGREEMENT in record]
        return why_stop(plan.metrics.get(AGREEMENT), max(before, default=None), plan.metrics.get(CHANGE))

    def plan(self, round: int) -> LevelPlan:
        """Let the student label what was left out, and choose what of it is trained on."""
        if round in self._planned:
            return self._planned.pop(round)
        last, before = self.run.plans[self.run.num_levels - 1], self.run.plans[self.run.num_levels :] if round else []
        left_out = self.student.readable & ~last.keep_mask
        labels, entropy, is_shared = self._ask()
        metrics = {NUM_LEFT_OUT: float(left_out.sum())}
        if before and before[0].relabelled is not None:
            same = labels == before[0].relabelled
            metrics[CHANGE] = _share(~same, left_out)
            is_shared = same if is_shared is None else is_shared
        if is_shared is not None:
            metrics[AGREEMENT] = _share(is_shared, left_out)
        candidates = left_out if is_shared is None else left_out & is_shared
        sure, own, among = map(torch.from_numpy, (entropy, labels, candidates))
        share = growing_share(round, self.args.self_training_rounds)
        added = select_surest(sure, own, among, share, self.pool.hierarchy.num_labels).numpy()
        # As narrow as in any plan, for it is kept with the run.
        own_labels = np.where(left_out, labels, -1).astype(np.int32)
        # Labels stay those of the teachers: what they answered says how many steps a level has.
        kept = last.keep_mask | added
        relabelled = own_labels if last.relabelled is None else np.where(left_out, own_labels, last.relabelled)
        plan = LevelPlan(self.run.num_levels, round, last.assigned_teacher, last.labels, kept, metrics, relabelled)
        metrics |= {NUM_ADDED: float(added.sum()), "consistency/keep_rate": plan.keep_rate}
        metrics["consistency/num_kept"] = float(kept.sum())
        if (oracle_labels := self.pool.oracle_labels) is not None and added.any():
            metrics["oracle_self_training/accuracy"] = accuracy(labels[added], oracle_labels[added])
        return plan

    def _ask(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The student's labels and entropy for all examples, and where all second opinions are the same, if any."""
        num_examples, heads = len(self.pool), self.student.folds
        labels, entropy = np.zeros(num_examples, dtype=np.int32), np.zeros(num_examples, dtype=np.float32)
        is_shared = np.zeros(num_examples, dtype=np.int8)
        for part, log_probs in self.student.predict_log_probs(self.student.examples, share=True):
            check_predictions("self-training", part, log_probs)
            labels[part] = own = log_probs.numpy().argmax(axis=1)
            entropy[part], is_shared[part] = student_entropy(log_probs).numpy(), 1
            for head in heads:
                logits = linear_logits(head, self.student.example_features()[part])
                is_shared[part] &= logits.cpu().numpy().argmax(axis=1) == own
        # Each process has filled in its share.
        add_up = self.student.processes.sum_array
        return add_up(labels), add_up(entropy), add_up(is_shared) > 0 if heads else None


def has_work(pool: PseudolabelPool, args: CoSupervisedConfig, keep_func: Any = None) -> bool:
    """Tell whether an example can be left out of the last level: because nobody answers it, or by rejection."""
    if pool.hierarchy.num_levels > 1 and (args.rejection != ["none"] or keep_func is not None):
        return True
    return not np.any([pool.answered(name) for name in pool.hierarchy.names], axis=0).all()


def check_self_training(args: CoSupervisedConfig, pool: PseudolabelPool, keep_func: Any = None) -> None:
    """Refuse self-training where it has nothing to label."""
    if args.self_training_rounds and not has_work(pool, args, keep_func):
        raise ValueError(
            "`self_training_rounds` is for examples that no teacher answers or that are rejected, got "
            f"{args.self_training_rounds} with {len(pool)} examples that are all answered, and none of which can be "
            "rejected. Leave it out."
        )


def without_idle_rounds(args: CoSupervisedConfig, pool: PseudolabelPool) -> CoSupervisedConfig:
    """Give arguments without self-training where it has nothing to label: for one of several students."""
    if not args.self_training_rounds or has_work(pool, args):
        return args
    own = copy.copy(args)
    own.self_training_rounds = 0
    return own


def _share(values: np.ndarray, among: np.ndarray) -> float:
    return float(values[among].mean()) if among.any() else 0.0
