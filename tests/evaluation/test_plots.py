"""Pictures are drawn from any honest report, whole or not at all, without touching pyplot."""

from __future__ import annotations

import builtins
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_cosupervise.evaluation.plots import (
    plot_group_shares,
    plot_levels,
    plot_pgr,
    plot_reliability,
    plot_teacher_shares,
)

pytestmark = pytest.mark.core

pytest.importorskip("matplotlib")


@pytest.fixture
def report() -> dict[str, Any]:
    shares = {f"specialist-{number}": [0.1, 0.12, None] for number in range(10)}
    levels = [
        {"level": 0, "pgr": [0.5, 0.52, 0.51], "keep_rate": [1.0] * 3, "teachers": {"generalist": [1.0, 1.0, 1.0]}},
        {"level": 1, "pgr": [0.6, None, 0.7], "keep_rate": [0.8] * 3, "teachers": shares},
    ]
    methods = {
        "generalist": {"accuracy": [0.7, 0.7, 0.7], "pgr": [0.5, 0.52, 0.51]},
        "csl": {"accuracy": [0.8, 0.8, 0.8], "pgr": [0.6, float("nan"), 0.7]},
        "majority_vote": {"accuracy": [0.5, 0.5, 0.5], "pgr": [-0.2, -0.1, -0.3]},
        "unmeasured": {"accuracy": [0.5, 0.5, 0.5]},
        "ceiling": {"accuracy": [0.9, 0.9, 0.9], "pgr": [1.0, 1.0, 1.0]},
    }
    return {"seeds": [0, 1, 2], "weak_accuracy": [0.6, 0.6, 0.6], "methods": methods, "levels": levels}


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, to look at what it holds."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def test_pgr_has_a_bar_per_measured_method_and_a_panel_of_levels(report, figures, tmp_path):
    from matplotlib.collections import PathCollection

    path = plot_pgr(report, tmp_path / "new" / "pgr.png")
    assert Image.open(path).size[0] > 1000
    assert [file.name for file in path.parent.iterdir()] == ["pgr.png"]
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["generalist", "co-supervised", "majority vote"]
    assert [bar.get_width() for bar in left.patches] == pytest.approx([51.0, 65.0, -20.0])
    assert [text.get_text() for text in left.texts] == ["51.0 ± 1.0", "65.0 ± 7.1", "-20.0 ± 10.0"]
    dots = [item for item in left.collections if isinstance(item, PathCollection)]
    assert [len(item.get_offsets()) for item in dots] == [3, 2, 3]
    assert right.lines[0].get_ydata().tolist() == pytest.approx([51.0, 65.0])
    assert "%" in left.get_xlabel() and "%" in right.get_ylabel() and right.get_xlabel().startswith("level")


def test_one_seed_has_no_spread_and_no_dots(figures, tmp_path):
    report = {"methods": {"csl": {"pgr": [0.6]}}, "levels": []}
    plot_pgr(report, tmp_path / "pgr.png")
    (only,) = figures[0].axes
    assert [text.get_text() for text in only.texts] == ["60.0"] and not only.collections


def test_shares_stack_to_what_was_answered(report, figures, tmp_path):
    path = plot_teacher_shares(report, tmp_path / "shares.svg")
    assert path.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    (axes,) = figures[0].axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert max(ends) == pytest.approx(110.0)  # 10 teachers of 11 % in this made-up level
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == ["generalist", "specialist-0"]
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches}
    assert len(looks) == 11  # more teachers than colours stay told apart


def test_levels_have_a_line_per_method_of_several(figures, tmp_path):
    def level(number: int, pgr: list[float | None], precision: float) -> dict[str, Any]:
        return {"level": number, "pgr": pgr, "kept_precision": [precision, precision], "kept_recall": [1.0, None]}

    methods = {
        "top-1": {"levels": [level(0, [0.1, 0.3], 0.5), level(1, [0.5, None], 0.75), level(2, [None, None], 0.8)]},
        "csl": {"levels": [level(0, [0.1, 0.3], 0.5), level(1, [0.6, 0.8], 0.9)]},
        "ensemble": {"levels": [level(0, [0.1, 0.2], 0.5)]},
    }
    path = plot_levels({"methods": methods}, tmp_path / "levels.png")
    assert Image.open(path).size[0] > 1000
    pgr, precision, recall = figures[0].axes
    assert [text.get_text() for text in recall.get_legend().get_texts()] == ["co-supervised", "top-1"]  # ours first
    lines = [container.lines[0] for container in pgr.containers]
    np.testing.assert_allclose(lines[0].get_ydata(orig=False), [20, 70])
    np.testing.assert_allclose(lines[1].get_ydata(orig=False), [20, 50])  # nothing is known of its last level
    np.testing.assert_allclose(np.round(lines[1].get_xdata(orig=False)), [0, 1])
    np.testing.assert_allclose(precision.containers[1].lines[0].get_ydata(orig=False), [50, 75, 80])
    assert lines[0].get_color() != lines[1].get_color()


def test_levels_of_one_seed_without_ground_truth_in_the_pool(figures, tmp_path):
    levels = [{"level": number, "pgr": [0.1 * number]} for number in range(2)]
    plot_levels({"methods": {"csl": {"levels": levels}}}, tmp_path / "levels.png")
    assert [len(axes.containers) for axes in figures[0].axes] == [1, 0, 0]
    assert figures[0].axes[-1].get_legend() is not None


def test_shares_of_groups_have_a_panel_per_level(figures, tmp_path):
    shares = {"ant": {"low": [1.0, 0.5], "high": [0.0, 0.5]}, "bee": {"low": [0.25, 0.25], "high": [0.75, None]}}
    root = {"level": 0, "teachers_by_group": {"ant": {"root": [1.0, 1.0]}}}
    report = {"levels": [root, {"level": 1, "teachers_by_group": shares}, {"level": 2, "teachers_by_group": shares}]}
    plot_group_shares(report, tmp_path / "shares.png")
    first, second = figures[0].axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("level 1", "level 2")
    assert [label.get_text() for label in first.get_yticklabels()] == ["ant", "bee"]
    assert [bar.get_width() for bar in first.patches] == pytest.approx([75, 25, 25, 75])
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["low", "high"]


def test_reliability_diagrams(figures, tmp_path):
    full = {"confidence": [0.3, None, 0.9], "accuracy": [0.5, None, 0.8], "count": [1, 0, 3]}
    curves = {f"teacher-{number}": full for number in range(6)} | {"csl": {**full, "accuracy": [1.0, math.nan, 0.7]}}
    plot_reliability(curves, tmp_path / "reliability.png")
    panels = figures[0].axes
    assert [axes.get_title(loc="left") for axes in panels][-2:] == ["teacher-5", "co-supervised"] and len(panels) == 7
    diagonal, curve = panels[0].lines
    assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist() == [0, 100]
    np.testing.assert_allclose(curve.get_xydata(), [[30, 50], [90, 80]])  # an empty bin has no dot
    sizes = panels[0].collections[0].get_sizes()
    assert sizes[1] == pytest.approx(94) and sizes[0] == pytest.approx(34)
    np.testing.assert_allclose(panels[-1].lines[1].get_ydata(), [100, 70])


def test_a_report_that_went_through_json_gives_the_same_picture(report, tmp_path):
    for method in report["methods"].values():
        method["pgr"] = [None if value != value else value for value in method.get("pgr", [])]
    first = plot_pgr(report, tmp_path / "a.png")
    second = plot_pgr(json.loads(json.dumps(report)), tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


@pytest.mark.parametrize(
    ("plot", "report", "sentence"),
    [
        (
            plot_pgr,
            {"methods": {"csl": {"pgr": [None]}}},
            "A report needs a method with a PGR, got ['csl'] without one. "
            "Measure weak teacher, student and ceiling first.",
        ),
        (
            plot_teacher_shares,
            {"levels": [{"level": 0}]},
            "A report needs levels with `teachers`, got 1 without. Measure co-supervision first.",
        ),
        (
            plot_group_shares,
            {"levels": [{"level": 0, "teachers_by_group": {"a": {"root": [1.0]}}}]},
            "A report needs a level below the root with `teachers_by_group`, got none among 1 levels. "
            "Measure co-supervision of several levels first.",
        ),
        (
            plot_levels,
            {"methods": {"ensemble": {"levels": [{"level": 0}]}, "plain": {}}},
            "A report needs a method with several levels, got ['ensemble', 'plain'] without one. "
            "Measure co-supervision first.",
        ),
        (plot_reliability, {}, "At least one curve is needed, got none. Compute them by `reliability_curve`."),
    ],
)
def test_a_report_without_numbers(plot, report, sentence, tmp_path):
    with pytest.raises(ValueError) as error:
        plot(report, tmp_path / "x.png")
    assert str(error.value) == sentence
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_picture(report, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "pgr.png"
    path.write_bytes(b"old")

    def fail(self: Figure, target: Path, **kwargs: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_pgr(report, path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["pgr.png"]


def test_pyplot_stays_out(report, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_pgr(report, tmp_path / "pgr.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_error_names_the_extra(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError) as error:
        plot_pgr(report, tmp_path / "pgr.png")
    assert str(error.value) == (
        'Plots need matplotlib, which is not installed. Run `pip install "hf_cosupervise[plots]"`.'
    )
