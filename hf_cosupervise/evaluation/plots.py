"""Pictures of a report: PGR by method and level, who taught how much and whom, what was kept, and calibration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import whole_file
from ..method.metrics import mean_and_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow last, the weakest on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_HATCHES = ("", "///", "...", "xxx")
_MARKERS = ("o", "s", "^", "D")
_OURS, _OTHERS, _INK = "#0072B2", "#B8C4CC", "#333333"
_SMALLEST_LABELLED_SHARE = 0.06


def plot_pgr(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the performance gap recovered by each method, and by co-supervision level after level."""
    methods = {name: _numbers(numbers.get("pgr")) for name, numbers in report.get("methods", {}).items()}
    # The ceiling is 100 % of the gap by definition.
    methods = {name: values for name, values in methods.items() if name != "ceiling" and len(values)}
    levels = {str(level["level"]): _numbers(level.get("pgr")) for level in report.get("levels", [])}
    if not methods:
        raise ValueError(
            f"A report needs a method with a PGR, got {sorted(report.get('methods', {}))} without one. "
            "Measure weak teacher, student and ceiling first."
        )
    has_levels = any(len(values) for values in levels.values())
    figure = _new_figure(width=10 if has_levels else 6, height=1.4 + 0.5 * max(len(methods), 4))
    # Wide for names of methods, narrow for levels; without levels the first alone.
    panels = figure.subplots(1, 1 + has_levels, width_ratios=[3, 2][: 1 + has_levels], squeeze=False)[0]
    _draw_methods(panels[0], methods)
    if has_levels:
        _draw_levels(panels[1], levels)
    return _save(figure, path)


def plot_teacher_shares(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw which share of the examples each teacher got, level by level, as the mean over seeds."""
    levels = {str(level["level"]): level.get("teachers") or {} for level in report.get("levels", [])}
    names = list(dict.fromkeys(name for shares in levels.values() for name in shares))
    if not names:
        raise ValueError(
            f"A report needs levels with `teachers`, got {len(levels)} without. Measure co-supervision first."
        )
    # As high as the bars or the legend need, whichever is more.
    figure = _new_figure(width=10, height=max(1.4 + 0.6 * len(levels), 1.0 + 0.24 * len(names)))
    axes = figure.subplots()
    _draw_shares(axes, {f"level {level}": shares for level, shares in levels.items()}, names)
    # Below a certain share only the legend tells who it is, so it always names everybody.
    axes.legend(title="teacher", loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9)
    return _save(figure, path)


def plot_overview(overview: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw what is known without ground truth: whom the student trusted and is like, and the labels of all of them."""
    teachers, own = overview["teachers"], overview["student"]["class_shares"]
    rows = {name: teacher["class_shares"] for name, teacher in teachers.items()} | {"student": own}
    figure = _new_figure(width=12, height=max(1.6 + 0.4 * len(rows), 1.0 + 0.24 * min(len(own), 24)))
    bars, shares = figure.subplots(1, 2, width_ratios=[2, 3])
    for aside, key, title, colour in (
        (-0.2, "trusted", "trusted", _OURS),
        (0.2, "agrees_with_student", "agrees with the student", _OTHERS),
    ):
        values = [100 * (teacher[key] or 0.0) for teacher in teachers.values()]
        bars.barh(np.arange(len(values)) + aside, values, height=0.38, color=colour, label=title)
    bars.set_yticks(range(len(teachers)), list(teachers))
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    bars.set_xlabel("share of the examples (%)")
    bars.legend(frameon=False, fontsize=9)
    _draw_shares(shares, {name: {k: [v or 0.0] for k, v in row.items()} for name, row in rows.items()}, list(own))
    if len(own) <= 24:  # of more, no legend can be read
        shares.legend(title="label", loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8)
    return _save(figure, path)


def plot_group_shares(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw which share of each class or domain every teacher got, a panel for each level below the root."""
    levels = {
        str(level["level"]): level["teachers_by_group"]
        for level in report.get("levels", [])[1:]
        if level.get("teachers_by_group")
    }
    if not levels:
        raise ValueError(
            f"A report needs a level below the root with `teachers_by_group`, got none among "
            f"{len(report.get('levels', []))} levels. Measure co-supervision of several levels first."
        )
    height = max(0.26 * sum(len(rows) + 4 for rows in levels.values()), 2.4)
    figure = _new_figure(width=10, height=height)
    panels = figure.subplots(len(levels), 1, height_ratios=[len(rows) + 3 for rows in levels.values()], squeeze=False)
    for axes, (level, rows) in zip(panels[:, 0], levels.items()):
        names = list(dict.fromkeys(name for shares in rows.values() for name in shares))
        _draw_shares(axes, rows, names)
        axes.set_title(f"level {level}", loc="left", fontsize=11)
        axes.legend(title="teacher", loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8)
    return _save(figure, path)


def plot_levels(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw PGR, and precision and recall of what was kept, level after level, one line for each method."""
    methods = {
        name: numbers["levels"]
        for name, numbers in report.get("methods", {}).items()
        if len(numbers.get("levels", [])) > 1
    }
    if not methods:
        raise ValueError(
            f"A report needs a method with several levels, got {sorted(report.get('methods', {}))} without one. "
            "Measure co-supervision first."
        )
    keys = {
        "pgr": "performance gap recovered",
        "kept_precision": "kept that are right",
        "kept_recall": "kept of those that are right",
    }
    figure = _new_figure(width=13, height=max(3.6, 1.2 + 0.22 * len(methods)))
    panels = figure.subplots(1, len(keys))
    for axes, (key, title) in zip(panels, keys.items()):
        # Co-supervision first, which gives it our colour.
        for position, (name, levels) in enumerate(sorted(methods.items(), key=lambda item: item[0] != "csl")):
            _draw_line(axes, name, position, len(methods), [_numbers(level.get(key)) for level in levels])
        axes.set_xticks(range(max(map(len, methods.values()))))
        axes.margins(x=0.12, y=0.1)
        axes.set_xlabel("level (0 is the root)")
        axes.set_ylabel("%")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="y", alpha=0.3)
    # One legend for all panels: that of the one that shows most methods.
    lines = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
    panels[-1].legend(*lines, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8)
    return _save(figure, path)


def plot_reliability(curves: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draw a reliability diagram for each model: accuracy by confidence, with the diagonal of the calibrated."""
    if not curves:
        raise ValueError("At least one curve is needed, got none. Compute them by `reliability_curve`.")
    columns = min(len(curves), 5)
    rows = -(-len(curves) // columns)
    figure = _new_figure(width=2.4 * columns + 0.6, height=2.5 * rows + 0.6)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, curve) in zip(panels, curves.items()):
        axes.plot([0, 100], [0, 100], color=_OTHERS, linewidth=1)
        count = np.asarray(curve["count"], dtype=float)
        points = np.array(
            [[np.nan if value is None else 100 * value for value in curve[key]] for key in ("confidence", "accuracy")]
        )
        known = count > 0
        axes.plot(*points[:, known], color=_OURS, linewidth=1.4)
        # By area as eyes compare dots; 4 more, so that a bin of few examples is still seen.
        sizes = 90 * count[known] / count.max() + 4
        axes.scatter(*points[:, known], s=sizes, color=_OURS, alpha=0.7, clip_on=False, zorder=3)
        axes.set_title(_title(name), loc="left", fontsize=9)
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axes.grid(alpha=0.3)
    # Panels of the last row that nobody fills would show empty axes.
    for axes in panels[len(curves) :]:
        axes.remove()
    figure.supxlabel("confidence (%)", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
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
        # Behind bar, whisker and every dot, so that no number is written over one.
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


def _draw_shares(axes: Axes, rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    starts = np.zeros(len(rows))
    for position, name in enumerate(names):
        found = [_numbers(shares.get(name)) for shares in rows.values()]
        widths = np.array([values.mean() if len(values) else 0.0 for values in found])
        colour = _COLOURS[position % len(_COLOURS)]
        # Of more than eight, hatches tell apart what has one colour.
        hatch = _HATCHES[position // len(_COLOURS) % len(_HATCHES)]
        style: dict[str, Any] = {"height": 0.7, "color": colour, "hatch": hatch, "edgecolor": "white"}
        bars = axes.barh(range(len(rows)), widths, left=starts, label=name, **style)
        labels = [f"{width:.0f}" if width >= 100 * _SMALLEST_LABELLED_SHARE else "" for width in widths]
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        for text in axes.bar_label(bars, labels, label_type="center", fontsize=9, color=_INK):
            text.set_bbox(box if text.get_text() else None)
        # Shares are stacked: each begins where the one before it ends.
        starts += widths
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the examples (%)")


def _draw_line(axes: Axes, name: str, position: int, num_lines: int, values: Sequence[np.ndarray]) -> None:
    """One method from level to level, moved aside a little so that equal ones stay visible."""
    aside = 0.16 * (position / max(num_lines - 1, 1) - 0.5)
    known = [(row + aside, *mean_and_spread(found.tolist())) for row, found in enumerate(values) if len(found)]
    if not known:
        return
    rows, means, spreads = zip(*known)
    style: dict[str, Any] = {
        "color": _COLOURS[position % len(_COLOURS)],
        "marker": _MARKERS[position // len(_COLOURS) % len(_MARKERS)],
        "linewidth": 2.4 if name == "csl" else 1.3,
        "markersize": 4,
        "capsize": 2,
    }
    has_spread = any(len(found) > 1 for found in values)
    axes.errorbar(rows, means, yerr=spreads if has_spread else None, label=_title(name), **style)


def _title(method: str) -> str:
    return "co-supervised" if method == "csl" else method.replace("_", " ")


def _numbers(values: Any) -> np.ndarray:
    """What is known of one fraction or a list of them, in percent."""
    values = values if isinstance(values, list | tuple) else [values]
    numbers = np.array([np.nan if value is None else 100 * float(value) for value in values])
    # A seed without a value is left out, where a NaN would take the mean of all along.
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
        # Or the grid is drawn over the bars.
        axes.set_axisbelow(True)
    with whole_file(path) as temporary:
        # By the suffix of the file that is meant, for this one is to be renamed.
        figure.savefig(temporary, bbox_inches="tight", format=path.suffix[1:] or "png")
    return path
