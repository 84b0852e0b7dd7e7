"""Labels as people and models give them: left out, spread over several, in free words, as counts."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny_vit
from datasets import Dataset

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.hub.cards import pool_card
from hf_cosupervise.teachers.kinds.base import add_up, label_positions
from hf_cosupervise.teachers.naming import hierarchy_from_names

pytestmark = pytest.mark.core
LABELS = ("ham", "spam", "news")


def label(values: list[Any], labels: tuple[str, ...] = LABELS, on_error: str = "raise", **fields: Any) -> np.ndarray:
    data = Dataset.from_dict({"id": list(range(len(values))), "said": values})
    hierarchy = TeacherHierarchy(labels, [Teacher("said", kind="column", **fields)])
    pool = build_pool(data, hierarchy, on_error=on_error, disable_tqdm=True)
    return pool.decode("said")


def map_probs(own: list[list[float]], own_labels: str, **fields: Any) -> np.ndarray:
    teacher = Teacher("org/t", **fields)
    return add_up(np.array(own, dtype=np.float32), label_positions(teacher, own_labels.split(), LABELS), len(LABELS))


# ── labels of models ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_label_that_is_left_out_leaves_its_mass_to_the_others() -> None:
    own = [[0.3, 0.1, 0.6], [0.0, 0.0, 1.0], [0.25, 0.75, 0.0]]
    probs = map_probs(own, "ham spam other", label_map={"other": None})
    np.testing.assert_allclose(probs, [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.75, 0]], atol=1e-6)


def test_above_the_limit_outside_there_is_no_answer() -> None:
    own = [[0.3, 0.1, 0.2, 0.4], [0.3, 0.2, 0.2, 0.3], [0.0, 1.0, 0.0, 0.0]]
    probs = map_probs(own, "ham spam tench goldfish", max_outside_mass=0.5)
    np.testing.assert_allclose(probs, [[0, 0, 0], [0.6, 0.4, 0], [0, 1, 0]], atol=1e-6)
    # A limit holds for what is left out by name too.
    probs = map_probs(own, "ham spam tench news", max_outside_mass=0.1, label_map={"tench": None})
    np.testing.assert_allclose(probs, [[0, 0, 0], [0, 0, 0], [0, 1, 0]], atol=1e-6)


def test_a_label_of_several_is_spread_evenly_over_them() -> None:
    own = [[0.8, 0.2], [0.0, 1.0]]
    probs = map_probs(own, "not_spam spam", label_map={"not_spam": ["ham", "news"]})
    np.testing.assert_allclose(probs, [[0.4, 0.2, 0.4], [0, 1, 0]], atol=1e-6)


def test_what_is_no_distribution_stays_none() -> None:
    probs = map_probs([[0.2, 0.1, 0.2], [np.nan, 0.5, 0.5]], "ham spam other", label_map={"other": None})
    assert probs[0].sum() == pytest.approx(0.5) and np.isnan(probs[1]).any()


@pytest.mark.parametrize(
    ("own_labels", "fields", "said"),
    [
        ("ham spam tench", {}, "got ['tench']. Map them with `label_map` (None leaves one out), or allow them by"),
        ("tench eel", {"max_outside_mass": 0.5}, "got ['tench', 'eel']. Map them with `label_map`."),
        ("ham spam", {"label_map": {"ham": None, "spam": None}}, "got a `label_map` that leaves out all of them."),
    ],
)
def test_labels_that_lead_nowhere_are_refused(own_labels: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        map_probs([[0.5] * len(own_labels.split())], own_labels, **fields)
    assert said in str(error.value)


def test_a_teacher_of_more_labels_says_how_many_rows_it_left(tmp_path: Path, tiny_image_dataset: Dataset) -> None:
    names = ("ant", "bee", *(f"other {number}" for number in range(6)))
    folder, images = save_tiny_vit(tmp_path / "vit", names), tiny_image_dataset.select_columns("image")
    whole = build_pool(images, TeacherHierarchy(names, [Teacher(folder)]), disable_tqdm=True, pool_k=8).decode("vit")
    limit = float(np.median(whole[:, 2:].sum(axis=1)))
    hierarchy = TeacherHierarchy(names[:2], [Teacher(folder, max_outside_mass=limit)])

    pool = build_pool(images, hierarchy, disable_tqdm=True, output_dir=tmp_path / "pool")

    inside, kept = whole[:, :2], whole[:, 2:].sum(axis=1) <= limit
    expected = np.where(kept[:, None], inside / inside.sum(axis=1, keepdims=True), 0)
    np.testing.assert_allclose(pool.decode("vit"), expected, atol=2e-3)  # pools are of half precision
    num_left = int((~kept).sum())
    assert 0 < num_left < len(images)
    assert pool.facts["vit"]["num_outside"] == num_left and pool.facts["vit"]["num_rescaled"] == len(images) - num_left
    loaded = PseudolabelPool.load(tmp_path / "pool")
    assert loaded.hierarchy == hierarchy and loaded.hierarchy.teachers[0].max_outside_mass == limit
    assert "| rows outside the task | rows scaled to it |" in pool_card(loaded._card_facts())
    # Another limit gives other answers, so nothing is reused; the same one gives the same.
    again = build_pool(images, hierarchy, disable_tqdm=True, reuse=loaded)
    assert again.facts["vit"] == pool.facts["vit"]
    other = TeacherHierarchy(names[:2], [Teacher(folder, max_outside_mass=1)])
    assert build_pool(images, other, disable_tqdm=True, reuse=loaded).facts["vit"]["num_outside"] == 0


def test_maps_survive_files_and_pickles(tmp_path: Path) -> None:
    label_map = {"not_spam": ["ham", "news"], "other": None, "junk": "spam"}
    hierarchy = TeacherHierarchy(LABELS, [Teacher("org/t", label_map=label_map, max_outside_mass=0.25)])
    for suffix in ("json", "yaml"):
        hierarchy.save(tmp_path / f"teachers.{suffix}")
        assert TeacherHierarchy.load(tmp_path / f"teachers.{suffix}") == hierarchy
    teacher = pickle.loads(pickle.dumps(hierarchy.teachers[0]))
    assert teacher == hierarchy.teachers[0] and teacher.to_dict()["label_map"] == label_map


def test_labels_of_mapped_teachers_are_found(tmp_path: Path, tiny_image_dataset: Dataset) -> None:
    folder = save_tiny_vit(tmp_path / "vit", ("ham", "not_ham", "other"))
    named = {"model": folder, "label_map": {"not_ham": ["spam", "news"], "other": None}}
    assert hierarchy_from_names([named], tiny_image_dataset).labels == LABELS


def test_labels_of_classes_that_leave_numbers_out_are_found(tmp_path: Path) -> None:
    names = {"10": "news", "0": "ham", "2": "spam"}
    config = {"library_name": "sklearn", "feature": {"kind": "text"}, "id2label": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = Dataset.from_dict({"text": ["a"]})
    assert hierarchy_from_names([{"model": str(tmp_path)}], data).labels == ("ham", "spam", "news")


# ── answers in a column ─────────────────────────────────────────────────────────────────────────────────────────────


def test_free_answers_are_matched_but_for_case_and_punctuation() -> None:
    values = ["Spam.", " **ham**\n", "“NEWS”!", "not-spam", "", "  ", None, "Other"]
    probs = label(values, label_map={"not spam": ["ham", "news"], "other": None})
    np.testing.assert_allclose(probs, [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0.5, 0, 0.5], *[[0, 0, 0]] * 4], atol=1e-6)


def test_of_names_that_are_alike_only_the_exact_one_is_meant() -> None:
    labels = ("C", "C++", "1", "-1", "re-do", "re do")
    answers = ["c.", "c++", "-1", "1", "3", "RE-DO", "re do"]
    np.testing.assert_array_equal(label(answers, labels).argmax(axis=1), [0, 1, 3, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="got 're_do' in row 0"):
        label(["re_do"], labels)


@pytest.mark.parametrize("values", [["0", "1.0", "-100", "-1", "2"], [0.0, 1.0, -100.0, float("nan"), 2.0]])
def test_numbers_are_label_ids(values: list[Any]) -> None:
    np.testing.assert_array_equal(label(values), [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]])


def test_counts_of_votes_become_shares() -> None:
    expected = [[0.75, 0.25, 0], [0, 0, 0], [0, 0, 1], [0.5, 0.5, 0]]
    np.testing.assert_allclose(label([[3, 1, 0], [0, 0, 0], [0, 0, 7], [0.5, 0.5, 0.0]]), expected)
    by_name = [{"ham": 3, "Spam": 1}, {"ham": 0}, {"news": 7}, {"ham": 0.5, "Spam": 0.5}]
    np.testing.assert_allclose(label(by_name), expected)


def test_counts_by_name_are_mapped() -> None:
    values = [{"not spam": 2, "spam": 2}, {"other": 3, "spam": 1}, {"other": 1, "spam": 0}]
    fields: dict[str, Any] = {"label_map": {"not spam": ["ham", "news"], "other": None}}
    np.testing.assert_allclose(label(values, **fields), [[0.25, 0.5, 0.25], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(label(values, **fields, max_outside_mass=0.5)[1], [0, 0, 0])


def test_answers_outside_the_task_are_none_where_they_are_allowed() -> None:
    np.testing.assert_array_equal(label(["spam", "tench"], max_outside_mass=0.5), [[0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "value",
    [
        *([1.5, 0.0, 0.0], [2, 1], [-1, 2, 0], [float("inf"), 0.0, 0.0]),
        *({"ham": 1.5}, {"ham": "many"}, {"tench": 1}),
        *("spam or ham", "3", "9" * 400),
    ],
)
def test_other_answers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Answers in column 'said' must be label names .* in row 0"):
        label([value])


def test_what_did_not_match_is_a_table(caplog: pytest.LogCaptureFixture) -> None:
    values = ["spam", *(f"I say {number}" for number in range(11)), "I say 10", "I say 10", "unsure", "unsure"]
    table = "'I say 10' × 3, 'unsure' × 2, 'I say 0' × 1, "
    with pytest.raises(ValueError) as error:
        label(values)
    assert f"how often they are there: {table}" in str(error.value)
    assert str(error.value).endswith("'I say 7' × 1, and 2 others.")

    with caplog.at_level(logging.WARNING):
        probs = label(values, on_error="missing")
    assert probs.any(axis=1).tolist() == [True] + [False] * 15
    assert "failed on 15 of 16 rows" in caplog.text and table in caplog.text


# ── labels that nobody gave ─────────────────────────────────────────────────────────────────────────────────────────


def named(columns: dict[str, list[Any]], *names: str | dict[str, Any]) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Labels that are found, and what each teacher's answers are read as, -1 for none."""
    count = len(next(iter(columns.values())))
    data = Dataset.from_dict({"id": list(range(count)), "text": [str(row) for row in range(count)], **columns})
    hierarchy = hierarchy_from_names(names or tuple(columns), data)
    pool = build_pool(data, hierarchy, disable_tqdm=True)
    return hierarchy.labels, {name: pool.hard_labels(name).tolist() for name in hierarchy.names}


@pytest.mark.parametrize(
    ("columns", "labels", "read"),
    [
        ({"a": ["no", "yes"], "b": ["NO!", "Yes"]}, ("no", "yes"), {"a": [0, 1], "b": [0, 1]}),
        ({"a": ["Yes", "yes", "yes.", "no", "yes"]}, ("no", "yes"), {"a": [1, 1, 1, 0, 1]}),
        ({"a": ["not spam", "spam"], "b": ["Not-Spam", "SPAM?"]}, ("not spam", "spam"), {"a": [0, 1], "b": [0, 1]}),
        ({"a": ["yes", "no"], "b": ["NO!", None]}, ("no", "yes"), {"a": [1, 0], "b": [0, -1]}),
        ({"a": ["+1", "-1"], "b": ["-1", "+1"]}, ("+1", "-1"), {"a": [0, 1], "b": [1, 0]}),
        ({"a": ["C", "C++"], "b": ["c", "c++"]}, ("C", "C++"), {"a": [0, 1], "b": [0, 1]}),
        ({"a": [":)", ":("], "b": [":(", ":)"]}, (":(", ":)"), {"a": [1, 0], "b": [0, 1]}),
    ],
)
def test_names_that_are_alike_are_one_label(
    columns: dict[str, list[Any]], labels: tuple[str, ...], read: dict[str, list[int]]
) -> None:
    assert named(columns) == (labels, read)


def test_a_name_of_a_model_and_one_of_a_column_are_one_label(tmp_path: Path) -> None:
    names = {0: "not_spam", 1: "Spam"}
    config = {"library_name": "sklearn", "feature": {"kind": "text"}, "id2label": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = Dataset.from_dict({"text": ["a", "b"], "said": ["NOT-SPAM", "spam"]})
    for order, labels in (
        (["said", str(tmp_path)], ("not_spam", "spam")),
        ([str(tmp_path), "said"], ("not_spam", "Spam")),
    ):
        assert hierarchy_from_names(order, data).labels == labels
    # Of one model two labels stay two, and a column that spells one of them so means that one.
    names = {0: "C", 1: "C#", 2: "c"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": names}))
    data = Dataset.from_dict({"text": ["a", "b"], "said": ["C#", "C"]})
    assert hierarchy_from_names([str(tmp_path), "said"], data).labels == ("C", "C#", "c")
    assert {*hierarchy_from_names(["said", str(tmp_path)], data).labels} == {"C", "C#", "c"}


def test_labels_of_a_mapped_column_are_found() -> None:
    mapped = {"model": "a", "kind": "column", "label_map": {"not spam": ["ham", "news"], "unsure": None}}
    labels, read = named({"a": ["Not spam", "spam", "unsure", "ham"]}, mapped)
    assert labels == ("ham", "news", "spam") and read["a"][1:] == [2, -1, 0]


def test_doubtful_labels_are_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = ["positive", "negative"] * 250
    named({"a": ["postive", *rows[1:]], "b": [*rows[:-1], "Negative"]})
    assert caplog.messages == [
        "Of 1000 answers in columns very few give the labels 'postive' × 1, as if mistyped. If they are, correct the "
        "cells; if they are labels of the task, give all of these by `labels`."
    ]
    caplog.clear()
    named({"a": ["A", "A-", "A-", "B"]})
    assert caplog.messages == [
        "Answers in columns that differ in case and punctuation alone are read as one label: 'A' as 'A-'. If they are "
        "several, give the task's labels by `labels`."
    ]
    caplog.clear()
    named({"a": [f"label {row % 300}" for row in range(1500)]})  # many labels are rare for another reason
    named({"a": ["x", *["y"] * 30]})  # one of few answers
    assert not caplog.messages


def test_names_of_models_that_differ_in_punctuation_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder, name in (("a", "not_spam"), ("b", "not spam")):
        (tmp_path / folder).mkdir()
        config = {"library_name": "sklearn", "feature": {"kind": "text"}, "id2label": {0: name, 1: "spam"}}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    hierarchy_from_names([str(tmp_path / "a"), str(tmp_path / "b")], Dataset.from_dict({"text": ["a"]}))
    assert "The labels 'not_spam' and 'not spam' of two teachers are two, and differ in punctuation" in caplog.text
