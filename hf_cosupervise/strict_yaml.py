"""YAML that people write: each key once, and nothing that its readers take for different values."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

_YAML = "tag:yaml.org,2002:"
_AMBIGUOUS = "!ambiguous"
_WORDS = ("true", "false")
# What YAML 1.1 and 1.2 both take for that number; and what 1.1 takes for text and 1.2 for a number.
_NUMBERS = {"int": re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"), "float": re.compile(r"[^:_]+")}
_NUMBER_ELSEWHERE = re.compile(r"[-+]?0o?[0-9]+")
# A value may be written once and named often, so that a kilobyte grows beyond all memory when it is copied or told.
_MOST_VALUES = 1_000_000
_MOST_CHARACTERS = 1 << 24  # read one by one


class _OneMeaning:
    """Mark words that YAML 1.1 takes for something else than what stands there: `no`, `1:30`, `017`, `1_0`, a date."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[misc]
        if kind is not yaml.ScalarNode or not implicit[0]:
            return tag
        name = tag.removeprefix(_YAML)
        if name == "bool":
            is_clear = value.lower() in _WORDS
        elif name in _NUMBERS:
            is_clear = _NUMBERS[name].fullmatch(value) is not None
        else:
            is_clear = name != "timestamp" and not _NUMBER_ELSEWHERE.fullmatch(value)
        return tag if is_clear else _AMBIGUOUS


class _StrictLoader(_OneMeaning, yaml.SafeLoader):
    """Refuse a repeated key, of which YAML would silently take the last, and what holds itself."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        known: dict[int, int] = {}
        if node is not None and _num_values(node, known) > _MOST_VALUES + len(known):
            raise yaml.constructor.ConstructorError(
                None, None, f"it stands for more than {_MOST_VALUES:,} values, for its parts name each other"
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # else lists and mappings are filled after their checks

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != f"{_YAML}merge"]
        # A list or a mapping is no key at all, which the parent says with its line.
        if repeated := [key for key, count in Counter(map(self.construct_object, own)).items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"`{repeated[0]}` is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)

    def construct_ambiguous(self, node: yaml.ScalarNode) -> Any:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"`{node.value}` means different things to different readers of YAML; write it in quotes, or "
            "as `true`, `false` or a plain decimal number",
            node.start_mark,
        )


class _StrictDumper(_OneMeaning, yaml.SafeDumper):
    """Quote what the loader would refuse."""


_StrictLoader.add_constructor(_AMBIGUOUS, _StrictLoader.construct_ambiguous)


def parse_yaml(text: str) -> Any:
    """Read YAML that people write: each key once, nothing that holds itself or has two meanings, no code."""
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, more than {_MOST_CHARACTERS:,}.")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(str(error)) from error
    except (LookupError, AttributeError, TypeError) as error:  # so PyYAML takes a value that does not fit its tag
        raise ValueError(f"a value does not fit its tag ({error}).") from error


def dump_yaml(values: Any) -> str:
    """Write YAML that [`parse_yaml`] reads as the same values, keys in their order."""
    return yaml.dump(values, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a part stands for where what it names is written out; what names itself is refused later."""
    if id(node) not in known:
        known[id(node)] = 0
        children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else []
        children += node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(node)]
