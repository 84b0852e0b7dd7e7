"""The whole recipe, killed again and again: what comes out is what an undisturbed run gives, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_from_disk

ROOT = Path(__file__).resolve().parents[1]
SEED = 20240215


def read_result(folder: Path, name: str = "digits") -> dict[str, Any]:
    """All that a run leaves, but for times."""
    outputs = folder / "outputs" / name

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if "runtime" not in key}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    texts = {name: timeless(json.loads((outputs / name).read_text())) for name in ("report.json", "history.json")}
    return {"model": (outputs / "model.safetensors").read_bytes(), **texts}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The default recipe in small, above all with less pre-training, within which nothing can be gone on with."""
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "digits.yaml").read_text(encoding="utf-8"))
    settings["pretrain_kwargs"]["steps"] = 10
    settings |= {"teacher_steps": 20, "num_pool_examples": 400, "level_sizes": [1, 2, 2]}
    settings["num_heldout_examples"] = 797  # which nobody labels, so that 200 are left to test on
    path = tmp_path_factory.mktemp("config") / "digits.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(path), "--num_train_epochs", "10"]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_fifty_kills(arguments, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    script = [sys.executable, str(ROOT / "tests" / "killing.py"), str(tmp_path), str(SEED), "50", *arguments]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {SEED}: {found['kills']} in {len(found['folders'])} runs")
    assert sum(found["kills"].values()) == 50 and min(found["kills"].values()) >= 16
    assert found["repeated"] == []
    expected = read_result(undisturbed)
    for folder in found["folders"]:
        assert read_result(Path(folder)) == expected, folder


@pytest.mark.slow
def test_kills_of_a_committee_on_data_without_labels(undisturbed, tmp_path):
    """One of its members is cut off, or the labels, or the account: each goes on from where it was."""
    digits = load_from_disk(str(undisturbed / "data" / "digits"))["train"].select(range(300))
    for place in ("killed", "whole"):
        digits.remove_columns("label").save_to_disk(str(tmp_path / place / "data" / "mine"))
    run = undisturbed / "outputs" / "digits" / "_run" / "seed-0"
    arguments = ["--dataset", "data/mine", "--teachers", str(run / "teachers" / "hierarchy.yaml")]
    arguments += ["--student", str(run / "student-start"), "--output_dir", "outputs/mine", "--num_train_epochs", "10"]
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), *arguments]
    whole = subprocess.run(command, cwd=tmp_path / "whole", env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killing = [sys.executable, str(ROOT / "tests" / "killing.py")]
    script = [*killing, str(tmp_path / "killed"), str(SEED), "12", *arguments]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kills"].values()) == 12 and found["repeated"] == []
    expected = read_result(tmp_path / "whole", "mine")
    for folder in found["folders"]:
        assert read_result(Path(folder), "mine") == expected, folder


@pytest.mark.slow
def test_two_kills_of_the_launcher(arguments, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    accelerate = Path(sys.executable).with_name("accelerate")
    launch = [str(accelerate), "launch", "--cpu", "--num_processes", "1"]
    command = [*launch, str(ROOT / "recipes" / "train.py"), *arguments]
    generator, log = random.Random(SEED), tmp_path / "log.txt"
    for number in range(3):
        with log.open("a") as file:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
            run_dir = tmp_path / "outputs" / "digits" / "_run"
            if number < 2:
                deadline, before = time.time() + 120, len(list(run_dir.rglob("*")))
                # Wait until it does something new, so that the clock does not hang on how long imports take.
                while time.time() < deadline and process.poll() is None and len(list(run_dir.rglob("*"))) <= before:
                    time.sleep(0.05)
                time.sleep(generator.uniform(0, 1.5))
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=600)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert read_result(tmp_path) == read_result(undisturbed)
