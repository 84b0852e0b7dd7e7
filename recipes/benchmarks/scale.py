"""Sections `gather`, `growth` and `scale`: time and memory as the pool grows."""

from __future__ import annotations

import dataclasses
import gc
import math
import multiprocessing
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, load_from_disk

from benchmarks.task import (
    NUM_PROTOTYPES,
    Bench,
    BenchmarkArguments,
    Row,
    Target,
    column,
    make_hierarchy,
    make_trainer,
    quieten,
)
from hf_cosupervise import PseudolabelPool, build_pool
from hf_cosupervise.pool.files import teacher_dataset
from hf_cosupervise.pool.top_k import encode_top_k

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
            f"{num_examples} x 15 teachers, k = 16, random batches of 256",
            ours,
            other,
            "ours",
            Target(low=1e6),
            unit="rows/s",
            note="against `Array2D((15, 16))` of the same labels, torch format, mapped from disk",
            numbers={"ours_by_arrays": statistics.median(ours) / statistics.median(other), "same_labels": float(same)},
        )
    ]


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
        context.set_forkserver_preload(["hf_cosupervise.training.trainer", "hf_cosupervise.teachers.labeling"])
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
            dataset,
            hierarchy,
            models=loaded,
            pool_k=size.pool_k,
            batch_size=1024,
            output_dir=work / "pool",
            disable_tqdm=True,
        ),
    )
    trainer = meter.run(
        "features",
        lambda: make_trainer(
            bench,
            pool,
            lambda: synthetic_features(size.num_examples, size.feature_size),
            size.feature_size,
            work / "features",
            max_steps=size.steps,
            learning_rate=1e-2,
            features_dtype=size.features_dtype,
        ),
    )
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
        "seconds": meter.seconds,
        "memory": meter.memory,
        "before": meter.before,
        "keep_rates": keep_rates,
        "pool_gb": sum(path.stat().st_size for path in files) / 1e9,
    }
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
                f"{name} doubled: {phase}",
                [run["seconds"][phase] for run in doubled],
                [run["seconds"][phase] for run in base],
                "ours / other",
                None if is_free_of_n else target,
                note=note,
            )
        )
        if name == "N" and all(run["memory"] for run in (*doubled, *base)):
            # Of the first repeat: later ones find the memory of the one before still at hand.
            growth = [run[0]["memory"][phase] - run[0]["before"][phase] for run in (doubled, base)]
            rows.append(
                Row(
                    f"N doubled: peak anonymous memory, {phase}",
                    [doubled[0]["memory"][phase]],
                    [base[0]["memory"][phase]],
                    "ours / other",
                    Target(high=1.1),
                    unit="GB",
                    note="of the whole process, libraries too",
                    numbers={"bytes_per_more_row": (growth[0] - growth[1]) * 1e9 / size.num_examples},
                )
            )
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
