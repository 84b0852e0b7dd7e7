"""An account without labels, of plans that are made up so that all of it can be counted by hand."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from datasets import Dataset

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy
from hf_cosupervise.evaluation.overview import Overview, format_overview
from hf_cosupervise.training.plan import LevelPlan

pytestmark = pytest.mark.core

LABELS = ["p", "q"]
VOTES = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0], [-1, 0, 1]])  # of a, b, c
STUDENT = np.array([0, 0, 1, 1, 0])


def make_plan(pool: PseudolabelPool, assigned: list[int], kept: list[int]) -> LevelPlan:
    speakers, rows = np.array(assigned), np.arange(len(pool))
    labels = pool.hard_pseudolabels(speakers, rows)
    return LevelPlan(pool.hierarchy.num_levels - 1, 0, speakers, labels, np.array(kept, dtype=bool), {})


@pytest.fixture
def pool() -> PseudolabelPool:
    return PseudolabelPool.from_votes(VOTES, list("abc"), LABELS).with_aggregate("mean_probs")


def see(pool: PseudolabelPool, **plans: tuple[list[int], list[int]]) -> Overview:
    made = {name: make_plan(pool, *plan) for name, plan in plans.items()}
    return Overview(pool, STUDENT.copy(), np.full(len(STUDENT), 0.75), made, {})


# Sources of the pool: 0 mean-probs, 1 a, 2 b, 3 c.
COMMITTEE = {
    "one": ([1, 1, 2, 3, 0], [1, 1, 1, 1, 1]),
    "two": ([2, 2, 2, 3, 2], [1, 0, 1, 0, 0]),
    "three": ([2, 3, 2, 2, 2], [1, 0, 1, 0, 0]),
    "four": ([1, 2, 2, 2, 2], [0, 0, 0, 1, 1]),
}


def test_files_say_whom_most_members_trusted_and_what_half_of_them_kept(pool, tmp_path):
    seen = see(pool, **COMMITTEE)
    seen.save_labels(tmp_path / "labels.parquet")
    labels = Dataset.from_parquet(str(tmp_path / "labels.parquet"))
    # 2:2 goes to the first member, 1:2:1 to the two, 2:2 to the first again.
    assert labels["trusted_teacher"][:] == ["a", "b", "b", "c", "b"]
    assert labels["kept"][:] == [True, False, True, True, True]
    assert labels["id"][:] == list(pool.ids)  # in the order of the data
    seen.save_to_label(tmp_path / "to_label.csv")
    with open(tmp_path / "to_label.csv", newline="") as file:
        rows = {int(row["id"]): row for row in csv.DictReader(file)}
    assert [rows[row]["trusted_teacher"] for row in range(5)] == labels["trusted_teacher"][:]
    assert [rows[row]["kept"] for row in range(5)] == [str(value) for value in labels["kept"]]


def test_a_single_plan_and_none_are_told_as_they_are(pool, tmp_path):
    for plans, trusted, kept in (
        ({"one": COMMITTEE["one"]}, ["a", "a", "b", "c", "mean-probs"], [True] * 5),
        ({}, [None] * 5, [False] * 5),
    ):
        see(pool, **plans).save_labels(tmp_path / "labels.parquet")
        labels = Dataset.from_parquet(str(tmp_path / "labels.parquet"))
        assert labels["trusted_teacher"][:] == trusted and labels["kept"][:] == kept


def test_an_average_of_all_teachers_is_no_other_teacher(pool, tmp_path):
    seen = see(pool, **COMMITTEE)
    teachers = seen.report()["teachers"]
    # a and b agree on 2 of 4 rows, a and c on none of 4, b and c on 2 of 5.
    assert teachers["a"]["agrees_with_others"] == pytest.approx((1 / 2 + 0) / 2)
    assert teachers["b"]["agrees_with_others"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert teachers["mean-probs"]["agrees_with_others"] is None  # they are all in it
    assert seen.disagreement() == pytest.approx(np.array([1 / 3, 2 / 3, 1 / 3, 2 / 3, 1 / 2]) + 0.25)
    # It is kept with the pool, and it counts where it is all that there is.
    pool.save(tmp_path / "pool")
    again = see(PseudolabelPool.load(tmp_path / "pool"), **COMMITTEE)
    assert again.report() == seen.report()
    root = pool.with_hierarchy(TeacherHierarchy(LABELS, pool.hierarchy.teachers[:1]))
    assert see(root).disagreement().max() > 0.25


def test_a_generalist_is_another_teacher():
    teachers = [Teacher(name, level=int(name != "a"), kind="column") for name in "abc"]
    pool = PseudolabelPool.from_votes(VOTES, list("abc"), LABELS).with_hierarchy(TeacherHierarchy(LABELS, teachers))
    told = see(pool, one=([1] * 5, [1] * 5)).report()["teachers"]
    assert told["b"]["agrees_with_others"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert told["a"]["agrees_with_others"] == pytest.approx(1 / 4)


def test_who_could_not_be_trusted_is_told_from_who_was_not(pool):
    report = see(pool, one=([1, 1, 2, 2, 2], [1] * 5)).report()
    told = report["teachers"]
    assert told["mean-probs"]["trusted"] is None and told["mean-probs"]["trusted_by_label"] == {"p": None, "q": None}
    assert told["c"]["trusted"] == 0.0 and told["c"]["trusted_by_label"] == {"p": 0.0, "q": 0.0}
    lines = {line.split()[0]: line.split() for line in format_overview(report).splitlines()[:5] if line}
    assert lines["mean-probs"][3] == "–" and lines["c"][3] == "0.0%"
    # One that was fallen back to has spoken.
    told = see(pool, **COMMITTEE).report()["teachers"]["mean-probs"]
    assert told["trusted"] == pytest.approx(1 / 20)
    assert told["trusted_by_label"] == {"p": pytest.approx(1 / 12), "q": 0.0}
    assert see(pool).report()["teachers"]["a"]["trusted"] is None  # nobody chose at all


def test_a_report_holds_what_was_rejected(pool):
    report = see(pool, **COMMITTEE).report()
    # Of the 3 rows of p and 2 of q, over four members; a spoke 3 times, b 13, c 3, the root once.
    assert report["kept_by_label"] == {"p": pytest.approx(6 / 12), "q": pytest.approx(5 / 8)}
    told = {"mean-probs": 1, "a": 2 / 3, "b": 7 / 13, "c": 1 / 3}
    assert report["kept_by_teacher"] == {name: pytest.approx(share) for name, share in told.items()}
    assert "\nrejected most: of teacher 'c' 66.7%, of label 'p' 50.0%\n" in format_overview(report)
    assert see(pool).report()["kept_by_teacher"] == dict.fromkeys(pool.hierarchy.names)
    assert "rejected" not in format_overview(see(pool).report())
    for key in ("kept_by_label", "kept_by_teacher"):  # as a run of an earlier version left it
        del report[key]
    assert "rejected" not in format_overview(report)


def test_an_ensemble_speaks_for_those_that_answered(pool):
    spoken = len(pool.hierarchy.names) + 1
    told = see(pool, one=([spoken] * 5, [1, 1, 1, 0, 0])).report()
    assert told["teachers"]["a"]["trusted"] == pytest.approx(4 / 15)
    assert told["kept_by_teacher"] == {
        "mean-probs": None,
        "a": 3 / 4,
        "b": pytest.approx(3 / 5),
        "c": pytest.approx(3 / 5),
    }


def test_old_reports_are_still_drawn_and_new_ones_too(pool, tmp_path):
    pytest.importorskip("matplotlib")
    from hf_cosupervise.evaluation.plots import plot_overview

    new, nobody, old = see(pool, **COMMITTEE).report(), see(pool).report(), see(pool, **COMMITTEE).report()
    del old["kept_by_teacher"], old["kept_by_label"]
    for number, report in enumerate((new, nobody, old)):  # nobody was there to be trusted in the second
        assert plot_overview(report, tmp_path / f"{number}.png").stat().st_size > 0
