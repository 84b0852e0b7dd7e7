"""Cards say what is known, run as printed, and are read by the libraries that they are written for."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import DatasetCard, ModelCard

from hf_cosupervise.cards import TAGS, model_card, pool_card, write_card

GOLDEN = Path(__file__).parent / "golden"
TEACHERS = [
    {"name": "generalist", "model": "someone/generalist", "revision": "0123456789abcdef" * 2 + "01234567", "level": 0,
     "scope": None, "accuracy": 0.6, "pool_k": 4, "answered": 1.0},
    {"name": "low", "model": os.path.join(os.sep, "private", "folder", "low-model"), "level": 1,
     "scope": [f"label {number}" for number in range(8)], "accuracy": [0.5, 0.6], "pool_k": 4, "answered": 0.5},
    {"name": "old-notes", "model": "old|notes", "kind": "column", "revision": None, "level": 1,
     "domains": ["winter", "night"], "pool_k": 4},
]  # fmt: skip
LABELS = [f"label {number}" for number in range(10)]
FULL: dict[str, Any] = {
    "name": "seasons", "modality": "image", "base_model": "timm/some_backbone.in1k", "base_model_revision": "abc123",
    "student_training": "probe", "labels": LABELS, "num_examples": 12345, "datasets": ["someone/seasons"],
    "tags": ["seasons"], "seed": 1, "teachers": TEACHERS, "figure": "pgr.png",
    "dataset_name": "Seasons", "dataset_type": "someone/seasons", "dataset_split": "test",
    "hyperparameters": {"learning_rate": 1e-3, "assignment": ["scope"], "output_dir": "outputs/x",
                        "hub_token": "secret", "student": os.path.join(os.sep, "private", "student")},
    "versions": {"hf_cosupervise": "0.1.0", "torch": "2.15.0", "timm": None},
    "report": {
        "seeds": [0, 1], "weak_accuracy": [0.6, 0.62],
        "methods": {
            "generalist": {"accuracy": [0.7, 0.72], "pgr": [0.3, 0.33]},
            "csl": {"accuracy": [0.8, 0.82], "pgr": [0.66, 0.69]},
            "ceiling": {"accuracy": [0.9, 0.91], "pgr": [1.0, 1.0]},
        },
        "levels": [
            {"level": 0, "keep_rate": [1.0, 1.0], "accuracy": [0.7, 0.72], "pgr": [0.3, None],
             "teachers": {"generalist": [1.0, 1.0]}},
            {"level": 1, "keep_rate": [0.8, 0.9], "accuracy": [0.8, 0.82], "pgr": [0.66, 0.69],
             "teachers": {"low": [0.4, 0.5], "old-notes": [0.6, 0.5]}},
        ],
    },
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hub_model_id": "someone/moods", "modality": "text", "license": "mit", "language": "en", "has_adapter": True,
    "labels": ["sad", "glad"], "student_training": "lora", "pool": "someone/moods-pool",
    "levels": [{"level": 0, "assignment": "ensemble", "keep_rate": 1.0, "num_kept": 2000.0}],
}  # fmt: skip
POOL: dict[str, Any] = {
    "name": "seasons-pool", "modality": "image", "teachers": TEACHERS, "labels": LABELS, "num_examples": 12345,
    "input_columns": ["id", "image", "oracle_label", "oracle_domain"], "source_dataset": "someone/seasons",
    "versions": {"hf_cosupervise": "0.1.0"},
}  # fmt: skip


# To renew them after a wanted change: write `card` to the file, and read the difference.
@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("model_card_full.md", model_card(FULL)),
        ("model_card_text.md", model_card(TEXT)),
        ("model_card_empty.md", model_card({})),
        ("pool_card.md", pool_card(POOL)),
        ("pool_card_one_teacher.md", pool_card({"teachers": TEACHERS[:1], "hub_dataset_id": "someone/pool"})),
    ],
)
def test_card_is_as_kept(name, card):
    assert card == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("card", [model_card(FULL), model_card(TEXT), model_card({}), pool_card(POOL)])
def test_nothing_unknown_or_private_is_printed(card):
    assert not re.search(r"\bNone\b|\bnan\b|unknown|/private/|secret|outputs/x|\{\{|\{%", card)
    assert "\n\n\n" not in card and card.endswith("\n") and not card.endswith("\n\n")


@pytest.mark.parametrize("key", sorted(FULL))
def test_every_fact_may_be_missing_or_none(key):
    without = {name: value for name, value in FULL.items() if name != key}
    assert model_card(without) == model_card({**without, key: None})


def test_header_of_the_student():
    data = ModelCard(model_card(FULL)).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert data.base_model == "timm/some_backbone.in1k" and data.datasets == ["someone/seasons"]
    assert data.tags == [*TAGS, "seasons"] and data.license is None
    (result,) = data.eval_results
    # of the seed whose student this is, not of all of them
    assert (result.metric_type, result.metric_value, result.metric_name) == ("accuracy", 0.82, "Accuracy")
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("someone/seasons", "Seasons", "test")


def test_without_a_seed_the_header_says_that_it_is_a_mean():
    (result,) = ModelCard(model_card({**FULL, "seed": None})).data.eval_results
    assert (result.metric_value, result.metric_name) == (0.81, "Accuracy (mean of 2 seeds)")


@pytest.mark.parametrize("missing", ["report", "dataset_name", "modality"])
def test_no_result_in_the_header_without_a_measurement_on_something(missing):
    assert ModelCard(model_card({**FULL, missing: None})).data.eval_results is None


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "strong").mkdir(parents=True)
    for model in ("models/strong", str(tmp_path / "strong"), "../strong", "./strong"):
        card = model_card({"base_model": model})
        assert ModelCard(card).data.base_model is None
        assert "The student is `strong`" in card and str(tmp_path) not in card


def test_names_cannot_break_out_of_their_cell():
    teacher = {"name": "a|b\n# c", "model": "x`y", "kind": "column", "scope": ["p|q"]}
    card = model_card({"teachers": [teacher], "name": "two\nlines {{ 7 * 7 }}"})
    assert "| `a\\|b # c` | column `x'y` | p\\|q |" in card
    assert "# two lines {{ 7 * 7 }}\n" in card


def test_facts_are_left_as_they_are():
    before = copy.deepcopy((FULL, POOL))
    model_card(FULL), pool_card(POOL)
    assert before == (FULL, POOL)


def test_unknown_modality():
    for write in (model_card, pool_card):
        with pytest.raises(ValueError) as error:
            write({"modality": "audio", "teachers": TEACHERS})
        assert str(error.value) == (
            "`modality` must be one of ['image', 'text'], got 'audio'. Leave out what does not fit."
        )


@pytest.mark.parametrize("names", [[], ["inputs"]])
def test_a_pool_needs_teachers_with_names_of_their_own(names):
    with pytest.raises(ValueError) as error:
        pool_card({"teachers": [{"name": name} for name in names]})
    assert str(error.value) == f"A pool needs teachers, none of them named 'inputs', got {names}. Rename the teacher."


@pytest.mark.parametrize(
    ("num_examples", "category"), [(1, "n<1K"), (1000, "1K<n<10K"), (999_999, "100K<n<1M"), (10**8, "n>10M")]
)
def test_size_of_the_pool(num_examples, category):
    assert DatasetCard(pool_card({**POOL, "num_examples": num_examples})).data.size_categories == [category]


# ── as printed ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_snippet(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the first snippet of a card in the folder that holds it."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), names)
    return names


@pytest.mark.parametrize(
    ("fixture", "modality"), [("tiny_vit", "image"), ("tiny_timm", "image"), ("tiny_bert", "text")]
)
def test_snippet_of_the_student_runs_as_printed(fixture, modality, request, tiny_labels, monkeypatch, capsys):
    folder = Path(request.getfixturevalue(fixture))
    run_snippet(model_card({"modality": modality}), folder, monkeypatch)
    assert re.search(rf"'label': '({'|'.join(tiny_labels)})'", capsys.readouterr().out)


@pytest.fixture
def pool_folder(tmp_path: Path) -> Path:
    """Files of a pool as they lie on disk, with its card."""
    ids = [f"{row:032x}" for row in range(6)]
    features = Features(
        {"id": Value("string"), "label_ids": List(Value("uint8"), 2), "label_probs": List(Value("float16"), 2)}
    )
    rows = {"id": ids, "label_ids": [[1, 0]] * 6, "label_probs": np.full((6, 2), 0.5, dtype=np.float16)}
    datasets = {f"teachers/{teacher['name']}": Dataset.from_dict(rows, features=features) for teacher in TEACHERS}
    datasets["inputs"] = Dataset.from_dict({"id": ids, "text": list("abcdef")})
    folder = tmp_path / "pool"
    for name, dataset in datasets.items():
        (folder / name).mkdir(parents=True)
        with ArrowWriter(path=str(folder / name / "data.arrow"), features=dataset.features) as writer:
            writer.write_table(dataset.data.table)
            writer.finalize()
    (folder / "pool.json").write_text("{}")
    write_card(pool_card({**POOL, "input_columns": ["id", "text"]}), folder)
    return folder


def test_datasets_loads_every_configuration_of_a_pool(pool_folder, tmp_path):
    cache_dir = str(tmp_path / "cache")
    inputs = load_dataset(str(pool_folder), "inputs", split="train", cache_dir=cache_dir)
    assert inputs["text"] == list("abcdef")
    assert load_dataset(str(pool_folder), split="train", cache_dir=cache_dir).column_names == ["id", "text"]
    for teacher in TEACHERS:
        answers = load_dataset(str(pool_folder), teacher["name"], split="train", cache_dir=cache_dir)
        assert answers["id"] == inputs["id"]
        assert answers.features["label_ids"] == List(Value("uint8"), 2)
        assert answers.features["label_probs"] == List(Value("float16"), 2)


def test_snippet_of_the_pool_runs_as_printed(pool_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    names = run_snippet((pool_folder / "README.md").read_text(encoding="utf-8"), pool_folder, monkeypatch)
    assert len(names["inputs"]) == len(names["answers"]) == 6


def test_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    assert write_card("old\n", tmp_path) == tmp_path / "README.md"

    def fail(*paths: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_card("new\n", tmp_path)
    assert (tmp_path / "README.md").read_text() == "old\n"
    write_card("new ±\n", tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "new ±\n"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="`folder` must exist, got '.*nowhere'. Save the model or pool there"):
        write_card("text", tmp_path / "nowhere")
