"""What a comparison found: kept by name, put side by side over seeds, told as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json
from ..method.metrics import mean_and_spread, performance_gap_recovered


class ResultFolder:
    """Results by name: a JSON file each, arrays beside it, or the error of what failed in its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, suffix: str = ".json") -> Path:
        """The file of a result."""
        return self.folder / f"{name}{suffix}"

    def read(self, name: str) -> dict[str, Any] | None:
        """A finished result, None where there is none."""
        path = self.path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a result, None where none were kept."""
        path = self.path(name, ".npz")
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def save(self, name: str, result: Mapping[str, Any], **arrays: np.ndarray) -> None:
        """Keep a result, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The JSON file says that a result is finished, so it comes last: arrays that were cut off are written again.
        np.savez(self.path(name, ".npz"), **arrays)  # type: ignore[arg-type]
        save_report(result, self.path(name))
        self.path(name, ".error.txt").unlink(missing_ok=True)

    def fail(self, name: str, error: str) -> None:
        """Keep an error for the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path(name, ".error.txt").write_text(error, encoding="utf-8")


def add_pgr(
    weak: float | None, ceiling: float | None, numbers: Iterable[dict[str, Any]], metric: str = "accuracy"
) -> None:
    """Compare what a metric gives with that of weak teacher and ceiling; None where one of the two is not known."""
    for own in numbers:
        # Without labels neither is known, and there is no gap.
        if weak is None or ceiling is None:
            own["pgr"] = None
        else:
            own["pgr"] = performance_gap_recovered(weak, own[metric], ceiling)


def metric_of(report: Mapping[str, Any]) -> str:
    """Give the name of what a report measures; one of accuracy does not say so."""
    return str(report.get("metric", "accuracy"))


def say_metric(metric: str) -> dict[str, str]:
    """Give what a report says of its metric."""
    return {} if metric == "accuracy" else {"metric": metric}


def merge_reports(reports: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Put the reports of several seeds side by side: every number becomes a list over seeds."""
    numbers = [{key: value for key, value in report.items() if key != "metric"} for report in reports]
    return {"seeds": list(seeds), **say_metric(metric_of(reports[0])), **merge(numbers)}


def merge(values: list[Any], missing: float | None = None) -> Any:
    """Make one dictionary of lists from a list of dictionaries, level by level where they hold lists of those.

    What one of them lacks is None, but for the share of a teacher that got nothing with that seed: 0.
    """
    if all(isinstance(value, list) and value and isinstance(value[0], Mapping) for value in values):
        return [merge(list(items), missing) for items in zip(*values, strict=True)]
    found = [value for value in values if isinstance(value, Mapping)]
    if not found:
        return values
    keys = dict.fromkeys(key for value in found for key in value)  # in order of appearance
    return {
        # The number of a level is its name, the same with every seed.
        key: found[0][key]
        if key == "level"
        else merge(
            [value.get(key, missing) if isinstance(value, Mapping) else None for value in values],
            0.0 if key.startswith("teachers") else missing,
        )
        for key in keys
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Print a merged report as two tables: co-supervision by level, and all methods."""
    metric = metric_of(report)
    lines = [_row("level", "keep rate", "agreement", metric, "PGR", "share per teacher")]
    for level in report["levels"]:
        shares = " ".join(f"{name} {100 * mean_and_spread(share)[0]:.0f}" for name, share in level["teachers"].items())
        # The root has nobody to agree with.
        agreement = level.get("assignment_agreement")
        cells = [_percent(level["keep_rate"]), _percent(agreement) if agreement else "-", _percent(level[metric])]
        lines.append(_row(str(level["level"]), *cells, _percent(level["pgr"]), shares))
    return "\n".join([*(line.rstrip() for line in lines), "", format_methods(report)])


def format_methods(report: Mapping[str, Any]) -> str:
    """Print the methods of a merged report; without a ceiling, what the metric gives alone."""
    metric = metric_of(report)
    lines = [_row("method", metric, "PGR", "gain over generalist")]
    if (weak := report.get(f"weak_{metric}")) is not None:
        lines.append(_row("weak teacher", _percent(weak), _percent([0.0]), ""))
    base = report["methods"].get("generalist", {}).get("pgr")
    for name, numbers in report["methods"].items():
        gain = _percent(differences(numbers["pgr"], base)) if base and name != "generalist" else ""
        pgr = _percent(numbers["pgr"]) if "pgr" in numbers else ""
        lines.append(_row(name, _percent(numbers[metric]), pgr, gain))
    return "\n".join(line.rstrip() for line in lines)


def differences(own: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    """Subtract seed by seed, which takes out what a seed does to all methods; None where one is not known."""
    return [None if a is None or b is None else a - b for a, b in zip(own, other)]


def _row(first: str, *cells: str) -> str:
    return f"{first:<25}" + "".join(f"{cell:<18}" for cell in cells[:-1]) + cells[-1]


def _percent(values: Sequence[float | None]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}" if len(values) > 1 else f"{100 * mean:.1f}"


def save_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a report as JSON, whole or not at all; NaN becomes null."""
    write_json(Path(path), report)
