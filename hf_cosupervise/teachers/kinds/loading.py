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
    """Load one teacher, mapped by label names onto the labels of the task."""
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
    """Tell which weights a teacher has, without loading them."""
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
