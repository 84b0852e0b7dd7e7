"""The recipe of word problems on a folder of four."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
import word_problems

# What each model says to each problem, and what the student says where it agrees with one.
SAID = {"gemma_2b": "1 5 9 7", "llama2_7b": "1 5 8 7", "mistral_7b": "1 6 8 4"}
OWN = {"gemma_2b": {0: "1"}, "llama2_7b": {0: "1"}, "mistral_7b": {0: "1", 1: "6", 2: "8"}}


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, truth = tmp_path / "data" / "llama_factory" / "gsm8k", tmp_path / "data" / "test" / "gsm8k_train_2.jsonl"
    folder.mkdir(parents=True)
    truth.parent.mkdir()
    truth.write_text("".join(json.dumps({"answer": number}) + "\n" for number in ("1", "6", "8", "4")))
    for model, numbers in SAID.items():
        rows = [{"content": f"q{row}", "output": f"So #### {number}"} for row, number in enumerate(numbers.split())]
        own = [{"content": f"q{row}", "output": f"Hence {number}."} for row, number in OWN[model].items()]
        (folder / f"train_gsm8k_{model}_full_weak.json").write_text(json.dumps(rows))
        (folder / f"train_gsm8k_{model}_iter1_icl.json").write_text(json.dumps(own))

    word_problems.main(["--folder", str(tmp_path)])

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 problems, 3 of them with an answer of the student"
    # The vote follows two against the third; but the student says what the third says, and is silent on the last one.
    assert [line.split()[:2] for line in lines[1:]] == [
        *(["gemma_2b", "25.0"], ["llama2_7b", "50.0"], ["mistral_7b", "100.0"]),
        *(["majority", "50.0"], ["same_answer", "100.0"], ["oracle", "100.0"]),
    ]


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`--folder` must be a clone of that repository, got no"):
        word_problems.main(["--folder", str(tmp_path)])
