"""The benchmark at a tiny scale: that it runs, says what it found, and compares like with like."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
import benchmark
from benchmarks import head
from benchmarks import task as task_module

SECTIONS = ("head", "head_1000", "labelling", "finetune", "gather", "growth", "truncation", "scale")
ROW_KEYS = {
    "section",
    "device",
    "name",
    "unit",
    "ours",
    "other",
    "comparison",
    "ratio",
    "target",
    "met",
    "note",
    "numbers",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sections give at a scale at which they take seconds."""
    folder = tmp_path_factory.mktemp("benchmark")
    everything: dict[str, Any] = {"rows": []}
    for name, scale in [*((name, "0.005") for name in SECTIONS[:-1]), ("scale", "0.0005")]:
        path = folder / f"{name}.json"
        benchmark.main(
            [
                "--sections",
                name,
                "--scale",
                scale,
                "--repeats",
                "1",
                "--threads",
                "1",
                "--output_file",
                str(path),
                "--work_dir",
                str(folder),
            ]
        )
        part = json.loads(path.read_text(encoding="utf-8"))
        everything = {**part, "rows": everything["rows"] + part["rows"]}
    everything["left"] = sorted(path.name for path in folder.iterdir())
    return everything


@pytest.fixture
def bench(tmp_path: Path) -> task_module.Bench:
    """Two repeats on the CPU."""
    return task_module.Bench(task_module.BenchmarkArguments(repeats=2, threads=1), torch.device("cpu"), tmp_path)


def numbers_of(value: Any) -> Iterator[float]:
    """Every number in nested dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_of(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.slow
def test_every_section_gives_rows_of_finite_numbers(found):
    assert {row["section"] for row in found["rows"]} == set(SECTIONS)
    for row in found["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["ours"]) == {"median", "min", "max", "mean"}
        assert all(math.isfinite(number) for number in numbers_of(row)), row
        assert row["other"] is not None or row["comparison"] == "ours"
        if row["unit"] in ("s", "GB", "rows/s"):
            assert row["ours"]["min"] > 0, row


@pytest.mark.slow
def test_the_file_says_where_and_how_it_was_measured(found):
    assert found["arguments"]["scale"] == 0.0005 and found["arguments"]["repeats"] == 1
    assert {"date", "cpu", "cores", "threads", "memory_gb", "gpu", "versions"} <= set(found["machine"])
    assert {"hf_cosupervise", "torch", "transformers"} <= set(found["machine"]["versions"])
    # Another size than that of the targets.
    assert all(row["target"] is None and row["met"] is None for row in found["rows"])
    # No file of a run is left, and none of the result is half written.
    assert found["left"] == sorted(f"{name}.json" for name in SECTIONS)


@pytest.mark.slow
def test_contestants_do_the_same_work(found):
    labelling = [row for row in found["rows"] if row["section"] == "labelling"]
    # The networks are random, so two of their answers may lie closer together than the kernels' rounding.
    assert [row["numbers"]["same_labels"] > 0.95 for row in labelling] == [True] * 8
    (gather,) = (row for row in found["rows"] if row["section"] == "gather")
    assert gather["numbers"]["same_labels"] == 1.0


@pytest.mark.slow
def test_truncation_costs_less_the_more_is_kept(found):
    rows = [row for row in found["rows"] if row["section"] == "truncation" and "made-up" in row["name"]]
    costs = [row["numbers"]["total_variation"] for row in rows]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 1e-3
    assert rows[-1]["numbers"]["agreement_in_percent"] == 100.0


def test_trainer_and_released_loop_learn_the_same(bench):
    size = task_module.TaskSize(3000, 32, 10, (1, 2, 5), 1500, num_test=4000)
    seconds, accuracies = head.race_heads(bench, size, ("steps",), same_task=False)
    assert [set(took) for took in seconds] == [{"steps", "released", "bare"}] * 2
    for accuracy in accuracies:
        assert accuracy["steps"] > 70  # the generalist is right on about 65 %
        assert accuracy["steps"] == pytest.approx(accuracy["released"], abs=1.0)


def test_the_task_is_what_it_says():
    size = task_module.TaskSize(3000, 64, 10, (1, 2, 5), 1)
    task = task_module.make_task(size, seed=1)
    again = task_module.make_task(size, seed=1)
    assert torch.equal(task.features, again.features) and torch.equal(task.test_labels, again.test_labels)
    assert not torch.equal(task.features, task_module.make_task(size, seed=2).features)
    assert task.hierarchy.names == tuple(task.predictions)
    for teacher in task.hierarchy.teachers:
        probs = task.predictions[teacher.name]
        np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
        scope = range(10) if teacher.scope is None else [int(label) for label in teacher.scope]
        assert set(probs.argmax(axis=1)) == set(scope)


def test_contestants_take_turns(bench):
    order: list[str] = []
    contestants = {name: lambda name=name: order.append(name) for name in "ab"}
    for repeat in range(3):
        bench.race(contestants, repeat)
    assert order == list("abbaab")


def test_a_row_is_held_against_its_target():
    row = task_module.Row("x", [1.0, 2.0, 4.0], [8.0, 8.0, 8.0], target=task_module.Target(low=4))
    facts = row.to_dict(with_target=True)
    assert facts["ratio"] == {"median": 4.0, "min": 2.0, "max": 8.0, "mean": pytest.approx(14 / 3)}
    assert (facts["target"], facts["met"]) == ("≥ 4", True)
    assert row.to_dict(with_target=False)["met"] is None
    closer = task_module.Row("x", [70.1, 70.9], [70.0, 70.0], "ours - other", task_module.Target(-0.3, 0.3, by="mean"))
    assert closer.to_dict(with_target=True)["met"] is False
    text = benchmark.format_rows([{"section": "s", "device": "cpu", **facts}])
    assert (
        text.splitlines()[-1]
        == "| s | x | 2.00 (1.00 … 4.00) s | 8.00 s | 4.00 (2.00 … 8.00) (other / ours) | ≥ 4 ✓ |  |"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sections", "hed"], r"`sections` must be among \['head'.*got \['hed'\]. Correct the name"),
        (["--scale", "0"], "`scale` positive, got 5, 2 and 0.0"),
        (["--section", "head"], "must hold known options only, got `--section`"),
    ],
    ids=["section", "scale", "option"],
)
def test_bad_arguments_are_one_clear_error(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        benchmark.main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_work_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen: list[Path] = []
    measure = benchmark.Section(
        lambda bench: seen.append(bench.folder) or [task_module.Row("x", [1.0], comparison="ours")]
    )
    monkeypatch.setitem(benchmark.SECTIONS, "gather", measure)
    benchmark.main(["--sections", "gather", "--work_dir", "missing/folder", "--threads", "1"])
    # Absolute from Python 3.12 on.
    assert [folder.parent.resolve() for folder in seen] == [Path("missing/folder").resolve()]
    with pytest.raises(OSError, match="`work_dir` must be a folder that can be written, got 'benchmark.json'"):
        benchmark.main(["--sections", "gather", "--work_dir", "benchmark.json", "--threads", "1"])
    assert len(seen) == 1
