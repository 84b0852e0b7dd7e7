"""The page of vectors, votes and crowds prints what it says, on files of the layouts that it names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "recipes" / "vectors.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- tested: (\w+) -->\n```python\n(.*?)```\n<!-- printed -->\n```\n(.*?)```", re.DOTALL)


def save_crowd(rng: np.random.Generator) -> None:
    """Answers of eight workers, each to most of 40 items, as tables; the truth of 30 of these."""
    truth = rng.integers(0, 2, 40)
    lines = [
        f"{item},{worker},{label if rng.random() < 0.95 else 1 - label}"
        for item, label in enumerate(truth)
        for worker in range(8)
        if rng.random() < 0.9
    ]
    Path("crowd").mkdir()
    Path("crowd/birds__label.csv").write_text("\n".join(["item,worker,label", *lines]))
    known = [f"{item},{label}" for item, label in enumerate(truth[:30])]
    Path("crowd/birds__truth.csv").write_text("\n".join(["item,truth", *known]))


def save_votes(rng: np.random.Generator) -> None:
    """Votes of ten functions, most of which say nothing, with vectors in half precision."""
    files = {}
    for split, num_rows in (("train", 400), ("test", 50)):
        labels = rng.integers(0, 2, num_rows).astype(np.int8)
        right = np.where(rng.random((num_rows, 10)) < 0.9, labels[:, None], 1 - labels[:, None])
        files[f"{split}_votes"] = np.where(rng.random((num_rows, 10)) < 0.4, right, -1).astype(np.int8)
        files[f"{split}_labels"] = labels
        centre = np.where(labels[:, None], 1.0, -1.0)
        files[f"{split}_features"] = (centre + 0.3 * rng.standard_normal((num_rows, 16))).astype(np.float16)
    np.savez("votes.npz", **files)


def save_features(rng: np.random.Generator) -> None:
    """Vectors, and the probabilities of two teachers, of which the second does not answer half of the rows."""
    probs = rng.dirichlet(np.ones(2), (200, 2))
    probs[::2, 1] = 0
    np.savez("features.npz", features=rng.standard_normal((200, 8)).astype(np.float32), probs=probs)


@pytest.mark.parametrize(("name", "save"), [("crowd", save_crowd), ("votes", save_votes), ("features", save_features)])
def test_a_block_prints_what_it_says(name, save, tmp_path, monkeypatch, capsys):
    for package in ("pandas", "skops"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    save(np.random.default_rng(0))
    [(code, promised)] = [(code, promised) for block, code, promised in BLOCK.findall(PAGE) if block == name]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, name, "exec"), {})
    # What is printed while it trains is not told of.
    assert capsys.readouterr().out.splitlines()[-1] == promised.strip()


def test_every_block_is_tested():
    assert len(BLOCK.findall(PAGE)) == PAGE.count("```python") == 3
