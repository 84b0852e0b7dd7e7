"""Tasks x methods x seeds: cells are run once, fail alone, refuse other settings, and add up to the right tables."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import DatasetDict

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
for extra in ("sklearn", "skops", "matplotlib"):
    pytest.importorskip(extra)

import compare  # noqa: E402 - needs the path above
import experiment  # noqa: E402
from comparison import cells as cells_module  # noqa: E402 - needs the path above
from comparison import plan as plan_module  # noqa: E402 - needs the path above
from comparison import tables  # noqa: E402 - needs the path above

METHODS = [
    {"name": "csl", "method": "csl"},
    {"name": "all kept", "method": "csl", "set": {"rejection": ["none"]}},
    {"name": "closed", "method": "generalist", "set": {"head_solver": "ridge"}},
    {"name": "chance", "method": "random"},
    {"name": "control", "method": "one_teacher_all_labels"},
]
NAMES = ["ceiling", "ceiling, head_solver=ridge", "csl", "all kept", "closed", "chance", "control"]


def write_plan(folder: Path, data: Path, student: str, **changes: object) -> list[str]:
    """A task of a few images and steps; gives the command line."""
    recipe = {
        "dataset": str(data),
        "num_teacher_examples": 20,
        "num_pool_examples": 40,
        "teacher_kind": "sklearn",
        "teacher_model": "tree.DecisionTreeClassifier",
        "teacher_trusted_types": ["sklearn.tree._tree.Tree"],
        "teacher_num_examples": 8,
        "teacher_kwargs": {"max_depth": 1},
        "teacher_feature": {"mode": "RGB"},
        "level_sizes": [1, 2],
        "student": student,
        "output_dir": "unused",
        "methods": ["generalist", "csl", "ceiling"],
        "max_steps": 4,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 16,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    plan = {
        "output_dir": str(folder / "out"),
        "seeds": "0,1",
        "num_workers": 0,
        "tasks": [{"name": "tiny", "config": "recipe.yaml", "set": {"max_steps": 20}}],
        "methods": METHODS,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan | changes))
    return ["--config", str(folder / "plan.yaml")]


@pytest.fixture(scope="module")
def data(tiny_image_dataset, tmp_path_factory) -> Path:
    """90 images: the 48 tiny ones, each but a few twice, and to each an old and a new home."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    rows = tiny_image_dataset.select([row % 48 for row in range(90)])
    DatasetDict(train=rows.add_column("home", [f"h{row % 2}" for row in range(90)])).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def done(data, tiny_vit, tmp_path_factory) -> tuple[Path, list[str], str]:
    """A comparison that was run: its folder, its command line, its table."""
    folder = tmp_path_factory.mktemp("compared")
    argv = write_plan(folder, data, tiny_vit)
    assert compare.main(argv) == 0
    return folder / "out", argv, (folder / "out" / "table.md").read_text()


@pytest.fixture
def runs(monkeypatch) -> list[tuple[str, int]]:
    """Every cell that is run from now on."""
    counted: list[tuple[str, int]] = []
    run_cell = cells_module.run_cell

    def count(bench, method):
        counted.append((method.name, bench.group.seed))
        return run_cell(bench, method)

    monkeypatch.setattr(cells_module, "run_cell", count)
    return counted


def read_cell(out: Path, name: str, seed: int = 0) -> dict:
    return json.loads((out / "tasks" / "tiny" / "cells" / f"seed-{seed}" / f"{name}.json").read_text())


# ── one small comparison ────────────────────────────────────────────────────────────────────────────────────────────


def test_every_cell_is_there_and_nothing_else(done):
    out, _, table = done
    cells = out / "tasks" / "tiny" / "cells"
    for seed in (0, 1):
        assert {path.stem for path in (cells / f"seed-{seed}").glob("*.json")} == {*NAMES, "_teachers"}
        assert not list((out / "tasks" / "tiny" / "_run" / f"seed-{seed}" / "work").iterdir())
    assert {path.name for path in out.iterdir()} == {"figures", "results.csv", "results.json", "table.md", "tasks"}
    assert {path.name for path in (out / "figures" / "tiny").iterdir()} == {
        "pgr.png",
        "levels.png",
        "teacher_shares.png",
        "teacher_shares_by_class.png",
        "reliability.png",
    }
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ")][2:] == NAMES


def test_cells_hold_what_was_measured(done):
    out, _, _ = done
    csl, teachers = read_cell(out, "csl"), read_cell(out, "_teachers")
    assert csl["settings"]["method"] == "csl" and csl["settings"]["max_steps"] == 20
    assert csl["levels"]["1"]["accuracy"] == csl["accuracy"] and set(csl["levels"]) == {"0", "1"}
    assert sum(csl["class_accuracy"].values()) / 4 == pytest.approx(csl["accuracy"], abs=0.2)
    assert csl["worst_class_accuracy"] == min(csl["class_accuracy"].values())
    assert sum(csl["reliability"]["count"]) == 30 and 0 <= csl["ece"] <= 1 and csl["runtime"] > 0
    assert 0 <= csl["agreement_pseudolabels"] <= 1
    level = csl["levels"]["1"]
    assert 0 < level["keep_rate"] <= 1 and {"kept_precision", "kept_recall", "assignment_accuracy"} <= set(level)
    assert sum(level["teachers"].values()) == pytest.approx(1.0)
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in level["teachers_by_class"].values())
    assert read_cell(out, "all kept")["levels"]["1"]["keep_rate"] == 1.0
    assert read_cell(out, "closed")["settings"]["head_solver"] == "ridge"
    methods = json.loads((out / "results.json").read_text())["tiny"]["methods"]
    assert 0 <= methods["csl"]["deception_score"][0] <= 1 and "deception_score" not in methods["ceiling"]
    assert set(teachers["teachers"]) == {"generalist", "level-1-0", "level-1-1"}
    assert teachers["weak_accuracy"] == teachers["teachers"]["generalist"]["accuracy"]


def test_numbers_are_those_of_train(done, data, tiny_vit, tmp_path):
    out, argv, _ = done
    task = plan_module.parse_plan(argv).tasks[0]
    run = plan_module.resolve(task)
    run[-1].output_dir = str(tmp_path / "run")
    report = experiment.run_seed(1, *run)
    assert report["weak_accuracy"] == read_cell(out, "_teachers", 1)["weak_accuracy"]
    for name, method in (("csl", "csl"), ("ceiling", "ceiling"), ("control", "one teacher, all labels")):
        assert read_cell(out, name, 1)["accuracy"] == report["methods"][method]["accuracy"]
    assert report["methods"]["ceiling"]["accuracy"] > report["weak_accuracy"]
    results = json.loads((out / "results.json").read_text())["tiny"]
    assert results["methods"]["csl"]["pgr"][1] == report["methods"]["csl"]["pgr"]
    assert [level["accuracy"][1] for level in results["levels"]] == [level["accuracy"] for level in report["levels"]]


def test_a_finished_comparison_runs_nothing_again(done, runs):
    out, argv, table = done
    assert compare.main(argv) == 0 and runs == []
    assert (out / "table.md").read_text() == table


def test_what_is_missing_is_run_and_is_the_same(done, runs, capsys):
    out, argv, _ = done
    before = read_cell(out, "csl", 1)
    (out / "tasks" / "tiny" / "cells" / "seed-1" / "csl.json").unlink()
    assert compare.main(argv) == 0 and runs == [("csl", 1)]
    assert re.search(r"\n1 of 14 cells run in \d+\.\d min\.\n", capsys.readouterr().out)
    assert {**read_cell(out, "csl", 1), "runtime": 0} == {**before, "runtime": 0}


def test_a_ceiling_that_comes_later_gives_a_deception_score_to_all(done, runs):
    out, argv, table = done
    before = json.loads((out / "results.json").read_text())["tiny"]["methods"]
    for suffix in (".json", ".npz"):
        (out / "tasks" / "tiny" / "cells" / "seed-0" / f"ceiling{suffix}").unlink()
    assert compare.main(argv) == 0 and runs == [("ceiling", 0)]
    after = json.loads((out / "results.json").read_text())["tiny"]["methods"]
    assert all(after[name]["deception_score"] == before[name]["deception_score"] for name in ("csl", "chance"))


def test_one_more_seed_and_a_part_of_the_methods(done, runs):
    _, argv, _ = done
    assert compare.main([*argv, "--methods", "closed", "--seeds", "0,2"]) == 0
    assert runs == [("ceiling, head_solver=ridge", 2), ("closed", 2)]


def test_other_settings_are_refused_before_anything_runs(done, data, tiny_vit, runs):
    out, argv, _ = done
    others = [{**METHODS[0], "set": {"rejection_k": 1}}, *METHODS[1:], {"name": "new", "method": "ensemble"}]
    write_plan(out.parent, data, tiny_vit, methods=others)
    with pytest.raises(
        FileExistsError, match=r"csl.json' must be a cell .* got another one \(rejection_k: None -> 1;"
    ):
        compare.main(argv)
    task = {"name": "tiny", "config": "recipe.yaml", "set": {"max_steps": 20, "teacher_num_examples": 9}}
    write_plan(out.parent, data, tiny_vit, tasks=[task], methods=[{"name": "new", "method": "ensemble"}])
    with pytest.raises(FileExistsError, match="teacher_num_examples: 8 -> 9"):
        compare.main([*argv, "--seeds", "7"])
    write_plan(out.parent, data, tiny_vit)
    assert runs == [] and not (out / "tasks" / "tiny" / "cells" / "seed-7").exists()


def test_a_cell_that_fails_stops_no_other(data, tiny_vit, tmp_path, monkeypatch, capsys):
    methods = [METHODS[0], {"name": "doomed", "method": "ensemble", "set": {"learning_rate": 0.01}}, METHODS[3]]
    task = {
        "name": "tiny",
        "config": "recipe.yaml",
        "set": {"oracle_domain_column": "home", "specialize_by": "domain", "assignment": ["agreement"]},
    }
    argv = write_plan(tmp_path, data, tiny_vit, methods=methods, tasks=[task], seeds="0")
    measure = cells_module.measure

    def fail(trainer, bench):
        if trainer.args.learning_rate == 0.01:
            raise RuntimeError("no luck\ntoday")
        return measure(trainer, bench)

    monkeypatch.setattr(cells_module, "measure", fail)
    assert compare.main(argv) == 1
    out, error = tmp_path / "out", tmp_path / "out" / "tasks" / "tiny" / "cells" / "seed-0" / "doomed.error.txt"
    printed = capsys.readouterr().out
    first = error.with_name("ceiling, learning_rate=0.01.error.txt")
    assert f"Failed: tiny, seed 0: ceiling, learning_rate=0.01; doomed: today ({first})" in printed
    assert "RuntimeError: no luck" in error.read_text()
    assert read_cell(out, "csl")["worst_domain_accuracy"] == min(read_cell(out, "csl")["domain_accuracy"].values())
    table = (out / "table.md").read_text()
    assert "worst domain" in table and "| chance |" in table and "doomed" not in table
    assert (out / "figures" / "tiny" / "teacher_shares_by_domain.png").is_file()
    monkeypatch.undo()
    assert compare.main(argv) == 0 and not error.exists()
    assert "| doomed |" in (out / "table.md").read_text()


def test_a_task_that_cannot_be_prepared_fails_in_all_its_cells(data, tiny_vit, tmp_path, capsys):
    tasks = [
        {"name": name, "config": "recipe.yaml", "set": {} if name == "fine" else {"num_pool_examples": 99}}
        for name in ("large", "fine")
    ]
    argv = write_plan(tmp_path, data, tiny_vit, tasks=tasks, methods=METHODS[:1], seeds="3")
    assert compare.main(argv) == 1
    printed = capsys.readouterr().out
    assert "Failed: large, seed 3: ceiling; csl: ValueError: Teachers and pool need 119 examples together" in printed
    assert "## fine" in printed and "Failed: fine" not in printed


def test_methods_that_use_labels_or_features(data, tiny_vit, tmp_path, capsys):
    methods = [
        METHODS[0],
        {"name": "calibrated", "method": "csl", "calibrated": True},
        {"name": "control", "method": "one_teacher_all_labels", "calibrated": True},
        {"name": "boosting", "method": "boosting"},
        {"name": "CROWDLAB", "method": "crowdlab"},
        {"name": "AE-KD", "method": "aekd"},
    ]
    recipe = {"num_pool_examples": 30, "num_heldout_examples": 26, "max_steps": 20, "teacher_kwargs": {"max_depth": 2}}
    tasks = [
        {"name": "tiny", "config": "recipe.yaml", "seeds": 3, "set": recipe},
        {"name": "bare", "config": "recipe.yaml", "seeds": "4,5", "methods": ["boosting", "AE-KD"]},
    ]
    argv = write_plan(tmp_path, data, tiny_vit, methods=methods, tasks=tasks)
    assert compare.main([*argv, "--tasks", "tiny"]) == 0
    names = [method["name"] for method in methods]
    cells = {name: read_cell(tmp_path / "out", name, 3) for name in names}
    assert sum(cells["csl"]["reliability"]["count"]) == 14  # of 40, for all methods
    assert cells["calibrated"]["settings"]["calibrated"] and "calibrated" not in cells["csl"]["settings"]
    task, plans = plan_module.parse_plan(argv).tasks[0], plan_module.parse_plan(argv).methods
    bench = cells_module.Bench(cells_module.Group(task, plans, 3, str(tmp_path / "out")))
    trainers = {method.name: bench.make_trainer(bench.enter(method, tmp_path / method.name)) for method in plans}
    assert all("temperature" in facts for facts in trainers["calibrated"].pool.facts.values())
    assert "temperature" in trainers["control"].pool.facts["all-labels"]
    assert [trainers[name].pool.hierarchy.names for name in names[3:5]] == [("boosting",), ("crowdlab",)]
    assert trainers["AE-KD"].loss_func is not None and trainers["csl"].loss_func is None
    ids = [set(part.pool.ids) for part in (trainers["csl"], trainers["boosting"])]
    assert ids[0] == ids[1] and len(bench.split.heldout) == 26

    run = plan_module.resolve(task)
    run[3].calibrate_teachers, run[-1].output_dir = True, str(tmp_path / "run")
    report = experiment.run_seed(3, *run)["methods"]
    assert report["csl"]["accuracy"] == cells["calibrated"]["accuracy"]
    assert report["one teacher, all labels"]["accuracy"] == cells["control"]["accuracy"]

    assert compare.main([*argv, "--tasks", "bare"]) == 1
    printed = capsys.readouterr().out
    assert "Failed: bare, seed 5: boosting: ValueError: Task 'bare' has no labelled examples to spare" in printed
    assert "bare, seed 4: AE-KD" in printed and "seed 3" not in printed.split("## bare")[1]
    assert plan_module.parse_plan([*argv, "--seeds", "7"]).tasks[1].seeds == "7"


@pytest.mark.slow
def test_side_by_side_is_the_same(done, data, tiny_vit, tmp_path):
    argv = write_plan(tmp_path, data, tiny_vit)
    command = [sys.executable, str(RECIPES / "compare.py"), *argv, "--num_workers", "2", "--methods", "csl"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "CI": "true"})
    assert finished.returncode == 0, finished.stderr[-3000:]
    for seed in (0, 1):
        ours, theirs = (read_cell(out, "csl", seed) for out in (done[0], tmp_path / "out"))
        assert ours["levels"] == theirs["levels"] and ours["ece"] == pytest.approx(theirs["ece"])


def die(group: cells_module.Group) -> None:
    """What a process does that runs out of memory."""
    os._exit(7)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_of_its_cells(data, tiny_vit, tmp_path, monkeypatch, capsys):
    argv = write_plan(tmp_path, data, tiny_vit, methods=METHODS[:1])
    monkeypatch.setattr(cells_module, "run_group", die)
    assert compare.main([*argv, "--num_workers", "1", "--seeds", "0"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("ceiling; csl: The process ended with exit code 7") == 1


# ── numbers by hand ─────────────────────────────────────────────────────────────────────────────────────────────────


def level(accuracy: float, **teachers: float) -> dict:
    return {"accuracy": accuracy, "keep_rate": 1.0, "teachers": teachers, "teachers_by_class": {"a": teachers}}


@pytest.fixture
def groups(tmp_path) -> list[cells_module.Group]:
    """Two seeds of made-up cells; with the second, one of them is missing."""
    methods = [
        plan_module.Method("ceiling", "ceiling"),
        plan_module.Method("ceiling, loss=x", "ceiling", {"loss": "x"}),
        plan_module.Method("csl", "csl"),
        plan_module.Method("other", "csl", {"loss": "x"}),
    ]
    accuracy = {
        "ceiling": (0.9, 0.8),
        "ceiling, loss=x": (1.0, 0.9),
        "csl": (0.7, 0.7),
        "other": (0.75, None),
    }
    groups = [cells_module.Group(plan_module.Task("t", "x.yaml"), methods, seed, str(tmp_path)) for seed in (4, 5)]
    for row, group in enumerate(groups):
        curve = {"confidence": [0.5, None], "accuracy": [0.25, None], "count": [4, 0]}
        teachers = {"root": {"accuracy": 0.5, "ece": 0.25, "reliability": curve}}
        group.results.save(plan_module.TEACHERS, {"weak_accuracy": 0.5, "teachers": teachers})
        for name, values in accuracy.items():
            if values[row] is not None:
                levels = {
                    "0": level(0.6, root=1.0),
                    "1": level(values[row], low=1.0, **({"root": 0.5} if row else {})),
                }
                levels = levels if name in ("csl", "other") else {"0": level(values[row], truth=1.0)}
                numbers = {"accuracy": values[row], "worst_class_accuracy": 0.125, "ece": 0.03, "runtime": 2.0 + row}
                content = {"settings": {}, "levels": levels, "reliability": curve, **numbers}
                group.results.save(name, content)
    return groups


def test_collected_numbers(groups):
    report = tables.collect(groups)
    # (0.7 - 0.5) / 0.4, 0.2 / 0.3; the other one against its own ceiling: 0.25 / 0.5
    assert report["methods"]["csl"]["pgr"] == pytest.approx([0.5, 2 / 3])
    assert report["methods"]["other"]["pgr"] == [0.5, None]
    assert report["methods"]["other"]["accuracy"] == [0.75, None]
    assert report["levels"][0]["pgr"] == pytest.approx([0.25, 1 / 3])
    # a teacher that got nothing with one seed; and nothing is known of a cell that is missing
    assert report["levels"][1]["teachers"] == {"low": [1.0, 1.0], "root": [0.0, 0.5]}
    assert report["levels"][1]["teachers_by_class"]["a"]["root"] == [0.0, 0.5]
    assert report["methods"]["other"]["levels"][1]["teachers"] == {"low": [1.0, None]}


def test_table_by_hand(groups):
    lines = tables.format_table(tables.collect(groups), "t").splitlines()
    assert lines[0] == "## t" and lines[2].startswith("Seeds 4, 5; weak teacher 50.0 ± 0.0. All in percent")
    assert lines[2].endswith("deception counts a model as sure from 75 % on.")
    assert lines[4] == (
        "| method | accuracy | PGR | PGR, one ceiling | PGR against csl | seeds won | worst class "
        "| calibration error | deception | time, s |"
    )
    # 85 ± 7.07; PGR 50 and 66.7: 58.3 ± 11.8; the other one lost nothing and won nothing on the one seed it
    # has; against the other's ceiling that one is at 0.25 / 0.4
    assert lines[6] == "| ceiling | 85.0 ± 7.1 | 100.0 ± 0.0 | 100.0 ± 0.0 |  |  | 12.5 ± 0.0 | 3.0 ± 0.0 |  | 2.5 |"
    assert lines[8] == "| csl | 70.0 ± 0.0 | 58.3 ± 11.8 | 58.3 ± 11.8 |  |  | 12.5 ± 0.0 | 3.0 ± 0.0 |  | 2.5 |"
    assert lines[9] == "| other | 75.0 | 50.0 | 62.5 | +0.0 | 0 of 1 | 12.5 | 3.0 |  | 2.0 |"


def test_a_table_of_another_metric(groups, tmp_path):
    for group in groups:  # twice as far from 1 as accuracy
        for name in (plan_module.TEACHERS, *(method.name for method in group.methods)):
            if facts := group.results.read(name):
                numbers = [facts, *facts.get("levels", {}).values()] if name != plan_module.TEACHERS else []
                for own in numbers:
                    own["mcc"] = 2 * own["accuracy"] - 1
                known = {"metric": "mcc", "weak_mcc": 0.0} if name == plan_module.TEACHERS else {}
                group.results.save(name, facts | known)
    report = tables.collect(groups)
    assert report["metric"] == "mcc" and report["methods"]["csl"]["pgr"] == pytest.approx([0.5, 2 / 3])
    lines = tables.write_results({"t": report}, tmp_path / "out").splitlines()
    assert lines[2].startswith("Seeds 4, 5; weak teacher 0.0 ± 0.0.") and lines[4].startswith("| method | mcc | PGR |")
    assert lines[8].startswith("| csl | 40.0 ± 0.0 | 58.3 ± 11.8 |")


def test_tidy_rows_and_files(groups, tmp_path):
    tables.write_results({"t": tables.collect(groups)}, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["method"], row["seed"], row["metric"]): float(row["value"]) for row in rows}
    assert {row["task"] for row in rows} == {"t"} and len(found) == len(rows)
    assert found["csl", "4", "pgr"] == pytest.approx(0.5) and found["csl", "5", "level-1/teachers/root"] == 0.5
    assert found["csl", "4", "level-1/teachers_by_class/a/low"] == 1.0
    assert found["teachers", "5", "root/ece"] == 0.25 and found["teachers", "4", "weak_accuracy"] == 0.5
    assert ("other", "5", "accuracy") not in found and not any("reliability" in row["metric"] for row in rows)
    assert json.loads((tmp_path / "results.json").read_text())["t"]["methods"]["csl"]["accuracy"] == [0.7, 0.7]


def test_tables_of_nothing(tmp_path):
    group = cells_module.Group(plan_module.Task("t", "x.yaml"), [plan_module.Method("csl", "csl")], 0, str(tmp_path))
    text = tables.write_results({"t": tables.collect([group])}, tmp_path)
    assert text.startswith("## t") and not (tmp_path / "figures").exists()


def test_bins_of_several_seeds():
    # 1 of 3 right and 3 of 3 right: 4 of 6; confidences 0.5 and 0.7; the second bin is empty with one seed, the third
    # with all; one seed is missing
    pooled = tables.pool_curves(
        {
            "confidence": [[0.5, 0.9, None], None, [0.7, None, None]],
            "accuracy": [[1 / 3, 1.0, None], None, [1.0, None, None]],
            "count": [[3, 2, 0], None, [3, 0, 0]],
        }
    )
    assert pooled["count"] == [6, 2, 0]
    np.testing.assert_allclose(pooled["accuracy"], [2 / 3, 1.0, math.nan])
    np.testing.assert_allclose(pooled["confidence"], [0.6, 0.9, math.nan])


def test_who_taught_whom():
    shares = cells_module.share_out(np.array([0, 0, 2, -1]), ["x", "y", "z"], {"class": ["a", "b", "b", "b"]})
    assert shares["teachers"] == {"x": 0.5, "z": 0.25}
    assert shares["teachers_by_class"]["a"] == {"x": 1.0, "z": 0.0}
    assert shares["teachers_by_class"]["b"] == pytest.approx({"x": 1 / 3, "z": 1 / 3})


# ── what is compared ────────────────────────────────────────────────────────────────────────────────────────────────


def test_methods_share_the_ceiling_of_their_training():
    no_ceiling = {"rejection_k": 1, "relabel_above": 0.9, "rounds_per_level": 2, "cross_fit_folds": 5}
    methods = [
        plan_module.Method("a", "csl"),
        plan_module.Method("b", "csl", no_ceiling | {"teacher_neighbors": 3}),
        plan_module.Method("c", "csl", {"learning_rate": 0.1, "rejection": ["none"]}),
        plan_module.Method("d", "generalist", {"learning_rate": 0.1}),
        plan_module.Method("top", "ceiling"),
        plan_module.Method("e", "csl", {"loss_kwargs": {"q": 0.5}}, ["elsewhere"]),
    ]
    own = plan_module.methods_of(plan_module.Task("t", "x.yaml"), methods)
    assert [method.name for method in own] == ["top", "ceiling, learning_rate=0.1", "a", "b", "c", "d"]
    assert own[1].set == {"learning_rate": 0.1} and own[1].method == "ceiling"
    assert [plan_module.ceiling_of(method, own) for method in own] == [
        "top",
        "ceiling, learning_rate=0.1",
        "top",
        "top",
        "ceiling, learning_rate=0.1",
        "ceiling, learning_rate=0.1",
    ]
    elsewhere = plan_module.methods_of(plan_module.Task("elsewhere", "x.yaml"), methods)
    assert "ceiling, loss_kwargs=q-0.5" in [method.name for method in elsewhere]
    few = plan_module.methods_of(plan_module.Task("t", "x.yaml", methods=["d", "e"]), methods)
    assert [method.name for method in few] == ["ceiling, learning_rate=0.1", "d"]


@pytest.mark.parametrize("name", ["compare.yaml", "compare_finetuning.yaml"])
def test_the_plans_that_come_with_it_are_readable(name):
    plan = plan_module.parse_plan(["--seeds", "0", "--config", str(RECIPES / name)])
    cells = [(task, method) for task in plan.tasks for method in plan_module.methods_of(task, plan.methods)]
    assert {name for method in plan.methods for name in method.tasks or ()} <= {task.name for task in plan.tasks}
    tasks, methods = ({cell[which].name: cell for cell in cells}.values() for which in (0, 1))
    for task, method in [*tasks, *methods]:  # every task, and every method on one task
        settings = plan_module.cell_settings(task, method)
        assert "output_dir" not in settings and "seed" not in settings and settings["method"] == method.method
        assert all(settings.get(key, value) == value for key, value in method.set.items())
        if method.calibrated or method.method == "boosting":
            assert all(plan_module.resolve(task)[0].num_heldout_examples > 9 for task, own in cells if own == method)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"methods": [{"name": "x", "method": "magic"}]},
            [],
            r"`method` of 'x' must be one of \['generalist'.*'magic'",
        ),
        ({"methods": [{"name": "x", "method": "csl", "set": {"dataset": "y"}}]}, [], r"fields .* got \['dataset'\]"),
        (
            {"methods": [{"name": "x"}]},
            [],
            r"A method has `name`, `method` and maybe \['set', 'tasks', 'calibrated'\], got",
        ),
        ({"methods": [METHODS[0], METHODS[0]]}, [], r"Names of methods must be unique, got \['csl'\]"),
        ({"tasks": [{"name": "../x", "config": "y"}]}, [], "A name must be letters.*got '../x'"),
        (
            {"tasks": [{"name": "x", "config": "y", "methods": ["cls"]}]},
            [],
            r"`methods` of task 'x' must be among \['csl', .*got \['cls'\]",
        ),
        (
            {"tasks": [{"name": "x", "config": "y", "features": "mean"}]},
            [],
            "`features` of task 'x' must be 'mean_pooled', got 'mean'",
        ),
        (
            {"methods": [{"name": "x", "method": "csl", "calibrated": 1}]},
            [],
            "`calibrated` of 'x' must be bool, got 1",
        ),
        ({}, ["--tasks", "big"], r"`--tasks` must be among \['tiny'\], got \['big'\]"),
        ({"method": []}, [], "Did you mean `methods`"),
    ],
)
def test_bad_plans_are_one_clear_error(changes, arguments, message, data, tiny_vit, tmp_path):
    argv = write_plan(tmp_path, data, tiny_vit, **changes)
    with pytest.raises(ValueError, match=message):
        compare.main([*argv, *arguments])
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_are_told_with_task_and_method(data, tiny_vit, tmp_path):
    methods = [{"name": "odd", "method": "csl", "set": {"learning_rate": "fast"}}]
    with pytest.raises(ValueError, match="`learning_rate` in '.*tiny, .*yaml' must be float, got 'fast'"):
        compare.main(write_plan(tmp_path, data, tiny_vit, methods=methods))
