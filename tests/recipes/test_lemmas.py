"""The recipe of lemmas at a tiny scale: teachers, their answers and students of every method, measured once."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
import lemmas

PLAN = lemmas.Plan(("ru", "tr"), 16, 8, (16, 1), 4, 1, 3, 2, (16, 1))


def make_words(count: int = 40) -> dict[str, Dataset]:
    """Words whose lemma is what stands before their last letter, of other letters in each language."""
    draw, data = random.Random(0), {}
    for part in ("teachers", "pool", "test"):
        rows = [
            {"lemma": "".join(draw.choices(letters, k=4)), "language": language}
            for language, letters in (("ru", "abcd"), ("tr", "efgh"))
            for _ in range(count)
        ]
        data[part] = Dataset.from_list([{"form": f"{row['lemma']}s", **row} for row in rows])
    return data


@pytest.mark.slow
def test_every_method_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lemmas, "NUM_LABELS", 12)
    # Nothing learns in so few steps, and a gap of zero has no share.
    monkeypatch.setattr(lemmas, "performance_gap_recovered", lambda weak, own, ceiling: own - weak)
    with ThreadPoolExecutor(1) as worker:
        numbers, open_ours = lemmas.run_seed(make_words(), tmp_path, 3, PLAN, "router", worker)
    names = {"all_labels", "generalist", "majority_vote", "random_specialist", "oracle_specialist", "ceiling", "csl"}
    assert set(numbers["methods"]) == names and numbers["methods"]["ceiling"]["labels_right"] == 1.0
    chosen = open_ours().assigned[-1]  # read back, not trained again
    assert chosen.shape == (32,) and set(chosen) <= {1, 2}
