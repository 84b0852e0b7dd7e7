"""Measuring: what each method trains on and with, the reports, and all methods on one small task."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification

from hf_cosupervise.evaluation.comparison import compare_methods
from hf_cosupervise.evaluation.methods import (
    METHODS,
    method_arguments,
    method_loss,
    method_pool,
    teacher_accuracies,
    weak_accuracy,
)
from hf_cosupervise.evaluation.report import format_report, merge_reports, save_report
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.hub.cards import model_card
from hf_cosupervise.method.aekd import AdaptiveEnsembleDistillation
from hf_cosupervise.method.metrics import mean_and_spread
from hf_cosupervise.pool.derived import aggregated_pool
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.students.loading import load_student
from hf_cosupervise.training.config import CoSupervisedConfig
from hf_cosupervise.training.trainer import CoSupervisedTrainer

A, B, C, NOBODY = [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.0, 0, 0]


@pytest.fixture()
def pool() -> PseudolabelPool:
    """Four rows with the truths a, b, c, a."""
    hierarchy = TeacherHierarchy(
        ["a", "b", "c"],
        [Teacher("t/root"), Teacher("t/ab", level=1, scope=["a", "b"]), Teacher("t/c", level=1, scope=["c"])],
    )
    predictions = {
        "root": np.array([A, A, C, B]),
        "ab": np.array([A, B, A, NOBODY]),
        "c": np.array([C, [0.25, 0.5, 0.25], C, NOBODY]),
    }
    inputs = Dataset.from_dict({"text": list("wxyz"), "oracle_label": [0, 1, 2, 0]})
    return PseudolabelPool.from_predictions(hierarchy, [10, 11, 12, 13], predictions, inputs=inputs)


# ── teachers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_teacher_accuracies(pool):
    # right on a and c; on a and b, no answer counts as wrong; on b and c
    assert teacher_accuracies(pool) == {"root": 0.5, "ab": 0.5, "c": 0.5}
    assert teacher_accuracies(pool.select([0, 1])) == {"root": 0.5, "ab": 1.0, "c": 0.5}


def test_weak_accuracy(pool):
    assert weak_accuracy(pool) == 0.5
    assert weak_accuracy(pool.select([0, 2])) == 1.0
    # a root of several teachers is the mean of their probabilities:
    # a and c tie, the lowest label is a; b; a and c tie, so a instead of c; nobody, which is wrong though a is true
    several = TeacherHierarchy(pool.labels, [Teacher("t/ab"), Teacher("t/c"), Teacher("t/root", level=1)])
    assert weak_accuracy(pool.with_hierarchy(several)) == 0.5


def test_measuring_needs_ground_truth(pool):
    blind = PseudolabelPool(pool.hierarchy, pool.teachers)
    for measure in (teacher_accuracies, weak_accuracy, lambda blind: method_pool(blind, "ceiling")):
        with pytest.raises(ValueError) as error:
            measure(blind)
        assert str(error.value) == (
            "Measuring needs ground truth in the pool, got no `oracle_label`. Build it with `oracle_column`."
        )


# ── what each method trains on ──────────────────────────────────────────────────────────────────────────────────────


def test_pools(pool):
    generalist = method_pool(pool, "generalist")
    assert (
        generalist.hierarchy.names == ("root",) and generalist.decode("root").tolist() == pool.decode("root").tolist()
    )
    ensemble = method_pool(pool, "ensemble")
    assert ensemble.hierarchy.names == ("root", "ab", "c") and ensemble.hierarchy.num_levels == 1
    assert ensemble.source_names[-1] == "ensemble-0"
    # row 3: only the root answered
    mean = ensemble.pseudolabels(np.array([3, 3]), np.array([1, 3]))
    np.testing.assert_allclose(mean, [[1.25 / 3, 1.5 / 3, 0.25 / 3], [0, 1, 0]], atol=1e-7)
    vote = method_pool(pool, "majority_vote")
    # a a c: a; a b b: b; c a c: c; only b
    assert vote.hierarchy.names == ("majority-vote",) and vote.decode("majority-vote").tolist() == [A, B, C, B]
    ceiling = method_pool(pool, "ceiling")
    assert ceiling.hierarchy.names == ("ground-truth",) and ceiling.decode("ground-truth").tolist() == [A, B, C, A]
    for method in ("csl", "oracle_scope", "oracle_domain", "oracle_loss"):
        assert method_pool(pool, method) is pool
    for other in (generalist, ensemble, vote, ceiling):
        assert other.ids.tolist() == pool.ids.tolist() and other.column("text") == list("wxyz")
        assert other.oracle_labels.tolist() == [0, 1, 2, 0]


def test_majority_of_none(pool):
    specialists = pool.with_hierarchy(TeacherHierarchy(pool.labels, [Teacher("t/ab"), Teacher("t/c")]))
    assert method_pool(specialists, "majority_vote").decode("majority-vote")[3].tolist() == NOBODY


def test_generalist_of_several(pool):
    several = TeacherHierarchy(pool.labels, [Teacher("t/ab"), Teacher("t/c"), Teacher("t/root", level=1)])
    assert method_pool(pool.with_hierarchy(several), "generalist").hierarchy.names == ("ab", "c")


def test_the_generalist_with_rejection_hears_nobody_else(pool):
    again = method_pool(pool, "generalist_rejection")
    assert again.hierarchy.names == ("root", "root-1") and again.hierarchy.num_levels == pool.hierarchy.num_levels
    for name in again.hierarchy.names:
        assert again.decode(name).tolist() == pool.decode("root").tolist()
    assert again.oracle_labels.tolist() == pool.oracle_labels.tolist()


def test_an_aggregator_of_ones_own(pool):
    def loudest(teacher_probs, answered):
        best = teacher_probs.amax(dim=2).argmax(dim=1)
        return teacher_probs[torch.arange(len(best)), best]

    own = aggregated_pool(pool, loudest)
    teachers, _ = pool.decode_level(range(3), slice(None))
    assert own.hierarchy.names == ("loudest",)
    np.testing.assert_allclose(own.decode("loudest"), loudest(teachers, None), atol=1e-3)
    assert aggregated_pool(pool, "mean_logits", "logits").hierarchy.names == ("logits",)
    with pytest.raises(ValueError, match="magic"):
        aggregated_pool(pool, "magic")


def test_every_teacher_of_aekd_is_asked_by_its_loss(pool):
    own, loss = method_pool(pool, "aekd"), method_loss(pool, "aekd")
    assert own.hierarchy == method_pool(pool, "ensemble").hierarchy
    assert isinstance(loss, AdaptiveEnsembleDistillation)
    teachers, answered = own.decode_level(range(3), slice(None))
    assert torch.equal(loss.teacher_probs, teachers) and torch.equal(loss.answered, answered)
    for method in (*METHODS, "majority_vote", "raven", "boosting", "random"):
        assert method_loss(pool, method) is None


def test_methods_that_need_something_more(pool):
    with pytest.raises(ValueError) as error:
        method_pool(pool, "boosting")
    assert str(error.value) == (
        "'boosting' needs a `labelled_pool`, got none. Label other examples with the same teachers, with their ground "
        "truth as `oracle_column`, or leave this method out."
    )
    with pytest.raises(ValueError, match="10 labelled examples .* got 3 and 4"):
        method_pool(pool, "boosting", labelled_pool=pool)
    for method in ("raven", "crowdlab"):
        with pytest.raises(ValueError, match=f"'{method}' needs `features` of the 4 examples, got none"):
            method_pool(pool, method)
    raven = method_pool(pool, "raven", features=torch.eye(4))
    assert raven.hierarchy.names == ("raven",) and raven.oracle_labels.tolist() == [0, 1, 2, 0]


def test_unknown_method(pool):
    with pytest.raises(ValueError) as error:
        method_pool(pool, "magic")
    assert str(error.value) == (
        "`method` must be one of ['generalist', 'ensemble', 'csl', 'ceiling', 'committee', 'mean_logits', "
        "'majority_vote', "
        "'dawid_skene', 'glad', 'mace', 'ebcc', 'raven', 'crowdlab', 'boosting', 'aekd', 'generalist_rejection', "
        "'oracle_scope', 'oracle_domain', 'oracle_loss', 'random'], got 'magic'."
    )


# ── and with what ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture()
def args(tmp_path: Path) -> CoSupervisedConfig:
    return CoSupervisedConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, assignment="agreement", num_train_epochs=4.0, seed=5
    )


def test_arguments(args, tmp_path):
    before = args.to_dict()
    csl = method_arguments(args, "csl", 3)
    assert csl.to_dict() == before
    for method in ("generalist", "ensemble", "majority_vote", "boosting", "aekd", "raven", "ceiling", "a-control"):
        own = method_arguments(args, method, 3)
        changed = {name for name, value in own.to_dict().items() if value != before[name]}
        assert changed == {"output_dir", "assignment"}, method
        assert own.assignment == ["ensemble"]
        assert own.output_dir == str(tmp_path / "run" / "_run" / "methods" / method)
    for method in ("oracle_scope", "oracle_domain", "oracle_loss"):
        own = method_arguments(args, method, 3)
        # the root of one teacher has nothing to assign
        assert own.assignment[1:] == [method] * 2 and own.output_dir.endswith(f"/_run/methods/{method}")
        assert own.rejection == args.rejection
    assert args.to_dict() == before  # nothing of the caller's changes


def test_a_loss_of_its_own_takes_the_place_of_the_recipes(args):
    args.loss, args.loss_kwargs = "confidence", {"max_weight": 0.3}
    own = method_arguments(args, "aekd", 2)
    assert (own.loss, own.loss_kwargs) == ("cross_entropy", {})
    assert (args.loss, args.loss_kwargs) == ("confidence", {"max_weight": 0.3})
    assert method_arguments(args, "ceiling", 2).loss == "confidence"
    args.head_solver = "ridge"
    with pytest.raises(ValueError) as error:
        method_arguments(args, "aekd", 2)
    assert str(error.value) == (
        "'aekd' has a loss of its own, got `head_solver` 'ridge'. Use 'steps', or leave it out."
    )


def test_ground_truth_is_not_smoothed_over_neighbours(args):
    args.teacher_neighbors = 5
    assert method_arguments(args, "ceiling", 2).teacher_neighbors == 0
    assert method_arguments(args, "generalist", 2).teacher_neighbors == 5 == args.teacher_neighbors


@pytest.mark.parametrize(("num_levels", "rounds", "scale"), [(1, 1, 1), (3, 1, 3), (3, 2, 5)])
def test_warm_start_gives_every_method_as_many_steps(num_levels, rounds, scale, args):
    # the root has one round, every level below it `rounds`
    args.warm_start, args.rounds_per_level = True, rounds
    assert method_arguments(args, "csl", num_levels).num_train_epochs == 4.0
    assert method_arguments(args, "oracle_scope", num_levels).num_train_epochs == 4.0
    for method in ("generalist", "ensemble", "majority_vote", "ceiling"):
        own = method_arguments(args, method, num_levels)
        assert own.num_train_epochs == 4.0 * scale and own.max_steps == -1
    args.max_steps = 10
    assert method_arguments(args, "ceiling", num_levels).max_steps == 10 * scale
    args.warm_start = False
    assert method_arguments(args, "ceiling", num_levels).max_steps == 10


@pytest.mark.parametrize("assignment", [["agreement"], ["ensemble"], ["scope", "agreement", "ensemble"]])
def test_oracles_are_oracles_below_the_root(assignment, args):
    # whatever co-supervision itself does there
    args.assignment = assignment
    own = method_arguments(args, "oracle_loss", 3)
    assert own.assignment[1:] == ["oracle_loss"] * 2
    assert args.assignment == assignment


def test_oracles_leave_a_root_of_several_its_ensemble(args):
    # the root has no student to choose by, nor may ground truth choose there: it keeps its own assignment
    args.assignment = ["ensemble", "scope", "agreement"]
    assert method_arguments(args, "oracle_scope", 3).assignment == ["ensemble", "oracle_scope", "oracle_scope"]


# ── reports ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(csl: float, share: dict[str, float], pgr: float) -> dict[str, object]:
    return {
        "weak_accuracy": 0.5,
        "methods": {
            "generalist": {"accuracy": 0.6, "pgr": 0.25},
            "csl": {"accuracy": csl, "pgr": pgr},
            "ceiling": {"accuracy": 0.9, "pgr": 1.0},
        },
        "levels": [
            {"level": 0, "keep_rate": 1.0, "teachers": {"root": 1.0}, "accuracy": 0.6, "pgr": 0.25},
            {
                "level": 1,
                "keep_rate": 0.875,
                "teachers": share,
                "assignment_agreement": 0.75,
                "accuracy": csl,
                "pgr": pgr,
            },
        ],
    }


TWO = [report(0.7, {"low": 0.5, "high": 0.5}, 0.5), report(0.8, {"low": 0.75, "root": 0.25}, 0.75)]


def test_merging():
    merged = merge_reports(TWO, [1, 2])
    assert list(merged) == ["seeds", "weak_accuracy", "methods", "levels"]
    assert merged["seeds"] == [1, 2] and merged["weak_accuracy"] == [0.5, 0.5]
    assert merged["methods"]["csl"] == {"accuracy": [0.7, 0.8], "pgr": [0.5, 0.75]}
    assert [level["level"] for level in merged["levels"]] == [0, 1]
    # a teacher that nobody asked under one seed had a share of nothing
    assert merged["levels"][1]["teachers"] == {"low": [0.5, 0.75], "high": [0.5, 0.0], "root": [0.0, 0.25]}
    assert merged["levels"][0]["accuracy"] == [0.6, 0.6]


def test_merging_one():
    merged = merge_reports(TWO[:1], [7])
    assert merged["seeds"] == [7] and merged["methods"]["csl"]["accuracy"] == [0.7]


def test_merging_reports_of_unequal_depth():
    with pytest.raises(ValueError):
        merge_reports([TWO[0], {**TWO[1], "levels": TWO[1]["levels"][:1]}], [1, 2])


@pytest.mark.parametrize(
    ("values", "mean", "spread"),
    [
        ([0.5], 0.5, 0.0),
        ([1.0, 2.0, 3.0, 4.0], 2.5, math.sqrt(5 / 3)),  # sample deviation: squares 2.25 + 0.25 + 0.25 + 2.25 over 3
        ([1.0, math.nan, 3.0], 2.0, math.sqrt(2)),
        ([math.nan, 3.0], 3.0, 0.0),
    ],
)
def test_mean_and_spread(values, mean, spread):
    assert mean_and_spread(values) == pytest.approx((mean, spread))


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_mean_of_nothing(values):
    assert all(math.isnan(value) for value in mean_and_spread(values))


def test_format_one_seed():
    lines = [line.split() for line in format_report(merge_reports(TWO[:1], [1])).splitlines()]
    assert lines == [
        ["level", "keep", "rate", "agreement", "accuracy", "PGR", "share", "per", "teacher"],
        ["0", "100.0", "-", "60.0", "25.0", "root", "100"],
        ["1", "87.5", "75.0", "70.0", "50.0", "low", "50", "high", "50"],
        [],
        ["method", "accuracy", "PGR", "gain", "over", "generalist"],
        ["weak", "teacher", "50.0", "0.0"],
        ["generalist", "60.0", "25.0"],
        ["csl", "70.0", "50.0", "25.0"],
        ["ceiling", "90.0", "100.0", "75.0"],
    ]


def test_format_several_seeds():
    # 70 and 80: mean 75, sample deviation sqrt(25 + 25) = 7.1; PGR 50 and 75: 62.5 and 17.7, 37.5 above the generalist
    text = format_report(merge_reports(TWO, [1, 2]))
    assert [line.split() for line in text.splitlines() if line.startswith("csl")] == [
        ["csl", "75.0", "±", "7.1", "62.5", "±", "17.7", "37.5", "±", "17.7"]
    ]
    level = [line for line in text.splitlines() if line.startswith("1 ")]
    assert level[0].endswith("low 62 high 25 root 12") or level[0].endswith("low 62 high 25 root 13")
    assert "87.5 ± 0.0" in level[0]
    assert not any(line != line.rstrip() for line in text.splitlines())
    # columns stand under their heads
    head, row = (next(line for line in text.splitlines() if line.startswith(start)) for start in ("method", "csl"))
    assert head.index("PGR") == row.index("62.5") and head.index("accuracy") == row.index("75.0")


def test_format_without_generalist_or_gap():
    merged = merge_reports([copy.deepcopy(TWO[0])], [1])
    del merged["methods"]["generalist"]
    merged["methods"]["csl"]["pgr"] = [math.nan]
    rows = {line.split()[0]: line.split() for line in format_report(merged).splitlines() if line}
    assert rows["csl"] == ["csl", "70.0", "nan"] and rows["ceiling"] == ["ceiling", "90.0", "100.0"]


def test_saving(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    save_report({"seeds": [1], "pgr": [math.nan, 0.5], "levels": [{"x": (1, math.nan)}], "name": "ä"}, path)
    facts = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert facts == {"seeds": [1], "pgr": [None, 0.5], "levels": [{"x": [1, None]}], "name": "ä"}
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_report({"seeds": [2]}, path)
    monkeypatch.undo()
    assert json.loads(path.read_text())["seeds"] == [1]


# ── all methods on one small task ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def task_pool(tiny_image_dataset: Dataset, tiny_labels: tuple[str, ...]) -> PseudolabelPool:
    """A generalist that is right on two thirds, and two specialists that are right on their own labels."""
    truth = np.array(tiny_image_dataset["label"])
    rng = np.random.default_rng(0)
    wrong = (truth + rng.integers(1, 4, size=48)) % 4
    guesses = {
        "root": np.where(np.arange(48) % 3 == 0, wrong, truth),
        "low": np.where(truth < 2, truth, wrong % 2),
        "high": np.where(truth < 2, 2 + wrong % 2, truth),
    }
    hierarchy = TeacherHierarchy(
        tiny_labels,
        [
            Teacher("t/root"),
            Teacher("t/low", level=1, scope=["ant", "bee"]),
            Teacher("t/high", level=1, scope=["cat", "dog"]),
        ],
    )
    predictions = {name: 0.75 * np.eye(4)[labels] + 0.0625 for name, labels in guesses.items()}
    inputs = tiny_image_dataset.rename_column("label", "oracle_label")
    return PseudolabelPool.from_predictions(hierarchy, range(48), predictions, inputs=inputs)


def small_args(folder: Path, **values: object) -> CoSupervisedConfig:
    return CoSupervisedConfig(
        output_dir=str(folder),
        use_cpu=True,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=0.05,
        disable_tqdm=True,
        features_dir=str(folder.parent / "features"),
        seed=1,
        rejection_k=2,
        **values,
    )


@pytest.fixture(scope="module")
def compared(task_pool, tiny_vit, tiny_image_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "run"
    methods = (*METHODS, "majority_vote", "oracle_scope", "oracle_loss")
    control = method_pool(task_pool, "ceiling")
    return (
        *compare_methods(
            tiny_vit,
            small_args(folder),
            task_pool,
            tiny_image_dataset,
            weak=0.25,
            methods=methods,
            extra_pools={"again": control},
        ),
        folder,
    )


def test_report_of_all_methods(compared):
    found, _, _ = compared
    assert list(found) == ["weak_accuracy", "methods", "levels"] and found["weak_accuracy"] == 0.25
    assert list(found["methods"]) == [*METHODS, "majority_vote", "oracle_scope", "oracle_loss", "again"]
    accuracies = {name: numbers["accuracy"] for name, numbers in found["methods"].items()}
    assert all(0 <= value <= 1 and (value * 48) == round(value * 48) for value in accuracies.values())
    ceiling = accuracies["ceiling"]
    assert ceiling > 0.8  # the labels are colours: ground truth must be learnable
    for numbers in found["methods"].values():
        assert numbers["pgr"] == pytest.approx((numbers["accuracy"] - 0.25) / (ceiling - 0.25))
    assert found["methods"]["ceiling"]["pgr"] == 1.0
    assert accuracies["again"] == ceiling  # the same pool with the same recipe, last instead of first
    levels = found["levels"]
    assert [level["level"] for level in levels] == [0, 1]
    assert levels[-1]["accuracy"] == accuracies["csl"] and levels[-1]["pgr"] == found["methods"]["csl"]["pgr"]
    assert levels[0]["accuracy"] != levels[1]["accuracy"]  # each level's own student was measured
    assert levels[0]["accuracy"] == accuracies["generalist"]  # level 0 of co-supervision is the generalist alone
    assert levels[0]["teachers"] == {"root": 1.0} and levels[0]["keep_rate"] == 1.0
    assert sum(levels[1]["teachers"].values()) == pytest.approx(1.0) and set(levels[1]["teachers"]) == {"low", "high"}
    assert 0 < levels[1]["keep_rate"] < 1 and 0 < levels[1]["assignment_agreement"] <= 1
    assert 0 <= levels[1]["oracle_selection_precision"] <= 1
    json.dumps(found)
    assert "csl" in format_report(merge_reports([found, found], [0, 1]))


def test_another_metric_is_measured_and_recovered(task_pool, tiny_vit, tiny_image_dataset, compared, tmp_path):
    test = tiny_image_dataset.select([row for row, name in enumerate(tiny_image_dataset["label"]) if name or row % 8])
    args = small_args(tmp_path / "run", metric="macro_f1")
    methods = ("generalist", "csl", "ceiling")
    weak = weak_accuracy(task_pool, "macro_f1")
    found, trainer = compare_methods(tiny_vit, args, task_pool, test, weak=weak, methods=methods)
    assert list(found) == ["weak_macro_f1", "methods", "levels", "metric"] and found["metric"] == "macro_f1"
    ceiling = found["methods"]["ceiling"]["macro_f1"]
    for numbers in (*found["methods"].values(), *found["levels"]):
        assert numbers["pgr"] == pytest.approx((numbers["macro_f1"] - weak) / (ceiling - weak))
    own = found["methods"]["csl"]
    assert own["accuracy"] != own["macro_f1"] and own["accuracy"] == trainer.measure_accuracy(test)
    assert trainer.student.measure(test) == {key: own[key] for key in ("accuracy", "macro_f1")}
    assert trainer.evaluate(trainer.student.label(test))["eval_macro_f1"] == pytest.approx(own["macro_f1"])
    with pytest.raises(ValueError, match="`metric` 'f1' is of label 1 of two, got 4 labels. Choose 'macro_f1'"):
        trainer.student.measure(test, "f1")
    merged = merge_reports([found, found], [0, 1])
    assert merged["metric"] == "macro_f1" and merged["methods"]["csl"]["macro_f1"] == [own["macro_f1"]] * 2
    told = format_report(merged)
    assert "macro_f1" in told.splitlines()[0] and f"{100 * ceiling:.1f} ± 0.0" in told
    card = model_card({"name": "m", "report": merged, "modality": "image", "dataset_name": "pets"})
    assert "Macro F1 on pets, mean" in card and "| method | macro F1 % | PGR % |" in card
    assert f"student {100 * own['macro_f1']:.1f} ± 0.0 %, weak teacher {100 * weak:.1f}" in card
    assert "type: f1" in card and "type: accuracy" in card


def test_a_metric_that_the_task_does_not_have(task_pool, tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="`metric` must be one of .*, got 'auc'"):
        small_args(tmp_path / "run", metric="auc")
    with pytest.raises(ValueError, match="`metric` 'f1' is of label 1 of two, got 4 labels. Choose 'macro_f1'"):
        CoSupervisedTrainer(tiny_vit, small_args(tmp_path / "run", metric="f1"), pool=task_pool)


def test_trainer_of_co_supervision_comes_back(compared, tiny_image_dataset, tmp_path):
    found, trainer, folder = compared
    assert isinstance(trainer, CoSupervisedTrainer) and trainer.args.output_dir == str(folder)
    assert len(trainer.plans) == 2
    assert trainer.measure_accuracy(tiny_image_dataset) == found["methods"]["csl"]["accuracy"]
    # it holds the final student, which can be saved as an ordinary model
    trainer.save_model(str(tmp_path))
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        labels = plain(**trainer.processor(tiny_image_dataset["image"])).logits.argmax(dim=1).numpy()
    assert (labels == np.array(tiny_image_dataset["label"])).mean() == found["methods"]["csl"]["accuracy"]


def test_other_methods_write_below_the_run(compared):
    _, _, folder = compared
    methods = folder / "_run" / "methods"
    assert {path.name for path in methods.iterdir()} == {
        "generalist",
        "ensemble",
        "ceiling",
        "majority_vote",
        "oracle_scope",
        "oracle_loss",
        "again",
    }
    # nothing but the run's own folder at the top: a push would upload all of it
    assert {path.name for path in folder.iterdir()} == {"_run"}


def test_order_of_methods_does_not_matter(compared, task_pool, tiny_vit, tiny_image_dataset, tmp_path):
    # no method reads what another one left in a global generator
    found, _, _ = compared
    torch.manual_seed(99)
    again, _ = compare_methods(
        tiny_vit,
        small_args(tmp_path / "run"),
        task_pool,
        tiny_image_dataset,
        weak=0.25,
        methods=("oracle_scope", "ceiling", "ensemble", "csl", "generalist"),
    )
    for name, numbers in again["methods"].items():
        assert numbers == found["methods"][name], name
    # all but how long it took
    assert again["levels"] == found["levels"]


def test_every_method_gets_a_copy_of_a_model(task_pool, tiny_vit, tiny_labels, tiny_image_dataset, compared, tmp_path):
    found, _, _ = compared
    model, processor = load_student(tiny_vit, tiny_labels, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again, trainer = compare_methods(
        model,
        small_args(tmp_path / "run"),
        task_pool,
        tiny_image_dataset,
        weak=0.25,
        methods=("ceiling", "csl"),
        processing_class=processor,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.model is not model
    for name, numbers in again["methods"].items():
        assert numbers == found["methods"][name], name


@pytest.mark.filterwarnings("ignore:There is no example on which all teachers agree")
def test_methods_that_need_features_labels_or_a_loss(task_pool, tiny_vit, tiny_image_dataset, compared, tmp_path):
    labelled = PseudolabelPool(task_pool.hierarchy, task_pool.teachers, task_pool.inputs)
    trainers = {}
    found, _ = compare_methods(
        tiny_vit,
        small_args(tmp_path / "run"),
        task_pool,
        tiny_image_dataset,
        weak=0.25,
        methods=("raven", "csl", "crowdlab", "ceiling", "boosting", "aekd"),
        labelled_pool=labelled,
        on_trained=trainers.__setitem__,
    )
    assert list(found["methods"]) == ["raven", "csl", "crowdlab", "ceiling", "boosting", "aekd"]
    for name in ("csl", "ceiling"):  # the trainer that gave the features has changed nothing
        assert found["methods"][name] == compared[0]["methods"][name]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"_run"}
    assert {name for name, trainer in trainers.items() if trainer.loss_func is not None} == {"aekd"}
    features = trainers["csl"].pool_features()
    for name in ("raven", "crowdlab"):
        expected = method_pool(task_pool, name, features=features)
        assert trainers[name].pool.decode(name).tolist() == expected.decode(name).tolist()
    # the generalist is right on two thirds, a specialist on half: all but chance have learnt something
    assert all(numbers["accuracy"] > 0.4 for numbers in found["methods"].values())


def test_methods_on_features_need_a_frozen_backbone(task_pool, tiny_vit, tiny_image_dataset, tmp_path):
    with pytest.raises(ValueError) as error:
        compare_methods(
            tiny_vit,
            small_args(tmp_path / "run", student_training="full"),
            task_pool,
            tiny_image_dataset,
            weak=0.25,
            methods=("csl", "ceiling", "raven"),
        )
    assert str(error.value) == (
        "['raven'] need a student with a linear head on a frozen backbone, got `student_training` 'full'. Use "
        "'probe', or leave them out."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "missing"), [(("csl",), ["ceiling"]), (("ceiling", "ensemble"), ["csl"]), ((), ["ceiling", "csl"])]
)
def test_a_gap_needs_both_ends(methods, missing, task_pool, tiny_vit, tiny_image_dataset, tmp_path):
    with pytest.raises(ValueError) as error:
        compare_methods(tiny_vit, small_args(tmp_path), task_pool, tiny_image_dataset, weak=0.25, methods=methods)
    assert str(error.value) == (
        f"`methods` must hold 'csl' and 'ceiling' to measure a gap, got {list(methods)} without {missing}."
    )
    assert not list(tmp_path.iterdir())


def test_unknown_methods_are_refused_before_any_training(task_pool, tiny_vit, tiny_image_dataset, tmp_path):
    with pytest.raises(ValueError, match="got 'magic'"):
        compare_methods(
            tiny_vit,
            small_args(tmp_path),
            task_pool,
            tiny_image_dataset,
            weak=0.25,
            methods=("csl", "ceiling", "magic"),
        )
    assert not list(tmp_path.iterdir())
