"""Rules that choose among answers, on rows worked out by hand."""

from __future__ import annotations

import pytest
import torch

from hf_cosupervise.method import routing
from hf_cosupervise.method.routing import RULES, choose_teacher, rule_reads, select_answers

NAN = float("nan")
# Rows: all three answered, the second is silent, nobody answered.
KNOWN = {
    "student": torch.tensor([[-1.0, -2.0, -3.0], [-2.0, NAN, -1.5], [NAN, NAN, NAN]]),
    "local": torch.tensor([[-3.0, -2.0, -1.0], [-1.0, NAN, -1.5], [NAN, NAN, NAN]]),
    "teacher": torch.tensor([[-4.0, -0.5, -9.0], [-0.5, NAN, -2.0], [NAN, NAN, NAN]]),
    "same": torch.tensor([[False, True, True], [False, False, False], [False, False, False]]),
}
ANSWERED = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("log_likelihood", [0, 2, -1]),
        ("log_likelihood+confidence", [1, 0, -1]),  # -5, -2.5, -12 and -2.5, -3.5
        ("same_answer", [1, 2, -1]),  # the likelier of two that agree; of none that does, the likeliest
        ("local", [2, 0, -1]),
    ],
)
def test_each_rule(rule: str, expected: list[int]) -> None:
    assert choose_teacher(rule, KNOWN, ANSWERED).tolist() == expected


def test_ties_go_to_the_first() -> None:
    known = {name: torch.zeros(1, 3) for name in ("student", "teacher", "local")} | {"same": torch.ones(1, 3) > 0}
    assert all(choose_teacher(rule, known, torch.ones(1, 3) > 0).tolist() == [0] for rule in RULES)


def test_what_one_teacher_does_not_tell_counts_for_none() -> None:
    known = KNOWN | {"teacher": torch.tensor([[-4.0, NAN, -0.1], [-0.1, NAN, -2.0], [NAN, NAN, NAN]])}
    # Row 0 by the student alone, though -3.1 would win; row 1 by both, for who is silent hides nothing.
    assert choose_teacher("log_likelihood+confidence", known, ANSWERED).tolist() == [0, 0, -1]


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
