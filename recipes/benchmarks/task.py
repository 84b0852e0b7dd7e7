"""What the sections share: rows and targets, a task out of a seed, and a student whose features are given."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import disable_progress_bars as disable_datasets_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, PrinterCallback
from transformers.utils import logging as transformers_logging

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, Teacher, TeacherHierarchy

RECIPES = Path(__file__).resolve().parents[1]
NUM_PROTOTYPES = 512
IMAGE_SIZE = 64
SECTIONS = (
    "head",
    "head_1000",
    "labelling",
    "answers",
    "finetune",
    "gather",
    "growth",
    "scale",
    "imports",
    "truncation",
)


@dataclass
class BenchmarkArguments:
    """Say what is measured, and how often."""

    sections: list[str] = field(
        default_factory=lambda: [name for name in SECTIONS if name != "scale"],
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
        features[train].clone(),
        predictions,
        hierarchy,
        features[size.num_examples :].clone(),
        labels[size.num_examples :],
    )


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
        vocab_size=2,
        hidden_size=feature_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=8,
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config), tokenizer


def make_config(bench: Bench, **settings: Any) -> CoSupervisedConfig:
    """Configure a run that trains, and tells nobody about it."""
    defaults = {
        "output_dir": str(bench.new_folder()),
        "use_cpu": bench.device.type == "cpu",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "weight_decay": 0.0,
    }
    return CoSupervisedConfig(**defaults | settings)


def make_trainer(
    bench: Bench,
    pool: PseudolabelPool,
    feature_batches: Callable[[], Iterator[np.ndarray]],
    feature_size: int,
    features_dir: Path,
    **settings: Any,
) -> CoSupervisedTrainer:
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


def column(records: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Give one contestant's numbers of all repeats."""
    return [record[name] for record in records]


def quieten(threads: int) -> None:
    """Set the number of threads, and keep the libraries from reporting every small model."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_datasets_progress_bars()
