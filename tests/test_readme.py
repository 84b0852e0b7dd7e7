"""The README's Python runs as printed, after its first command, and prints what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def _block(comment: str) -> str:
    return re.search(rf"<!-- {comment} -->\n```\w+\n(.*?)```", README, re.DOTALL).group(1)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", text)]


@pytest.mark.slow
def test_the_python_example_prints_what_it_says(demo):
    code, promised = _block("tested by tests/test_readme.py"), _block("printed")
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    done = subprocess.run([sys.executable, "-c", code], cwd=demo[0], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Words and counts are exact; shares may move a little from one processor to another.
    assert re.sub(r"\d+\.\d+", "#", done.stdout) == re.sub(r"\d+\.\d+", "#", promised)
    assert _numbers(done.stdout) == pytest.approx(_numbers(promised), abs=0.05)
    assert (demo[0] / "my-student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_functions_of_ones_own(demo):
    script = Path(__file__).resolve().parents[1] / "recipes" / "own_functions.py"
    code = [line for line in script.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(code) <= 23  # what it is, two imports, twenty lines
    done = subprocess.run([sys.executable, script], cwd=demo[0], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    assert last == "200 steps on the median of TeacherHierarchy(1-2-5 teachers, 10 labels)"
    history = json.loads((demo[0] / "mine" / "_run" / "history.json").read_text(encoding="utf-8"))["levels"]
    assert [level["level"] for level in history] == [0, 1, 2]
    assert all(0 < level["consistency/keep_rate"] < 1 for level in history[1:])


def test_commands_are_those_that_are_tested():
    assert 'pip install -e ".[demo]" && accelerate launch recipes/train.py' in README
    command = 'pip install -e ".[test]" && python -m pytest'
    assert command in README
    script = (Path(__file__).resolve().parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet -e ".[test]" && python -m pytest' in script


def test_every_room_of_the_package_is_in_the_tree():
    tree = README[README.index("## Files") :]
    for path in (Path(__file__).resolve().parents[1] / "hf_cosupervise").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert path.name in tree or path.name == "__init__.py", path.name
