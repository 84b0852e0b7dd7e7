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
FLOORS = {
    1: ("files", "method", "metrics", "losses", "strict_yaml", "teachers", "sparse"),
    2: ("assignment", "consistency", "aggregation", "weighting", "heads", "neighbors", "calibration"),
    3: (
        "processes",
        "hub",
        "model_files",
        "checkpoints",
        "hierarchies",
        "pool_files",
        "sources",
        "inputs",
        "pool",
        "derived_pools",
        "votes",
        "journal",
        "teacher_models",
        "labeling",
        "features",
        "collator",
        "card_merging",
        "cards",
    ),
    4: (
        "inherited",
        "config",
        "students",
        "student",
        "publishing",
        "callbacks",
        "plan_rules",
        "levels",
        "level_loss",
        "head_fitter",
        "checks",
        "advice",
        "checkpointing",
        "runs",
        "training_run",
        "trainer",
        "evaluation",
    ),
    5: ("script_utils", "plotting"),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
HEAVY = {"datasets", "transformers", "accelerate"}

# A package counts as one module.
PACKAGES = ("method",)
MODULES = sorted(path.stem for path in PACKAGE_DIR.glob("*.py") if path.stem != "__init__")
FILES = sorted(str(path.relative_to(PACKAGE_DIR)) for path in PACKAGE_DIR.rglob("*.py"))
SOURCES = {name: (PACKAGE_DIR / name).read_text(encoding="utf-8") for name in FILES}
LOW_MODULES = [module for module in MODULES if FLOOR_OF.get(module, 9) <= 2]


# ── what a piece of source says ─────────────────────────────────────────────────────────────────────────────────────


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return dotted_name(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def imported_names(source: str) -> set[str]:
    """Absolute dotted names of everything imported anywhere, in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{PACKAGE}.{base}".rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and dotted_name(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def package_imports(source: str) -> set[str]:
    """Modules of the package that a source imports; a public name taken from the package itself counts as itself."""
    own = (name.split(".") for name in imported_names(source))
    return {parts[1] for parts in own if parts[0] == PACKAGE and len(parts) > 1} - {"__version__"}


def upward_imports(module: str, source: str) -> list[str]:
    """Imports of a higher floor, or of something that is no module of the house."""
    here = FLOOR_OF.get(module, 0)
    return sorted(name for name in package_imports(source) if FLOOR_OF.get(name, 99) > here)


def heavy_imports(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported_names(source)} & HEAVY


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
    methods = {id(item) for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for item in cls.body}
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


# ── the house ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_floors_1_and_2_are_there():
    missing = [name for floor in (1, 2) for name in FLOORS[floor] if name not in (*MODULES, *PACKAGES)]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor(module):
    assert module in FLOOR_OF, f"{module}.py stands on no floor: add it to FLOORS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    upward = upward_imports(module, SOURCES[f"{module}.py"])
    assert not upward, f"{module}.py imports {upward}"


@pytest.mark.parametrize("module", LOW_MODULES)
def test_floors_1_and_2_never_import_hugging_face(module):
    assert not heavy_imports(SOURCES[f"{module}.py"])


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("method/")])
def test_the_method_imports_only_itself(name):
    own = {f"{PACKAGE}.{found}" for found in package_imports(SOURCES[name])}
    files = {f"{PACKAGE}.{Path(other).stem}" for other in FILES if other.startswith("method/")}
    assert own <= files and not heavy_imports(SOURCES[name])


def test_importing_floors_1_and_2_loads_nothing_of_hugging_face():
    # the source may be clean while the package's __init__ pulls everything in
    modules = ", ".join(f"{PACKAGE}.{module}" for module in LOW_MODULES)
    code = f"import sys, {modules}; sys.exit(' '.join({HEAVY} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_DIR.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_circle():
    arrows = {module: package_imports(SOURCES[f"{module}.py"]) for module in MODULES}
    arrows["pool"].discard("votes")  # methods that are doors to what is made of pools
    assert find_circle(arrows) == []


def test_only_the_trainer_subclasses_trainer():
    subclasses = {name: trainer_subclasses(source) for name, source in SOURCES.items()}
    assert [name for name, classes in subclasses.items() if classes and name != "trainer.py"] == []


def test_the_trainer_never_reaches_labeling():
    arrows = {module: package_imports(SOURCES[f"{module}.py"]) for module in MODULES}
    assert not {"labeling", "teacher_models"} & reachable("trainer", arrows)


def test_only_labeling_runs_a_teacher():
    users = [module for module in MODULES if "teacher_models" in package_imports(SOURCES[f"{module}.py"])]
    assert users == ["labeling"]


@pytest.mark.parametrize("name", FILES)
def test_no_assert_print_or_broad_except(name):
    assert forbidden_statements(SOURCES[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_public_names_are_documented_and_everything_is_typed(name):
    assert undocumented(SOURCES[name]) == []
    assert untyped(SOURCES[name]) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(SOURCES[f"{module}.py"]))


# ── the readers above, on sources that break each rule ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("metrics", "from .assignment import fall_back", ["assignment"]),
        ("metrics", "from hf_cosupervise.pool import PseudolabelPool", ["pool"]),
        ("metrics", "import hf_cosupervise.trainer as t", ["trainer"]),
        ("consistency", "def f():\n    from . import pool", ["pool"]),
        ("consistency", "from . import metrics, __version__", []),
        ("consistency", "import importlib\nimportlib.import_module('hf_cosupervise.trainer')", ["trainer"]),
        ("cards", "from hf_cosupervise import CoSupervisedTrainer", ["CoSupervisedTrainer"]),
        ("trainer", "from .pool import PseudolabelPool\nimport torch", []),
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
