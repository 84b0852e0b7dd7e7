"""Losses per example: numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from hf_cosupervise.method.losses import (
    hard_cross_entropy,
    soft_cross_entropy,
    sparse_soft_cross_entropy,
)
from hf_cosupervise.method.published_losses import (
    LOSSES,
    WITH_GRADIENT,
    EarlyLearningRegularization,
    adapt_conf,
    choose_loss,
    confidence_loss,
    confidence_targets,
    evidential_loss,
    generalized_cross_entropy,
    kl_divergence,
    linear_warmup,
    product_loss,
    reverse_kl,
    weigh_loss,
)
from hf_cosupervise.pool.top_k import decode_top_k, encode_top_k, scale_top_k

LOG_2, LOG_4 = math.log(2), math.log(4)


@pytest.mark.parametrize(
    ("probs", "target", "expected"),
    [
        ([0.5, 0.25, 0.25], [1.0, 0.0, 0.0], LOG_2),
        ([0.5, 0.25, 0.25], [0.0, 0.5, 0.5], LOG_4),
        ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], 0.5 * LOG_2 + 0.5 * LOG_4),
        ([0.5, 0.25, 0.25], [0.25, 0.75, 0.0], 0.25 * LOG_2 + 0.75 * LOG_4),
        ([0.5, 0.5], [0.3, 0.7], LOG_2),
    ],
)
def test_soft_cross_entropy(probs, target, expected):
    # logits are log-probabilities up to a constant per row
    logits = torch.tensor([probs]).log() + 7.0
    found = soft_cross_entropy(logits, torch.tensor([target]))
    assert found.shape == (1,) and found.item() == pytest.approx(expected, rel=1e-6)


def test_hard_cross_entropy():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log() - 3.0
    found = hard_cross_entropy(logits, torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([LOG_2, LOG_4], rel=1e-6)


def test_soft_with_one_hot_targets_is_hard():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=generator)
    labels = torch.randint(6, (40,), generator=generator)
    soft = soft_cross_entropy(logits, torch.nn.functional.one_hot(labels, 6).float())
    torch.testing.assert_close(soft, hard_cross_entropy(logits, labels))


def test_gradient_is_softmax_minus_target():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float32, requires_grad=True)
    target = torch.rand(5, 4, generator=generator)
    target /= target.sum(dim=1, keepdim=True)
    soft_cross_entropy(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(dim=1) - target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_summed_in_float32(dtype):
    # 2000 equal logits: log 2000 = 7.6009, of which bfloat16 would leave 7.59 and a sum over labels even less
    logits = torch.zeros(1, 2000, dtype=dtype)
    soft = soft_cross_entropy(logits, torch.full((1, 2000), 1 / 2000))
    hard = hard_cross_entropy(logits, torch.tensor([3]))
    assert soft.dtype == hard.dtype == torch.float32
    assert [soft.item(), hard.item()] == pytest.approx([math.log(2000)] * 2, rel=1e-5)


def test_no_examples():
    assert soft_cross_entropy(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    assert hard_cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3,)])
def test_shapes_that_differ(shape):
    # (1, 3) and (3,) would broadcast without a word
    with pytest.raises(ValueError, match=r"`logits`.*`target_probs`.*got"):
        soft_cross_entropy(torch.zeros(2, 3), torch.full(shape, 0.25))


# ── pseudolabels that name k labels ─────────────────────────────────────────────────────────────────────────────────


def sparse_targets(num_examples: int, num_labels: int, k: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random pseudolabels as label ids, probabilities and rest, and the same over all labels."""
    rng = np.random.default_rng([num_labels, k])
    label_ids, stored = encode_top_k(rng.dirichlet(np.full(num_labels, 0.3), size=num_examples), k)
    arrays = (label_ids.astype(np.int64), *scale_top_k(stored, num_labels))
    return [torch.from_numpy(array) for array in arrays], torch.from_numpy(decode_top_k(label_ids, stored, num_labels))


@pytest.mark.parametrize(
    ("ids", "target", "rest", "expected"),
    [
        # s = (1/2, 1/4, 1/8, 1/8), so -log s = (1, 2, 3, 3) in units of log 2
        ([0, 1], [0.5, 0.25], 0.125, 0.5 * 1 + 0.25 * 2 + 0.125 * 3 + 0.125 * 3),
        ([3], [0.625], 0.125, 0.125 * 1 + 0.125 * 2 + 0.125 * 3 + 0.625 * 3),
        ([2], [1.0], 0.0, 3),
        ([2, 0], [1.0, 0.0], 0.0, 3),
        ([0, 1, 2, 3], [0.25, 0.25, 0.25, 0.25], 0.0, 9 / 4),
        ([0, 0], [0.0, 0.0], 0.0, 0.0),  # no answer
    ],
)
def test_sparse_soft_cross_entropy(ids, target, rest, expected):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() - 5.0
    found = sparse_soft_cross_entropy(logits, torch.tensor([ids]), torch.tensor([target]), torch.tensor([rest]))
    assert found.shape == (1,) and found.item() == pytest.approx(expected * LOG_2, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("num_labels", "k"), [(2, 1), (3, 3), (5, 2), (40, 4), (1000, 16)])
def test_sparse_is_dense(num_labels, k):
    sparse, dense = sparse_targets(30, num_labels, k)
    logits = 4 * torch.randn(30, num_labels, generator=torch.Generator().manual_seed(0))
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    first, second = sparse_soft_cross_entropy(found, *sparse), soft_cross_entropy(expected, dense)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    first.sum().backward()
    second.sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.grad, logits.softmax(dim=1) - dense, rtol=0, atol=1e-5)


def test_sparse_gradient_by_finite_differences():
    sparse, _ = sparse_targets(2, 6, 2)
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    sparse_soft_cross_entropy(logits, *sparse).sum().backward()
    for row in range(2):
        for label in range(6):
            step = torch.zeros(2, 6)
            step[row, label] = 1e-2
            above, below = (
                sparse_soft_cross_entropy(logits.detach() + sign * step, *sparse).sum() for sign in (1, -1)
            )
            # float32 sums near 5 are 5e-7 apart, which a difference over 0.02 makes 2.5e-5; curvature adds as much
            assert float((above - below) / 2e-2) == pytest.approx(float(logits.grad[row, label]), abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sparse_loss_of_large_logits_stays_finite(dtype):
    # log_softmax is -60000 where softmax is 0
    logits = torch.tensor([[60000.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = sparse_soft_cross_entropy(logits, torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.5 / 3]))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(60000 * (0.5 + 1 / 3), rel=5e-3)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_sparse_loss_takes_half_precision_targets():
    sparse, _ = sparse_targets(4, 8, 2)
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    half = [sparse[0], *(values.half() for values in sparse[1:])]
    found = sparse_soft_cross_entropy(logits, *half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sparse_soft_cross_entropy(logits, *sparse), rtol=0, atol=0.02)


def test_sparse_loss_of_no_examples():
    found = sparse_soft_cross_entropy(
        torch.zeros(0, 5), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), torch.zeros(0)
    )
    assert found.shape == (0,)


# ── published alternatives ──────────────────────────────────────────────────────────────────────────────────────────

# Each with the arguments of its gradient.
VARIANTS = {
    "cross_entropy": (soft_cross_entropy, {}),
    "kl_divergence": (kl_divergence, {}),
    "kl_divergence at 4": (kl_divergence, {"temperature": 4.0}),
    "reverse_kl": (reverse_kl, {}),
    "confidence": (confidence_loss, {"weight": 0.3}),
    "product": (product_loss, {}),
    "product 2, 0.5": (product_loss, {"alpha": 2.0, "beta": 0.5}),
    "adapt_conf": (adapt_conf, {}),
    "generalized_cross_entropy": (generalized_cross_entropy, {}),
    "generalized_cross_entropy 1": (generalized_cross_entropy, {"q": 1.0}),
}
EVERY_LOSS = {name: partial(function, **arguments) for name, (function, arguments) in VARIANTS.items()}


def elr(logits, targets):
    return EarlyLearningRegularization(len(logits), logits.shape[1])(logits, targets, torch.arange(len(logits)))


def evidential(logits, targets):
    return evidential_loss(logits, targets, fraction_done=0.5)


EVERY_LOSS |= {"elr": elr, "evidential": evidential}
every_loss = pytest.mark.parametrize("loss", EVERY_LOSS.values(), ids=EVERY_LOSS)


def draw(num_examples: int = 6, num_labels: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_examples, num_labels, generator=generator, dtype=torch.float64)
    targets = torch.randn(num_examples, num_labels, generator=generator, dtype=torch.float64).softmax(dim=1)
    return logits.to(dtype), targets.to(dtype)


def gradient_of(loss, logits, targets):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, targets).sum(), logits)[0]


# student (1/5, 4/5), pseudolabel (3/4, 1/4)
CE = 0.75 * math.log(5) + 0.25 * math.log(5 / 4)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (kl_divergence, 0.75 * math.log(0.75 / 0.2) + 0.25 * math.log(0.25 / 0.8)),
        # tau = 1/2 squares: p = (1/17, 16/17), y = (9/10, 1/10)
        (partial(kl_divergence, temperature=0.5), (0.9 * math.log(0.9 * 17) + 0.1 * math.log(1.7 / 16)) / 4),
        (reverse_kl, 0.2 * math.log(0.2 / 0.75) + 0.8 * math.log(0.8 / 0.25)),
        (partial(confidence_loss, weight=0.0), CE),
        (partial(confidence_loss, weight=0.5), CE / 2 + math.log(5 / 4) / 2),
        (partial(confidence_loss, weight=1.0), math.log(5 / 4)),
        # 1/5 · 3/4 to 4/5 · 1/4 is 3 to 4
        (product_loss, 3 / 7 * math.log(5) + 4 / 7 * math.log(5 / 4)),
        (partial(product_loss, beta=0.0), CE),
        (partial(product_loss, alpha=0.0), 1 / 5 * math.log(5) + 4 / 5 * math.log(5 / 4)),
        # 1/5 · 9/16 to 4/5 · 1/16 is 9 to 4
        (partial(product_loss, alpha=2.0), 9 / 13 * math.log(5) + 4 / 13 * math.log(5 / 4)),
        (adapt_conf, 16 / 17 * CE + 1 / 17 * math.log(5 / 4)),
        (partial(adapt_conf, temperature=1.0), 4 / 5 * CE + 1 / 5 * math.log(5 / 4)),
        (partial(generalized_cross_entropy, q=1.0), 0.75 * 0.8 + 0.25 * 0.2),
        (partial(generalized_cross_entropy, q=0.5), 2 * (0.75 * (1 - 0.2**0.5) + 0.25 * (1 - 0.8**0.5))),
    ],
)
def test_losses_by_hand(loss, expected):
    logits = torch.tensor([[0.2, 0.8], [0.8, 0.2]]).log() + 3
    found = loss(logits, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    assert found.shape == (2,) and found.tolist() == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_are_those_of_autograd(name):
    loss, with_gradient = EVERY_LOSS[name], WITH_GRADIENT[name]
    logits, targets = draw(num_examples=50, num_labels=7)
    one_hot = torch.nn.functional.one_hot(targets.argmax(dim=1), 7).float()
    scale = torch.linspace(1 - 2e-3, 1 + 2e-3, 50)[:, None]  # as far from 1 as stored rows may sum
    for wanted in (targets, targets * scale, one_hot):
        expected = gradient_of(loss, logits, wanted)
        losses, found = with_gradient(logits, wanted)
        assert found.dtype == torch.float32
        torch.testing.assert_close(losses, loss(logits, wanted), rtol=1e-5, atol=1e-6)
        # of the largest, because against one-hot labels a logarithm of 1e-6 multiplies the rounding of float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1, float(expected.abs().max())))
        doubles = logits.double(), wanted.double()
        exact = gradient_of(loss, *doubles)
        atol = 1e-6 if name == "cross_entropy" else 1e-12  # the former is in float32 always
        torch.testing.assert_close(with_gradient(*doubles)[1], exact, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "loss",
    [
        kl_divergence,
        partial(kl_divergence, temperature=3.0),
        reverse_kl,
        partial(confidence_loss, weight=0.4),
        partial(adapt_conf, temperature=1e9),  # a is one half whatever the student says
        partial(product_loss, beta=0.0),
        generalized_cross_entropy,
        evidential,
    ],
)
def test_gradients_by_finite_differences(loss):
    logits, targets = draw(dtype=torch.float64)
    assert loss(logits, targets).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda moved: loss(moved, targets), logits.requires_grad_())


@pytest.mark.parametrize("alpha, beta", [(1, 1), (2, 0.5)])
def test_product_target_is_a_constant(alpha, beta):
    logits, targets = draw(dtype=torch.float64)
    product = logits.softmax(dim=1) ** beta * targets**alpha
    product /= product.sum(dim=1, keepdim=True)
    expected = logits.softmax(dim=1) - product
    found = gradient_of(partial(product_loss, alpha=alpha, beta=beta), logits, targets)
    torch.testing.assert_close(found, expected)


def test_product_without_the_pseudolabel_is_the_students_entropy():
    logits = torch.tensor([[0.25, 0.75]]).log()
    found = product_loss(logits, torch.tensor([[1.0, 0.0]]), alpha=0.0)  # 0^0 is 1
    assert found.item() == pytest.approx(LOG_4 - 0.75 * math.log(3), rel=1e-6)


def test_adapt_conf_weight_is_a_constant():
    logits, targets = draw(num_examples=40, dtype=torch.float64)
    probs, own = logits.softmax(dim=1), torch.nn.functional.one_hot(logits.argmax(dim=1), 4)
    said = probs.gather(1, targets.argmax(dim=1, keepdim=True)) ** 2
    share = said / (said + probs.amax(dim=1, keepdim=True) ** 2)
    assert (share <= 0.5).all() and (share < 0.5).any() and (share == 0.5).any()
    found = gradient_of(adapt_conf, logits, targets)
    torch.testing.assert_close(found, probs - (1 - share) * targets - share * own)


# ── what every loss must bear ───────────────────────────────────────────────────────────────────────────────────────


@every_loss
@pytest.mark.parametrize("shape", [(0, 3), (1, 2), (1, 1000), (5, 2)])
def test_shapes(loss, shape):
    losses = loss(*draw(*shape))
    assert losses.shape == shape[:1] and losses.isfinite().all()


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["one-hot", "uniform", "subnormal", "off by 2e-3", "soft"])
def test_extremes_are_finite(loss, scale, kind):
    logits, soft = draw(num_examples=20, num_labels=5)
    logits = scale * logits.sign()
    targets = {
        "one-hot": torch.eye(5).repeat(4, 1),
        "uniform": torch.full((20, 5), 0.2),
        "subnormal": torch.tensor([[1e-45, 0.0, 1 - 1e-40, 1e-40, 1e-39]]).repeat(20, 1),
        "off by 2e-3": soft * 0.998,
        "soft": soft,
    }[kind]
    losses, gradient = loss(logits, targets), gradient_of(loss, logits, targets)
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", WITH_GRADIENT)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_gradients_of_extreme_logits(name, scale):
    logits, targets = scale * torch.eye(4), torch.eye(4)[[1, 1, 2, 3]]
    _, gradient = WITH_GRADIENT[name](logits, targets)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, gradient_of(EVERY_LOSS[name], logits, targets))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(loss, dtype):
    logits, targets = draw(dtype=dtype)
    losses = loss(logits, targets)
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    torch.testing.assert_close(losses, loss(logits.float(), targets.float()))
    assert gradient_of(loss, logits, targets).dtype == dtype


@every_loss
def test_autocast_changes_nothing(loss):
    logits, targets = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = loss(logits, targets)
    torch.testing.assert_close(losses, loss(logits, targets), rtol=0, atol=0)


@every_loss
def test_order_of_labels_and_examples_does_not_matter(loss):
    logits, targets = draw()
    expected, labels, rows = loss(logits, targets), torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    torch.testing.assert_close(loss(logits[:, labels], targets[:, labels]), expected)
    torch.testing.assert_close(loss(logits[rows], targets[rows]), expected[rows])
    torch.testing.assert_close(loss(logits[2:3], targets[2:3]), expected[2:3])


# ── each for itself ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_kl_is_cross_entropy_less_entropy():
    logits, targets = draw()
    expected = soft_cross_entropy(logits, targets) + (targets * targets.log()).sum(dim=1)
    torch.testing.assert_close(kl_divergence(logits, targets), expected)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 4.0, 1000.0])
def test_kl_of_equal_logits_is_zero_at_any_temperature(temperature):
    logits, _ = draw(dtype=torch.float64)
    found = kl_divergence(logits, logits.softmax(dim=1), temperature)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12 * max(1, temperature**2))


def test_kl_at_low_temperature():
    # 1/2 to the power of 1000 is 0 in float32
    found = kl_divergence(torch.zeros(1, 3), torch.tensor([[0.5, 0.5, 0.0]]), temperature=1e-3)
    assert found.item() == pytest.approx(1e-6 * math.log(3 / 2), rel=1e-5)


def test_kl_at_high_temperature_matches_logits():
    # Hinton's limit: tau² KL -> squared distance of the centred logits over 2 C
    student, teacher = draw(dtype=torch.float64)[0], draw(dtype=torch.float64, seed=1)[0]
    gap = student - teacher
    gap -= gap.mean(dim=1, keepdim=True)
    found = kl_divergence(student, teacher.softmax(dim=1), temperature=1e4)
    torch.testing.assert_close(found, gap.square().sum(dim=1) / 8, rtol=1e-3, atol=0)


def test_reverse_kl():
    logits, _ = draw()
    torch.testing.assert_close(reverse_kl(logits, logits.softmax(dim=1)), torch.zeros(6), rtol=0, atol=1e-6)
    # sure of a label that the pseudolabel excludes: log 1 - log 1e-6
    found = reverse_kl(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.item() == pytest.approx(6 * math.log(10), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.0,), 0.0),
        ((0.05,), 0.25),
        ((0.1,), 0.5),
        ((0.7,), 0.5),
        ((1.0, 1.0, 0.8), 0.8),
        ((0.25, 1.0, 0.8), 0.2),
        ((0.0, 0.0), 0.5),
    ],
)
def test_linear_warmup(arguments, expected):
    assert linear_warmup(*arguments) == pytest.approx(expected)


def test_confidence_targets():
    logits = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 1.0]], requires_grad=True)  # a tie goes to the lowest label
    targets = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]], requires_grad=True)
    found = confidence_targets(logits, targets, weight=0.2)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.2, 0.4], [0.2, 0.8, 0.0]]))
    assert not found.requires_grad
    # 200 alike: a vectorised argmax may not take the first
    found = confidence_targets(torch.zeros(3, 200), torch.zeros(3, 200), weight=1.0)
    assert found[:, 0].tolist() == [1.0] * 3 and found.sum() == 3


def test_adapt_conf_leans_to_the_teacher_where_the_student_confidently_disagrees():
    def share(logit):  # of the student, from loss = (1 - a) CE(s, y) + a CE(s, argmax s)
        logits = torch.tensor([[0.0, logit]], dtype=torch.float64)
        teacher, own = (torch.nn.functional.cross_entropy(logits, torch.tensor([label])) for label in (0, 1))
        return float((teacher - adapt_conf(logits, torch.tensor([[1.0, 0.0]]))) / (teacher - own))

    shares = [share(logit) for logit in (0.01, 0.5, 2.0, 8.0)]
    assert shares == sorted(shares, reverse=True) and 0.49 < shares[0] < 0.5 and 0 <= shares[-1] < 1e-6


def test_generalized_cross_entropy_at_both_ends():
    logits, targets = draw()
    near_zero = generalized_cross_entropy(logits, targets, q=1e-6)
    torch.testing.assert_close(near_zero, soft_cross_entropy(logits, targets), rtol=1e-5, atol=0)
    one_hot = torch.nn.functional.one_hot(targets.argmax(dim=1), 4).float()
    half_mae = (logits.softmax(dim=1) - one_hot).abs().sum(dim=1) / 2
    torch.testing.assert_close(generalized_cross_entropy(logits, one_hot, q=1.0), half_mae)


# ── early-learning regularization ───────────────────────────────────────────────────────────────────────────────────


def test_elr_by_hand():
    loss = EarlyLearningRegularization(num_examples=3, num_labels=2, beta=0.5, weight=2.0)
    logits, targets, rows = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[1.0, 0.0]]), torch.tensor([2])
    # m = (1/8, 3/8), <p, m> = 10/32; then m = (3/16, 9/16), <p, m> = 30/64
    assert loss(logits, targets, rows).item() == pytest.approx(LOG_4 + 2 * math.log(22 / 32), rel=1e-5)
    assert loss(logits, targets, rows).item() == pytest.approx(LOG_4 + 2 * math.log(34 / 64), rel=1e-5)
    assert loss.memory.tolist() == [[0, 0], [0, 0], pytest.approx([3 / 16, 9 / 16])]
    loss.eval()
    assert loss(logits, targets, rows).item() == pytest.approx(LOG_4 + 2 * math.log(34 / 64), rel=1e-5)
    assert loss.memory[2].tolist() == pytest.approx([3 / 16, 9 / 16])


def test_elr_memory_is_a_constant():
    logits, targets = draw(dtype=torch.float64)
    loss = EarlyLearningRegularization(10, 4)
    loss(draw(seed=3)[0], targets, torch.arange(6))
    found = gradient_of(lambda s, y: loss(s, y, torch.arange(6)), logits, targets)
    probs, memory = logits.softmax(dim=1), loss.memory[:6].double()
    inner = (probs * memory).sum(dim=1, keepdim=True)
    # to the memory's own precision, which is float32
    torch.testing.assert_close(found, probs - targets - 3 * probs * (memory - inner) / (1 - inner), rtol=0, atol=1e-6)
    assert loss.memory.dtype == torch.float32 and not loss.memory.requires_grad
    loss.eval()
    assert torch.autograd.gradcheck(lambda s: loss(s, targets, torch.arange(6)), logits.requires_grad_())


def test_elr_without_weight_is_cross_entropy():
    logits, targets = draw()
    found = EarlyLearningRegularization(6, 4, weight=0.0)(logits, targets, torch.arange(6))
    torch.testing.assert_close(found, soft_cross_entropy(logits, targets))


def test_elr_logarithm_is_bounded():
    loss = EarlyLearningRegularization(1, 2, beta=0.0, weight=3.0)
    found = loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert found.item() == pytest.approx(3 * math.log(1e-4), rel=1e-6)


def test_elr_goes_on_where_it_stopped():
    logits, targets = draw()
    first = EarlyLearningRegularization(8, 4)
    rows = torch.tensor([7, 1, 0, 3, 5, 2])
    first(logits, targets, rows)
    second = EarlyLearningRegularization(8, 4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other, _ = draw(seed=1)
    assert torch.equal(first(other, targets, rows), second(other, targets, rows))
    assert torch.equal(first.memory, second.memory) and first.memory[[4, 6]].eq(0).all()
    with pytest.raises(RuntimeError, match="size mismatch for memory"):
        EarlyLearningRegularization(9, 4).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("num_labels", "rows", "sentence"),
    [
        (4, [0, 1, 2, 3, 4, 6], r"`rows` must lie in 0\.\.5, got 0\.\.6\. Number the training rows"),
        (4, [0, 1, 2, 3, 4, -1], r"`rows` must lie in 0\.\.5, got -1\.\.4\."),
        (4, [0, 1], r"one row each are needed, got \(6, 4\) and \(2,\)\. Make the memory"),
        (5, [0, 1, 2, 3, 4, 5], r"Logits of 5 labels .* got \(6, 4\)"),
    ],
)
def test_elr_rows_that_do_not_fit(num_labels, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        EarlyLearningRegularization(6, num_labels)(*draw(), torch.tensor(rows))


# ── evidence from several teachers ──────────────────────────────────────────────────────────────────────────────────


def slow_evidential(logits, teacher_probs, answered, fraction_done, gamma, teacher_weights):
    """Label by label, with torch's own divergence of Dirichlet distributions."""
    losses = []
    for row in range(len(logits)):
        alpha, num_labels = logits[row].relu() + 1, logits.shape[1]
        uniform = torch.distributions.Dirichlet(torch.ones(num_labels, dtype=torch.float64))
        by_label = []
        for k in range(num_labels):
            one_hot = torch.eye(num_labels, dtype=torch.float64)[k]
            others = torch.distributions.Dirichlet((alpha - 1) * (1 - one_hot) + 1)
            divergence = torch.distributions.kl_divergence(others, uniform)
            by_label.append(alpha.sum().log() - alpha[k].log() + fraction_done * divergence)
        loss = gamma * by_label[int(logits[row].argmax())]
        for m in range(teacher_probs.shape[1]):
            if answered[row, m]:
                said = sum(teacher_probs[row, m, k] * by_label[k] for k in range(num_labels))
                loss = loss + (1 - gamma) * teacher_weights[m] * said
        losses.append(loss)
    return torch.stack(losses)


def draw_teachers(num_examples=6, num_teachers=3, num_labels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    probs = torch.randn(num_examples, num_teachers, num_labels, generator=generator, dtype=torch.float64).softmax(-1)
    return probs.to(dtype), torch.rand(num_examples, num_teachers, generator=generator) < 0.7


@pytest.mark.parametrize("fraction_done, gamma", [(0.0, 0.5), (0.5, 0.5), (1.0, 0.2), (1.0, 0.0), (0.3, 1.0)])
def test_evidential_is_the_slow_one(fraction_done, gamma):
    logits, (teachers, answered) = 3 * draw(dtype=torch.float64)[0], draw_teachers()
    weights = torch.tensor([1.0, 0.0, 2.5])
    expected = slow_evidential(logits, teachers, answered, fraction_done, gamma, weights)
    said = (weights[:, None] * teachers * answered.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(evidential_loss(logits, said, fraction_done, gamma), expected)
    lower = evidential_loss(logits.float(), said, fraction_done, gamma)
    torch.testing.assert_close(lower, expected.float(), rtol=1e-5, atol=1e-5)
    run = partial(evidential_loss, target_probs=said, fraction_done=fraction_done, gamma=gamma)
    assert torch.autograd.gradcheck(run, logits.requires_grad_())


def test_evidential_by_hand():
    # alpha = (2, 1), S = 3. At label 0 nothing is misplaced; at label 1 it is Dir(2, 1), whose density 2x has
    # KL = log 2 - 1/2. The teacher says label 1, the student label 0.
    found = evidential_loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]]), 1.0, 0.25)
    expected = 0.75 * (math.log(3) + LOG_2 - 0.5) + 0.25 * (math.log(3) - LOG_2)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_evidential_soft_labels_do_not_cancel():
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    first, second = (
        gradient_of(partial(evidential_loss, fraction_done=0.5), logits, torch.tensor([probs]))
        for probs in ([0.6, 0.3, 0.1], [0.1, 0.3, 0.6])
    )
    assert (first - second).abs().max() > 0.1
    assert first[0, 0] < second[0, 0] and first[0, 2] > second[0, 2]  # descent adds evidence where there is more mass


def test_evidential_without_an_answer():
    (logits, targets), nothing = draw(), torch.zeros(6, 4)
    alone = evidential_loss(logits, nothing, 0.5, gamma=0.5)
    torch.testing.assert_close(alone, 0.5 * evidential_loss(logits, targets, 0.5, gamma=1.0))


# ── weights per example, and the door ───────────────────────────────────────────────────────────────────────────────


def choose(loss, options=None, done=lambda: 0.2, shape=(6, 4)):
    return choose_loss(loss, options or {}, done, shape)


ROWS = torch.arange(6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_door_by_name(name):
    logits, targets = draw()
    loss, with_gradient = choose(name)
    found, (losses, gradient) = loss(logits, targets, ROWS), with_gradient(logits, targets, ROWS)
    assert found.shape == (6,) and torch.equal(found, LOSSES[name](logits, targets))
    torch.testing.assert_close(losses, found, rtol=1e-6, atol=0)  # of a softmax over columns, which rounds otherwise
    torch.testing.assert_close(gradient, gradient_of(LOSSES[name], logits, targets))


def test_the_door_takes_a_users_function_and_finds_its_gradient():
    logits, targets = draw()

    def distance(logits, targets, rows):  # Brier's, with the row as a weight
        return rows * (logits.softmax(dim=1) - targets).square().sum(dim=1)

    loss, with_gradient = choose(distance)
    losses, gradient = with_gradient(logits, targets, ROWS)
    assert torch.equal(losses, distance(logits, targets, ROWS)) and torch.equal(loss(logits, targets, ROWS), losses)
    probs = logits.softmax(dim=1)
    excess = 2 * (probs - targets)
    by_hand = ROWS.unsqueeze(1) * probs * (excess - (excess * probs).sum(dim=1, keepdim=True))
    torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-7)
    with torch.no_grad():  # as in the fast loop
        assert torch.equal(with_gradient(logits, targets, ROWS)[1], gradient)


def mean_loss(logits, targets, rows):
    return soft_cross_entropy(logits, targets).mean()


@pytest.mark.parametrize(
    ("loss", "error", "sentence"),
    [
        ("focal", ValueError, r"`loss` must be one of \['cross_entropy', .*\], got 'focal'\."),
        (3, TypeError, r"`loss` must be a name or a function, got int\. Names are"),
        (
            mean_loss,
            ValueError,
            r"`mean_loss` must return one loss per example, shape \(6,\), got \(\)\. Sum over labels",
        ),
        (lambda logits, targets, rows: logits, ValueError, r"got \(6, 4\)"),
        (partial(lambda logits, targets, rows: 1.0), ValueError, r"`partial` must return .* got float"),
        (lambda logits, targets, rows: targets.sum(dim=1), ValueError, r"must depend on the logits"),
    ],
)
def test_the_door_refuses(loss, error, sentence):
    with pytest.raises(error, match=sentence):
        choose(loss)[1](*draw(), ROWS)


@pytest.mark.parametrize("name", ["cross_entropy", "early_learning_regularization", "evidential", "confidence"])
def test_weights_of_examples(name):
    logits, targets = draw()
    weights = torch.tensor([0.0, 0.5, 2.0, 1.0, 1.0, 1.5])
    rows = torch.tensor([2, 0, 5, 4, 1, 3])
    loss, with_gradient = choose(name)
    plain, gradient = choose(name)[1](logits, targets, rows)
    weighted, weighted_gradient = weigh_loss((loss, with_gradient), weights)[1](logits, targets, rows)
    torch.testing.assert_close(weighted, weights[rows] * plain)
    torch.testing.assert_close(weighted_gradient, weights[rows].unsqueeze(1) * gradient)
    assert weighted.mean() == pytest.approx(
        ((weights[rows] * plain).sum() / weights[rows].sum()).item()
    )  # their mean is 1
    again = weigh_loss(choose(name), weights)[0](logits, targets, rows)
    torch.testing.assert_close(again, weighted)


def test_early_learning_regularization_by_name_remembers_and_is_new_each_time():
    logits, targets = draw()
    own = EarlyLearningRegularization(6, 4, beta=0.5, weight=2.0)
    loss, _ = choose("early_learning_regularization", {"beta": 0.5, "weight": 2.0})
    for _ in range(2):
        torch.testing.assert_close(loss(logits, targets, ROWS), own(logits, targets, ROWS))
    first = choose("early_learning_regularization", {"beta": 0.5, "weight": 2.0})[0](logits, targets, ROWS)
    assert not torch.equal(first, own(logits, targets, ROWS))


@pytest.mark.parametrize("shape", [(6, 5), (1, 4), (6, 4, 1)])
@pytest.mark.parametrize("loss", EVERY_LOSS.values())
def test_every_loss_refuses_shapes_that_differ(loss, shape):
    # (1, 4) would broadcast without a word
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.zeros(6, 4), torch.full(shape, 0.25))


BAD = {
    "temperature": [0, -1.0, math.inf, math.nan],
    "q": [0, 1.01, -0.5, math.nan],
    "weight": [-0.1, 1.1, math.nan],
    "alpha": [-1, math.inf, math.nan],
    "beta": [-1, math.inf, math.nan],
    "gamma": [-0.1, 1.1, math.nan],
    "fraction_done": [-0.1, 1.1, math.nan],
    "share": [-0.1, 1.1],
    "peak": [-0.1, 1.1],
}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (partial(kl_divergence, *draw()), "temperature"),
        (partial(adapt_conf, *draw()), "temperature"),
        (partial(generalized_cross_entropy, *draw()), "q"),
        (partial(confidence_targets, *draw()), "weight"),
        (partial(confidence_loss, *draw()), "weight"),
        (partial(product_loss, *draw()), "alpha"),
        (partial(product_loss, *draw()), "beta"),
        (partial(evidential_loss, *draw()), "fraction_done"),
        (partial(evidential_loss, *draw(), 0.5), "gamma"),
        (linear_warmup, "fraction_done"),
        (partial(linear_warmup, 0.5), "share"),
        (partial(linear_warmup, 0.5), "peak"),
    ],
)
def test_numbers_out_of_range(function, name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"`{name}` must be (above|at least) 0.*, got {value}\. [A-Z].*\.$"):
            function(**{name: value})


@pytest.mark.parametrize("arguments", [{"beta": 1.5}, {"beta": -0.1}, {"weight": -1.0}, {"weight": math.inf}])
def test_elr_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"`(beta|weight)` must be at least 0.*, got .*\. Leave it out for"):
        EarlyLearningRegularization(2, 2, **arguments)


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in LOSSES),
        ("kl_divergence", {"temperature": 3.0}),
        ("confidence", {"share": 0.4}),
        ("generalized_cross_entropy", {"q": 0.2}),
        ("evidential", {"gamma": 0.3}),
        ("evidential", {}),
        ("early_learning_regularization", {}),
        ("early_learning_regularization", {"beta": 0.2, "weight": 1.0}),
    ],
)
def test_a_loss_by_name_has_its_own_gradient(name, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator).requires_grad_()
    targets = torch.rand(5, 4, generator=generator).softmax(dim=1)
    rows = torch.arange(5)
    wanted_losses = choose(name, options)[0](logits, targets, rows)
    [wanted] = torch.autograd.grad(wanted_losses.sum(), logits)
    losses, gradient = choose(name, options)[1](logits.detach(), targets, rows)
    torch.testing.assert_close(losses, wanted_losses.detach())
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_the_weight_of_the_confidence_loss_climbs():
    logits, targets, done = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), [0.0]
    loss, _ = choose("confidence", {"share": 0.5, "peak": 1.0}, lambda: done[0])
    assert loss(logits, targets, ROWS[:1]).item() == pytest.approx(math.log1p(math.exp(2)))  # the teacher
    done[0] = 0.5
    assert loss(logits, targets, ROWS[:1]).item() == pytest.approx(math.log1p(math.exp(-2)))  # the student itself


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("magic", {}, "`loss` must be one of .*'confidence'.*, got 'magic'"),
        ("product", {"gamma": 1.0}, r"`loss_kwargs` of 'product' .* among \['alpha', 'beta'\], got \['gamma'\]"),
        ("cross_entropy", {"q": 1.0}, r"must have keys among \[\], got \['q'\]"),
        ("evidential", {"fraction_done": 1.0}, r"must have keys among \['gamma'\], got \['fraction_done'\]"),
        ("early_learning_regularization", {"num_examples": 1}, r"keys among \['beta', 'weight'\]"),
    ],
)
def test_what_is_not_known_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        choose(name, options)


@pytest.mark.parametrize("beta", [0.0, 0.7, 0.999])
def test_the_gradient_of_early_learning_regularization_is_that_of_autograd(beta):
    torch.manual_seed(0)
    own, slow = (EarlyLearningRegularization(6, 4, beta=beta, weight=3.0) for _ in range(2))
    for step in range(4):
        # of sure students too, whose logarithm goes no further down
        logits, targets = 10**step * torch.randn(5, 4), torch.softmax(torch.randn(5, 4), dim=1)
        rows = torch.randperm(6)[:5]
        losses, gradient = own.with_gradient(logits, targets, rows)
        logits.requires_grad_()
        wanted = slow(logits, targets, rows)
        (slow_gradient,) = torch.autograd.grad(wanted.sum(), logits)
        assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-5)
        assert torch.allclose(gradient, slow_gradient, rtol=1e-4, atol=1e-4)
        assert torch.allclose(own.memory, slow.memory, atol=1e-6)
