"""Losses per example: numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_cosupervise.losses import hard_cross_entropy, soft_cross_entropy

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
