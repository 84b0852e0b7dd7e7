"""Load a teacher of any kind, mapped onto the labels of the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...hierarchy import Teacher
from ...models.source import find_kind, find_model
from .base import TeacherModel, TeacherSource, default_device
from .column import ColumnTeacher
from .sklearn import SklearnTeacher
from .timm import TimmTeacher
from .transformers import TransformersTeacher


def load_teacher(
    teacher: Teacher, labels: Sequence[str], device: str | torch.device | None = None, *, commit: str | None = None
) -> TeacherModel:
    """Load one teacher, mapped by label names onto the labels of the task.

    A label of the task that the teacher does not know gets probability 0; several labels of the teacher that are
    mapped to one label of the task add up. Only safetensors and skops files are read, and no code from the Hub is
    executed. An adapter of peft is merged into its base.

    Args:
        teacher (`Teacher`):
            Which one. `kind="auto"` is found out from the files: `config.json` with `model_type` or an
            `adapter_config.json` is transformers, with `architecture` timm; a skops file is scikit-learn.
        labels (`Sequence[str]`):
            The task's label names.
        device (`str` or `torch.device`, *optional*):
            Where it runs. Defaults to the first GPU if there is one.
        commit (`str`, *optional*):
            Its commit on the Hub, where [`identify_teacher`] has found it already: a branch may move in between.

    Returns:
        [`TeacherModel`]: Its `facts` hold `kind`, `class`, `preprocessing`, `revision` (as it was asked for), `commit`
        or for a folder `weights`; of an adapter also `base_model`, `base_commit` and, for a folder, `base_weights`.

    Raises:
        ImportError: If its library is not installed.
        OSError: If the model or one of its files does not exist, or the Hub refuses it or cannot be reached.
        ValueError: If its kind cannot be told, it has no trained head, its labels cannot be mapped, or its file holds
            types that are not trusted.
    """
    labels = tuple(labels)
    if teacher.kind == "column":
        return ColumnTeacher(teacher, labels)
    device = torch.device(device) if device is not None else default_device()
    source = _find_source(teacher, commit)
    kind = find_kind(source.model_source, teacher.model) if teacher.kind == "auto" else teacher.kind
    if kind == "transformers":
        return TransformersTeacher(source, labels, device)
    if kind == "timm":
        return TimmTeacher(source, labels, device)
    return SklearnTeacher(source, labels)


def identify_teacher(teacher: Teacher) -> tuple[dict[str, Any], int]:
    """Tell which weights a teacher has, without loading them.

    Args:
        teacher (`Teacher`):
            Which one.

    Returns:
        `tuple[dict[str, Any], int]`: Its `commit` on the Hub or a hash of its local files as `weights`, as they stand
        in the facts of the loaded teacher; and the size of its weight files in bytes, 0 where none is here yet.

    Raises:
        FileNotFoundError: If the model or its `config.json` does not exist.
    """
    if teacher.kind == "column":
        return {}, 0
    model_source = _find_source(teacher).model_source
    return model_source.identity, sum(path.stat().st_size for path in model_source.weight_files)


def _find_source(teacher: Teacher, commit: str | None = None) -> TeacherSource:
    """Read the configuration, and pin a Hub repository to one commit."""
    model_source = find_model(
        teacher.model,
        what=f"Teacher '{teacher.name}'",
        revision=teacher.revision,
        subfolder=teacher.subfolder,
        commit=commit,
    )
    return TeacherSource(teacher, model_source)
