"""What a comparison found, over seeds, as a table and a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from ..method.metrics import mean_and_spread


def merge_reports(reports: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Put the reports of several seeds side by side: every number becomes a list over seeds."""
    return {"seeds": list(seeds), **_merge(list(reports))}


def _merge(values: list[Any]) -> Any:
    if all(isinstance(value, Mapping) for value in values):
        keys = {key: None for value in values for key in value}  # in order of appearance
        return {
            key: values[0][key] if key == "level" else _merge([value.get(key, 0.0) for value in values])
            for key in keys
        }
    if all(isinstance(value, list) for value in values):
        return [_merge(list(items)) for items in zip(*values, strict=True)]
    return values


def format_report(report: Mapping[str, Any]) -> str:
    """Print a merged report as two tables: co-supervision by level, and all methods."""
    lines = [_row("level", "keep rate", "agreement", "accuracy", "PGR", "share per teacher")]
    for level in report["levels"]:
        shares = " ".join(f"{name} {100 * mean_and_spread(share)[0]:.0f}" for name, share in level["teachers"].items())
        agreement = level.get("assignment_agreement")
        cells = [_percent(level["keep_rate"]), _percent(agreement) if agreement else "-", _percent(level["accuracy"])]
        lines.append(_row(str(level["level"]), *cells, _percent(level["pgr"]), shares))
    lines += ["", _row("method", "accuracy", "PGR", "gain over generalist")]
    lines.append(_row("weak teacher", _percent(report["weak_accuracy"]), _percent([0.0]), ""))
    base = report["methods"].get("generalist", {}).get("pgr")
    for name, numbers in report["methods"].items():
        gain = _percent(_differences(numbers["pgr"], base)) if base and name != "generalist" else ""
        lines.append(_row(name, _percent(numbers["accuracy"]), _percent(numbers["pgr"]), gain))
    return "\n".join(line.rstrip() for line in lines)


def _differences(own: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    """Paired by seed; None where one of the two is not known."""
    return [None if a is None or b is None else a - b for a, b in zip(own, other)]


def _row(first: str, *cells: str) -> str:
    return f"{first:<25}" + "".join(f"{cell:<18}" for cell in cells[:-1]) + cells[-1]


def _percent(values: Sequence[float | None]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}" if len(values) > 1 else f"{100 * mean:.1f}"


def save_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a report as JSON, whole or not at all; NaN becomes null."""
    write_json(Path(path), report)
