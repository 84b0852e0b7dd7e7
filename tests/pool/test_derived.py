"""Pools made of pools: against loops, by hand, and what they refuse."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_cosupervise import processes
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.method.aggregation import AGGREGATORS, harden, majority_vote
from hf_cosupervise.method.calibration import apply_temperature, fit_temperature
from hf_cosupervise.method.crowdlab import crowdlab
from hf_cosupervise.method.neighbors import mean_over_neighbors
from hf_cosupervise.method.raven import fit_raven
from hf_cosupervise.method.weighting import boosting_weights, weighted_mean_probs, weighted_vote
from hf_cosupervise.pool import derived as derived_module
from hf_cosupervise.pool.derived import (
    FEATURE_AGGREGATORS,
    aggregated_pool,
    boosted_pool,
    calibrated_pool,
    fit_temperatures,
    single_teacher_pool,
    smoothed_pool,
)
from hf_cosupervise.pool.pseudolabels import PseudolabelPool

HALF = 1e-3  # what half precision leaves of a probability
METHODS = [*AGGREGATORS, *FEATURE_AGGREGATORS]
SILENT = 3  # a teacher of `make_pool` that never answers


def make_pool(
    num_examples: int = 60,
    num_labels: int = 4,
    num_teachers: int = 3,
    *,
    seed: int = 0,
    silent: bool = False,
    spare: int = 0,
    scope: list[str] | None = None,
    pool_k: int | None = None,
    oracle: bool = True,
) -> PseudolabelPool:
    """Teachers that are right more often than not and leave a tenth out; the last `spare` labels nobody names."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(num_labels - spare, size=num_examples)
    names = [f"t{index}" for index in range(num_teachers)]
    predictions = {}
    for index, name in enumerate(names):
        logits = rng.normal(size=(num_examples, num_labels)) + (2 + index) * np.eye(num_labels)[truth]
        if spare:
            logits[:, -spare:] = -np.inf
        probs = torch.from_numpy(logits).softmax(dim=1).numpy()
        predictions[name] = probs * (rng.random((num_examples, 1)) > 0.1) * (not silent or name != f"t{SILENT - 1}")
    labels = [f"label-{index}" for index in range(num_labels)]
    teachers = [Teacher(f"t/{name}", level=min(n, 1), scope=scope if n == 1 else None) for n, name in enumerate(names)]
    columns = {"text": [f"row {row}" for row in range(num_examples)], "domain": ["x"] * num_examples}
    inputs = Dataset.from_dict(columns | ({"oracle_label": truth.tolist()} if oracle else {}))
    ids = [f"id-{seed}-{row}" for row in range(num_examples)]
    pool = PseudolabelPool.from_predictions(
        TeacherHierarchy(labels, teachers),
        ids,
        predictions,
        inputs=inputs,
        pool_k=pool_k,
        facts={name: {"commit": "a" * 40} for name in names},
    )
    pool.source = {"dataset": "org/data", "commit": "b" * 40}
    return pool


def make_features(pool: PseudolabelPool, size: int = 6) -> torch.Tensor:
    """The label, in noise."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(len(pool), size, generator=generator)
    if pool.oracle_labels is None:
        return noise
    return noise + 2 * torch.nn.functional.one_hot(torch.from_numpy(pool.oracle_labels), size)


def decode_all(pool: PseudolabelPool) -> tuple[torch.Tensor, torch.Tensor]:
    return pool.decode_level(range(len(pool.hierarchy.teachers)), slice(None))


def assert_same_data(derived: PseudolabelPool, pool: PseudolabelPool) -> None:
    """Ids, inputs and ground truth are those of the pool, and nothing of them is a copy."""
    assert derived is not pool and derived.ids.tolist() == pool.ids.tolist()
    assert derived.inputs is pool.inputs and derived.source == pool.source
    assert derived.oracle_labels.tolist() == pool.oracle_labels.tolist()
    assert derived.column("domain") == pool.column("domain")


def needs_extra(method: str) -> bool:
    return method == "glad" and find_spec("scipy") is None


# ── all teachers as one ─────────────────────────────────────────────────────────────────────────────────────────────


def test_one_teacher_of_ones_own():
    pool = make_pool()
    probs = np.eye(4)[np.arange(60) % 4]
    single = single_teacher_pool(pool, "mine", probs)
    assert single.hierarchy.names == ("mine",) and single.decode("mine").tolist() == probs.tolist()
    assert_same_data(single, pool)


def test_raven_is_its_weights_on_the_teachers():
    pool = make_pool()
    features, (probs, answered) = make_features(pool), decode_all(pool)
    expected = weighted_mean_probs(probs, answered, fit_raven(features, probs, answered).teacher_weights)
    found = aggregated_pool(pool, "raven", features=features)
    assert found.hierarchy.names == ("raven",)
    np.testing.assert_allclose(found.decode("raven"), expected, atol=HALF)
    assert_same_data(found, pool)


def test_raven_of_teachers_that_never_agree():
    pool = make_pool()
    features, probs = make_features(pool), {}
    for index, name in enumerate(pool.hierarchy.names):  # each has one label of its own
        probs[name] = np.eye(4)[np.full(60, index)]
    apart = PseudolabelPool.from_predictions(pool.hierarchy, pool.ids, probs)
    with pytest.warns(
        UserWarning, match="no example on which all teachers agree: 'raven' does without its easy start"
    ):
        found = aggregated_pool(apart, "raven", features=features).decode("raven")
    weights = fit_raven(features, *decode_all(apart), easy_epochs=0).teacher_weights
    np.testing.assert_allclose(found[:, :3], weights.expand(60, 3), atol=HALF)


def slow_cross_fit(features: np.ndarray, votes: np.ndarray, alpha: float, scale: float) -> np.ndarray:
    """Ridge regression of the votes, fold by fold, as the textbook has it."""
    result = np.zeros_like(votes)
    for fold in range(5):
        rows = [i for i in range(len(votes)) if i % 5 != fold and votes[i].any()]
        x, y = features[rows], votes[rows]
        centred = x - x.mean(axis=0)
        gram = centred.T @ centred
        gram += alpha * np.trace(gram) / len(gram) * np.eye(len(gram))
        weight = np.linalg.solve(gram, centred.T @ (y - y.mean(axis=0)))
        for i in range(fold, len(votes), 5):
            logits = scale * ((features[i] - x.mean(axis=0)) @ weight + y.mean(axis=0))
            result[i] = np.exp(logits) / np.exp(logits).sum()
    return result


def test_crowdlab_asks_heads_that_have_not_seen_the_example():
    pool = make_pool(num_examples=83)
    features, (probs, answered) = make_features(pool), decode_all(pool)
    labels = harden(probs, answered)
    votes = majority_vote(labels, 4)
    student = slow_cross_fit(features.double().numpy(), votes.double().numpy(), 0.01, 10.0)
    np.testing.assert_allclose(derived_module._cross_fitted_probs(features, votes), student, atol=1e-4)
    found = aggregated_pool(pool, "crowdlab", features=features)
    np.testing.assert_allclose(found.decode("crowdlab"), crowdlab(labels, torch.from_numpy(student)), atol=HALF)
    assert_same_data(found, pool)
    # whatever one example's own teachers say, its prediction stays
    votes[7] = votes[7].roll(1)
    again = derived_module._cross_fitted_probs(features, votes)
    np.testing.assert_allclose(again[7], student[7], atol=1e-4)


def test_no_random_number_is_used_up():
    pool = make_pool()
    before = torch.random.get_rng_state()
    first, second = (
        [aggregated_pool(pool, name, features=make_features(pool)).decode(name) for name in FEATURE_AGGREGATORS]
        for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(np.array_equal(one, two) for one, two in zip(first, second))


def test_half_precision_features_do():
    pool = make_pool()
    for name in FEATURE_AGGREGATORS:
        full, half = (
            aggregated_pool(pool, name, features=values).decode(name)
            for values in (make_features(pool), make_features(pool).half())
        )
        np.testing.assert_allclose(half, full, atol=5e-3)


@pytest.mark.parametrize("method", FEATURE_AGGREGATORS)
def test_features_are_needed(method):
    pool = make_pool()
    with pytest.raises(ValueError) as error:
        aggregated_pool(pool, method)
    assert str(error.value) == (
        f"'{method}' needs `features` of the 60 examples, got none. Give what a frozen backbone makes of them, such "
        "as `trainer.pool_features()`."
    )
    features = make_features(pool)
    for wrong in (features[:5], features[:, 0], torch.full_like(features, torch.nan)):
        with pytest.raises(ValueError, match=rf"'{method}' needs finite `features` of shape \(60, feature_size\)"):
            aggregated_pool(pool, method, features=wrong)


def test_unknown_names_are_refused_with_all_that_are_known():
    with pytest.raises(ValueError) as error:
        aggregated_pool(make_pool(), "magic")
    assert str(error.value) == (
        "Unknown `method` 'magic'. Choose one of mean_probs, mean_logits, majority_vote, dawid_skene, glad, mace, "
        "ebcc, raven, crowdlab, or give a function."
    )


def test_crowdlab_decodes_no_probabilities(monkeypatch):
    # of 29 teachers and 1,000 labels they are thirty times as large as all that it needs
    pool = make_pool(num_examples=40)
    features = make_features(pool)
    whole = aggregated_pool(pool, "crowdlab", features=features)
    monkeypatch.setattr(PseudolabelPool, "decode", lambda *arguments: pytest.fail("it decodes"))
    again = aggregated_pool(pool, "crowdlab", features=features)
    assert np.array_equal(again.label_ids("crowdlab"), whole.label_ids("crowdlab"))


def test_crowdlab_of_answers_in_one_fold():
    pool = make_pool(num_examples=10)
    hierarchy, probs = pool.hierarchy, np.zeros((10, 4))
    probs[[0, 5], 1] = 1.0
    alone = PseudolabelPool.from_predictions(hierarchy, pool.ids, dict.fromkeys(hierarchy.names, probs))
    with pytest.raises(ValueError, match="'crowdlab' needs answered examples in two of 5 folds, got 2 in one"):
        aggregated_pool(alone, "crowdlab", features=torch.randn(10, 3))


# ── every aggregator on what is unusual ─────────────────────────────────────────────────────────────────────────────


UNUSUAL = {
    "a teacher that never answers": {"num_teachers": 4, "silent": True},
    "two labels": {"num_labels": 2},
    "a label that nobody names": {"num_labels": 5, "spare": 2},
    "two labels, one of which nobody names": {"num_labels": 2, "spare": 1},
    "teachers that keep few labels": {"num_labels": 6, "pool_k": 2},
}


@pytest.mark.parametrize("what", UNUSUAL)
@pytest.mark.parametrize("method", METHODS)
def test_every_aggregator_on_what_is_unusual(method, what):
    if needs_extra(method):
        pytest.skip("needs crowd-kit")
    pool = make_pool(**UNUSUAL[what])
    found = aggregated_pool(pool, method, features=make_features(pool))
    [name] = found.hierarchy.names
    probs, answered = found.decode(name), decode_all(pool)[1].any(dim=1).numpy()
    np.testing.assert_allclose(probs.sum(axis=1), answered, atol=HALF)
    right = probs.argmax(axis=1) == pool.oracle_labels
    assert right[answered].mean() > 0.75
    if spare := UNUSUAL[what].get("spare"):
        assert probs[:, -spare:].max() < 0.5


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_every_aggregator_on_few_teachers(method, num_teachers):
    pool = make_pool(num_teachers=num_teachers)
    features = make_features(pool)
    # which of two teachers is better, their answers alone cannot tell; crowdlab has a third opinion
    needed = {"dawid_skene": 3, "glad": 3, "mace": 3, "ebcc": 3, "crowdlab": 2}.get(method, 1)
    if num_teachers < needed:
        with pytest.raises(ValueError, match=f"`{method}` needs .*Use `m"):
            aggregated_pool(pool, method, features=features)
    else:
        found = aggregated_pool(pool, method, features=features)
        probs = found.decode(found.hierarchy.names[0])
        assert (probs.argmax(axis=1) == pool.oracle_labels).mean() > 0.7


def test_an_aggregator_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'Run `pip install "hf_cosupervise\[crowd\]"`'):
        aggregated_pool(make_pool(), "glad")


# ── boosting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_boosting_takes_its_weights_from_other_examples():
    pool, labelled = make_pool(), make_pool(40, seed=1)
    names = pool.hierarchy.names
    said, asked = (torch.from_numpy(np.stack([p.hard_labels(n) for n in names], axis=1)) for p in (pool, labelled))
    weights = boosting_weights(asked, torch.from_numpy(labelled.oracle_labels), 4)
    found = boosted_pool(pool, labelled)
    assert found.hierarchy.names == ("boosting",) and len(set(weights.tolist())) == 3
    np.testing.assert_allclose(found.decode("boosting"), weighted_vote(said, weights, 4), atol=HALF)
    assert_same_data(found, pool)


@pytest.mark.parametrize("what", UNUSUAL)
@pytest.mark.filterwarnings("ignore:.*labels have no labelled example")
def test_boosting_and_calibration_on_what_is_unusual(what):
    pool, labelled = make_pool(**UNUSUAL[what]), make_pool(**UNUSUAL[what], seed=1)
    boosted = boosted_pool(pool, labelled).decode("boosting")
    some = boosted.any(axis=1)
    assert (boosted.argmax(axis=1) == pool.oracle_labels)[some].mean() > 0.75
    if "silent" in UNUSUAL[what]:
        with pytest.raises(ValueError, match="Calibration of teacher 't2' needs 10 labelled examples"):
            calibrated_pool(pool, labelled)
    else:
        calibrated = calibrated_pool(pool, labelled)
        for name in pool.hierarchy.names:
            assert calibrated.answered(name).tolist() == pool.answered(name).tolist()


def test_teachers_of_the_labelled_pool_may_stand_in_another_order():
    pool, labelled = make_pool(), make_pool(40, seed=1)
    teachers = [Teacher("t/extra"), *(Teacher(f"t/{name}") for name in ("t2", "t1", "t0"))]
    probs = {name: labelled.decode(name) for name in labelled.hierarchy.names}
    other = PseudolabelPool.from_predictions(
        TeacherHierarchy(pool.labels, teachers), labelled.ids, {**probs, "extra": probs["t0"]}, inputs=labelled.inputs
    )
    expected = boosted_pool(pool, labelled).decode("boosting")
    np.testing.assert_array_equal(boosted_pool(pool, other).decode("boosting"), expected)
    assert fit_temperatures(pool, other) == pytest.approx(fit_temperatures(pool, labelled), rel=HALF)


@pytest.mark.parametrize("derive", [boosted_pool, calibrated_pool, fit_temperatures])
def test_labelled_pools_that_do_not_do(derive):
    pool = make_pool()
    with pytest.raises(ValueError) as error:
        derive(pool, make_pool(num_teachers=2))
    assert str(error.value) == (
        "`labelled_pool` must hold the pool's teachers ['t0', 't1', 't2'], got none of ['t2']. Build it with the same "
        "hierarchy."
    )
    with pytest.raises(ValueError) as error:
        derive(pool, make_pool(oracle=False))
    assert str(error.value) == (
        "`labelled_pool` must have ground truth, got no `oracle_label`. Build it with `oracle_column`."
    )
    with pytest.raises(ValueError, match="`labelled_pool` must have the pool's labels"):
        derive(pool, make_pool(num_labels=3))
    with pytest.raises(ValueError, match="10 labelled examples"):
        derive(pool, make_pool(9, seed=1))
    with pytest.raises(ValueError, match="10 labelled examples"):
        derive(pool, make_pool(9, seed=1).select([]))


# ── calibration ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_teacher_has_its_own_temperature():
    pool, labelled = make_pool(), make_pool(80, seed=1)
    found, temperatures = calibrated_pool(pool, labelled), fit_temperatures(pool, labelled)
    assert len(set(temperatures.values())) == 3
    assert found.hierarchy == pool.hierarchy
    for name in pool.hierarchy.names:
        rows = np.flatnonzero(labelled.answered(name))
        probs, truth = labelled.decode(name, rows), labelled.oracle_labels[rows]
        expected = fit_temperature(torch.from_numpy(probs), torch.from_numpy(truth))
        assert temperatures[name] == expected == found.facts[name]["temperature"]
        assert found.facts[name]["commit"] == "a" * 40 and "temperature" not in pool.facts[name]
        tempered = apply_temperature(torch.from_numpy(pool.decode(name)), expected)
        np.testing.assert_allclose(found.decode(name), tempered, atol=HALF)
        assert found.hard_labels(name).tolist() == pool.hard_labels(name).tolist()
    assert_same_data(found, pool)


def test_a_specialist_is_calibrated_within_its_scope():
    scope = ["label-1", "label-3"]
    pool, labelled = make_pool(scope=scope), make_pool(80, seed=1, scope=scope)
    rows = np.flatnonzero(labelled.answered("t1") & np.isin(labelled.oracle_labels, [1, 3]))
    probs, truth = labelled.decode("t1", rows), labelled.oracle_labels[rows]
    expected = fit_temperature(torch.from_numpy(probs), torch.from_numpy(truth))
    free = fit_temperatures(pool, make_pool(80, seed=1))  # the scope that counts is the pool's
    assert fit_temperatures(pool, labelled)["t1"] == free["t1"] == expected
    assert expected != fit_temperatures(make_pool(), make_pool(80, seed=1))["t1"]
    few = labelled.select([*rows[:9], *np.flatnonzero(labelled.oracle_labels == 0)])
    with pytest.raises(ValueError) as error:
        calibrated_pool(pool, few)
    assert str(error.value) == (
        "Calibration of teacher 't1' needs 10 labelled examples that it answered with a label of its scope, got 9 of "
        f"{len(few)}. Label more, or leave the teacher out of the pool that is calibrated."
    )


def test_a_calibrated_pool_is_saved_and_read_like_any_other(tmp_path):
    found = calibrated_pool(make_pool(), make_pool(80, seed=1))
    found.save(tmp_path / "pool")
    again = PseudolabelPool.load(tmp_path / "pool")
    assert again.facts == found.facts and again.source == found.source
    for name in found.hierarchy.names:
        assert np.array_equal(again.decode(name), found.decode(name))


# ── neighbours ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_neighbors(num_examples: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    others = torch.stack([torch.randperm(num_examples - 1, generator=generator)[:k] for _ in range(num_examples)])
    return others + (others >= torch.arange(num_examples)[:, None]).long()


def slow_smoothing(probs: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    result = np.zeros_like(probs)
    for row in range(len(probs)):
        if probs[row].any():
            said = [probs[other] for other in (row, *neighbors[row]) if probs[other].any()]
            result[row] = np.mean(said, axis=0)
    return result


@pytest.mark.parametrize(("num_labels", "pool_k"), [(4, None), (30, None), (30, 3), (7, 1)])
def test_smoothing_equals_a_loop(num_labels, pool_k, monkeypatch):
    monkeypatch.setattr(processes, "CHUNK_ROWS", 13)  # 60 rows are five chunks
    pool, neighbors = make_pool(num_labels=num_labels, pool_k=pool_k), make_neighbors(60, 5)
    found = smoothed_pool(pool, neighbors)
    assert found.hierarchy == pool.hierarchy
    for name in pool.hierarchy.names:
        expected = slow_smoothing(pool.decode(name), neighbors.numpy())
        k = pool.label_ids(name).shape[1]
        assert found.label_ids(name).shape[1] == k
        assert found.answered(name).tolist() == pool.answered(name).tolist() and not pool.answered(name).all()
        kept = -np.sort(-expected, axis=1)[:, :k]
        np.testing.assert_allclose(found.label_probs(name).astype(np.float32), kept, atol=HALF)
        picked = np.take_along_axis(expected, found.label_ids(name).astype(np.int64), axis=1)
        np.testing.assert_allclose(picked, kept, atol=HALF)  # the right labels
    assert_same_data(found, pool)


def test_smoothing_of_whole_rows_is_the_mean_over_neighbours():
    pool, neighbors = make_pool(), make_neighbors(60, 8)
    found = smoothed_pool(pool, neighbors)
    for name in pool.hierarchy.names:
        probs, answered = torch.from_numpy(pool.decode(name)), torch.from_numpy(pool.answered(name))
        expected = mean_over_neighbors(probs, neighbors, answered[:, None].expand_as(probs)) * answered[:, None]
        np.testing.assert_allclose(found.decode(name), expected, atol=HALF)
        assert found.facts[name]["smoothed_over"] == 8


def test_smoothing_over_nobody_and_of_nothing():
    pool = make_pool()
    same = smoothed_pool(pool, torch.zeros(60, 0, dtype=torch.long))
    for name in pool.hierarchy.names:
        np.testing.assert_allclose(same.decode(name), pool.decode(name), atol=HALF)
    nothing = smoothed_pool(pool.select([]), torch.zeros(0, 3, dtype=torch.long))
    assert len(nothing) == 0 and nothing.hierarchy == pool.hierarchy


def test_smoothing_follows_ids_that_stand_in_another_order():
    pool, neighbors = make_pool(), make_neighbors(60, 4)
    mixed = pool.select(np.random.default_rng(0).permutation(60))
    teachers = {name: mixed.teachers[name] for name in pool.hierarchy.names}
    same = PseudolabelPool(pool.hierarchy, teachers, pool.inputs)
    for name in pool.hierarchy.names:
        np.testing.assert_array_equal(
            smoothed_pool(same, neighbors).decode(name), smoothed_pool(pool, neighbors).decode(name)
        )


def test_many_labels_are_never_spread_over_all_examples(monkeypatch):
    monkeypatch.setattr(processes, "CHUNK_ROWS", 10)
    pool = make_pool(40, num_labels=300, num_teachers=1)
    sizes = []
    original = derived_module.encode_top_k

    def encode(probs, k, *name):
        sizes.append(probs.shape)
        return original(probs, k, *name)

    monkeypatch.setattr(derived_module, "encode_top_k", encode)
    smoothed_pool(pool, make_neighbors(40, 5))
    assert sizes == [(10, 300)] * 4
    for method in ("mean_probs", "mean_logits", "majority_vote"):
        sizes.clear()
        aggregated_pool(pool, method)
        assert sizes == [(10, 300)] * 4, method


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(60, dtype=torch.long),
        torch.zeros(59, 2, dtype=torch.long),
        torch.zeros(60, 2),
        torch.full((60, 2), 60),
        torch.full((60, 2), -1),
    ],
)
def test_neighbours_that_are_none(wrong):
    with pytest.raises(ValueError, match=r"`neighbors` must (be rows of shape \(60, k\)|lie in 0\.\.59), got"):
        smoothed_pool(make_pool(), wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_neighbours_may_be_small_numbers(dtype):
    pool, neighbors = make_pool(), torch.tensor([[1, 0]]).repeat(60, 1)
    found, wanted = smoothed_pool(pool, neighbors.to(dtype)), smoothed_pool(pool, neighbors)
    for name in pool.hierarchy.names:
        np.testing.assert_array_equal(found.decode(name), wanted.decode(name))
    values, known = torch.rand(60, 3), torch.ones(60, 3, dtype=torch.bool)
    assert mean_over_neighbors(values, neighbors.to(dtype), known).equal(mean_over_neighbors(values, neighbors, known))
