"""How a pool is read row by row: who speaks for each example, and what that teacher stored, without all labels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.files import teacher_dataset
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.pool.top_k import encode_top_k

NUM_EXAMPLES, NUM_LABELS = 30, 12
NAMES = ("root", "left", "right", "last")
# teachers 0..3, then the ensembles of levels 0, 1 and 2
NUM_SOURCES = 7


def draw_predictions(seed: int = 0, num_labels: int = NUM_LABELS) -> dict[str, np.ndarray]:
    """Unsure rows, sure rows, ties, and rows without an answer."""
    rng = np.random.default_rng(seed)
    predictions = {}
    for name in NAMES:
        probs = rng.dirichlet(np.full(num_labels, 0.4), size=NUM_EXAMPLES)
        probs[::7] = np.eye(num_labels)[rng.integers(num_labels, size=len(probs[::7]))]
        probs[3] = 1 / num_labels
        probs[rng.random(NUM_EXAMPLES) < 0.25] = 0.0
        predictions[name] = probs
    for probs in predictions.values():
        probs[11] = 0.0  # a row that nobody answered
    return predictions


def make_pool(ks: tuple[int, int, int, int] = (4, 4, 4, 4), num_labels: int = NUM_LABELS) -> PseudolabelPool:
    teachers = [Teacher(name, level=level) for name, level in zip(NAMES, (0, 1, 1, 2))]
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(num_labels)], teachers)
    ids, predictions = list(range(NUM_EXAMPLES)), draw_predictions(num_labels=num_labels)
    datasets = {
        name: teacher_dataset(ids, *encode_top_k(predictions[name], k)) for name, k in zip(NAMES, ks, strict=True)
    }
    return PseudolabelPool(hierarchy, datasets, Dataset.from_dict({"id": ids, "text": [str(row) for row in ids]}))


def several_views(pool: PseudolabelPool, folder: Path) -> dict[str, tuple[PseudolabelPool, np.ndarray]]:
    """The same pool as it may be met: made, mapped from disk, a selection of it, rows in another order per teacher."""
    pool.save(folder / "pool")
    mapped = PseudolabelPool.load(folder / "pool")
    everything = np.arange(NUM_EXAMPLES)
    chosen = np.random.default_rng(5).permutation(NUM_EXAMPLES)[:20]
    shuffled = {
        name: dataset.select(np.random.default_rng(number).permutation(NUM_EXAMPLES))
        for number, (name, dataset) in enumerate(mapped.teachers.items())
    }
    return {
        "made": (pool, everything),
        "mapped": (mapped, everything),
        "selected": (pool.select(chosen), chosen),
        "mapped and selected twice": (mapped.select(chosen).select(np.arange(19, -1, -1)), chosen[::-1]),
        "other orders": (PseudolabelPool(pool.hierarchy, shuffled, mapped.inputs), everything),
    }


def draw_reads(num_rows: int, num_sources: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsorted and repeated rows, each with a source; one in six with nobody."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(num_rows, size=50)
    return np.where(rng.random(50) < 1 / 6, -1, rng.integers(num_sources, size=50)), rows


def slow_pseudolabel(pool: PseudolabelPool, source: int, row: int) -> np.ndarray:
    """One pseudolabel over all labels in float64, from `decode` of one teacher at a time."""
    if source < 0:
        return np.zeros(pool.hierarchy.num_labels)
    if source < len(NAMES):
        return pool.decode(NAMES[source])[row].astype(np.float64)
    members = [name for name, level in zip(NAMES, (0, 1, 1, 2)) if level == source - len(NAMES)]
    answers = [pool.decode(name)[row].astype(np.float64) for name in members]
    answers = [answer for answer in answers if answer.any()]
    return sum(answers) / len(answers) if answers else np.zeros(pool.hierarchy.num_labels)


KS = [(4, 4, 4, 4), (1, 1, 1, 1), (NUM_LABELS,) * 4, (2, 5, 1, 3), (5, 2, 3, 1)]


@pytest.mark.parametrize("ks", KS)
def test_gather_is_the_stored_row(ks, tmp_path):
    for what, (pool, _) in several_views(make_pool(ks), tmp_path).items():
        sources, rows = draw_reads(len(pool), len(NAMES), seed=1)
        label_ids, label_probs = pool.gather(sources, rows)
        assert label_ids.shape == label_probs.shape == (50, max(ks)), what
        assert label_ids.dtype == np.uint8 and label_probs.dtype == np.float16, what
        for position, (source, row) in enumerate(zip(sources.tolist(), rows.tolist())):
            ids, probs = [0] * max(ks), [0.0] * max(ks)
            if source >= 0:
                k = ks[source]
                ids[:k] = pool.label_ids(NAMES[source])[row].tolist()
                probs[:k] = pool.label_probs(NAMES[source])[row].tolist()
            assert label_ids[position].tolist() == ids, (what, position)
            assert label_probs[position].tolist() == probs, (what, position)


@pytest.mark.parametrize("ks", KS)
def test_hard_pseudolabels_are_the_best_of_the_dense_ones(ks, tmp_path):
    for what, (pool, _) in several_views(make_pool(ks), tmp_path).items():
        assert len(pool.source_names) == NUM_SOURCES
        for num_sources in (len(NAMES), NUM_SOURCES):  # teachers only, then ensembles among them
            sources, rows = draw_reads(len(pool), num_sources, seed=2)
            found = pool.hard_pseudolabels(sources, rows)
            assert found.dtype == np.int64 and found.shape == (50,)
            for position, (source, row) in enumerate(zip(sources.tolist(), rows.tolist())):
                dense = slow_pseudolabel(pool, source, row)
                if not dense.any():
                    assert found[position] == -1, (what, position)
                elif source < len(NAMES):
                    assert found[position] == dense.argmax(), (what, position)
                else:  # float32 sums may break a tie of a mean, at most
                    assert dense[found[position]] == pytest.approx(dense.max(), rel=1e-6), (what, position)
            hard = pool.pseudolabels(sources, rows, hard=True)
            assert np.array_equal(np.where(hard.any(axis=1), hard.argmax(axis=1), -1), found), what


@pytest.mark.parametrize("ks", KS)
def test_pseudolabels_row_by_row(ks, tmp_path):
    for what, (pool, _) in several_views(make_pool(ks), tmp_path).items():
        sources, rows = draw_reads(len(pool), NUM_SOURCES, seed=3)
        found = pool.pseudolabels(sources, rows)
        expected = [slow_pseudolabel(pool, *pair) for pair in zip(sources.tolist(), rows.tolist())]
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=what)


def scatter(label_ids: np.ndarray, probs: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Full vectors of sparse ones, label by label."""
    dense = np.repeat(rest[:, None], NUM_LABELS, axis=1)
    for row in range(len(dense)):
        for label, prob in zip(label_ids[row], probs[row]):
            dense[row, label] = prob
    return dense


@pytest.mark.parametrize("k", [1, 4, NUM_LABELS])
def test_sparse_pseudolabels_are_the_dense_ones(k, tmp_path):
    for what, (pool, _) in several_views(make_pool((k,) * 4), tmp_path).items():
        sources, rows = draw_reads(len(pool), len(NAMES), seed=4)
        label_ids, probs, rest = pool.sparse_pseudolabels(sources, rows)
        assert label_ids.dtype == np.int64 and probs.dtype == rest.dtype == np.float32
        assert label_ids.shape == probs.shape == (50, k) and rest.shape == (50,)
        spoken = probs[:, 0] > 0
        found = np.where(spoken[:, None], scatter(label_ids, probs, rest), 0.0)
        assert np.array_equal(found, pool.pseudolabels(sources, rows)), what
        assert not rest[~spoken].any() and not probs[~spoken].any()


@pytest.mark.parametrize("ks", KS)
def test_hard_sparse_pseudolabels_are_the_dense_ones(ks, tmp_path):
    for what, (pool, _) in several_views(make_pool(ks), tmp_path).items():
        sources, rows = draw_reads(len(pool), len(NAMES), seed=5)
        label_ids, probs, rest = pool.sparse_pseudolabels(sources, rows, hard=True)
        assert label_ids.shape == probs.shape == (50, 1) and label_ids.dtype == np.int64
        assert probs.dtype == np.float32 and not rest.any()
        found = np.zeros((50, NUM_LABELS), dtype=np.float32)
        found[np.arange(50), label_ids[:, 0]] = probs[:, 0]
        assert np.array_equal(found, pool.pseudolabels(sources, rows, hard=True)), what


@pytest.mark.parametrize("ks", KS)
@pytest.mark.parametrize("kind", ["slice", "rows"])
def test_who_answered_some_rows(kind, ks, tmp_path):
    for what, (pool, _) in several_views(make_pool(ks), tmp_path).items():
        rows = slice(3, 17) if kind == "slice" else np.array([5, 5, 0, 11, len(pool) - 1])
        for name in NAMES:
            expected = pool.decode(name).any(axis=1)
            assert pool.answered(name).tolist() == expected.tolist(), what
            found = pool.answered(name, rows)
            assert found.tolist() == expected[rows].tolist() and found.dtype == bool, what


def test_a_selection_says_what_the_whole_says(tmp_path):
    pools = several_views(make_pool(), tmp_path)
    whole, _ = pools["made"]
    for what, (pool, positions) in pools.items():
        sources, rows = draw_reads(len(pool), len(NAMES), seed=6)
        for found, expected in zip(pool.gather(sources, rows), whole.gather(sources, positions[rows])):
            assert np.array_equal(found, expected), what


@pytest.mark.parametrize(("ks", "expected"), [(KS[0], True), (KS[2], True), (KS[3], False), ((4, 4, 4, 3), False)])
def test_has_one_k(ks, expected, tmp_path):
    for what, (pool, _) in several_views(make_pool(ks), tmp_path).items():
        assert pool.has_one_k is expected, what


def test_no_rows():
    pool, nothing = make_pool(), np.zeros(0, dtype=np.int64)
    label_ids, label_probs = pool.gather(nothing, nothing)
    assert label_ids.shape == label_probs.shape == (0, 4)
    assert pool.hard_pseudolabels(nothing, nothing).tolist() == []
    assert [part.shape for part in pool.sparse_pseudolabels(nothing, nothing)] == [(0, 4), (0, 4), (0,)]
    assert pool.pseudolabels(nothing, nothing).shape == (0, NUM_LABELS)


def test_nobody_speaks():
    pool, rows = make_pool((2, 5, 1, 3)), np.array([4, 0, 4])
    nobody = np.full(3, -1)
    label_ids, label_probs = pool.gather(nobody, rows)
    assert label_ids.shape == (3, 5) and not label_ids.any() and not label_probs.any()
    assert pool.hard_pseudolabels(nobody, rows).tolist() == [-1, -1, -1]
    assert not pool.pseudolabels(nobody, rows).any() and not pool.pseudolabels(nobody, rows, hard=True).any()


@pytest.mark.parametrize("source", [4, 6, 99, -2, -3])
def test_a_source_without_stored_rows_is_refused(source):
    pool = make_pool()
    for sources in ([source], [0, source, -1, 3], [source, source]):
        with pytest.raises(ValueError) as error:
            pool.gather(np.array(sources), np.zeros(len(sources), dtype=np.int64))
        assert str(error.value) == f"`sources` must be teachers (0..3) or -1 for nobody, got {source}."
    with pytest.raises(ValueError, match=re.escape(f"got {source}.")):
        pool.sparse_pseudolabels(np.array([source]), np.array([0]))


@pytest.mark.parametrize("source", [7, 99, -2])
def test_a_source_that_does_not_exist_is_refused(source):
    # neither a teacher counted from behind, nor an answer from elsewhere
    pool = make_pool()
    row = int(np.flatnonzero(pool.answered("right"))[0])
    for read in (pool.pseudolabels, pool.hard_pseudolabels):
        with pytest.raises(ValueError, match=re.escape(f"got {source}.")):
            read(np.array([source]), np.array([row]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int8])
def test_sources_of_any_integer_type(dtype):
    # plans keep int32, a saved plan may hold another
    pool = make_pool()
    sources, rows = draw_reads(len(pool), len(NAMES), seed=7)
    expected = pool.gather(sources, rows)
    for found, wanted in zip(pool.gather(sources.astype(dtype), rows.astype(np.int32)), expected):
        assert np.array_equal(found, wanted)


def test_nothing_given_is_changed():
    pool = make_pool()
    sources, rows = draw_reads(len(pool), len(NAMES), seed=8)
    before = sources.copy(), rows.copy(), [pool.label_ids(name).copy() for name in NAMES]
    label_ids, label_probs = pool.gather(sources, rows)
    label_ids[:], label_probs[:] = 1, 1  # what was given belongs to the caller
    pool.sparse_pseudolabels(sources, rows, hard=True)
    assert np.array_equal(sources, before[0]) and np.array_equal(rows, before[1])
    assert all(np.array_equal(pool.label_ids(name), ids) for name, ids in zip(NAMES, before[2]))


def test_labels_beyond_8_bits_and_teachers_that_store_other_types():
    # 300 labels: the first teacher only ever names labels that fit into 8 bits, and its data says so
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(300)], [Teacher("first"), Teacher("second", level=1)])
    stored = np.array([[0.75, 0.25]] * 2, dtype=np.float16)
    datasets = {
        "first": teacher_dataset([0, 1], np.array([[3, 7], [9, 200]], dtype=np.uint8), stored),
        "second": teacher_dataset([0, 1], np.array([[299, 7], [258, 0]], dtype=np.uint16), stored),
    }
    pool = PseudolabelPool(hierarchy, datasets)
    sources, rows = np.array([0, 1, 1, 0]), np.array([1, 0, 1, 0])
    assert pool.pseudolabels(sources, rows).argmax(axis=1).tolist() == [9, 299, 258, 3]
    assert pool.gather(sources, rows)[0][:, 0].tolist() == [9, 299, 258, 3]


def test_ties_of_a_row_that_was_not_made_by_encode_top_k():
    # Hard pseudolabels promise the lowest label, stored or decoded: [3, 1] at 1/2 each would be 3 here and 1 there.
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(NUM_LABELS)], [Teacher("one")])
    stored = np.array([[0.0, 0.0, 0.0], [0.375, 0.375, 0.25], [0.5, 0.25, 0.25]], dtype=np.float16)
    for ids in ([[0, 0, 0], [3, 1, 4], [1, 0, 2]], [[0, 0, 0], [3, 4, 1], [1, 2, 0]]):
        datasets = {"one": teacher_dataset([0, 1, 2], np.array(ids, dtype=np.uint8), stored)}
        if ids[1][1] < ids[1][0]:
            with pytest.raises(ValueError) as error:
                PseudolabelPool(hierarchy, datasets)
            assert str(error.value) == (
                "Of equally probable labels of 'one' the lowest must stand first in each row. Build it with "
                "`encode_top_k`."
            )
            continue
        pool, sources, rows = PseudolabelPool(hierarchy, datasets), np.zeros(3, dtype=int), np.arange(3)
        dense = pool.pseudolabels(sources, rows, hard=True)
        assert pool.hard_pseudolabels(sources, rows).tolist() == [-1, 3, 1]
        assert dense.argmax(axis=1).tolist() == [0, 3, 1] and dense.sum(axis=1).tolist() == [0, 1, 1]
        assert pool.sparse_pseudolabels(sources, rows, hard=True)[0].tolist() == [[0], [3], [1]]
