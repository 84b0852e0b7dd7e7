"""Section `labelling`: teachers run once, against a plain loop."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from benchmarks.kinds import measure_kinds, race_to_label
from benchmarks.task import IMAGE_SIZE, Bench, Row
from hf_cosupervise import Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.teachers.kinds.loading import load_teacher


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
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )
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
    images = make_images(bench.scaled(1024, least=16))
    encoded = [cell["bytes"] for cell in images.cast_column("image", Image(decode=False))["image"]]
    folders = [save_resnet18(bench.new_folder(), labels, seed) for seed in range(5)]
    loops = []
    for folder in folders:
        model = AutoModelForImageClassification.from_pretrained(folder).eval().to(bench.device)
        loops.append((model.to(memory_format=torch.channels_last), AutoImageProcessor.from_pretrained(folder)))
    rows = [
        race_labelling(bench, images, encoded, folders[:num_teachers], loops[:num_teachers], labels)
        for num_teachers in (1, 5)
    ]
    return rows + measure_kinds(bench, images)


def race_labelling(
    bench: Bench,
    images: Dataset,
    encoded: Sequence[bytes],
    folders: Sequence[str],
    loops: Sequence[tuple[nn.Module, Any]],
    labels: Sequence[str],
) -> Row:
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

    def share_alike(results: dict[str, Any]) -> float:
        pairs = zip(teachers, results["bare"])
        return float(np.mean([results["ours"].hard_labels(t.name) == probs.argmax(axis=1) for t, probs in pairs]))

    what = f"{len(images)} images of {IMAGE_SIZE} x {IMAGE_SIZE}, ResNet-18, {len(folders)} teacher(s)"
    return race_to_label(bench, what, contestants, share_alike, len(images) * len(folders))
