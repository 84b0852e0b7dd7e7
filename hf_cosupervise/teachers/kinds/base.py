"""What every kind of teacher is: a model that gives probabilities over its labels."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from ...data.columns import shorten
from ...data.inputs import RowError, channels_last
from ...hierarchy import Teacher
from ...models.files import read_labels
from ...models.source import ModelSource, explained

# Instead of a column, for teachers that read whole rows but for the ground truth; no column can be called so.
ROW = "\0row"
NO_LABEL = (-1, -100)  # of labelling functions, and of what a loss of torch ignores


@dataclass(frozen=True)
class Answers:
    """Probabilities `(num_rows, num_labels)`, and why some rows have none: of teachers that know this row by row."""

    probs: np.ndarray
    errors: dict[int, RowError]


class TeacherModel(Protocol):
    """A loaded teacher: cells are prepared, and probabilities over the task's labels come out."""

    facts: dict[str, Any]
    column: str | None

    def prepare(self, cells: Sequence[Any]) -> Any:
        """Turn cells into what the model reads."""

    def __call__(self, inputs: Any) -> np.ndarray | Answers:
        """Label a batch."""


def check_teacher_model(model: Any, name: str) -> None:
    """See that an object can be run as a teacher."""
    lacking = [] if callable(model) else ["`__call__(inputs)`"]
    lacking += [] if callable(getattr(model, "prepare", None)) else ["`prepare(cells)`"]
    lacking += [] if isinstance(getattr(model, "column", 0), str | None) else ["`column` (a name or None)"]
    try:
        # Facts are written into the pool, hours later.
        is_json = json.dumps(facts := getattr(model, "facts", None)) and isinstance(facts, Mapping)
    except (TypeError, ValueError):
        is_json = False
    lacking += [] if is_json else ["`facts` (a dictionary of JSON values)"]
    if lacking or isinstance(model, type):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"`models[{name!r}]` must be a teacher object with `prepare(cells)`, `__call__(inputs)`, `column` and "
            f"`facts`, got {found}{' without ' + ', '.join(lacking) if lacking else ''}. Give an object of a class "
            "that has them (see `TeacherModel`), or put its answers into a column and read them by `kind='column'`."
        )


@dataclass(frozen=True)
class Kind:
    """What each module of this folder offers as `KIND`: how teachers of its kind are loaded and told apart.

    `load` takes the source, the task's labels and the device. `identify` gives what tells a teacher's answers from
    those of others, without loading it, and the size of its weights in bytes. `recognizes` tells from files that they
    are of this kind. `options` are the names that `Teacher.options` may have, with their defaults. `column` gives the
    column that a teacher reads: `None` for that of the inputs, `ROW` for all of them.
    """

    load: Callable[[TeacherSource, Sequence[str], torch.device], TeacherModel]
    identify: Callable[[TeacherSource], tuple[dict[str, Any], int]] = lambda source: (
        source.model_source.identity,
        source.model_source.num_bytes,
    )
    recognizes: Callable[[ModelSource, str], bool] = lambda source, model: False
    options: Mapping[str, Any] = field(default_factory=dict)
    reads_label_texts: bool = False
    column: Callable[[Teacher], str | None] = lambda teacher: None


# ── where a teacher is and what it is ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TeacherSource:
    """A teacher and its files, where its kind has any."""

    teacher: Teacher
    files: ModelSource | None = None

    @property
    def model_source(self) -> ModelSource:
        """`ModelSource`: Where its files are."""
        if self.files is None:
            raise ValueError(f"Teacher '{self.name}' must have files, got kind '{self.teacher.kind}'. Choose another.")
        return self.files

    @property
    def name(self) -> str:
        """`str`: The teacher's name."""
        return self.teacher.name

    @property
    def config(self) -> dict[str, Any]:
        """`dict[str, Any]`: What its `config.json` says."""
        return self.model_source.config

    def facts(self, kind: str, class_name: str, preprocessing: str) -> dict[str, Any]:
        """What is known about this run."""
        where = {} if self.teacher.subfolder is None else {"subfolder": self.teacher.subfolder}
        return {
            "kind": kind,
            "revision": self.model_source.revision,
            **where,
            **self.model_source.identity,
            "class": class_name,
            "preprocessing": preprocessing,
            **self.asked(),
        }

    def asked(self) -> dict[str, Any]:
        """How the teacher is asked, where it says so: two teachers of the same weights may be asked in two ways."""
        facts = self.teacher.to_dict()
        asked = {key: facts[key] for key in ("label_texts", "options") if key in facts}
        return {"asked": fingerprint(asked)} if asked else {}


def choose_device(device: str | torch.device | None) -> torch.device:
    """Give the device that is asked for, else the GPU of this process, if there is one."""
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(device or "cpu")


# ── texts of labels, and options ────────────────────────────────────────────────────────────────────────────────────


def label_texts(teacher: Teacher, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Texts of each label that a teacher knows, in the order of the task's labels: their names, or what is given."""
    own = [label for label in labels if label in (teacher.scope or labels)]
    if teacher.label_texts is None:
        return {label: (label,) for label in own}
    given = teacher.label_texts
    if lacking := [label for label in own if label not in given]:
        raise ValueError(
            f"`label_texts` of teacher '{teacher.name}' must be of all of its labels {shorten(own)}, got none for "
            f"{shorten(lacking)}. Add them, or name the labels that it knows as its `scope`."
        )
    return {label: given[label] for label in labels if label in given}


def check_template(teacher: Teacher, template: Any) -> None:
    """See that a template has one slot and no other braces, which `str.format` would read as more."""
    if not isinstance(template, str) or template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise ValueError(
            f"`template` of teacher '{teacher.name}' must have one slot '{{}}' for the text of a label and no other "
            f"braces, got {template!r}. Write '{{}}' where it belongs."
        )


def fill_templates(teacher: Teacher, template: Any, texts: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Put each text of each label into the place of `{}` in a template, or in each of several."""
    templates = [template] if isinstance(template, str) else template
    if not isinstance(templates, Sequence) or not templates:
        raise ValueError(
            f"`template` of teacher '{teacher.name}' must be a text or a list of texts, got {template!r}. Write "
            "'This is {}.'."
        )
    for item in templates:
        check_template(teacher, item)
    # Not by `str.format`, which reads attributes of what it is given.
    return {
        label: tuple(item.replace("{}", text) for item in templates for text in some) for label, some in texts.items()
    }


def read_options(teacher: Teacher, kind: str, known: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """Options of a teacher, with the defaults of its kind for those that are not given; `others` are kinds to name."""
    given = teacher.options or {}
    if unknown := sorted(set(given) - set(known)):
        advice = f"name a `kind` that knows them, of {list(others)}" if others else "name another `kind`"
        raise ValueError(
            f"`options` of teacher '{teacher.name}' of kind '{kind}' must be among {sorted(known)}, got unknown "
            f"{unknown}. Correct the names, or {advice}."
        )
    return {**known, **given}


def check_option(teacher: Teacher, options: Mapping[str, Any], key: str, allowed: range | Sequence[Any]) -> None:
    """See that an option is one of some values, or an integer in a range."""
    is_range, value = isinstance(allowed, range), options[key]
    # By type too, since 1 is True, and 0 False, to Python.
    if type(value) not in ({int} if is_range else {type(one) for one in allowed}) or value not in allowed:
        rule = f"an integer in {allowed[0]}..{allowed[-1]}" if is_range else f"one of {list(allowed)}"
        raise ValueError(
            f"Option `{key}` of teacher '{teacher.name}' must be {rule}, got {value!r}. Choose one of them."
        )


def fold_answer(answer: str, blanks: str) -> str:
    """Fold the case of an answer, and make single blanks of what is blank or of these categories of Unicode."""
    kept = "".join(" " if unicodedata.category(letter)[0] in blanks else letter for letter in answer.casefold())
    return " ".join(kept.split())


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LabelPositions:
    """Where a teacher's own labels lead among the task's: `shares` of the mass of the labels `own` go to `to`."""

    own: np.ndarray
    to: np.ndarray
    shares: np.ndarray
    outside: np.ndarray
    num_own: int
    max_outside_mass: float | None


def label_positions(teacher: Teacher, own_labels: Sequence[str], labels: Sequence[str]) -> LabelPositions:
    """Find where each of the teacher's own labels leads: to a label of the task, to several, or nowhere."""
    if unknown := sorted(set(teacher.label_map or {}) - set(own_labels)):
        raise ValueError(
            f"`label_map` of teacher '{teacher.name}' must start from its own labels {shorten(own_labels)}, got "
            f"{shorten(unknown)}. Correct the names."
        )
    targets = find_targets(teacher, own_labels, labels)
    unmapped = [name for name, found in zip(own_labels, targets, strict=True) if found is None]
    if len(unmapped) == len(own_labels) or unmapped and teacher.max_outside_mass is None:
        _refuse_unmapped(teacher, unmapped, labels)
    pairs = [(own, to, 1 / len(found)) for own, found in enumerate(targets) if found for to in found]
    if not pairs:
        raise ValueError(
            f"Teacher '{teacher.name}' must have a label of the task {shorten(labels)}, got a `label_map` that leaves "
            "out all of them. Map one, or leave the teacher out."
        )
    own, to, shares = map(np.array, zip(*pairs))
    outside = np.array([place for place, found in enumerate(targets) if not found], dtype=np.int64)
    return LabelPositions(own, to, shares.astype(np.float32), outside, len(own_labels), teacher.max_outside_mass)


def find_targets(teacher: Teacher, own_labels: Sequence[str], labels: Sequence[str]) -> list[tuple[int, ...] | None]:
    """Positions in the task's labels that each name leads to: none for one that is left out, `None` if unknown."""
    label_map, find = dict(teacher.label_map or {}), label_finder(labels)

    def lead(name: str) -> tuple[int, ...] | None:
        to = label_map.get(name, name)
        if to is None:
            return ()
        found = [find(label) for label in ((to,) if isinstance(to, str) else to)]
        return None if None in found else tuple(place for place in found if place is not None)

    return [lead(name) for name in own_labels]


def _refuse_unmapped(teacher: Teacher, unmapped: Sequence[str], labels: Sequence[str]) -> NoReturn:
    # What transformers calls labels that nobody has named.
    if all(name.startswith("LABEL_") for name in unmapped):
        raise ValueError(
            f"Teacher '{teacher.name}' must tell the names of its labels, got the placeholders {shorten(unmapped)}. "
            'Give the names in order with `label_map={"LABEL_0": ...}`.'
        )
    advice = (
        "" if teacher.max_outside_mass is not None else " (None leaves one out), or allow them by `max_outside_mass`"
    )
    if any(name.casefold().startswith("entail") for name in unmapped):
        advice = ", or ask a model of inference (NLI) for labels of the task by `kind='zero_shot'`"
    raise ValueError(
        f"Labels of teacher '{teacher.name}' must be labels of the task {shorten(labels)}, got {shorten(unmapped)}. "
        f"Map them with `label_map`{advice}."
    )


def head_labels(teacher: Teacher, config: Any) -> list[str]:
    """Names of the labels that a classifier of transformers chooses one of."""
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"Teacher '{teacher.name}' must choose one label per example, got `problem_type` '{config.problem_type}'. "
            "Use a single-label classifier."
        )
    own_labels = read_labels(config.id2label, f"Teacher '{teacher.name}'", "id2label")
    check_names(teacher, own_labels, config.label2id)
    return own_labels


def check_names(teacher: Teacher, own_labels: Sequence[str], label2id: Any = None) -> None:
    """Refuse a head that does not classify, and names that leave open which of its outputs they mean."""
    what = f"Teacher '{teacher.name}'"
    if len(own_labels) < 2:
        raise ValueError(
            f"{what} must give a probability for each of at least two labels, got {len(own_labels)} (a regression "
            "head). Use a classifier."
        )
    twice = sorted({label for label in own_labels if own_labels.count(label) > 1} - set(teacher.label_map or {}))
    if twice:
        raise ValueError(
            f"{what} must give each of its labels a name of its own, got {shorten(twice)} more than once. Rename them "
            "in its 'config.json', or say by `label_map` which label of the task all of that name are (None: none)."
        )
    for label, position in label2id.items() if isinstance(label2id, Mapping) else ():
        named = [number for number, own_label in enumerate(own_labels) if own_label == label]
        # As texts, since some configurations write these numbers as texts.
        if named and str(position) not in map(str, named):
            raise ValueError(
                f"{what} must number its labels in one way, got {label!r} as {named[0]} in `id2label` and as "
                f"{position!r} in `label2id`. Correct its 'config.json'."
            )


def label_finder(labels: Sequence[str]) -> Callable[[str], int | None]:
    """Give a function that finds a name, exactly or else by the only label that differs in case alone."""
    exact = {label: position for position, label in enumerate(labels)}
    alike: dict[str, int | None] = {}
    for position, label in enumerate(labels):
        # Of two labels that differ in case alone, a name in other letters means neither.
        alike[label.casefold()] = None if label.casefold() in alike else position
    return lambda name: exact[name] if name in exact else alike.get(name.casefold())


def add_up(own_probs: np.ndarray, positions: LabelPositions, num_labels: int) -> np.ndarray:
    """Probabilities over the teacher's labels `(n, num_own_labels)` as probabilities over the task's, float32."""
    if own_probs.ndim != 2 or own_probs.shape[1] != positions.num_own:
        raise ValueError(
            f"A teacher with {positions.num_own} label names must give probabilities of shape "
            f"(num_rows, {positions.num_own}), got {own_probs.shape}. Check its configuration."
        )
    probs = np.zeros((len(own_probs), num_labels), dtype=np.float32)
    # Almost always: then it is one copy, and no sum over labels.
    if len(np.unique(positions.to)) == len(positions.to) and (positions.shares == 1).all():
        probs[:, positions.to] = own_probs[:, positions.own]
    else:
        for own, to, share in zip(positions.own, positions.to, positions.shares):
            probs[:, to] += own_probs[:, own] * share
    if not len(positions.outside):
        return probs
    return leave_out(probs, own_probs[:, positions.outside].sum(axis=1), positions.max_outside_mass)


def leave_out(probs: np.ndarray, outside: np.ndarray, max_outside_mass: float | None) -> np.ndarray:
    """Scale what labels of the task have to the sum of all, or give no answer where more than the limit is outside."""
    inside = probs.sum(axis=1)
    # To the sum of all and not to 1: what was no distribution before must not look like one now.
    factor = np.where(inside > 0, (inside + outside) / np.where(inside > 0, inside, 1), 0)
    # What is left out by name is meant to be ignored, however probable it is: with nothing else there is no answer.
    is_out = (outside > (1.0 if max_outside_mass is None else max_outside_mass)) & (inside + outside > 0)
    return np.where(is_out[:, None], 0, probs * factor[:, None]).astype(np.float32)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


# What tokenizers and image processors of libraries make of a row that they cannot read.
_PREPARE_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Preparation:
    """What a model does to cells before it runs; kept apart from its weights, so that a worker needs only this."""

    name: str
    is_text: bool
    make: Callable[[Sequence[Any]], Any]

    def __call__(self, cells: Sequence[Any]) -> Any:
        # Of the first alone: all cells of a column are of one kind, so that no row is at fault but the column is.
        if cells and isinstance(cells[0], str) != self.is_text:
            wanted = "texts" if self.is_text else "images or vectors"
            pairs = ", and make pairs of texts one text each" if self.is_text and isinstance(cells[0], list) else ""
            raise TypeError(
                f"Teacher '{self.name}' must be given {wanted}, got {type(cells[0]).__name__}. Name the right column "
                f"with `input_column`{pairs}."
            )
        try:
            inputs = self.make(cells)
        # A full memory is a RuntimeError to torch, and the fault of no row.
        except (RowError, torch.OutOfMemoryError):
            raise
        except _PREPARE_ERRORS as error:
            raise RowError(f"{type(error).__name__}: {error}") from error
        if isinstance(inputs, Mapping):
            return {key: channels_last(value) for key, value in inputs.items()}
        return channels_last(inputs)


def try_out(source: TeacherSource, answer: Callable[[], np.ndarray]) -> None:
    """See that a model answers an example that any of its kind can read: what fails later is a row's fault."""
    with explained(source.model_source, "model"):
        probs = answer()
    if not np.isfinite(probs).all():
        raise ValueError(
            f"Teacher '{source.name}' must answer by finite probabilities, got {probs[0][:4].tolist()} for an example "
            "that any model can read. Correct its 'config.json', or train it again."
        )


def for_inference(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Put a model on its device, ready to answer and never to be trained."""
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def whole_precision(device: torch.device) -> torch.autocast:
    """Leave mixed precision where small differences of large logits are what counts."""
    return torch.autocast(device.type, enabled=False)


def directions(output: Any) -> torch.Tensor:
    """Features of length 1, `(num_rows, size)` float32."""
    # `get_image_features` and its kin give them as the pooled output of a model.
    features = (output if isinstance(output, torch.Tensor) else output.pooler_output).flatten(1).float()
    return features / features.norm(dim=-1, keepdim=True)


def fingerprint(facts: Any) -> str:
    """Hash of what decides what a model gets to see, 16 hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
