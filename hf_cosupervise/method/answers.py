"""Answers in words: when two are the same, who speaks for the most of them, and which two make a preference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from difflib import SequenceMatcher
from itertools import combinations

import numpy as np

from .assignment import NOBODY

Normalizer = Callable[[str], str | None]
# A comma between three digits stands for thousands; elsewhere it ends a number.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


# ── when two answers are the same ───────────────────────────────────────────────────────────────────────────────────


def normalize_exact(answer: str) -> str | None:
    """Leave an answer as it is but for blanks at its ends; nothing is no answer."""
    return answer.strip() or None


def normalize_number(answer: str) -> str | None:
    """Take the last number of an answer, without thousands' commas and needless zeros; `None` where it has none.

    Examples:
        >>> normalize_number("so 1,200.50 dollars in all."), normalize_number("none")
        ('1200.5', None)
    """
    if not (found := _NUMBER.findall(answer)):
        return None
    number = format(Decimal(found[-1].replace(",", "")), "f")  # never rounded, as a float of many digits would be
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number == "-0" else number


def normalize_boxed(answer: str) -> str | None:
    r"""Take what stands in the last `\\boxed{…}` of an answer; `None` where there is none or it does not end."""
    _, mark, rest = answer.rpartition("\\boxed{")
    depth = 1
    for place, letter in enumerate(rest if mark else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return "".join(rest[:place].split()) or None
    return None


NORMALIZERS: dict[str, Normalizer] = {"exact": normalize_exact, "number": normalize_number, "boxed": normalize_boxed}


def find_normalizer(normalize: str | Normalizer) -> Normalizer:
    """Give the function of a name in `NORMALIZERS`; a function from an answer to a text or `None` is its own."""
    if callable(normalize):
        return normalize
    if normalize not in NORMALIZERS:
        raise ValueError(
            f"`normalize` must be one of {list(NORMALIZERS)} or a function of an answer, got {normalize!r}. Choose "
            "one."
        )
    return NORMALIZERS[normalize]


def group_answers(answers: Sequence[Sequence[str | None]], normalize: str | Normalizer = "exact") -> np.ndarray:
    """Number the different answers to each prompt in the order in which they first appear, -1 for none.

    Of what each teacher says, a list for each prompt, int64 `(num_examples, num_teachers)`. Answers that `normalize`
    makes equal are the same; one that it makes `None` counts as none. A `ValueError` if rows are of several lengths.

    Examples:
        >>> group_answers([["4", "It is 4.0", None, "five"], ["1", "2", "1", "2"]], "number").tolist()
        [[0, 0, -1, -1], [0, 1, 0, 1]]
    """
    function, rows = find_normalizer(normalize), []
    for said in answers:
        known: dict[str, int] = {}
        keys = [None if answer is None else function(answer) for answer in said]
        if wrong := [key for key in keys if not isinstance(key, str | None)]:
            raise TypeError(f"`normalize` must make a text or None of an answer, got {wrong[0]!r}. Let it return one.")
        rows.append([NOBODY if key is None else known.setdefault(key, len(known)) for key in keys])
    if len({len(row) for row in rows}) > 1:
        raise ValueError("Every prompt must have one answer or `None` of each teacher, got rows of several lengths.")
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1 if rows else 0)


# ── who speaks for all ──────────────────────────────────────────────────────────────────────────────────────────────


def _pick(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The allowed teacher of the highest score, the first of several; -1 where none is allowed or known."""
    allowed = allowed & ~np.isnan(scores)
    best = np.where(allowed, scores, -np.inf).argmax(axis=1)
    return np.where(allowed.any(axis=1), best, NOBODY).astype(np.int64)


def first_answered(groups: np.ndarray) -> np.ndarray:
    """Give the first teacher with an answer, int64 `(num_examples,)`; -1 where nobody has one."""
    return _pick(np.zeros(groups.shape), groups >= 0)


def random_answered(groups: np.ndarray, seed: int) -> np.ndarray:
    """Give one of the teachers with an answer, each as likely, int64 `(num_examples,)`; -1 where nobody has one."""
    # One draw for each teacher, answered or not: who is drawn for a prompt hangs on no other prompt's answers.
    return _pick(np.random.default_rng(seed).random(groups.shape), groups >= 0)


def joining_rates(groups: np.ndarray) -> np.ndarray:
    """Measure how often each teacher joins an answer that at least two others give, float64 `(num_teachers,)`.

    It tells whom to believe where nobody knows the truth: right answers are alike, and wrong ones mostly are not. Only
    examples of [`group_answers`] count that the teacher answered, one added on either side; 0.5 where there are none.
    """
    same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, :, None]
    counts = same.sum(axis=2)  # of those who say what a teacher says, itself among them
    # Two others say the same: without the teacher itself, at the last place.
    agreed = ((counts[:, :, None] - same >= 2) & ~np.eye(groups.shape[1], dtype=bool)).any(axis=1) & (groups >= 0)
    return ((agreed & (counts >= 3)).sum(axis=0) + 1) / (agreed.sum(axis=0) + 2)


def majority_vote(
    groups: np.ndarray, confidences: np.ndarray | None = None, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Let the answer that most teachers gave be spoken by the most confident of them.

    Of several that are as frequent, the one of the most confident teacher counts; where nobody knows how sure they
    are, the one of the teacher that joins others most often, see [`joining_rates`]. `groups`, as [`group_answers`]
    gives them, and `confidences` (NaN where nobody knows) are `(num_examples, num_teachers)`; `weights`, how much each
    vote counts, are above 0, `(num_teachers,)`.

    Returns the teacher who speaks, int64 `(num_examples,)`, -1 where nobody answered; and which share of those who
    answered agree with it, float32, 0 where nobody did.
    """
    # `votes` of an answer stand at everybody who gave it.
    weights, answered = np.ones(groups.shape[1]) if weights is None else weights, groups >= 0
    votes = ((groups[:, :, None] == groups[:, None, :]) * weights).sum(axis=2) * answered
    most = votes.max(axis=1, initial=0)
    sure = np.zeros(groups.shape) if confidences is None else np.nan_to_num(confidences, nan=-np.inf)
    # A teacher of the majority speaks in any case, also where nobody knows how sure it is.
    speaks = votes == most[:, None]
    for better in (sure, np.broadcast_to(joining_rates(groups), groups.shape)):
        speaks &= better == better.max(axis=1, initial=-np.inf, where=speaks, keepdims=True)
    speaker = np.where(most > 0, speaks.argmax(axis=1), NOBODY).astype(np.int64)
    all_votes = (answered * weights).sum(axis=1)
    return speaker, np.divide(most, all_votes, out=np.zeros(len(most)), where=most > 0).astype(np.float32)


def follow_student(groups: np.ndarray, own: np.ndarray, confidences: np.ndarray | None = None) -> np.ndarray:
    """Let the teacher speak that says what the student itself says most often.

    Among several, or among all where nobody says it, the vote decides, in which a teacher counts `-log(1 - r)` if it
    says what the student says in a share `r` of the prompts that both answered: that answer wins which is likeliest to
    have somebody behind it who is right, as if each erred by itself. `groups` and `confidences` are as in
    [`majority_vote`], and `own` `(num_examples, num_samples)` holds the student's answers, numbered together with the
    teachers', -1 for none. Returns int64 `(num_examples,)`, -1 where no teacher answered.

    Source: Ours, after the first stage of Weak-to-Strong Reasoning, arXiv 2407.13647.
    """
    answered = groups >= 0
    said = (groups[:, :, None] == own[:, None, :]).sum(axis=2) * answered
    both = answered & (own >= 0).any(axis=1, keepdims=True)
    rates = ((said > 0).sum(axis=0) + 1) / (both.sum(axis=0) + 2)  # one added on either side
    left = np.where(said == said.max(axis=1, initial=0, keepdims=True), groups, NOBODY)
    return majority_vote(left, confidences, -np.log1p(-rates))[0]


def longest_agreement(answers: Sequence[Sequence[str | None]]) -> np.ndarray:
    """Let the teacher speak whose answer has the longest runs of words in common with those of the others, summed.

    Of several with as much in common, the first; int64 `(num_examples,)`, -1 where nobody answered. For long answers.
    """
    chosen = np.full(len(answers), NOBODY, dtype=np.int64)
    for row, said in enumerate(answers):
        words = {teacher: answer.split() for teacher, answer in enumerate(said) if answer is not None}
        shared = dict.fromkeys(words, 0)
        for one, other in combinations(words, 2):
            # Without junk: words that are frequent in long answers count like others.
            size = SequenceMatcher(None, words[one], words[other], autojunk=False).find_longest_match().size
            shared[one], shared[other] = shared[one] + size, shared[other] + size
        chosen[row] = max(shared, key=shared.__getitem__, default=NOBODY)
    return chosen


# ── which two make a preference ─────────────────────────────────────────────────────────────────────────────────────

Pairs = tuple[np.ndarray, np.ndarray]  # positions of the chosen and of the rejected teacher, (num_examples,), -1: none


def _others(groups: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Who gave another answer than the chosen teacher, bool `(num_examples, num_teachers)`."""
    own = np.take_along_axis(groups, np.maximum(chosen, 0)[:, None], axis=1)
    return (groups >= 0) & (groups != own) & (own >= 0) & (chosen >= 0)[:, None]


def pair_assigned(groups: np.ndarray, assigned: np.ndarray, seed: int) -> Pairs:
    """Prefer the assigned teacher's answer to a different one, drawn among the others'."""
    draws = np.random.default_rng(seed).random(groups.shape)
    return assigned, _pick(draws, _others(groups, assigned))


def pair_scored(groups: np.ndarray, scores: np.ndarray) -> Pairs:
    """Prefer the answer of the highest score to a different one of the lowest; none where no score is higher.

    Source: Learning by Teaching (arXiv 2406.14629), its second method's data step; with a score of each teacher,
    `(num_teachers,)`, Delta Learning (arXiv 2507.06187).
    """
    scores = np.broadcast_to(scores.astype(np.float64), groups.shape)
    chosen = _pick(scores, groups >= 0)
    rejected = _pick(-scores, _others(groups, chosen))
    best, worst = (np.take_along_axis(scores, np.maximum(part, 0)[:, None], 1)[:, 0] for part in (chosen, rejected))
    return chosen, np.where((rejected >= 0) & (best > worst), rejected, NOBODY)


def pair_unfamiliar(groups: np.ndarray, assigned: np.ndarray, familiarity: np.ndarray) -> Pairs:
    """Prefer, of all who agree with the assigned teacher, the answer that the student knows least.

    Rejected is the answer that it knows best among those who disagree.

    Source: MACPO (arXiv 2410.07672), its first round; the negatively tuned copies of the teachers are left out.
    """
    disagree = _others(groups, assigned)
    chosen = _pick(-familiarity, (groups >= 0) & ~disagree & (assigned >= 0)[:, None])
    return chosen, _pick(familiarity, disagree)


def pair_consistent(
    answers: Sequence[str | None],
    samples: Sequence[Sequence[str]],
    normalize: str | Normalizer = "exact",
    *,
    min_share: float = 0.6,
    min_share_against: float = 0.8,
    max_pairs: int = 1,
    seed: int = 0,
) -> list[tuple[int, str, str]]:
    """Pair a teacher's answers with samples of the student, by how much these agree among each other.

    Where the answer is what at least `min_share` of the samples say, it is preferred to a sample that says something
    else; where at least `min_share_against` of them say another thing, one of these is preferred to it. Returns the
    position of the prompt, the chosen and the rejected text of each pair.

    Source: Weak-to-Strong Reasoning (arXiv 2407.13647), stage two, with its thresholds of 10 samples.
    """
    function, generator, pairs = find_normalizer(normalize), np.random.default_rng(seed), list[tuple[int, str, str]]()
    for row, (answer, said) in enumerate(zip(answers, samples, strict=True)):
        key = None if answer is None else function(answer)
        keys = [function(sample) for sample in said]
        known = [one for one in keys if one is not None]
        if answer is None or key is None or not known:
            continue
        majority = max(dict.fromkeys(known), key=known.count)  # the first of several
        share, is_right = known.count(majority) / len(said), key == majority
        if share < (min_share if is_right else max(min_share, min_share_against)):
            continue
        # Samples that say something else than the teacher, or what the teacher should have said.
        words = [(sample, one) for sample, one in zip(said, keys) if one is not None]
        others = list(dict.fromkeys(sample for sample, one in words if (one == majority) != is_right))
        for place in generator.permutation(len(others))[:max_pairs]:
            pairs.append((row, answer, others[place]) if is_right else (row, others[place], answer))
    return pairs
