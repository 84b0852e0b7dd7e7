"""Cards say what is known, run as printed, and are read by the libraries that they are written for."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import DatasetCard, ModelCard

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.hub.card_merging import merge_card
from hf_cosupervise.hub.cards import TAGS, hierarchy_card, model_card, pool_card, write_card
from hf_cosupervise.pool.pseudolabels import PseudolabelPool

pytestmark = pytest.mark.core

GOLDEN = Path(__file__).parents[1] / "golden"
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
    "hub_model_id": "someone/moods",
    "modality": "text",
    "license": "mit",
    "language": "en",
    "has_adapter": True,
    "labels": ["sad", "glad"],
    "student_training": "lora",
    "pool": "someone/moods-pool",
    "levels": [{"level": 0, "assignment": "ensemble", "keep_rate": 1.0, "num_kept": 2000.0}],
}
POOL: dict[str, Any] = {
    "name": "seasons-pool",
    "modality": "image",
    "teachers": TEACHERS,
    "labels": LABELS,
    "num_examples": 12345,
    "input_columns": ["id", "image", "oracle_label", "oracle_domain"],
    "source_dataset": "someone/seasons",
    "versions": {"hf_cosupervise": "0.1.0"},
}
COMMIT = "fedcba98" * 5
TIMM: dict[str, Any] = {
    "hub_model_id": "someone/leaves",
    "modality": "image",
    "library_name": "timm",
    "license": "apache-2.0",
    "base_model": "timm/test_vit.r160_in1k",
    "base_model_revision": "main",
    "base_model_commit": COMMIT,
    "source_dataset": "someone/leaves-unlabelled",
    "source_revision": COMMIT,
    "num_examples": 500,
    "pool": "someone/leaves-pool",
    "pool_revision": "v1",
    "files": [("report.json", "every number of the table"), ("pgr.png", "the figure")],
    "teachers": [
        {"name": "oaks", "model": "someone/teachers", "subfolder": "oaks", "commit": COMMIT, "level": 0},
        {"name": "pines", "model": "someone/teachers", "subfolder": "more/pines", "revision": "a/b", "level": 1},
        {"name": "palms", "model": "someone/palms", "revision": "v2", "commit": COMMIT, "level": 1},
    ],
    "levels": [{"level": 0, "keep_rate": 1.0}, {"level": 1, "keep_rate": 0.5}, {"level": 1, "keep_rate": 0.75}],
    "report": {"levels": [{"level": 0, "accuracy": 0.5, "pgr": 0.25}, {"level": 1, "accuracy": 0.75, "pgr": 0.5}]},
}
HIERARCHY: dict[str, Any] = {
    "hub_model_id": "someone/teachers",
    "license": "mit",
    "modality": "text",
    "labels": ["sad", "glad"],
    "tags": ["moods"],
    "datasets": ["someone/moods"],
    "versions": {"hf_cosupervise": "0.1.0"},
    "teachers": [
        {"name": "forest", "kind": "sklearn", "level": 0, "subfolder": "forest", "accuracy": 0.5},
        {"name": "mails", "kind": "transformers", "level": 1, "subfolder": "mails", "domains": ["mail"]},
        {
            "name": "posts",
            "kind": "transformers",
            "level": 1,
            "scope": ["sad"],
            "model": "other/posts",
            "commit": COMMIT,
        },
    ],
}
EDITED = (
    model_card(FULL)
    .replace("tags:\n", "license: mit  # of the data\ntags:\n- mine\n")
    .replace("## Evaluation", "## Limits\n\nOnly leaves.\n\n## Evaluation")
    .replace("Labels: ", "Names of the labels: ")
)
NEXT = {**FULL, "seed": 0, "versions": {"torch": "2.16.0"}, "has_adapter": True}


# To renew them after a wanted change: write `card` to the file, and read the difference.
@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("model_card_full.md", model_card(FULL)),
        ("model_card_text.md", model_card(TEXT)),
        ("model_card_empty.md", model_card({})),
        ("pool_card.md", pool_card(POOL)),
        ("pool_card_one_teacher.md", pool_card({"teachers": TEACHERS[:1], "hub_dataset_id": "someone/pool"})),
        (
            "pool_card_source.md",
            pool_card(
                {
                    "teachers": TIMM["teachers"],
                    "hub_dataset_id": "someone/pool",
                    "license": "mit",
                    "source_dataset": "someone/leaves",
                    "source_revision": COMMIT,
                    "source_split": "train",
                }
            ),
        ),
        ("model_card_timm.md", model_card(TIMM)),
        ("model_card_merged.md", merge_card(EDITED, model_card(NEXT)).text),
        ("hierarchy_card.md", hierarchy_card(HIERARCHY)),
    ],
)
def test_card_is_as_kept(name, card):
    assert card == (GOLDEN / name).read_text(encoding="utf-8")


CARDS = [
    model_card(FULL),
    model_card(TEXT),
    model_card(TIMM),
    model_card({}),
    pool_card(POOL),
    hierarchy_card(HIERARCHY),
]


@pytest.mark.parametrize("card", CARDS)
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


def test_a_source_is_linked_at_its_commit():
    card = pool_card({**POOL, "source_revision": COMMIT, "source_split": "train"})
    tree = f"https://huggingface.co/datasets/someone/seasons/tree/{COMMIT}"
    assert f"of [someone/seasons]({tree}) at `fedcba98fedc` (split `train`), for" in card
    assert "someone/seasons]" in model_card({"source_dataset": "someone/seasons"})


def test_a_pool_without_inputs_promises_none():
    card = pool_card({"teachers": TEACHERS})
    assert "inputs" not in card and "The examples themselves are not here." in card


def test_licence_of_a_pool():
    sentence = "No licence is stated here: the terms of the source data and of the teachers apply."
    assert sentence in pool_card(POOL) and sentence not in pool_card({**POOL, "license": "mit"})


def test_measured_levels_stand_beside_those_of_the_student():
    rows = [
        line for line in model_card(TIMM).splitlines() if line.endswith(" % |") or re.match(r"\| \d \| .*\d \|", line)
    ]
    assert rows[-4:] == [
        "| level | keep rate % | accuracy % | PGR % |",
        "| 0 | 100.0 | 50.0 | 25.0 |",
        "| 1 | 50.0 | | |",  # a round that another one followed
        "| 1 | 75.0 | 75.0 | 50.0 |",
    ]


def test_what_is_known_without_ground_truth_is_told():
    shares = {"rare": 0.0, "first": 0.5, "second": 0.75, "third": 0.5, "fourth": 0.25}
    specialist = {"answered": 1.0, "trusted": 0.5, "trusted_by_label": shares}
    root = {"answered": 1.0, "trusted": None, "trusted_by_label": dict.fromkeys(shares)}
    report = {"overview": {"teachers": {"root": root, "own": specialist}}, "seeds": [3, 5], "seed_agreement": 0.875}
    facts = {"report": report, "levels": [{"level": 0, "keep_rate": 1.0}]}
    card = model_card(facts)
    assert (
        "| teacher | answered % | trusted % | trusted most on % |" in card
        and "committee" not in card.split("Levels")[1]
    )
    assert "| `root` | 100.0 | | |" in card
    assert "| `own` | 100.0 | 50.0 | second 75.0, first 50.0, third 50.0 |" in card
    assert "Students of seeds 3, 5 agree on 87.5 % of the examples." in card
    card = model_card(facts | {"is_closed_form": True, "levels_of": "a_member"})
    assert "87.5 % of the examples: all are made in closed form, which a seed does not change." in card
    assert "on the rest. These are the levels of `a_member`, one member of the committee." in card
    assert "agree on" not in model_card({"report": report | {"seed_agreement": None}})  # of one seed


def test_the_clients_classes_read_the_cards():
    for card in (model_card(FULL), model_card(TIMM), model_card(NEXT), hierarchy_card(HIERARCHY)):
        data = ModelCard(card).data
        again = ModelCard(str(ModelCard(card)))
        assert again.data.to_dict() == data.to_dict() and again.data.eval_results == data.eval_results
        assert merge_card(str(again), card) == (card, ())
    data = DatasetCard(pool_card(POOL)).data.to_dict()
    assert [config["config_name"] for config in data["configs"]] == ["inputs", "generalist", "low", "old-notes"]


def test_header_of_a_hierarchy():
    data = ModelCard(hierarchy_card(HIERARCHY)).data
    assert data.tags == [*TAGS, "teachers", "moods"] and data.datasets == ["someone/moods"]
    assert data.license == "mit" and data.pipeline_tag == "text-classification"
    with pytest.raises(ValueError) as error:
        hierarchy_card({"teachers": []})
    assert str(error.value) == "A hierarchy needs teachers, got none. Give at least one."


def test_data_that_a_student_saw_is_in_its_header():
    assert ModelCard(model_card(TIMM)).data.datasets == ["someone/leaves-unlabelled", "someone/leaves-pool"]
    assert ModelCard(model_card({"datasets": ["a/b"], "source_dataset": "a/b"})).data.datasets == ["a/b"]


NASTY = "x\n---\n# y\n## z --> <!-- <b> [a](http://b) `c` \\| d | {{ 'jin' ~ 'ja' }} \u2028 ![e](f) \"'\\"


def hostile(facts: Any) -> Any:
    """The same facts with something nasty in each text that is free."""
    if isinstance(facts, dict):
        return {key: value if key in ("modality", "kind") else hostile(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [hostile(value) for value in facts]
    return NASTY if isinstance(facts, str) else facts


@pytest.mark.parametrize(
    ("write", "facts"),
    [
        (model_card, {**FULL, **TEXT, "report": FULL["report"], "files": TIMM["files"]}),
        (model_card, {**TIMM, "pool_revision": None}),
        (pool_card, {**POOL, "source_revision": "x", "source_split": "x", "hub_dataset_id": "x"}),
        (hierarchy_card, HIERARCHY),
    ],
)
def test_facts_cannot_break_out(write, facts):
    plain, card = write(facts), write(hostile(facts))
    outside = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    body = outside.split("\n---\n", 1)[1]
    assert re.findall("^#+ ", outside, re.M) == re.findall("^#+ ", re.sub(r"```.*?```", "", plain, flags=re.S), re.M)
    text = re.sub(r"(?<!\\)`[^`\n]*`", "", body)  # inline code is shown as it is
    assert "<b>" not in text and text.count("<!--") == 1 and not re.search(r"(?<!\\)\]\(http://b\)|!\[e\]", text)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    counts = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows]
    headers = [place for place, row in enumerate(rows) if row.startswith("| ---")]
    for place, following in zip(headers, [*(place - 1 for place in headers[1:]), len(rows)]):
        assert len(set(counts[place - 1 : following])) == 1
    kind = DatasetCard if write is pool_card else ModelCard
    assert set(kind(card).data.to_dict()) <= set(kind(plain).data.to_dict())
    assert kind(card).data.to_dict().get("license") in (NASTY, None)
    assert merge_card(card, card) == (card, ()) and "jinja" not in body


@pytest.mark.parametrize("place", ["/private/me/x", "C:\\private\\me\\x", "~/private/x", "file:///private/x"])
def test_folders_of_this_machine_stay_here(place):
    facts = {
        "base_model": place,
        "pool": place,
        "source_dataset": place,
        "figure": place,
        "files": [(place, "it")],
        "teachers": [{"name": "t", "model": place}, {"name": "u", "subfolder": place}],
        "hyperparameters": {"a": place, "b": [place], "c": {"d": Path(place)}, "e": 1},
    }
    for card in (model_card(facts), pool_card(facts), hierarchy_card(facts)):
        assert "private" not in card and "| `a` |" not in card and "| `b` |" not in card and "| `c` |" not in card


def test_names_cannot_break_out_of_their_cell():
    teacher = {"name": "a|b\n# c", "model": "x`y", "kind": "column", "scope": ["p|q"]}
    card = model_card({"teachers": [teacher], "name": "two\nlines {{ 7 * 7 }}"})
    assert "| `a\\|b # c` | column `x'y` | p\\|q |" in card
    assert "# two lines {{ 7 \\* 7 }}\n" in card


@pytest.mark.parametrize(
    "name",
    ["https://x.example/y", "see http://x.example", "www.x.example", "WWW.x.example", "mailto:a", "a@x.example"]
    + ["<https://x.example>", "ftp://x.example", "**x**", "*x*", "_x_", "__x__", "~~x~~", "x *y* z", "x **y**"],
)
def test_names_are_no_links_and_are_not_set_off(name):
    shares = {"overview": {"student": {"class_shares": {name: 1.0}}, "warnings": [name]}}
    teacher = {"name": "t", "kind": "column", "model": "c", "scope": [name], "domains": [name]}
    facts = {"name": name, "labels": [name], "teachers": [teacher], "report": shares, "dataset_name": name}
    for write in (model_card, pool_card, hierarchy_card):
        body = write(facts | {"input_columns": ["text"]}).split("\n---\n", 1)[1]
        assert name in body or name.replace("<", "&lt;") in body or "\\" in body
        words = re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->", "", body, flags=re.DOTALL)
        assert "x.example" not in words and "mailto" not in words
        assert not re.search(r"(?<![\w\\*_~])[*_~]+(x|y)[*_~]", words)


@pytest.mark.parametrize("name", ["snake_case_name", "a-b", "C#", "50%", "a.b", "R&D"])
def test_usual_names_stay_as_they_are(name):
    assert name in hierarchy_card({"teachers": [{"name": "t", "scope": [name]}]})


def test_facts_are_left_as_they_are():
    before = copy.deepcopy((FULL, POOL, TIMM, HIERARCHY))
    model_card(FULL), pool_card(POOL), model_card(TIMM), hierarchy_card(HIERARCHY)
    assert before == (FULL, POOL, TIMM, HIERARCHY)


def test_unknown_modality():
    for write in (model_card, pool_card, hierarchy_card):
        with pytest.raises(ValueError) as error:
            write({"modality": "audio", "teachers": TEACHERS})
        assert str(error.value) == (
            "`modality` must be one of ['image', 'text', 'vector', 'language'], got 'audio'. Leave out what does not "
            "fit."
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


def run_snippet(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> dict[str, Any]:
    """Run a snippet of a card in the folder that holds it."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[number], names)
    return names


@pytest.mark.parametrize(
    ("fixture", "modality"), [("tiny_vit", "image"), ("tiny_timm", "image"), ("tiny_bert", "text")]
)
def test_snippet_of_the_student_runs_as_printed(fixture, modality, request, tiny_labels, monkeypatch, capsys):
    folder = Path(request.getfixturevalue(fixture))
    run_snippet(model_card({"modality": modality}), folder, monkeypatch)
    assert re.search(rf"'label': '({'|'.join(tiny_labels)})'", capsys.readouterr().out)


def files_of(folder: str, prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{path.name}": path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize("on_hub", [False, True])
def test_snippet_of_a_timm_student_runs_as_printed(on_hub, tiny_timm, tmp_path, hub, monkeypatch):
    facts = {"modality": "image", "library_name": "timm", "hub_model_id": "someone/leaves" if on_hub else None}
    if on_hub:
        hub.create("someone/leaves", files_of(tiny_timm))
    names = run_snippet(model_card(facts), tmp_path if on_hub else Path(tiny_timm), monkeypatch)
    assert names["model"].num_classes == 4 and not names["model"].training
    probs = names["model"](names["transform"](names["image"]).unsqueeze(0)).softmax(-1)
    assert names["classifier"](names["image"])[0]["score"] == pytest.approx(probs.max().item(), abs=1e-5)


@pytest.mark.parametrize("on_hub", [False, True])
@pytest.mark.parametrize(("fixture", "modality"), [("tiny_vit", "image"), ("tiny_bert", "text")])
def test_snippet_of_one_teacher_runs_as_printed(fixture, modality, on_hub, request, hub, tmp_path, monkeypatch):
    source = request.getfixturevalue(fixture)
    facts = {"modality": modality, "teachers": [{"name": "low", "kind": "transformers", "subfolder": "inner/low"}]}
    if on_hub:
        facts["hub_model_id"] = "someone/teachers"
        hub.create("someone/teachers", files_of(source, "inner/low/"))
    else:
        shutil.copytree(source, tmp_path / "inner" / "low")
    assert run_snippet(hierarchy_card(facts), tmp_path, monkeypatch, 1)["model"].config.num_labels == 4


def test_snippet_of_a_teacher_elsewhere_is_pinned(tiny_vit, hub, tmp_path, monkeypatch):
    commit = hub.create("other/low", files_of(tiny_vit))
    teachers = [{"name": "low", "kind": "transformers", "model": "other/low", "commit": commit}]
    card = hierarchy_card({"modality": "image", "teachers": teachers})
    assert f'from_pretrained("other/low", revision="{commit}")' in card
    assert run_snippet(card, tmp_path, monkeypatch, 1)["model"].config.num_labels == 4


def test_snippets_of_the_package_run_as_printed(tmp_path, monkeypatch):
    hierarchy = TeacherHierarchy(["sad", "glad"], [Teacher("someone/low")])
    PseudolabelPool.from_predictions(hierarchy, ["x", "y"], {"low": np.eye(2)}).save(tmp_path / "pool")
    card = (tmp_path / "pool" / "README.md").read_text(encoding="utf-8")
    assert len(run_snippet(card, tmp_path / "pool", monkeypatch, 1)["pool"]) == 2
    (tmp_path / "hierarchy.json").write_text(json.dumps(hierarchy.to_dict()), encoding="utf-8")
    names = run_snippet(hierarchy_card({"teachers": TEACHERS}), tmp_path, monkeypatch)
    assert names["hierarchy"].names == ("low",)


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
    old, new = model_card({"name": "old"}), model_card({"name": "new ±"})
    assert write_card(old, tmp_path) == tmp_path / "README.md"

    def fail(*paths: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_card(new, tmp_path)
    assert (tmp_path / "README.md").read_text() == old
    write_card(new, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == new
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_an_edited_card_is_kept_and_a_warning_says_so(tmp_path, caplog):
    path = tmp_path / "README.md"
    path.write_bytes(EDITED.replace("\n", "\r\n").encode())
    for _ in range(2):  # the second time there is nothing new that an edit hides
        write_card(model_card(NEXT), tmp_path)
        assert path.read_bytes().decode() == merge_card(EDITED, model_card(NEXT)).text.replace("\n", "\r\n")
        assert [record.getMessage() for record in caplog.records] == [
            f"'{path}': edited by hand and kept: text. For a fresh card, delete it."
        ]


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    for content, message in [
        (
            "é".encode("latin-1"),
            f"'{path}' must be a card to merge into, got: 'utf-8' codec can't decode byte 0xe9 in position 0: "
            "unexpected end of data. Correct or delete it.",
        ),
        (b"---\na: [\n---\n", "A card's YAML header must be"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            write_card(model_card({}), tmp_path)
        assert path.read_bytes() == content


def test_a_card_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="`folder` must exist, got '.*nowhere'. Save the model or pool there"):
        write_card("text", tmp_path / "nowhere")


# ── every field, every trick ────────────────────────────────────────────────────────────────────────────────────────

TRICKS = {
    "line break": "x\n## Use\n\ny",
    "carriage return": "x\r## Use\r\ny",
    "pipe": "x | y || z",
    "escaped pipe": "x \\| y \\",
    "backtick": "x ` y",
    "triple backticks": "x\n```\n# y\n```python\nz",
    "tildes": "x\n~~~\ny",
    "quotes": 'x" + \'y\' + """z',
    "link": "x](javascript:alert(1)) [y](javascript:alert(2)) ![z](http://z)",
    "reference": "[x]: http://y\n[x]",
    "tag": "<script>alert(1)</script><img src=x onerror=y>",
    "entity": "&lt;script&gt; &#91;x&#93;(y)",
    "header": "x\n---\nlicense: other\n---\ny",
    "comment": "x --> <!-- hf_cosupervise {} --> y",
    "template": "{{ 7 * 7 }} {% raw %} {# x #}",
    "yaml": "x: [y, {z: !!python/object:os.system {}}] # &a *a",
    "lone surrogate": "x\ud800y",
    "right to left": "x\u202ey\u2066z",
    "invisible": "x\u200b\u2060\ufeffy\x00\x1b[31m",
    "empty": "",
    "spaces": "  ",
    "line separators": "x\u2028## y\u2029\x85z",
}


def every_field(trick: str) -> list[tuple[Callable[[dict[str, Any]], str], dict[str, Any]]]:
    """Each card with a trick in each of its fields, and with its own id, without which its snippets name no place."""
    found = []
    for write, facts in PLAIN:
        everything = {key: value if key in _FIXED else _nasty(value, trick) for key, value in facts.items()}
        ids = {key: facts[key] for key in ("hub_model_id", "hub_dataset_id") if key in facts}
        found += [(write, everything), (write, everything | ids)]
    return found


_FIXED = ("modality", "library_name", "levels", "report")  # of words or numbers that are checked or ours


def _nasty(value: Any, trick: str) -> Any:
    if isinstance(value, str):
        return trick
    if isinstance(value, dict):  # names of teachers, methods and packages are fields, too
        return {key: item if key in ("level", "kind") else _nasty(item, trick) for key, item in value.items()}
    return type(value)(_nasty(item, trick) for item in value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", TRICKS)
def test_no_field_of_a_card_breaks_out(name):
    for write, facts in every_field(TRICKS[name]):
        card = write(facts)
        card.encode("utf-8")
        header, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
        keys, titles, calls = KNOWN[write]
        assert set(yaml.safe_load(header)) <= keys, "a key of somebody else's"
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00\x1b]", card)
        for code in _snippets(body):
            tree = ast.parse(code)
            assert _calls(tree) <= calls
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg in ("revision", "subfolder"):
                    assert isinstance(node.value, ast.Constant) and node.value.value in (TRICKS[name], *PINNED)
        text = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
        assert "```" not in text and "~~~\n" not in text
        assert _titles(text) <= titles
        shown = re.sub(r"`[^`\n]+`", "", text)
        assert "`" not in shown, "code that does not end"
        assert "<" not in shown.replace("<!-- hf_cosupervise", "", 1) and not re.search("&#91|&lt;script&gt;", shown)
        for url in re.findall(r"(?<!\\)\]\(([^)]*)\)", shown):
            assert url.startswith(("https://huggingface.co/", "https://arxiv.org/abs/2402.15505")) or ":" not in url
    assert merge_card(card, card).text == card


def _snippets(body: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)\n```$", body, re.DOTALL | re.MULTILINE)


def _titles(text: str) -> set[str]:
    return set(re.findall("^##+ .*", text, re.MULTILINE))


def _calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.Call)}


PINNED = {COMMIT, "next", "mails", "posts"}
PLAIN = (
    (model_card, FULL),
    (model_card, {**TIMM, "hub_branch": "next"}),
    (pool_card, {**POOL, "hub_dataset_id": "someone/pool", "hub_branch": "next", "license": "mit"}),
    (hierarchy_card, HIERARCHY),
)


def _known(write: Callable[[dict[str, Any]], str]) -> tuple[set[str], set[str], set[str]]:
    """Keys, titles and calls of cards that hold everything, also what is there only where a fact is missing."""
    keys, titles, calls = set[str](), set[str](), set[str]()
    own = [facts for kind, facts in PLAIN if kind is write]
    for facts in (*own, *({**facts, **dict.fromkeys(("hub_model_id", "hub_dataset_id", "license"))} for facts in own)):
        card = write(facts)
        keys |= set(yaml.safe_load(card[4:].split("\n---\n")[0]))
        titles |= _titles(card)
        calls |= {call for code in _snippets(card) for call in _calls(ast.parse(code))}
    return keys, titles, calls


KNOWN = {write: _known(write) for write in (model_card, pool_card, hierarchy_card)}
