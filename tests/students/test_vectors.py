"""Vectors as inputs: from numbers and what teachers say of them to a student that predicts without this package."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_cosupervise import (
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    VectorClassifier,
    VectorClassifierConfig,
    build_pool,
    hierarchy_from_columns,
    load_student,
)
from hf_cosupervise.evaluation.overview import overview

LABELS = ("red", "blue", "green")
NUM_ROWS, NUM_FEATURES = 90, 4


def draw(num_rows: int = NUM_ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of unlike scales, the last number of which tells nothing, and their labels."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(len(LABELS), size=num_rows)
    vectors = rng.normal(size=(num_rows, NUM_FEATURES)) + np.eye(len(LABELS), NUM_FEATURES)[truth] * 3
    vectors = vectors * [1, 100, 10, 1] + [0, -50, 2000, 0]
    vectors[:, 3] = 7
    return vectors, truth


VECTORS, TRUTH = draw()


def say(share: float, seed: int) -> np.ndarray:
    """A teacher's probabilities, of whose labels a share is certainly right."""
    rng = np.random.default_rng(seed)
    said = np.where(rng.random(NUM_ROWS) < share, TRUTH, rng.integers(len(LABELS), size=NUM_ROWS))
    return 0.1 + 0.7 * np.eye(len(LABELS))[said]


SAID = {"first": say(0.6, 1), "second": say(0.7, 2)}


def vector_pool(vectors: Any = VECTORS, **inputs: Any) -> PseudolabelPool:
    given = inputs or {"vectors": vectors}
    return PseudolabelPool.from_predictions(SAID, labels=LABELS, **given)


def make_args(folder: Path, **given: Any) -> CoSupervisedConfig:
    common = {
        "per_device_train_batch_size": 30,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 0.05,
    }
    return CoSupervisedConfig(str(folder), **{**common, **given})


def make_trainer(student: Any, folder: Path, pool: PseudolabelPool | None = None, **given: Any) -> CoSupervisedTrainer:
    return CoSupervisedTrainer(student, make_args(folder, **given), pool=vector_pool() if pool is None else pool)


def labelled(vectors: Any = VECTORS, truth: np.ndarray = TRUTH) -> Dataset:
    return Dataset.from_dict({"vector": vectors, "label": [LABELS[label] for label in truth]})


def probabilities(trainer: CoSupervisedTrainer, vectors: Any = VECTORS) -> np.ndarray:
    data = Dataset.from_dict({"vector": vectors})
    return torch.cat([log_probs for _, log_probs in trainer.predict_log_probs(data)]).exp().numpy()


KINDS = {
    "linear": ("linear", {}),
    "ridge": ("linear", {"head_solver": "ridge"}),
    "mlp": ("mlp", {"student_training": "full", "num_train_epochs": 8, "learning_rate": 0.003}),
}
# Torch and scikit-learn alone; a name of this package is an error.
ALONE = """
import os, sys
sys.modules["hf_cosupervise"] = None
import numpy as np

given, found = np.load("given.npy"), {}
for kind, code in CODE.items():
    os.chdir(kind)
    exec(code)
    found[f"{kind} plain"] = model((torch.from_numpy(given).float() - mean) / scale).softmax(-1).detach().numpy()
    by_sklearn = skops.io.load("model.skops")
    found[f"{kind} sklearn"], found[f"{kind} said"] = by_sklearn.predict_proba(given), by_sklearn.predict(given)
    os.chdir("..")
np.savez("found.npz", **found)
"""


def test_what_is_saved_predicts_the_same_without_this_package(tmp_path):
    pytest.importorskip("skops")
    expected, code = {}, {}
    for kind, (student, given) in KINDS.items():
        trainer = make_trainer(student, tmp_path / "runs" / kind, **given)
        trainer.train()
        trainer.save_model(str(tmp_path / kind))
        trainer.create_model_card()
        assert trainer.measure_accuracy(labelled(*draw(seed=9))) > 0.85
        assert {path.name for path in (tmp_path / kind).iterdir()} == {
            "config.json",
            "model.safetensors",
            "model.skops",
        }
        card = (tmp_path / "runs" / kind / "README.md").read_text(encoding="utf-8")
        assert "pipeline_tag: tabular-classification" in card and "A tabular classifier of 3 labels" in card
        expected[kind], code[kind] = (
            probabilities(trainer),
            re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1),
        )
        loaded = VectorClassifier.from_pretrained(tmp_path / kind)
        np.testing.assert_allclose(loaded.predict_proba(VECTORS), expected[kind], atol=1e-6, rtol=0)
    np.save(tmp_path / "given.npy", VECTORS)
    command = [sys.executable, "-W", "error::UserWarning", "-c", f"CODE = {code!r}\n{ALONE}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    for kind, probs in expected.items():
        atol = 1e-5 if kind == "mlp" else 1e-6
        np.testing.assert_allclose(found[f"{kind} plain"], probs, atol=atol, rtol=0)
        np.testing.assert_allclose(found[f"{kind} sklearn"], probs, atol=atol, rtol=0)
        assert found[f"{kind} said"].tolist() == [LABELS[label] for label in probs.argmax(axis=1)]


@pytest.mark.parametrize("hidden_sizes", [(), (5, 3)])
def test_two_labels_and_any_order_of_them(hidden_sizes, tmp_path):
    # scikit-learn has one output for two labels, and sorts them where it fits
    skops_io = pytest.importorskip("skops.io")
    from hf_cosupervise.students.publishing import export_student

    for labels in (("yes", "no"), ("2", "0", "1")):
        model = VectorClassifier.for_data(labelled(), "vector", labels, hidden_sizes=hidden_sizes)
        export_student(model, tmp_path / labels[0])
        found = skops_io.load(tmp_path / labels[0] / "model.skops")
        np.testing.assert_allclose(found.predict_proba(VECTORS), model.predict_proba(VECTORS), atol=1e-6)
        assert found.classes_.tolist() == list(labels)
        # a student becomes a teacher of the next one, its labels found by name
        hierarchy = TeacherHierarchy(sorted(labels), [Teacher(str(tmp_path / labels[0]), name="student")])
        pool = build_pool(labelled().remove_columns("label"), hierarchy, disable_tqdm=True)
        own = [labels[label] for label in model.predict_proba(VECTORS).argmax(axis=1)]
        assert [pool.labels[label] for label in pool.hard_labels("student")] == own
        assert pool.facts["student"]["kind"] == "sklearn"


def test_standardisation_is_of_the_pool_and_a_part_of_the_model(tmp_path):
    model = make_trainer("linear", tmp_path).model
    np.testing.assert_allclose(model.backbone.mean, VECTORS.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(model.backbone.scale[:3], VECTORS.std(axis=0)[:3], rtol=1e-6)
    assert model.backbone.scale[3] == 1  # a number that is always the same
    features = make_trainer(model, tmp_path / "other").pool_features()
    np.testing.assert_allclose(features, (VECTORS - VECTORS.mean(axis=0)) / [*VECTORS.std(axis=0)[:3], 1], atol=1e-3)
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    assert {"backbone.mean", "backbone.scale", "classifier.weight", "classifier.bias"} == set(model.state_dict())


@pytest.mark.parametrize(
    ("cells", "feature"),
    [
        ((VECTORS > 0).tolist(), List(Value("bool"))),
        (VECTORS.astype(int).tolist(), List(Value("int32"), length=4)),
        (VECTORS.astype(np.float16), List(Value("float16"))),
        (VECTORS.reshape(-1, 2, 2).tolist(), Array2D((2, 2), "float32")),
        (VECTORS.reshape(-1, 2, 2).tolist(), List(List(Value("float64")))),
    ],
    ids=["bool", "int32", "float16", "array", "nested"],
)
def test_lists_of_all_kinds_of_numbers(cells, feature, tmp_path):
    data = Dataset.from_dict({"numbers": cells}, features=Features({"numbers": feature}))
    trainer = make_trainer("linear", tmp_path, vector_pool(inputs=data))
    trainer.train()
    expected = np.array(np.asarray(cells, dtype=np.float32).reshape(NUM_ROWS, NUM_FEATURES))
    found = torch.cat([log_probs for _, log_probs in trainer.predict_log_probs(data)]).exp()
    np.testing.assert_allclose(trainer.model.predict_proba(expected), found, atol=1e-6)


def test_several_columns_are_one_vector_wherever_data_come_in(tmp_path):
    names = ["age", "income", "height", "days"]
    table = Dataset.from_dict({name: VECTORS[:, number] for number, name in enumerate(names)})
    voted = table.add_column("lf_a", [LABELS[label] for label in SAID["first"].argmax(axis=1)])
    voted = voted.add_column("lf_b", [LABELS[label] for label in SAID["second"].argmax(axis=1)])
    hierarchy = hierarchy_from_columns(voted, labels=LABELS)
    pool = build_pool(voted, hierarchy, input_column=names, output_dir=tmp_path / "pool", disable_tqdm=True)
    assert pool.input_column == "age, income, height, days" and {*names} < {*pool.inputs.column_names}
    trainer = make_trainer("linear", tmp_path / "a", PseudolabelPool.load(tmp_path / "pool"))
    trainer.train()
    assert trainer.model.config.feature_names == names
    test = table.add_column("label", [LABELS[label] for label in TRUTH]).shuffle(seed=1)
    accuracy = trainer.measure_accuracy(test)
    assert accuracy > 0.85 and trainer.evaluate(test)["eval_accuracy"] == accuracy
    assert trainer.predict(table).predictions.shape == (NUM_ROWS, len(LABELS))
    assert trainer.student.features(table).shape == (NUM_ROWS, NUM_FEATURES)
    # as on a command line, and from data beside a pool that holds none
    bare = build_pool(voted, hierarchy, input_column="age,income,height,days", keep_inputs=False, disable_tqdm=True)
    other = CoSupervisedTrainer("linear", make_args(tmp_path / "b"), pool=bare, train_dataset=table.select(range(90)))
    other.train()
    np.testing.assert_array_equal(other.model.classifier.weight.detach(), trainer.model.classifier.weight.detach())


def test_one_column_feeds_teachers_and_student(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher

    few = linear_model.LogisticRegression(max_iter=9000).fit(*draw(30, seed=3))
    save_sklearn_teacher(few, tmp_path / "teacher", {"kind": "values"}, LABELS)
    hierarchy = TeacherHierarchy(LABELS, [Teacher(str(tmp_path / "teacher"))])
    data = labelled().rename_column("vector", "features")
    with pytest.raises(ValueError, match="undeclared ground truth"):
        build_pool(data, hierarchy, disable_tqdm=True)
    pool = build_pool(data, hierarchy, oracle_column="label", disable_tqdm=True)
    assert pool.input_column == "features" and (pool.hard_labels("teacher") == few.predict(VECTORS)).all()
    trainer = make_trainer("linear", tmp_path / "run", pool)
    trainer.train()
    assert (trainer.predict_labels(data) == few.predict(VECTORS)).mean() > 0.9
    # a row that nobody can read is left out where that is asked for, and named where it is not
    cells = VECTORS.tolist()
    cells[3], cells[5] = cells[3][:2], [float("nan")] * 4
    broken = Dataset.from_dict({"features": cells})
    with pytest.raises(ValueError, match="row 3"):
        build_pool(broken, hierarchy, disable_tqdm=True)
    pool = build_pool(broken, hierarchy, on_error="missing", disable_tqdm=True)
    assert np.flatnonzero(~pool.answered("teacher")).tolist() == [3, 5]
    trainer = make_trainer("linear", tmp_path / "missing", pool)
    trainer.train()
    assert np.flatnonzero(~trainer.student.readable).tolist() == [3, 5]
    assert np.flatnonzero(trainer.predict_labels(pool.inputs) < 0).tolist() == [3, 5]


def test_answers_are_nobodys_input(tmp_path):
    data = Dataset.from_dict({"numbers": VECTORS, "told": SAID["first"]})
    hierarchy = TeacherHierarchy(LABELS, [Teacher("told", kind="column")])
    pool = build_pool(data, hierarchy, disable_tqdm=True)
    assert pool.input_column == "numbers" and "told" not in pool.inputs.column_names
    with pytest.raises(ValueError, match=r"or the only one of vectors, got none among \[\]"):
        build_pool(data.remove_columns("numbers"), hierarchy, disable_tqdm=True)


def test_committee_resume_neighbours_and_account(tmp_path):
    pool = vector_pool().with_aggregate("mean_probs")
    trainer = make_trainer("linear", tmp_path / "run", pool, method="committee", learning_rate=1e-3)
    trainer.train()
    again = make_trainer("linear", tmp_path / "run", pool, method="committee", learning_rate=1e-3)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(again.model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
    seen = overview(trainer)
    seen.save_labels(tmp_path / "labels.parquet")
    seen.save_to_label(tmp_path / "to_label.csv", 5)
    assert (Dataset.from_parquet(str(tmp_path / "labels.parquet"))["label"][0]) in LABELS
    other = vector_pool(VECTORS + 1).with_aggregate("mean_probs")
    with pytest.raises(ValueError, match="another"):
        make_trainer("linear", tmp_path / "run", other, method="committee", learning_rate=1e-3).train(True)


def test_a_run_cut_off_inside_a_level_goes_on(tmp_path):
    student, given = "mlp", {"student_training": "full", "save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    whole = make_trainer(student, tmp_path / "whole", **given)
    whole.train()
    cut = make_trainer(student, tmp_path / "cut", **given)

    save = cut._save_checkpoint

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    cut._save_checkpoint = save_and_stop
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    gone_on = make_trainer(student, tmp_path / "cut", **given)
    gone_on.train(resume_from_checkpoint=True)
    torch.testing.assert_close(gone_on.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_a_saved_student_is_a_backbone_for_the_next_task(tmp_path):
    trainer = make_trainer("mlp", tmp_path / "first", student_training="full", learning_rate=0.003)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    student, processor = load_student(tmp_path / "model", ("a", "b"))
    assert processor is None and student.config.num_labels == 2
    torch.testing.assert_close(student.backbone.state_dict(), trainer.model.backbone.state_dict(), rtol=0, atol=0)
    probe = make_trainer(str(tmp_path / "model"), tmp_path / "second")
    probe.train()
    assert probe.student.head is not None and probe.measure_accuracy(labelled()) > 0.85
    torch.testing.assert_close(probe.model.backbone.state_dict(), student.backbone.state_dict(), rtol=0, atol=0)
    config = (tmp_path / "model" / "config.json").read_text()
    for wrong, found in (('"num_features": 1000000000', "parameters"), ('"num_features": "4"', "whole number")):
        (tmp_path / "model" / "config.json").write_text(re.sub('"num_features": 4', wrong, config))
        with pytest.raises(ValueError, match=found):
            load_student(tmp_path / "model", LABELS)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def changed(row: int, value: Any) -> list[Any]:
    cells: list[Any] = VECTORS.tolist()
    cells[row] = value
    return cells


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        (changed(3, [1.0, 2.0]), "must all be of one length, 4 as most are, got one of 2 in row 3 (1 such rows)."),
        (changed(4, []), "must all be of one length, 4 as most are, got one of 0 in row 4 (1 such rows)."),
        (changed(5, [1, 2, float("nan"), 3]), "must hold finite numbers below 1e+18, got nan at place 2 of row 5 (1"),
        (
            changed(6, [1, -float("inf"), 2, 3]),
            "must hold finite numbers below 1e+18, got -inf at place 1 of row 6 (1",
        ),
        (
            changed(7, [None, 1, 2, 3]),
            "must hold finite numbers below 1e+18, got nan at place 0 of row 7 (1 such rows).",
        ),
        ([[]] * NUM_ROWS, "must hold a number or more, got empty ones. Fill them."),
        ([["a"]] * NUM_ROWS, "reads lists of numbers, or several columns of numbers, got column 'vector' of List."),
        ([3.5] * NUM_ROWS, "reads lists of numbers, or several columns of numbers, got column 'vector' of float64."),
        ([None] * NUM_ROWS, "must hold a vector in some row, got none."),
    ],
    ids=["ragged", "one empty", "nan", "infinite", "missing", "all empty", "texts", "numbers", "nothing"],
)
def test_vectors_that_are_none(cells, sentence, tmp_path):
    kind = {"[['a']": List(Value("string")), "[3.5, ": Value("float64")}.get(str(cells)[:6], List(Value("float64")))
    pool = vector_pool(inputs=Dataset.from_dict({"vector": cells}, features=Features({"vector": kind})))
    with pytest.raises(ValueError) as error:
        CoSupervisedTrainer("linear", make_args(tmp_path), pool=pool, input_column="vector")
    assert sentence in str(error.value)


def test_rows_without_a_vector_are_left_out(tmp_path, caplog):
    pool = vector_pool(inputs=Dataset.from_dict({"vector": changed(7, None)}))
    trainer = make_trainer("linear", tmp_path, pool)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "1 of 90 examples are answered but hold nothing that the student can read" in caplog.text
    assert trainer.predict_labels(pool.inputs)[7] == -1


@pytest.mark.parametrize(
    ("student", "given", "kind", "sentence"),
    [
        ("mlp", {}, ValueError, "with hidden layers must be trained as a whole, got `student_training` 'probe'"),
        ("lineer", {}, ValueError, "a Hub id, a folder or one of ['linear', 'mlp'], got 'lineer'. Correct the name."),
        ("linear", {"student_training": "lora"}, ValueError, "is trained itself, got `student_training` 'lora'."),
        ("mlp", {"student_training": "full", "method": "committee"}, ValueError, "averages linear heads"),
        (lambda: VectorClassifier(VectorClassifierConfig(3, num_labels=3)), {}, ValueError, "of 3 numbers, got 4 in"),
        (
            lambda: VectorClassifier(VectorClassifierConfig(4)),
            {},
            ValueError,
            "must have 3 labels like the pool, got 2",
        ),
    ],
    ids=["mlp frozen", "misspelt", "lora", "committee", "features", "labels"],
)
def test_students_that_do_not_fit(student, given, kind, sentence, tmp_path):
    with pytest.raises(kind) as error:
        make_trainer(student() if callable(student) else student, tmp_path, **given)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("given", "is_told"),
    [({"learning_rate": 1e-6}, True), ({}, False), ({"learning_rate": 1e-6, "head_solver": "ridge"}, False)],
    ids=["a rate of nothing", "a rate that moves it", "in closed form"],
)
def test_a_head_that_has_hardly_learnt_is_told_of_once(given, is_told, tmp_path, caplog):
    trainer = make_trainer("linear", tmp_path, **given)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("it has hardly learnt. Set a larger `learning_rate`") == is_told


def test_what_is_read_of_data_with_images_and_vectors(tiny_vit, tmp_path):
    image = PILImage.new("RGB", (8, 8))
    data = Dataset.from_dict(
        {"image": [image] * NUM_ROWS, "numbers": VECTORS.tolist()},
        features=Features({"image": Image(), "numbers": List(Value("float64"))}),
    )
    pool = vector_pool(inputs=data)
    with pytest.raises(ValueError, match="reads lists of numbers, .* got column 'image' of Image. Name the right one"):
        make_trainer("linear", tmp_path, pool)
    trainer = CoSupervisedTrainer("linear", make_args(tmp_path), pool=pool, input_column="numbers")
    assert trainer.model.config.num_features == NUM_FEATURES
    with pytest.raises(ValueError, match="got a student of images and vectors in column 'numbers'. Choose another"):
        CoSupervisedTrainer(
            load_student(tiny_vit, LABELS)[0],
            make_args(tmp_path / "image"),
            processing_class=load_student(tiny_vit, LABELS)[1],
            pool=pool,
            input_column="numbers",
        )
    two = Dataset.from_dict({"a": VECTORS.tolist(), "b": VECTORS.tolist()})
    with pytest.raises(
        ValueError, match=r"got \['a', 'b'\] among .* Name it, or several of numbers, with `input_column`"
    ):
        make_trainer("linear", tmp_path, vector_pool(inputs=two))


@pytest.mark.parametrize(
    ("columns", "kind", "sentence"),
    [
        (["age", "note"], TypeError, "must hold numbers, got string in 'note', such as 'n/a' in row 1. Correct its"),
        (["age", "size"], ValueError, "`input_column` must be one of ['age', 'income', 'note', 'label', 'a,b'], got"),
        (["age", "age"], ValueError, "Columns of a vector must be named once each, got ['age', 'age']."),
        (["age", "label"], ValueError, "Ground truth must reach no student, got ['label'] in `input_column`."),
        (["age", "a,b"], ValueError, "Columns of a vector must have names without a comma, got 'a,b'. Rename it."),
        ([], TypeError, "`input_column` must be the name of one column, got []. Give its name."),
    ],
)
def test_columns_that_make_no_vector(columns, kind, sentence):
    table = Dataset.from_dict(
        {"age": [1, 2], "income": [1.5, None], "note": ["3", "n/a"], "label": [0, 1], "a,b": [1, 2]}
    )
    hierarchy = TeacherHierarchy(["x", "y"], [Teacher("note", kind="column")])
    with pytest.raises(kind) as error:
        build_pool(table, hierarchy, input_column=columns, oracle_column="label", disable_tqdm=True)
    assert sentence in str(error.value)


def test_a_missing_number_is_named_by_its_column(tmp_path):
    table = Dataset.from_dict({"age": [1.0] * NUM_ROWS, "income": [*range(NUM_ROWS - 1), None]})
    with pytest.raises(ValueError, match="got nan at 'income' of row 89"):
        CoSupervisedTrainer("linear", make_args(tmp_path), pool=vector_pool(inputs=table), input_column="age,income")


def test_new_data_must_be_like_those_learnt_from(tmp_path):
    trainer = make_trainer("linear", tmp_path)
    trainer.train()
    for ask in (trainer.evaluate, trainer.measure_accuracy, trainer.predict):
        with pytest.raises(ValueError, match="reads vectors of 4 numbers, got 2 in column 'vector'"):
            ask(labelled(VECTORS[:, :2]))
        with pytest.raises(ValueError, match="`input_column` must be one of .'numbers', 'label'., got 'vector'"):
            ask(labelled().rename_column("vector", "numbers"))
    with pytest.raises(ValueError, match=r"must be of shape \(num_rows, 4\), got \(4,\)"):
        trainer.model.predict_proba(VECTORS[0])
    with pytest.raises(ValueError, match="is made for its data, got none. Use `VectorClassifier.for_data"):
        load_student("linear", LABELS)


def test_numbers_far_from_zero_are_told_of(caplog):
    near, far = Dataset.from_dict({"v": VECTORS + 1000}), Dataset.from_dict({"v": VECTORS + 1e7})
    VectorClassifier.for_data(near, "v", LABELS)
    assert not caplog.records
    VectorClassifier.for_data(far, "v", LABELS)
    assert "Numbers at [0, 1, 2] of 'v' lie so far from zero" in caplog.text and "Subtract about" in caplog.text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_features": 0}, "must be a whole number of at least 1"),
        ({"num_features": 2.5}, "must be a whole number of at least 1"),
        ({"hidden_sizes": 8}, "got 1 and 8. Correct them"),
        ({"hidden_sizes": [0]}, r"got 1 and \[0\]. Correct them"),
        ({"num_features": 2, "feature_names": ["one"]}, "must name each of the 2 features, got 1 names. Name all"),
    ],
)
def test_sizes_that_are_none(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        VectorClassifierConfig(**given)


# ── pools of what is at hand ────────────────────────────────────────────────────────────────────────────────────────


def test_predictions_by_name_and_as_one_array():
    by_name = PseudolabelPool.from_predictions(SAID, labels=LABELS, vectors=VECTORS)
    as_array = PseudolabelPool.from_predictions(np.stack([*SAID.values()], axis=1), [*SAID], LABELS, vectors=VECTORS)
    in_levels = PseudolabelPool.from_predictions(
        TeacherHierarchy(LABELS, [Teacher("first"), Teacher("second", level=np.int64(1))]), None, SAID, vectors=VECTORS
    )
    assert in_levels.hierarchy.num_levels == 2 and type(in_levels.hierarchy.teachers[1].level) is int
    for pool in (by_name, as_array, in_levels):
        assert pool.ids.tolist() == list(range(NUM_ROWS)) and pool.input_column == "vector"
        np.testing.assert_allclose(pool.decode("second"), SAID["second"], atol=1e-3)
        np.testing.assert_array_equal(pool.inputs["vector"], VECTORS)
    inputs = Dataset.from_dict({"id": [f"row {row}" for row in range(NUM_ROWS)], "text": ["t"] * NUM_ROWS})
    beside = PseudolabelPool.from_predictions(SAID, None, LABELS, inputs=inputs, vectors=VECTORS)
    assert beside.ids[3] == "row 3" and beside.input_column == "vector"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((SAID,), "Predictions need the task's `labels`, got none."),
        ((SAID, ["first"], LABELS), "`names` must be those of the predictions, ['first', 'second'], got ['first']."),
        ((SAID["first"], ["first"], LABELS), "with a name for each teacher, got (90, 3) and 1 `names`."),
        ((SAID, None, LABELS[:2]), "Predictions of 'first' must have shape (90, 2), got (90, 3)."),
        ((SAID, None, LABELS, VECTORS[0]), "`vectors` must be numbers of shape (num_rows, num_features), got float64"),
        (
            (SAID, None, LABELS, changed(1, [2.0])),
            "`vectors` must be numbers of shape (num_rows, num_features), got rows of different",
        ),
        ((SAID, None, LABELS, VECTORS[:5]), "`inputs` must hold one row for each of the 90 ids, got 5."),
    ],
)
def test_predictions_that_do_not_fit(given, sentence):
    *first, vectors = given if len(given) == 4 else (*given, None)
    with pytest.raises(ValueError) as error:
        PseudolabelPool.from_predictions(*first, vectors=vectors)
    assert sentence in str(error.value)


def test_votes_and_features_in_five_lines(tmp_path):
    # as they lie in a file of votes and features: -1 is no vote
    rng = np.random.default_rng(0)
    votes = np.where(rng.random((NUM_ROWS, 5)) < 0.7, TRUTH[:, None], -1)
    np.savez(tmp_path / "votes.npz", features=VECTORS.astype(np.float16), votes=votes.astype(np.int8))

    data = np.load(tmp_path / "votes.npz")
    pool = PseudolabelPool.from_votes(data["votes"], [*"abcde"], LABELS, vectors=data["features"])
    trainer = CoSupervisedTrainer("linear", make_args(tmp_path / "run"), pool=pool.with_aggregate("shared_majority"))
    trainer.train()
    labels = trainer.model.predict_proba(data["features"]).argmax(axis=1)
    assert (labels == TRUTH).mean() > 0.85


def test_a_crowd_with_features_in_five_lines(tmp_path):
    rng = np.random.default_rng(0)
    asked = [(item, worker) for item in range(NUM_ROWS) for worker in rng.permutation(6)[:4].tolist()]
    told = [LABELS[TRUTH[item] if rng.random() < 0.8 else rng.integers(3)] for item, _ in asked]
    table = {"item": [item for item, _ in asked], "worker": [worker for _, worker in asked], "label": told}

    items = Dataset.from_dict({"id": list(range(NUM_ROWS))})
    pool = PseudolabelPool.from_answers(table, LABELS, items, vectors=VECTORS).with_aggregate("ebcc")
    trainer = make_trainer("linear", tmp_path, pool)
    trainer.train()
    assert trainer.measure_accuracy(labelled(*draw(seed=4))) > 0.85
    with pytest.raises(ValueError, match="need their items, got none. Give `inputs`"):
        PseudolabelPool.from_answers(table, LABELS, vectors=VECTORS)


def test_a_student_of_vectors_is_published_whole(hub, tmp_path):
    pytest.importorskip("skops")
    trainer = make_trainer("linear", tmp_path / "run", hub_model_id="someone/student")
    trainer.train()
    trainer.push_to_hub()
    from huggingface_hub import hf_hub_download

    files = set(hub.files("someone/student"))
    assert files == {".gitattributes", "config.json", "model.safetensors", "model.skops", "README.md", "history.json"}
    card = Path(hf_hub_download("someone/student", "README.md")).read_text(encoding="utf-8")
    assert 'load_file(hf_hub_download("someone/student", "model.safetensors"))' in card
    student, _ = load_student("someone/student", LABELS)
    torch.testing.assert_close(student.backbone.state_dict(), trainer.model.backbone.state_dict(), rtol=0, atol=0)
