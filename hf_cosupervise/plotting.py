"""Pictures of a report: PGR by method and by level, and which teachers taught how much."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import mean_and_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow last, the weakest on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_HATCHES = ("", "///", "...", "xxx")
_OURS, _OTHERS, _INK = "#0072B2", "#B8C4CC", "#333333"
_SMALLEST_LABELLED_SHARE = 0.06


def plot_pgr(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the performance gap recovered by each method, and by co-supervision level after level.

    Bars are means over seeds, error bars the standard deviation (from two seeds on), dots the seeds.

    Args:
        report (`Mapping[str, Any]`):
            `methods`: by name a dictionary with `pgr`, a list with one fraction per seed (`None` or NaN where there
            was no gap; methods without `pgr`, and `ceiling`, which recovers all by definition, are left out).
            `levels`: dictionaries of `level` and `pgr`. JSON values, as `report.json` holds them.
        path (`str` or `os.PathLike`):
            File to write, whole or not at all; its suffix decides the format (`.png`, `.svg`, `.pdf`). Its folder is
            made.

    Returns:
        `pathlib.Path`: The file.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the report has no method with a PGR.
    """
    methods = {name: _numbers(numbers.get("pgr")) for name, numbers in report.get("methods", {}).items()}
    methods = {name: values for name, values in methods.items() if name != "ceiling" and len(values)}
    levels = {str(level["level"]): _numbers(level.get("pgr")) for level in report.get("levels", [])}
    if not methods:
        raise ValueError(
            f"A report needs a method with a PGR, got {sorted(report.get('methods', {}))} without one. "
            "Measure weak teacher, student and ceiling first."
        )
    has_levels = any(len(values) for values in levels.values())
    figure = _new_figure(width=10 if has_levels else 6, height=1.4 + 0.5 * max(len(methods), 4))
    panels = figure.subplots(1, 1 + has_levels, width_ratios=[3, 2][: 1 + has_levels], squeeze=False)[0]
    _draw_methods(panels[0], methods)
    if has_levels:
        _draw_levels(panels[1], levels)
    return _save(figure, path)


def plot_teacher_shares(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw which share of the examples each teacher got, level by level, as the mean over seeds.

    What is missing to 100 % are examples that nobody answered.

    Args:
        report (`Mapping[str, Any]`):
            `levels`: dictionaries of `level` and `teachers`, by name a list with one share per seed, 0 to 1.
        path (`str` or `os.PathLike`):
            File to write, see [`plot_pgr`].

    Returns:
        `pathlib.Path`: The file.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the report has no level with shares.
    """
    levels = {str(level["level"]): level.get("teachers") or {} for level in report.get("levels", [])}
    names = list(dict.fromkeys(name for shares in levels.values() for name in shares))
    if not names:
        raise ValueError(
            f"A report needs levels with `teachers`, got {len(levels)} without. Measure co-supervision first."
        )
    figure = _new_figure(width=10, height=max(1.4 + 0.6 * len(levels), 1.0 + 0.24 * len(names)))
    axes = figure.subplots()
    _draw_shares(axes, levels, names)
    # Below a certain share only the legend tells who it is, so it always names everybody.
    axes.legend(title="teacher", loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9)
    return _save(figure, path)


def _draw_methods(axes: Axes, methods: Mapping[str, np.ndarray]) -> None:
    for row, (name, values) in enumerate(methods.items()):
        mean, spread = mean_and_spread(values.tolist())
        ours = name == "csl"
        axes.barh(row, mean, height=0.6, color=_OURS if ours else _OTHERS)
        _draw_seeds(axes, values, np.full(len(values), row), horizontal=True)
        if len(values) > 1:
            axes.errorbar(mean, row, xerr=spread, color=_INK, capsize=3, linewidth=1.2)
        text = f"{mean:.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")
        furthest = max(0.0, mean + spread, *values)
        style: dict[str, Any] = {"fontsize": 9, "weight": "bold" if ours else "normal", "va": "center"}
        axes.annotate(text, (furthest, row), (6, 0), textcoords="offset points", **style)
    axes.set_yticks(range(len(methods)), [_title(name) for name in methods])
    axes.set_ylim(max(len(methods), 3) - 0.4, -0.6)  # the first on top, and a lone bar no thicker than others
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.margins(x=0.22)  # room for the numbers behind the bars
    axes.set_xlim(left=min(0.0, *(1.1 * values.min() for values in methods.values())))
    axes.set_xlabel("performance gap recovered (%)")
    axes.set_title("By method", loc="left", fontsize=11)
    axes.grid(axis="x", alpha=0.3)


def _draw_levels(axes: Axes, levels: Mapping[str, np.ndarray]) -> None:
    known = [(row, values) for row, values in enumerate(levels.values()) if len(values)]
    means = [values.mean() for _, values in known]
    axes.plot([row for row, _ in known], means, color=_OURS, marker="o", linewidth=1.8)
    for row, values in known:
        mean, spread = mean_and_spread(values.tolist())
        if len(values) > 1:
            axes.errorbar(row, mean, yerr=spread, color=_OURS, capsize=3, linewidth=1.8)
        _draw_seeds(axes, values, np.full(len(values), row), horizontal=False)
    axes.set_xticks(range(len(levels)), list(levels))
    axes.set_xlim(-0.5, max(len(levels) - 0.5, 0.5))
    axes.margins(y=0.2)
    axes.set_xlabel("level (0 is the root)")
    axes.set_ylabel("performance gap recovered (%)")
    axes.set_title("Co-supervised, by level", loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.3)


def _draw_seeds(axes: Axes, values: np.ndarray, positions: np.ndarray, *, horizontal: bool) -> None:
    """One dot per seed, side by side so that equal ones stay visible; a single seed is the mean already."""
    if len(values) < 2:
        return
    positions = positions + np.linspace(-0.14, 0.14, len(values))
    first, second = (values, positions) if horizontal else (positions, values)
    axes.scatter(first, second, s=14, facecolor="white", edgecolor=_INK, linewidth=0.8, zorder=3)


def _draw_shares(axes: Axes, levels: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    starts = np.zeros(len(levels))
    for position, name in enumerate(names):
        found = [_numbers(shares.get(name)) for shares in levels.values()]
        widths = np.array([values.mean() if len(values) else 0.0 for values in found])
        colour = _COLOURS[position % len(_COLOURS)]
        hatch = _HATCHES[position // len(_COLOURS) % len(_HATCHES)]
        style: dict[str, Any] = {"height": 0.7, "color": colour, "hatch": hatch, "edgecolor": "white"}
        bars = axes.barh(range(len(levels)), widths, left=starts, label=name, **style)
        labels = [f"{width:.0f}" if width >= 100 * _SMALLEST_LABELLED_SHARE else "" for width in widths]
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        for text in axes.bar_label(bars, labels, label_type="center", fontsize=9, color=_INK):
            text.set_bbox(box if text.get_text() else None)
        starts += widths
    axes.set_yticks(range(len(levels)), [f"level {level}" for level in levels])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the examples (%)")


def _title(method: str) -> str:
    return "co-supervised" if method == "csl" else method.replace("_", " ")


def _numbers(values: Any) -> np.ndarray:
    """What is known of one fraction or a list of them, in percent."""
    values = values if isinstance(values, list | tuple) else [values]
    numbers = np.array([np.nan if value is None else 100 * float(value) for value in values])
    return numbers[~np.isnan(numbers)]


def _new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody else: pyplot would keep it and might look for a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib, which is not installed. Run `pip install "hf_cosupervise[plots]"`.'
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix or '.png'}")
    try:
        figure.savefig(temporary, bbox_inches="tight")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
