"""Weak, student and ceiling on the same test set with the same recipe, beside what a user would try instead."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from ..method.metrics import performance_gap_recovered
from ..pool.derived import FEATURE_AGGREGATORS
from ..pool.pseudolabels import PseudolabelPool
from ..training.config import CoSupervisedConfig
from ..training.plan import LevelPlan
from ..training.trainer import CoSupervisedTrainer
from .methods import METHODS, method_arguments, method_loss, method_pool

logger = logging.getLogger(__name__)


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
    """Train the student by several methods with one recipe and measure all of them on one test set."""
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
            _copy_model(student),
            arguments[method],
            pool=own_pool,
            processing_class=processing_class,
            loss_func=method_loss(pool, method),
        )
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
        for method in methods
        if method not in on_features
    }
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
        key.replace("/", "_"): value
        for key, value in records[-1].items()
        if key in ("assignment/agreement", "consistency/top_k_agreement") or key.startswith("oracle_")
    }
