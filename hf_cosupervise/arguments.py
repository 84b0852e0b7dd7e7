"""Arguments of the recipes: dataclasses filled from a flat YAML file, with the command line on top."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser

from .files import parse_json
from .strict_yaml import parse_yaml

# YAML 1.1 takes a number for a float only if it has a dot and a signed exponent: 1e-3 and 1.0e5 arrive as strings.
_EXPONENT_FORM = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_SECRETS = ("token", "password", "secret", "api_key")


def parse_recipe_args(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    default_config: str | os.PathLike[str] | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from a YAML file and the command line."""
    # No abbreviations: one would mean something else as soon as another option begins like it.
    parser = _RecipeParser(dataclass_types, allow_abbrev=False)
    parser.read_dicts_as_json()
    parser.keep_defaults()
    # A `%` in a help text is a place for argparse to fill.
    text = f"YAML file with one `name: value` per line (default: {default_config})".replace("%", "%%")
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help=text)
    # Read first, by a parser of its own: what the file says becomes the defaults of the other one.
    finder = _RecipeParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=default_config)
    if (config := finder.parse_known_args(argv)[0].config) is not None:
        parser.use_defaults(read_recipe_config(config, dataclass_types))
    # Transformers would read a file `SCRIPT.args` beside the script as well.
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(_describe_unknown_options(rest, parser))
    return tuple(parsed[: len(dataclass_types)])  # the namespace with `config` comes last


def read_recipe_config(path: str | os.PathLike[str], dataclass_types: Sequence[type]) -> dict[str, Any]:
    """Read a recipe's YAML file and check it against the fields of dataclasses."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`--config` must name a YAML file, got '{path}'. Check the path.")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{path}' must be valid YAML, got an error. {str(error).rstrip('.')}. Correct it there."
        ) from error
    # An empty file is `None` to YAML, and sets nothing.
    if not isinstance(values, dict | None):
        raise ValueError(f"'{path}' must hold one `name: value` per line, got a {type(values).__name__}.")
    hints = _field_types(dataclass_types)
    for name in values or {}:
        if name not in hints:
            raise ValueError(f"'{path}' must hold known names only, got `{name}`.{_suggest(str(name), hints)}")
    return {name: _fit_field(name, value, hints[name], path) for name, value in (values or {}).items()}


def recipe_arguments_to_dict(arguments: Sequence[Any]) -> dict[str, Any]:
    """Give all values of some dataclasses as one flat dictionary, for the record."""
    values: dict[str, Any] = {}
    for instance in arguments:
        # What `TrainingArguments` finds out itself is of the machine, such as the number of GPUs.
        fields = (field.name for field in dataclasses.fields(instance) if field.init)
        values.update(_to_json({name: getattr(instance, name) for name in fields}))
    return values


class _RecipeParser(HfArgumentParser):
    """`HfArgumentParser` that takes dictionaries as JSON and raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"The command line must fit the options, got: {message}. `--help` lists them.")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # A default in words is a value already: of "no" argparse would make False, which nobody gave.
        return arg_string if arg_string is action.default else super()._get_value(action, arg_string)

    def read_dicts_as_json(self) -> None:
        """Let options of dictionaries, which `argparse` would pass to `dict`, read JSON; those of anything do too."""
        for action in self._actions:
            if action.type is Any:
                action.type = _read_anything
            if action.type is not None and (get_origin(action.type) or action.type) is dict:
                action.type = _read_json_dict

    def keep_defaults(self) -> None:
        """Take the default of a field whose type is a list though its default is none, which the parent forgets."""
        known = {field.name: field.default for kind in self.dataclass_types for field in dataclasses.fields(kind)}
        lost = [action.dest for action in self._actions if action.default is None]
        self.set_defaults(**{name: known[name] for name in lost if isinstance(known.get(name), str)})

    def use_defaults(self, values: Mapping[str, Any]) -> None:
        """Take other defaults; a field that has one is not required any more."""
        self.set_defaults(**values)
        for action in self._actions:
            action.required = action.required and action.dest not in values


def _read_anything(text: str) -> Any:
    return _read_json_dict(text) if text.lstrip().startswith("{") else text


def _read_json_dict(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"a dictionary is written as JSON, and {text[:80]!r} is not ({error})"
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"a dictionary is written as JSON, and {text[:80]!r} is a {type(value).__name__}"
        )
    return value


def _field_types(dataclass_types: Sequence[type]) -> dict[str, Any]:
    # Not `field.type`: HfArgumentParser overwrites it, without the `None` of an Optional.
    hints: dict[str, Any] = {}
    for kind in dataclass_types:
        resolved = get_type_hints(kind)
        hints |= {field.name: resolved[field.name] for field in dataclasses.fields(kind) if field.init}
    return hints


def _suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=3)
    return f" Did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else " `--help` lists them all."


def _describe_unknown_options(rest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    options = [text.split("=")[0] for text in rest if text.startswith("--")]
    if not options:
        return f"Every value must follow its `--name`, got {' '.join(rest)!r} alone. `--config` names a YAML file."
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    # The parser knows each option with dashes too, and one way to write it is enough.
    suggestion = _suggest(options[0].removeprefix("--"), [option for option in known if "-" not in option])
    return f"The command line must hold known options only, got `{options[0]}`.{suggestion}"


def _fit_field(name: str, value: Any, hint: Any, path: Path) -> Any:
    try:
        return _fit(value, hint)
    except TypeError:
        found = "null" if value is None else f"{value!r} ({type(value).__name__})"
        raise ValueError(
            f"`{name}` in '{path}' must be {_type_name(hint)}, got {found}.{_advise(value, hint)}"
        ) from None


def _fit(value: Any, hint: Any) -> Any:
    """Give a YAML value as the type wants it, or raise a `TypeError`."""
    origin, items = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return _fit_union(value, items)
    if origin is list and isinstance(value, list) and items:
        return [_fit(item, items[0]) for item in value]
    if origin is dict and isinstance(value, dict) and items:
        return {_fit(key, items[0]): _fit(item, items[1]) for key, item in value.items()}
    if origin is float and _is_number(value):
        return float(value)
    if not (inspect.isclass(origin) and issubclass(origin, Enum) and value in [member.value for member in origin]):
        type_validator("", value, hint)
    return value


def _fit_union(value: Any, kinds: Sequence[Any]) -> Any:
    # The first that fits, as they are written: a whole number stays one where `int | float` is wanted.
    for kind in kinds:
        with suppress(TypeError):
            return _fit(value, kind)
    raise TypeError


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return _EXPONENT_FORM.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _type_name(hint: Any) -> str:
    origin, items = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(item) for item in items)
    if origin is Literal:
        return f"one of {list(items)}"
    if inspect.isclass(origin) and issubclass(origin, Enum):
        return f"one of {[member.value for member in origin]}"
    if origin is types.NoneType:
        return "null"
    return f"{origin.__name__}[{', '.join(_type_name(item) for item in items)}]" if items else str(origin.__name__)


def _advise(value: Any, hint: Any) -> str:
    """Say what to do about a wrong value, for the mistakes that YAML invites."""
    expected = _type_name(hint)
    if isinstance(value, bool) and "bool" not in expected:
        return " If it is a word, put it in quotes."
    if isinstance(value, str) and "list" in expected:
        return f" Write a list of one as [{value}]."
    if isinstance(value, dict):
        return " Write nested values one per line, each under its own name."
    return " Correct the value."


def _to_json(value: Any) -> Any:
    """Make a JSON value of a field's value, without what must not be written down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        # By how a name ends: of `hub_token` and `push_to_hub_token` too.
        return {str(name): _to_json(item) for name, item in value.items() if not str(name).endswith(_SECRETS)}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_to_json(item) for item in items]
    if isinstance(value, Enum):
        return _to_json(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if isinstance(value, bool | int | float | str | None) else str(value)
