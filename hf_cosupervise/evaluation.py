"""Weak, student and ceiling on the same test set with the same recipe, beside what a user would try instead."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from .aggregation import AGGREGATORS, Aggregator, aggregate
from .config import CoSupervisedConfig
from .levels import LevelPlan
from .metrics import accuracy, mean_and_spread, performance_gap_recovered, without_nan
from .pool import PseudolabelPool
from .teachers import Teacher, TeacherHierarchy
from .trainer import RUN_DIR, CoSupervisedTrainer

logger = logging.getLogger(__name__)

METHODS = ("generalist", "ensemble", "csl", "ceiling")
# All teachers into one pseudolabel, with no hierarchy.
AGGREGATED_METHODS = tuple(name for name in AGGREGATORS if name != "mean_probs")  # which is `ensemble`
# Co-supervision with another assignment: upper bounds, and chance.
ASSIGNED_METHODS = ("oracle_scope", "oracle_domain", "oracle_loss", "random")
OTHER_METHODS = (*AGGREGATED_METHODS, "generalist_rejection", *ASSIGNED_METHODS)


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


def method_pool(pool: PseudolabelPool, method: str) -> PseudolabelPool:
    """Give the pool on which a method trains the student.

    Args:
        pool (`PseudolabelPool`):
            All teachers; for `ceiling` and `oracle_…` with `oracle_label`.
        method (`str`):
            `generalist` keeps the root only, and `generalist_rejection` repeats it at every level; `ensemble` puts all
            teachers at the root; a name of [`AGGREGATORS`] makes one pseudolabel of them; `ceiling` has the ground
            truth as its one teacher; `csl`, `oracle_…` and `random` keep the pool as it is.

    Returns:
        `PseudolabelPool`

    Raises:
        ValueError: If the method is not known, or needs ground truth that is not there.
    """
    hierarchy = pool.hierarchy
    if method == "generalist":
        return pool.with_hierarchy(TeacherHierarchy(hierarchy.labels, hierarchy.levels[0]))
    if method == "ensemble":
        return pool.with_hierarchy(
            TeacherHierarchy(hierarchy.labels, [replace(t, level=0) for t in hierarchy.teachers])
        )
    if method == "generalist_rejection":
        return _repeat_root(pool)
    if method in AGGREGATED_METHODS:
        return aggregated_pool(pool, method)
    if method == "ceiling":
        return _single_teacher_pool(
            pool, "ground-truth", np.eye(hierarchy.num_labels, dtype=np.float32)[_oracle_labels(pool)]
        )
    if method == "csl" or method in ASSIGNED_METHODS:
        return pool
    raise ValueError(f"`method` must be one of {[*METHODS, *OTHER_METHODS]}, got {method!r}.")


def aggregated_pool(pool: PseudolabelPool, method: str | Aggregator, name: str | None = None) -> PseudolabelPool:
    """Make one pseudolabel per example of all teachers, whatever their levels.

    Args:
        pool (`PseudolabelPool`):
            All teachers.
        method (`str` or `Callable`):
            A name of [`AGGREGATORS`], or a function of your own from `teacher_probs` `(num_examples, num_teachers,
            num_labels)` and `answered` `(num_examples, num_teachers)` to probabilities `(num_examples, num_labels)`.
        name (`str`, *optional*):
            What the one teacher is called. Defaults to the method's name.

    Returns:
        `PseudolabelPool`: of one teacher; what nobody answered stays missing.

    Raises:
        ImportError: If the method needs a package that is not installed.
        ValueError: If the method is not known, or what it gives is not a pseudolabel per example.
    """
    title = name or str(method if isinstance(method, str) else getattr(method, "__name__", "aggregated"))
    teacher_probs, answered = pool.decode_level(range(len(pool.hierarchy.teachers)), slice(None))
    return _single_teacher_pool(pool, title.replace("_", "-"), aggregate(teacher_probs, answered, method).numpy())


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


def _single_teacher_pool(pool: PseudolabelPool, name: str, probs: np.ndarray) -> PseudolabelPool:
    hierarchy = TeacherHierarchy(pool.labels, [Teacher(name, kind="column")])
    return PseudolabelPool.from_predictions(hierarchy, pool.ids, {name: probs}, inputs=pool.inputs)


def method_arguments(args: CoSupervisedConfig, method: str, num_levels: int) -> CoSupervisedConfig:
    """Give the configuration with which a method trains: the same recipe, with its own assignment.

    Where co-supervision goes on from level to level (`warm_start`), the methods of one level get as many steps as all
    its levels together.

    Args:
        args (`CoSupervisedConfig`):
            The configuration of co-supervision.
        method (`str`):
            See [`method_pool`].
        num_levels (`int`):
            Levels of the full hierarchy.

    Returns:
        `CoSupervisedConfig`
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
        resume (`bool`, *optional*, defaults to `False`):
            Go on after the last finished level of each method, where an earlier run of the same recipe was cut off.
        on_trained (`Callable`, *optional*):
            Called with the name of each method and its trainer.

    Returns:
        `tuple[dict[str, Any], CoSupervisedTrainer]`: `weak_accuracy`, `methods` (accuracy and PGR) and `levels` (of
        co-supervision), all accuracies 0 to 1; and the trainer of co-supervision, with the final student.

    Raises:
        ValueError: If `csl` or `ceiling` is left out, or a method is not known.
    """
    if missing := {"csl", "ceiling"} - set(methods):
        raise ValueError(
            f"`methods` must hold 'csl' and 'ceiling' to measure a gap, got {list(methods)} without {sorted(missing)}."
        )
    args = copy.copy(args)
    args.push_to_hub = False
    pools = {method: method_pool(pool, method) for method in methods} | dict(extra_pools or {})
    accuracies: dict[str, float] = {}
    levels: list[dict[str, Any]] = []
    main: CoSupervisedTrainer | None = None
    for method, own_pool in pools.items():
        own_args = method_arguments(args, method, pool.hierarchy.num_levels)
        copied = copy.deepcopy(student) if isinstance(student, nn.Module) else student
        trainer = CoSupervisedTrainer(copied, own_args, pool=own_pool, processing_class=processing_class)
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(without_nan(report), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
