"""The door for votes: columns, matrices, long tables, WRENCH folders, and a label model at the root."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from hf_cosupervise import (
    PseudolabelPool,
    TeacherHierarchy,
    build_pool,
    hierarchy_from_columns,
    make_label_model,
    read_wrench,
)
from hf_cosupervise.pool.derived import pool_votes

VOTES = [["a", None, "b"], ["a", "a", float("nan")], ["b", "b", -1], ["b", "", "a"], [None, None, None]]
IDS = [[0, -1, 1], [0, 0, -1], [1, 1, -1], [1, -1, 0], [-1, -1, -1]]
NAMES, LABELS = ["x", "y", "z"], ["a", "b"]


# ── a matrix ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "matrix",
    [
        VOTES,
        IDS,
        np.array(IDS, dtype=np.int8),
        pd.DataFrame(IDS, dtype="Int8").replace(-1, pd.NA),
        *(np.where(np.array(IDS) < 0, gap, IDS) for gap in (np.nan, -100)),
    ],
)
def test_a_matrix_of_names_or_ids_with_gaps(matrix):
    pool = PseudolabelPool.from_votes(matrix, NAMES, LABELS)
    assert pool_votes(pool).tolist() == IDS and pool.ids.tolist() == [0, 1, 2, 3, 4]
    assert pool.labels == ("a", "b") and [teacher.level for teacher in pool.hierarchy.teachers] == [0, 0, 0]
    assert pool.decode("x").tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]]


def test_a_matrix_with_inputs():
    inputs = Dataset.from_dict({"id": list("vwxyz"), "text": ["row"] * 5, "oracle_label": [0, 0, 1, 0, 1]})
    pool = PseudolabelPool.from_votes(IDS, NAMES, LABELS, inputs)
    assert pool.ids.tolist() == list("vwxyz") and pool.oracle_labels.tolist() == [0, 0, 1, 0, 1]
    numbered = PseudolabelPool.from_votes(IDS, NAMES, LABELS, inputs.remove_columns("id"))
    assert (
        numbered.inputs["id"] == [0, 1, 2, 3, 4]
        and len(PseudolabelPool.from_votes(np.zeros((0, 3)), NAMES, LABELS)) == 0
    )


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([["c", "a", "a"]], "one of the labels .*got 'c'. Correct it"),
        ([[2, None, 0]], "got 2. Correct it"),
        ([[2, 0, 0]], "labels from 0 below 2"),
        ([[0.5, 0, 0]], "got 0.5"),
        ([[True, None, 0]], "got True"),
        ([[0, 1]], r"a column for each of the 3 `names`, got shape \(1, 2\)"),
    ],
)
def test_a_matrix_that_holds_no_votes_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        PseudolabelPool.from_votes(matrix, NAMES, LABELS)


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_columns(values=VOTES) -> Dataset:
    columns = {f"lf_{name}": list(column) for name, column in zip(NAMES, zip(*values))}
    return Dataset.from_dict({"text": [f"row {row}" for row in range(len(values))], **columns})


def test_columns_of_names():
    data = make_columns([[value if isinstance(value, str) else None for value in row] for row in VOTES])
    hierarchy = hierarchy_from_columns(data)
    assert hierarchy.labels == ("a", "b") and hierarchy.names == ("lf_x", "lf_y", "lf_z")
    assert pool_votes(build_pool(data, hierarchy)).tolist() == IDS
    assert hierarchy_from_columns(data, prefix="lf_y", labels=["b", "a"]).labels == ("b", "a")


@pytest.mark.parametrize("gap", [-1, -100, None, float("nan")])
def test_columns_of_ids_with_gaps(gap):
    data = make_columns([[gap if value < 0 else value for value in row] for row in IDS])
    assert hierarchy_from_columns(data).labels == ("0", "1")
    assert pool_votes(build_pool(data, hierarchy_from_columns(data, labels=LABELS))).tolist() == IDS


def test_columns_that_hold_no_votes_are_refused():
    data = make_columns(IDS)
    with pytest.raises(ValueError, match=r"begin with 'vote_', got the columns \['text', 'lf_x'"):
        hierarchy_from_columns(data, prefix="vote_")
    with pytest.raises(ValueError, match=r"two labels or more, got \['a'\]"):
        hierarchy_from_columns(make_columns([["a", None, "a"]]))
    mixed = data.add_column("lf_w", ["a"] * 5)
    with pytest.raises(ValueError, match="all names or all label ids, got"):
        hierarchy_from_columns(mixed)


# ── a long table ────────────────────────────────────────────────────────────────────────────────────────────────────


def make_answers(extra=()) -> dict[str, list]:
    rows = [(f"item {i}", f"worker {k}", "ab"[v]) for i, row in enumerate(IDS) for k, v in enumerate(row) if v >= 0]
    return dict(zip(("item", "worker", "label"), map(list, zip(*rows, *extra))))


def test_a_table_of_answers_in_any_order():
    table = make_answers()
    pool = PseudolabelPool.from_answers(table)
    assert pool.hierarchy.names == ("worker-0", "worker-2", "worker-1")  # in the order of their first answers
    assert pool.ids.tolist() == [f"item {row}" for row in range(4)] and pool.labels == ("a", "b")
    assert pool_votes(pool)[:, [0, 2, 1]].tolist() == IDS[:4]
    inputs = Dataset.from_dict({"id": [f"item {row}" for row in (4, 1, 0, 3, 2)]})
    for given in (Dataset.from_dict(table), pd.DataFrame(table)):
        with_inputs = PseudolabelPool.from_answers(given, ["b", "a"], inputs)
        assert with_inputs.labels == ("b", "a") and with_inputs.ids.tolist() == list(inputs["id"])
        expected = [[-1, -1, -1] if row == 4 else [v if v < 0 else 1 - v for v in IDS[row]] for row in (4, 1, 0, 3, 2)]
        assert pool_votes(with_inputs)[:, [0, 2, 1]].tolist() == expected
    named = PseudolabelPool.from_answers(
        {"task": [7, 8], "who": [1, 1], "said": [0, 1]}, item_column="task", worker_column="who", label_column="said"
    )
    assert (
        pool_votes(named).tolist() == [[0], [1]] and named.hierarchy.names == ("1",) and named.ids.tolist() == [7, 8]
    )


def test_several_answers_of_a_worker_to_an_item():
    again = [
        ("item 0", "worker 0", "a"),
        ("item 1", "worker 0", "b"),
        ("item 1", "worker 0", "b"),
        ("item 2", "worker 0", "a"),
    ]
    with pytest.warns(UserWarning, match="^1 workers' answers to an item contradict each other evenly"):
        votes = pool_votes(PseudolabelPool.from_answers(make_answers(again)))
    assert votes[:, 0].tolist() == [0, 1, -1, 1]  # said twice; two against one; one against one; untouched


def test_tables_that_cannot_be_used_are_refused():
    table = make_answers()
    with pytest.raises(ValueError, match=r"needs the column 'label', got \['item', 'worker'\]"):
        PseudolabelPool.from_answers({key: table[key] for key in ("item", "worker")})
    with pytest.raises(ValueError, match="got 3 others such as 'item 1'. Ids and items must be of one kind"):
        PseudolabelPool.from_answers(table, inputs=Dataset.from_dict({"id": ["item 0"]}))
    with pytest.raises(ValueError, match="need an `id` column of the items"):
        PseudolabelPool.from_answers(table, inputs=Dataset.from_dict({"text": ["item 0"]}))
    for rows in ("answers.csv", [("item 0", "worker 0", "a")]):
        with pytest.raises(TypeError, match="must be a data frame, a `Dataset` or a dictionary of columns, got"):
            PseudolabelPool.from_answers(rows)
    for nobody in (None, float("nan"), ""):
        table["worker"][2] = nobody
        with pytest.raises(ValueError, match="needs an item and a worker, got .* as 'worker' in row 2. Drop such"):
            PseudolabelPool.from_answers(table)


def test_an_unknown_method_is_told_of_all_that_are_known():
    with pytest.raises(ValueError, match="Unknown `method` 'majority'. Choose one of shared_majority, .*raven"):
        PseudolabelPool.from_votes(IDS, NAMES, LABELS).with_aggregate("majority")


def test_what_is_no_data_set_is_refused(tmp_path, monkeypatch):
    data, path = make_columns([["a", "b", None]]), tmp_path / "votes.csv"
    with pytest.raises(TypeError, match="must be a `datasets.Dataset`, got DataFrame. Read a file by"):
        hierarchy_from_columns(data.to_pandas())
    data.to_csv(path)
    monkeypatch.chdir(tmp_path)
    for name in (path.name, str(path)):  # without a slash it is no id either
        with pytest.raises(
            ValueError, match="got '.*votes.csv': .*Load the data by `datasets.load_dataset`, and give"
        ):
            build_pool(name, hierarchy_from_columns(data))


# ── a label model at the root ───────────────────────────────────────────────────────────────────────────────────────


def make_crowd(num_rows=120, seed=0) -> tuple[np.ndarray, PseudolabelPool]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=num_rows)
    shape = num_rows, 5
    votes = np.where(rng.random(shape) < 0.75, truth[:, None], rng.integers(3, size=shape))
    votes = np.where(rng.random(shape) < 0.3, -1, votes)
    return truth, PseudolabelPool.from_votes(votes, list("abcde"), ["p", "q", "r"])


def test_a_shared_majority_at_the_root():
    pool = PseudolabelPool.from_votes(IDS, NAMES, LABELS)
    found = pool.with_aggregate()
    assert found.hierarchy.names == ("shared-majority", "x", "y", "z")
    assert [teacher.level for teacher in found.hierarchy.teachers] == [0, 1, 1, 1]
    assert found.decode("shared-majority").tolist() == [[0.5, 0.5], [1, 0], [0, 1], [0.5, 0.5], [0, 0]]
    assert pool_votes(found)[:, 1:].tolist() == IDS and found.teachers["x"] is pool.teachers["x"]
    again = found.with_aggregate("mean_probs", name="mean")
    assert [teacher.level for teacher in again.hierarchy.teachers] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("method", ["shared_majority", "dawid_skene", "mace", "ebcc", "majority_vote", "mean_probs"])
def test_label_models_by_name(method):
    truth, pool = make_crowd()
    found = pool.with_aggregate(method)
    probs = found.decode(found.hierarchy.names[0])
    assert found.hierarchy.names[0] == method.replace("_", "-") and found.hierarchy.num_levels == 2
    assert (probs.argmax(axis=1) == truth)[probs.any(axis=1)].mean() > 0.8


def test_a_fitted_model_labels_another_split():
    _, pool = make_crowd()
    _, other = make_crowd(30, seed=1)
    model = make_label_model("dawid_skene").fit(pool_votes(pool), 3)
    before = json.dumps(model.to_dict())
    found = other.with_aggregate(model, name="root")
    np.testing.assert_allclose(found.decode("root"), model.predict_proba(pool_votes(other)), atol=1e-3)
    assert json.dumps(model.to_dict()) == before
    fresh = make_label_model("dawid_skene")
    np.testing.assert_allclose(
        pool.with_aggregate(fresh).decode("dawid-skene"), model.predict_proba(pool_votes(pool)), atol=1e-3
    )
    assert fresh.voter_names == tuple("abcde")


def test_roots_that_cannot_be_are_refused():
    _, pool = make_crowd()
    with pytest.raises(ValueError, match="Unknown `method` 'best'"):
        pool.with_aggregate("best")
    with pytest.raises(ValueError, match=r"Teacher names must be unique, got \['a'\]"):
        pool.with_aggregate(name="a")
    two = make_label_model("shared_majority").fit(np.zeros((4, 5), dtype=int), 2)
    with pytest.raises(ValueError, match="got values from -1 to 2"):
        pool.with_aggregate(two)
    four = make_label_model("shared_majority").fit(np.zeros((4, 5), dtype=int), 4)
    with pytest.raises(ValueError, match="of the pool's 3 labels, got one of 4"):
        pool.with_aggregate(four)


# ── what is in it ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_description_is_a_table():
    inputs = Dataset.from_dict({"oracle_label": [0, 0, 1, 0, 1]})
    pool = PseudolabelPool.from_votes(IDS, NAMES, LABELS, inputs)
    assert str(pool.describe()).splitlines() == [
        "5 rows, 80.0% with a vote, 40.0% in conflict",
        "voter  labels  coverage  overlaps  conflicts  accuracy",
        "x      a, b       0.800     0.800      0.400     0.750",
        "y      a, b       0.400     0.400      0.000     1.000",
        "z      a, b       0.400     0.400      0.400     0.500",
    ]
    blind = PseudolabelPool.from_votes([[0, -1, -1], [0, 1, -1]], NAMES, LABELS).describe()
    assert "accuracy" not in str(blind) and [voter.polarity for voter in blind.voters] == [(0,), (1,), ()]
    assert (blind.coverage, blind.conflicts, blind.num_rows) == (1.0, 0.5, 2)


# ── WRENCH ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_wrench(folder, labels=None) -> None:
    for split, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        rows = {str(n): {"label": n % 2, "weak_labels": IDS[n], "data": {"text": f"row {n}"}} for n in numbers}
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    if labels:
        (folder / "label.json").write_text(json.dumps(labels), encoding="utf-8")


def test_a_wrench_folder(tmp_path):
    write_wrench(tmp_path, {"0": "ham", "1": "spam"})
    found = read_wrench(tmp_path)
    assert list(found) == ["train", "test"] and found["train"].labels == ("ham", "spam")
    assert pool_votes(found["train"]).tolist() == IDS[:3] and found["test"].ids.tolist() == ["3"]
    assert found["train"].inputs["text"] == ["row 0", "row 1", "row 2"]
    assert found["train"].oracle_labels.tolist() == [0, 1, 0]
    assert found["train"].hierarchy.names == ("lf_0", "lf_1", "lf_2")
    (tmp_path / "label.json").unlink()
    assert read_wrench(tmp_path)["test"].labels == ("0", "1")
    for labels in ({"1": "ham", "2": "spam"}, {"ham": 0, "spam": 1}):
        write_wrench(tmp_path, labels)
        with pytest.raises(ValueError, match="a name for each label by its number, counted from 0, got"):
            read_wrench(tmp_path)


def test_folders_that_are_none_of_wrench(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold one of .*train.json"):
        read_wrench(tmp_path)
    for text, message in (
        ("{", "must be JSON, got"),
        ("[]", "must be a JSON object, got a list"),
        ('{"0": {"label": 1}}', "got no such row '0'"),
        (
            '{"0": {"label": 1, "weak_labels": [1], "data": {}}, "1": {"label": 0, "weak_labels": [], "data": {}}}',
            "length",
        ),
        ('{"0": {"label": 1, "weak_labels": null, "data": {}}}', "got no such row '0'"),
        ('{"0": {"label": 1, "weak_labels": [1], "data": "text"}}', "got no such row '0'"),
    ):
        (tmp_path / "train.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_wrench(tmp_path)


def test_a_hierarchy_of_votes_is_saved_and_read(tmp_path):
    pool = PseudolabelPool.from_votes(IDS, NAMES, LABELS).with_aggregate()
    pool.save(tmp_path / "pool")
    read = PseudolabelPool.load(tmp_path / "pool")
    assert isinstance(read.hierarchy, TeacherHierarchy) and read.hierarchy == pool.hierarchy
    torch.testing.assert_close(read.decode_level([0, 1], slice(None)), pool.decode_level([0, 1], slice(None)))


def test_a_root_of_all_keeps_what_is_known_of_the_inputs():
    data = Dataset.from_dict(
        {"words": ["a", "b", "c", "d"], "lf_a": ["x", "y", "x", "y"], "lf_b": ["x", "x", "y", "y"]}
    )
    pool = build_pool(data, hierarchy_from_columns(data), input_column="words", disable_tqdm=True)
    assert pool.with_aggregate("mean_probs").input_column == "words"
