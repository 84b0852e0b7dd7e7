"""Teachers that are pipelines of transformers, as objects."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from ...data.inputs import InputProcessor, check_text, to_pil
from ...hierarchy import Teacher
from .base import (
    Kind,
    Preparation,
    TeacherSource,
    add_up,
    check_template,
    head_labels,
    label_positions,
    label_texts,
    read_options,
)

_OPTIONS = {"template": None}
_CLASSIFIERS, _ZERO_SHOT = (
    ("text-classification", "image-classification"),
    ("zero-shot-classification", "zero-shot-image-classification"),
)


class PipelineTeacher:
    """A pipeline that classifies, with its own tokenizer or image processor, on its own device."""

    column: str | None = None

    def __init__(self, source: TeacherSource, labels: Sequence[str]) -> None:
        teacher, self.pipeline = source.teacher, _check_pipeline(source.teacher)
        task, config = self.pipeline.task, self.pipeline.model.config
        options = read_options(teacher, "pipeline", _OPTIONS)
        is_text = "image" not in task
        if task in _ZERO_SHOT:
            texts = label_texts(teacher, labels)
            if several := [label for label, some in texts.items() if len(some) > 1]:
                raise ValueError(
                    f"Teacher '{source.name}' asks its pipeline of one text for each label, got several for "
                    f"{several[0]!r}. Write one, or give the model itself by `kind='zero_shot'`."
                )
            # It answers by the texts that it is told, whose labels are known here.
            self.own_labels, own_names = [some[0] for some in texts.values()], list(texts)
            self.settings: dict[str, Any] = {"candidate_labels": self.own_labels}
            if options["template"] is not None:
                check_template(teacher, options["template"])
                self.settings["hypothesis_template"] = options["template"]
        else:
            if options["template"] is not None or teacher.label_texts is not None:
                raise ValueError(
                    f"Teacher '{source.name}' must be a zero-shot pipeline to be told `label_texts` or a `template`, "
                    f"got one of '{task}'. Leave them out."
                )
            self.own_labels = own_names = head_labels(teacher, config)
            # All labels, and by softmax: a model's configuration may ask its pipeline for something else.
            self.settings = {"top_k": len(own_names), "function_to_apply": "softmax"}
            if is_text:
                processor = InputProcessor(self.pipeline.tokenizer, config, f"Teacher '{source.name}'")
                # A pipeline leaves texts as long as they are, and a model fails on what it has no positions for.
                self.settings |= {"truncation": True, "max_length": processor.max_length}
        self.positions, self.num_labels = label_positions(teacher, own_names, labels), len(labels)
        self.prepare = Preparation(source.name, is_text, _read_texts if is_text else _read_images)
        self.facts = {
            "kind": "pipeline",
            "revision": None,
            "commit": None,
            **_identity(self.pipeline),
            "class": type(self.pipeline.model).__name__,
            "preprocessing": None,
            **source.asked(),
        }

    def __call__(self, inputs: Sequence[Any]) -> np.ndarray:
        # Pipelines read by a loader that draws a number, and labelling must not move anybody's random state.
        with torch.random.fork_rng(devices=[]):
            answers = self.pipeline(list(inputs), batch_size=len(inputs), **self.settings)
        probs = np.array([self._in_order(answer) for answer in answers], dtype=np.float32)
        # Some zero-shot pipelines judge each label by itself.
        return add_up(probs / probs.sum(axis=1, keepdims=True), self.positions, self.num_labels)

    def _in_order(self, answer: Any) -> list[float]:
        if isinstance(answer, dict):
            scores = dict(zip(answer["labels"], answer["scores"], strict=True))
        else:
            scores = {item["label"]: item["score"] for item in answer}
        return [scores[label] for label in self.own_labels]


def _check_pipeline(teacher: Teacher) -> Any:
    pipeline = teacher.function
    # So it is where the hierarchy was read from a file.
    if pipeline is None:
        raise ValueError(
            f"Teacher '{teacher.name}' must be given its pipeline, which no file and no pickle holds, got its name "
            f"'{teacher.model}' only. Pass it by `models={{'{teacher.name}': …}}`."
        )
    if not isinstance(pipeline, Pipeline) or pipeline.task not in (*_CLASSIFIERS, *_ZERO_SHOT):
        found = f"one of '{getattr(pipeline, 'task', None)}'"
        raise ValueError(
            f"Teacher '{teacher.name}' must be a pipeline of transformers that classifies, for one of "
            f"{[*_CLASSIFIERS, *_ZERO_SHOT]}, got {found}. Use such a one, or write a function that calls it."
        )
    return pipeline


def _identity(pipeline: Any) -> dict[str, Any]:
    """What tells its answers from those of others: its task and its weights."""
    digest = hashlib.blake2b(digest_size=8)
    # By its weights: an object may have been trained after it was loaded.
    for name, weights in sorted(pipeline.model.state_dict().items()):
        digest.update(f"{name} {tuple(weights.shape)} {weights.dtype} ".encode())
        digest.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"task": pipeline.task, "weights": digest.hexdigest()}


def _read_texts(cells: Sequence[Any]) -> list[str]:
    for cell in cells:
        check_text(cell)
    return list(cells)


def _read_images(cells: Sequence[Any]) -> list[Any]:
    return [to_pil(cell, "RGB") for cell in cells]


def _identify(source: TeacherSource) -> tuple[dict[str, Any], int]:
    # Without the object nothing is known: answers that a pool holds already are as they are.
    return ({}, 0) if source.teacher.function is None else (_identity(_check_pipeline(source.teacher)), 0)


KIND = Kind(
    load=lambda source, labels, device: PipelineTeacher(source, labels),
    identify=_identify,
    options=_OPTIONS,
    reads_label_texts=True,
)
