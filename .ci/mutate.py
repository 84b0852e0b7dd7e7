"""Change the method's code in one place at a time, and count how many of the changes its tests notice.

`python .ci/mutate.py --sample 150` draws that many by `--seed`, makes each in a temporary copy and asks the module's
tests; `--modules losses` takes that one only. What it ends with is a missing test, or a change that does not matter.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = sorted(path.stem for path in (ROOT / "hf_cosupervise" / "method").glob("*.py") if path.stem != "__init__")
MODULES = ("hierarchy", "pool.top_k", *(f"method.{name}" for name in METHOD))
# whose tests are those of another module
TESTED_WITH = {
    **dict.fromkeys(("aekd", "min_norm", "raven"), "weighting"),
    "published_losses": "losses",
}
LIMIT = 300  # seconds until a change counts as noticed
# What is asked too where a module's own tests noticed nothing.
MORE_TESTS = ["tests/test_bad_input.py", "tests/test_slow_method.py", "tests/test_properties.py"]
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
# What the tests load, but for the package itself: once, and not in each process.
LOADED = ("torch", "datasets", "transformers", "peft", "timm", "hypothesis", "pandas", "crowdkit.aggregation")
DROPPED_METHODS = {"clamp", "clamp_min", "abs", "detach", "sqrt", "long", "float", "double", "clip"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Give what one node may become."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[index] = SWAPPED[type(operator)]()
            yield changed
    elif isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(node.op) in SWAPPED:
        changed = copy.deepcopy(node)
        changed.op = SWAPPED[type(node.op)]()
        yield changed
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_METHODS:
        yield node.func.value
    elif isinstance(node, ast.Raise):
        yield ast.Pass()


def places(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """Walk through what may change, as containers and keys: no annotation, and no text of an error."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc", "cause") or isinstance(node, ast.JoinedStr):
            continue
        several = isinstance(value, list)
        for container, key in ((value, index) for index in range(len(value))) if several else ((vars(node), name),):
            if isinstance(container[key], ast.AST):
                yield container, key
                yield from places(container[key])


def mutants(module: str) -> list[tuple[str, int, str, str]]:
    """Give each change of a module as its name, line, description and source."""
    tree = ast.parse((ROOT / "hf_cosupervise" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = []
    for container, key in list(places(tree)):
        old = container[key]
        for new in changes(old):
            container[key] = new
            text = f"{ast.unparse(old)[:80]}  ->  {ast.unparse(new)[:80]}".replace("\n", " ")
            found.append((module, old.lineno, text, ast.unparse(ast.fix_missing_locations(tree))))
        container[key] = old
    return found


def tests_of(module: str) -> list[str]:
    package, _, name = module.rpartition(".")
    path = module.replace(".", "/")
    examples, defaults = f"examples_of_the_docstrings[{module}]", f"defaults_are_what_the_docstrings_say[{path}.py]"
    own = Path("tests", package, f"test_{TESTED_WITH.get(name, name)}.py").as_posix()
    return [own, *(f"tests/test_doctests.py::test_{name}" for name in (examples, defaults))]


def passes(folder: Path, tests: list[str], limit: int) -> bool:
    """Whether the tests pass in a copy within so many seconds, in a process of their own."""
    if not (child := os.fork()):
        signal.alarm(limit)  # which ends the process
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        os._exit(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def load() -> None:
    """Import what is large; with one thread, as a process that is forked from one with several hangs, and no Hub."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    sys.dont_write_bytecode = True  # or a change within a second would be taken for the file before
    for name in LOADED:
        if find_spec(name.partition(".")[0]):
            import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--sample", type=int, default=150, help="how many changes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load()
    every = [mutant for module in args.modules for mutant in mutants(module)]
    drawn = sorted(random.Random(args.seed).sample(every, min(args.sample, len(every))), key=lambda one: one[:2])
    print(f"{len(drawn)} of {len(every)} changes", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, survivors = Path(name), []
        for item in ("hf_cosupervise", "tests", "recipes", "pyproject.toml", "README.md"):
            copier = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
            copier(ROOT / item, folder / item)
        if not passes(folder, [*MORE_TESTS, *(test for module in args.modules for test in tests_of(module))], 3600):
            sys.exit("The tests fail without any change. Run them by pytest.")
        for module, line, text, source in drawn:
            path = folder / "hf_cosupervise" / f"{module}.py"
            original = path.read_text(encoding="utf-8")
            path.write_text(source, encoding="utf-8")
            if passes(folder, tests_of(module), LIMIT) and passes(folder, MORE_TESTS, LIMIT):
                survivors.append(module)
                print(f"unnoticed: {module}.py:{line}: {text}", flush=True)
            path.write_text(original, encoding="utf-8")
    for module in dict.fromkeys(one[0] for one in drawn):
        total, left = sum(one[0] == module for one in drawn), survivors.count(module)
        print(f"{module}: {total - left} of {total} noticed ({1 - left / total:.0%})")
    print(f"all: {len(drawn) - len(survivors)} of {len(drawn)} noticed ({1 - len(survivors) / len(drawn):.0%})")


if __name__ == "__main__":
    main()
