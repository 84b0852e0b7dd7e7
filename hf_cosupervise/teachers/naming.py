"""A hierarchy from nothing but names: of models, of columns of the data, or of a whole hierarchy."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.columns import shorten
from ..hierarchy import Teacher, TeacherHierarchy
from ..hub.client import has_file, hub_errors, is_folder
from ..models.files import read_labels
from ..processes import join_processes
from .hub import HIERARCHY_FILES, load_hierarchy
from .kinds.base import label_finder
from .kinds.column import answer_finder, fold_name
from .kinds.loading import find_source
from .running import read_names

logger = logging.getLogger(__name__)

_LEVEL = re.compile(r"(\d+):(.+)")
# Below both, a label of columns may be a slip of the pen: so many answers, and such a share of them.
_FEW, _FEW_OF = 10, 0.005


def hierarchy_from_names(
    names: Sequence[str | Mapping[str, Any]],
    dataset: Dataset,
    labels: Sequence[str] | None = None,
    trusted_types: Sequence[str] = (),
) -> TeacherHierarchy:
    """Make a hierarchy of teachers that are only named, as on a command line."""
    # One name of a hierarchy (see `load_hierarchy`), or for each teacher its Hub id, its folder or the column of its
    # answers, behind its level where it has one ("1:org/cats"); or the fields of a `Teacher`.
    if len(names) == 1 and isinstance(names[0], str) and _is_hierarchy(names[0], dataset):
        hierarchy = load_hierarchy(names[0])
        if labels is not None and tuple(labels) != hierarchy.labels:
            raise ValueError(
                f"`labels` must be those of the hierarchy '{names[0]}', {shorten(hierarchy.labels)}, got "
                f"{shorten(labels)}. Leave them out."
            )
        return TeacherHierarchy(hierarchy.labels, _trusting(hierarchy.teachers, trusted_types))
    teachers: list[Teacher] = []
    for name in names:
        teacher = _read_teacher(name, dataset)
        same = sum(other.name == teacher.name or other.name.startswith(f"{teacher.name}-") for other in teachers)
        # Two ids may end alike; whoever names the fields of a teacher names it too.
        is_free = isinstance(name, Mapping) or teacher.name not in {other.name for other in teachers}
        teachers.append(teacher if is_free else replace(teacher, name=f"{teacher.name}-{same + 1}"))
    _check_once(teachers)
    teachers = _trusting(teachers, trusted_types)
    return TeacherHierarchy(labels or _find_labels(teachers, dataset), teachers)


def _check_once(teachers: Iterable[Teacher]) -> None:
    """Refuse a teacher that is there twice in a level, under whatever names: its say would count twice."""
    seen: list[Teacher] = []
    for teacher in teachers:
        place = str(Path(teacher.model).resolve()) if is_folder(teacher.model) else teacher.model
        if (same := replace(teacher, name="teacher", model=place)) in seen:
            raise ValueError(
                f"Each teacher must be named once in a level, got {teacher.model!r} twice in level {teacher.level}. "
                "Leave one out."
            )
        seen.append(same)


def _trusting(teachers: Iterable[Teacher], types: Sequence[str]) -> list[Teacher]:
    """The same teachers, of which files may hold these types too."""
    return [
        replace(teacher, trusted_types=tuple(dict.fromkeys((*teacher.trusted_types, *types))))
        if types and teacher.has_files
        else teacher
        for teacher in teachers
    ]


def check_meant(hierarchy: TeacherHierarchy, columns: Sequence[str]) -> None:
    """Refuse a teacher that may be a model or a column: it would be looked for on the Hub."""
    for teacher in hierarchy.teachers:
        if teacher.kind == "auto" and teacher.model in columns and not is_folder(teacher.model):
            raise ValueError(
                f"Teacher '{teacher.name}' must say whether its `model` is a column or a model, got "
                f"{teacher.model!r}, which is a column of the data, with `kind='auto'`. Give it `kind='column'`, or "
                "rename the column."
            )


def _is_hierarchy(name: str, dataset: Dataset) -> bool:
    # A level stands before a single teacher only.
    if name in dataset.column_names or _LEVEL.fullmatch(name):
        return False
    if Path(name).suffix in (".json", ".yaml", ".yml"):
        return True
    if is_folder(name):
        return any(Path(name, file).is_file() for file in HIERARCHY_FILES)
    return has_file(name, HIERARCHY_FILES, what=f"Teacher '{name}'")


def _read_teacher(name: str | Mapping[str, Any], dataset: Dataset) -> Teacher:
    if isinstance(name, Mapping):
        return Teacher(**name)
    found = _LEVEL.fullmatch(name)
    level, model = (int(found[1]), found[2]) if found else (0, name)
    # Its answers are here already, and a name for the Hub may look alike.
    if model in dataset.column_names:
        return Teacher(model, level=level, kind="column", name=re.sub(r"[^A-Za-z0-9._-]", "-", model).strip("-._"))
    return Teacher(model, level=level)


def _find_labels(teachers: Sequence[Teacher], dataset: Dataset) -> list[str]:
    """The labels of all teachers, those of the first levels first; names match as they do when answers are read."""
    labels, of_models, answers = list[str](), set[str](), list[tuple[Teacher, Counter[str]]]()
    are_rules = True  # of which each gives one label or none, so that they share no label where they are right
    # The root first: a generalist knows all labels, and gives them their order.
    for teacher in sorted(teachers, key=lambda teacher: teacher.level):
        if teacher.kind == "column":
            answers.append((teacher, _count_answers(teacher, dataset)))
            own = _match_answers(*answers[-1], labels)
        else:
            own = _match_names(_labels_of(teacher, dataset), labels, of_models)
            of_models |= {*own}
        are_rules &= len(own) == 1
        if labels and {*labels}.isdisjoint(own) and not are_rules:
            raise ValueError(
                f"Teachers must share labels, got {shorten(own, 8)} of '{teacher.name}' and {shorten(labels, 8)} of "
                "those before it. Give the task's labels by `labels`, and a `label_map` in a hierarchy; see too that "
                "the first line of a table names its columns."
            )
        labels += [label for label in dict.fromkeys(own) if label not in labels]
    if join_processes().rank == 0:
        _tell_doubts(answers, labels, of_models)
    return labels


def _match_answers(teacher: Teacher, cells: Mapping[str, int], labels: Sequence[str]) -> list[str]:
    """The labels that a column means: known ones, and new ones by the most frequent of the spellings alike."""
    find_label = label_finder(labels)
    known = [*labels, *(label for label in _mapped_to(teacher) if find_label(label) is None)]
    find, spelling, own = answer_finder(teacher, known), dict[str, str](), set[str]()
    for cell in sorted(cells, key=lambda cell: (-cells[cell], cell)):
        places = find(cell)
        own |= {spelling.setdefault(fold_name(cell), cell)} if places is None else {known[place] for place in places}
    return sorted(own)


def _match_names(names: Sequence[str], labels: list[str], of_models: Container[str]) -> list[str]:
    """The labels that a model means; one that columns alone name is spelled as it does."""
    find, own = label_finder(labels), list[str]()
    alike = {fold_name(label): place for place, label in enumerate(labels)}
    for name in names:
        place = find(name)
        if place is None and (place := alike.get(fold_name(name))) is not None and labels[place] not in names:
            if labels[place] in of_models:
                logger.warning(
                    f"The labels '{labels[place]}' and '{name}' of two teachers are two, and differ in punctuation "
                    "alone: if they are one, say so by a `label_map` in a hierarchy."
                )
                place = None
            else:
                labels[place] = name
        # Two labels of one model stay two.
        is_other = place is None or labels[place] in names and labels[place] != name
        own.append(name if place is None or is_other else labels[place])
    return own


def _tell_doubts(answers: Sequence[tuple[Teacher, Counter[str]]], labels: list[str], of_models: set[str]) -> None:
    """Say what of the labels may be a slip of the pen, and what was taken for one that may be two."""
    counts, merged = Counter[str](), dict[str, str]()
    for teacher, cells in answers:
        find = answer_finder(teacher, labels)
        for cell, count in cells.items():
            for label in (labels[place] for place in find(cell) or ()):
                counts[label] += count
                if fold_name(cell) == fold_name(label) and cell.strip().casefold() != label.strip().casefold():
                    merged[cell] = label
    # Of hundreds of labels, many are rare without a slip.
    few = min(_FEW, _FEW_OF * counts.total(), counts.total() / len(labels) / 10)
    if rare := [f"'{label}' × {counts[label]}" for label in labels if counts[label] < few and label not in of_models]:
        logger.warning(
            f"Of {counts.total()} answers in columns very few give the labels {_listed(rare)}, as if mistyped. If "
            "they are, correct the cells; if they are labels of the task, give all of these by `labels`."
        )
    if told := [f"'{cell}' as '{label}'" for cell, label in sorted(merged.items())]:
        logger.warning(
            "Answers in columns that differ in case and punctuation alone are read as one label: "
            f"{_listed(told)}. If they are several, give the task's labels by `labels`."
        )


def _listed(told: Sequence[str], limit: int = 8) -> str:
    return ", ".join(told[:limit]) + (f" and {len(told) - limit} more" if len(told) > limit else "")


def _mapped_to(teacher: Teacher) -> list[str]:
    led_to = ((to,) if isinstance(to, str) else to for to in (teacher.label_map or {}).values() if to)
    return list(dict.fromkeys(label for found in led_to for label in found))


def _count_answers(teacher: Teacher, dataset: Dataset) -> Counter[str]:
    """How often a column holds each of its answers, which must be names."""
    values = [value for value in read_names(dataset, teacher.model) if value is not None and value != ""]
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"The labels of a column are found where it holds names, got {shorten(sorted({*map(str, values)}), 8)} in "
            f"'{teacher.model}'. Give the task's `labels`."
        )
    seen = Counter(values)
    # Of answers without a line of names above them, the first ones become the names.
    if teacher.model in seen and len(seen) > 1:
        raise ValueError(
            f"The first line of data must name the columns, got {teacher.model!r}, which is one of the labels "
            f"{shorten(sorted(seen), 8)} of that column too. Write a line of names above, or give `labels` if it "
            "is one."
        )
    return seen


def _labels_of(teacher: Teacher, dataset: Dataset) -> list[str]:
    """The labels of a model, where its `label_map` leads."""
    # Most often it is the name of a column that was mistyped.
    with hub_errors(
        f"'{teacher.model}', which is none of the columns {shorten(dataset.column_names)},", teacher.model
    ):
        source, kind = find_source(teacher)
    if kind.reads_label_texts or source.files is None:
        if (told := teacher.label_texts or teacher.scope) is None:
            raise ValueError(
                f"The task's labels must be known to a teacher that is told them, got none for '{teacher.name}'. Give "
                "them by `labels`, or as its `label_texts`."
            )
        return list(told)
    config = source.files.config
    described = config.get("pretrained_cfg")
    names = config.get("id2label") or config.get("label_names")
    names = names or (described.get("label_names") if isinstance(described, Mapping) else None)
    if isinstance(names, Mapping):
        # By number: as texts, 10 would come before 2. Classes of scikit-learn may leave some out.
        names = [names[key] for key in sorted(names, key=lambda key: (len(str(key)), str(key)))]
    names = read_labels(names, f"Teacher '{teacher.name}'", "id2label") if names else []
    if all(name.startswith("LABEL_") for name in names):
        raise ValueError(
            f"Teacher '{teacher.name}' must tell the names of its labels, got {shorten(names, 8)} in its "
            "'config.json'. Give the task's labels by `labels`, or name them there as `label_names`."
        )
    led_to = [(teacher.label_map or {}).get(name, name) for name in names]
    return list(dict.fromkeys(label for to in led_to if to for label in ((to,) if isinstance(to, str) else to)))
