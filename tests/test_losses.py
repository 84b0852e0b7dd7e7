"""Losses per example: numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_cosupervise.losses import hard_cross_entropy, soft_cross_entropy, sparse_soft_cross_entropy
from hf_cosupervise.sparse import decode_top_k, encode_top_k, scale_top_k

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
