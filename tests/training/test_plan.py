"""Whole hierarchies through `plan_level` against `slow_method.py`, row by row; then chunks, processes, errors.

Probabilities are multiples of 1/16: exact in half precision, so that what the pool stores is what was drawn, and a tie
is a tie on both sides. The student's logarithms come from a table, so that equal probabilities have equal logarithms.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import slow_method as slow
import torch
from datasets import Dataset

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.method.assignment import AGREEMENT_RULES
from hf_cosupervise.pool.files import teacher_dataset
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.pool.top_k import encode_top_k
from hf_cosupervise.processes import CHUNK_ROWS, row_chunks
from hf_cosupervise.training.config import CoSupervisedConfig
from hf_cosupervise.training.plan import LevelPlan, plan_level
from hf_cosupervise.training.plan_rules import level_assignment

DOMAINS = ("day", "dusk", "night")
LOGS = np.array([-np.inf, *np.log(np.arange(1, 17) / 16)], dtype=np.float32)
ASSIGNMENTS = (
    "scope",
    *(f"agreement:{rule}" for rule in AGREEMENT_RULES),
    "metadata",
    "ensemble",
    "oracle_scope",
    "oracle_domain",
    "oracle_loss",
)
# name: (`rejection`, `rejection_rule`, slow rejection, slow local-global rules)
REJECTIONS = {
    "none": (["none"], "loss_rank", "none", ()),
    "loss_rank": (["top_k"], "loss_rank", "loss_rank", ()),
    "agreement_set": (["top_k"], "agreement_set", "agreement_set", ()),
    "parent_topk": (["parent_topk"], "loss_rank", "none", ("parent_topk",)),
    "parent_confident": (["parent_confident"], "loss_rank", "none", ("parent_confident",)),
    "top_k+parent_topk": (["top_k", "parent_topk"], "loss_rank", "loss_rank", ("parent_topk",)),
    "everything": (
        ["parent_confident", "top_k", "parent_topk"],
        "agreement_set",
        "agreement_set",
        ("parent_topk", "parent_confident"),
    ),
}
CASES = [
    (num_labels, num_teachers, seed) for num_labels in (2, 3, 5) for num_teachers in (1, 2, 3) for seed in range(3)
]


@pytest.fixture(scope="module")
def base_args(tmp_path_factory: pytest.TempPathFactory) -> CoSupervisedConfig:
    return CoSupervisedConfig(output_dir=str(tmp_path_factory.mktemp("levels")), use_cpu=True, metadata_column="place")


def change(args: CoSupervisedConfig, **values: object) -> CoSupervisedConfig:
    """A copy with other values; the checks of the configuration have tests of their own."""
    changed = copy.copy(args)
    for name, value in values.items():
        assert hasattr(changed, name), name
        setattr(changed, name, value)
    return changed


# ── random hierarchies ──────────────────────────────────────────────────────────────────────────────────────────────


def draw_rows(rng: np.random.Generator, shape: tuple[int, ...], num_labels: int) -> np.ndarray:
    """Rows of multiples of 1/16 that sum to 1; about one in six is one-hot."""
    rows = rng.multinomial(16, np.full(num_labels, 1 / num_labels), size=shape) / 16
    one_hot = np.eye(num_labels)[rng.integers(num_labels, size=shape)]
    return np.where(rng.random(shape)[..., None] < 1 / 6, one_hot, rows)


def log_probs_of(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(LOGS[np.rint(16 * rows).astype(int)])


def cut(log_probs: torch.Tensor, bounds: Iterable[int] = ()) -> list[tuple[slice, torch.Tensor]]:
    """Cut rows into consecutive chunks at these positions."""
    edges = [0, *sorted(bounds), len(log_probs)]
    return [(slice(low, high), log_probs[low:high]) for low, high in zip(edges, edges[1:]) if high > low]


@dataclass
class Tree:
    """A pool of several levels beside the same answers as plain lists, and a student for each level but the root."""

    pool: PseudolabelPool
    answers: list[list[list[list[float]]]]  # level, example, teacher, label
    scopes: list[list[set[int] | None]]
    domains: list[list[set[str] | None]]
    students: list[np.ndarray]
    places: list[str]
    gold: list[int]
    offsets: list[int]

    def position(self, source: slow.Source | None) -> int:
        """Where a source of the slow version stands in `pool.source_names`."""
        if source is None:
            return -1
        level, who = source
        if who != "mean":
            return self.offsets[level] + int(who)
        # a level of one teacher has no ensemble but that teacher
        return self.offsets[level] if len(self.scopes[level]) == 1 else self.offsets[-1] + level


@functools.cache
def draw_tree(
    num_labels: int, num_teachers: int, seed: int, num_examples: int = 12, pool_k: int | None = None
) -> Tree:
    rng = np.random.default_rng([seed, num_labels, num_teachers, num_examples])
    sizes = [1 + seed % 2, num_teachers, *([2] if seed % 3 else [])]
    labels = [f"l{label}" for label in range(num_labels)]
    teachers, predictions, answers, scopes, domains = [], {}, [], [], []
    for level, size in enumerate(sizes):
        probs = draw_rows(rng, (num_examples, size), num_labels)
        probs[rng.random((num_examples, size)) < 0.25] = 0.0
        if level:
            probs[rng.random(num_examples) < 0.15] = 0.0
        if size > 1 and seed % 3 == 0:
            probs[:, -1] = probs[:, 0]  # an exact tie that the first teacher must win
        answers.append(probs.tolist())
        scopes.append([])
        domains.append([])
        for k in range(size):
            # unequal and overlapping scopes, unowned labels, and now and then a teacher of everything
            scope = {int(label) for label in np.flatnonzero(rng.random(num_labels) < 0.5)} or {num_labels - 1}
            domain = {str(name) for name in np.array(DOMAINS)[rng.random(3) < 0.5]} or {"day"}
            everything = level == 0 or (k == size - 1 and seed == 1)
            scopes[-1].append(None if everything else scope)
            domains[-1].append(None if everything else domain)
            name = f"t{level}-{k}"
            teachers.append(
                Teacher(
                    f"org/{name}",
                    level=level,
                    scope=None if everything else [labels[label] for label in sorted(scope)],
                    domains=None if everything else sorted(domain),
                )
            )
            predictions[name] = probs[:, k]
    places = [str(name) for name in rng.choice(DOMAINS, size=num_examples)]
    gold = rng.integers(num_labels, size=num_examples).tolist()
    inputs = Dataset.from_dict({"place": places, "oracle_domain": places, "oracle_label": gold})
    ids = [f"row-{row}" for row in range(num_examples)]
    hierarchy = TeacherHierarchy(labels, teachers)
    pool = PseudolabelPool.from_predictions(hierarchy, ids, predictions, inputs=inputs, pool_k=pool_k)
    students = [draw_rows(rng, (num_examples,), num_labels) for _ in sizes]
    offsets = np.cumsum([0, *sizes]).tolist()
    return Tree(pool, answers, scopes, domains, students, places, gold, offsets)


def slow_level(
    tree: Tree,
    level: int,
    assignment: str,
    parent: slow.Level | None,
    rejection: str,
    rules: tuple[str, ...],
    k: int,
    *,
    domains: list[set[str] | None] | None = None,
    places: list[str] | None = None,
) -> slow.Level:
    levels = [
        slow.run_level(
            tree.answers[level],
            parent,
            tree.students[level].tolist() if parent is not None else None,
            assignment=assignment,
            rejection=rejection,
            top_k=k,
            local_global=rule,
            scopes=tree.scopes[level],
            domains=tree.domains[level] if domains is None else domains,
            example_domains=tree.places if places is None else places,
            gold=tree.gold,
        )
        for rule in rules or ("none",)
    ]
    levels[0].keep = [all(keep) for keep in zip(*(found.keep for found in levels))]
    return levels[0]


def expected_level(
    tree: Tree, level: int, assignment: str, parent: slow.Level, plan: LevelPlan | None, *options: object
) -> slow.Level | None:
    """What the slow version says, `None` where nothing is left to train on.

    Agreement compares sums of floats, so a near tie may go either way: any of the near winners is right, and the slow
    version then goes on with the one that was found.
    """
    try:
        if not assignment.startswith("agreement:") or plan is None:
            found = slow_level(tree, level, assignment, parent, *options)
        else:
            size, chosen = len(tree.scopes[level]), plan.assigned_teacher - tree.offsets[level]
            chosen = np.where((chosen >= 0) & (chosen < size), chosen, -1).tolist()
            students, rule = tree.students[level].tolist(), assignment.split(":")[1]
            for row, (student, answers) in enumerate(zip(students, tree.answers[level])):
                allowed = slow.agreement_winners(student, answers, rule, tolerance=1e-5)
                assert chosen[row] in allowed, (row, student, answers)
            names = [str(position) for position in chosen]
            domains = [{str(position)} for position in range(size)]
            found = slow_level(tree, level, "metadata", parent, *options, domains=domains, places=names)
    except ValueError:
        return None
    return found if any(found.keep) else None


def check_plan(tree: Tree, plan: LevelPlan, expected: slow.Level, where: object) -> None:
    assert plan.assigned_teacher.tolist() == [tree.position(source) for source in expected.sources], where
    assert plan.labels.tolist() == expected.labels, where
    assert plan.keep_mask.tolist() == expected.keep, where
    assert plan.keep_mask.dtype == bool
    assert plan.keep_rate == sum(expected.keep) / expected.num_training, where


def check_tree(
    tree: Tree, args: CoSupervisedConfig, assignment: str, rejection: str, k: int | None, bounds: Iterable[int] = ()
) -> int:
    """Go down one tree, comparing each level. Gives the number of levels below the root that were compared."""
    names, rule, slow_rejection, slow_rules = REJECTIONS[rejection]
    method, _, agreement_rule = assignment.partition(":")
    num_levels = tree.pool.hierarchy.num_levels
    several = len(tree.scopes[0]) > 1
    args = change(
        args,
        # one name for all levels where the root needs no other
        assignment=["ensemble", *[method] * (num_levels - 1)] if several else [method],
        agreement_rule=agreement_rule or args.agreement_rule,
        rejection=names,
        rejection_rule=rule,
        rejection_k=k,
    )
    k = k or min(3, tree.pool.hierarchy.num_labels - 1)
    expected = slow_level(tree, 0, "ensemble" if several else "only", None, "none", (), k)
    plan = plan_level(tree.pool, 0, args, np.full(len(tree.pool), -1))
    check_plan(tree, plan, expected, (0, "root"))
    for level in range(1, num_levels):
        chunks = cut(log_probs_of(tree.students[level]), bounds)
        try:
            plan = plan_level(tree.pool, level, args, plan.assigned_teacher, chunks)
        except ValueError as error:
            assert "must keep at least one example" in str(error)
            assert expected_level(tree, level, assignment, expected, None, slow_rejection, slow_rules, k) is None
            return level - 1
        expected = expected_level(tree, level, assignment, expected, plan, slow_rejection, slow_rules, k)
        assert expected is not None, (level, "kept rows although nothing is left")
        check_plan(tree, plan, expected, (level, assignment, rejection))
    return num_levels - 1


@pytest.mark.parametrize("rejection", REJECTIONS)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_whole_hierarchies(assignment, rejection, base_args):
    num_compared = 0
    for num_labels, num_teachers, seed in CASES:
        tree = draw_tree(num_labels, num_teachers, seed)
        k = None if seed == 0 else 1 + (seed + num_teachers) % (num_labels - 1)
        num_compared += check_tree(tree, base_args, assignment, rejection, k, bounds=(seed, 5))
    # 9 shapes, one tree of two levels and two of three levels each: 45 levels below the root; a few keep nothing
    assert num_compared >= 40


@pytest.mark.parametrize("assignment", ["scope", "metadata", "oracle_scope"])
@pytest.mark.parametrize("rejection", ["loss_rank", "top_k+parent_topk"])
def test_pool_that_stores_fewer_labels_than_there_are(assignment, rejection, base_args):
    # The slow version sees what its own storage gives back. What was not stored is a third of a sixteenth and no
    # longer exact, so nothing here compares one teacher's probability with another's.
    num_compared = 0
    for seed in range(6):
        tree = copy.copy(draw_tree(5, 3, seed, pool_k=2))
        stored = [
            [[slow.decode_row(*slow.encode_row(row, 2), 5) for row in rows] for rows in level]
            for level in tree.answers
        ]
        assert stored != tree.answers
        tree.answers = stored
        num_compared += check_tree(tree, base_args, assignment, rejection, 2)
    assert num_compared >= 8


# ── by hand ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture()
def small_pool() -> PseudolabelPool:
    """Six rows, three labels; a root, and two specialists of labels {a, b} and {c}."""
    a, b, c, nobody = [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 0]
    hierarchy = TeacherHierarchy(
        ["a", "b", "c"],
        [Teacher("t/root"), Teacher("t/ab", level=1, scope=["a", "b"]), Teacher("t/c", level=1, scope=["c"])],
    )
    predictions = {
        "root": np.array([a, a, b, c, nobody, nobody]),
        "ab": np.array([a, b, [0.5, 0.25, 0.25], a, nobody, nobody]),
        "c": np.array([c, c, c, nobody, [0.25, 0.25, 0.5], nobody]),
    }
    inputs = Dataset.from_dict({"text": list("uvwxyz"), "oracle_label": [0, 1, 1, 2, 2, 0]})
    return PseudolabelPool.from_predictions(hierarchy, range(6), predictions, inputs=inputs)


# what the student says of those rows: a, b, a, c, c, a
SMALL_STUDENT = np.array([[8, 4, 4], [0, 16, 0], [12, 2, 2], [1, 2, 13], [5, 5, 6], [16, 0, 0]]) / 16


def test_level_by_hand(small_pool, base_args):
    args = change(base_args, assignment=["scope"], rejection=["top_k"], rejection_k=1)
    root = plan_level(small_pool, 0, args, np.full(6, -1))
    assert small_pool.source_names == ("root", "ab", "c", "ensemble-0", "ensemble-1")
    assert root.assigned_teacher.tolist() == [0, 0, 0, 0, -1, -1]
    assert root.labels.tolist() == [0, 0, 1, 2, -1, -1]
    assert root.keep_mask.tolist() == [True] * 4 + [False] * 2 and root.keep_rate == 1.0
    plan = plan_level(small_pool, 1, args, root.assigned_teacher, cut(log_probs_of(SMALL_STUDENT)))
    # row 3: "c" owns the label but has no answer, so the root speaks; row 5: nobody has ever answered
    assert plan.assigned_teacher.tolist() == [1, 1, 1, 0, 2, -1]
    assert plan.labels.tolist() == [0, 1, 0, 2, 2, -1]
    # every label is the student's own first: five agreements of five
    assert plan.keep_mask.tolist() == [True] * 5 + [False] and plan.keep_rate == 1.0
    assert (plan.level, plan.round) == (1, 0)


def test_numbers_by_hand(small_pool, base_args):
    args = change(base_args, assignment=["scope"], rejection=["top_k"], rejection_k=1)
    root = plan_level(small_pool, 0, args, np.full(6, -1))
    # Of the root's labels a, a, b, c the truth is a, b, b, c: three of four right; all four are kept.
    assert root.metrics == {
        "assignment/root": 1.0,
        "consistency/keep_rate": 1.0,
        "consistency/num_kept": 4.0,
        "oracle_selection/precision": 0.75,
        "oracle_selection/recall": 1.0,
        "oracle_pseudolabels/accuracy": 0.75,
    }
    # The student now says b of row 0, still in the scope of "ab", whose label is a: one disagreement. Of the losses
    # -log of 4/16, 16/16, 12/16, 13/16 and 6/16, the four lowest are kept: all but row 0.
    student = SMALL_STUDENT.copy()
    student[0] = np.array([4, 8, 4]) / 16
    plan = plan_level(small_pool, 1, args, root.assigned_teacher, cut(log_probs_of(student)), round=3)
    assert plan.round == 3
    assert plan.labels.tolist() == [0, 1, 0, 2, 2, -1]
    assert plan.keep_mask.tolist() == [False, True, True, True, True, False]
    # Truth a, b, b, c, c: labels a, b, a, c, c are right on 4 of 5; of the four kept, 3 are right, of the four right
    # ones 3 are kept. Own teachers spoke for rows 0, 1, 2 ("ab": truths a, b, b, all in scope) and 4 ("c": c).
    assert plan.metrics == {
        "assignment/root": 0.2,
        "assignment/ab": 0.6,
        "assignment/c": 0.2,
        "assignment/agreement": 0.8,
        "consistency/keep_rate": 0.8,
        "consistency/num_kept": 4.0,
        "consistency/top_k_agreement": 0.8,
        "oracle_selection/precision": 0.75,
        "oracle_selection/recall": 0.75,
        "oracle_pseudolabels/accuracy": 0.8,
        "oracle_assignment/accuracy": 1.0,
    }


def test_assignment_accuracy_counts_the_true_scope(small_pool, base_args):
    # the student says c of every row, so "c" speaks for rows 0, 1, 2 and 4, whose truths are a, b, b and c: 1 of 4
    args = change(base_args, assignment=["scope"], rejection=["none"])
    student = np.tile(np.array([0, 0, 16]) / 16, (6, 1))
    plan = plan_level(small_pool, 1, args, np.array([0, 0, 0, 0, -1, -1]), cut(log_probs_of(student)))
    assert plan.assigned_teacher.tolist() == [2, 2, 2, 0, 2, -1]
    assert plan.metrics["oracle_assignment/accuracy"] == 0.25
    # a teacher of this level that nobody asked is told of too
    assert plan.metrics["assignment/ab"] == 0.0


def test_ensemble_has_a_name_of_its_own(small_pool, base_args):
    args = change(base_args, assignment=["ensemble"], rejection=["none"])
    plan = plan_level(small_pool, 1, args, np.full(6, -1), cut(log_probs_of(SMALL_STUDENT)))
    assert plan.assigned_teacher.tolist() == [4] * 5 + [-1]  # "ensemble-1"
    # row 0: a and c tie at 1/2 each, the lowest label wins; row 2: c has (1/4 + 1) / 2
    assert plan.labels.tolist() == [0, 1, 2, 0, 2, -1]
    assert plan.metrics["assignment/ensemble-1"] == 1.0
    assert [key for key in plan.metrics if key.startswith("assignment/")] == [
        "assignment/ensemble-1",
        "assignment/agreement",
    ]


def test_rejections_do_not_accumulate(small_pool, base_args):
    # row 0 was rejected before: the level below starts from all rows again
    args = change(base_args, assignment=["scope"], rejection=["none"])
    root = plan_level(small_pool, 0, args, np.full(6, -1))
    root.keep_mask[:] = False
    plan = plan_level(small_pool, 1, args, root.assigned_teacher, cut(log_probs_of(SMALL_STUDENT)))
    assert plan.keep_mask.tolist() == [True] * 5 + [False]


def test_keep_count_is_an_integer_count(base_args):
    # With n = 49 rows of which m = 1 agrees, n * (m / n) in floats is 0.9999…: the count must still be 1.
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/root"), Teacher("t/one", level=1)])
    rows = np.tile([1.0, 0.0], (49, 1))
    pool = PseudolabelPool.from_predictions(hierarchy, range(49), {"root": rows, "one": rows})
    student = np.tile(np.array([4, 12]) / 16, (49, 1))
    args = change(base_args, assignment=["agreement"], rejection=["top_k"])
    for num_agree in range(1, 50):
        student[num_agree - 1] = np.array([12, 4]) / 16
        plan = plan_level(pool, 1, args, np.zeros(49, dtype=int), cut(log_probs_of(student)))
        assert plan.keep_mask.tolist() == [True] * num_agree + [False] * (49 - num_agree)


def test_level_assignment(base_args):
    levels = [
        [Teacher("a"), Teacher("b")],
        [Teacher("c", level=1, scope=["x"]), Teacher("d", level=1, scope=["y"])],
        [Teacher("e", level=2), Teacher("f", level=2)],
        [Teacher("g", level=3)],
        [Teacher("h", level=4, scope=["x"]), Teacher("i", level=4, scope=["x"])],
    ]
    hierarchy = TeacherHierarchy(["x", "y"], [teacher for level in levels for teacher in level])

    def found(assignment: list[str]) -> list[str]:
        return [level_assignment(change(base_args, assignment=assignment), level, hierarchy) for level in range(5)]

    assert found(["agreement"]) == ["agreement"] * 5
    each = ["ensemble", "scope", "agreement", "scope", "agreement"]
    assert found(each) == each
    # what the teachers of a level allow: a root of several speaks together, and equal scopes tell nobody apart
    assert found(["auto"]) == ["ensemble", "scope", "agreement", "scope", "agreement"]
    one = TeacherHierarchy(["x", "y"], [Teacher("a")])
    assert level_assignment(change(base_args, assignment=["auto"]), 0, one) == "scope"


# ── chunks and processes ────────────────────────────────────────────────────────────────────────────────────────────


def same_plan(first: LevelPlan, second: LevelPlan) -> None:
    assert first.assigned_teacher.tolist() == second.assigned_teacher.tolist()
    assert first.labels.tolist() == second.labels.tolist()
    assert first.keep_mask.tolist() == second.keep_mask.tolist()
    assert first.metrics == second.metrics


@functools.cache
def long_tree() -> Tree:
    return draw_tree(5, 3, 4, num_examples=2 * CHUNK_ROWS + 100)  # root of one teacher, then three, then two


def test_more_rows_than_one_chunk(base_args):
    # the root itself runs in chunks of 1024 rows, and the student's chunks end elsewhere
    tree = long_tree()
    args = change(base_args, assignment=["scope"], rejection=["top_k"], rejection_k=2)
    expected = slow_level(tree, 0, "only", None, "none", (), 2)
    plan = plan_level(tree.pool, 0, args, np.full(len(tree.pool), -1))
    check_plan(tree, plan, expected, "root")
    expected = slow_level(tree, 1, "scope", expected, "agreement_set", (), 2)
    chunks = cut(log_probs_of(tree.students[1]), (CHUNK_ROWS, 2 * CHUNK_ROWS))
    found = plan_level(tree.pool, 1, change(args, rejection_rule="agreement_set"), plan.assigned_teacher, chunks)
    check_plan(tree, found, expected, "agreement set")
    # the m of lowest loss, by another sort
    answered = np.array(expected.labels) >= 0
    losses = np.where(answered, expected.losses, np.inf)
    keep = np.zeros(len(tree.pool), dtype=bool)
    keep[np.lexsort((np.arange(len(losses)), losses, ~answered))[: expected.num_keep]] = True
    found = plan_level(tree.pool, 1, args, plan.assigned_teacher, chunks)
    assert found.keep_mask.tolist() == keep.tolist()
    assert 0 < expected.num_keep < expected.num_training < len(tree.pool)


@pytest.mark.parametrize("assignment", ["scope", "agreement", "ensemble", "metadata", "oracle_loss"])
def test_chunks_do_not_matter(assignment, base_args):
    tree = long_tree()
    args = change(base_args, assignment=[assignment], rejection=["top_k", "parent_topk"])
    previous = np.where(np.arange(len(tree.pool)) % 7 == 0, -1, 0)
    log_probs = log_probs_of(tree.students[1])
    whole = plan_level(tree.pool, 1, args, previous, cut(log_probs))
    for bounds in ((CHUNK_ROWS, 2 * CHUNK_ROWS), (1, 2, 999), range(50, len(tree.pool), 50)):
        same_plan(plan_level(tree.pool, 1, args, previous, cut(log_probs, bounds)), whole)
    # a generator is read once
    same_plan(plan_level(tree.pool, 1, args, previous, (chunk for chunk in cut(log_probs, (5,)))), whole)


class Processes:
    """Threads that meet to add up arrays, as processes do."""

    def __init__(self, num_processes: int) -> None:
        self.shares: dict[int, np.ndarray] = {}
        self.barrier = threading.Barrier(num_processes, timeout=20)

    def sum_for(self, process: int, values: np.ndarray) -> np.ndarray:
        self.shares[process] = values
        self.barrier.wait()
        total = sum(self.shares[number] for number in sorted(self.shares))
        self.barrier.wait()  # nobody may put in the next array before everybody has read this one
        return total.astype(values.dtype)


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("assignment", ["scope", "agreement"])
def test_several_processes_are_one(assignment, num_processes, base_args):
    # 2148 rows are three chunks: with four processes the last one has nothing to do
    tree = long_tree()
    args = change(base_args, assignment=[assignment], rejection=["top_k", "parent_confident"])
    previous = np.where(np.arange(len(tree.pool)) % 7 == 0, -1, 0)
    chunks = cut(log_probs_of(tree.students[1]), (CHUNK_ROWS, 2 * CHUNK_ROWS))
    alone = plan_level(tree.pool, 1, args, previous, chunks)
    processes, plans = Processes(num_processes), {}

    def work(process: int) -> None:
        plans[process] = plan_level(
            tree.pool,
            1,
            args,
            previous,
            chunks[process::num_processes],
            sum_over_processes=functools.partial(processes.sum_for, process),
        )

    threads = [threading.Thread(target=work, args=(process,)) for process in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(plans) == list(range(num_processes))
    for plan in plans.values():
        same_plan(plan, alone)
    assert 0 < alone.keep_rate < 1


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_answered(base_args):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/root"), Teacher("t/one", level=1)])
    pool = PseudolabelPool.from_predictions(hierarchy, range(3), {"root": np.zeros((3, 2)), "one": np.zeros((3, 2))})
    with pytest.raises(ValueError) as error:
        plan_level(pool, 0, base_args, np.full(3, -1))
    assert str(error.value) == "No teacher up to level 0 answered any of the 3 examples. Check their labels."
    chunks = cut(log_probs_of(np.full((3, 2), 0.5)))
    with pytest.raises(ValueError, match="No teacher up to level 1 answered any of the 3 examples"):
        plan_level(pool, 1, base_args, np.full(3, -1), chunks)


@pytest.mark.parametrize("rule", ["loss_rank", "agreement_set"])
def test_nothing_agrees(rule, base_args):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/root"), Teacher("t/one", level=1)])
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    pool = PseudolabelPool.from_predictions(hierarchy, range(3), {"root": rows, "one": rows})
    args = change(base_args, rejection=["top_k"], rejection_rule=rule)
    chunks = cut(log_probs_of(np.tile([0.25, 0.75], (3, 1))))
    with pytest.raises(ValueError) as error:
        plan_level(pool, 1, args, np.array([0, 0, -1]), chunks)
    assert str(error.value) == (
        "Level 1 must keep at least one example, got none of 2: student and teachers never agree under `rejection` "
        "['top_k']. Use 'none', a larger `rejection_k`, or better teachers."
    )


def test_nothing_passes_the_parent(base_args):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/root"), Teacher("t/one", level=1)])
    predictions = {"root": np.array([[1.0, 0.0]]), "one": np.array([[0.0, 1.0]])}
    pool = PseudolabelPool.from_predictions(hierarchy, range(1), predictions)
    args = change(base_args, rejection=["parent_topk"], rejection_k=1)
    chunks = cut(log_probs_of(np.array([[0.0, 1.0]])))
    with pytest.raises(
        ValueError, match=r"Level 1 must keep at least one example, got none of 1: .*\['parent_topk'\]"
    ):
        plan_level(pool, 1, args, np.zeros(1, dtype=int), chunks)
    # where nobody above has spoken there is nothing to contradict
    assert plan_level(pool, 1, args, np.full(1, -1), chunks).keep_mask.tolist() == [True]


def test_diverged_student(small_pool, base_args):
    # NaN compares as False everywhere: without a word every row would go to some teacher
    log_probs = log_probs_of(SMALL_STUDENT)
    log_probs[4, 1] = math.nan
    with pytest.raises(ValueError) as error:
        plan_level(small_pool, 1, change(base_args, assignment=["scope"]), np.full(6, 0), cut(log_probs, (3,)))
    assert str(error.value) == (
        "The student's predictions must be numbers, got NaN in rows 3..5 before level 1: its training diverged. "
        "Lower `learning_rate`, or set `max_grad_norm`."
    )


def test_metadata_needs_its_column(base_args):
    tree = draw_tree(3, 2, 0)
    args = change(base_args, assignment=["metadata"], metadata_column="weather")
    with pytest.raises(ValueError) as error:
        plan_level(tree.pool, 1, args, np.zeros(12, dtype=int), cut(log_probs_of(tree.students[1])))
    assert str(error.value) == (
        "The pool's inputs must have a column 'weather', got ['place', 'oracle_domain', 'oracle_label', 'id']. "
        "Build the pool from data with it."
    )


def test_training_looks_at_no_ground_truth(base_args):
    # the same pool without its oracle columns gives the same plan, and no number under an `oracle_` name
    tree = draw_tree(5, 3, 2)
    blind = PseudolabelPool(
        tree.pool.hierarchy, tree.pool.teachers, tree.pool.inputs.remove_columns(["oracle_label", "oracle_domain"])
    )
    previous = plan_level(tree.pool, 0, base_args, np.full(12, -1)).assigned_teacher
    for assignment in ("scope", "agreement", "metadata", "ensemble"):
        args = change(base_args, assignment=[assignment], rejection=["none"])
        chunks = cut(log_probs_of(tree.students[1]))
        seeing, unseeing = (plan_level(pool, 1, args, previous, chunks) for pool in (tree.pool, blind))
        assert unseeing.assigned_teacher.tolist() == seeing.assigned_teacher.tolist()
        assert unseeing.keep_mask.tolist() == seeing.keep_mask.tolist()
        shown = {key: value for key, value in seeing.metrics.items() if not key.startswith("oracle_")}
        assert unseeing.metrics == shown and len(shown) < len(seeing.metrics)
        assert not any(math.isnan(value) for value in shown.values())


# ── pools that keep some of the labels ──────────────────────────────────────────────────────────────────────────────

# Of 6 labels, what 2, 4, 5 or 6 stored ones leave is spread over 4, 2, 1 or no others: multiples of 1/64, exact. The
# probabilities of 16ths are never all equal, so what was left out stays below the first.
NUM_SPARSE_LABELS = 6
SAME_K, OTHER_KS = (2, 2, 2, 2), (4, 2, 5, 6)


@functools.cache
def draw_stored_tree(num_teachers: int, seed: int, ks: tuple[int, ...]) -> Tree:
    """A tree whose teachers keep `ks` labels in turn, and whose slow answers are what its own storage gives back."""
    tree = draw_tree(NUM_SPARSE_LABELS, num_teachers, seed, num_examples=14)
    number, datasets, answers = 0, {}, []
    for level in tree.answers:
        answers.append([[[] for _ in rows] for rows in level])
        for teacher in range(len(level[0])):
            name, k = tree.pool.hierarchy.names[number], ks[number % len(ks)]
            # a root of several teachers, and a copy of a teacher, keep what the first of them keeps
            if seed % 3 == 0 and teacher == len(level[0]) - 1:
                k = ks[(number - teacher) % len(ks)]
            probs = np.array([rows[teacher] for rows in level])
            datasets[name] = teacher_dataset(tree.pool.ids.tolist(), *encode_top_k(probs, k))
            for row, rows in enumerate(level):
                answers[-1][row][teacher] = slow.decode_row(*slow.encode_row(rows[teacher], k), NUM_SPARSE_LABELS)
            number += 1
    found = copy.copy(tree)
    found.pool, found.answers = PseudolabelPool(tree.pool.hierarchy, datasets, tree.pool.inputs), answers
    return found


@pytest.mark.parametrize("ks", [SAME_K, OTHER_KS], ids=["same k", "other ks"])
@pytest.mark.parametrize("rejection", REJECTIONS)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_whole_hierarchies_of_stored_labels(assignment, rejection, ks, base_args):
    num_compared = 0
    for num_teachers in (1, 2, 3):
        for seed in range(3):
            tree = draw_stored_tree(num_teachers, seed, ks)
            assert tree.pool.has_one_k is (ks == SAME_K)
            for name in tree.pool.hierarchy.names:  # the slow answers are the pool's, to the bit
                level, teacher = (int(part) for part in name[1:].split("-"))
                expected = [rows[teacher] for rows in tree.answers[level]]
                assert tree.pool.decode(name).tolist() == expected
            k = None if seed == 0 else 1 + (seed + num_teachers) % (NUM_SPARSE_LABELS - 1)
            num_compared += check_tree(tree, base_args, assignment, rejection, k, bounds=(seed, 5))
    # 3 trees of two levels and 6 of three: 15 levels below the root; a few keep nothing
    assert num_compared >= 13


@pytest.mark.parametrize("rule", AGREEMENT_RULES)
def test_agreement_on_stored_labels_is_that_on_all_of_them(rule, base_args):
    """The same pool once with 4 labels of 40 and once with all of them decoded: same teachers, same kept rows."""
    rng, num_examples = np.random.default_rng(0), 200
    teachers = [Teacher("root"), *(Teacher(f"t{number}", level=1) for number in range(3))]
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(40)], teachers)
    predictions = {name: rng.dirichlet(np.full(40, 0.2), size=num_examples) for name in hierarchy.names}
    for probs in predictions.values():
        probs[rng.random(num_examples) < 0.1] = 0.0
    ids = list(range(num_examples))
    sparse = PseudolabelPool.from_predictions(hierarchy, ids, predictions, pool_k=4)
    decoded = {name: sparse.decode(name) for name in hierarchy.names}
    dense = PseudolabelPool.from_predictions(hierarchy, ids, decoded, pool_k=40)
    student = torch.from_numpy(rng.dirichlet(np.full(40, 0.5), size=num_examples)).float().log()
    args = change(base_args, assignment=["agreement"], agreement_rule=rule)
    plans = []
    for pool in (sparse, dense):
        previous = plan_level(pool, 0, args, np.full(num_examples, -1)).assigned_teacher
        plans.append(plan_level(pool, 1, args, previous, [(slice(0, num_examples), student)]))
    # float16 rounds what was decoded once more: a near tie may go the other way, now and then
    assert (plans[0].assigned_teacher == plans[1].assigned_teacher).mean() >= 0.98
    assert set(plans[0].assigned_teacher.tolist()) >= {1, 2, 3}


def test_a_chunk_asks_each_teacher_once(base_args, monkeypatch):
    """Whatever a level assigns and rejects by; and nothing of the whole pool is read once per chunk."""
    rng, num_examples = np.random.default_rng(0), 3 * CHUNK_ROWS + 5
    hierarchy = TeacherHierarchy(
        [f"l{label}" for label in range(8)],
        [Teacher("root"), Teacher("a", level=1, scope=["l0"]), Teacher("b", level=1)],
    )
    predictions = {name: rng.dirichlet(np.ones(8), size=num_examples) for name in hierarchy.names}
    pool = PseudolabelPool.from_predictions(hierarchy, list(range(num_examples)), predictions, pool_k=2)
    read: list[tuple[str, slice]] = []
    whole = PseudolabelPool.stored

    def count(self, name, rows):
        read.append((name, rows))
        return whole(self, name, rows)

    def never(self, *args, **kwargs):
        raise AssertionError("the pool is asked again")

    monkeypatch.setattr(PseudolabelPool, "stored", count)
    for name in ("answered", "decode", "gather", "hard_labels", "pseudolabels"):
        monkeypatch.setattr(PseudolabelPool, name, never)
    student = torch.from_numpy(rng.dirichlet(np.ones(8), size=num_examples)).float().log()
    chunks = [(part, student[part]) for part in row_chunks(num_examples)]
    everything = ["top_k", "parent_topk", "parent_confident", "student_entropy", "vote_entropy", "confidence_window"]
    for assignment in ("agreement", "ensemble", "scope", "random"):
        for rejection, names in ((["none"], {"a", "b"}), (everything, {"root", "a", "b"})):
            args = change(base_args, assignment=[assignment], rejection=rejection, rejection_window=[0.0, 1.0])
            root = plan_level(pool, 0, args, np.full(num_examples, -1))
            assert read == [("root", part) for part, _ in chunks]
            read.clear()
            plan_level(pool, 1, args, root.assigned_teacher, chunks)
            assert sorted(read, key=str) == sorted(((name, part) for part, _ in chunks for name in names), key=str)
            read.clear()


# ── other ways to reject ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small() -> PseudolabelPool:
    """Two levels of two labels, six examples: the specialist says a, a, a, b, b, nothing, ever surer of a."""
    root = np.array([[0.6, 0.4]] * 3 + [[0.4, 0.6]] * 2 + [[0.0, 0.0]])
    own = np.array([[0.9, 0.1], [0.75, 0.25], [0.55, 0.45], [0.25, 0.75], [0.1, 0.9], [0.0, 0.0]])
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("root"), Teacher("own", level=1)])
    return PseudolabelPool.from_predictions(hierarchy, list(range(6)), {"root": root, "own": own})


STUDENT = torch.tensor([[0.95, 0.05], [0.4, 0.6], [0.1, 0.9], [0.5, 0.5], [0.3, 0.7], [0.5, 0.5]]).log()


def keep_of(pool: PseudolabelPool, args: CoSupervisedConfig, **values: object) -> LevelPlan:
    changed = change(args, assignment=["ensemble"], **values)
    return plan_level(pool, 1, changed, np.array([0, 0, 0, 0, 0, -1]), cut(STUDENT, [2, 5]))


def test_the_share_that_the_student_is_surest_of(small, base_args):
    # entropies rise in the order of rows 0, 2, 4, 1, 3; row 5 has no pseudolabel
    for share, kept in ((0.2, [0]), (0.4, [0, 2]), (0.6, [0, 2, 4]), (1.0, [0, 1, 2, 3, 4])):
        plan = keep_of(small, base_args, rejection=["student_entropy"], rejection_share=share)
        assert np.flatnonzero(plan.keep_mask).tolist() == kept


def test_examples_on_which_teachers_agree(base_args):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("root"), Teacher("x", level=1), Teacher("y", level=1)])
    a, b = [1.0, 0.0], [0.0, 1.0]
    answers = {"root": [a, a, b, b], "x": [a, b, b, a], "y": [a, a, b, b]}
    pool = PseudolabelPool.from_predictions(hierarchy, range(4), {n: np.array(v) for n, v in answers.items()})
    args = change(base_args, assignment=["ensemble"], rejection=["vote_entropy"])
    plan = plan_level(pool, 1, args, np.zeros(4, dtype=int), cut(STUDENT[:4], [1]))
    # rows 1 and 3 are two to one; the median lies between, and what is at most the median stays
    assert np.flatnonzero(plan.keep_mask).tolist() == [0, 2]


def test_a_window_of_confidence(small, base_args):
    for window, kept in (([0.5, 1.0], [0, 1, 2, 3, 4]), ([0.7, 0.8], [1, 3]), ([0.88, 1.0], [0, 4])):
        plan = keep_of(small, base_args, rejection=["confidence_window"], rejection_window=window)
        assert np.flatnonzero(plan.keep_mask).tolist() == kept


def test_rejected_examples_may_take_the_students_own_label(small, base_args):
    rejected = keep_of(small, base_args, rejection=["top_k"], rejection_rule="agreement_set")
    assert np.flatnonzero(~rejected.keep_mask).tolist() == [1, 2, 3, 5] and rejected.relabelled is None
    plan = keep_of(small, base_args, rejection=["top_k"], rejection_rule="agreement_set", relabel_above=0.8)
    # rows 1 and 2 are rejected (a, and the student says b); it is sure enough of row 2 only
    assert plan.relabelled.tolist() == [-1, -1, 1, -1, -1, -1]
    assert plan.labels.tolist() == [0, 0, 1, 1, 1, -1] and plan.keep_mask[2] and not plan.keep_mask[1]
    from hf_cosupervise.training.level_loss import _pseudolabels

    rows = np.array([0, 2, 4])
    np.testing.assert_allclose(
        _pseudolabels(small, plan, False, False, rows), [[0.9, 0.1], [0, 1], [0.1, 0.9]], atol=1e-3
    )
