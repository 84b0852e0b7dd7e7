"""The student put back as an ordinary model, and published."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn

from ..data.inputs import InputProcessor
from ..files import move_file, read_json
from ..hub.client import publish
from ..models.source import MODEL_FILES
from .ordinary import as_ordinary
from .vectors import SKLEARN_FILE, VectorClassifier, save_for_sklearn

# What merging may change, relative to the largest logit: a GPU multiplies with 10 bits of mantissa by default.
_ROUNDING = 0.01


def export_student(model: nn.Module, folder: str | os.PathLike[str], processing_class: Any = None) -> None:
    """Write the student as an ordinary model that loads without this package."""
    folder, plain = Path(folder), model
    if isinstance(model, PeftModel):
        plain = _merge(model, processing_class)
    is_pooled = hasattr(plain, "pooling")
    if is_pooled:
        inputs = {} if processing_class is None else InputProcessor(processing_class, plain.config).probe()
        plain = as_ordinary(plain, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="_student-", dir=folder))
    try:
        # Adapters of a student with a pooling fit no classifier of texts as it is loaded.
        if isinstance(model, PeftModel) and not is_pooled:
            model.save_pretrained(str(temporary / "adapter"))
            (temporary / "adapter" / "README.md").unlink(missing_ok=True)  # an empty form of peft's
        # timm alone reads no weight that another one stands for, such as that of layers which share theirs.
        whole = {n: v.clone() for n, v in plain.state_dict().items()} if hasattr(plain, "timm_model") else None
        plain.save_pretrained(temporary, state_dict=whole)  # type: ignore[operator]
        # timm's processor is part of the configuration and only warns when it is asked to save itself.
        if processing_class is not None and not type(processing_class).__name__.startswith("TimmWrapper"):
            processing_class.save_pretrained(temporary)
        if isinstance(plain, VectorClassifier):
            save_for_sklearn(plain, temporary)
        _fit_timm(temporary / "config.json")
        for pattern in (*MODEL_FILES, *_OWN_FILES):  # of another student, exported here before
            for path in folder.glob(pattern):
                if not (temporary / path.relative_to(folder)).is_file():
                    path.unlink()
        with suppress(OSError):  # it stays where it holds something else
            (folder / "adapter").rmdir()
        _move_files(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merge(model: PeftModel, processing_class: Any) -> nn.Module:
    """A copy with its adapters in its weights, which answers as the model does."""
    merged: Any = copy.deepcopy(model).eval()
    inputs = {} if processing_class is None else _noise(InputProcessor(processing_class, model.config).probe())
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if inputs and getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        expected = merged(**inputs).logits.float() if inputs else torch.zeros(1)
        merged = merged.merge_and_unload()
        found = merged(**inputs).logits.float() if inputs else expected
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= _ROUNDING * scale:
        raise ValueError(
            "A student with its adapters merged must answer as the one that was trained, got logits that differ by "
            f"{difference:.2g} where the largest is {scale:.2g}. Name other layers by `lora_target_modules`, or use "
            "`student_training` 'full'; nothing is written."
        )
    return merged


def _noise(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs in which each pixel is another one: layers that see differences only answer 0 to an even image."""
    random = torch.Generator().manual_seed(0)
    return {
        name: value + torch.randn(value.shape, generator=random) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


# What a student's repository holds: the model, its processor, its story. No checkpoint, pool, pickle or folder else.
_OWN_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", SKLEARN_FILE)
STORY_FILES = ("README.md", "history.json", "report.json", "pgr.png", "teacher_shares.png", "overview.png")
STUDENT_FILES = (*MODEL_FILES, *_OWN_FILES, *STORY_FILES)


def push_student(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    message: str | None = None,
    story: Mapping[str, bytes | Path] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Upload an exported student in one commit."""
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        str(path.relative_to(folder).as_posix()): path
        for pattern in (*MODEL_FILES, *_OWN_FILES, "README.md")
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(
            f"'{folder}' must hold an exported student, got {sorted(files)}. Call `save_model` first."
        )
    if "adapter/adapter_config.json" in files:
        files["adapter/adapter_config.json"] = _without_local_base(folder / "adapter" / "adapter_config.json")
    return publish(
        files | dict(story or {}),
        repo_id,
        what="The student",
        message=message or "Co-supervised student",
        replaced=STUDENT_FILES,
        revision=revision,
        token=token,
    )


def _without_local_base(path: Path) -> bytes:
    """An adapter's configuration without the folder of this machine that its base was read from."""
    config = read_json(path)
    if config.get("revision") is None:  # that of the Hub is pinned
        config["base_model_name_or_path"] = None
    return (json.dumps(config, indent=2) + "\n").encode("utf-8")


def _fit_timm(config_path: Path) -> None:
    """Make the configuration of a timm model readable by timm and by transformers' wrapper."""
    config = read_json(config_path)
    if "architecture" not in config:
        return
    if isinstance(config.get("model_args"), dict):
        config["model_args"].pop("num_classes", None)
    for name in ("file", "url", "hf_hub_id"):  # where its pre-trained weights came from, perhaps on this machine
        (config.get("pretrained_cfg") or {}).pop(name, None)
    config["num_classes"] = len(config.get("label_names") or []) or config.get("num_classes")
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _move_files(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            move_file(path, place)
