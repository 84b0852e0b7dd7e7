"""The direction of the arrows: read from the source, not from what happens to be imported today."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "hf_cosupervise"
PACKAGE_DIR = Path(__file__).resolve().parents[1] / PACKAGE
# Packages and modules at the top, from the top floor down: each imports only from floors below its own.
FLOORS = (
    ("evaluation", "arguments"),
    ("training",),
    ("students",),
    ("teachers",),
    ("pool",),
    ("models", "data"),
    ("method",),
    ("hub",),
    ("hierarchy",),
    ("files", "functions", "processes", "strict_yaml"),
)
HEIGHT = {name: len(FLOORS) - number for number, names in enumerate(FLOORS) for name in names}
HEAVY = {"datasets", "transformers", "accelerate"}

FILES = sorted(path.relative_to(PACKAGE_DIR).as_posix() for path in PACKAGE_DIR.rglob("*.py"))
SOURCES = {name: (PACKAGE_DIR / name).read_text(encoding="utf-8") for name in FILES}
# `training.trainer` for `training/trainer.py`; a package is not a module, and the metric is loaded by `evaluate`
MODULES = {
    name.removesuffix(".py").replace("/", "."): source
    for name, source in SOURCES.items()
    if not name.endswith("__init__.py") and not name.startswith("metric_modules/")
}
PACKAGES = sorted(name.removesuffix("/__init__.py") for name in FILES if name.endswith("/__init__.py"))
METHOD = [module for module in MODULES if module.startswith("method.")]


# ── what a piece of source says ─────────────────────────────────────────────────────────────────────────────────────


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return dotted_name(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def imported_names(module: str, source: str) -> set[str]:
    """Absolute dotted names of everything imported anywhere, in functions and under TYPE_CHECKING too."""
    here = [PACKAGE, *module.split(".")]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and dotted_name(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def own_imports(module: str, source: str) -> set[str]:
    """Modules of the house that a module imports; what is none of them counts as it is written."""
    found = set()
    for name in imported_names(module, source):
        parts = name.split(".")
        if parts[0] != PACKAGE or parts[1:] == ["__version__"]:
            continue
        dotted = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
        found.add(next((known for known in dotted if known in MODULES), ".".join(parts[1:])))
    return found


def floor_of(module: str) -> str:
    """The package, or the module itself where it stands at the top."""
    return module.split(".")[0]


def upward_imports(module: str, source: str) -> list[str]:
    """Imports of another room that is not below, or of something that is no module of the house."""
    here = floor_of(module)
    others = [name for name in own_imports(module, source) if floor_of(name) != here or name not in MODULES]
    return sorted(name for name in others if name not in MODULES or HEIGHT.get(floor_of(name), 99) >= HEIGHT[here])


def heavy_imports(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported_names("", source)} & HEAVY


def trainer_subclasses(source: str) -> list[str]:
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return [cls.name for cls in classes if any(dotted_name(base).endswith("Trainer") for base in cls.bases)]


def forbidden_statements(source: str) -> list[str]:
    """`assert`, `print(...)`, bare `except:` and `except Exception` with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"assert, line {node.lineno}")
        elif isinstance(node, ast.Call) and dotted_name(node.func) in ("print", "builtins.print"):
            found.append(f"print, line {node.lineno}")
        elif isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {"bare" if kind is None else dotted_name(kind).split(".")[-1] for kind in kinds}
            if names & {"bare", "Exception", "BaseException"}:
                found.append(f"broad except, line {node.lineno}")
    return found


def public_definitions(source: str) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def undocumented(source: str) -> list[str]:
    return [name for name, node in public_definitions(source) if not ast.get_docstring(node)]


def untyped(source: str) -> list[str]:
    """Functions, public or not, that leave a parameter or (but for `__init__`) the result without annotation."""
    tree = ast.parse(source)
    parts = [part for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for part in cls.body]
    # Those too that only type checkers see.
    methods = {id(item) for part in parts for item in (part.body if isinstance(part, ast.If) else [part])}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        static = any(dotted_name(decorator) == "staticmethod" for decorator in node.decorator_list)
        positional = node.args.posonlyargs + node.args.args
        if id(node) in methods and not static:
            positional = positional[1:]
        parameters = [*positional, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        found += [f"{node.name}({arg.arg})" for arg in parameters if arg is not None and arg.annotation is None]
        if node.returns is None and node.name != "__init__":
            found.append(f"{node.name} -> ?")
    return found


def reachable(module: str, arrows: dict[str, set[str]]) -> set[str]:
    """Every module that one module imports, directly or through others."""
    found: set[str] = set()
    todo = [module]
    while todo:
        below = arrows.get(todo.pop(), set()) - found
        found |= below
        todo += below
    return found


def find_circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return one circle of imports, or an empty list."""

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for below in sorted(arrows.get(module, ())):
            circle = walk(below, [*path, module])
            if circle:
                return circle
        finished.add(module)
        return []

    finished: set[str] = set()
    for start in sorted(arrows):
        circle = walk(start, [])
        if circle:
            return circle
    return []


ARROWS = {module: own_imports(module, source) for module, source in MODULES.items()}


# ── the house ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_room_has_a_floor():
    rooms = {floor_of(module) for module in MODULES}
    assert rooms == set(HEIGHT), "add a new room to FLOORS, or take a room that is gone out"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    upward = upward_imports(module, MODULES[module])
    assert not upward, f"{module} imports {upward}"


def test_no_circle():
    # Methods of the pool open these rooms when they are called: `pool.with_aggregate`, `PseudolabelPool.from_votes`.
    arrows = ARROWS | {"pool.pseudolabels": ARROWS["pool.pseudolabels"] - {"pool.votes"}}
    assert find_circle(arrows) == []


@pytest.mark.parametrize("module", METHOD)
def test_the_method_never_imports_hugging_face(module):
    assert not heavy_imports(MODULES[module])


def test_importing_the_method_loads_nothing_of_hugging_face():
    # the source may be clean while an `__init__` pulls everything in
    modules = ", ".join(f"{PACKAGE}.{module}" for module in METHOD)
    code = f"import sys, {modules}; sys.exit(' '.join({HEAVY} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_DIR.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_nothing_of_the_house(package):
    # a name has one place to be imported from, and importing one module loads no other
    if package != "metric_modules":
        source = SOURCES[f"{package}/__init__.py"]
        assert ast.get_docstring(ast.parse(source)) and not imported_names(package, source)


def test_only_the_trainer_subclasses_trainer():
    subclasses = {name: trainer_subclasses(source) for name, source in SOURCES.items()}
    assert [name for name, classes in subclasses.items() if classes] == ["training/trainer.py"]


def test_training_never_reaches_a_teacher():
    # not even by way of a student: a pool is bought once, and trained on where no teacher can be loaded
    training = [module for module in MODULES if module.startswith("training.")]
    reached = {name for module in training for name in reachable(module, ARROWS)}
    assert training and not [name for name in reached if floor_of(name) == "teachers"]


@pytest.mark.parametrize("module", ["pool.base", "pool.hub", "pool.files", "pool.ids"])
def test_what_stores_a_pool_knows_no_labels(module):
    # so that pools of other answers can be stored, selected and published by the same code
    assert not reachable(module, ARROWS) & {"pool.pseudolabels", "pool.top_k"}


def test_only_teachers_run_a_teacher():
    users = {module for module, below in ARROWS.items() for name in below if name.startswith("teachers.kinds.")}
    assert {floor_of(module) for module in users} == {"teachers"}


@pytest.mark.parametrize("name", FILES)
def test_no_assert_print_or_broad_except(name):
    assert forbidden_statements(SOURCES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_public_names_are_documented_and_everything_is_typed(name):
    assert undocumented(SOURCES[name]) == []
    assert untyped(SOURCES[name]) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module]))


# ── the readers above, on sources that break each rule ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("method.metrics", "from ..pool.pseudolabels import PseudolabelPool", ["pool.pseudolabels"]),
        ("method.metrics", "from hf_cosupervise.pool.files import HEADER", ["pool.files"]),
        ("method.metrics", "import hf_cosupervise.training.trainer as t", ["training.trainer"]),
        ("method.metrics", "from .assignment import fall_back", []),
        ("method.rejection", "def f():\n    from ..pool import ids", ["pool.ids"]),
        ("method.rejection", "from .. import hierarchy, __version__", []),
        ("method.rejection", "import_module('hf_cosupervise.training.plan')", ["training.plan"]),
        ("data.inputs", "from ..models.source import ModelSource", ["models.source"]),
        ("hub.cards", "from hf_cosupervise import CoSupervisedTrainer", ["CoSupervisedTrainer"]),
        ("teachers.kinds.timm", "from ...models.source import ModelSource\nfrom .base import TeacherModel", []),
        ("teachers.kinds.timm", "from ...students.loading import load_student", ["students.loading"]),
        ("training.trainer", "from ..pool.pseudolabels import PseudolabelPool\nimport torch", []),
    ],
)
def test_reader_of_upward_imports(module, source, expected):
    assert upward_imports(module, source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("if TYPE_CHECKING:\n    from datasets import Dataset", {"datasets"}),
        ("def f():\n    import transformers.models", {"transformers"}),
        ("import torch, accelerate.logging", {"accelerate"}),
        ("import torch\nfrom .pool import datasets", set()),
    ],
)
def test_reader_of_heavy_imports(source, expected):
    assert heavy_imports(source) == expected


@pytest.mark.parametrize(
    ("source", "num_found"),
    [
        ("assert x", 1),
        ("print('x')", 1),
        ("try:\n    f()\nexcept:\n    pass", 1),
        ("try:\n    f()\nexcept Exception as error:\n    raise", 1),
        ("try:\n    f()\nexcept (OSError, builtins.BaseException):\n    raise", 1),
        ("try:\n    f()\nexcept (OSError, ValueError):\n    pprint.pprint(x)\nraise AssertionError", 0),
    ],
)
def test_reader_of_forbidden_statements(source, num_found):
    assert len(forbidden_statements(source)) == num_found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x, *, y: int) -> int: ...", ["f(x)"]),
        ("def f(x: int): ...", ["f -> ?"]),
        ("class A:\n    def __init__(self, *args): ...", ["__init__(args)"]),
        ("class A:\n    @staticmethod\n    def f(x) -> int: ...", ["f(x)"]),
        ("class A:\n    @classmethod\n    def f(cls, x: int) -> int: ...", []),
    ],
)
def test_reader_of_annotations(source, expected):
    assert untyped(source) == expected


def test_reader_of_docstrings_and_trainers():
    source = "class A(transformers.Trainer):\n    'doc'\n    def f(self): ...\n    def _g(self): ...\ndef h(): 'doc'"
    assert undocumented(source) == ["A.f"]
    assert trainer_subclasses(source) == ["A"]


@pytest.mark.parametrize(
    ("arrows", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"a"}}, ["a", "a"]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
    ],
)
def test_reader_of_circles(arrows, expected):
    assert find_circle(arrows) == expected


def test_reader_of_reachable_modules():
    arrows = {"trainer": {"pool", "heads"}, "pool": {"labeling"}, "labeling": {"pool"}}
    assert reachable("trainer", arrows) == {"pool", "heads", "labeling"}
    assert reachable("heads", arrows) == set()
