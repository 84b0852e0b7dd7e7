"""What is compared: the pool, the loss and the arguments that make each method."""

from __future__ import annotations

import copy
import os
from dataclasses import fields, replace

import numpy as np
import torch

from ..hierarchy import TeacherHierarchy
from ..method.aekd import AdaptiveEnsembleDistillation
from ..method.aggregation import AGGREGATORS
from ..method.metrics import accuracy, measure_labels
from ..pool.derived import FEATURE_AGGREGATORS, aggregated_pool, boosted_pool, single_teacher_pool
from ..pool.pseudolabels import PseudolabelPool
from ..training.config import CoSupervisedConfig
from ..training.inherited import default_of
from ..training.members import DECIDED_BY_MEMBERS
from ..training.run import RUN_DIR

METHODS = ("generalist", "ensemble", "csl", "ceiling")
# All teachers into one pseudolabel, with no hierarchy.
AGGREGATED_METHODS = (
    *(name for name in AGGREGATORS if name != "mean_probs"),  # which is `ensemble`
    *FEATURE_AGGREGATORS,
)
# Co-supervision with another assignment: upper bounds, and chance.
ASSIGNED_METHODS = ("oracle_scope", "oracle_domain", "oracle_loss", "random")
OTHER_METHODS = ("committee", *AGGREGATED_METHODS, "boosting", "aekd", "generalist_rejection", *ASSIGNED_METHODS)


def teacher_accuracies(test_pool: PseudolabelPool) -> dict[str, float]:
    """Measure every teacher on labelled data."""
    labels = _oracle_labels(test_pool)
    return {name: accuracy(test_pool.hard_labels(name), labels) for name in test_pool.hierarchy.names}


def weak_accuracy(test_pool: PseudolabelPool, metric: str = "accuracy") -> float:
    """Measure the generalist: the root teacher, or the mean of the root level's probabilities where it has several."""
    probs = weak_probs(test_pool)
    # Where nobody at the root answered, the row is zeros, whose argmax would pass for the first label.
    predictions = np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
    return measure_labels(predictions, _oracle_labels(test_pool), metric)[metric]


def weak_probs(test_pool: PseudolabelPool) -> np.ndarray:
    """Give the generalist's probabilities `(num_examples, num_labels)`."""
    root = test_pool.hierarchy.level_indices(0)
    source = root[0] if len(root) == 1 else len(test_pool.hierarchy.teachers)
    return test_pool.pseudolabels(np.full(len(test_pool), source), np.arange(len(test_pool)))


def _oracle_labels(pool: PseudolabelPool) -> np.ndarray:
    if (labels := pool.oracle_labels) is None:
        raise ValueError(
            "Measuring needs ground truth in the pool, got no `oracle_label`. Build it with `oracle_column`."
        )
    return labels


def method_pool(
    pool: PseudolabelPool,
    method: str,
    *,
    features: torch.Tensor | None = None,
    labelled_pool: PseudolabelPool | None = None,
) -> PseudolabelPool:
    """Give the pool on which a method trains the student."""
    hierarchy = pool.hierarchy
    if method == "generalist":
        return pool.with_hierarchy(TeacherHierarchy(hierarchy.labels, hierarchy.levels[0]))
    # Both ask all teachers about every example, so that levels mean nothing.
    if method in ("ensemble", "aekd"):
        return pool.with_hierarchy(
            TeacherHierarchy(hierarchy.labels, [replace(t, level=0) for t in hierarchy.teachers])
        )
    if method == "generalist_rejection":
        return _repeat_root(pool)
    if method in AGGREGATED_METHODS:
        return aggregated_pool(pool, method, features=features)
    if method == "boosting":
        if labelled_pool is None:
            raise ValueError(
                "'boosting' needs a `labelled_pool`, got none. Label other examples with the same teachers, with "
                "their ground truth as `oracle_column`, or leave this method out."
            )
        return boosted_pool(pool, labelled_pool)
    if method == "ceiling":
        return single_teacher_pool(
            pool, "ground-truth", np.eye(hierarchy.num_labels, dtype=np.float32)[_oracle_labels(pool)]
        )
    if method in ("csl", "committee", *ASSIGNED_METHODS):
        return pool
    raise ValueError(f"`method` must be one of {[*METHODS, *OTHER_METHODS]}, got {method!r}.")


def method_loss(pool: PseudolabelPool, method: str) -> AdaptiveEnsembleDistillation | None:
    """Give the loss with which a method trains, where it has one of its own."""
    if method != "aekd":
        return None
    return AdaptiveEnsembleDistillation(*pool.decode_level(range(len(pool.hierarchy.teachers)), slice(None)))


def _repeat_root(pool: PseudolabelPool) -> PseudolabelPool:
    """The generalist at every level: rejection by the student alone, with nobody to choose among."""
    hierarchy = pool.hierarchy
    [root, *others] = hierarchy.levels[0]
    if others:
        raise ValueError(
            f"'generalist_rejection' needs one teacher at the root, got {len(others) + 1}. Leave this method out."
        )
    teachers = [
        replace(root, name=root.name if level == 0 else f"{root.name}-{level}", level=level)
        for level in range(hierarchy.num_levels)
    ]
    datasets = {teacher.name: pool.teachers[root.name] for teacher in teachers}
    return PseudolabelPool(TeacherHierarchy(hierarchy.labels, teachers), datasets, pool.inputs)


def method_arguments(args: CoSupervisedConfig, method: str, num_levels: int) -> CoSupervisedConfig:
    """Give the configuration with which a method trains: the same recipe, with its own assignment."""
    args = copy.copy(args)
    args.method = "committee" if method == "committee" else "csl"
    if method == "csl":
        return args
    args.output_dir = os.path.join(args.output_dir, RUN_DIR, "methods", method)
    if method == "committee":
        defaults = {item.name: default_of(item) for item in fields(args)}
        for name in DECIDED_BY_MEMBERS:
            setattr(args, name, defaults[name])
        return args
    if method in ("generalist_rejection", *ASSIGNED_METHODS):
        # They belong to an assignment that these have not.
        args.agreement_neighbors = 0
        # At a root there is nothing to choose by, and of several teachers only the ensemble speaks.
        root = args.assignment[0] if args.assignment[0] in ("auto", "ensemble") else method
        rejects = method == "generalist_rejection"
        args.assignment = ["scope"] if rejects else [root, *[method] * (num_levels - 1)]
        return args
    args.assignment = ["ensemble"]
    if method == "aekd":
        if args.head_solver == "ridge":
            raise ValueError("'aekd' has a loss of its own, got `head_solver` 'ridge'. Use 'steps', or leave it out.")
        args.loss, args.loss_kwargs = "cross_entropy", {}  # as much as to say: none
    if method == "ceiling":
        args.teacher_neighbors = args.self_training_rounds = 0  # ground truth is no teacher, and of all examples
    if args.warm_start:
        # A student that goes on from level to level sees so many times the steps.
        scale = 1 + (num_levels - 1) * args.rounds_per_level
        args.max_steps = args.max_steps * scale if args.max_steps > 0 else args.max_steps
        args.num_train_epochs = args.num_train_epochs * scale
    return args
