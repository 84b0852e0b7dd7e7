"""Teachers and their hierarchy: what is known about each weak classifier before any of them runs."""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from .files import load_json, write_text
from .functions import name_function
from .strict_yaml import dump_yaml, parse_yaml

# What `model` names, for each kind. A kind is one entry here and one module of its name in `teachers/kinds/`; of
# several that recognise some files, `"auto"` takes the first.
TEACHER_KINDS = {
    "auto": "files",
    "zero_shot": "files",
    "transformers": "files",
    "timm": "files",
    "sklearn": "files",
    "prompted": "files",
    "prototypes": "files",
    "column": "column",
    "function": "object",
    "pipeline": "object",
}
_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # names become folders
_TUPLE_FIELDS = ("scope", "domains", "trusted_types")
_LONGEST = 255  # bytes of a name in a folder, on all systems
# Half of a character, which no file can hold, and the end of a text for numpy and for file systems.
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Teacher:
    """Describe one weak classifier: where it is, at which level it stands and what it is good at.

    Args:
        model (`str` or `os.PathLike`):
            Hub id, local folder or, for `kind="column"`, the name of the column that already holds the answers. A
            function of a row (see [`labeling_function`]) or a `transformers.Pipeline` that classifies does as well.
        level (`int`, *optional*, defaults to 0):
            Level in the hierarchy, 0 is the root.
        name (`str`, *optional*):
            Unique name in the hierarchy: up to 200 letters, digits, `.`, `_` and `-`. Defaults to the last part of
            `subfolder`, else of `model`.
        kind (`str`, *optional*, defaults to `"auto"`):
            One of `"auto"` (found out from the files), `"transformers"`, `"timm"`, `"sklearn"`, `"zero_shot"`,
            `"prompted"`, `"prototypes"`, `"column"`, `"function"`, `"pipeline"`.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub; of a function, its version or a digest of its source, found out.
        scope (`Sequence[str]`, *optional*):
            Labels of the task it was trained for. `None` means all of them.
        domains (`Sequence[str]`, *optional*):
            Values of the metadata column it was trained for, for assignment by `metadata`.
        label_map (`Mapping[str, str | Sequence[str] | None]`, *optional*):
            From the teacher's label names to the task's, where the names differ. `None` leaves a label out, and a list
            shares its probability evenly among several: `{"not_spam": ["ham", "news"]}`.
        max_outside_mass (`float`, *optional*):
            Allows labels that the task does not have, as of a teacher of 1,000 labels for a task of 10: a row on which
            they have more probability than this, from 0 to 1, has no answer. Without it they are an error, unless
            `label_map` leaves them out, whatever they have. What the task's labels have is scaled to the sum of all.
        trusted_types (`Sequence[str]`, *optional*):
            Types in a scikit-learn file that skops does not trust by itself and that you do.
        subfolder (`str`, *optional*):
            Folder in the repository or folder `model` that holds the files, such as `"low"` or `"level-1/cats"`.
        label_texts (`Mapping[str, str | Sequence[str]]`, *optional*):
            What a label is called in words, or several ways to say it, for kinds that read texts of labels. Defaults
            to the names of the labels.
        options (`Mapping[str, Any]`, *optional*):
            Settings of the kind, as JSON values. `zero_shot`: `template` (one or several, with `{}` for the text of a
            label), `correct_prior` (divide by the answer to an empty input), `entailment` (that label's name);
            `pipeline`: `template`; `prototypes`: `examples` (texts of each label), `temperature`, `pooling`;
            `prompted`: `template` (Jinja, with a slot `{{ text }}`), `chat` (as a message of the model's chat
            template), `answer` (`"words"`, whose log-probabilities are summed over their tokens and added up over the
            words of a label, or `"generate"`: the first line of a greedy answer of `max_new_tokens` is one of the
            words but for case and punctuation, or missing), `length_normalize` (mean over tokens), `correct_prior`,
            `separator` (between prompt and word: a space, in a chat nothing), `too_long` (`"raise"`, or `"cut"` the
            end of the text).
        function (`Callable`, *optional*):
            What is called, set where `model` is a function or a pipeline. It is in no file, no pickle, and nobody
            compares it: the teacher is the same where name and `revision` are.

    Raises:
        ValueError: If the name, the kind, the level, the scope, the domains, the labels of a label map,
            `max_outside_mass`, the texts of labels, the options or the folder in it are not usable.
        TypeError: If `scope`, `domains` or `trusted_types` is no list of names, `label_map`, `label_texts` or
            `options` is no mapping, or `revision` is no text.

    Examples:
        >>> Teacher("org/cats-and-dogs", level=1, scope=["cat", "dog"]).name
        'cats-and-dogs'
    """

    model: str
    level: int = 0
    name: str = ""
    kind: str = "auto"
    revision: str | None = None
    scope: tuple[str, ...] | None = None
    domains: tuple[str, ...] | None = None
    label_map: Mapping[str, str | tuple[str, ...] | None] | None = field(default=None, hash=False)
    trusted_types: tuple[str, ...] = ()
    subfolder: str | None = None
    max_outside_mass: float | None = None
    label_texts: Mapping[str, tuple[str, ...]] | None = field(default=None, hash=False)
    options: Mapping[str, Any] | None = field(default=None, hash=False)
    function: Callable[..., Any] | None = field(default=None, repr=False, compare=False)

    if TYPE_CHECKING:
        # What may be given, of which the fields above hold what became of it: names, tuples, and a function aside.
        def __init__(
            self,
            model: str | os.PathLike[str] | Callable[..., Any],
            level: int = 0,
            name: str = "",
            kind: str = "auto",
            revision: str | None = None,
            scope: Sequence[str] | None = None,
            domains: Sequence[str] | None = None,
            label_map: Mapping[str, str | Sequence[str] | None] | None = None,
            trusted_types: Sequence[str] = (),
            subfolder: str | None = None,
            max_outside_mass: float | None = None,
            label_texts: Mapping[str, str | Sequence[str]] | None = None,
            options: Mapping[str, Any] | None = None,
            function: Callable[..., Any] | None = None,
        ) -> None:
            """Take these, checked and frozen by `__post_init__`."""

    def __post_init__(self) -> None:
        if callable(self.model):
            self._take_function(self.model)
        self._settle_name()
        self._settle_place()
        # Tuples and read-only copies, since the record is hashed, and whoever has passed a list could change it.
        for key in _TUPLE_FIELDS:
            object.__setattr__(self, key, self._as_names(key))
        self._freeze_label_map()
        if self.label_texts is not None:
            object.__setattr__(self, "label_texts", _freeze_texts(self.label_texts, self.name))
        if not isinstance(self.options, Mapping | None):
            raise TypeError(
                f"`options` of teacher '{self.name}' must be a mapping of settings of its kind, got "
                f"{type(self.options).__name__}. Write `name: value` for each."
            )
        if self.options is not None:
            object.__setattr__(self, "options", _freeze(self.options, f"`options` of teacher '{self.name}'"))

    def _settle_name(self) -> None:
        """See that the files and the name can be meant, and name a teacher that has no name."""
        if isinstance(self.model, os.PathLike):
            # A frozen dataclass can be completed in no other way. With slashes, for whoever reads the file.
            object.__setattr__(self, "model", Path(self.model).as_posix())
        if not isinstance(self.model, str) or not self.model or not is_writable_text(self.model):
            raise ValueError(
                f"A teacher's `model` must be a Hub id, a folder or a column name, got {self.model!r}. Name one."
            )
        if self.subfolder is not None and not is_inner_folder(self.subfolder):
            raise ValueError(
                f"`subfolder` of teacher '{self.name or self.model}' must be a folder below `model` such as 'low' or "
                f"'a/low', without '..' and not from the root, got {self.subfolder!r}. Correct it."
            )
        if not self.name:
            # Of several teachers in one repository only the subfolder tells which is which.
            object.__setattr__(self, "name", (self.subfolder or self.model).rstrip("/").split("/")[-1])
        if not isinstance(self.name, str) or not _NAME_PATTERN.fullmatch(self.name):
            raise ValueError(
                f"A teacher's `name` must be letters, digits, '.', '_' or '-', got {self.name!r}. Give it a `name` "
                "of at most 200."
            )
        # A pool keeps its inputs in a folder of that name, by which each of its files says whose it is.
        if self.name.lower() == "inputs":
            raise ValueError(
                "A teacher's `name` must not be 'inputs', which is the pool's own. Give it another `name`."
            )

    def _settle_place(self) -> None:
        """See that kind, level and revision can be meant."""
        if self.kind not in TEACHER_KINDS:
            raise self._refusal("kind", f"one of {list(TEACHER_KINDS)}", "Leave it out to have it found.")
        # `True` is an integer to Python, and would be level 1.
        if isinstance(self.level, bool) or not isinstance(self.level, numbers.Integral) or self.level < 0:
            raise self._refusal("level", "an integer from 0 (the root)", "Correct it.")
        object.__setattr__(self, "level", int(self.level))  # one of numpy is none to JSON
        # A commit of digits alone is a number to YAML, and loses its leading zeros: no text is made of it.
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision.strip()):
            advice = "Put it in quotes, or leave it out."
            raise self._refusal("revision", "a branch, tag or commit", advice, TypeError)

    def _refusal(self, key: str, wanted: str, advice: str, kind: type[Exception] = ValueError) -> Exception:
        return kind(f"`{key}` of teacher '{self.name}' must be {wanted}, got {getattr(self, key)!r}. {advice}")

    def _freeze_label_map(self) -> None:
        """See where the teacher's labels lead, and what becomes of those that lead nowhere."""
        if not isinstance(self.label_map, Mapping | None):
            raise TypeError(
                f"`label_map` of teacher '{self.name}' must map its label names to the task's, got "
                f"{type(self.label_map).__name__}. Write `name: name` for each label."
            )
        if self.label_map is not None:
            what = f"`label_map` of teacher '{self.name}'"
            pairs = zip(_as_names(self.label_map, what), [_as_targets(to, what) for to in self.label_map.values()])
            # A read-only copy: a frozen record that holds a dictionary is not frozen.
            object.__setattr__(self, "label_map", MappingProxyType(dict(pairs)))
        if self.max_outside_mass is not None:
            limit = self.max_outside_mass
            if isinstance(limit, bool) or not isinstance(limit, numbers.Real) or not 0 <= limit <= 1:
                advice = "Write 0.5 to have no answer where labels outside the task are the more probable ones."
                raise self._refusal("max_outside_mass", "a number from 0 to 1", advice)
            object.__setattr__(self, "max_outside_mass", float(limit))

    def _take_function(self, function: Callable[..., Any]) -> None:
        """Take what is called apart into a name and a version, by which it is known wherever it cannot be."""
        # Told by what it has, since this module imports no large library.
        if hasattr(function, "task") and hasattr(function, "preprocess"):
            # Of a path the last name: where a folder lies on this machine concerns nobody.
            path = str(getattr(getattr(function, "model", None), "name_or_path", "") or function.task)
            known = {"function": function, "model": Path(path).name, "kind": "pipeline", "revision": None}
        else:
            named = name_function(function, self.name or None)
            known = {"function": named, "model": named.name, "kind": "function", "revision": named.version}
        if self.kind not in ("auto", known["kind"]):
            raise ValueError(
                f"`kind` of teacher '{self.name or known['model']}' must be '{known['kind']}' for the object that is "
                f"its `model`, got {self.kind!r}. Leave it out."
            )
        for key, value in known.items():
            object.__setattr__(self, key, value)

    @property
    def has_files(self) -> bool:
        """`bool`: Whether it is a model in a folder or on the Hub, not answers in a column or an object."""
        return TEACHER_KINDS[self.kind] == "files"

    @property
    def leaves_labels_out(self) -> bool:
        """`bool`: Whether some of its own labels may be none of the task's."""
        return self.max_outside_mass is not None or None in (self.label_map or {}).values()

    def _as_names(self, key: str) -> tuple[str, ...] | None:
        value = getattr(self, key)
        if value is None:
            return None
        names = _as_names(value, f"`{key}` of teacher '{self.name}'")
        # An empty scope would be a teacher that knows no label; to trust no type is the default.
        if not names and key != "trusted_types":
            raise ValueError(
                f"`{key}` of teacher '{self.name}' must name at least one, got an empty list. Leave it out for all."
            )
        if len(set(names)) != len(names):
            raise ValueError(
                f"`{key}` of teacher '{self.name}' must name each once, got one twice: {list(names)}. Drop it."
            )
        return names

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy cannot be pickled, so the record travels as its plain fields.
        return _teacher_from_dict, (self.to_dict(),)

    def __copy__(self) -> Teacher:
        # A frozen record is its own copy, and would lose its function by any other way.
        return self

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values: `model`, `level` and `name` always, the other fields where set."""
        facts: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            # Fields at their default are left out, so that files of today can be read by versions that lack a field,
            # and equal teachers are equal text.
            if item.compare and (item.name in ("model", "level", "name") or value != item.default):
                facts[item.name] = _thaw(value)
        return facts


def is_inner_folder(path: Any) -> bool:
    """Tell whether a path leads to a folder below another one, and nowhere else."""
    # Backslashes, drives and `~` mean something on some systems only: refused on all, since files travel.
    if not isinstance(path, str) or "\\" in path or ":" in path or path.startswith("~"):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= _LONGEST for part in path.split("/"))


def _as_names(values: Any, what: str) -> tuple[str, ...]:
    """Give names as text. YAML reads no and off as booleans and nothing as null, which nobody means as a name."""
    if isinstance(values, str):
        raise TypeError(f"{what} must be a list of names, got the single string {values!r}. Write [{values}].")
    if not isinstance(values, Iterable):
        raise TypeError(f"{what} must be a list of names, got {values!r}. Write them as a list.")
    names = tuple(values)
    # By kind first: `str` would make names of None and False as well.
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | numbers.Integral):
            raise TypeError(f"{what} must hold names, got {name!r} among them. Put names in quotes.")
        if isinstance(name, str) and not is_writable_text(name):
            raise ValueError(
                f"{what} must hold text without NUL and without halves of characters (lone surrogates), got {name!r}. "
                "Correct it."
            )
    return tuple(str(name) for name in names)


def _as_targets(value: Any, what: str) -> str | tuple[str, ...] | None:
    """Give what a label is mapped to: a label of the task, none, or several, each once."""
    if value is None or not isinstance(value, list | tuple):
        return None if value is None else _as_names([value], what)[0]
    names = _as_names(value, what)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"{what} must lead to a label, to None, or to a list that names each of several labels once, got "
            f"{list(value)}. Write None to leave a label out."
        )
    return names


def _freeze(value: Any, what: str) -> Any:
    """Give a JSON value that nobody can change, or say what is none."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{what} must have texts as keys, got {wrong[0]!r} among them. Put it in quotes.")
        return MappingProxyType({key: _freeze(item, what) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_freeze(item, what) for item in value)
    is_text = isinstance(value, str) and is_writable_text(value)
    is_number = isinstance(value, float) and math.isfinite(value)
    # As many digits as any JSON of ours may hold.
    is_number = is_number or isinstance(value, bool | int) and abs(value) < 10**60
    if not is_text and not is_number and value is not None:
        raise TypeError(
            f"{what} must be plain values (texts, finite numbers, true, false, null, lists and mappings of them), got "
            f"{value!r} of type {type(value).__name__}. Write it as such."
        )
    return value


def _thaw(value: Any) -> Any:
    """Give a frozen value as plain lists and dictionaries, which JSON knows."""
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def _freeze_texts(label_texts: Any, name: str) -> Mapping[str, tuple[str, ...]]:
    """Give the texts of each label, none of them twice: equal texts cannot tell two labels apart."""
    what = f"`label_texts` of teacher '{name}'"
    if not isinstance(label_texts, Mapping):
        raise TypeError(
            f"{what} must give each label its text or texts, got {type(label_texts).__name__}. Write `label: text`."
        )
    labels = _as_names(label_texts, what)
    texts = [(text,) if isinstance(text, str) else _as_names(text, what) for text in label_texts.values()]
    frozen = dict(zip(labels, texts, strict=True))
    if empty := [label for label, some in frozen.items() if not some or not all(text.strip() for text in some)]:
        raise ValueError(f"{what} must give each label a text, got an empty one for {empty[0]!r}. Write one.")
    counts = Counter(" ".join(text.split()) for some in texts for text in some)
    if repeated := sorted(text for text, count in counts.items() if count > 1):
        raise ValueError(f"{what} must each be given once, got {repeated} more than once. Say it in other words.")
    return MappingProxyType(frozen)


def is_writable_text(text: str) -> bool:
    """Tell whether a text can be an id or a name: without NUL, and without halves of characters."""
    return _UNWRITABLE.search(text) is None


def _teacher_from_dict(facts: Mapping[str, Any]) -> Teacher:
    # An unknown field may be a misspelt one: `scopes` in place of `scope` would make a generalist of a specialist.
    known = {item.name for item in fields(Teacher) if item.compare}
    if not isinstance(facts, Mapping):
        raise ValueError(f"A teacher must be a mapping of {sorted(known)}, got {facts!r}. Write `model: …`.")
    if unknown := sorted(map(str, set(facts) - known)):
        raise ValueError(
            f"A teacher has the fields {sorted(known)}, got unknown {unknown} in {dict(facts)}. Correct the names."
        )
    if "model" not in facts:
        raise ValueError(f"A teacher needs `model` (Hub id, folder or column name), got {dict(facts)}. Add it.")
    return Teacher(**facts)


class TeacherHierarchy:
    """Hold the teachers of a task by level and check that they fit together.

    Level 0 is the root (a generalist); deeper levels hold specialists.

    Args:
        labels (`Sequence[str]`, *optional*):
            The task's label names; the position of a name is its label id. Without any, the teachers write: their
            answers are texts, which `build_answers` asks for.
        teachers (`Sequence[Teacher]`):
            At least one; of a function of a row the function itself will do. They are sorted by level; within a level
            the given order stays.

    Raises:
        ValueError: If labels or names are repeated, a level has no teacher, or a scope or label map names a label
            that the task does not have.
        TypeError: If `labels` is no list of names, or `teachers` no list of [`Teacher`].

    Examples:
        >>> hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/all"), Teacher("t/b", level=1, scope=["b"])])
        >>> hierarchy.num_levels, hierarchy.names
        (2, ('all', 'b'))
        >>> hierarchy.scope_mask(1).tolist()
        [[False, True]]
    """

    def __init__(self, labels: Sequence[str] = (), teachers: Sequence[Teacher | Callable[..., Any]] = ()) -> None:
        # A single text as labels becomes its letters, as a list of letters would.
        self.labels = _as_names(list(labels) if isinstance(labels, str) else labels, "`labels` of a hierarchy")
        if not isinstance(teachers, Sequence) or not all(
            isinstance(item, Teacher) or callable(item) for item in teachers
        ):
            raise TypeError(f"`teachers` of a hierarchy must be a list of `Teacher`, got {teachers!r}. Make them so.")
        made = [teacher if isinstance(teacher, Teacher) else Teacher(teacher) for teacher in teachers]  # type: ignore[arg-type]
        # Python sorts stably: the order within a level, by which pools number teachers, stays as it was given.
        self.teachers = tuple(sorted(made, key=lambda teacher: teacher.level))
        # Names first, since the sentences of the other two speak of teachers by name.
        self._check_names()
        self._check_levels()
        self._check_labels()

    def _check_names(self) -> None:
        if len(self.labels) == 1:
            raise ValueError(f"A task needs at least two labels, got {list(self.labels)}. Name them all.")
        if blank := [label for label in self.labels if not label.strip()]:
            raise ValueError(f"Labels must not be blank, got {blank[0]!r} among them. Give each a name.")
        # Names become folders, and some file systems do not tell upper from lower case; nobody sees a space at an end.
        for what, names, keys in (
            ("Labels", self.labels, [label.strip() for label in self.labels]),
            ("Teacher names", self.names, [name.lower() for name in self.names]),
        ):
            counts = Counter(keys)
            if repeated := sorted({name for name, key in zip(names, keys) if counts[key] > 1}):
                raise ValueError(f"{what} must be unique, got {repeated} more than once. Rename them.")

    def _check_levels(self) -> None:
        if not self.teachers:
            raise ValueError("A hierarchy needs at least one teacher, got none. Add one.")
        found = {teacher.level for teacher in self.teachers}
        # A file may say anything; where a level is missing, one of the first so many is.
        if missing := sorted(set(range(min(max(found), len(found)) + 1)) - found):
            raise ValueError(
                f"Every level from 0 to {max(found)} needs at least one teacher, got none at level {missing}. "
                "Add teachers there or renumber the levels."
            )

    def _check_labels(self) -> None:
        known = set(self.labels)
        for teacher in self.teachers:
            led_to = [(to,) if isinstance(to, str) else to or () for to in (teacher.label_map or {}).values()]
            for what, names in (
                ("`scope` of teacher '{}' must hold", teacher.scope or ()),
                ("`label_map` of teacher '{}' must lead to", (label for labels in led_to for label in labels)),
                ("`label_texts` of teacher '{}' must be of", teacher.label_texts or ()),
            ):
                if unknown := sorted(set(names) - known):
                    raise ValueError(
                        f"{what.format(teacher.name)} labels of the task, got unknown {unknown}. The task has "
                        f"{list(self.labels)}."
                    )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TeacherHierarchy):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    # Compared by value through dictionaries, so a hash by identity would contradict `==`.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes = "-".join(str(len(level)) for level in self.levels)
        return f"TeacherHierarchy({sizes} teachers, {f'{self.num_labels} labels' if self.labels else 'who write'})"

    def check_labels(self, what: str, *, wanted: bool) -> None:
        """Refuse teachers that write where labels are wanted, and the other way round."""
        if wanted and not self.labels:
            raise ValueError(
                f"{what} needs a hierarchy with `labels`, got teachers that write ({', '.join(self.names[:8])}). Name "
                "the labels, or use `build_answers` and `AnswerPool`."
            )
        if self.labels and not wanted:
            raise ValueError(
                f"{what} needs teachers that write, a `TeacherHierarchy(teachers=…)` without labels, got one of "
                f"{self.num_labels} labels. Leave the labels out, or use `build_pool` and `PseudolabelPool`."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The teachers' names, in the order of `teachers`."""
        return tuple(teacher.name for teacher in self.teachers)

    @property
    def num_labels(self) -> int:
        """`int`: Number of labels of the task."""
        return len(self.labels)

    @property
    def num_levels(self) -> int:
        """`int`: Number of levels, at least 1."""
        return self.teachers[-1].level + 1

    @property
    def levels(self) -> tuple[tuple[Teacher, ...], ...]:
        """`tuple[tuple[Teacher, ...], ...]`: The teachers of each level, the root first."""
        return tuple(tuple(self.teachers[i] for i in self.level_indices(level)) for level in range(self.num_levels))

    def level_indices(self, level: int) -> range:
        """Give the positions in `teachers` of one level's; an `IndexError` if there is no such level."""
        if level not in range(self.num_levels):
            raise IndexError(f"`level` must lie in 0..{self.num_levels - 1}, got {level!r}. Count from the root.")
        positions = [i for i, teacher in enumerate(self.teachers) if teacher.level == level]
        # Teachers are sorted by level, so that those of one stand in a row: a range can slice as well as pick.
        return range(positions[0], positions[-1] + 1)

    def index(self, name: str) -> int:
        """Give the position in `teachers` of the teacher of that name; a `KeyError` if none has it."""
        if name not in self.names:
            raise KeyError(f"No teacher is called {name!r}. The hierarchy has {list(self.names)}.")
        return self.names.index(name)

    def scope_mask(self, level: int) -> torch.Tensor:
        """Tell which labels each teacher of a level was trained for, bool `(num_teachers_of_level, num_labels)`.

        An `IndexError` if there is no such level.
        """
        # Once for all: `labels.index` for each of 20,000 labels of a scope takes time that grows with the square.
        positions = {label: position for position, label in enumerate(self.labels)}
        teachers = [self.teachers[index] for index in self.level_indices(level)]
        mask = torch.zeros(len(teachers), len(self.labels), dtype=torch.bool)
        for row, teacher in zip(mask, teachers, strict=True):
            row[[positions[label] for label in teacher.scope or self.labels]] = True
        return mask

    def has_distinct_scopes(self, level: int) -> bool:
        """Tell whether scopes say who of a level is asked about which label: not if several all have the same one.

        An `IndexError` if there is no such level.

        Examples:
            >>> both = [Teacher("t/x", scope=["a", "b"]), Teacher("t/y", scope=["b", "a"])]
            >>> TeacherHierarchy(["a", "b"], both).has_distinct_scopes(0)
            False
        """
        mask = self.scope_mask(level)
        # By mask and not as listed: a scope of all labels, or in another order, tells no more than none.
        return len(mask) == 1 or not bool((mask == mask[0]).all())

    def to_dict(self) -> dict[str, Any]:
        """Give the hierarchy as plain JSON values: `labels` and `teachers`, what `from_dict` reads."""
        return {"labels": list(self.labels), "teachers": [teacher.to_dict() for teacher in self.teachers]}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> TeacherHierarchy:
        """Build a hierarchy from plain JSON values: `labels` and `teachers`, a list of fields of [`Teacher`].

        Raises:
            ValueError: If a key is missing or unknown, or the teachers do not fit together.
            TypeError: If a name is none, or something is no list of names.
        """
        if not isinstance(facts, Mapping) or set(facts) != {"labels", "teachers"}:
            found = sorted(map(str, facts)) if isinstance(facts, Mapping) else type(facts).__name__
            raise ValueError(f"A hierarchy has exactly the keys ['labels', 'teachers'], got {found}. Correct them.")
        for key, value in facts.items():
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ValueError(f"`{key}` of a hierarchy must be a list, got {value!r}. Write it as [a, b].")
        return cls(facts["labels"], [_teacher_from_dict(teacher) for teacher in facts["teachers"]])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the hierarchy to a `.json`, `.yaml` or `.yml` file, whole or not at all.

        A `ValueError` if the suffix is another one, a `FileNotFoundError` if the folder does not exist.
        """
        path = Path(path)
        # Not made here: a misspelt path would become a folder in which nobody looks.
        if not path.parent.is_dir():
            raise FileNotFoundError(f"A hierarchy file must lie in a folder that exists, got '{path}'. Make it first.")
        facts = self.to_dict()
        text = json.dumps(facts, indent=2) if _is_json(path) else dump_yaml(facts)
        write_text(path, text + "\n" * (not text.endswith("\n")))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TeacherHierarchy:
        """Read a hierarchy from a `.json`, `.yaml` or `.yml` file.

        A relative `model` that is a folder beside the file is taken from there. A `FileNotFoundError` if there is no
        such file, a `ValueError` if it holds no hierarchy.
        """
        path = Path(path)
        hierarchy = read_hierarchy(path)

        def find(teacher: Teacher) -> Teacher:
            # Only what exists beside the file is meant as a folder: `user/name` is an id wherever the file lies.
            beside = path.parent / teacher.model
            return replace(teacher, model=str(beside)) if teacher.has_files and beside.is_dir() else teacher

        return cls(hierarchy.labels, [find(teacher) for teacher in hierarchy.teachers])


def read_hierarchy(path: Path, what: str | None = None) -> TeacherHierarchy:
    """Read a hierarchy file as it stands there, without looking for the models that it names."""
    if not path.is_file():
        raise FileNotFoundError(f"No hierarchy file at '{path}'. Write one with `TeacherHierarchy.save`.")
    # The suffix before the content, so that a `.txt` is refused for what it is.
    what, is_json = what or f"'{path}'", _is_json(path)
    try:
        facts = load_json(path) if is_json else parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        kind = path.suffix[1:].upper()
        # The reader's own words may end with a full stop or none, and ours follow.
        found = f"what is not readable as {kind}: {str(error).rstrip('.')}."
        raise ValueError(f"{what} must be a hierarchy of teachers, got {found} Correct it there.") from error
    try:
        return TeacherHierarchy.from_dict(facts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a hierarchy of teachers, got: {error} Correct it there.") from error


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"A hierarchy file must end in '.json', '.yaml' or '.yml', got '{path.name}'.")
    return path.suffix == ".json"
