"""Weights for teachers: rows worked out by hand, slow versions, and what must not change them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hf_cosupervise.method.aekd import AdaptiveEnsembleDistillation, aekd_weights
from hf_cosupervise.method.aggregation import mean_probs
from hf_cosupervise.method.min_norm import min_norm_weights
from hf_cosupervise.method.raven import fit_raven
from hf_cosupervise.method.weighting import boosting_weights, weighted_mean_probs, weighted_vote


def make_probs(num_examples: int = 40, num_teachers: int = 4, num_labels: int = 3, missing: float = 0.3):
    generator = torch.Generator().manual_seed(0)
    answered = torch.rand(num_examples, num_teachers, generator=generator) >= missing
    answered[3] = False
    probs = (2 * torch.randn(num_examples, num_teachers, num_labels, generator=generator)).softmax(-1)
    return probs * answered.unsqueeze(-1), answered


# ── means and votes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_weighted_mean_probs():
    probs, answered = make_probs()
    torch.testing.assert_close(
        weighted_mean_probs(probs, answered, torch.full((4,), 0.3)), mean_probs(probs, answered)
    )
    weights = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(40, 3)
    for row in range(40):
        total = sum(float(weights[row, k]) for k in range(4) if answered[row, k])
        for k in range(4):
            if answered[row, k]:
                expected[row] += weights[row, k] / total * probs[row, k]
    torch.testing.assert_close(weighted_mean_probs(probs, answered, weights), expected)
    only_first = weighted_mean_probs(probs, answered, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(only_first, probs[:, 0])  # all zero where only teachers of weight 0 answered


def test_weighted_vote_is_the_mean_of_one_hot_rows():
    labels = torch.randint(-1, 5, (30, 4), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 5) * (labels >= 0).unsqueeze(-1).float()
    torch.testing.assert_close(weighted_vote(labels, weights, 5), weighted_mean_probs(one_hot, labels >= 0, weights))
    assert weighted_vote(labels[:0], weights, 5).shape == (0, 5)
    for wrong in (weights[:3], -weights, weights * torch.nan):
        with pytest.raises(ValueError, match=r"`weights` of shape \(4,\), each at least 0"):
            weighted_vote(labels, wrong, 5)


# ── boosting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_boosting(labels: list[list[int]], truth: list[int], num_labels: int) -> list[float]:
    left, alphas, weights = set(range(len(labels[0]))), [0.0] * len(labels[0]), [1.0] * len(labels)
    while left:
        errors = {}
        for k in sorted(left):
            rows = [i for i, row in enumerate(labels) if row[k] >= 0]
            if rows:
                wrong = sum(weights[i] for i in rows if labels[i][k] != truth[i])
                errors[k] = max(wrong / sum(weights[i] for i in rows), 1 / (2 * len(rows)))
        if not errors or min(errors.values()) >= 1 - 1 / num_labels:
            return alphas
        best = min(errors, key=errors.get)
        odds = (1 - errors[best]) / errors[best] * (num_labels - 1)
        alphas[best] = math.log(odds) * (0.5 if num_labels == 2 else 1)
        for i, row in enumerate(labels):
            if row[best] >= 0:
                weights[i] *= odds ** (-0.5 if row[best] == truth[i] else 0.5)
        left.remove(best)
    return alphas


def make_labelled(num_labels: int, missing: float, num_examples: int = 60):
    generator = torch.Generator().manual_seed(num_labels)
    truth = torch.randint(num_labels, (num_examples,), generator=generator)
    right = torch.rand(num_examples, 5, generator=generator) < torch.tensor([0.3, 0.9, 0.6, 0.5, 0.7])
    labels = torch.where(right, truth[:, None], torch.randint(num_labels, (num_examples, 5), generator=generator))
    return labels.masked_fill(torch.rand(num_examples, 5, generator=generator) < missing, -1), truth


@pytest.mark.parametrize(("num_labels", "missing"), [(2, 0.0), (2, 0.4), (4, 0.0), (4, 0.4)])
def test_boosting_equals_a_slow_version(num_labels, missing):
    labels, truth = make_labelled(num_labels, missing)
    found = boosting_weights(labels, truth, num_labels)
    assert found.tolist() == pytest.approx(slow_boosting(labels.tolist(), truth.tolist(), num_labels), abs=1e-12)
    teachers, examples = torch.tensor([3, 0, 4, 1, 2]), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(boosting_weights(labels[examples], truth[examples], num_labels), found)
    torch.testing.assert_close(boosting_weights(labels[:, teachers], truth, num_labels), found[teachers])


def test_two_rounds_of_boosting_by_hand():
    truth = torch.tensor([0] * 5 + [1] * 5)
    first, second = truth.clone(), truth.clone()
    first[0] = 1  # e = 1/10; afterwards the wrong one weighs 1/2, the nine others 1/18 each
    second[1:4] = 1  # e = 3/18
    found = boosting_weights(torch.stack([second, first], dim=1), truth, 2)
    assert found.tolist() == pytest.approx([math.log(5) / 2, math.log(9) / 2])
    with pytest.warns(UserWarning, match=r"1 of 3 labels have no labelled example \(2\)"):
        three = boosting_weights(first[:, None], truth, 3)
    assert three.tolist() == pytest.approx([math.log(9) + math.log(2)])


@pytest.mark.filterwarnings("ignore:.*labels have no labelled example")
def test_a_perfect_a_chance_and_a_silent_teacher():
    truth = torch.arange(12) % 2
    silent, wrong = torch.full((12,), -1), 1 - truth
    found = boosting_weights(torch.stack([wrong, truth, silent, truth], dim=1), truth, 2)
    perfect = math.log(23) / 2  # e is taken as 1/24
    assert found.tolist() == pytest.approx([0, perfect, 0, perfect])
    once = silent.clone()
    once[0] = truth[0]  # right once: e is taken as 1/2, which is chance
    assert boosting_weights(torch.stack([truth, once], dim=1), truth, 2)[1] == 0
    with pytest.raises(ValueError, match="No teacher is better than chance on the 12 labelled examples"):
        boosting_weights(torch.stack([wrong, silent], dim=1), truth, 2)


def test_labelled_sets_that_do_not_do():
    labels, truth = make_labelled(4, 0.0)
    with pytest.raises(ValueError, match=r"10 labelled examples \(`min_examples`\), got 4 and 9"):
        boosting_weights(labels[:9], truth[:9], 4)
    with pytest.raises(ValueError, match="Labels must be label ids of shape"):
        boosting_weights(labels, truth[:9], 4)
    with pytest.raises(ValueError, match=r"Labels must lie in 0..3, got -1\.\."):
        boosting_weights(labels, truth - 1, 4)
    with pytest.warns(UserWarning, match=r"2 of 6 labels have no labelled example \(4, 5\)"):
        boosting_weights(labels, truth, 6)


# ── AE-KD ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_gradients(num_teachers: int, num_directions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, num_directions, generator=generator, dtype=torch.float64)
    return shared + torch.randn(num_teachers, num_directions, generator=generator, dtype=torch.float64)


def assert_is_optimal(gradients: torch.Tensor, weights: torch.Tensor, cap: float, tolerance: float = 1e-7) -> None:
    """No mass can move from one teacher to another and shorten the sum."""
    assert float(weights.min()) >= 0 and float(weights.max()) <= cap + 1e-12
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)
    slopes = gradients @ (weights @ gradients) / gradients.square().sum().clamp(min=1e-300)
    givers, takers = slopes[weights > 1e-9], slopes[weights < cap - 1e-9]
    if len(givers) and len(takers):
        assert float(givers.max() - takers.min()) <= tolerance


@pytest.mark.parametrize("cap", [1.0, 0.6, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_two_teachers_have_a_closed_form(seed, cap):
    first, second = gradients = make_gradients(2, 3, seed)
    share = float((second @ (second - first)) / (first - second).square().sum())
    expected = min(max(share, 1 - cap), cap)
    assert min_norm_weights(gradients, cap).tolist() == pytest.approx([expected, 1 - expected], abs=1e-8)


@pytest.mark.parametrize("cap", [1.0, 0.6, 0.4])
def test_min_norm_equals_a_grid(cap):
    steps = 60
    for seed in range(5):
        gradients = make_gradients(3, 3, seed)
        grid = [
            torch.tensor([a, b, steps - a - b], dtype=torch.float64) / steps
            for a, b in itertools.product(range(steps + 1), repeat=2)
            if a + b <= steps and max(a, b, steps - a - b) <= cap * steps + 1e-9
        ]
        best = min(float((weights @ gradients).norm()) for weights in grid)
        found = float((min_norm_weights(gradients, cap) @ gradients).norm())
        assert best - 0.1 <= found <= best + 1e-9


@pytest.mark.parametrize(
    ("num_teachers", "num_directions", "cap"), [(3, 5, 0.6), (6, 4, 0.3), (16, 10, 0.2), (9, 30, 1)]
)
def test_min_norm_equals_a_general_solver(num_teachers, num_directions, cap):
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(5):
        gradients = make_gradients(num_teachers, num_directions, seed)
        found = min_norm_weights(gradients, cap)
        gram = (gradients @ gradients.T).numpy()
        reference = optimize.minimize(
            lambda w, gram=gram: w @ gram @ w,
            np.full(num_teachers, 1 / num_teachers),
            jac=lambda w, gram=gram: 2 * gram @ w,
            bounds=[(0, cap)] * num_teachers,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert float((found @ gradients).square().sum()) <= reference.fun + 1e-8 * np.trace(gram)
        assert_is_optimal(gradients, found, cap)


@pytest.mark.parametrize("num_teachers", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("cap", [1.0, 0.6, 0.5, 0.34, 1 / 3, 0.2, 0.0])
def test_no_mass_can_move(num_teachers, cap):
    cap = max(cap, 1 / num_teachers)
    for seed in range(40):
        # few directions and whole numbers: equal teachers, opposite ones, zeros, many optima
        gradients = make_gradients(num_teachers, 1 + seed % 4, seed).round()
        assert_is_optimal(gradients, min_norm_weights(gradients, cap), cap)
        assert_is_optimal(gradients * 1e-9, min_norm_weights(gradients * 1e-9, cap), cap)


def test_shares_do_not_depend_on_order_or_scale_and_equal_teachers_share_alike():
    gradients = make_gradients(5, 3, 0)
    gradients[3] = gradients[1]
    found, order = min_norm_weights(gradients), torch.tensor([4, 1, 0, 2, 3])
    torch.testing.assert_close(min_norm_weights(gradients[order]), found[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(min_norm_weights(gradients * 1e-30), found, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], found[3], atol=1e-5, rtol=0)
    torch.testing.assert_close(min_norm_weights(torch.zeros(4, 2)), torch.full((4,), 0.25, dtype=torch.float64))
    thirds = min_norm_weights(make_gradients(3, 4, 0), cap=1 / 3)
    torch.testing.assert_close(thirds, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert min_norm_weights(torch.ones(1, 2), cap=0.6).tolist() == [1.0]


def test_gradients_that_do_not_do():
    with pytest.raises(ValueError, match=r"`cap` must be in \[1/3, 1\] for 3 teachers, .* got 0.3"):
        min_norm_weights(torch.ones(3, 2), cap=0.3)
    with pytest.raises(ValueError, match="got 1.5"):
        min_norm_weights(torch.ones(3, 2), cap=1.5)
    for wrong in (torch.ones(2), torch.ones(0, 2), torch.tensor([[1.0, torch.nan]])):
        with pytest.raises(ValueError, match="Expected finite `gradients`"):
            min_norm_weights(wrong)


def test_aekd_weights_come_from_gradients_of_the_distillation_loss():
    probs, answered = make_probs()
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradients = []
    for k in range(4):
        rows = answered[:, k].nonzero().flatten()
        loss = 0.0
        for row in rows:
            teacher = (probs[row, k].log() / 4).softmax(-1)
            loss = loss + 16 * (teacher * (teacher.log() - (logits[row] / 4).log_softmax(-1))).sum() / len(rows)
        gradients.append(torch.autograd.grad(loss, logits)[0].sum(0))  # already divided by the number of examples
    expected = min_norm_weights(torch.stack(gradients)).float()
    found = aekd_weights(logits, probs, answered)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not found.requires_grad and int((found > 0).sum()) > 1 and float(found.max()) <= 0.6 + 1e-6


def test_aekd_weights_of_a_batch_that_some_or_all_left_out():
    probs, answered = make_probs()
    logits = torch.zeros(40, 3)
    expected = aekd_weights(logits, probs[:, :3], answered[:, :3])
    probs[:, 3], answered[:, 3] = 0.0, False
    found = aekd_weights(logits, probs, answered)
    torch.testing.assert_close(found[:3], expected)
    assert found[3] == 0
    probs[:, 1:], answered[:, 1:] = 0.0, False
    assert aekd_weights(logits, probs, answered).tolist() == [1, 0, 0, 0]
    assert aekd_weights(logits[3:4], probs[3:4], answered[3:4]).tolist() == [0, 0, 0, 0]
    hard = torch.eye(3)[None].repeat(2, 1, 1)
    found = aekd_weights(torch.zeros(2, 3), hard, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(found, torch.full((3,), 1 / 3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"Expected `student_logits` of shape \(40, 3\)"):
        aekd_weights(logits[:, :2], probs, answered)
    with pytest.raises(ValueError, match="NaN is not an answer"):
        aekd_weights(logits, probs * torch.nan, answered)


def slow_distillation(logits, probs, answered, temperature, weights):
    """The loss of each example, one teacher at a time."""
    losses = []
    for row in range(len(logits)):
        loss = logits[row].sum() * 0
        for k in range(probs.shape[1]):
            if answered[row, k]:
                teacher = (probs[row, k].clamp(min=1e-6).log() / temperature).softmax(-1)
                divergence = (teacher * (teacher.log() - (logits[row] / temperature).log_softmax(-1))).sum()
                loss = loss + weights[k] * temperature**2 * divergence
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize(("temperature", "cap", "hard"), [(4.0, 0.6, False), (1.0, 1.0, False), (2.0, 0.3, True)])
def test_distillation_equals_a_slow_version_and_so_does_its_gradient(temperature, cap, hard):
    probs, answered = make_probs()
    if hard:
        probs = torch.nn.functional.one_hot(probs.argmax(-1), 3) * answered[..., None].float()
    rows = torch.tensor([17, 3, 0, 29, 8, 11, 35])  # nobody answered row 3
    loss = AdaptiveEnsembleDistillation(probs, answered, temperature=temperature, cap=cap)
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = aekd_weights(logits, probs[rows], answered[rows], temperature=temperature, cap=cap)
    assert int((weights > 0).sum()) > 1
    found, expected = (
        loss(logits, None, rows),
        slow_distillation(logits, probs[rows], answered[rows], temperature, weights),
    )
    assert found.shape == (7,) and found[1] == 0 and float(found.detach().min()) > -1e-6
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    scale = torch.rand(7, generator=torch.Generator().manual_seed(2))
    ours, slow = (torch.autograd.grad((values * scale).sum(), logits)[0] for values in (found, expected))
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-4)
    # T sum_m w_m (softmax(s / T) - softmax(t_m / T)), the weights held fast
    by_hand = torch.zeros(7, 3)
    for k in range(4):
        teacher = (probs[rows, k].clamp(min=1e-6).log() / temperature).softmax(-1)
        pull = (logits.detach() / temperature).softmax(-1) - teacher
        by_hand += temperature * weights[k] * pull * answered[rows, k, None]
    torch.testing.assert_close(ours, by_hand * scale[:, None], atol=1e-5, rtol=1e-4)


def test_distillation_of_one_teacher_is_plain_distillation():
    probs, answered = make_probs(num_teachers=1, missing=0.0)
    loss = AdaptiveEnsembleDistillation(probs, answered, temperature=1.0)
    logits, rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), torch.arange(40)
    expected = (probs[:, 0] * (probs[:, 0].log() - logits.log_softmax(-1))).sum(-1)
    expected[3] = 0  # has no answer
    torch.testing.assert_close(loss(logits, None, rows), expected.nan_to_num())


def test_distillation_does_not_look_at_the_pseudolabels_nor_at_other_rows():
    probs, answered = make_probs()
    logits, rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([9, 4, 30, 22, 1])
    expected = AdaptiveEnsembleDistillation(probs, answered)(logits, None, rows)
    part = AdaptiveEnsembleDistillation(probs[rows], answered[rows])
    torch.testing.assert_close(part(logits, torch.eye(3)[[0, 1, 2, 0, 1]], torch.arange(5)), expected)
    nobody = AdaptiveEnsembleDistillation(probs * 0, torch.zeros_like(answered))
    logits.requires_grad_()
    nobody(logits, None, rows).sum().backward()
    assert logits.grad.abs().sum() == 0
    assert AdaptiveEnsembleDistillation(probs, answered)(logits.half(), None, rows).dtype == torch.float32


def test_distillation_refuses_what_it_cannot_use():
    probs, answered = make_probs()
    for wrong in ({"temperature": 0.0}, {"temperature": math.nan}, {"cap": 0.0}, {"cap": 1.5}):
        with pytest.raises(ValueError, match=r"Expected a `temperature` above 0 and a `cap` in \(0, 1\], got"):
            AdaptiveEnsembleDistillation(probs, answered, **wrong)
    with pytest.raises(ValueError, match="NaN is not an answer"):
        AdaptiveEnsembleDistillation(probs * torch.nan, answered)
    with pytest.raises(ValueError, match=r"Expected `student_logits` of shape \(2, 3\)"):
        AdaptiveEnsembleDistillation(probs, answered)(torch.zeros(2, 4), None, torch.tensor([0, 1]))


# ── RAVEN ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_raven(missing: float = 0.25, hard: bool = False):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    truth = (features[:, 0] > 0).long() + (features[:, 1] > 0.5).long()
    noise = torch.randn(24, 3, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.3, 1.0, 3.0])[:, None]
    logits = noise + 3 * torch.nn.functional.one_hot(truth, 3)[:, None]
    probs = torch.nn.functional.one_hot(logits.argmax(-1), 3).double() if hard else logits.softmax(-1)
    answered = torch.rand(24, 3, generator=generator) >= missing
    answered[2] = False
    return features, probs * answered.unsqueeze(-1), answered


def slow_raven(features, probs, answered, epochs, easy_epochs, rate, weight_rate, batch_size, seed):
    """Gradients by hand, Adam by hand, an example at a time."""
    num_examples, num_teachers, num_labels = probs.shape
    speakers = [[k for k in range(num_teachers) if answered[i, k]] for i in range(num_examples)]
    usable = [i for i in range(num_examples) if speakers[i]]
    easy = [i for i in usable if len({probs[i, k].argmax() for k in speakers[i]}) == 1]
    head = np.zeros((num_labels, features.shape[1] + 1))
    first, second, step = np.zeros_like(head), np.zeros_like(head), 0
    shared = np.full(num_teachers, 1 / num_teachers)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        rows = easy if epoch < easy_epochs else usable
        order = [rows[n] for n in torch.randperm(len(rows), generator=generator).tolist()]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            gradient, pull = np.zeros_like(head), {i: np.zeros(num_teachers) for i in batch}
            for i in batch:
                w = shared
                x = np.append(features[i], 1.0)
                total = sum(w[k] for k in speakers[i])
                label = sum(w[k] * probs[i, k] for k in speakers[i]) / total
                scores = head @ x
                log_p = scores - np.log(np.exp(scores).sum())
                gradient += np.outer(np.exp(log_p) - label, x) / len(batch)
                for k in speakers[i]:
                    pull[i][k] = -(probs[i, k] - label) @ log_p / total / len(batch)
            step += 1
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            head -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            if epoch < easy_epochs:
                continue
            shared = np.maximum(shared - weight_rate * sum(pull.values()), 1e-6)
            shared /= shared.sum()
    return head[:, :-1], head[:, -1], shared


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("missing", [0.0, 0.25])
def test_raven_equals_a_slow_version(hard, missing):
    features, probs, answered = make_raven(missing, hard)
    # a rate so high that weights reach the clamp
    options = {"epochs": 8, "easy_epochs": 2, "batch_size": 5, "seed": 4}
    rate = 0.8
    found = fit_raven(features, probs, answered, learning_rate=0.1, weight_learning_rate=rate, **options)
    expected = slow_raven(features.numpy(), probs.numpy(), answered.numpy(), rate=0.1, weight_rate=rate, **options)
    for ours, slow in zip(found, expected):
        np.testing.assert_allclose(ours.numpy(), slow, atol=1e-5)
    assert float(found.teacher_weights.max()) > 0.5
    assert int(found.teacher_weights.argmin()) == 2  # the teacher with most noise


def test_raven_leaves_the_weights_alone_while_it_is_easy():
    features, probs, answered = make_raven()
    found = fit_raven(features, probs, answered, epochs=3, easy_epochs=3, weight_learning_rate=10.0)
    torch.testing.assert_close(found.teacher_weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert float(found.weight.abs().max()) > 0


def test_raven_with_one_teacher_and_with_a_silent_one():
    features, probs, answered = make_raven()
    options = {"epochs": 3, "easy_epochs": 1, "weight_learning_rate": 0.5, "batch_size": 4}
    alone = fit_raven(features, probs[:, :1], answered[:, :1], **options)
    assert alone.teacher_weights.tolist() == [1.0]
    silent = torch.zeros_like(answered[:, :1])
    wider = torch.cat([answered, silent], 1), torch.cat([probs, torch.zeros(24, 1, 3)], 1)
    found, expected = (
        fit_raven(features, wider[1], wider[0], **options),
        fit_raven(features, probs, answered, **options),
    )
    torch.testing.assert_close(found.teacher_weights[:3], expected.teacher_weights)
    assert found.teacher_weights[3] == 0
    torch.testing.assert_close(found.weight, expected.weight)


def test_raven_repeats_itself_and_follows_the_order_of_teachers():
    features, probs, answered = make_raven()
    features, probs, order = features.float(), probs.float(), torch.tensor([2, 0, 1])
    options = {"epochs": 4, "easy_epochs": 1, "weight_learning_rate": 0.5, "batch_size": 4}
    first, again = (fit_raven(features, probs, answered, **options) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first.weight, fit_raven(features, probs, answered, seed=1, **options).weight)
    permuted = fit_raven(features, probs[:, order], answered[:, order], **options)
    torch.testing.assert_close(permuted.teacher_weights, first.teacher_weights[order], atol=1e-5, rtol=0)
    half = fit_raven(features.half(), probs, answered, **options)
    assert half.weight.dtype == torch.float32


def test_raven_refuses_what_it_cannot_use():
    features, probs, answered = make_raven()
    opposed = torch.eye(3, dtype=torch.float64).repeat(24, 1, 1)
    everyone = torch.ones_like(answered)
    with pytest.raises(ValueError, match="on 0 of them all teachers agree. Set `easy_epochs=0`"):
        fit_raven(features, opposed, everyone)
    fit_raven(features, opposed, everyone, epochs=1, easy_epochs=0)
    with pytest.raises(ValueError, match="of 24 examples 0 have an answer"):
        fit_raven(features, probs * 0, ~everyone)
    with pytest.raises(ValueError, match=r"Expected finite `features` of shape \(24, feature_size\)"):
        fit_raven(features[:5], probs, answered)
    with pytest.raises(ValueError, match="got 2, 256 and 5"):
        fit_raven(features, probs, answered, epochs=2)
    with pytest.raises(ValueError, match="NaN is not an answer"):
        fit_raven(features, probs * torch.nan, answered)
