"""Answers in words: what is equal, who speaks for the most, and pairs, on rows worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_cosupervise.method.answers import (
    find_normalizer,
    first_answered,
    follow_student,
    group_answers,
    joining_rates,
    longest_agreement,
    majority_vote,
    pair_assigned,
    pair_consistent,
    pair_scored,
    pair_unfamiliar,
    random_answered,
)

NAN = np.nan


@pytest.mark.parametrize(
    ("normalize", "answer", "expected"),
    [
        ("exact", " a b ", "a b"),
        ("exact", "  ", None),
        ("number", "First 3, then 1,234.50 dollars.", "1234.5"),
        ("number", "-0.0", "0"),
        ("number", "-007", "-7"),
        ("number", "3.", "3"),
        ("number", "12,34", "34"),
        ("number", "#### 72", "72"),
        ("number", "nothing", None),
        ("boxed", r"\boxed{1} so \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{\frac{1}{2}", None),
        ("boxed", "1", None),
        (str.lower, "Yes", "yes"),
    ],
)
def test_normalisers(normalize, answer, expected):
    assert find_normalizer(normalize)(answer) == expected


def test_an_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match=r"`normalize` must be one of \['exact', 'number', 'boxed'\] or a function"):
        find_normalizer("numbers")


def test_groups():
    rows = [["4", "It is 4.0", None, "five"], ["1", "2", "1", "2"]]
    assert group_answers(rows, "number").tolist() == [[0, 0, -1, -1], [0, 1, 0, 1]]
    assert group_answers(rows[:1]).tolist() == [[0, 1, -1, 2]]
    with pytest.raises(ValueError, match="rows of several lengths"):
        group_answers([["a"], ["a", "b"]])


def test_majority_goes_to_its_most_confident_teacher_and_ties_to_the_more_confident_answer():
    groups = np.array([[0, 1, 1], [0, 1, -1], [0, 1, 2], [-1, -1, -1], [0, 1, 1]])
    sure = np.array([[9, 1, 2], [1, 3, 9], [NAN, NAN, NAN], [1, 1, 1], [9, NAN, 2]], dtype=float)
    speakers, shares = majority_vote(groups, sure)
    assert speakers.tolist() == [2, 1, 1, -1, 2]  # the third by the rates below
    np.testing.assert_allclose(shares, [2 / 3, 1 / 2, 1 / 3, 0, 2 / 3], rtol=1e-6)
    # The first never joins the two others where they agree (1 of 4); these never could (1 of 2).
    assert joining_rates(groups).tolist() == [0.25, 0.5, 0.5]
    assert majority_vote(groups)[0].tolist() == [1, 1, 1, -1, 1]


def test_a_tie_of_unknown_confidences_goes_to_whom_others_mostly_say_the_same_as():
    truth, draw = np.zeros(600, dtype=int), np.random.default_rng(0)
    skills = (0.3, 0.5, 0.8, 0.4)
    wrong = draw.integers(1, 500, (600, 4))
    groups = np.where(draw.random((600, 4)) < skills, 0, wrong)
    assert joining_rates(groups).argmax() == 2
    ties = [row for row in range(600) if len(set(groups[row])) == 4]
    assert len(ties) > 100 and set(majority_vote(groups)[0][ties].tolist()) == {2}
    speakers, shares = majority_vote(groups)
    said = groups[np.arange(600), speakers]
    by_the_first = np.where(shares == 0.25, groups[:, 0], said)
    assert (said == truth).mean() > (by_the_first == truth).mean() + 0.1


def test_a_teacher_may_count_for_more():
    assert majority_vote(np.array([[0, 0, 1]]), weights=np.array([1, 1, 1.9]))[0].tolist() == [0]
    speakers, shares = majority_vote(np.array([[0, 0, 1], [-1, -1, -1]]), weights=np.array([1, 1, 3]))
    assert speakers.tolist() == [2, -1] and shares.tolist() == pytest.approx([0.6, 0])


def test_who_says_what_the_student_says():
    groups = np.array([[0, 1, 1], [0, 1, 2], [0, 0, 1], [0, 0, 1], [0, 0, 1], [-1, -1, -1], [0, -1, -1]])
    own = np.array([[0, 0, 0], [1, 2, 1], [1, -1, -1], [1, -1, -1], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]])
    # Alone against two; said twice, not once; alone again. The first two say it in 1 of 4 (2 of 6, one on either side
    # added), the third in 3: where the student is silent, -2 log(1 - 1/3) = 0.81 is less than -log(1 - 2/3) = 1.10.
    assert follow_student(groups, own).tolist() == [0, 1, 2, 2, 2, -1, 0]
    # Of two who say it, the more confident one.
    assert follow_student(np.array([[0, 0, 1]]), np.array([[0]]), np.array([[1.0, 2.0, 3.0]])).tolist() == [1]
    # A student that never answers leaves the vote.
    silent = follow_student(groups, np.full((7, 0), -1))
    assert silent.tolist() == majority_vote(groups)[0].tolist() == [1, 1, 1, 1, 1, -1, 0]


def test_first_and_random():
    groups = np.array([[-1, 0, 1], [-1, -1, -1]] * 200)
    assert first_answered(groups)[:2].tolist() == [1, -1]
    drawn = random_answered(groups, seed=0)
    assert set(drawn[::2].tolist()) == {1, 2} and set(drawn[1::2].tolist()) == {-1}
    assert 60 < (drawn == 1).sum() < 140  # of 200
    assert np.array_equal(drawn, random_answered(groups, seed=0))


def test_longest_agreement_is_the_longest_common_run_of_words():
    # one: "cat sat" with two (2), "the" with three (1) = 3; two: 2 + "sat on" (2) = 4; three: 1 + 2 = 3
    assert longest_agreement([["the cat sat", "a cat sat on", "the dog sat on"], [None, None, None]]).tolist() == [
        1,
        -1,
    ]
    assert longest_agreement([[None, "alone"]]).tolist() == [1]


GROUPS = np.array([[0, 1, 0, -1], [0, 0, 0, 0], [0, 1, 2, 1]])


def pairs_of(both):
    return [(int(better), int(worse)) for better, worse in zip(*both)]


def test_pairs_of_the_assigned_teacher():
    better, worse = pair_assigned(np.repeat(GROUPS, 50, axis=0), np.repeat([0, 1, 0], 50), seed=0)
    assert set(worse[:50]) == {1} and set(worse[50:100]) == {-1} and set(worse[100:]) == {1, 2, 3}
    assert pair_assigned(GROUPS, np.array([-1, -1, 3]), seed=0)[1].tolist()[:2] == [-1, -1]
    assert pair_assigned(GROUPS, np.array([3, 0, 0]), seed=0)[1][0] == -1  # it has no answer


def test_pairs_by_rank():
    assert pairs_of(pair_scored(GROUPS, -np.array([0, 1, 2, 3]))) == [(0, 1), (0, -1), (0, 3)]
    assert pairs_of(pair_scored(GROUPS, -np.array([3, 2, 1, 0])))[::2] == [(2, 1), (3, 0)]


def test_pairs_by_score():
    scores = np.array([[1, 2, 3, 9], [1, 2, 3, 4], [NAN, 5, 5, 7]], dtype=float)
    # the second prompt has one answer; in the third the first teacher's is unknown, and 3 is best, 2 is another answer
    assert pairs_of(pair_scored(GROUPS, scores)) == [(2, 1), (3, -1), (3, 2)]
    assert pairs_of(pair_scored(GROUPS[2:], np.ones((1, 4))))[0][1] == -1  # none is better


def test_pairs_of_unfamiliar_answers():
    familiarity = np.array([[-1, -2, -3, -4], [-1, -2, -3, -4], [-1, -5, -2, -4]], dtype=float)
    # those who agree with teacher 0 are 0 and 2, of which 2 is known least; in the third, 1 and 3 agree
    assert pairs_of(pair_unfamiliar(GROUPS, np.array([0, 0, 3]), familiarity)) == [(2, 1), (3, -1), (1, 0)]
    assert pairs_of(pair_unfamiliar(GROUPS, np.array([-1, -1, -1]), familiarity)) == [(-1, -1)] * 3


def test_pairs_of_consistent_samples():
    ten = ["4"] * 6 + ["5", "6", "no", "7"]
    assert pair_consistent(["4"], [ten], "number", max_pairs=9, seed=1) != []
    pairs = pair_consistent(["= 4"], [ten], "number", max_pairs=9)
    assert {(better, worse) for _, better, worse in pairs} == {
        ("= 4", other) for other in ("5", "6", "7")
    }  # "no" is none
    assert len(pair_consistent(["= 4"], [ten], "number")) == 1
    # below 0.6 nothing is sure; another answer needs 0.8
    assert pair_consistent(["4"], [ten[1:] + ["8"]], "number") == []
    assert pair_consistent(["9"], [ten], "number") == []
    assert pair_consistent(["9", None, "x", "4"], [["4"] * 8 + ["5"] * 2, ten, ten, []], "number") == [(0, "4", "9")]
    assert pair_consistent(["4"], [["4"] * 9 + ["I do not know"]], "number") == []
    assert pair_consistent(["4"], [["4"] * 9 + [" "]]) == []
    assert pair_consistent(["4"], [["4"] * 10], "number") == []  # no sample says anything else
