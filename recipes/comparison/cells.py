"""Cells of the comparison: each is trained once, measured and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from task import check_run, find_student, label_data, load_split, make_folder, say
from train_teachers import CONTROL, control_hierarchy, is_on_hub, train_teachers
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from comparison.plan import (
    ALL_LABELS,
    CEILING,
    MEAN_POOLED,
    TEACHERS,
    Method,
    Task,
    cell_settings,
    features_setting,
    resolve,
    settings_of,
)
from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, TeacherHierarchy
from hf_cosupervise.data.columns import find_label_column, read_labels
from hf_cosupervise.evaluation.methods import (
    method_arguments,
    method_loss,
    method_pool,
    teacher_accuracies,
    weak_accuracy,
)
from hf_cosupervise.evaluation.report import save_report
from hf_cosupervise.method.metrics import agreement, expected_calibration_error, group_accuracies, reliability_curve
from hf_cosupervise.pool.derived import FEATURE_AGGREGATORS, calibrated_pool
from hf_cosupervise.pool.pseudolabels import ORACLE_DOMAIN

_LEVEL_NUMBERS = {
    "consistency/keep_rate": "keep_rate",
    "oracle_selection/precision": "kept_precision",
    "oracle_selection/recall": "kept_recall",
    "oracle_pseudolabels/accuracy": "pseudolabel_accuracy",
    "oracle_assignment/accuracy": "assignment_accuracy",
}


# ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Group:
    """The cells of one task and seed, which share teachers, pools and features."""

    task: Task
    methods: list[Method]
    seed: int
    output_dir: str

    @property
    def folder(self) -> Path:
        """Teachers, pools and the rest that the task's cells share, laid out as by train.py."""
        return Path(self.output_dir) / "tasks" / self.task.name

    @property
    def run_dir(self) -> Path:
        """What this seed's cells share."""
        return self.folder / "_run" / f"seed-{self.seed}"

    def cell(self, name: str, suffix: str = ".json") -> Path:
        """The file of a cell; its error, and its predictions on the test set, lie beside it."""
        return self.folder / "cells" / f"seed-{self.seed}" / f"{name}{suffix}"

    def read(self, name: str) -> dict[str, Any] | None:
        """A finished cell, None where there is none."""
        path = self.cell(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def predictions(self, name: str) -> dict[str, np.ndarray] | None:
        """What a cell predicts on the test set, None where that was not kept."""
        path = self.cell(name, ".npz")
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def unfinished(self) -> list[Method]:
        """The methods that are still to be run."""
        return [method for method in self.methods if not self.cell(method.name).is_file()]

    def fail(self, names: Sequence[str], error: str) -> None:
        """Keep an error for the end."""
        for name in names:
            path = self.cell(name, ".error.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(error, encoding="utf-8")


class Bench:
    """Hold what all methods of one task and seed are trained and measured on."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.data_args, teacher_args, student_args, *_ = resolve(group.task)
        self.split = load_split(self.data_args, group.seed)
        self.student = find_student(student_args, self.split, group.run_dir / "student-start", group.seed)
        self.teachers_dir = Path(teacher_args.teachers_dir or group.run_dir / "teachers")
        domain = self.data_args.oracle_domain_column
        self.hierarchy = train_teachers(
            self.split.teachers,
            self.split.labels,
            teacher_args,
            self.teachers_dir,
            group.seed,
            domain if teacher_args.specialize_by == "domain" else None,
        )
        self.pool = self._label(self.split.pool, "pool", self.hierarchy)
        self.test_pool = self._label(self.split.test, "test_pool", self.hierarchy)
        test, labels = self.split.test, self.split.labels
        self.test_labels = read_labels(test, find_label_column(test), labels)
        self.test_groups = {"class": [labels[index] for index in self.test_labels]}
        self.pool_groups = {"class": [labels[index] for index in self.pool.oracle_labels]}
        if domain is not None:
            self.test_groups["domain"] = [str(value) for value in test[domain]]
            self.pool_groups["domain"] = [str(value) for value in self.pool.column(ORACLE_DOMAIN)]

    def _label(self, data: Dataset, name: str, hierarchy: TeacherHierarchy) -> PseudolabelPool:
        commit = self.split.commit if name == "pool" else None
        return label_data(data, hierarchy, self.group.run_dir / name, self.data_args, True, commit)

    @cached_property
    def control_pool(self) -> PseudolabelPool:
        """What one teacher says that saw every label."""
        if not (self.teachers_dir / CONTROL).is_dir():
            raise FileNotFoundError(f"No teacher with all labels at '{self.teachers_dir / CONTROL}'. Leave it out.")
        return self._label(self.split.pool, "control_pool", control_hierarchy(self.hierarchy, self.teachers_dir))

    @cached_property
    def weak_probs(self) -> np.ndarray:
        """The generalist's probabilities on the test set."""
        root = self.hierarchy.level_indices(0)
        rows = np.arange(len(self.test_pool))
        source = root[0] if len(root) == 1 else len(self.hierarchy.teachers)
        return self.test_pool.pseudolabels(np.full(len(rows), source), rows)

    def heldout_pool(self, name: str, hierarchy: TeacherHierarchy) -> PseudolabelPool:
        """What teachers say about labelled examples that nobody else sees."""
        if not len(self.split.heldout):
            raise ValueError(
                f"Task '{self.group.task.name}' has no labelled examples to spare, got `num_heldout_examples` 0. Set "
                "it in the task, or leave this method out."
            )
        return self._label(self.split.heldout, name, hierarchy)

    def make_trainer(self, method: Method, output_dir: Path) -> CoSupervisedTrainer:
        """Give the trainer of a method."""
        *_, recipe_args, args = resolve(self.group.task, method)
        args.seed = args.data_seed = self.group.seed
        args.output_dir, args.push_to_hub, args.disable_tqdm = str(output_dir), False, True
        if self.group.task.features is not None:
            args.features_dir = str(self.group.run_dir / f"features-{self.group.task.features}")
        args.features_dir = args.features_dir or str(self.group.folder / "_run" / "features")
        has_control = method.method == ALL_LABELS
        pool = self.control_pool if has_control else self.pool
        if method.calibrated or recipe_args.calibrate_teachers:
            name = "control_heldout_pool" if has_control else "heldout_pool"
            pool = calibrated_pool(pool, self.heldout_pool(name, pool.hierarchy))
        own_args = method_arguments(args, "generalist" if has_control else method.method, self.hierarchy.num_levels)
        if has_control:
            return self._trainer(own_args, pool)
        needs: dict[str, Any] = {}
        if method.method in FEATURE_AGGREGATORS:
            needs["features"] = self._trainer(own_args, pool).pool_features()
        if method.method == "boosting":
            needs["labelled_pool"] = self.heldout_pool("heldout_pool", self.hierarchy)
        own_pool = method_pool(pool, method.method, **needs)
        return self._trainer(own_args, own_pool, loss_func=method_loss(own_pool, method.method))

    def _trainer(self, args: CoSupervisedConfig, pool: PseudolabelPool, **kwargs: Any) -> CoSupervisedTrainer:
        trainer = CoSupervisedTrainer(self.student, args, pool=pool, **kwargs)
        trainer.pop_callback(PrinterCallback)
        if self.group.task.features == MEAN_POOLED:
            write_mean_pooled(trainer, [self.split.pool, self.split.test])
        return trainer


def write_mean_pooled(trainer: CoSupervisedTrainer, datasets: Sequence[Dataset]) -> None:
    """Write the mean over each text's tokens in place of what the head reads, once and whole."""
    store, column = trainer.feature_store, trainer.input_column
    if any(store.folder.glob("shard-*")):
        return
    data = concatenate_datasets([dataset.select_columns([column]) for dataset in datasets])
    data = data.select(np.argsort([len(text) for text in data[column]], kind="stable"))  # alike ones need no padding

    def batches(size: int = 64) -> Iterator[np.ndarray]:
        for start in range(0, len(data), size):
            inputs = {
                name: value.to(trainer.args.device)
                for name, value in trainer.processor(data[start : start + size][column]).items()
            }
            with torch.no_grad():
                states = store.model.base_model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None]
            yield ((states * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()

    store.write(data, column, batches())


def run_group(group: Group) -> None:
    """Run what is missing of a group; an error is kept and stops its own cell only."""
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    todo = group.unfinished()
    try:
        bench = Bench(group)
        save_cell(group, TEACHERS, measure_teachers(bench), probs=bench.weak_probs, labels=bench.test_labels)
    except Exception:  # whatever it is, the other cells go on, and the end of the run tells it
        group.fail([method.name for method in todo], traceback.format_exc())
        return
    for method in todo:
        try:
            numbers = run_cell(bench, method)
            say(f"{group.task.name}, seed {group.seed}: {method.name} {100 * numbers['accuracy']:.1f} %")
        except Exception:
            group.fail([method.name], traceback.format_exc())


def run_cell(bench: Bench, method: Method) -> dict[str, Any]:
    """Train and measure one method, and keep the cell."""
    group, work = bench.group, bench.group.run_dir / "work" / method.name
    shutil.rmtree(work, ignore_errors=True)  # of a run that was cut off
    started = time.time()
    trainer = bench.make_trainer(method, work)
    trainer.train()
    runtime = time.time() - started
    numbers, probs = measure(trainer, bench)
    content = {"settings": cell_settings(group.task, method), **numbers, "runtime": runtime}
    kept = {"probs": probs} if method.method == CEILING else {}
    save_cell(group, method.name, content, predicted=probs.argmax(axis=1).astype(np.int32), **kept)
    shutil.rmtree(work, ignore_errors=True)
    return numbers


def save_cell(group: Group, name: str, content: dict[str, Any], **predictions: np.ndarray) -> None:
    """Write a cell, whole or not at all, and before it what it predicts on the test set."""
    group.cell(name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(group.cell(name, ".npz"), **predictions)
    save_report({"task": group.task.name, "method": name, "seed": group.seed, **content}, group.cell(name))
    group.cell(name, ".error.txt").unlink(missing_ok=True)


def run_side_by_side(groups: Sequence[Group], num_workers: int) -> None:
    """Run every group in a process of its own, some at a time, so that one that dies takes no other with it."""
    if num_workers == 0:
        for group in groups:
            run_group(group)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context, waiting = multiprocessing.get_context("spawn"), list(groups)
    running: dict[int, tuple[Any, Group]] = {}
    while waiting or running:
        while waiting and len(running) < num_workers:
            process = context.Process(target=run_group, args=(waiting[0],))
            process.start()
            running[process.sentinel] = process, waiting.pop(0)
        for sentinel in connection.wait(list(running)):
            process, group = running.pop(sentinel)
            process.join()
            if process.exitcode:
                left = [method.name for method in group.unfinished()]
                group.fail(left, f"The process ended with exit code {process.exitcode}: was there enough memory?\n")


def check_cells(groups: Sequence[Group]) -> None:
    """Refuse cells of other settings before anything runs, and write down what each task is made of."""
    settings: dict[tuple[str, str], dict[str, Any]] = {}  # the same for all seeds
    for group in groups:
        for method in group.methods:
            key = group.task.name, method.name
            wanted = settings[key] = settings.get(key) or cell_settings(group.task, method)
            found = group.read(method.name)
            known = wanted if found is None else found["settings"]
            if different := sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name)):
                changes = ", ".join(f"{name}: {known.get(name)!r} -> {wanted.get(name)!r}" for name in different)
                raise FileExistsError(
                    f"'{group.cell(method.name)}' must be a cell of these settings, got another one ({changes}; a "
                    "field that is missing has its default). Choose another name or `output_dir`, or delete the cell."
                )
    for group in groups:
        check_run(group.folder, features_setting(group.task) | settings_of(resolve(group.task)[:3]))


def prepare(group: Group) -> bool:
    """Make the folders of data and student that all seeds share, before processes do it side by side."""
    data_args, teacher_args, student_args, _, _ = resolve(group.task)
    place = teacher_args.teachers_dir
    try:
        if place and not is_on_hub(teacher_args) and not Path(place, "hierarchy.yaml").is_file():
            raise ValueError(
                f"`teachers_dir` must hold teachers, got none in '{place}'. Leave it out: each seed trains its own."
            )
        make_folder("prepare", data_args.prepare_dataset, data_args.dataset)
        if student_args.student is not None:
            make_folder("prepare", student_args.prepare_student, student_args.student)
    except Exception:
        group.fail([method.name for method in group.unfinished()], traceback.format_exc())
        return False
    return True


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def measure_teachers(bench: Bench) -> dict[str, Any]:
    """Measure the teachers on the test set; calibration is of what they answered."""
    pool, calibration = bench.test_pool, {}
    for name in bench.hierarchy.names:
        answered = pool.answered(name)
        calibration[name] = calibrate(pool.decode(name, np.flatnonzero(answered)), bench.test_labels[answered])
    return {
        "weak_accuracy": weak_accuracy(pool),
        "teachers": {
            name: {"accuracy": value, **calibration[name]} for name, value in teacher_accuracies(pool).items()
        },
    }


def calibrate(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Give calibration error and reliability diagram, nothing where there are no answers."""
    if not len(labels):
        return {}
    curve = {key: values.tolist() for key, values in reliability_curve(probs, labels).items()}
    return {"ece": expected_calibration_error(probs, labels), "reliability": curve}


def predict_probs(trainer: CoSupervisedTrainer, data: Dataset) -> np.ndarray:
    """Give the student's probabilities `(num_examples, num_labels)`."""
    return np.concatenate([log_probs.exp().numpy() for _, log_probs in trainer.predict_log_probs(data)])


def measure(trainer: CoSupervisedTrainer, bench: Bench) -> tuple[dict[str, Any], np.ndarray]:
    """Measure the student of every level on the test set, and the last one in all ways; its probabilities there."""
    labels, levels = bench.test_labels, {}
    for plan in trainer.plans:
        trainer.load_level(plan.level)
        probs = predict_probs(trainer, bench.split.test)
        record = [record for record in trainer.history.records if record["level"] == plan.level][-1]
        levels[str(plan.level)] = {
            "accuracy": float((probs.argmax(axis=1) == labels).mean()),
            **{name: record[key] for key, name in _LEVEL_NUMBERS.items() if key in record},
            **share_out(plan.assigned_teacher, trainer.pool.source_names, bench.pool_groups),
        }
    predicted, taught = probs.argmax(axis=1), plan.labels >= 0
    numbers = {
        "accuracy": float((predicted == labels).mean()),
        **calibrate(probs, labels),
        "agreement_pseudolabels": agreement(trainer.predict_labels(trainer.pool.inputs)[taught], plan.labels[taught]),
        "levels": levels,
    }
    for what, groups in bench.test_groups.items():
        accuracies = group_accuracies(predicted, labels, groups)
        numbers |= {f"worst_{what}_accuracy": min(accuracies.values()), f"{what}_accuracy": accuracies}
    return numbers, probs


def share_out(assigned: np.ndarray, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Give the share of each teacher, and its share of each class and domain; who is given nothing is left out."""
    used = {name: assigned == index for index, name in enumerate(names) if (assigned == index).any()}
    shares: dict[str, Any] = {"teachers": {name: float(own.mean()) for name, own in used.items()}}
    for what, values in groups.items():
        rows = {value: np.asarray(values) == value for value in sorted(set(values))}
        shares[f"teachers_by_{what}"] = {
            value: {name: float(own[here].mean()) for name, own in used.items()} for value, here in rows.items()
        }
    return shares
