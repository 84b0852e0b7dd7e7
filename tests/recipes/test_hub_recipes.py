"""The recipes by way of the Hub, each step in a process of its own, as a user runs them."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

import pytest
from conftest import HF_HOME, RECIPES
from conftest import run_recipe as run
from datasets import load_from_disk
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(RECIPES))
pytestmark = pytest.mark.slow


def test_there_and_back(hub, tmp_path):
    arguments = ["--prefix", "someone/there", "--folder", "two", "--num_processes", "2"]
    done = run(tmp_path, *arguments, script="hub_roundtrip.py")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [commit.title for commit in hub.commits("someone/there-student")][:-1] == ["Co-supervised student"]
    assert max(results["differences"].values()) <= 1e-5
    assert results["accuracy"]["csl"] > results["weak_accuracy"]
    files = {
        path.name: path.read_bytes()
        for path in Path(snapshot_download("someone/there-student", revision=results["student_commit"])).iterdir()
    }
    story = json.loads(files["history.json"])["run"]
    assert story["num_processes"] == 2
    assert story["student"]["commit"] == results["backbone_commit"]
    assert story["pool"] == {"repo_id": "someone/there-pool", "commit": results["pool_commit"]}
    assert story["source"]["commit"] == results["data_commit"]
    commits = {teacher["name"]: teacher["commit"] for teacher in story["teachers"]}
    assert commits["generalist"] == commits["high"] == results["teachers_commit"] and None not in commits.values()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "someone/there-backbone" and "pgr.png" in files
    assert "someone/there-digits" in card.data.datasets
    for expected in (
        "someone/there-pool",
        "someone/there-round",
        commits["low"][:12],
        "Performance gap recovered",
    ):
        assert expected in card.text, expected


def test_a_finished_run_is_published_later_and_once(hub, demo):
    folder, _, _ = demo
    push = ["--push_to_hub", "True", "--hub_model_id", "digits"]
    for _ in range(2):
        done = run(folder, *push)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.commits("someone/digits")) == 2  # the Hub's own and ours
    files = hub.files("someone/digits")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "history.json",
        "model.safetensors",
        "pgr.png",
        "preprocessor_config.json",
        "report.json",
        "teacher_shares.png",
    }
    for name, content in files.items():
        assert str(folder).encode() not in content and str(HF_HOME).encode() not in content, name
    card = ModelCard(files["README.md"].decode())
    assert 'model="someone/digits"' in card.text and "hub_model_id" not in card.text
    assert card.data.eval_results and card.data.datasets is None
    AutoModelForImageClassification.from_pretrained("someone/digits")


def test_who_may_not_push_learns_it_before_the_work(hub, tmp_path, monkeypatch):
    import train

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--push_to_hub", "True", "--hub_model_id", "someone/digits"])
    with pytest.raises((HfHubHTTPError, OSError, ValueError)) as error:
        train.main()
    *_, last = "".join(traceback.format_exception_only(error.value)).splitlines()  # as on the terminal
    assert "hf auth login" in last
    assert not (tmp_path / "data").exists() and not (tmp_path / "outputs").exists()


def test_data_teachers_and_student_by_their_ids(hub, tmp_path, demo):
    folder, _, _ = demo
    load_from_disk(str(folder / "data" / "digits")).push_to_hub("someone/numbers")
    done = run(
        folder,
        "--teachers_dir",
        "outputs/digits/_run/seed-0/teachers",
        "--push_to_hub",
        "True",
        "--hub_model_id",
        "someone/teachers",
        script="train_teachers.py",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    start = Path(folder, "outputs/digits/_run/seed-0/student-start")
    backbone = hub.create("someone/backbone", {path.name: path.read_bytes() for path in start.iterdir()})
    (tmp_path / "mine.yaml").write_text(
        "output_dir: out\ndataset: someone/numbers\nteachers_dir: someone/teachers\nteachers_revision: main\n"
        "student: someone/backbone\nstudent_revision: main\nlearning_rate: 3e-3\ndisable_tqdm: true\n"
        "methods: [csl, ceiling]\npush_to_hub: true\nhub_model_id: someone/student\n"
    )
    done = run(tmp_path, "--config", "mine.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [
        json.loads(path.read_text()) for path in (tmp_path / "out/report.json", folder / "outputs/digits/report.json")
    ]
    # The same data, teachers and student as from folders, so the same numbers.
    assert reports[0]["methods"]["csl"] == reports[1]["methods"]["csl"]
    story = json.loads(hub.files("someone/student")["history.json"])["run"]
    assert story["student"] == {"model": "someone/backbone", "revision": "main", "commit": backbone}
    assert story["source"]["dataset"] == "someone/numbers"
    assert {teacher["commit"] for teacher in story["teachers"]} == {hub.commits("someone/teachers")[0].oid}
    shutil.rmtree(HF_HOME / "hub")  # the cache is deleted: what a finished run needs is in its own folder
    again = run(tmp_path, "--config", "mine.yaml")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(hub.commits("someone/student")) == 2
