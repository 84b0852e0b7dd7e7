"""The one engine of comparisons: a student is trained by every method, measured, and what is finished is kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from ..pool.derived import FEATURE_AGGREGATORS
from ..pool.pseudolabels import PseudolabelPool
from ..training.config import CoSupervisedConfig
from ..training.plan import LevelPlan
from ..training.self_training import without_idle_rounds
from ..training.trainer import CoSupervisedTrainer
from .methods import METHODS, method_arguments, method_loss, method_pool
from .report import ResultFolder, add_pgr, say_metric


@dataclass(frozen=True)
class Contestant:
    """One method with its own configuration, and what it trains on: None where that takes the student's features."""

    name: str
    method: str
    args: CoSupervisedConfig
    teachers: PseudolabelPool
    pool: PseudolabelPool | None

    @classmethod
    def enter(
        cls,
        name: str,
        method: str,
        args: CoSupervisedConfig,
        teachers: PseudolabelPool,
        labelled_pool: PseudolabelPool | None = None,
    ) -> Contestant:
        """Make a method's configuration and pool of those of all, and refuse it now where it cannot run."""
        own = method_arguments(args, method, teachers.hierarchy.num_levels)
        if method not in FEATURE_AGGREGATORS:
            pool = method_pool(teachers, method, labelled_pool=labelled_pool)
            # Of a method asked for by name, self-training is refused where it is idle; of others it is left out.
            return cls(name, method, own if method == "csl" else without_idle_rounds(own, pool), teachers, pool)
        if args.student_training != "probe":
            raise ValueError(
                f"{[method]} need a student with a linear head on a frozen backbone, got `student_training` "
                f"{args.student_training!r}. Use 'probe', or leave them out."
            )
        return cls(name, method, own, teachers, None)


class Comparison:
    """Run contestants one by one: train, measure, keep; what a folder of results has already is read instead."""

    def __init__(
        self,
        student: str | PreTrainedModel,
        test_dataset: Dataset,
        *,
        processing_class: Any = None,
        results: ResultFolder | None = None,
        on_trained: Callable[[str, CoSupervisedTrainer], None] = lambda name, trainer: None,
    ) -> None:
        self.student, self.test_dataset, self.processing_class = student, test_dataset, processing_class
        self.results, self.on_trained = results, on_trained

    def run(self, contestant: Contestant, *, resume: bool = False) -> dict[str, Any]:
        """Give the numbers of a contestant, with the seconds that its pool and training took."""
        if self.results is not None and (kept := self.results.read(contestant.name)) is not None:
            return kept
        # With what the pool takes: some methods fit a model on features for it.
        started = time.time()
        trainer = self.make_trainer(contestant)
        trainer.train(resume_from_checkpoint=resume)
        runtime = time.time() - started
        self.on_trained(contestant.name, trainer)
        numbers, arrays = self.measure(contestant, trainer)
        numbers["runtime"] = runtime
        if self.results is not None:
            self.results.save(contestant.name, numbers, **arrays)
        return numbers

    def make_trainer(self, contestant: Contestant) -> CoSupervisedTrainer:
        """Give a contestant the trainer that it is trained by."""
        pool = contestant.pool
        if pool is None:
            # The features land in the contestant's own store, where its training finds them again. Any hierarchy of
            # one level will do, and that of the ensemble has no assignment that would need a student first.
            trainer = self.new_trainer(contestant.args, method_pool(contestant.teachers, "ensemble"))
            pool = method_pool(contestant.teachers, contestant.method, features=trainer.pool_features())
        return self.new_trainer(contestant.args, pool, loss_func=method_loss(pool, contestant.method))

    def new_trainer(self, args: CoSupervisedConfig, pool: PseudolabelPool, **kwargs: Any) -> CoSupervisedTrainer:
        """Make a trainer for a student that nobody has touched."""
        # A trainer changes the model that it is given, and the next contestant must begin where this one did.
        student = copy.deepcopy(self.student) if isinstance(self.student, nn.Module) else self.student
        trainer = CoSupervisedTrainer(student, args, pool=pool, processing_class=self.processing_class, **kwargs)
        trainer.pop_callback(PrinterCallback)  # the report tells it better than a log of every method
        return trainer

    def measure(
        self, contestant: Contestant, trainer: CoSupervisedTrainer
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Give what is told of a trained student, and arrays to keep beside it."""
        if contestant.name != "csl":
            return {**trainer.student.measure(self.test_dataset)}, {}
        levels, measured = [], {}
        for plan, record in walk_levels(trainer):
            measured = trainer.student.measure(self.test_dataset)
            levels.append({**_level_facts(plan, record, trainer.pool.source_names), **measured})
        # Self-training is no level of teachers, and has no round where a seed left nothing out.
        return {**measured, "levels": levels[: trainer.pool.hierarchy.num_levels]}, {}


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
    args.push_to_hub = False  # one push at the end, by whoever asked for the comparison
    # All are entered before the first one trains, so that hours of training never end at a method that is refused.
    contestants = {method: Contestant.enter(method, method, args, pool, labelled_pool) for method in methods}
    for name, own in (extra_pools or {}).items():
        own_args = method_arguments(args, name, pool.hierarchy.num_levels)
        contestants[name] = Contestant(name, name, own_args, own, own)
    main: list[CoSupervisedTrainer] = []

    def hold(name: str, trainer: CoSupervisedTrainer) -> None:
        if name == "csl":  # the others may go: each holds a whole student
            main.append(trainer)
        on_trained(name, trainer)

    comparison = Comparison(student, test_dataset, processing_class=processing_class, on_trained=hold)
    found = {name: comparison.run(contestant, resume=resume) for name, contestant in contestants.items()}
    metric = args.metric
    report = {
        f"weak_{metric}": weak,
        "methods": {name: {key: numbers[key] for key in ("accuracy", metric)} for name, numbers in found.items()},
        "levels": found["csl"]["levels"],
        **say_metric(metric),
    }
    add_pgr(weak, found["ceiling"][metric], [*report["methods"].values(), *report["levels"]], metric)
    return report, main[0]


def walk_levels(trainer: CoSupervisedTrainer) -> Iterator[tuple[LevelPlan, dict[str, Any]]]:
    """Put the student of each level into the trainer, with its plan and record; the last one stays there."""
    for plan in trainer.plans:
        trainer.load_level(plan.level)
        # A level of several rounds has a record for each of them, and the student of the last.
        yield plan, [record for record in trainer.history.records if record["level"] == plan.level][-1]


def _level_facts(plan: LevelPlan, record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    shares = {name: record[f"assignment/{name}"] for name in names if f"assignment/{name}" in record}
    facts = {"level": plan.level, "keep_rate": plan.keep_rate, "teachers": shares}
    return facts | {
        key.replace("/", "_"): value
        for key, value in record.items()
        if key in ("assignment/agreement", "consistency/top_k_agreement") or key.startswith("oracle_")
    }
