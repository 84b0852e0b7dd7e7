"""Votes in a CSV file to a trained student: the five lines, and the two recipes for votes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_cosupervise.pool.derived import pool_votes

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
README = (RECIPES / "README.md").read_text(encoding="utf-8")
WORDS = {"bad": ["stings", "barks"], "good": ["purrs", "hums"]}  # which the tiny tokenizer knows


def write_votes(path: Path, num_rows: int, seed: int, truth: bool = False) -> list[tuple[str, str]]:
    """Texts with a word that tells the label, and six functions that each say one label or nothing."""
    rng = np.random.default_rng(seed)
    rows, known = [], []
    for row in range(num_rows):
        label = ("bad", "good")[int(rng.integers(2))]
        text = f"the {rng.choice(WORDS[label])}{' often' * int(rng.integers(4))} animal {row}"
        votes = {}
        for index in range(6):
            says = ("bad", "good")[index % 2]
            votes[f"lf_{index}"] = says if rng.random() < (0.5 if says == label else 0.12) else ""
        rows.append({"text": text, **votes} | ({"label": label} if truth else {}))
        known.append((text, label))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return known


def block(comment: str) -> str:
    return re.search(rf"<!-- {comment} -->\n```\w+\n(.*?)```", README, re.DOTALL).group(1)


def test_five_lines_from_a_file_of_votes_to_a_student(tiny_bert, tmp_path):
    write_votes(tmp_path / "votes.csv", 400, seed=0)
    known = write_votes(tmp_path / "other.csv", 200, seed=1)
    Path(tmp_path / "student").symlink_to(tiny_bert, target_is_directory=True)
    code, printed = block("tested by tests/recipes/test_weak_supervision.py"), block("printed")
    assert len([line for line in code.splitlines() if line and not line.startswith("from")]) == 5
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-len(printed.splitlines()) :] == printed.splitlines()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-student")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "my-student")(
        [text for text, _ in known], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        labels = [model.config.id2label[index] for index in model(**inputs).logits.argmax(dim=1).tolist()]
    assert np.mean([said == label for said, (_, label) in zip(labels, known)]) > 0.7


def run(script: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(RECIPES / script), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_recipe_prints_all_label_models_and_their_students(tiny_bert, tmp_path):
    for seed, name in enumerate(("votes", "valid", "test")):
        write_votes(tmp_path / f"{name}.csv", 300, seed, truth=name != "votes")
    found = run(
        "weak_supervision.py",
        "--votes",
        "votes.csv",
        "--validation",
        "valid.csv",
        "--test",
        "test.csv",
        "--student",
        tiny_bert,
        "--output_dir",
        "out",
        "--oracle_column",
        "label",
        "--use_cpu",
        "True",
        "--report_to",
        "none",
        "--disable_tqdm",
        "True",
        "--learning_rate",
        "0.05",
        "--num_train_epochs",
        "20",
        "--self_training_rounds",
        "2",
        cwd=tmp_path,
    )
    assert "300 rows, " in found and "lf_0   bad  " in found
    models = ["shared_majority", "dawid_skene", "mace", "ebcc"] + ["glad"] * (find_spec("scipy") is not None)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in found.splitlines() if line.startswith("| ")}
    assert all(float(rows[name][2]) > 70 and "–" in rows[name][1] for name in models)  # no truth beside the votes
    students = {
        name: float(cells[0]) for name, cells in rows.items() if name.startswith(("student", "co-", "committee"))
    }
    assert len(students) == len(models) + 3 and min(students.values()) > 70
    best = max(models, key=lambda name: float(rows[name][2]))
    assert f"co-supervised from {best}" in students
    for name in (*models, "co-supervised", "self-trained"):
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name).config.num_labels == 2
    story = json.loads((tmp_path / "out" / "self-trained" / "_run" / "history.json").read_text())
    assert f"co-supervised from {best}, self-trained" in students and story["run"]["self_training"]["num_rounds"] > 0


@pytest.mark.skipif(find_spec("crowdkit") is None or find_spec("cleanlab") is None, reason="needs the crowd extra")
def test_the_measuring_recipe_reads_all_three_forms(tmp_path, monkeypatch, capsys):
    import label_models

    timed, time_crowd_kit = set(), label_models.time_crowd_kit

    def time_once(name: str, votes: np.ndarray) -> float:
        """What takes longest here, and is the same for all forms of the same votes."""
        if name in timed:
            return 1.0
        timed.add(name)
        return time_crowd_kit(name, votes)

    monkeypatch.setattr(label_models, "time_crowd_kit", time_once)
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=60)
    votes = np.where(rng.random((60, 5)) < 0.8, truth[:, None], 1 - truth[:, None])
    votes = np.where(rng.random((60, 5)) < 0.2, -1, votes)
    answers = "".join(f"{i},w{k},{v}\n" for i, row in enumerate(votes) for k, v in enumerate(row) if v >= 0)
    (tmp_path / "some__crowd__label.csv").write_text(f"item,worker,label\n{answers}", encoding="utf-8")
    known = "".join(f"{i},{label}\n" for i, label in enumerate(truth))
    (tmp_path / "some__crowd__truth.csv").write_text(f"item,truth\n{known}", encoding="utf-8")
    np.savez(tmp_path / "arrays.npz", train_votes=votes, train_labels=truth, valid_votes=votes, valid_labels=truth)
    (tmp_path / "wrench").mkdir()
    rows = {i: {"label": int(truth[i]), "weak_labels": votes[i].tolist(), "data": {"text": str(i)}} for i in range(60)}
    (tmp_path / "wrench" / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["label_models.py", str(tmp_path), "--seeds", "0", "1"])
    label_models.main()
    lines = capsys.readouterr().out.splitlines()
    table, times = lines[: lines.index("")], lines[lines.index("") :]
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table if line.startswith("|")}
    first = [[float(cell.split()[0].rstrip(",")) for cell in cells[name]] for name in ("crowd", "arrays", "wrench")]
    np.testing.assert_allclose(first[1:], [first[0]] * 2, atol=2.5)  # the same votes, in another order of voters
    assert min(first[0]) > 75 and len(first[0]) == 5 and len(cells["arrays, validation"]) == 5
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in times if line.startswith("| ")}
    assert [cell.strip() for cell in rows["times ours"]] == ["crowd", "arrays", "wrench"]
    assert [cell.strip() for cell in rows["cleanlab, % equal labels"]] == ["100.0"] * 3
    assert {"crowd-kit, dawid_skene", "crowd-kit, glad", "crowd-kit, mace", "cleanlab"} < set(rows)
    told = "snorkel is not installed: left out." in table
    assert told == (find_spec("snorkel") is None) and len([what for what in rows if "epochs" in what]) == 10 * (
        not told
    )


def test_snorkel_is_asked_with_its_epochs_and_measured_on_known_rows(monkeypatch):
    import label_models

    asked = []

    class LabelModel:
        def __init__(self, cardinality, verbose):
            asked.append(cardinality)

        def fit(self, votes, n_epochs, seed, progress_bar):
            asked.append(n_epochs)

        def predict_proba(self, votes):
            return np.eye(2)[[0, 0, 0]]

    for name in ("snorkel", "snorkel.labeling", "snorkel.labeling.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["snorkel.labeling.model"].LabelModel = LabelModel
    data = label_models.VoteSet("x", np.array([[0, 1], [1, -1], [-1, -1]]), np.array([0, 1, 1]), 2)
    right, seconds = label_models.run_snorkel(data, 500)
    assert asked == [2, 500] and right == 50 and 0 <= seconds < 0.1
    assert label_models.told([8.04, 7.5, 12.0]) == "8.0 (7.5 to 12)" and label_models.told([100.0]) == "100"


def write_vectors(path: Path) -> None:
    """Six functions that say one label or nothing, of vectors that tell the label."""
    rng, parts = np.random.default_rng(0), {}
    for part, num_rows in (("train", 200), ("valid", 60), ("test", 60)):
        truth = rng.integers(2, size=num_rows)
        says = np.arange(6) % 2
        speaks = rng.random((num_rows, 6)) < np.where(says == truth[:, None], 0.5, 0.1)
        vectors = rng.normal(size=(num_rows, 4)) + 3 * truth[:, None]
        parts |= {f"{part}_votes": np.where(speaks, says, -1), f"{part}_features": vectors, f"{part}_labels": truth}
    np.savez(path, **parts)


def test_students_of_vectors_are_chosen_on_validation_rows_and_measured_over_seeds(tmp_path, monkeypatch, capsys):
    import vote_students

    write_vectors(tmp_path / "data.npz")
    monkeypatch.setattr(vote_students, "LABEL_MODELS", {"shared_majority": None, "dawid_skene": None})
    asked, train = [], vote_students.train

    def train_cheaply(task, pool, seed, **settings):
        """Only the first setting is any good; a committee is not trained."""
        asked.append((seed, settings))
        if settings["learning_rate"] != 1e-3 or "method" in settings:
            return 40.0 + settings["learning_rate"], 99.0
        return train(task, pool, seed, **settings | {"num_train_epochs": 2, "learning_rate": 0.05})

    monkeypatch.setattr(vote_students, "train", train_cheaply)
    monkeypatch.setattr(vote_students, "GRID", [vote_students.START, vote_students.LONGER])
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "data.npz"), "--seeds", "5", "6", "--choose_seeds", "1"])
    vote_students.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    students = {row[0][2:]: row[1:] for row in rows if len(row) == 5 and "soft" in row[1]}
    kinds = ["of shared_majority", "of dawid_skene"]
    assert {name.split(",")[0] for name in students} == {*kinds, "csl", "committee"}
    assert all(
        students[kind][0].startswith("0.001, 100, 20, soft labels") and "±" in students[kind][2] for kind in kinds
    )
    assert min(float(students[kind][2].split()[0]) for kind in kinds) > 85
    assert all("loss" not in settings for _, settings in asked if settings.get("method"))
    assert {seed for seed, _ in asked} == {1, 5, 6}


def test_self_training_is_measured_where_votes_are_removed(tmp_path, monkeypatch, capsys):
    import vote_students

    write_vectors(tmp_path / "data.npz")
    found = []

    def count(task, pool, seed, self_training_rounds, **settings):
        found.append((len(pool), len(pool.hierarchy.teachers), int((pool_votes(pool) >= 0).any(axis=1).sum())))
        return 0.0, 80.0 + seed + 2 * bool(self_training_rounds)

    monkeypatch.setattr(vote_students, "train", count)
    arguments = ["x", str(tmp_path / "data.npz"), "--remove_votes", "0.6", "0", "--seeds", "1", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    vote_students.main()
    out = capsys.readouterr().out
    assert "| 60 % of the rows' | csl | 0.001 | 82.0 ± 1.4 | 84.0 ± 1.4 | 2.0 ± 0.0 | 2 of 2 |" in out
    assert "| none, all rows covered | csl | 0.01 | 82.0 ± 1.4 |" in out and out.count("of shared_majority |") == 2
    assert found[0][0] == 200 and found[0][1] == 7 and found[0][2] <= 80  # all rows, of which 60 % have no vote
    assert found[-1][0] == found[-1][2] < 200  # without removal, only rows with a vote
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "data.npz"), "--remove_votes", "1.5"])
    with pytest.raises(SystemExit):
        vote_students.main()
    assert "shares from 0 to below 1, got [1.5]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must hold .*valid_votes.* too, got train_votes"):
        vote_students.Task({"train_votes": np.zeros((1, 1))})
