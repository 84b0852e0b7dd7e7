"""The recipe of five kinds of teachers, on a few sentences and tiny models in place of the real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny_bert
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from test_prompted import save_language_model

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))


def test_words_of_feeling_say_one_label_or_nothing() -> None:
    from five_kinds import words_of_feeling

    texts = ["A great, GREAT film", "Not good.", "not bad at all", "good but boring", "A film"]
    assert [words_of_feeling({"text": text}) for text in texts] == ["positive", "negative", "positive", None, None]


@pytest.mark.slow
def test_the_recipe_prints_teachers_and_students(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import five_kinds

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 90)
    words = (("bad", "stings", "barks"), ("good", "hums", "purrs"))
    texts = [f"the animal {' '.join(rng.choice(words[label], 2))} {number}" for number, label in enumerate(labels)]
    people = [None if number % 3 else ("negative", "positive")[label] for number, label in enumerate(labels)]
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "rater_20": Value("string")}
    )
    rows = Dataset.from_dict({"text": texts, "label": labels, "rater_20": people}, features=features)
    DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "data" / "sentiment"))
    save_tiny_bert(tmp_path / "data" / "minilm", ("negative", "positive"))
    save_language_model(tmp_path / "data" / "smollm2", "llama")
    for name, size in (("NUM_LABELLED", 40), ("NUM_ROWS", 25), ("NUM_EXAMPLES", 30), ("NUM_SHOWN", 3)):
        monkeypatch.setattr(five_kinds, name, size)
    monkeypatch.setattr(five_kinds, "METHODS", ("generalist", "csl", "ceiling"))
    folders = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["five_kinds.py", "--seeds", "0", "1", *folders])

    five_kinds.main()

    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    teachers = ["smollm2", "words_of_feeling", "classifier", "rater_20", "prototypes"]
    assert list(report["teachers"]) == teachers and all(f"\n{name} " in said for name in teachers)
    assert len(report["methods"]["csl"]["accuracy"]) == 2 and "gain over generalist" in said
    assert report["answered"]["words_of_feeling"][0] < 1 == report["answered"]["smollm2"][0]
    assert report["levels"][0]["teachers"] == {"smollm2": [1.0, 1.0]}
