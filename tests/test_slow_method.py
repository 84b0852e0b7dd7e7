"""The package's pure functions against `slow_method.py`, row by row, over many small random cases.

Probabilities are multiples of 1/16: exactly representable, so that ties are frequent and are ties on both sides.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import slow_method as slow
import torch
from datasets import Dataset

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.method.aggregation import majority_vote, mean_probs
from hf_cosupervise.method.assignment import (
    AGREEMENT_RULES,
    agreement_scores,
    assign_by_domain,
    assign_by_scope,
    choose_lowest,
    fall_back,
    oracle_assign_by_domain,
    oracle_assign_by_loss,
    oracle_assign_by_scope,
)
from hf_cosupervise.method.metrics import performance_gap_recovered
from hf_cosupervise.method.rejection import (
    in_top_k,
    parent_confident,
    pseudolabel_loss,
    select_by_loss_rank,
    select_consistent,
)
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.pool.top_k import decode_top_k, encode_top_k
from hf_cosupervise.training.config import CoSupervisedConfig
from hf_cosupervise.training.plan import plan_level

SHAPES = [(num_labels, num_teachers) for num_labels in (2, 3, 5, 10) for num_teachers in (1, 2, 3)]
SEEDS = range(15)
DOMAINS = ("day", "dusk", "night")
ASSIGNMENTS = (
    "scope",
    *(f"agreement:{rule}" for rule in AGREEMENT_RULES),
    "metadata",
    "ensemble",
    "oracle_scope",
    "oracle_domain",
    "oracle_loss",
)
SCOPED = pytest.mark.parametrize(("num_labels", "num_teachers"), SHAPES)


# ── random cases ────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_rows(rng: np.random.Generator, shape: tuple[int, ...], num_labels: int, parts: int = 16) -> np.ndarray:
    """Rows of multiples of 1/parts that sum to 1; about one in six is one-hot."""
    rows = rng.multinomial(parts, np.full(num_labels, 1 / num_labels), size=shape) / parts
    one_hot = np.eye(num_labels)[rng.integers(num_labels, size=shape)]
    return np.where(rng.random(shape)[..., None] < 1 / 6, one_hot, rows)


class Case:
    """One level's answers, its scopes and a student; some answers are missing, some rows have none at all."""

    def __init__(self, seed: int, num_labels: int, num_teachers: int, num_examples: int | None = None) -> None:
        rng = np.random.default_rng([seed, num_labels, num_teachers])
        self.n = int(rng.integers(1, 9)) if num_examples is None else num_examples
        self.num_labels, self.num_teachers = num_labels, num_teachers
        probs = draw_rows(rng, (self.n, num_teachers), num_labels)
        probs[rng.random((self.n, num_teachers)) < 0.25] = 0.0
        probs[rng.random(self.n) < 0.1] = 0.0
        if num_teachers > 1 and seed % 3 == 0:
            probs[:, -1] = probs[:, 0]  # a copy of the first teacher: an exact tie that the first must win
        self.probs = torch.tensor(probs)
        self.answers = probs.tolist()
        self.answered = self.probs.sum(dim=-1) > 0
        self.student = torch.tensor(draw_rows(rng, (self.n,), num_labels))
        self.student_rows = self.student.tolist()
        # unequal scopes, overlapping scopes, unowned labels, and None for a teacher of everything
        owned = rng.random((num_teachers, num_labels)) < 0.5
        owned[:, 0] &= seed % 2 == 0
        self.scope_mask = torch.tensor(owned)
        self.scopes = [{int(label) for label in np.flatnonzero(row)} for row in owned]
        if seed % 5 == 0:
            self.scope_mask[-1] = True
            self.scopes[-1] = None
        made_for = rng.random((num_teachers, len(DOMAINS))) < 0.5
        self.domains = [{name for name, own in zip(DOMAINS, row, strict=True) if own} for row in made_for]
        if seed % 4 == 0:
            self.domains[-1] = None
        self.example_domains = [str(name) for name in rng.choice(DOMAINS, size=self.n)]
        self.gold = rng.integers(num_labels, size=self.n).tolist()


def package_assign(case: Case, assignment: str) -> torch.Tensor:
    log_probs = case.student.log()
    if assignment == "scope":
        return assign_by_scope(case.student.argmax(dim=-1), case.scope_mask, case.answered)
    if assignment.startswith("agreement:"):
        return choose_lowest(agreement_scores(log_probs, case.probs, assignment.split(":")[1]), case.answered)
    teacher_domains = [None if names is None else sorted(names) for names in case.domains]
    if assignment == "metadata":
        return assign_by_domain(case.example_domains, teacher_domains, case.answered)
    if assignment == "oracle_domain":
        return oracle_assign_by_domain(case.example_domains, teacher_domains, case.answered)
    gold = torch.tensor(case.gold)
    if assignment == "oracle_scope":
        return oracle_assign_by_scope(gold, case.scope_mask, case.answered)
    return oracle_assign_by_loss(gold, case.probs, case.answered)


def slow_level(case: Case, assignment: str, parent: slow.Level | None, **options: object) -> slow.Level:
    return slow.run_level(
        case.answers,
        parent,
        case.student_rows if parent is not None else None,
        assignment=assignment,
        scopes=case.scopes,
        domains=case.domains,
        example_domains=case.example_domains,
        gold=case.gold,
        **options,
    )


# ── assignment ──────────────────────────────────────────────────────────────────────────────────────────────────────


@SCOPED
@pytest.mark.parametrize("assignment", [name for name in ASSIGNMENTS if name != "ensemble"])
def test_assignment(assignment, num_labels, num_teachers):
    num_assigned = 0
    for seed in SEEDS:
        case = Case(seed, num_labels, num_teachers)
        found = package_assign(case, assignment)
        assert found.dtype == torch.long and found.shape == (case.n,)
        for i, teacher in enumerate(found.tolist()):
            if assignment.startswith("agreement:"):
                rule = assignment.split(":")[1]
                tolerance = 0.0 if rule == "hard_loss" else 1e-12
                allowed = slow.agreement_winners(case.student_rows[i], case.answers[i], rule, tolerance)
            else:
                level = slow_level(case, assignment, slow_level(case, "ensemble", None))
                allowed = [level.assigned[i]]
            assert teacher in allowed, (seed, i, case.answers[i], case.student_rows[i])
            num_assigned += teacher >= 0
    assert num_assigned > 0


@SCOPED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_agreement_scores(rule, dtype, num_labels, num_teachers):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for seed in SEEDS[:8]:
        case = Case(seed, num_labels, num_teachers)
        found = agreement_scores(case.student.to(dtype).log(), case.probs.to(dtype), rule)
        assert torch.isfinite(found).all()
        for i in range(case.n):
            for k in range(num_teachers):
                if case.answered[i, k]:
                    expected = slow.agreement_score(case.student_rows[i], case.answers[i][k], rule)
                    assert found[i, k].item() == pytest.approx(expected, rel=tolerance, abs=tolerance), (seed, i, k)


# ── whole levels ────────────────────────────────────────────────────────────────────────────────────────────────────


def package_level(
    case: Case, assignment: str, previous: dict[str, torch.Tensor], offset: int, rejection: str, k: int
) -> dict[str, torch.Tensor]:
    """What a caller makes of the pure functions: everything from assignment to the kept rows."""
    if assignment == "ensemble":
        probs = mean_probs(case.probs, case.answered)
        own = torch.where(case.answered.any(dim=1), offset + case.num_teachers, -1)
    else:
        assigned = package_assign(case, assignment)
        probs = case.probs[torch.arange(case.n), assigned.clamp(min=0)]
        own = torch.where(assigned >= 0, assigned + offset, -1)
    source = fall_back(own, previous["source"])
    probs = torch.where((own >= 0).unsqueeze(1), probs, previous["probs"])
    has_label = source >= 0
    labels = torch.where(has_label, probs.argmax(dim=1), -1)
    level = {"source": source, "probs": probs, "labels": labels, "confidence": probs.amax(dim=1)}
    if rejection == "none":
        return level | {"keep": has_label}
    log_probs = case.student.log()
    agrees = in_top_k(log_probs, labels.clamp(min=0), k)
    losses = pseudolabel_loss(log_probs, labels.clamp(min=0))
    return level | {"agrees": agrees & has_label, "keep": select_consistent(losses, agrees, has_label, rejection)}


@SCOPED
@pytest.mark.parametrize("rejection", ["none", "loss_rank", "agreement_set"])
@pytest.mark.parametrize("assignment", [name for name in ASSIGNMENTS if not name.startswith("agreement")])
def test_three_levels(assignment, rejection, num_labels, num_teachers):
    # root: one teacher; then two levels whose students are drawn at random; the second falls back through the first
    num_compared = 0
    for seed in SEEDS[:9]:
        root = Case(1000 + seed, num_labels, 1, num_examples=7)
        expected = slow_level(root, "only", None)
        probs = root.probs[:, 0]
        found = {"source": torch.where(root.answered[:, 0], 0, -1), "probs": probs, "labels": probs.argmax(dim=1)}
        offset, names = 1, {None: -1, (0, 0): 0}
        for depth in (1, 2):
            case = Case(seed + 100 * depth, num_labels, num_teachers, num_examples=7)
            names |= {(depth, k): offset + k for k in range(num_teachers)} | {(depth, "mean"): offset + num_teachers}
            k = 1 + seed % (num_labels - 1)
            try:
                expected = slow_level(case, assignment, expected, rejection=rejection, top_k=k)
            except ValueError:
                break  # no agreement at all: has a test of its own
            found = package_level(case, assignment, found, offset, rejection, k)
            assert found["source"].tolist() == [names[source] for source in expected.sources], seed
            assert found["labels"].tolist() == expected.labels, seed
            rows = [row or [0.0] * num_labels for row in expected.pseudolabels]
            torch.testing.assert_close(found["probs"], torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-15)
            if rejection != "none":
                assert found["agrees"].tolist() == expected.agrees, seed
                assert int(found["keep"].sum()) == expected.num_keep <= expected.num_training, seed
            assert found["keep"].tolist() == expected.keep, seed
            offset += num_teachers + 1
            num_compared += 1
    assert num_compared >= 8


@SCOPED
@pytest.mark.parametrize("rule", ["parent_topk", "parent_confident"])
def test_local_global(rule, num_labels, num_teachers):
    kept = []
    for seed in SEEDS:
        # the parent answers every row here: where it did not there is nothing to ask these functions
        root = Case(seed, num_labels, 1, num_examples=6)
        case = Case(500 + seed, num_labels, num_teachers, num_examples=6)
        root.answers = [[row] for row in draw_rows(np.random.default_rng(seed), (6,), num_labels).tolist()]
        parent = slow_level(root, "only", None)
        k = 1 + seed % (num_labels - 1)
        expected = slow_level(case, "oracle_loss", parent, local_global=rule, top_k=k)
        labels, probs = torch.tensor(expected.labels), torch.tensor(expected.pseudolabels)
        parent_labels, parent_probs = torch.tensor(parent.labels), torch.tensor(parent.pseudolabels)
        if rule == "parent_topk":
            found = in_top_k(parent_probs, labels, k)
        else:
            found = parent_confident(labels, probs.amax(dim=1), parent_labels, parent_probs.amax(dim=1))
        assert found.tolist() == expected.keep, seed
        kept += expected.keep
    assert any(kept) and not all(kept)


# ── whole levels as the package puts them together, from a stored pool ──────────────────────────────────────────────

REJECTIONS = [
    (("none",), "loss_rank"),
    (("top_k",), "loss_rank"),
    (("top_k",), "agreement_set"),
    (("parent_topk",), "loss_rank"),
    (("parent_confident",), "loss_rank"),
    (("top_k", "parent_topk"), "loss_rank"),
    (("top_k", "parent_confident"), "agreement_set"),
]


@functools.cache
def stored_case(seed: int) -> tuple[Case, list[Case], PseudolabelPool]:
    """A 1-K-K hierarchy and a pool of what it says, in half precision, which holds multiples of 1/16 exactly."""
    num_labels, num_teachers = (2, 3, 5, 10)[seed % 4], 1 + seed % 3
    root = Case(2000 + seed, num_labels, 1, num_examples=8)
    levels = [Case(seed + 100 * depth, num_labels, num_teachers, num_examples=8) for depth in (1, 2)]
    labels = [f"label {c}" for c in range(num_labels)]
    teachers, predictions = [Teacher("root")], {"root": root.probs[:, 0].numpy()}
    for depth, case in enumerate(levels, start=1):
        # the true label and the domain belong to an example, not to a level
        case.gold, case.example_domains = root.gold, root.example_domains
        for k in range(num_teachers):
            scope, domains = case.scopes[k], case.domains[k]
            if scope is not None:
                scope.add(k % num_labels)  # a teacher made for nothing is refused
                scope = [labels[c] for c in sorted(scope)]
            if domains is not None:
                domains.add(DOMAINS[k])
                domains = sorted(domains)
            teachers.append(Teacher(f"t{depth}{k}", level=depth, scope=scope, domains=domains))
            predictions[f"t{depth}{k}"] = case.probs[:, k].numpy()
    inputs = Dataset.from_dict(
        {"oracle_label": root.gold, "oracle_domain": root.example_domains, "place": root.example_domains}
    )
    hierarchy = TeacherHierarchy(labels, teachers)
    return root, levels, PseudolabelPool.from_predictions(hierarchy, range(root.n), predictions, inputs=inputs)


def is_close_call(case: Case, rule: str) -> bool:
    """Tell whether float32 may order two teachers of some row differently."""
    if rule == "hard_loss":
        return False  # one number per label: scores are equal or far apart
    pairs = zip(case.student_rows, case.answers, strict=True)
    return any(len(slow.agreement_winners(student, answers, rule, 1e-5)) > 1 for student, answers in pairs)


@pytest.mark.parametrize(
    ("rejection", "rule"), REJECTIONS, ids=["+".join((*names, rule)) for names, rule in REJECTIONS]
)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_planned_levels(assignment, rejection, rule, tmp_path):
    method, _, agreement_rule = assignment.partition(":")
    args = CoSupervisedConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        assignment=[method],
        agreement_rule=agreement_rule or AGREEMENT_RULES[0],
        metadata_column="place",
        rejection=list(rejection),
        rejection_rule=rule,
    )
    num_compared = 0
    for seed in range(6):
        root, levels, pool = stored_case(seed)
        names = {None: -1, (0, 0): 0}
        expected = slow_level(root, "only", None)
        found = plan_level(pool, 0, args, np.full(root.n, -1))
        assert (found.labels.tolist(), found.keep_mask.tolist()) == (expected.labels, expected.keep)
        for depth, case in enumerate(levels, start=1):
            if method == "agreement" and is_close_call(case, agreement_rule):
                break
            first = 1 + (depth - 1) * case.num_teachers
            names |= {(depth, k): first + k for k in range(case.num_teachers)}
            # the ensemble of one teacher is that teacher
            names[(depth, "mean")] = first if case.num_teachers == 1 else len(pool.hierarchy.teachers) + depth
            options = {
                "rejection": rule if "top_k" in rejection else "none",
                "top_k": min(3, case.num_labels - 1),
                "local_global": next((name for name in rejection if name.startswith("parent")), "none"),
            }
            chunks = [(slice(start, start + 4), case.student[start : start + 4].float().log()) for start in (0, 4)]
            try:
                expected = slow_level(case, assignment, expected, **options)
            except ValueError:
                expected = None
            if expected is None or not any(expected.keep):
                with pytest.raises(ValueError, match="keep at least one example"):
                    plan_level(pool, depth, args, found.assigned_teacher, chunks)
                break
            found = plan_level(pool, depth, args, found.assigned_teacher, chunks)
            assert found.assigned_teacher.tolist() == [names[source] for source in expected.sources], (seed, depth)
            assert found.labels.tolist() == expected.labels, (seed, depth)
            assert found.keep_mask.tolist() == expected.keep, (seed, depth)
            assert found.keep_rate == sum(expected.keep) / expected.num_training
            num_compared += 1
    assert num_compared >= 4


# ── the pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_labels", [2, 3, 5, 10])
def test_top_k_and_loss(num_labels):
    for seed in SEEDS:
        rows = draw_rows(np.random.default_rng(seed), (num_labels,), num_labels, parts=8)
        probs = torch.tensor(np.repeat(rows, num_labels, axis=0))
        labels = torch.arange(num_labels).repeat(num_labels)
        for k in range(1, num_labels):
            expected = [slow.in_top_k(row, c, k) for row in rows.tolist() for c in range(num_labels)]
            assert in_top_k(probs.log(), labels, k).tolist() == expected, (seed, k)
            assert sum(expected) == k * num_labels
        losses = [slow.negative_log(row[c]) for row in rows.tolist() for c in range(num_labels)]
        assert pseudolabel_loss(probs.log(), labels).tolist() == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("num_values", [2, 4, 50])
def test_select_by_loss_rank(num_values):
    # few different values: nearly every case is decided by a tie; infinite losses are values like any other
    for seed in range(60):
        rng = np.random.default_rng([seed, num_values])
        n = int(rng.integers(1, 12))
        losses = rng.integers(num_values, size=n).astype(float)
        losses[rng.random(n) < 0.15] = math.inf
        candidates = rng.random(n) < 0.7
        num_keep = int(rng.integers(candidates.sum() + 1))
        found = select_by_loss_rank(torch.tensor(losses), num_keep, torch.tensor(candidates))
        assert found.tolist() == slow.keep_lowest(losses.tolist(), num_keep, candidates.tolist()), seed
        found = select_by_loss_rank(torch.tensor(losses), num_keep)
        assert found.tolist() == slow.keep_lowest(losses.tolist(), num_keep, [True] * n), seed


@SCOPED
def test_mean_ensemble(num_labels, num_teachers):
    for seed in SEEDS:
        case = Case(seed, num_labels, num_teachers)
        found = mean_probs(case.probs, case.answered)
        for i in range(case.n):
            expected = slow.mean_row(case.answers[i])
            assert found[i].tolist() == pytest.approx(expected or [0.0] * num_labels, rel=1e-12), (seed, i)
            assert int(found[i].argmax()) == (slow.argmax(expected) if expected else 0), (seed, i)


@SCOPED
def test_majority_vote(num_labels, num_teachers):
    for seed in SEEDS:
        rng = np.random.default_rng([seed, num_labels, num_teachers])
        labels = rng.integers(-1, num_labels, size=(6, num_teachers + 2))
        found = majority_vote(torch.tensor(labels), num_labels)
        for i, row in enumerate(labels.tolist()):
            assert found[i].tolist() == pytest.approx(slow.majority_shares(row, num_labels)), (seed, row)


@pytest.mark.parametrize("num_labels", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("parts", [16, 0])
def test_top_k_storage(num_labels, parts):
    # parts = 0: probabilities of a softmax, whose stored sum half precision moves by up to 2 ** -11
    tolerance = 1e-6 if parts else 5e-4
    for seed in SEEDS:
        rng = np.random.default_rng([seed, num_labels])
        if parts:
            probs = draw_rows(rng, (5,), num_labels, parts).astype(np.float32)
        else:
            logits = rng.normal(scale=3.0, size=(5, num_labels))
            probs = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
        probs[rng.random(5) < 0.2] = 0.0
        for k in sorted({1, 2, num_labels // 2 or 1, num_labels}):
            label_ids, label_probs = encode_top_k(probs, k)
            decoded = decode_top_k(label_ids, label_probs, num_labels)
            for i, row in enumerate(probs.astype(float).tolist()):
                ids, stored = slow.encode_row(row, k)
                assert label_probs[i].tolist() == stored, (seed, k, i)
                if slow.has_answer(row):
                    assert label_ids[i].tolist() == ids, (seed, k, i)
                expected = slow.decode_row(ids, stored, num_labels)
                assert decoded[i].tolist() == pytest.approx(expected, rel=0, abs=tolerance), (seed, k, i)


def test_performance_gap_recovered():
    rng = np.random.default_rng(0)
    num_without_gap = 0
    for weak, student, ceiling in (rng.integers(0, 9, size=(300, 3)) / 8).tolist():
        found = performance_gap_recovered(weak, student, ceiling)
        expected = slow.performance_gap_recovered(weak, student, ceiling)
        assert found == pytest.approx(expected, nan_ok=True)
        num_without_gap += math.isnan(expected)
    assert 0 < num_without_gap < 300


# ── the slow version itself, on rows worked out by hand ─────────────────────────────────────────────────────────────


def test_slow_level_by_hand():
    # Four rows, three labels. The root answers rows 0 to 2; teacher 0 owns {0, 1}, teacher 1 owns {1}, nobody owns 2.
    root = slow.run_level([[[0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0]], [[0.25, 0.25, 0.5]], [[0.0, 0.0, 0.0]]])
    assert root.labels == [0, 1, 2, -1] and root.keep == [True, True, True, False] and root.num_training == 3
    nobody = [0.0, 0.0, 0.0]
    answers = [
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],  # student says 1: both own it, teacher 0 comes first
        [nobody, [0.0, 0.5, 0.5]],  # student says 1: teacher 0 has no answer, teacher 1 speaks; a tie gives label 1
        [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],  # student says 2: unowned, falls back to the root's label 2
        [nobody, nobody],  # nobody at either level
    ]
    student = [[0.25, 0.75, 0.0], [0.25, 0.5, 0.25], [0.375, 0.125, 0.5], [1.0, 0.0, 0.0]]
    scopes = [{0, 1}, {1}]
    level = slow.run_level(answers, root, student, assignment="scope", scopes=scopes, rejection="loss_rank", top_k=1)
    assert level.assigned == [0, 1, -1, -1]
    assert level.sources == [(1, 0), (1, 1), (0, 0), None]
    assert level.labels == [1, 1, 2, -1]
    assert (level.num_training, level.num_keep, level.keep_rate) == (3, 3, 1.0)
    assert level.keep == [True, True, True, False]


def test_slow_rejection_by_hand():
    # One teacher, student rows and labels such that rows 1 and 2 agree (top-1) but the lowest losses are rows 0 and 2:
    # row 0: s[label] = 0.4375, not the student's first (0.5625): disagrees, loss -log 0.4375
    # row 1: s[label] = 0.375, the student's first of (0.375, 0.3125, 0.3125): agrees, loss -log 0.375
    # row 2: s[label] = 1: agrees, loss 0
    student = [[0.5625, 0.4375, 0.0], [0.375, 0.3125, 0.3125], [0.0, 1.0, 0.0]]
    answers = [[[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]
    root = slow.run_level(answers)
    by_loss = slow.run_level(answers, root, student, rejection="loss_rank", top_k=1)
    by_set = slow.run_level(answers, root, student, rejection="agreement_set", top_k=1)
    assert by_loss.agrees == [False, True, True] and by_loss.num_keep == 2
    assert by_loss.keep == [True, False, True]
    assert by_set.keep == [False, True, True]
    with pytest.raises(ValueError, match="nothing agrees"):
        slow.run_level(answers[:1], root, student, rejection="loss_rank", top_k=1)
