"""Several teachers into one pseudolabel: rows worked out by hand."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from hf_cosupervise.method.aggregation import (
    AGGREGATORS,
    aggregate,
    harden,
    label_model_posteriors,
    majority_vote,
    mean_logits,
    mean_probs,
)
from hf_cosupervise.method.checks import check_labels
from hf_cosupervise.method.crowdlab import crowdlab, crowdlab_labels
from hf_cosupervise.method.label_models import make_label_model

pytestmark = pytest.mark.core

needs_crowd_kit = pytest.mark.skipif(find_spec("crowdkit") is None, reason="needs crowd-kit")


def crowd(name: str):
    def fit(labels: torch.Tensor, num_labels: int, **settings) -> torch.Tensor:
        return label_model_posteriors(make_label_model(name, **settings), labels, num_labels)

    fit.__name__ = name
    return fit


dawid_skene, glad, mace, ebcc = map(crowd, ("dawid_skene", "glad", "mace", "ebcc"))
CROWDS = (dawid_skene, pytest.param(glad, marks=needs_crowd_kit), mace, ebcc)


def run_crowd(method, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    quick = {"num_restarts": 1, "max_iterations": 25} if method is mace else {}
    return method(labels, num_labels, **quick)


def make_labels(num_examples: int, num_labels: int, accuracies: list[float], missing: float = 0.2, seed: int = 0):
    """True labels, and those of teachers who err at random and leave some examples out."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(num_labels, (num_examples,), generator=generator)
    shape = num_examples, len(accuracies)
    right = torch.rand(shape, generator=generator) < torch.tensor(accuracies)
    labels = torch.where(right, truth[:, None], torch.randint(num_labels, shape, generator=generator))
    return truth, labels.masked_fill(torch.rand(shape, generator=generator) < missing, -1)


def make_probs(num_examples: int = 40, num_teachers: int = 4, num_labels: int = 5, missing: float = 0.3):
    generator = torch.Generator().manual_seed(0)
    answered = torch.rand(num_examples, num_teachers, generator=generator) >= missing
    answered[:2] = False
    probs = (3 * torch.randn(num_examples, num_teachers, num_labels, generator=generator)).softmax(-1)
    return probs * answered.unsqueeze(-1), answered


# ── means and votes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("teachers", "answered", "expected"),
    [
        ([[1.0, 0.0], [0.5, 0.5]], [True, True], [0.75, 0.25]),
        ([[1.0, 0.0], [0.0, 0.0]], [True, False], [1.0, 0.0]),  # a missing row does not pull the mean down
        ([[0.0, 0.0], [0.0, 0.0]], [False, False], [0.0, 0.0]),
        ([[0.25, 0.75]], [True], [0.25, 0.75]),  # one teacher is itself
        ([[1.0, 0.0], [0.25, 0.75], [0.25, 0.75]], [True, True, True], [0.5, 0.5]),
    ],
)
def test_mean_probs(teachers, answered, expected):
    found = mean_probs(torch.tensor([teachers]), torch.tensor([answered]))
    assert found.tolist() == [expected]


def test_mean_probs_of_several_rows_sum_to_one_or_zero():
    generator = torch.Generator().manual_seed(0)
    answered = torch.rand(200, 3, generator=generator) < 0.6
    probs = torch.randn(200, 3, 7, generator=generator).softmax(-1) * answered.unsqueeze(-1)
    sums = mean_probs(probs, answered).sum(-1)
    torch.testing.assert_close(sums, answered.any(1).float())
    assert 0 < int(answered.any(1).sum()) < 200


@pytest.mark.parametrize(
    ("labels", "num_labels", "expected"),
    [
        ([2, 1, 2], 3, [0, 0, 1]),
        ([2, 1, 0, 3], 4, [0.25, 0.25, 0.25, 0.25]),  # a tie of all: none of them
        ([2, 1, -1], 3, [0, 0.5, 0.5]),  # a tie of two, one missing
        ([2, 2, 1, 1, 0], 3, [0, 0.5, 0.5]),
        ([-1, -1, 2], 3, [0, 0, 1]),
        ([-1, -1], 3, [0, 0, 0]),  # nobody: all zero
        ([-1, -1, 0, 1, 1], 2, [0, 1]),  # missing answers are no votes for label 0
        ([1], 2, [0, 1]),
        ([0, -1], 1, [1]),  # a task of one label
    ],
)
def test_majority_vote(labels, num_labels, expected):
    found = majority_vote(torch.tensor([labels]), num_labels)
    assert found.tolist() == [expected] and found.is_floating_point()


def test_no_examples():
    assert mean_probs(torch.zeros(0, 2, 3), torch.zeros(0, 2, dtype=torch.bool)).shape == (0, 3)
    assert majority_vote(torch.zeros(0, 2, dtype=torch.long), 3).shape == (0, 3)


def test_mean_logits_is_the_geometric_mean():
    probs, answered = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]), torch.tensor([[True, True]])
    torch.testing.assert_close(mean_logits(probs, answered), torch.tensor([[0.75, 0.25]]))  # odds: sqrt(9 * 1)
    torch.testing.assert_close(mean_probs(probs, answered), torch.tensor([[0.7, 0.3]]))
    # sixteen copies of a teacher are that teacher; a product of experts would be sure
    probs, answered = torch.tensor([[0.6, 0.4]]).repeat(1, 16, 1), torch.ones(1, 16, dtype=torch.bool)
    torch.testing.assert_close(mean_logits(probs, answered), torch.tensor([[0.6, 0.4]]))


def test_mean_logits_equals_a_slow_version():
    probs, answered = make_probs()
    probs[5, :, 0], answered[5] = 0.0, True
    probs[5, :, 1] = 1 - probs[5, :, 2:].sum(-1)
    expected = torch.zeros(40, 5)
    for row in range(40):
        logs = [probs[row, k].clamp(min=1e-3).log() for k in range(4) if answered[row, k]]
        if logs:
            expected[row] = (sum(logs) / len(logs)).softmax(-1)
    torch.testing.assert_close(mean_logits(probs, answered, min_prob=1e-3), expected)


def test_mean_logits_of_extreme_probabilities():
    hard = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    answered = torch.ones(2, 2, dtype=torch.bool)
    found = mean_logits(hard, answered)  # a veto against a veto, not NaN
    assert found[0].tolist() == [0.5, 0.5] and found[1, 1] == pytest.approx(1e-6, rel=1e-4)
    tiny = torch.tensor([[[1.0, 1e-44]]])  # a subnormal number
    torch.testing.assert_close(mean_logits(tiny, torch.tensor([[True]])), torch.tensor([[1.0, 1e-6]]))
    half = mean_logits(hard.half(), answered)
    assert half.dtype == torch.float32 and mean_logits(hard.double(), answered).dtype == torch.float64
    with pytest.raises(ValueError, match=r"`min_prob` must be in \(0, 1\), got 0"):
        mean_logits(hard, answered, min_prob=0)


def test_harden():
    probs = torch.tensor([[[0.2, 0.4, 0.4], [0.0, 0.0, 0.0], [0.1, 0.2, 0.7]]])
    assert harden(probs, torch.tensor([[True, False, True]])).tolist() == [[1, -1, 2]]


# ── the door ────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_crowd_kit
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_name_gives_rows_that_sum_to_one_or_zero(name):
    probs, answered = make_probs()
    found = aggregate(probs, answered, name)
    torch.testing.assert_close(found.sum(-1), answered.any(1).float())
    assert aggregate(probs[:0], answered[:0], name).shape == (0, 5)


@needs_crowd_kit
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_name_survives_what_is_unusual(name):
    one_row = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.0, 0.0]]])
    answered = torch.tensor([[True, True, True, False]])  # two labels, one example, a teacher that never answers
    assert aggregate(one_row, answered, name).argmax().item() == 0
    hard = torch.nn.functional.one_hot(torch.tensor([[3, 3, 3], [1, 1, 1]]), 5).float()  # labels nobody names
    found = aggregate(hard, torch.ones(2, 3, dtype=torch.bool), name)
    assert found.argmax(1).tolist() == [3, 1] and float(found.min()) >= 0
    uniform = torch.full((4, 3, 5), 0.2)
    torch.testing.assert_close(aggregate(uniform, torch.ones(4, 3, dtype=torch.bool), name).sum(1), torch.ones(4))
    tiny = torch.tensor([[[1.0, 1e-42, 0.0]] * 3] * 2)
    assert aggregate(tiny, torch.ones(2, 3, dtype=torch.bool), name).argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["mean_probs", "mean_logits", "majority_vote"])
def test_one_teacher_is_itself(name):
    probs, answered = make_probs(num_teachers=1)
    found = aggregate(probs, answered, name)
    expected = probs[:, 0] if name != "majority_vote" else majority_vote(harden(probs, answered), 5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)  # probabilities are clamped


@pytest.mark.parametrize("name", ["mean_probs", "mean_logits", "majority_vote"])
def test_order_and_copies_of_teachers_and_order_of_examples_change_nothing(name):
    probs, answered = make_probs()
    expected = aggregate(probs, answered, name)
    teachers, examples = torch.tensor([2, 0, 3, 1]), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(aggregate(probs[:, teachers], answered[:, teachers], name), expected)
    torch.testing.assert_close(aggregate(probs[examples], answered[examples], name), expected[examples])
    twice = aggregate(probs.repeat(1, 2, 1), answered.repeat(1, 2), name)
    torch.testing.assert_close(twice, expected)


def test_a_function_of_ones_own():
    probs, answered = make_probs()
    torch.testing.assert_close(aggregate(probs, answered, lambda p, a: p[:, 0]), probs[:, 0])


def spoil(probs: torch.Tensor, value: float) -> torch.Tensor:
    probs = probs.clone()
    probs[7, 2, 0] = value
    return probs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 3.0])
def test_teachers_that_are_no_probabilities_are_refused(value):
    probs, answered = make_probs(missing=0.0)
    with pytest.raises(ValueError, match="example 7, teacher 2 sums to .* set the row to 0 and `answered` to False"):
        aggregate(spoil(probs, value), answered, "mean_probs")


def test_a_missing_row_and_a_missing_mark_must_agree():
    probs, answered = torch.zeros(1, 2, 2), torch.tensor([[True, False]])
    probs[:, :, 0] = 1.0
    with pytest.raises(ValueError, match="example 0, teacher 1 sums to 1 with `answered=False`"):
        aggregate(probs, answered, "mean_probs")
    with pytest.raises(ValueError, match="example 0, teacher 0 sums to 0 with `answered=True`"):
        aggregate(torch.zeros(1, 2, 2), answered, "mean_probs")
    for wrong in (answered[0], answered.float(), answered[:, :1]):
        with pytest.raises(ValueError, match="boolean `answered` of shape"):
            aggregate(probs, wrong, "mean_probs")
    with pytest.raises(ValueError, match="needs a teacher and a label"):
        aggregate(torch.zeros(3, 0, 2), torch.zeros(3, 0, dtype=torch.bool), "mean_probs")
    with pytest.raises(ValueError, match="Unknown `method` 'mean'. Choose one of mean_probs, mean_logits, "):
        aggregate(probs, answered, "mean")


def my_vote(result):
    def my_vote(probs, answered):
        return result

    return my_vote


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "`my_vote` must return a tensor of shape (2, 3), got NoneType."),
        (torch.ones(3, 2), ValueError, "`my_vote` must return shape (num_examples, num_labels) = (2, 3), got (3, 2)."),
        (torch.ones(2, 3), ValueError, "`my_vote` must return probabilities, each row with sum 1 or all zero: row 0"),
        (torch.tensor([[1.0, 0, 0], [1.5, -0.5, 0]]), ValueError, "row 1 sums to 1, its smallest value is -0.5"),
        (torch.tensor([[1.0, 0, 0], [torch.nan, 0, 0]]), ValueError, "row 1 sums to nan"),
    ],
)
def test_a_result_that_is_none_is_refused_by_name(result, error, message):
    probs, answered = make_probs(num_examples=2, num_labels=3)
    with pytest.raises(error) as caught:
        aggregate(probs, answered, my_vote(result))
    assert message in str(caught.value)


# ── crowds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_dawid_skene(labels: list[list[int]], num_labels: int, iterations: int) -> np.ndarray:
    """EM from vote shares, one number at a time."""
    num_teachers = len(labels[0])
    rows = [i for i, row in enumerate(labels) if max(row) >= 0]
    q = np.zeros((len(labels), num_labels))
    for i in rows:
        votes = [label for label in labels[i] if label >= 0]
        for label in votes:
            q[i, label] += 1 / len(votes)
    for _ in range(iterations):
        prior = [max(sum(q[i, c] for i in rows) / len(rows), 1e-10) for c in range(num_labels)]
        confusion = {}
        for k in range(num_teachers):
            said = sorted({labels[i][k] for i in rows if labels[i][k] >= 0})
            for c in range(num_labels):
                counts = {s: max(sum(q[i, c] for i in rows if labels[i][k] == s), 1e-10) for s in said}
                for s in said:
                    confusion[k, s, c] = counts[s] / sum(counts.values())
        for i in rows:
            joint = np.array(prior)
            for k in range(num_teachers):
                if labels[i][k] >= 0:
                    joint *= [confusion[k, labels[i][k], c] for c in range(num_labels)]
            q[i] = joint / joint.sum()
    return q


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_dawid_skene_equals_a_slow_em(iterations):
    _, labels = make_labels(60, 4, [0.9, 0.6, 0.5, 0.7])
    labels[3] = -1
    found = dawid_skene(labels, 4, max_iterations=iterations, tolerance=-float("inf"))
    np.testing.assert_allclose(found, slow_dawid_skene(labels.tolist(), 4, iterations), atol=1e-6)


def slow_mace(labels: list[list[int]], num_labels: int, iterations: int, restarts: int, seed: int) -> np.ndarray:
    """Variational EM with parameters by teacher and by label."""
    from scipy.special import digamma

    random = np.random.RandomState(seed)
    teachers = [k for k in range(len(labels[0])) if any(row[k] >= 0 for row in labels)]
    answers = [(k, i, row[k]) for k in teachers for i, row in enumerate(labels) if row[k] >= 0]
    order = sorted({label for _, _, label in answers})
    best, result = -np.inf, np.zeros((len(labels), num_labels))
    for _ in range(restarts):
        knows = 1 + 1.5 * random.uniform(size=(len(teachers), 2))
        says = 1 + 1.5 * random.uniform(size=(len(teachers), len(order)))
        knows, says = knows / knows.sum(1, keepdims=True), says / says.sum(1, keepdims=True)
        for step in range(iterations + 1):
            joint = np.full((len(labels), len(order)), 1 / len(order))
            for k, i, label in answers:
                for c, name in enumerate(order):
                    joint[i, c] *= knows[teachers.index(k), 0] * says[teachers.index(k), order.index(label)] + (
                        knows[teachers.index(k), 1] if name == label else 0
                    )
            total = joint.sum(1)
            if step == iterations:
                break
            new_knows, new_says = np.full(knows.shape, 0.5), np.full(says.shape, 10.0)
            for k, i, label in answers:
                j, a = teachers.index(k), order.index(label)
                guess, known = knows[j, 0] * says[j, a], knows[j, 1]
                spam = sum(joint[i, c] * guess / (guess + known * (c == a)) for c in range(len(order))) / total[i]
                new_knows[j] += [spam, joint[i, a] * known / (guess + known) / total[i]]
                new_says[j, a] += spam
            knows = np.exp(digamma(new_knows) - digamma(new_knows.sum(1, keepdims=True)))
            says = np.exp(digamma(new_says) - digamma(new_says.sum(1, keepdims=True)))
        rows = [i for i, row in enumerate(labels) if max(row) >= 0]
        likelihood = np.log(total[rows] + 1e-8).sum()
        if likelihood > best:
            best = likelihood
            for i in rows:
                result[i, order] = joint[i] / total[i]
    return result


@needs_crowd_kit
@pytest.mark.parametrize(("iterations", "restarts"), [(1, 1), (6, 1), (3, 4)])
def test_mace_equals_a_slow_em(iterations, restarts):
    _, labels = make_labels(30, 4, [0.9, 0.6, 0.3, 0.7], seed=2)
    labels[:3, 0], labels[3], labels[:, 1] = torch.tensor([2, -1, 0]), -1, labels[:, 1].clamp(max=2)
    found = mace(labels, 5, max_iterations=iterations, num_restarts=restarts, seed=3)
    expected = slow_mace(labels.tolist(), 5, iterations, restarts, seed=3)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_restarts_of_mace_are_not_all_the_same():
    _, labels = make_labels(30, 4, [0.5, 0.4, 0.3, 0.4], seed=2)
    found = [mace(labels, 4, max_iterations=2, num_restarts=n, seed=0) for n in (1, 8, 8)]
    assert not torch.allclose(found[0], found[1]) and torch.equal(found[1], found[2])


def slow_glad(labels: list[list[int]], num_labels: int, iterations: int) -> np.ndarray:
    """EM with the same conjugate gradients on a function and a gradient written anew."""
    from scipy.optimize import minimize

    examples = [i for i, row in enumerate(labels) if max(row) >= 0]
    answers = [
        (k, n, labels[i][k]) for n, i in enumerate(examples) for k in range(len(labels[0])) if labels[i][k] >= 0
    ]
    num_teachers = len(labels[0])

    def posteriors(x):
        logs = np.zeros((len(examples), num_labels))
        for k, n, label in answers:
            right = 1 / (1 + np.exp(-x[k] * np.exp(x[num_teachers + n])))
            logs[n] += np.log((1 - right) / (num_labels - 1))
            logs[n, label] += np.log(right) - np.log((1 - right) / (num_labels - 1))
        exped = np.exp(logs - logs.max(1, keepdims=True))
        return exped / exped.sum(1, keepdims=True)

    def loss(x, q):
        value, gradient = 0.5 * ((x - 1) ** 2).sum() + len(x) * 0.5 * np.log(2 * np.pi), x - 1
        for k, n, label in answers:
            ease = np.exp(x[num_teachers + n])
            right = 1 / (1 + np.exp(-x[k] * ease))
            hit = q[n, label]
            value -= hit * np.log(right) + (1 - hit) * np.log((1 - right) / (num_labels - 1))
            gradient[k] -= (hit - right) * ease
            gradient[num_teachers + n] -= (hit - right) * x[k] * ease
        return value, gradient

    x = np.ones(num_teachers + len(examples))
    for _ in range(iterations - 1):
        q = posteriors(x)
        x = minimize(loss, x, args=(q,), jac=True, method="CG", tol=1e-2, options={"maxiter": 25}).x
    result = np.zeros((len(labels), num_labels))
    result[examples] = posteriors(x)
    return result


@needs_crowd_kit
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_glad_equals_a_slow_em(iterations):
    _, labels = make_labels(25, 3, [0.9, 0.6, 0.4, 0.7])
    labels[3] = -1
    found = glad(labels, 3, max_iterations=iterations, tolerance=-float("inf"))
    np.testing.assert_allclose(found, slow_glad(labels.tolist(), 3, iterations), atol=1e-5)


@needs_crowd_kit
@pytest.mark.parametrize(
    ("num_labels", "missing", "iterations"), [(2, 0.0, 100), (5, 0.3, 100), (5, 0.6, 3), (9, 0.2, 1)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The given NumPy array is not writable")
def test_glad_equals_crowd_kit(num_labels, missing, iterations):
    import pandas
    from crowdkit.aggregation import GLAD

    _, labels = make_labels(150, num_labels, [0.9, 0.3, 0.6, 0.7, 0.1], missing, seed=num_labels)
    examples, teachers = torch.nonzero(labels >= 0, as_tuple=True)
    frame = {"task": examples, "worker": teachers, "label": labels[examples, teachers]}
    reference = GLAD(n_iter=iterations).fit_predict_proba(pandas.DataFrame(frame))
    expected = torch.zeros(150, num_labels, dtype=torch.float64)
    expected[reference.index.to_numpy()[:, None], reference.columns.to_numpy()] = torch.tensor(reference.to_numpy())
    found = glad(labels, num_labels, max_iterations=iterations)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", CROWDS)
def test_crowds_do_not_depend_on_order(method):
    truth, labels = make_labels(80, 3, [0.9, 0.7, 0.5, 0.7])
    expected = run_crowd(method, labels, 3)
    teachers, examples = torch.tensor([2, 0, 3, 1]), torch.randperm(80, generator=torch.Generator().manual_seed(1))
    names = torch.tensor([2, 0, 1])
    renamed = torch.where(labels >= 0, names[labels.clamp(min=0)], -1)
    # the starts of MACE are drawn for one order, so that another ends close by
    close = {"atol": 0.05 if method is mace else 2e-3, "rtol": 0.0}
    torch.testing.assert_close(run_crowd(method, labels[:, teachers], 3), expected, **close)
    torch.testing.assert_close(run_crowd(method, labels[examples], 3), expected[examples], **close)
    torch.testing.assert_close(run_crowd(method, renamed, 3)[:, names], expected, **close)
    assert (expected.argmax(1) == truth).float().mean() > 0.8


@pytest.mark.parametrize("method", CROWDS)
def test_crowds_with_gaps(method):
    _, labels = make_labels(40, 3, [0.9, 0.7, 0.6])
    labels[5] = -1
    labels *= torch.where(labels > 0, 2, 1)  # labels 0, 2 and 4 of six
    expected = run_crowd(method, labels, 6)
    assert expected[5].tolist() == [0] * 6 and expected[:, [1, 3, 5]].abs().sum() == 0
    silent = torch.cat([labels[:, :2], torch.full((40, 1), -1), labels[:, 2:]], dim=1)
    torch.testing.assert_close(run_crowd(method, silent, 6), expected, atol=1e-5, rtol=0)
    everyone = run_crowd(method, torch.full((4, 3), 2), 5)
    assert everyone.tolist() == [[0, 0, 1, 0, 0]] * 4
    assert run_crowd(method, torch.full((4, 3), -1), 5).tolist() == [[0] * 5] * 4
    assert run_crowd(method, labels[:0], 6).shape == (0, 6)


@pytest.mark.parametrize("method", CROWDS)
def test_crowds_refuse_fewer_than_three(method):
    message = f"`{method.__name__}` needs at least three teachers that answered, got 2: .*Use `mean_probs`"
    with pytest.raises(ValueError, match=message):
        method(torch.tensor([[0, 1, -1], [0, 0, -1]]), 2)
    with pytest.raises(ValueError, match="got 1"):
        method(torch.tensor([[0], [1]]), 2)
    setting = "num_restarts" if method is ebcc else "max_iterations"
    with pytest.raises(ValueError, match=f"`{setting}` must be at least 1, got 0"):
        method(torch.tensor([[0, 1, 1]]), 2, **{setting: 0})


def test_only_glad_needs_crowd_kit_and_says_what_to_install(monkeypatch):
    for module in ("crowdkit", "scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'Run `pip install "hf_cosupervise\[crowd\]"`'):
        glad(torch.tensor([[0, 1, 1]]), 2)
    for method in (dawid_skene, mace, ebcc):
        assert method(torch.tensor([[0, 1, 1]] * 3), 2).argmax(1).tolist() == [1] * 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0.0, 1.0]]), "whole numbers of shape"),
        (torch.tensor([0, 1]), "whole numbers of shape"),
        (torch.tensor([[0, 3]]), r"must be in \[0, 3\), or -1 where there is no answer, got values from 0 to 3"),
        (torch.tensor([[0, -2]]), "got values from -2 to 0"),
    ],
)
def test_labels_are_checked(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3)


# ── CROWDLAB ────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_crowdlab(missing: float = 0.4, num_labels: int = 4, seed: int = 0):
    truth, labels = make_labels(120, num_labels, [0.9, 0.5, 0.7, 0.3], missing, seed)
    noise = torch.randn(120, num_labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return labels, (noise + 1.5 * torch.nn.functional.one_hot(truth, num_labels)).softmax(-1)


def slow_posteriors(labels, p, consensus):
    """The formula with loops, rows without answers out of all of it."""
    num_labels = p.shape[1]
    rows = [i for i, row in enumerate(labels) if max(row) >= 0]
    said = {i: [(j, label) for j, label in enumerate(labels[i]) if label >= 0] for i in rows}
    several = [i for i in rows if len(said[i]) > 1]
    mean_agreement = np.mean([np.mean([label == consensus[i] for _, label in said[i]]) for i in several])
    common = np.bincount([consensus[i] for i in several]).argmax()
    base = max(np.mean([consensus[i] != common for i in several]), 1e-6)
    errors = {}
    for j in range(len(labels[0])):
        pairs = [other != labels[i][j] for i in rows for m, other in said[i] if labels[i][j] >= 0 and m != j]
        if pairs:
            errors[j] = np.mean(pairs)
    weights = [max(1e-6, 1 - errors.get(j, np.mean(list(errors.values()))) / base) for j in range(len(labels[0]))]
    student = max(1e-6, 1 - np.mean([p[i].argmax() != consensus[i] for i in several]) / base)
    student *= np.sqrt(np.mean([len(said[i]) for i in rows]))
    posteriors = np.zeros_like(p)
    for i in rows:
        for c in range(num_labels):
            posteriors[i, c] = student * p[i, c]
            for j, label in said[i]:
                likelihood = mean_agreement if label == c else (1 - mean_agreement) / (num_labels - 1)
                posteriors[i, c] += weights[j] * likelihood
        posteriors[i] /= posteriors[i].sum()
    return posteriors


def slow_crowdlab(labels, p):
    counts = np.array([np.bincount([label for label in row if label >= 0], minlength=p.shape[1]) for row in labels])
    majority = []
    for i, row in enumerate(counts):
        tied = [c for c in range(p.shape[1]) if row[c] == row.max()]
        majority.append(min(tied, key=lambda c: (-p[i, c], counts[:, c].sum(), c)))
    return slow_posteriors(labels, p, slow_posteriors(labels, p, majority).argmax(1))


@pytest.mark.parametrize(("missing", "num_labels"), [(0.0, 4), (0.4, 4), (0.7, 3), (0.4, 2)])
def test_crowdlab_equals_the_formula(missing, num_labels):
    labels, p = make_crowdlab(missing, num_labels)
    found = crowdlab(labels, p)
    np.testing.assert_allclose(found, slow_crowdlab(labels.tolist(), p.numpy()), atol=1e-12)
    torch.testing.assert_close(found.sum(1), (labels >= 0).any(1).double())


@pytest.mark.skipif(find_spec("cleanlab") is None, reason="needs cleanlab")
@pytest.mark.parametrize(("missing", "seed"), [(0.0, 0), (0.4, 1), (0.6, 2), (0.7, 3)])
def test_crowdlab_equals_cleanlab_where_cleanlab_works(missing, seed):
    from cleanlab.multiannotator import get_label_quality_multiannotator

    labels, p = make_crowdlab(missing, seed=seed)
    some = (labels >= 0).any(1)
    labels, p = labels[some], p[some]
    given = np.where(labels >= 0, labels, np.nan)
    reference = get_label_quality_multiannotator(given, p.numpy(), verbose=False)
    found, consensus = crowdlab(labels, p), reference["label_quality"]["consensus_label"].to_numpy()
    quality = reference["label_quality"]["consensus_quality_score"].to_numpy()
    assert crowdlab_labels(labels, p).tolist() == consensus.tolist()
    np.testing.assert_allclose(found.numpy()[np.arange(len(found)), consensus], quality, atol=1e-12)
    said = np.where(labels >= 0, found.gather(1, labels.clamp(min=0)), np.nan)
    np.testing.assert_allclose(said, reference["detailed_label_quality"].to_numpy(), atol=1e-12)


def test_crowdlab_with_a_silent_teacher_and_a_silent_example():
    labels, p = make_crowdlab()
    some = (labels >= 0).any(1)
    wider = torch.cat([labels, torch.full((120, 1), -1)], dim=1)
    found = crowdlab(wider, p)
    torch.testing.assert_close(found[some], crowdlab(labels[some], p[some]))
    assert not some.all() and found[~some].abs().sum() == 0
    lonely = torch.cat([labels, torch.full((120, 1), -1)], dim=1)
    lonely[~some, -1] = 1  # meets nobody: counts as the mean of the others
    np.testing.assert_allclose(crowdlab(lonely, p), slow_crowdlab(lonely.tolist(), p.numpy()), atol=1e-12)


def test_crowdlab_does_not_depend_on_order():
    labels, p = make_crowdlab()
    expected, examples = crowdlab(labels, p), torch.randperm(120, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(crowdlab(labels[:, [2, 0, 3, 1]], p), expected)
    torch.testing.assert_close(crowdlab(labels[examples], p[examples]), expected[examples])


def test_crowdlab_refuses_what_it_cannot_use():
    labels, p = make_crowdlab()
    with pytest.raises(ValueError, match="needs an example that two teachers answered"):
        crowdlab(labels[:, :1], p)
    with pytest.raises(ValueError, match="one row for each of `labels`, got "):
        crowdlab(labels, p[:5])
    for wrong in (p * 2, torch.full_like(p, torch.nan)):
        with pytest.raises(ValueError, match="Give softmax outputs, not logits"):
            crowdlab(labels, wrong)
    assert crowdlab(labels[:0], p[:0]).shape == (0, 4)
    assert crowdlab(torch.full((2, 3), -1), p[:2]).abs().sum() == 0
    assert crowdlab(labels, p.float()).dtype == torch.float32
