"""What holds for every input: of sparse labels, pools, assignment, rejection and metrics, searched by hypothesis.

Probabilities are mostly multiples of 1/16, which every precision holds exactly: ties are frequent, and are ties
everywhere.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import slow_method as slow
import torch
from datasets import Dataset

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.method.assignment import (
    AGREEMENT_RULES,
    agreement_scores,
    assign_by_chance,
    assign_by_domain,
    assign_by_scope,
    choose_lowest,
    fall_back,
)
from hf_cosupervise.method.metrics import (
    accuracy,
    deception_score,
    expected_calibration_error,
    group_accuracies,
    mean_and_spread,
    oracle_selection,
    performance_gap_recovered,
    reliability_curve,
)
from hf_cosupervise.method.neighbors import mean_over_neighbors
from hf_cosupervise.method.rejection import (
    SELECTION_RULES,
    in_top_k,
    select_by_loss_rank,
    select_consistent,
    vote_entropy,
)
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.pool.top_k import check_top_k, decode_top_k, dropped_mass, encode_top_k, label_dtype, scale_top_k

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402 - the test extra
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.core

FEW = settings(
    deadline=None, derandomize=True, database=None, max_examples=20, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=60)
DOMAINS = ("day", "dusk", "night")
Rows = list[list[float]]


# ── what is drawn ───────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def rows(draw: st.DrawFn, num_labels: int, *, missing: bool = True) -> list[float]:
    """Sixteen sixteenths among the labels, or one label, or evenly, or nothing."""
    kind = draw(st.sampled_from(["any", "any", "one-hot", "even", *["missing"] * missing]))
    if kind == "missing":
        return [0.0] * num_labels
    if kind == "even" and 16 % num_labels == 0:
        return [1 / num_labels] * num_labels
    num_balls = 1 if kind == "one-hot" else 16
    found = [0.0] * num_labels
    for label in draw(st.lists(st.integers(0, num_labels - 1), min_size=num_balls, max_size=num_balls)):
        found[label] += 1 / num_balls
    return found


@st.composite
def level_cases(draw: st.DrawFn) -> dict[str, object]:
    """A student and the answers of a level's teachers; the same teacher may be there twice."""
    num_labels, num_teachers, num_examples = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    answers = [[draw(rows(num_labels)) for _ in range(num_teachers)] for _ in range(num_examples)]
    if num_teachers > 1 and draw(st.booleans()):
        for row in answers:
            row[1] = list(row[0])
    student = [draw(rows(num_labels, missing=False)) for _ in range(num_examples)]
    order = draw(st.permutations(range(num_examples)))
    return {"labels": num_labels, "teachers": num_teachers, "answers": answers, "student": student, "order": order}


def tensors(case: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the student, probabilities of the teachers, and who answered."""
    teachers = torch.tensor(case["answers"], dtype=torch.float32)
    return torch.tensor(case["student"], dtype=torch.float32).log(), teachers, teachers.any(dim=2)


def assert_only_who_answered(assigned: torch.Tensor, answered: torch.Tensor) -> None:
    for row, teacher in enumerate(assigned.tolist()):
        assert -1 <= teacher < answered.shape[1]
        assert teacher == -1 or bool(answered[row, teacher])


# ── sparse labels ───────────────────────────────────────────────────────────────────────────────────────────────────


@MANY
@given(st.data())
def test_top_k_keeps_the_first_labels_and_all_of_the_mass(data):
    num_labels = data.draw(st.integers(1, 20))
    probs = data.draw(st.lists(rows(num_labels), min_size=1, max_size=5))
    k = data.draw(st.one_of(st.just(1), st.just(num_labels), st.integers(1, num_labels)))
    label_ids, stored = encode_top_k(np.array(probs), k)
    check_top_k(label_ids, stored, num_labels, "t")
    assert label_ids.dtype == label_dtype(num_labels) and stored.dtype == np.float16
    decoded = decode_top_k(label_ids, stored, num_labels)
    lost = 0.0
    for row, ids, kept, full in zip(probs, label_ids.tolist(), stored.tolist(), decoded):
        if not slow.has_answer(row):
            assert not any(ids) and not any(kept) and not full.any()
            continue
        assert (ids, kept) == slow.encode_row(row, k)  # ties to the lowest
        assert sum(kept) <= 1 and full.sum() == pytest.approx(1, abs=1e-6) and (full >= 0).all()
        assert int(full.argmax()) == slow.argmax(row)
        others = [label for label in range(num_labels) if label not in ids]
        if others:
            assert len({float(full[label]) for label in others}) == 1 and full[others[0]] <= full[ids].min()
        else:
            assert full.tolist() == row
        lost += 1 - sum(kept)
    assert dropped_mass(np.array(probs), label_ids) == pytest.approx(lost, abs=1e-6)


@MANY
@given(st.data())
def test_any_distribution_can_be_stored_and_read(data):
    # any weights, from nothing over what half precision cannot tell from nothing to sure
    weight = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1e-30, 2.0**-24, 2.0**-25, 6e-8, 5e-5, 1.0])
    weights = np.array(data.draw(st.lists(weight, min_size=2, max_size=40)), dtype=np.float64)
    probs = (weights / weights.sum() if weights.sum() > 0 else weights * 0)[None]
    k = data.draw(st.integers(1, probs.shape[1]))
    label_ids, stored = encode_top_k(probs, k)
    check_top_k(label_ids, stored, probs.shape[1], "t")
    scaled, rest = scale_top_k(stored, probs.shape[1])
    if not probs.any():
        assert not scaled.any() and not rest.any()
        return
    assert scaled.sum() + (probs.shape[1] - k) * rest[0] == pytest.approx(1, abs=1e-4)
    assert (np.diff(scaled) <= 0).all() and 0 <= rest[0] <= scaled[0, -1]
    kept = np.abs(stored[0].astype(np.float64) - probs[0, label_ids[0]])
    assert (kept <= np.maximum(probs[0, label_ids[0]] * 2**-10, 2.0**-24)).all()
    # nobody who was left out was clearly above one who was kept
    others = np.delete(probs[0], label_ids[0].astype(int))
    assert not others.size or others.max() <= probs[0, label_ids[0]].min() * (1 + 2**-9) + 2.0**-24


# ── pools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def pools(draw: st.DrawFn) -> PseudolabelPool:
    """A root and one to three teachers below it, that keep some or all labels."""
    num_labels, num_below, num_examples = draw(st.integers(2, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    teachers = [Teacher("t/root"), *(Teacher(f"t/below-{index}", level=1) for index in range(num_below))]
    hierarchy = TeacherHierarchy([f"label {index}" for index in range(num_labels)], teachers)
    numbers = draw(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=num_examples, max_size=num_examples, unique=True)
    )
    ids = draw(st.sampled_from([numbers, [f"é {number}" for number in numbers]]))
    inputs = {"text": [f"text {row}" for row in range(num_examples)]}
    if draw(st.booleans()):
        inputs["oracle_label"] = [row % num_labels for row in range(num_examples)]
    return PseudolabelPool.from_predictions(
        hierarchy,
        ids,
        {name: np.array([draw(rows(num_labels)) for _ in range(num_examples)]) for name in hierarchy.names},
        inputs=Dataset.from_dict(inputs) if draw(st.booleans()) else None,
        pool_k=draw(st.integers(1, num_labels)),
    )


def say(pool: PseudolabelPool) -> list[object]:
    """Everything that a pool says, as plain values."""
    said: list[object] = [pool.ids.tolist(), pool.labels, pool.hierarchy.to_dict(), pool.facts]
    said += [part.tolist() for name in pool.hierarchy.names for part in (pool.label_ids(name), pool.label_probs(name))]
    said.append(None if pool.inputs is None else pool.inputs.to_dict())
    return [*said, None if pool.oracle_labels is None else pool.oracle_labels.tolist()]


@FEW
@given(pools())
def test_a_pool_comes_back_from_disk_as_it_was(pool):
    with tempfile.TemporaryDirectory() as folder:
        pool.save(Path(folder, "pool"))
        again = PseudolabelPool.load(Path(folder, "pool"), verify=True)
        assert say(again) == say(pool)
        again.save(Path(folder, "again"))
        assert say(PseudolabelPool.load(Path(folder, "again"), verify=True)) == say(pool)


@FEW
@given(pools(), st.data())
def test_a_part_of_a_pool_says_what_the_whole_says(pool, data):
    chosen = np.array(data.draw(st.lists(st.integers(0, len(pool) - 1), unique=True)), dtype=np.int64)
    part = pool.select(chosen)
    assert len(part) == len(chosen) and part.ids.tolist() == pool.ids[chosen].tolist()
    for name in pool.hierarchy.names:
        np.testing.assert_array_equal(part.decode(name), pool.decode(name)[chosen])
        np.testing.assert_array_equal(part.hard_labels(name), pool.hard_labels(name, chosen))
    if len(chosen):
        again = part.select(np.argsort(chosen))
        np.testing.assert_array_equal(again.ids, pool.ids[np.sort(chosen)])
    with tempfile.TemporaryDirectory() as folder:
        part.save(Path(folder, "pool"))
        assert say(PseudolabelPool.load(Path(folder, "pool"), verify=True)) == say(part)


@FEW
@given(pools(), st.data())
def test_who_speaks_is_who_is_read(pool, data):
    num_teachers = len(pool.hierarchy.names)
    size = data.draw(st.integers(0, 12))
    sources = np.array(data.draw(st.lists(st.integers(-1, num_teachers - 1), min_size=size, max_size=size)), dtype=int)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=size, max_size=size)), dtype=int)
    label_ids, probs = pool.gather(sources, chosen)
    full = pool.pseudolabels(sources, chosen)
    ids, kept, rest = pool.sparse_pseudolabels(sources, chosen)
    for place, (source, row) in enumerate(zip(sources.tolist(), chosen.tolist())):
        if source == -1:
            assert not probs[place].any() and not full[place].any()
            continue
        name = pool.hierarchy.names[source]
        assert label_ids[place].tolist() == pool.label_ids(name)[row].tolist()
        assert probs[place].tolist() == pool.label_probs(name)[row].tolist()
        assert full[place].tolist() == pool.decode(name)[row].tolist()
        if full[place].any():
            assert full[place, ids[place]].tolist() == kept[place].tolist()
            assert set(np.delete(full[place], ids[place]).tolist()) <= {float(rest[place])}


@FEW
@given(pools(), st.data())
def test_fewer_teachers_or_other_levels_change_no_label(pool, data):
    names = data.draw(st.lists(st.sampled_from(pool.hierarchy.names), min_size=1, unique=True))
    other = pool.with_hierarchy(
        TeacherHierarchy(pool.labels, [Teacher(f"t/{name}", level=level) for level, name in enumerate(names)])
    )
    assert other.hierarchy.names == tuple(names) and other.ids.tolist() == pool.ids.tolist()
    for name in names:
        assert np.shares_memory(other.label_ids(name), pool.label_ids(name))
        np.testing.assert_array_equal(other.decode(name), pool.decode(name))
    with pytest.raises(ValueError, match="got none of"):
        other.with_hierarchy(TeacherHierarchy(pool.labels, [Teacher("t/nobody")]))


# ── assignment ──────────────────────────────────────────────────────────────────────────────────────────────────────


@MANY
@given(level_cases(), st.data())
def test_scope(case, data):
    scopes = [
        data.draw(st.sets(st.integers(0, case["labels"] - 1), min_size=1) | st.none()) for _ in range(case["teachers"])
    ]
    _, _, answered = tensors(case)
    mask = torch.tensor([[scope is None or label in scope for label in range(case["labels"])] for scope in scopes])
    labels = [slow.argmax(row) for row in case["student"]]
    assigned = assign_by_scope(torch.tensor(labels), mask, answered)
    assert assigned.tolist() == [
        slow.assign_by_scope(label, scopes, row) for label, row in zip(labels, case["answers"])
    ]
    assert_only_who_answered(assigned, answered)
    order = case["order"]
    assert assign_by_scope(torch.tensor(labels)[order], mask, answered[order]).tolist() == assigned[order].tolist()


def assign_by_agreement(student, teachers, answered, rule="ce_teacher_student", **options):
    return choose_lowest(agreement_scores(student, teachers, rule, **options), answered)


@pytest.mark.parametrize("rule", AGREEMENT_RULES)
@MANY
@given(level_cases())
def test_agreement(rule, case):
    student, teachers, answered = tensors(case)
    assigned = assign_by_agreement(student, teachers, answered, rule)
    assert_only_who_answered(assigned, answered)
    for found, row, answers in zip(assigned.tolist(), case["student"], case["answers"]):
        assert found in slow.agreement_winners(row, answers, rule, tolerance=1e-5)
    order = case["order"]
    assert assign_by_agreement(student[order], teachers[order], answered[order], rule).tolist() == (
        assigned[order].tolist()
    )
    scores = agreement_scores(student, teachers, rule)
    # teachers the other way round get the same scores, and only a tie is decided otherwise
    turned = choose_lowest(agreement_scores(student, teachers.flip(1), rule), answered.flip(1))
    for row, (first, last) in enumerate(zip(assigned.tolist(), turned.tolist())):
        if first == -1:
            assert last == -1
        else:
            back = case["teachers"] - 1 - last
            assert float(scores[row, back]) == pytest.approx(float(scores[row, first]), abs=1e-5)


@MANY
@given(level_cases(), st.data())
def test_missing_answers_may_hold_anything(case, data):
    student, teachers, answered = tensors(case)
    junk = data.draw(st.sampled_from([0.5, 1.0, 5.0]))
    filled = torch.where(answered.unsqueeze(-1), teachers, junk)
    for rule in AGREEMENT_RULES:
        expected = assign_by_agreement(student, teachers, answered, rule)
        assert assign_by_agreement(student, filled, answered, rule).tolist() == expected.tolist()


@MANY
@given(level_cases(), st.data())
def test_neighbors_are_the_slow_mean(case, data):
    student, teachers, answered = tensors(case)
    num_examples, order = len(case["answers"]), case["order"]
    k = data.draw(st.integers(1, 3))
    near = torch.tensor(
        [data.draw(st.lists(st.integers(0, num_examples - 1), min_size=k, max_size=k)) for _ in range(num_examples)]
    )
    scores = agreement_scores(student, teachers, "ce_teacher_student")
    means = mean_over_neighbors(scores, near, answered)
    for row in range(num_examples):
        for teacher in range(case["teachers"]):
            here = [other for other in (row, *near[row].tolist()) if answered[other, teacher]]
            wanted = sum(float(scores[other, teacher]) for other in here) / len(here) if here else math.inf
            assert float(means[row, teacher]) == pytest.approx(wanted, rel=1e-5)
    assert_only_who_answered(choose_lowest(means, answered), answered)
    # rows in another order, with their neighbours renumbered: the same means in that order
    place = torch.argsort(torch.tensor(order))
    moved = mean_over_neighbors(scores[order], place[near[order]], answered[order])
    torch.testing.assert_close(moved, means[order])


@MANY
@given(level_cases(), st.integers(0, 2**31))
def test_chance(case, seed):
    _, _, answered = tensors(case)
    assigned = assign_by_chance(answered, torch.Generator().manual_seed(seed))
    assert_only_who_answered(assigned, answered)
    assert ((assigned == -1) == ~answered.any(dim=1)).all()
    assert assign_by_chance(answered, torch.Generator().manual_seed(seed)).tolist() == assigned.tolist()


@MANY
@given(level_cases(), st.data())
def test_domain(case, data):
    own = st.sets(st.sampled_from(DOMAINS), min_size=1) | st.none()
    domains = [data.draw(own) for _ in range(case["teachers"])]
    examples = [data.draw(st.sampled_from((*DOMAINS, "", "unheard of"))) for _ in case["answers"]]
    _, _, answered = tensors(case)
    lists = [None if names is None else sorted(names) for names in domains]
    assigned = assign_by_domain(examples, lists, answered)
    assert assigned.tolist() == [
        slow.assign_by_domain(name, domains, row) for name, row in zip(examples, case["answers"])
    ]
    assert_only_who_answered(assigned, answered)
    order = case["order"]
    moved = assign_by_domain([examples[row] for row in order], lists, answered[order])
    assert moved.tolist() == assigned[order].tolist()


@MANY
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=8))
def test_falling_back_fills_gaps_only(pairs):
    own, above = (torch.tensor(values) for values in zip(*pairs))
    assert fall_back(own, above).tolist() == [first if first != -1 else second for first, second in pairs]


# ── rejection ───────────────────────────────────────────────────────────────────────────────────────────────────────

LOSSES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf]), min_size=1, max_size=12)


@MANY
@given(st.data())
def test_top_k_agreement_grows_with_k(data):
    num_labels = data.draw(st.integers(2, 6))
    probs = data.draw(st.lists(rows(num_labels, missing=False), min_size=1, max_size=8))
    labels = [data.draw(st.integers(0, num_labels - 1)) for _ in probs]
    before = torch.zeros(len(probs), dtype=torch.bool)
    order = data.draw(st.permutations(range(len(probs))))
    for k in range(1, num_labels + 2):
        inside = in_top_k(torch.tensor(probs), torch.tensor(labels), k)
        assert inside.tolist() == [slow.in_top_k(row, label, k) for row, label in zip(probs, labels)]
        assert (inside | ~before).all(), "what agrees at k agrees at k + 1"
        moved = in_top_k(torch.tensor(probs)[order], torch.tensor(labels)[order], k)
        assert moved.tolist() == inside[order].tolist()
        before = inside
    assert before.all()


@MANY
@given(LOSSES, st.data())
def test_the_lowest_losses_of_the_candidates_are_kept(losses, data):
    candidates = [data.draw(st.booleans()) for _ in losses]
    values, mask, before = torch.tensor(losses), torch.tensor(candidates), torch.zeros(len(losses), dtype=torch.bool)
    for num_keep in range(sum(candidates) + 1):
        keep = select_by_loss_rank(values, num_keep, mask)
        assert keep.tolist() == slow.keep_lowest(losses, num_keep, candidates)
        assert int(keep.sum()) == num_keep and (mask | ~keep).all() and (keep | ~before).all()
        before = keep


@pytest.mark.parametrize("rule", SELECTION_RULES)
@MANY
@given(LOSSES, st.data())
def test_as_many_are_kept_as_agree(rule, losses, data):
    flags = [(data.draw(st.booleans()), data.draw(st.booleans())) for _ in losses]
    agrees, has_label = (torch.tensor(values) for values in zip(*flags))
    keep = select_consistent(torch.tensor(losses), agrees, has_label, rule)
    assert int(keep.sum()) == int((agrees & has_label).sum()) and (has_label | ~keep).all()
    if rule == "agreement_set":
        assert (agrees | ~keep).all()
    if len(set(losses)) == len(losses) or rule == "agreement_set":  # else the row decides ties
        order = data.draw(st.permutations(range(len(losses))))
        moved = select_consistent(torch.tensor(losses)[order], agrees[order], has_label[order], rule)
        assert moved.tolist() == keep[order].tolist()


@MANY
@given(st.integers(2, 5), st.data())
def test_vote_entropy_does_not_care_who_says_what(num_labels, data):
    labels = data.draw(st.lists(st.integers(-1, num_labels - 1), min_size=1, max_size=6))
    found = float(vote_entropy(torch.tensor([labels]), num_labels)[0])
    assert -1e-6 <= found <= math.log(num_labels) + 1e-6
    assert (abs(found) < 1e-6) == (len({label for label in labels if label >= 0}) <= 1)
    turned = data.draw(st.permutations(labels))
    renamed = [label if label < 0 else num_labels - 1 - label for label in labels]
    for others in (turned, renamed):
        assert float(vote_entropy(torch.tensor([others]), num_labels)[0]) == pytest.approx(found, abs=1e-6)


# ── metrics ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SHARES = st.integers(0, 64).map(lambda number: number / 64)


@MANY
@given(SHARES, SHARES, SHARES)
def test_performance_gap_recovered(weak, student, ceiling):
    found = performance_gap_recovered(weak, student, ceiling)
    wanted = slow.performance_gap_recovered(weak, student, ceiling)
    assert found == wanted or math.isnan(found) and math.isnan(wanted)
    if ceiling > weak:
        assert performance_gap_recovered(weak, weak, ceiling) == 0 and (
            performance_gap_recovered(weak, ceiling, ceiling) == 1
        )
        assert (0 <= found <= 1) == (weak <= student <= ceiling)
        # the same on another scale, such as per cent
        assert performance_gap_recovered(100 * weak, 100 * student, 100 * ceiling) == pytest.approx(found)


@MANY
@given(st.data())
def test_calibration_error_lies_between_0_and_1(data):
    num_labels = data.draw(st.integers(2, 5))
    probs = np.array(data.draw(st.lists(rows(num_labels, missing=False), min_size=1, max_size=10)))
    labels = np.array([data.draw(st.integers(0, num_labels - 1)) for _ in probs])
    num_bins = data.draw(st.integers(1, 20))
    error, curve = expected_calibration_error(probs, labels, num_bins), reliability_curve(probs, labels, num_bins)
    assert 0 <= error <= 1 and curve["count"].sum() == len(probs)
    right = accuracy(probs.argmax(axis=1), labels)
    assert np.nansum(curve["accuracy"] * curve["count"]) / len(probs) == pytest.approx(right)
    assert error >= abs(probs.max(axis=1).mean() - right) - 1e-9  # one bin is the least there is
    assert expected_calibration_error(probs, labels, 1) == pytest.approx(abs(probs.max(axis=1).mean() - right))
    order = data.draw(st.permutations(range(len(probs))))
    assert expected_calibration_error(probs[order], labels[order], num_bins) == pytest.approx(error)


@MANY
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 2), st.sampled_from("xyz")), min_size=1, max_size=12))
def test_the_worst_group_is_no_better_than_all(examples):
    predictions, labels, groups = (np.array(values) for values in zip(*examples))
    by_group, whole = group_accuracies(predictions, labels, groups), accuracy(predictions, labels)
    assert min(by_group.values()) <= whole + 1e-12 and set(by_group) == set(groups.tolist())
    counts = {name: int((groups == name).sum()) for name in by_group}
    assert sum(by_group[name] * counts[name] for name in by_group) / len(examples) == pytest.approx(whole)


@MANY
@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_selection_by_counting(examples):
    keep, labels, gold = (np.array(values) for values in zip(*examples))
    found = oracle_selection(keep, labels, gold)
    kept = [label == right for taken, label, right in examples if taken and label >= 0]
    right = [taken for taken, label, right in examples if label == right]
    for name, values in (("precision", kept), ("recall", right)):
        assert found[name] == pytest.approx(sum(values) / len(values)) if values else math.isnan(found[name])


@MANY
@given(st.data())
def test_deception_grows_with_what_the_teacher_does_not_know(data):
    num_examples = data.draw(st.integers(1, 8))
    draw = st.lists(rows(3), min_size=num_examples, max_size=num_examples)
    teacher, ceiling = np.array(data.draw(draw)), np.array(data.draw(draw))
    student, labels = (np.array([data.draw(st.integers(0, 2)) for _ in range(num_examples)]) for _ in range(2))
    found = deception_score(student, teacher, ceiling, labels)
    if (student == labels).all():
        assert math.isnan(found)
    else:
        assert 0 <= found <= deception_score(student, np.zeros_like(teacher), ceiling, labels) <= 1
        assert deception_score(student, ceiling, ceiling, labels) == 0


@MANY
@given(st.lists(st.none() | st.just(math.nan) | st.floats(-2, 2), max_size=6))
def test_mean_and_spread(values):
    mean, spread = mean_and_spread(values)
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        assert math.isnan(mean) and math.isnan(spread)
    else:
        assert min(known) - 1e-9 <= mean <= max(known) + 1e-9 and 0 <= spread <= 4 and (spread == 0 or len(known) > 1)
