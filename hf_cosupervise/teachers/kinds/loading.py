"""Load a teacher of any kind, mapped onto the labels of the task."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from ...hierarchy import TEACHER_KINDS, Teacher
from ...models.source import ModelSource, find_model
from .base import Kind, TeacherModel, TeacherSource, choose_device, read_options


def load_teacher(
    teacher: Teacher, labels: Sequence[str], device: str | torch.device | None = None, *, commit: str | None = None
) -> TeacherModel:
    """Load one teacher, mapped by label names onto the labels of the task; without labels, one that writes."""
    source, kind = find_source(teacher, commit, writes=not labels)
    return kind.load(source, tuple(labels), choose_device(device))


def identify_teacher(teacher: Teacher, *, writes: bool = False) -> tuple[dict[str, Any], int]:
    """Tell what its answers depend on besides what a hierarchy says, such as its weights, without loading them."""
    source, kind = find_source(teacher, writes=writes)
    return kind.identify(source)


def column_of(teacher: Teacher) -> str | None:
    """The column that a teacher reads: `None` for that of the inputs, `ROW` for all of them."""
    return None if teacher.has_files else _kind(teacher.kind).column(teacher)


def find_kind(source: ModelSource, model: str) -> str:
    """Tell by its files which kind of teacher a model is."""
    for name, what in TEACHER_KINDS.items():
        # In the order in which they stand: the first that knows the files is meant.
        if what == "files" and name != "auto" and _kind(name).recognizes(source, model):
            return name
    raise ValueError(
        f"The kind of {source.what[0].lower()}{source.what[1:]} must show in its files: a 'config.json' with "
        "`model_type` (transformers) or `architecture` (timm), or a 'model.skops' (scikit-learn); got a 'config.json' "
        f"with {sorted(source.config)}. Name it with `kind`."
    )


def _kind(name: str) -> Kind:
    # By its name, and not before it is needed: some kinds import large libraries.
    kind: Kind = import_module(f"{__package__}.{name}").KIND
    return kind


def find_source(teacher: Teacher, commit: str | None = None, *, writes: bool = False) -> tuple[TeacherSource, Kind]:
    """Read the configuration, pin a Hub repository to one commit, and see that the kind knows what it is told."""
    source, name = TeacherSource(teacher), teacher.kind
    if writes and name not in ("auto", "column"):
        raise ValueError(
            f"`kind` of teacher '{teacher.name}', which writes, must be 'auto' (a language model) or 'column' (ready "
            f"answers), got '{name}'. Leave it out, or give the hierarchy labels and use `build_pool`."
        )
    if teacher.has_files:
        model_source = find_model(
            teacher.model,
            what=f"Teacher '{teacher.name}'",
            revision=teacher.revision,
            subfolder=teacher.subfolder,
            commit=commit,
        )
        source = TeacherSource(teacher, model_source)
        name = find_kind(model_source, teacher.model) if name == "auto" and not writes else name
    if writes:
        kind = _kind("written")
        read_options(teacher, "column" if name == "column" else "written", {} if name == "column" else kind.options)
        return source, kind
    kind = _kind(name)
    others = [] if _knows(kind, teacher) else _kinds_for(teacher)
    # Options first: their error names the one that is unknown.
    read_options(teacher, name, kind.options, others)
    if not _knows(kind, teacher):
        advice = f"name a `kind` that does, of {others}" if others else "name another `kind`"
        raise ValueError(
            f"Teacher '{teacher.name}' must be of a kind that reads texts of labels to have `label_texts`, got "
            f"kind '{name}'. Leave them out, or {advice}."
        )
    return source, kind


def _knows(kind: Kind, teacher: Teacher) -> bool:
    """Tell whether a kind knows all that a teacher is told."""
    return set(teacher.options or ()) <= set(kind.options) and (kind.reads_label_texts or teacher.label_texts is None)


def _kinds_for(teacher: Teacher) -> list[str]:
    """Kinds of models in files that know all that a teacher is told; they may be named instead of the one found."""
    if not teacher.has_files:
        return []
    named = [name for name, what in TEACHER_KINDS.items() if what == "files" and name != "auto"]
    return [name for name in named if _knows(_kind(name), teacher)]
