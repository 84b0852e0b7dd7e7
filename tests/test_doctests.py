"""Docstrings: their examples give what they say, every module of the method has one, and defaults are those named."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest
from test_architecture import METHOD, PACKAGE, SOURCES

NAMES = sorted(name.removesuffix(".py").replace("/", ".") for name, source in SOURCES.items() if ">>>" in source)
DEFAULT = re.compile(r"^ *(\w+) \(.*\*optional\*, defaults to `?([^`\n]+?)`?\):", re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_docstrings(name):
    if name in ("aggregation", "method.glad") and find_spec("scipy") is None:
        pytest.skip("Some examples need crowd-kit.")
    assert doctest.testmod(import_module(f"{PACKAGE}.{name}")).failed == 0


def test_the_method_has_examples():
    assert set(METHOD) - set(NAMES) == set()


def documented_defaults(tree: ast.Module) -> Iterator[tuple[str, str, ast.expr | None]]:
    """Where a docstring names a default: function and argument, what it says, and what the code has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        code: dict[str, ast.expr] = {}
        functions = [node]
        if isinstance(node, ast.ClassDef):  # a dataclass has its defaults in its body
            code = {ast.unparse(item.target): item.value for item in node.body if isinstance(item, ast.AnnAssign)}
            functions = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        for function in functions:
            plain, named = function.args.args, function.args.kwonlyargs
            code |= {item.arg: value for item, value in zip(reversed(plain), reversed(function.args.defaults))}
            code |= {item.arg: value for item, value in zip(named, function.args.kw_defaults)}
        for name, said in DEFAULT.findall(ast.get_docstring(node) or ""):
            yield f"{node.name}({name})", said, code.get(name)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_defaults_are_what_the_docstrings_say(module):
    tree = ast.parse(SOURCES[module])
    constants = {ast.unparse(item.targets[0]): item.value for item in tree.body if isinstance(item, ast.Assign)}
    for where, said, found in documented_defaults(tree):
        assert found is not None, f"{where} has no default"
        value = ast.literal_eval(constants.get(ast.unparse(found), found))
        assert ast.literal_eval(said) == value, f"{where}: {said} said, {value} found"
