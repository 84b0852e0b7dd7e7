"""Weak, student and ceiling on the same test set with the same recipe, beside what a user would try instead."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from .aggregation import AGGREGATORS
from .config import CoSupervisedConfig
from .derived_pools import FEATURE_AGGREGATORS, aggregated_pool, boosted_pool, single_teacher_pool
from .files import write_json
from .levels import LevelPlan
from .metrics import accuracy, mean_and_spread, performance_gap_recovered
from .pool import PseudolabelPool
from .teachers import TeacherHierarchy
from .trainer import CoSupervisedTrainer
from .training_run import RUN_DIR
from .weighting import AdaptiveEnsembleDistillation

logger = logging.getLogger(__name__)

METHODS = ("generalist", "ensemble", "csl", "ceiling")
# All teachers into one pseudolabel, with no hierarchy.
AGGREGATED_METHODS = (
    *(name for name in AGGREGATORS if name != "mean_probs"),  # which is `ensemble`
    *FEATURE_AGGREGATORS,
)
# Co-supervision with another assignment: upper bounds, and chance.
ASSIGNED_METHODS = ("oracle_scope", "oracle_domain", "oracle_loss", "random")
OTHER_METHODS = (*AGGREGATED_METHODS, "boosting", "aekd", "generalist_rejection", *ASSIGNED_METHODS)


def teacher_accuracies(test_pool: PseudolabelPool) -> dict[str, float]:
    """Measure every teacher on labelled data.

    Args:
        test_pool (`PseudolabelPool`):
            The teachers' answers on the test set, with `oracle_label`. No answer counts as wrong.

    Returns:
        `dict[str, float]`: accuracy by teacher name, 0 to 1.

    Raises:
        ValueError: If the pool has no ground truth.
    """
    labels = _oracle_labels(test_pool)
    return {name: accuracy(test_pool.hard_labels(name), labels) for name in test_pool.hierarchy.names}


def weak_accuracy(test_pool: PseudolabelPool) -> float:
    """Measure the generalist: the root teacher, or the mean of the root level's probabilities where it has several.

    Args:
        test_pool (`PseudolabelPool`):
            The teachers' answers on the test set, with `oracle_label`.

    Returns:
        `float`: 0 to 1.
    """
    root = test_pool.hierarchy.level_indices(0)
    rows = np.arange(len(test_pool))
    sources = np.full(len(rows), root[0] if len(root) == 1 else len(test_pool.hierarchy.teachers))
    probs = test_pool.pseudolabels(sources, rows)
    return accuracy(np.where(probs.any(axis=1), probs.argmax(axis=1), -1), _oracle_labels(test_pool))


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
    """Give the pool on which a method trains the student.

    Args:
        pool (`PseudolabelPool`):
            All teachers; for `ceiling` and `oracle_…` with `oracle_label`.
        method (`str`):
            `generalist` keeps the root only, and `generalist_rejection` repeats it at every level; `ensemble` and
            `aekd` put all teachers at the root; `boosting` and the names of [`aggregated_pool`] make one pseudolabel
            of them; `ceiling` has the ground truth as its one teacher; `csl`, `oracle_…` and `random` keep the pool as
            it is.
        features (`torch.Tensor` of shape `(num_examples, feature_size)`, *optional*):
            For `raven` and `crowdlab`, see [`aggregated_pool`].
        labelled_pool (`PseudolabelPool`, *optional*):
            For `boosting`, see [`boosted_pool`].

    Returns:
        `PseudolabelPool`

    Raises:
        ValueError: If the method is not known, or needs ground truth, features or a labelled pool that is not there.
    """
    hierarchy = pool.hierarchy
    if method == "generalist":
        return pool.with_hierarchy(TeacherHierarchy(hierarchy.labels, hierarchy.levels[0]))
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
    if method == "csl" or method in ASSIGNED_METHODS:
        return pool
    raise ValueError(f"`method` must be one of {[*METHODS, *OTHER_METHODS]}, got {method!r}.")


def method_loss(pool: PseudolabelPool, method: str) -> AdaptiveEnsembleDistillation | None:
    """Give the loss with which a method trains, where it has one of its own.

    Args:
        pool (`PseudolabelPool`):
            All teachers.
        method (`str`):
            See [`method_pool`].

    Returns:
        [`AdaptiveEnsembleDistillation`] for `aekd`, for `CoSupervisedTrainer(loss_func=...)`; otherwise `None`.
    """
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
    """Give the configuration with which a method trains: the same recipe, with its own assignment.

    Where co-supervision goes on from level to level (`warm_start`), the methods of one level get as many steps as all
    its levels together. `aekd` has its own loss in place of `args.loss`, see [`method_loss`].

    Args:
        args (`CoSupervisedConfig`):
            The configuration of co-supervision.
        method (`str`):
            See [`method_pool`].
        num_levels (`int`):
            Levels of the full hierarchy.

    Returns:
        `CoSupervisedConfig`

    Raises:
        ValueError: If the method cannot train as `head_solver` says.
    """
    args = copy.copy(args)
    if method in ("csl", "generalist_rejection", *ASSIGNED_METHODS):
        if method == "generalist_rejection":
            args.assignment = ["scope"]
        elif method != "csl":
            root = "ensemble" if args.assignment[0] == "ensemble" else method
            args.assignment = [root, *[method] * (num_levels - 1)]
        if method != "csl":
            args.agreement_neighbors = 0
        args.output_dir = args.output_dir if method == "csl" else _method_dir(args, method)
        return args
    args.output_dir = _method_dir(args, method)
    args.assignment = ["ensemble"]
    if method == "aekd":
        if args.head_solver == "ridge":
            raise ValueError("'aekd' has a loss of its own, got `head_solver` 'ridge'. Use 'steps', or leave it out.")
        args.loss, args.loss_kwargs = "cross_entropy", {}  # as much as to say: none
    if method == "ceiling":
        args.teacher_neighbors = 0  # ground truth is no teacher
    if args.warm_start:
        scale = 1 + (num_levels - 1) * args.rounds_per_level
        args.max_steps = args.max_steps * scale if args.max_steps > 0 else args.max_steps
        args.num_train_epochs = args.num_train_epochs * scale
    return args


def _method_dir(args: CoSupervisedConfig, method: str) -> str:
    return os.path.join(args.output_dir, RUN_DIR, "methods", method)


def compare_methods(
    student: str | PreTrainedModel,
    args: CoSupervisedConfig,
    pool: PseudolabelPool,
    test_dataset: Dataset,
    *,
    weak: float,
    methods: Sequence[str] = METHODS,
    processing_class: Any = None,
    extra_pools: Mapping[str, PseudolabelPool] | None = None,
    labelled_pool: PseudolabelPool | None = None,
    resume: bool = False,
    on_trained: Callable[[str, CoSupervisedTrainer], None] = lambda method, trainer: None,
) -> tuple[dict[str, Any], CoSupervisedTrainer]:
    """Train the student by several methods with one recipe and measure all of them on one test set.

    The last checkpoint counts; the test set chooses nothing. Every method has the same optimizer, schedule, steps,
    seed and fresh head.

    Args:
        student (`str` or `PreTrainedModel`):
            Hub id or folder, or a model, of which every method gets a copy.
        args (`CoSupervisedConfig`):
            The recipe. Co-supervision writes to its `output_dir`, other methods below `_run/methods/`. Nothing is
            pushed; the trainer that comes back can be.
        pool (`PseudolabelPool`):
            All teachers' answers on the unlabelled data, with `oracle_label` for the ceiling.
        test_dataset (`datasets.Dataset`):
            Inputs with labels.
        weak (`float`):
            Accuracy of the generalist on the same test set, see [`weak_accuracy`].
        methods (`Sequence[str]`, *optional*):
            Which of `METHODS` and `OTHER_METHODS`. `csl` and `ceiling` must be among them.
        processing_class (`Any`, *optional*):
            The student's, where that is a model.
        extra_pools (`Mapping[str, PseudolabelPool]`, *optional*):
            Controls of one level, such as one teacher with all labels, by name.
        labelled_pool (`PseudolabelPool`, *optional*):
            For `boosting`: the same teachers' answers on other examples, with `oracle_label`.
        resume (`bool`, *optional*, defaults to `False`):
            Go on after the last finished level of each method, where an earlier run of the same recipe was cut off.
        on_trained (`Callable`, *optional*):
            Called with the name of each method and its trainer.

    Returns:
        `tuple[dict[str, Any], CoSupervisedTrainer]`: `weak_accuracy`, `methods` (accuracy and PGR) and `levels` (of
        co-supervision), all accuracies 0 to 1; and the trainer of co-supervision, with the final student.

    Raises:
        ValueError: If `csl` or `ceiling` is left out, or a method is not known or lacks what it needs.
    """
    if missing := {"csl", "ceiling"} - set(methods):
        raise ValueError(
            f"`methods` must hold 'csl' and 'ceiling' to measure a gap, got {list(methods)} without {sorted(missing)}."
        )
    args = copy.copy(args)
    args.push_to_hub = False
    names = [*methods, *(extra_pools or {})]
    arguments = {name: method_arguments(args, name, pool.hierarchy.num_levels) for name in names}
    pools = _method_pools(student, args, pool, methods, processing_class, labelled_pool) | dict(extra_pools or {})
    accuracies: dict[str, float] = {}
    levels: list[dict[str, Any]] = []
    main: CoSupervisedTrainer | None = None
    for method, own_pool in pools.items():
        trainer = CoSupervisedTrainer(
            _copy_model(student), arguments[method], pool=own_pool, processing_class=processing_class,
            loss_func=method_loss(pool, method),
        )  # fmt: skip
        trainer.pop_callback(PrinterCallback)  # the report tells it better than a log of every method
        trainer.train(resume_from_checkpoint=resume)
        on_trained(method, trainer)
        if method == "csl":
            main, levels = trainer, _measure_levels(trainer, test_dataset)
            accuracies[method] = levels[-1]["accuracy"]
        else:
            accuracies[method] = trainer.measure_accuracy(test_dataset)
    ceiling = accuracies["ceiling"]
    report = {
        "weak_accuracy": weak,
        "methods": {
            name: {"accuracy": value, "pgr": performance_gap_recovered(weak, value, ceiling)}
            for name, value in accuracies.items()
        },
        "levels": [{**level, "pgr": performance_gap_recovered(weak, level["accuracy"], ceiling)} for level in levels],
    }
    return report, main  # type: ignore[return-value]


def _copy_model(student: str | PreTrainedModel) -> str | PreTrainedModel:
    return copy.deepcopy(student) if isinstance(student, nn.Module) else student


def _method_pools(
    student: str | PreTrainedModel,
    args: CoSupervisedConfig,
    pool: PseudolabelPool,
    methods: Sequence[str],
    processing_class: Any,
    labelled_pool: PseudolabelPool | None,
) -> dict[str, PseudolabelPool]:
    """What each method trains on; everything is refused that can be before the student is asked for features."""
    on_features = [method for method in methods if method in FEATURE_AGGREGATORS]
    pools = {
        method: method_pool(pool, method, labelled_pool=labelled_pool)
        for method in methods if method not in on_features
    }  # fmt: skip
    if on_features and args.student_training != "probe":
        raise ValueError(
            f"{on_features} need a student with a linear head on a frozen backbone, got `student_training` "
            f"{args.student_training!r}. Use 'probe', or leave them out."
        )
    if on_features:
        own_args = method_arguments(args, on_features[0], pool.hierarchy.num_levels)
        trainer = CoSupervisedTrainer(
            _copy_model(student), own_args, pool=method_pool(pool, "ensemble"), processing_class=processing_class
        )
        features = trainer.pool_features()
        pools |= {method: method_pool(pool, method, features=features) for method in on_features}
    return {method: pools[method] for method in methods}


def _measure_levels(trainer: CoSupervisedTrainer, test_dataset: Dataset) -> list[dict[str, Any]]:
    """Measure the student of every level; the last one stays in the trainer."""
    levels = []
    for plan in trainer.plans:
        trainer.load_level(plan.level)
        levels.append({**_level_facts(trainer, plan), "accuracy": trainer.measure_accuracy(test_dataset)})
    return levels


def _level_facts(trainer: CoSupervisedTrainer, plan: LevelPlan) -> dict[str, Any]:
    records = [record for record in trainer.history.records if record["level"] == plan.level]
    names = trainer.pool.source_names
    shares = {name: records[-1][f"assignment/{name}"] for name in names if f"assignment/{name}" in records[-1]}
    facts = {"level": plan.level, "keep_rate": plan.keep_rate, "teachers": shares}
    return facts | {
        key.replace("/", "_"): value for key, value in records[-1].items()
        if key in ("assignment/agreement", "consistency/top_k_agreement") or key.startswith("oracle_")
    }  # fmt: skip


def merge_reports(reports: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Put the reports of several seeds side by side: every number becomes a list over seeds.

    Args:
        reports (`Sequence[Mapping[str, Any]]`):
            What [`compare_methods`] gave for each seed.
        seeds (`Sequence[int]`):
            The seeds.

    Returns:
        `dict[str, Any]`: `seeds` and the keys of one report.
    """
    return {"seeds": list(seeds), **_merge(list(reports))}


def _merge(values: list[Any]) -> Any:
    if all(isinstance(value, Mapping) for value in values):
        keys = {key: None for value in values for key in value}  # in order of appearance
        return {
            key: values[0][key] if key == "level" else _merge([value.get(key, 0.0) for value in values])
            for key in keys
        }
    if all(isinstance(value, list) for value in values):
        return [_merge(list(items)) for items in zip(*values, strict=True)]
    return values


def format_report(report: Mapping[str, Any]) -> str:
    """Print a merged report as two tables: co-supervision by level, and all methods.

    Args:
        report (`Mapping[str, Any]`):
            What [`merge_reports`] gave.

    Returns:
        `str`: accuracies, shares and PGR in percent, mean ± standard deviation where there are several seeds.
    """
    lines = [_row("level", "keep rate", "agreement", "accuracy", "PGR", "share per teacher")]
    for level in report["levels"]:
        shares = " ".join(f"{name} {100 * mean_and_spread(share)[0]:.0f}" for name, share in level["teachers"].items())
        agreement = level.get("assignment_agreement")
        cells = [_percent(level["keep_rate"]), _percent(agreement) if agreement else "-", _percent(level["accuracy"])]
        lines.append(_row(str(level["level"]), *cells, _percent(level["pgr"]), shares))
    lines += ["", _row("method", "accuracy", "PGR", "gain over generalist")]
    lines.append(_row("weak teacher", _percent(report["weak_accuracy"]), _percent([0.0]), ""))
    base = report["methods"].get("generalist", {}).get("pgr")
    for name, numbers in report["methods"].items():
        gain = _percent(_differences(numbers["pgr"], base)) if base and name != "generalist" else ""
        lines.append(_row(name, _percent(numbers["accuracy"]), _percent(numbers["pgr"]), gain))
    return "\n".join(line.rstrip() for line in lines)


def _differences(own: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    """Paired by seed; None where one of the two is not known."""
    return [None if a is None or b is None else a - b for a, b in zip(own, other)]


def _row(first: str, *cells: str) -> str:
    return f"{first:<25}" + "".join(f"{cell:<18}" for cell in cells[:-1]) + cells[-1]


def _percent(values: Sequence[float | None]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}" if len(values) > 1 else f"{100 * mean:.1f}"


def save_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a report as JSON, whole or not at all; NaN becomes null.

    Args:
        report (`Mapping[str, Any]`):
            JSON values.
        path (`str` or `os.PathLike`):
            File to write.
    """
    write_json(Path(path), report)
