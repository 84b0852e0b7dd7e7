"""What is compared: tasks and methods, read from a plan and checked."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from task_arguments import RECIPE_TYPES

from hf_cosupervise import CoSupervisedConfig
from hf_cosupervise.arguments import parse_recipe_args, read_recipe_config, recipe_arguments_to_dict
from hf_cosupervise.evaluation.methods import METHODS, OTHER_METHODS
from hf_cosupervise.training.config import fields_without

DEFAULT_PLAN = Path(__file__).parents[1] / "compare.yaml"
BASELINE, CEILING, TEACHERS = "csl", "ceiling", "_teachers"
# The one method that `evaluation` does not know, because it needs a teacher of its own.
ALL_LABELS = "one_teacher_all_labels"
MEAN_POOLED = "mean_pooled"
# What each key of a task or method is.
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "config": (str,),
    "method": (str,),
    "set": (dict,),
    "tasks": (list,),
    "methods": (list,),
    "seeds": (str, int),
    "features": (str,),
    "calibrated": (bool,),
}
# From this probability on a model counts as sure in the deception score.
SURE = 0.75
# Where something runs or is put, and what is run: not how a cell was made.
_NOT_SETTINGS = {"seeds", "methods", "control", "resume"} | fields_without("compare")
# What a cell says of itself, which no number is.
FACTS = ("task", "method", "seed", "settings")


# ── what is compared ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Task:
    """A configuration of train.py (its path counts from the YAML file that names it) and what is changed in it."""

    name: str
    config: str
    set: dict = field(default_factory=dict)
    seeds: str | None = None
    methods: list[str] | None = None
    features: str | None = None


@dataclass(frozen=True)
class Method:
    """A method of `evaluation`, or `ALL_LABELS`, with changes to `CoSupervisedConfig`, on all tasks or some."""

    name: str
    method: str
    set: dict = field(default_factory=dict)
    tasks: list[str] | None = None
    calibrated: bool = False


@dataclass
class Plan:
    """Say what is compared; the keys of the YAML file."""

    tasks: list
    methods: list
    seeds: str = "0"
    output_dir: str = "outputs/compare"
    num_workers: int = 1


def parse_plan(argv: Sequence[str] | None, description: str | None = None) -> Plan:
    """Read the YAML file, and what the command line picks of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEFAULT_PLAN, type=Path, help="YAML file with tasks and methods.")
    parser.add_argument("--tasks", nargs="+", help="Only these tasks.")
    parser.add_argument("--methods", nargs="+", help="Only these methods; their ceilings are added.")
    parser.add_argument("--seeds", help="Seeds, separated by commas.")
    parser.add_argument("--output_dir", help="Where cells, tables and figures go.")
    parser.add_argument("--num_workers", type=int, help="Processes side by side, one thread each; 0: in this one.")
    args = parser.parse_args(argv)
    values = read_recipe_config(args.config, [Plan])
    if missing := [name for name in ("tasks", "methods") if not isinstance(values.get(name), list)]:
        raise ValueError(
            f"'{args.config}' must hold lists of `tasks` and `methods`, got {missing} as "
            f"{[values.get(name) for name in missing]}. Add them."
        )
    plan = Plan(**values)
    for name in ("output_dir", "num_workers"):
        setattr(plan, name, getattr(plan, name) if getattr(args, name) is None else getattr(args, name))
    tasks, methods = [_read(Task, facts) for facts in plan.tasks], [_read(Method, facts) for facts in plan.methods]
    _check(tasks, methods)
    for number, task in enumerate(tasks):
        seeds = next(str(value) for value in (args.seeds, task.seeds, plan.seeds) if value is not None)
        tasks[number] = replace(task, config=str(args.config.parent / task.config), seeds=seeds)
    plan.tasks, plan.methods = _pick("tasks", tasks, args.tasks), _pick("methods", methods, args.methods)
    return plan


def _check(tasks: Sequence[Task], methods: Sequence[Method]) -> None:
    for task in tasks:
        names = [method.name for method in methods]
        if task.methods is not None and (unknown := [name for name in task.methods if name not in names]):
            raise ValueError(f"`methods` of task '{task.name}' must be among {names}, got {unknown}.")
        if task.features not in (None, MEAN_POOLED):
            raise ValueError(f"`features` of task '{task.name}' must be '{MEAN_POOLED}', got {task.features!r}.")
    for method in methods:
        if method.method not in (known := [*METHODS, *OTHER_METHODS, ALL_LABELS]):
            raise ValueError(f"`method` of '{method.name}' must be one of {known}, got {method.method!r}.")
        if unknown := sorted(set(method.set) - {item.name for item in fields(CoSupervisedConfig)}):
            raise ValueError(f"`set` of method '{method.name}' must name fields of CoSupervisedConfig, got {unknown}.")


def _read(kind: type, facts: Any) -> Any:
    names = [item.name for item in fields(kind)]
    if not isinstance(facts, dict) or not {names[0], names[1]} <= set(facts) <= set(names):
        raise ValueError(
            f"A {kind.__name__.lower()} has `{names[0]}`, `{names[1]}` and maybe {names[2:]}, got {facts}."
        )
    for name, value in facts.items():
        kinds = _KINDS[name]
        if not isinstance(value, kinds) or name == "seeds" and isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"`{name}` of {facts['name']!r} must be {wanted}, got {value!r}. Leave it out, or correct it."
            )
    if not re.fullmatch(r"[A-Za-z0-9][\w ,.+=-]*", facts["name"]):  # names are parts of paths
        raise ValueError(f"A name must be letters, digits, spaces and , . + = - _, got {facts['name']!r}.")
    return kind(**facts)


def _pick(what: str, items: list, wanted: Sequence[str] | None) -> list:
    names = [item.name for item in items]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Names of {what} must be unique, got {repeated} more than once.")
    if unknown := sorted(set(wanted or ()) - set(names)):
        raise ValueError(f"`--{what}` must be among {names}, got {unknown}.")
    return [item for item in items if wanted is None or item.name in wanted]


def methods_of(task: Task, methods: Sequence[Method]) -> list[Method]:
    """Give the methods of a task, the ceilings that they are measured against first."""
    own = [method for method in methods if method.tasks is None or task.name in method.tasks]
    own = [method for method in own if task.methods is None or method.name in task.methods]
    known = {method.name: method for method in own if method.method == CEILING}
    for method in own:
        name = ceiling_of(method, own)
        known.setdefault(name, Method(name, CEILING, _ceiling_settings(method)))
    return [*known.values(), *(method for method in own if method.name not in known)]


def ceiling_of(method: Method, methods: Sequence[Method]) -> str:
    """Name the ceiling of the same training settings: one that the plan names, or one of our own."""
    settings = _ceiling_settings(method)
    for other in methods:
        if other.method == CEILING and _ceiling_settings(other) == settings:
            return other.name
    return ", ".join([CEILING, *(f"{key}={_as_name(value)}" for key, value in sorted(settings.items()))])


def _ceiling_settings(method: Method) -> dict[str, Any]:
    return {key: value for key, value in method.set.items() if key not in fields_without("ceiling")}


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def resolve(task: Task, method: Method | None = None) -> tuple[Any, ...]:
    """Give the arguments of train.py for a task, with the changes of task and method."""
    values = read_recipe_config(task.config, RECIPE_TYPES) | task.set | ({} if method is None else method.set)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{task.name}, {method.name if method else 'set'}.yaml")  # errors name it
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return parse_recipe_args(RECIPE_TYPES, ["--config", str(path)])


def settings_of(run: Sequence[Any]) -> dict[str, Any]:
    """Give what is not as by default, so that a field that is new in a later version changes nothing."""
    return {
        key: value
        for key, value in recipe_arguments_to_dict(run).items()
        if value != _defaults()[key] and key not in _NOT_SETTINGS
    }


def cell_settings(task: Task, method: Method) -> dict[str, Any]:
    """Give all that decides a cell, but for its seed."""
    own: dict[str, Any] = {"method": method.method} | ({"calibrated": True} if method.calibrated else {})
    return own | features_setting(task) | settings_of(resolve(task, method))


def features_setting(task: Task) -> dict[str, Any]:
    return {} if task.features is None else {"features": task.features}


@cache
def _defaults() -> dict[str, Any]:
    return recipe_arguments_to_dict([kind() for kind in RECIPE_TYPES])
