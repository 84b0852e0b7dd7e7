"""Teachers that are an encoder and a direction for each label: that of its examples, or of its texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from ...data.columns import shorten
from ...data.inputs import InputProcessor, RowError, to_pil
from ...hierarchy import Teacher
from ...models.classifier import load_processor, load_whole, read_config
from ...models.pooling import pool_tokens
from .base import (
    Kind,
    Preparation,
    TeacherModel,
    TeacherSource,
    add_up,
    choose_device,
    directions,
    for_inference,
    label_positions,
    label_texts,
    read_options,
    try_out,
    whole_precision,
)
from .loading import find_source

# Cosines lie close together; sentence encoders are trained on 20 times them.
_OPTIONS: dict[str, Any] = {"examples": None, "temperature": 0.05, "pooling": "mean"}
_POOLINGS = ("mean", "cls", "pooler")
_BATCH = 64


def prototype_teacher(
    teacher: Teacher,
    labels: Sequence[str],
    examples: Mapping[str, Sequence[Any]],
    device: str | torch.device | None = None,
) -> TeacherModel:
    """Make a teacher of an encoder and examples that no file holds, such as images; to be given as one of `models`.

    An input gets the label of the nearest class: each class is the mean direction of its examples, and probabilities
    are the softmax of the cosines to them, divided by the option `temperature`. For texts the examples may stand in
    the hierarchy as well: `Teacher(…, kind="prototypes", options={"examples": {label: [text, …]}})`.

    Args:
        teacher (`Teacher`):
            The encoder, of `kind="prototypes"`: a model of transformers for images or texts. `options` may have
            `temperature` (`float`, 0.05 by default) and `pooling`: `"mean"` over tokens or places, the default,
            `"cls"`, the first token, or `"pooler"`, the model's own. CLIP and its kin give features of their own.
        labels (`Sequence[str]`):
            The task's labels.
        examples (`Mapping[str, Sequence[Any]]`):
            At least one example for each label of its scope: PIL images, arrays of 8-bit pixels, or texts.
        device (`str` or `torch.device`, *optional*):
            Where the encoder runs. Defaults to the first GPU if there is one.

    Returns:
        `TeacherModel`

    Raises:
        ValueError: If a label has no example, an option is not usable, or the model is no encoder.

    Source:
        Prototypical networks (Snell et al., 2017), by cosines.

    Examples:
        >>> teacher = Teacher("org/dino", kind="prototypes", name="dino")
        >>> models = {"dino": prototype_teacher(teacher, labels, {"cat": cats, "dog": dogs})}  # doctest: +SKIP
        >>> pool = build_pool(data, TeacherHierarchy(labels, [teacher]), models=models)  # doctest: +SKIP
    """
    return PrototypeTeacher(find_source(teacher)[0], tuple(labels), choose_device(device), examples)


class PrototypeTeacher:
    """An encoder and a direction for each label; the nearer, the more probable."""

    column: str | None = None

    def __init__(
        self,
        source: TeacherSource,
        labels: Sequence[str],
        device: torch.device,
        examples: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        teacher, name = source.teacher, source.name
        options = read_options(teacher, "prototypes", _OPTIONS)
        self.temperature, self.pooling = _check_options(name, options)
        model_source = source.model_source
        config = read_config(model_source)
        is_image = config.model_type in IMAGE_PROCESSOR_MAPPING_NAMES
        if model_source.is_adapter or getattr(config, "is_encoder_decoder", False):
            found = "an adapter" if model_source.is_adapter else f"a model of two parts, '{config.model_type}'"
            raise ValueError(f"Teacher '{name}' of kind 'prototypes' must be one encoder, got {found}. Use another.")
        classes = _find_examples(teacher, labels, examples, options["examples"], is_image)
        folder = model_source.fetch()
        # Not every encoder keeps its pooler, and most are used without.
        spare = "" if self.pooling == "pooler" else "pooler."
        model = load_whole(model_source, AutoModel, config, spare=spare)
        processing_class = load_processor(model_source, folder, not is_image)
        # CLIP and its kin describe their images in a part of their own.
        processor = InputProcessor(processing_class, getattr(config, "vision_config", config), f"Teacher '{name}'")
        samples = processor.probe()
        self.prepare = Preparation(name, not is_image, processor)
        self.device, self.is_image = device, is_image
        self.model: Any = for_inference(model, device)
        self.positions, self.num_labels = label_positions(teacher, list(classes), labels), len(labels)
        self.prototypes = torch.stack([self._mean(label, cells, name) for label, cells in classes.items()])
        try_out(source, lambda: self(samples))
        self.facts = source.facts("prototypes", type(model).__name__, processor.fingerprint)
        # They decide the answers as the weights do.
        self.facts["examples"] = _digest(classes)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        features = self._embed(inputs)
        with whole_precision(self.device):
            cosines = features @ self.prototypes.T
        return add_up(torch.softmax(cosines / self.temperature, -1).cpu().numpy(), self.positions, self.num_labels)

    def _mean(self, label: str, cells: Sequence[Any], name: str) -> torch.Tensor:
        """The direction of a class, `(size,)`."""
        try:
            parts = [self._embed(self.prepare(cells[i : i + _BATCH])) for i in range(0, len(cells), _BATCH)]
        except (RowError, TypeError) as error:
            raise ValueError(
                f"Examples of teacher '{name}' must be what its encoder reads, got for {label!r}: {error} Correct "
                "them."
            ) from error
        # Of directions, so that no example counts more by the length of its features.
        mean = torch.cat(parts).mean(dim=0)
        return mean / mean.norm()

    def _embed(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Directions of a batch, `(num_rows, size)` float32."""
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        with torch.inference_mode():
            if self.is_image and hasattr(self.model, "get_image_features"):
                return directions(self.model.get_image_features(**on_device))
            return directions(self._pool(self.model(**on_device), on_device.get("attention_mask")))

    def _pool(self, output: Any, mask: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor = output.last_hidden_state
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ValueError(
                    f"`pooling` must be 'mean' or 'cls' for a model without a pooler, got 'pooler' for "
                    f"{type(self.model).__name__}. Choose one of them."
                )
            pooled: torch.Tensor = output.pooler_output
            return pooled
        if hidden.ndim == 4:  # of a convolutional network: channels come first
            return hidden.mean(dim=(2, 3))
        return pool_tokens(hidden, None if mask is None else mask[:, : hidden.shape[1]], self.pooling)


def _check_options(name: str, options: Mapping[str, Any]) -> tuple[float, str]:
    temperature, pooling = options["temperature"], options["pooling"]
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(
            f"`temperature` of teacher '{name}' must be a positive number, got {temperature!r}. Leave it out for "
            f"{_OPTIONS['temperature']}."
        )
    if pooling not in _POOLINGS:
        raise ValueError(
            f"`pooling` of teacher '{name}' must be one of {list(_POOLINGS)}, got {pooling!r}. Choose one."
        )
    return float(temperature), str(pooling)


def _find_examples(
    teacher: Teacher, labels: Sequence[str], examples: Any, listed: Any, is_image: bool
) -> dict[str, Sequence[Any]]:
    """Examples of each label that the teacher knows, in the order of the task's."""
    name = teacher.name
    given = [found for found in (examples, listed, teacher.label_texts) if found is not None]
    if len(given) > 1:
        raise ValueError(
            f"Teacher '{name}' must know its classes from examples or from `label_texts`, got more than one of them. "
            "Leave the others out."
        )
    # No file of ours holds pictures.
    if is_image and examples is None:
        raise ValueError(
            f"Teacher '{name}' must be given examples to know classes of images, got none. Pass "
            f"`models={{'{name}': prototype_teacher(teacher, labels, examples)}}`."
        )
    if examples is None and listed is None:
        return dict(label_texts(teacher, labels))
    found = given[0]
    if not isinstance(found, Mapping) or not all(isinstance(some, list | tuple) for some in found.values()):
        shown = dict(found) if isinstance(found, Mapping) else found
        raise ValueError(
            f"Examples of teacher '{name}' must be a list for each label, got {shorten([shown])}. Write "
            "{label: [example, …]}."
        )
    if unknown := sorted(map(str, set(found) - set(labels))):
        raise ValueError(
            f"Examples of teacher '{name}' must be of labels of the task {shorten(labels)}, got {unknown}. Correct "
            "the names."
        )
    wanted = [label for label in labels if label in (teacher.scope or labels)]
    if lacking := [label for label in wanted if not found.get(label)]:
        raise ValueError(
            f"Teacher '{name}' must be given an example of each of its labels, got none of {shorten(lacking)}. Add "
            "them, or name the labels that it knows as its `scope`."
        )
    return {label: list(found[label]) for label in labels if found.get(label)}


def _digest(classes: Mapping[str, Sequence[Any]]) -> str:
    """Hash of all examples: other ones are another teacher."""
    digest = hashlib.blake2b(digest_size=8)
    for label, cells in classes.items():
        digest.update(f"{label} {len(cells)} ".encode())
        for cell in cells:
            # With lengths, or texts that are parted elsewhere would have one digest.
            if isinstance(cell, str):
                digest.update(f"{len(cell)} {cell}".encode("utf-8", "replace"))
            else:
                image = to_pil(cell)
                digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return digest.hexdigest()


KIND = Kind(load=PrototypeTeacher, options=_OPTIONS, reads_label_texts=True)
