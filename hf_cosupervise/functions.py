"""Functions that label: what is known of them without running them."""

from __future__ import annotations

import dis
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

# What no code can change behind our back.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


@dataclass(frozen=True)
class LabelingFunction:
    """A function that labels rows, with the name and the version by which it is known; called as the function."""

    function: Callable[[Any], Any]
    name: str
    version: str
    batched: bool = False

    def __call__(self, rows: Any) -> Any:
        """Call the function."""
        return self.function(rows)


def labeling_function(
    function: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
    version: str | None = None,
    batched: bool = False,
) -> Any:
    """Make a function of a row a teacher; a plain function without settings is one as it is.

    The function is given a row as a dictionary of the data's columns but for the ground truth, and gives the name of a
    label, its id, a probability for each label (a sequence of `num_labels` numbers, or a mapping of some labels'
    names; they sum to 1, or are counts of votes), or `None` for no answer.

    A function is in no file and no pickle: pools keep its answers, and hierarchies its name and version. Without
    `version` that is a digest of its source, of the functions that it calls, and of the constants that it reads. Of
    modules only the names count: whoever reads values out of one that changes gives a `version` too.

    Args:
        function (`Callable`, *optional*):
            The function. Without it, a decorator is given.
        name (`str`, *optional*):
            Name of the teacher. Defaults to the function's.
        version (`str`, *optional*):
            To be changed whenever the answers change for a reason that is not in the function's source. Needed for
            functions that read what may change (variables around them that are no constants, objects) and for those
            that have no source.
        batched (`bool`, *optional*, defaults to `False`):
            Whether the function is given a list of rows and gives a list of as many answers.

    Returns:
        `LabelingFunction`: Callable as before; or a decorator.

    Raises:
        TypeError: If `function` is none, or `version` or `name` no text.
        ValueError: If a `version` or a `name` is needed and not given.

    Examples:
        >>> @labeling_function(version="2")
        ... def says_free(row):
        ...     return "spam" if "free" in row["text"].lower() else None
        >>> says_free({"text": "Free money"}), says_free.name
        ('spam', 'says_free')
    """
    if function is None:
        return lambda function: labeling_function(function, name=name, version=version, batched=batched)
    if isinstance(function, LabelingFunction) or not callable(function):
        raise TypeError(
            f"`labeling_function` must be given a function of a row, got {function!r}. Write settings by their names: "
            '`@labeling_function(version="2")`.'
        )
    for key, value in (("name", name), ("version", version)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise TypeError(f"`{key}` of a labeling function must be a text, got {value!r}. Put it in quotes.")
    name = name or str(getattr(function, "__name__", ""))
    if name in ("", "<lambda>"):
        model = "" if name else " A model is no function of a row: name its folder or Hub id, or give a pipeline."
        raise ValueError(
            f"A labeling function must have a name, got a {type(function).__name__} without. Give it one: "
            f'`labeling_function(function, name="…")`.{model}'
        )
    return LabelingFunction(function, name, _find_version(function, name, version), batched)


def name_function(function: Callable[..., Any], name: str | None = None) -> LabelingFunction:
    """Give a function with its name, or that of its teacher where it has none, and version."""
    if isinstance(function, LabelingFunction):
        return function
    # All lambdas have one name, which tells none from another.
    own = getattr(function, "__name__", "") != "<lambda>"
    found: LabelingFunction = labeling_function(function, name=None if own else name)
    return found


def _find_version(function: Callable[..., Any], name: str, version: str | None) -> str:
    """What a function's answers depend on: the version that is given, and a digest of what can be read of it."""
    found = _Reading()
    if isinstance(function, FunctionType):
        found.read(function, f"function '{name}'")
    else:
        found.unknown.append(f"'{name}' is no plain function ({type(function).__name__})")
    if found.unknown and version is None:
        raise ValueError(
            f"Labeling function '{name}' must say its `version`, since answers that are kept are taken for its own "
            f"while that is the same; got none, and it reads what may change: {', '.join(found.unknown)}. Write "
            '`@labeling_function(version="1")`, and another version whenever that changes.'
        )
    digest = hashlib.blake2b("\n".join(found.texts).encode("utf-8", "replace"), digest_size=8).hexdigest()
    return digest if version is None else f"{version}+{digest}" if found.texts else version


@dataclass
class _Reading:
    """What a function consists of, as texts; and by name what of it is not known."""

    texts: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def read(self, value: Any, what: str) -> None:
        """Read a function with all that it reads, or another value that cannot change."""
        value = value.function if isinstance(value, LabelingFunction) else value
        if isinstance(value, ModuleType | BuiltinFunctionType):
            self.texts.append(f"{what} = {value.__name__}")
        elif isinstance(value, FunctionType):
            self._read_function(value, what)
        elif (text := _constant(value)) is not None:
            self.texts.append(f"{what} = {text}")
        else:
            self.unknown.append(f"{what} ({type(value).__name__})")

    def _read_function(self, function: FunctionType, what: str) -> None:
        if id(function) in self.seen:
            return
        # Or functions that call each other would be read for ever.
        self.seen.add(id(function))
        try:
            if function.__code__.co_filename == "<string>":  # of `exec`, and what Python may find there is another's
                raise OSError
            source = textwrap.dedent(inspect.getsource(function))
        except (OSError, TypeError):
            self.unknown.append(f"{what} (without source)")
            return
        codes = list(_codes(function.__code__))
        # Two lambdas of one line have one source.
        self.texts += [source, *(f"{code.co_names} {code.co_varnames} {_constants(code)}" for code in codes)]
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.read(value, f"a default of '{function.__name__}'")
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.read(cell.cell_contents, f"variable '{key}'")
            except ValueError:  # of a cell that is empty still
                self.unknown.append(f"variable '{key}' (not set)")
        # Of the functions and comprehensions in it too, of which `inspect.getclosurevars` does not tell.
        names = {item.argval for code in codes for item in dis.get_instructions(code) if item.opname == "LOAD_GLOBAL"}
        for name in sorted(names & function.__globals__.keys()):
            self.read(function.__globals__[name], f"global '{name}'")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _codes(value)


def _constants(code: CodeType) -> list[str]:
    # From Python 3.14 on, small numbers are no constants but stand in the code.
    small = [item.argval for item in dis.get_instructions(code) if item.opname == "LOAD_SMALL_INT"]
    return [_constant(value) or "" for value in (*code.co_consts, *small) if not isinstance(value, CodeType)]


def _constant(value: Any) -> str | None:
    """A value that cannot change as text, the same in every process."""
    if type(value) in _CONSTANTS:
        return repr(value)
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r} {value.flags}"
    if isinstance(value, tuple | frozenset):
        texts = [_constant(item) for item in value]
        known = [text for text in texts if text is not None]
        # Sets have an order of their own in each process.
        return None if len(known) < len(texts) else str(known if isinstance(value, tuple) else sorted(known))
    return None
