"""Section `finetune`: full fine-tuning, against a plain Trainer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from benchmarks.labelling import make_images
from benchmarks.task import IMAGE_SIZE, Bench, Row, Target, column, make_config
from hf_cosupervise import CoSupervisedTrainer, PseudolabelPool, Teacher, TeacherHierarchy


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
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=IMAGE_SIZE,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )
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
            f"ViT 6 x 192, {IMAGE_SIZE} x {IMAGE_SIZE}, batch 32, one step",
            column(seconds, "ours"),
            column(seconds, "plain"),
            "ours / other",
            Target(high=1.03),
            note=f"median of {num_steps - skip} steps with their data; soft pseudolabels against hard labels",
        )
    ]


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
        output_dir=str(bench.new_folder()),
        use_cpu=bench.device.type == "cpu",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        weight_decay=0.0,
        dataloader_pin_memory=bench.device.type == "cuda",
        **settings,
    )
    trainer = Trainer(student, args, data_collator=collate, train_dataset=dataset, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    return trainer.train
