"""Teachers of timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ...data.inputs import to_pil
from ...models.classifier import check_finite
from ...models.files import read_labels
from ...models.source import (
    BUILDING_ERRORS,
    TIMM_PREFIXES,
    explained,
    first_line,
    no_larger_than_weights,
    unknown_to_timm,
    whole_weights,
)
from .base import (
    Kind,
    Preparation,
    TeacherSource,
    add_up,
    check_names,
    fingerprint,
    for_inference,
    label_positions,
    try_out,
)

_SAFETENSORS_FILE = "model.safetensors"
# What a model of timm says of its inputs and outputs; where its weights came from is not read.
_TIMM_SETTINGS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes"),
    *("pool_size", "first_conv", "classifier"),
)


class TimmTeacher:
    """An image classifier of timm, with the transforms of its own configuration."""

    column: str | None = None

    def __init__(self, source: TeacherSource, labels: Sequence[str], device: torch.device) -> None:
        import timm

        name = source.name
        own_labels = _timm_labels(source)
        # Before anything large is fetched.
        check_names(source.teacher, own_labels)
        folder = source.model_source.fetch()
        # For its error alone: weights in several parts are none that timm writes.
        source.model_source.file(_SAFETENSORS_FILE)
        model = _build_timm(source)
        try:
            with whole_weights(source.model_source):
                # Strictly, as by default: what is missing would stay random.
                model.load_state_dict(load_file(folder / _SAFETENSORS_FILE))
        except RuntimeError as error:
            raise ValueError(
                f"Teacher '{name}' must have all of its weights (never a silently random teacher), got a "
                f"'{_SAFETENSORS_FILE}' that does not fit its architecture: {first_line(error)}. Correct its "
                "'config.json', or save it again."
            ) from error
        check_finite(source.model_source, model)
        with explained(source.model_source, "preparation of images"):
            data_config = timm.data.resolve_data_config(model=model)
            transform = timm.data.create_transform(**data_config, is_training=False)
            mode = "L" if data_config["input_size"][0] == 1 else "RGB"
            samples = _transform_images([Image.new(mode, (64, 64))], transform, mode)
        self.positions, self.num_labels = label_positions(source.teacher, own_labels, labels), len(labels)
        self.prepare = Preparation(name, False, partial(_transform_images, transform=transform, mode=mode))
        self.device = device
        self.model = for_inference(model, device)
        try_out(source, lambda: self(samples))
        self.facts = source.facts("timm", type(model).__name__, fingerprint([repr(transform), mode]))

    def __call__(self, inputs: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            logits = self.model(inputs.to(self.device, non_blocking=True))
        own_probs = torch.softmax(logits.float(), dim=-1).cpu().numpy()
        return add_up(own_probs, self.positions, self.num_labels)


def _transform_images(cells: Sequence[Any], transform: Callable[[Any], torch.Tensor], mode: str) -> torch.Tensor:
    return torch.stack([transform(to_pil(cell, mode)) for cell in cells])


def _build_timm(source: TeacherSource) -> Any:
    """A model of timm as its configuration describes it, with fresh weights."""
    import timm

    config = source.config
    described = config.get("pretrained_cfg") or config
    shape = described.get("input_size") or [3, 224, 224]
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"Teacher '{source.name}' must read images of a size [channels, height, width], got `input_size` "
            f"{shape!r} in its 'config.json'. Save the model again."
        )
    try:
        args = dict(config.get("model_args") or {})
        settings = {key: described[key] for key in _TIMM_SETTINGS if described.get(key) is not None}
        settings["num_classes"] = config.get("num_classes", settings.get("num_classes"))
        # timm 1.0.31 takes the size of the inputs from the arguments where it was not saved elsewhere.
        if args.get("dynamic_img_size") or args.get("strict_img_size") is False:
            settings["fixed_input_size"] = False
        channels, *size = settings.get("input_size", (3, 224, 224))
        if settings.get("fixed_input_size") and args.get("img_size"):
            size = [args["img_size"]] * 2 if isinstance(args["img_size"], int) else args["img_size"]
        settings["input_size"] = (args.get("in_chans", channels), *size)
        # A few bytes of arguments describe a model of any size.
        with no_larger_than_weights(source.model_source):
            return timm.create_model(config["architecture"], pretrained=False, pretrained_cfg=settings, **args)
    except BUILDING_ERRORS as error:
        found = f"{config.get('architecture')!r} with `model_args` {config.get('model_args')}: {first_line(error)}"
        raise unknown_to_timm(f"Teacher '{source.name}'", found) from error


def _timm_labels(source: TeacherSource) -> list[str]:
    """Label names in the order of the classifier's outputs."""
    pretrained_cfg = source.config.get("pretrained_cfg") or {}
    if not isinstance(pretrained_cfg, Mapping):
        raise ValueError(
            f"Teacher '{source.name}' must have an object as `pretrained_cfg` in its 'config.json', got "
            f"{pretrained_cfg!r}. Save the model again."
        )
    names = source.config.get("label_names") or pretrained_cfg.get("label_names")
    num_classes = source.config.get("num_classes", pretrained_cfg.get("num_classes"))
    names = read_labels(names, f"Teacher '{source.name}'", "label_names") if names else []
    if not names or len(names) != num_classes:
        raise ValueError(
            f"'config.json' of teacher '{source.name}' must tell the names of its {num_classes} labels as "
            f"`label_names`, got {len(names or [])}. Save it with "
            "`save_for_hf(..., model_config={'label_names': ...}, safe_serialization=True)`; a model of ImageNet's "
            "1,000 classes can be loaded with `kind='transformers'`."
        )
    return names


KIND = Kind(
    load=TimmTeacher,
    recognizes=lambda source, model: (
        not source.is_adapter
        and (model.startswith(TIMM_PREFIXES) or "architecture" in source.config and "model_type" not in source.config)
    ),
)
