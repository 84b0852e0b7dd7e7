"""Tables and figures of the comparison."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.cells import Group
from comparison.plan import BASELINE, CEILING, FACTS, SURE, TEACHERS, ceiling_of, features_setting
from hf_cosupervise.evaluation.plots import (
    plot_group_shares,
    plot_levels,
    plot_pgr,
    plot_reliability,
    plot_teacher_shares,
)
from hf_cosupervise.evaluation.report import add_pgr, merge, metric_of, save_report, say_metric
from hf_cosupervise.method.metrics import deception_score, mean_and_spread, performance_gap_recovered


def collect(groups: Sequence[Group]) -> dict[str, Any]:
    """Put the cells of one task side by side: every number becomes a list over seeds, None where it is missing."""
    methods = groups[0].methods
    cells = {method.name: [group.results.read(method.name) for group in groups] for method in methods}
    teachers = [group.results.read(TEACHERS) or {} for group in groups]
    metric = next((metric_of(facts) for facts in teachers if facts), "accuracy")
    weak = [facts.get(f"weak_{metric}") for facts in teachers]
    report: dict[str, Any] = {"seeds": [group.seed for group in groups], f"weak_{metric}": weak, **say_metric(metric)}
    report |= features_setting(groups[0].task)
    report["teachers"] = merge([facts.get("teachers", {}) for facts in teachers])
    report["methods"] = {}
    for method in methods:
        if any(own := cells[method.name]):
            ceiling = ceiling_of(method, methods)
            for group, low, cell, top in zip(groups, weak, own, cells[ceiling]):
                students = [] if cell is None else [cell, *cell["levels"].values()]
                add_pgr(low, None if top is None else top[metric], students, metric)
                if method.method != CEILING and cell is not None and top is not None:
                    add_deception(
                        cell, *(group.results.read_arrays(name) for name in (method.name, TEACHERS, ceiling))
                    )
            merged = merge([cell and {k: v for k, v in cell.items() if k not in FACTS} for cell in own])
            merged["levels"] = [{"level": int(key), **level} for key, level in merged["levels"].items()]
            report["methods"][method.name] = {"method": method.method, **merged}
    report["levels"] = report["methods"].get(BASELINE, {}).get("levels", [])
    return report


def add_deception(cell: dict[str, Any], own: Any, weak: Any, ceiling: Any) -> None:
    """Say which errors the weak teacher hides from a student, where the predictions of all three were kept."""
    if own and weak and ceiling:
        knows = weak["probs"], ceiling["probs"], weak["labels"]
        cell["deception_score"] = deception_score(own["predicted"], *knows, SURE)


def tidy_rows(report: Mapping[str, Any], task: str) -> Iterator[list[Any]]:
    """Give `task, method, seed, metric, value` of every number; teachers are the method `teachers`."""
    weak = f"weak_{metric_of(report)}"
    everything = {"teachers": {weak: report[weak], **report["teachers"]}}
    everything |= {
        name: {**numbers, "levels": {f"level-{level['level']}": level for level in numbers["levels"]}}
        for name, numbers in report["methods"].items()
    }
    for method, numbers in everything.items():
        for metric, values in flatten(numbers):
            for seed, value in zip(report["seeds"], values):
                if _known(value):
                    yield [task, method, seed, metric, value]


def flatten(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Give `path/to/number` and its values over seeds; diagrams are left out."""
    for key, value in numbers.items():
        if isinstance(value, Mapping) and key != "reliability":
            yield from flatten(value, prefix if key == "levels" else f"{prefix}{key}/")
        elif isinstance(value, list):
            yield f"{prefix}{key}", value


def format_table(report: Mapping[str, Any], task: str) -> str:
    """Write the table of one task in Markdown: percent, mean ± standard deviation over seeds."""
    seeds = ", ".join(str(seed) for seed in report["seeds"])
    has_domains = any("worst_domain_accuracy" in numbers for numbers in report["methods"].values())
    metric, ceiling = metric_of(report), report["methods"].get(CEILING)
    # Beside the ceiling of the same settings: what methods with other losses and heads reach of one and the same.
    has_one = ceiling is not None and sum(own["method"] == CEILING for own in report["methods"].values()) > 1
    heads = ["method", metric, "PGR", *["PGR, one ceiling"] * has_one, f"PGR against {BASELINE}", "seeds won"]
    heads += ["worst class", *["worst domain"] * has_domains, "calibration error", "deception", "time, s"]
    weak = _percent(report[f"weak_{metric}"]) or "not measured"
    about = f"Seeds {seeds}; weak teacher {weak}. All in percent, but for the time of pool and training; "
    lines = [f"## {task}", "", f"{about}deception counts a model as sure from {100 * SURE:.0f} % on.", ""]
    if "features" in report:
        lines += [
            "A control: the head reads the mean over a text's tokens, as by `--pooling mean`, which can be exported.",
            "",
        ]
    lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    base = report["methods"].get(BASELINE, {}).get("pgr", [])
    for name, numbers in report["methods"].items():
        is_rival = name != BASELINE and numbers["method"] != CEILING
        pairs = [(own, other) for own, other in zip(numbers["pgr"], base) if _known(own) and _known(other)]
        against = [own - other for own, other in pairs if is_rival]
        won = f"{sum(value > 1e-9 for value in against)} of {len(against)}" if against else ""  # a tie is no win
        cells = [_percent(numbers[metric]), _percent(numbers["pgr"])]
        if has_one:
            cells.append(_percent(_pgr_of(report[f"weak_{metric}"], numbers[metric], ceiling[metric])))
        cells += [_percent(against, "+"), won]
        keys = ["worst_class_accuracy", *["worst_domain_accuracy"] * has_domains, "ece", "deception_score"]
        cells += [_percent(numbers.get(key, [])) for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean_and_spread(numbers['runtime'])[0]:.1f} |")
    return "\n".join(lines) + "\n"


def _pgr_of(*values: Sequence[float | None]) -> list[float]:
    """The gap recovered in each seed in which weak, own and ceiling's score are known."""
    return [performance_gap_recovered(*scores) for scores in zip(*values) if all(map(_known, scores))]


def _known(value: float | None) -> bool:
    return value is not None and value == value


def _percent(values: Sequence[float | None], sign: str = "") -> str:
    known = [value for value in values if _known(value)]
    if not known:
        return ""
    mean, spread = mean_and_spread(known)
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * spread:.1f}" if len(known) > 1 else "")


def write_results(reports: Mapping[str, Any], folder: Path) -> str:
    """Write tables and figures of what is there; gives the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "method", "seed", "metric", "value"])
        for task, report in reports.items():
            writer.writerows(tidy_rows(report, task))
    save_report(reports, folder / "results.json")
    text = "\n".join(format_table(report, task) for task, report in reports.items())
    (folder / "table.md").write_text(text, encoding="utf-8")
    for task, report in reports.items():
        draw(report, folder / "figures" / task)
    return text


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw what the cells of a task allow."""
    methods = {name: numbers for name, numbers in report["methods"].items() if numbers["method"] != CEILING}
    report = {**report, "methods": methods}
    if any(_known(value) for numbers in methods.values() for value in numbers["pgr"]):
        plot_pgr(report, folder / "pgr.png")
    if any(len(numbers["levels"]) > 1 for numbers in methods.values()):
        plot_levels(report, folder / "levels.png")
    if len(report["levels"]) > 1:
        plot_teacher_shares(report, folder / "teacher_shares.png")
        by = "domain" if "teachers_by_domain" in report["levels"][0] else "class"
        levels = [{**level, "teachers_by_group": level[f"teachers_by_{by}"]} for level in report["levels"]]
        plot_group_shares({"levels": levels}, folder / f"teacher_shares_by_{by}.png")
    curves = {name: facts["reliability"] for name, facts in report["teachers"].items() if "reliability" in facts}
    if BASELINE in methods:
        curves[BASELINE] = methods[BASELINE]["reliability"]
    if curves:
        plot_reliability({name: pool_curves(curve) for name, curve in curves.items()}, folder / "reliability.png")


def pool_curves(curve: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Put the bins of several seeds together, each seed with as much weight as it has examples there."""
    seeds = [seed for seed, counts in enumerate(curve["count"]) if counts is not None]
    counts = np.array([curve["count"][seed] for seed in seeds], dtype=float)
    total, pooled = counts.sum(axis=0), {"count": counts.sum(axis=0).astype(int).tolist()}
    for key in ("confidence", "accuracy"):
        values = np.array([curve[key][seed] for seed in seeds], dtype=float)  # None becomes NaN
        pooled[key] = (np.nansum(values * counts, axis=0) / np.where(total, total, np.nan)).tolist()
    return pooled
