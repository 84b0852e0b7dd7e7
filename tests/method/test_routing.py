"""Rules that choose among answers, on rows worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_cosupervise.method import routing
from hf_cosupervise.method.ridge import RIDGE_ALPHAS
from hf_cosupervise.method.routing import RULES, choose_teacher, route, rule_reads, select_answers

NAN = float("nan")
# Rows: all three answered, the second is silent, nobody answered.
KNOWN = {
    "student": torch.tensor([[-1.0, -2.0, -3.0], [-2.0, NAN, -1.5], [NAN, NAN, NAN]]),
    "local": torch.tensor([[-3.0, -2.0, -1.0], [-1.0, NAN, -1.5], [NAN, NAN, NAN]]),
    "teacher": torch.tensor([[-4.0, -0.5, -9.0], [-0.5, NAN, -2.0], [NAN, NAN, NAN]]),
    "same": torch.tensor([[False, True, True], [False, False, False], [False, False, False]]),
    # The first and the last say the same in row 0; of two prompts alone nothing is learnt.
    "groups": torch.tensor([[0, 1, 0], [0, -1, 1], [-1, -1, -1]]),
    "prompts": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
}
ANSWERED = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("log_likelihood", [0, 2, -1]),
        ("log_likelihood+confidence", [1, 0, -1]),  # -5, -2.5, -12 and -2.5, -3.5
        ("same_answer", [1, 2, -1]),  # the likelier of two that agree; of none that does, the likeliest
        ("local", [2, 0, -1]),
        ("router", [1, 0, -1]),
    ],
)
def test_each_rule(rule: str, expected: list[int]) -> None:
    assert choose_teacher(rule, KNOWN, ANSWERED).tolist() == expected


def test_ties_go_to_the_first() -> None:
    known = {name: torch.zeros(1, 3) for name in ("student", "teacher", "local")} | {"same": torch.ones(1, 3) > 0}
    known |= {"groups": torch.zeros(1, 3).long(), "prompts": torch.ones(1, 2)}
    assert all(choose_teacher(rule, known, torch.ones(1, 3) > 0).tolist() == [0] for rule in RULES)


def test_what_one_teacher_does_not_tell_counts_for_none() -> None:
    known = KNOWN | {"teacher": torch.tensor([[-4.0, NAN, -0.1], [-0.1, NAN, -2.0], [NAN, NAN, NAN]])}
    # Row 0 by the student alone, though -3.1 would win; row 1 by both, for who is silent hides nothing.
    assert choose_teacher("log_likelihood+confidence", known, ANSWERED).tolist() == [0, 0, -1]


def test_those_who_say_the_same_count_together() -> None:
    """By hand: -1 + log(2 exp(-1)) = -1.31 of two together, -1.6 + 0 of the third; of the two, the surer speaks."""
    student, teacher = torch.tensor([[-1.0, -1.0, -1.6]]), torch.tensor([[-1.1, -0.9, 0.0]])
    known = {"student": student, "teacher": teacher, "prompts": torch.ones(1, 2)}
    answered = torch.ones(1, 3) > 0
    for groups, expected in (([0, 0, 1], 1), ([0, 1, 2], 2), ([-1, -1, 0], 2), ([-1, -1, -1], 2)):
        assert choose_teacher("router", known | {"groups": torch.tensor([groups])}, answered).tolist() == [expected]
    # Where one is not known to itself, two votes stand against one: -1 + log 2 and -1.6.
    unknown = known | {"groups": torch.tensor([[0, 0, 1]]), "teacher": torch.tensor([[-1.1, NAN, 9.0]])}
    assert choose_teacher("router", unknown, answered).tolist() == [0]


def test_a_router_tells_parts_from_prompts_and_slips_from_both() -> None:
    """Two parts, one teacher of each; what is chosen wrongly in a few prompts the others' choices put right."""
    generator = torch.Generator().manual_seed(0)
    part = torch.arange(200) % 2
    prompts = torch.randn(200, 5, generator=generator) + 6 * part[:, None] * torch.tensor([1.0, 0, 0, 0, 0])
    student = torch.where(part[:, None] == torch.arange(2), -1.0, -2.0)
    slips = torch.rand(200, generator=generator) < 0.2
    student[slips] = student[slips].flip(1) * 0.3  # less clearly than the others
    known = {"student": student, "teacher": torch.zeros(200, 2), "prompts": prompts}
    known["groups"] = torch.arange(2).expand(200, 2)
    answered = torch.ones(200, 2) > 0
    routed, plain = (choose_teacher(rule, known, answered) for rule in ("router", "log_likelihood"))
    assert (plain == part).double().mean() < 0.8 and (routed == part).double().mean() > 0.95
    # Prompts that tell nothing change next to nothing, however often one of the two is chosen.
    known["prompts"], known["student"] = torch.randn(200, 5, generator=generator), student.clone()
    known["student"][:60] = torch.tensor([-1.0, -2.0])
    same = choose_teacher("router", known, answered) == choose_teacher("log_likelihood", known, answered)
    assert same.double().mean() > 0.95


def slow_route(prompts: np.ndarray, chosen: np.ndarray, num_teachers: int) -> np.ndarray:
    """What `route` says, by a regression for each prompt that leaves it out."""
    found, rows = np.zeros((len(prompts), num_teachers)), [row for row, who in enumerate(chosen) if who >= 0]
    own = prompts[rows]
    own = (own - own.mean(axis=0)) / own.std(axis=0, ddof=1)
    inputs, targets = np.hstack([own, np.ones((len(rows), 1))]), np.eye(num_teachers)[chosen[rows]]
    fits = []
    for alpha in RIDGE_ALPHAS:
        penalty = np.diag([alpha * (own**2).sum(axis=0).mean()] * own.shape[1] + [0.0])
        said = []
        for row in range(len(rows)):
            x, y = np.delete(inputs, row, axis=0), np.delete(targets, row, axis=0)
            said.append(inputs[row] @ np.linalg.solve(x.T @ x + penalty, x.T @ y))
        fits.append((((np.array(said) - targets) ** 2).sum(), np.array(said)))
    usual = (targets.sum(axis=0) - targets) / (len(rows) - 1)
    best = min(fits, key=lambda fit: fit[0])[1]
    gains = ((usual - targets) ** 2 - (best - targets) ** 2).sum(axis=1)
    if np.mean(gains) <= np.std(gains, ddof=1) / math.sqrt(len(rows)):
        return found
    least = 0.1 / num_teachers
    for place, row in enumerate(rows):
        for who in range(num_teachers):
            found[row, who] = math.log(max(best[place, who], least)) - math.log(max(usual[place, who], least))
    return found


def slow_router(student: np.ndarray, teacher: np.ndarray, groups: np.ndarray, prompts: np.ndarray) -> list[int]:
    """What the rule's docstring says, one prompt after another."""
    num_teachers = student.shape[1]
    there = [[who for who in range(num_teachers) if not np.isnan(row[who])] for row in student]

    def choose(own: np.ndarray) -> np.ndarray:
        chosen = []
        for row, speakers in enumerate(there):
            best, highest = -1, -math.inf
            for who in speakers:
                friends = [other for other in speakers if other == who or 0 <= groups[row, who] == groups[row, other]]
                together = student[row, who] + math.log(sum(math.exp(own[row, other]) for other in friends))
                if together > highest:
                    surest = sorted((-student[row, other] - own[row, other], other) for other in friends)
                    best, highest = surest[0][1], together
            chosen.append(best)
        return np.array(chosen)

    own = teacher.copy()
    for row, speakers in enumerate(there):
        if any(np.isnan(teacher[row, who]) for who in speakers):
            own[row] = 0
    return choose(own + slow_route(prompts, choose(own), num_teachers)).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_router_against_a_slow_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num, num_teachers = 60, 4
    prompts, part = generator.normal(size=(num, 5)), generator.integers(0, num_teachers, num)
    prompts[:, 0] += 3 * part
    student = generator.normal(-2, 0.5, (num, num_teachers)) + 0.4 * (part[:, None] == np.arange(num_teachers))
    teacher = generator.normal(-1, 0.5, (num, num_teachers))
    groups = generator.integers(-1, 3, (num, num_teachers))
    student[generator.random((num, num_teachers)) < 0.1] = np.nan  # silent, or nothing that the student can read
    teacher[generator.random((num, num_teachers)) < 0.05] = np.nan
    student[7] = np.nan
    known = {"student": student, "teacher": teacher, "groups": groups, "prompts": prompts}
    found = choose_teacher(
        "router", {name: torch.from_numpy(own) for name, own in known.items()}, ~torch.from_numpy(student).isnan()
    )
    assert found.tolist() == slow_router(student, teacher, groups, prompts)


def test_features_that_tell_nothing_leave_the_others_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(300, 4, generator=generator)
    chosen = (prompts[:, 0] > 0).long()
    alone = route(prompts, chosen, 2)
    for value in (0.0, 12345.678, 1e6, -3e8):
        both = route(torch.cat([prompts, torch.full((300, 1), value)], dim=1), chosen, 2)
        assert (both - alone).abs().max() < 0.2 and both.abs().mean() > 0.5
    # Of few prompts and many features, mostly nothing is learnt where there is nothing.
    draws = [route(torch.randn(30, 96, generator=generator), torch.arange(30) % 3, 3) for _ in range(20)]
    assert sum(not own.any() for own in draws) >= 15


@pytest.mark.parametrize(("num_prompts", "size"), [(40, 6), (12, 20)])
def test_a_router_against_regressions_that_leave_each_prompt_out(num_prompts: int, size: int) -> None:
    generator = np.random.default_rng(0)
    prompts = generator.normal(size=(num_prompts, size)) * np.linspace(1, 30, size) + 100
    chosen = np.where(prompts[:, 0] > 100, 0, generator.integers(1, 3, num_prompts))
    chosen[[1, 5]] = -1
    found = route(torch.from_numpy(prompts), torch.from_numpy(chosen), 4)  # the last one is never chosen
    np.testing.assert_allclose(found, slow_route(prompts, chosen, 4), atol=2e-3)
    assert not found[[1, 5]].any()
    # Two prompts tell nothing, and neither do prompts that are all alike.
    assert not route(torch.ones(2, 3), torch.tensor([0, 1]), 2).any()
    assert route(torch.ones(5, 3), torch.tensor([0, 1, 1, 2, -1]), 3).abs().max() < 1e-5


def test_a_new_rule_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routing.RULES, "unlikely", lambda student: student)
    assert rule_reads("unlikely") == ("student",)
    assert choose_teacher("unlikely", KNOWN, ANSWERED).tolist() == [2, 0, -1]


def test_a_rule_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"`rule` must be one of \['log_likelihood', .*\], got 'best'\. Choose one"):
        choose_teacher("best", KNOWN, ANSWERED)


def test_selection() -> None:
    losses, same = torch.tensor([0.3, 0.1, 0.2, 0.0]), torch.tensor([True, False, True, True])
    there = torch.tensor([True, True, True, False])  # nobody has answered the last one
    assert select_answers("none", losses, None, there).tolist() == there.tolist()
    assert select_answers("same_answer", losses, same, there).tolist() == [True, False, True, False]
    assert select_answers("loss_rank", losses, same, there).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match=r"`rejection` must be one of .*, got 'some'\."):
        select_answers("some", losses, same, there)
    with pytest.raises(
        ValueError, match=r"'loss_rank' keeps as many answers as the student gives itself, got none of 3"
    ):
        select_answers("loss_rank", losses, torch.zeros(4) > 0, there)
