"""Who speaks for which example: rows worked out by hand. Random cases are compared in `test_slow_method.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_cosupervise.method.assignment import (
    AGREEMENT_RULES,
    agreement_scores,
    assign_by_chance,
    assign_by_domain,
    assign_by_scope,
    choose_lowest,
    fall_back,
    oracle_assign_by_domain,
    oracle_assign_by_loss,
    oracle_assign_by_scope,
)
from hf_cosupervise.pool.top_k import decode_top_k, encode_top_k, scale_top_k

YES = torch.ones(1, 1, dtype=torch.bool)


def everyone(num_examples: int, num_teachers: int) -> torch.Tensor:
    return YES.expand(num_examples, num_teachers)


def assign_by_agreement(student, teachers, answered, rule="ce_teacher_student", **options):
    return choose_lowest(agreement_scores(student, teachers, rule, **options), answered)


# ── scope ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# teacher 0 owns {0, 1}, teacher 1 owns {1, 2}; label 3 is owned by nobody
SCOPES = torch.tensor([[True, True, False, False], [False, True, True, False]])


@pytest.mark.parametrize("assign", [assign_by_scope, oracle_assign_by_scope])
@pytest.mark.parametrize(
    ("label", "answered", "expected"),
    [
        (0, [True, True], 0),
        (1, [True, True], 0),  # both own it: the first
        (1, [False, True], 1),  # both own it, the first has no answer
        (2, [True, True], 1),
        (2, [True, False], -1),  # the owner has no answer; the other one does not step in
        (3, [True, True], -1),  # unowned
        (0, [False, False], -1),
    ],
)
def test_scope(assign, label, answered, expected):
    found = assign(torch.tensor([label]), SCOPES, torch.tensor([answered]))
    assert found.tolist() == [expected] and found.dtype == torch.long


def test_scope_with_one_teacher_and_two_labels():
    scope, answered = torch.tensor([[False, True]]), torch.tensor([[True], [True], [False]])
    assert assign_by_scope(torch.tensor([0, 1, 1]), scope, answered).tolist() == [-1, 0, -1]


# ── agreement ───────────────────────────────────────────────────────────────────────────────────────────────────────


def scores_of(student: list[float], teachers: list[list[float]], rule: str, **options: float) -> list[float]:
    log_probs = torch.tensor([student], dtype=torch.float64).log()
    return agreement_scores(log_probs, torch.tensor([teachers], dtype=torch.float64), rule, **options)[0].tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # s = (1/2, 1/4, 1/4), g = (1/4, 1/2, 1/4); in units of log 2, -log s = (1, 2, 2) and -log g = (2, 1, 2)
        ("ce_teacher_student", 1 / 4 * 1 + 1 / 2 * 2 + 1 / 4 * 2),
        ("hard_loss", 2),  # argmax g = 1
        ("kl_teacher_student", 1 / 4 * (1 - 2) + 1 / 2 * (2 - 1) + 0),
        ("kl_student_teacher", 1 / 2 * (2 - 1) + 1 / 4 * (1 - 2) + 0),
    ],
)
def test_agreement_scores_by_hand(rule, expected):
    found = scores_of([0.5, 0.25, 0.25], [[0.25, 0.5, 0.25]], rule)
    assert found == pytest.approx([expected * math.log(2)], rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # s = (1, 0) and g = (0, 1): every log of 0 becomes log 1e-6 = -13.8155, every weight stays 0 or 1
        ("ce_teacher_student", -math.log(1e-6)),
        ("hard_loss", -math.log(1e-6)),
        ("kl_teacher_student", -math.log(1e-6)),
        ("kl_student_teacher", -math.log(1e-6)),
    ],
)
def test_probabilities_are_clamped_inside_logarithms_only(rule, expected):
    assert scores_of([1.0, 0.0], [[0.0, 1.0]], rule) == pytest.approx([expected], rel=1e-12)
    assert scores_of([1.0, 0.0], [[0.0, 1.0]], rule, min_prob=1e-2) == pytest.approx([-math.log(1e-2)], rel=1e-12)
    # a perfect match costs nothing, so no weight was lifted to min_prob
    assert scores_of([1.0, 0.0], [[1.0, 0.0]], rule) == pytest.approx([0.0], abs=1e-15)


def test_rules_disagree_where_they_should():
    # s = (0.6, 0.3, 0.1). Teacher 0 = (0.6, 0.3, 0.1) is the student itself, teacher 1 = (1, 0, 0).
    # CE: 0.898 against -log 0.6 = 0.511 -> teacher 1. Both KL: 0 against more than 0 -> teacher 0. hard: a tie -> 0.
    log_probs = torch.tensor([[0.6, 0.3, 0.1]]).log()
    teachers = torch.tensor([[[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]])
    found = {rule: assign_by_agreement(log_probs, teachers, everyone(1, 2), rule).item() for rule in AGREEMENT_RULES}
    assert found == {"ce_teacher_student": 1, "hard_loss": 0, "kl_teacher_student": 0, "kl_student_teacher": 0}


def test_cross_entropy_is_the_default():
    log_probs = torch.tensor([[0.6, 0.3, 0.1]]).log()
    teachers = torch.tensor([[[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]])
    assert assign_by_agreement(log_probs, teachers, everyone(1, 2)).tolist() == [1]


@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_one_hot_teachers_do_not_all_go_to_teacher_0(rule):
    # unclamped, KL(s || g) is infinite for both and argmin would answer 0 in every row
    log_probs = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]).log()
    teachers = torch.eye(3)[:2].expand(2, 2, 3)
    assert assign_by_agreement(log_probs, teachers, everyone(2, 2), rule).tolist() == [0, 1]


@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_agreement_ties_and_missing_answers(rule):
    # three teachers with one and the same row; the first that answered wins. Uniform student and teachers.
    log_probs = torch.full((4, 3), 1 / 3).log()
    teachers = torch.full((4, 3, 3), 1 / 3)
    answered = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    teachers = teachers * answered.unsqueeze(-1)
    # an all-zero row would score 0 under cross-entropy, better than any answer, if it were not left out
    assert assign_by_agreement(log_probs, teachers, answered, rule).tolist() == [0, 1, 2, -1]


# not hard_loss: teachers that name one label tie there, and the first of them wins in either order
@pytest.mark.parametrize("rule", [rule for rule in AGREEMENT_RULES if rule != "hard_loss"])
def test_permuted_teachers_give_permuted_assignment(rule):
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(50, 5, generator=generator).log_softmax(-1)
    teachers = torch.randn(50, 4, 5, generator=generator).softmax(-1)
    answered = torch.rand(50, 4, generator=generator) < 0.5
    order = torch.tensor([2, 0, 3, 1])
    before = assign_by_agreement(log_probs, teachers, answered, rule)
    after = assign_by_agreement(log_probs, teachers[:, order], answered[:, order], rule)
    assert torch.where(after >= 0, order[after.clamp(min=0)], -1).tolist() == before.tolist()
    assert before.unique().tolist() == [-1, 0, 1, 2, 3]


def test_infinitely_unlikely_labels_stay_finite():
    log_probs = torch.tensor([[0.0, -torch.inf]])
    for rule in AGREEMENT_RULES:
        assert torch.isfinite(agreement_scores(log_probs, torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]), rule)).all()


@pytest.mark.parametrize("rule", ["kl", "", "CE_TEACHER_STUDENT"])
def test_unknown_rule(rule):
    with pytest.raises(ValueError, match=rf"`rule`.*ce_teacher_student.*kl_student_teacher.*got '{rule}'"):
        assign_by_agreement(torch.zeros(1, 2), torch.zeros(1, 1, 2), YES, rule)


@pytest.mark.parametrize("min_prob", [0.0, -1e-6, 1.0])
def test_bad_min_prob(min_prob):
    with pytest.raises(ValueError, match=rf"`min_prob`.*got {min_prob}"):
        agreement_scores(torch.zeros(1, 2), torch.zeros(1, 1, 2), "hard_loss", min_prob)


# ── domain ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("assign", [assign_by_domain, oracle_assign_by_domain])
@pytest.mark.parametrize(
    ("domain", "answered", "expected"),
    [
        ("day", [True, True, True], 0),
        ("dusk", [True, True, True], 0),  # owned by both 0 and 1
        ("dusk", [False, True, True], 1),
        ("night", [True, True, True], 1),
        ("fog", [True, True, True], 2),  # nobody's own, but teacher 2 is made for every domain
        ("fog", [True, True, False], -1),
        ("day", [False, True, True], 2),
    ],
)
def test_domain(assign, domain, answered, expected):
    found = assign([domain], [["day", "dusk"], ("dusk", "night"), None], torch.tensor([answered]))
    assert found.tolist() == [expected] and found.dtype == torch.long


def test_domain_of_several_rows():
    domains = ["night", "day", "night", "fog"]
    assert assign_by_domain(domains, [["day"], ["night"]], everyone(4, 2)).tolist() == [1, 0, 1, -1]


# ── the true label ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gold", "answered", "expected"),
    [
        (0, [True, True, True], 1),  # 0.25, 0.5, 0.5: a tie between 1 and 2, the first
        (0, [True, False, True], 2),
        (1, [True, True, True], 0),  # 0.75, 0.5, 0.5
        (1, [False, False, True], 2),
        (1, [False, False, False], -1),
    ],
)
def test_oracle_loss(gold, answered, expected):
    teachers = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]]) * torch.tensor(answered).view(1, 3, 1)
    assert oracle_assign_by_loss(torch.tensor([gold]), teachers, torch.tensor([answered])).tolist() == [expected]


def test_oracle_loss_answers_even_at_probability_zero():
    # the only one that answered gives the true label nothing; it still speaks
    teachers = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    assert oracle_assign_by_loss(torch.tensor([1]), teachers, torch.tensor([[False, True]])).tolist() == [1]


# ── falling back ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fall_back_through_two_levels():
    # sources over the whole hierarchy: root 0, level 1 has 1 and 2, level 2 has 3 and 4
    root = torch.tensor([0, 0, -1, -1, 0])
    first = fall_back(torch.tensor([1, -1, 2, -1, -1]), root)
    assert first.tolist() == [1, 0, 2, -1, 0]
    second = fall_back(torch.tensor([-1, 4, -1, -1, -1]), first)
    assert second.tolist() == [1, 4, 2, -1, 0]


# ── no examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_examples():
    labels, answered = torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool)
    log_probs, teachers = torch.zeros(0, 4), torch.zeros(0, 2, 4)
    results = [
        assign_by_scope(labels, SCOPES, answered),
        *(assign_by_agreement(log_probs, teachers, answered, rule) for rule in AGREEMENT_RULES),
        assign_by_domain([], [["day"], None], answered),
        oracle_assign_by_scope(labels, SCOPES, answered),
        oracle_assign_by_domain([], [["day"], None], answered),
        oracle_assign_by_loss(labels, teachers, answered),
        fall_back(labels, labels),
    ]
    assert [(result.shape, result.dtype) for result in results] == [((0,), torch.long)] * len(results)


# ── teachers that name k labels ─────────────────────────────────────────────────────────────────────────────────────


def draw_sparse(
    num_labels: int, k: int, num_teachers: int = 3, num_examples: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A student, and teachers as stored rows and as full vectors: sure ones (rest 0), unsure ones, missing ones."""
    rng = np.random.default_rng([seed, num_labels, k])
    student = rng.dirichlet(np.full(num_labels, 0.5), size=num_examples)
    probs = rng.dirichlet(np.full(num_labels, 0.3), size=(num_examples, num_teachers))
    one_hot = np.eye(num_labels)[rng.integers(num_labels, size=(num_examples, num_teachers))]
    probs = np.where(rng.random((num_examples, num_teachers, 1)) < 0.2, one_hot, probs)
    probs[rng.random((num_examples, num_teachers)) < 0.2] = 0.0
    label_ids, stored = encode_top_k(probs.reshape(-1, num_labels), k)
    decoded = decode_top_k(label_ids, stored, num_labels).reshape(probs.shape)
    scaled, rest = scale_top_k(stored, num_labels)
    shape = (num_examples, num_teachers)
    sparse = {
        "label_ids": torch.from_numpy(label_ids.astype(np.int64)).view(*shape, k),
        "rest_probs": torch.from_numpy(rest).view(shape),
    }
    dense = torch.from_numpy(decoded)
    log_probs = torch.from_numpy(student).float().log()
    return log_probs, torch.from_numpy(scaled).view(*shape, k), sparse, dense, dense.any(dim=2)


def slow_score(student: list[float], teacher: list[float], rule: str, min_prob: float) -> float:
    """One score in float64, label by label."""
    if rule == "hard_loss":
        return -math.log(max(student[teacher.index(max(teacher))], min_prob))
    total = 0.0
    for s, g in zip(student, teacher):
        log_s, log_g = math.log(max(s, min_prob)), math.log(max(g, min_prob))
        total += {
            "ce_teacher_student": -g * log_s,
            "kl_teacher_student": g * (log_g - log_s),
            "kl_student_teacher": s * (log_s - log_g),
        }[rule]
    return total


@pytest.mark.parametrize("min_prob", [1e-6, 1e-3, 0.2])  # the last is above nearly every rest
@pytest.mark.parametrize(("num_labels", "k"), [(2, 1), (3, 3), (5, 2), (40, 4), (300, 16)])
@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_sparse_scores_are_dense_scores(rule, num_labels, k, min_prob):
    log_probs, stored, sparse, dense, answered = draw_sparse(num_labels, k)
    found = agreement_scores(log_probs, stored, rule, min_prob, **sparse)
    expected = agreement_scores(log_probs, dense, rule, min_prob)
    torch.testing.assert_close(found[answered], expected[answered], rtol=1e-5, atol=1e-5)
    assert found.shape == answered.shape and torch.isfinite(found).all()
    assert 0 < answered.sum() < answered.numel()
    students, teachers = log_probs.double().exp().tolist(), dense.double().tolist()
    for row, teacher in answered.nonzero()[:25].tolist():
        slow = slow_score(students[row], teachers[row][teacher], rule, min_prob)
        assert float(found[row, teacher]) == pytest.approx(slow, rel=2e-5, abs=2e-5), (row, teacher)


@pytest.mark.parametrize(("num_labels", "k"), [(2, 1), (5, 2), (40, 4), (300, 16)])
@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_sparse_teachers_are_chosen_as_dense_ones(rule, num_labels, k):
    log_probs, stored, sparse, dense, answered = draw_sparse(num_labels, k, num_examples=300, seed=1)
    found = assign_by_agreement(log_probs, stored, answered, rule, **sparse)
    expected = assign_by_agreement(log_probs, dense, answered, rule)
    scores = agreement_scores(log_probs.double(), dense.double(), rule).masked_fill(~answered, torch.inf)
    for row in (found != expected).nonzero().flatten().tolist():  # a near tie may go either way
        first, second = scores[row, found[row]], scores[row, expected[row]]
        assert found[row] >= 0 and abs(float(first - second)) <= 1e-5 * max(1.0, abs(float(first)))
    assert (found == expected).float().mean() > 0.99
    assert (found == -1).tolist() == (~answered.any(dim=1)).tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # s = (1/2, 1/4, 1/8, 1/8), g = (1/8, 1/2, 3/16, 3/16) named as {1: 1/2, 0: 1/8} with 3/16 for the other two
        ("ce_teacher_student", (1 / 8 * 1 + 1 / 2 * 2 + 2 * 3 / 16 * 3) * math.log(2)),
        ("hard_loss", 2 * math.log(2)),
        (
            "kl_teacher_student",
            (1 / 8 * -2 + 1 / 2 * 1) * math.log(2) + 2 * 3 / 16 * math.log((3 / 16) / (1 / 8)),
        ),
        (
            "kl_student_teacher",
            (1 / 2 * 2 + 1 / 4 * -1) * math.log(2) + 2 * 1 / 8 * math.log((1 / 8) / (3 / 16)),
        ),
    ],
)
def test_sparse_scores_by_hand(rule, expected):
    log_probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    found = agreement_scores(
        log_probs,
        torch.tensor([[[0.5, 0.125]]], dtype=torch.float64),
        rule,
        label_ids=torch.tensor([[[1, 0]]]),
        rest_probs=torch.tensor([[3 / 16]], dtype=torch.float64),
    )
    assert found.tolist() == [[pytest.approx(expected, rel=1e-12)]]


@pytest.mark.parametrize(
    ("rest", "floor"),
    [
        (0.0, 1e-2),  # sure teacher: nobody else has a probability, which the logarithm lifts to min_prob
        (1e-3, 1e-2),  # a rest below min_prob is lifted too
        (2e-2, 2e-2),  # one above stays
    ],
)
def test_the_rest_is_clamped_inside_logarithms_only(rest, floor):
    # KL(s || g) with s = (0, 1/2, 1/2) and g = (1 - 2r, r, r): log(1/2) - log(max(r, 1e-2)), the student's 0 costs 0
    log_probs = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64).log()
    teacher, ids = torch.tensor([[[1 - 2 * rest]]], dtype=torch.float64), torch.tensor([[[0]]])
    options = {"label_ids": ids, "rest_probs": torch.tensor([[rest]], dtype=torch.float64)}
    found = agreement_scores(log_probs, teacher, "kl_student_teacher", 1e-2, **options)
    assert found.item() == pytest.approx(math.log(0.5) - math.log(floor), rel=1e-12)
    # -sum g log s with log s = (log 1e-2, log 1/2, log 1/2): r is a weight here, and stays what it is
    found = agreement_scores(log_probs, teacher, "ce_teacher_student", 1e-2, **options)
    expected = -(1 - 2 * rest) * math.log(1e-2) - 2 * rest * math.log(0.5)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_a_missing_sparse_row_is_left_out(rule):
    # the zeros of a missing row name label 0 with probability 0, and would win under cross-entropy
    log_probs = torch.tensor([[0.25, 0.75]]).log()
    stored, ids = torch.tensor([[[0.0], [0.9]]]), torch.tensor([[[0], [1]]])
    answered = torch.tensor([[False, True]])
    options = {"label_ids": ids, "rest_probs": torch.tensor([[0.0, 0.1]])}
    assert assign_by_agreement(log_probs, stored, answered, rule, **options).tolist() == [1]
    assert assign_by_agreement(log_probs, stored, torch.zeros(1, 2, dtype=torch.bool), rule, **options).tolist() == [
        -1
    ]


@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_sparse_ties_go_to_the_first(rule):
    log_probs, stored, sparse, _, _ = draw_sparse(12, 3, num_teachers=1)
    repeated = {name: values.repeat_interleave(3, dim=1) for name, values in sparse.items()}
    answered = torch.tensor([[False, True, True]]).expand(len(stored), -1)
    found = assign_by_agreement(log_probs, stored.repeat_interleave(3, dim=1), answered, rule, **repeated)
    assert set(found.tolist()) == {1}


def test_sparse_scores_of_an_infinitely_unlikely_label_stay_finite():
    log_probs = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    for rule in AGREEMENT_RULES:
        found = agreement_scores(
            log_probs,
            torch.tensor([[[0.5], [1.0]]]),
            rule,
            label_ids=torch.tensor([[[1], [2]]]),
            rest_probs=torch.tensor([[0.25, 0.0]]),
        )
        assert torch.isfinite(found).all()


def test_no_sparse_examples():
    empty = {"label_ids": torch.zeros(0, 2, 3, dtype=torch.long), "rest_probs": torch.zeros(0, 2)}
    answered = torch.zeros(0, 2, dtype=torch.bool)
    for rule in AGREEMENT_RULES:
        assert assign_by_agreement(torch.zeros(0, 9), torch.zeros(0, 2, 3), answered, rule, **empty).shape == (0,)


# ── chance ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chance_is_even_among_those_who_answered_and_repeats_itself():
    answered = torch.ones(6000, 3, dtype=torch.bool)
    answered[::2, 1] = False
    answered[::10] = False
    first, again, other = (assign_by_chance(answered, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[::10] == -1).all() and (first[::2] != 1).all()
    shares = torch.bincount(first[1::2], minlength=3) / 3000
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.04)


def test_nobody_silent_is_chosen_however_bad_the_others_are() -> None:
    answered = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    for worst in (torch.inf, 1e38):
        scores = torch.tensor([[torch.nan, worst, worst], [0.0, 1.0, worst], [1.0, 2.0, 3.0]])
        assert choose_lowest(scores, answered).tolist() == [1, 2, -1]
