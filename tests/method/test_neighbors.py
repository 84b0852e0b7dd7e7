"""Neighbours in feature space against brute force, and what they say together against rows worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_trainer import make_args, make_pool

from hf_cosupervise import CoSupervisedTrainer
from hf_cosupervise.method import neighbors
from hf_cosupervise.method.assignment import agreement_scores
from hf_cosupervise.method.neighbors import mean_over_neighbors, nearest_neighbors


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_neighbours_are_those_of_brute_force(monkeypatch, block, dtype):
    monkeypatch.setattr(neighbors, "_BLOCK", block)
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = features.double()
    for row, found in enumerate(nearest_neighbors(features, 5)):
        similar = torch.nn.functional.cosine_similarity(wide[row].unsqueeze(0), wide)
        similar[row] = -2
        torch.testing.assert_close(similar[found], similar.topk(5).values, rtol=0, atol=1e-6)
        assert row not in found.tolist() and len(set(found.tolist())) == 5


def test_length_does_not_matter_and_zeros_do_no_harm():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    scaled = features * torch.linspace(0.1, 9, 20).unsqueeze(1)
    assert torch.equal(nearest_neighbors(features, 3), nearest_neighbors(scaled, 3))
    features[4] = 0
    assert nearest_neighbors(features, 19).sort(dim=1).values[4].tolist() == [row for row in range(20) if row != 4]


@pytest.mark.parametrize("k", [0, -1, 20, 21])
def test_a_number_that_cannot_be_is_refused(k):
    with pytest.raises(ValueError, match=rf"`k` must be a whole number in 1..19 for 20 examples, got {k}."):
        nearest_neighbors(torch.zeros(20, 2), k)


def test_means_by_hand():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    known = torch.tensor([[True, True], [True, False], [True, False]])
    table = torch.tensor([[1, 2], [0, 2], [1, 0]])
    found = mean_over_neighbors(values, table, known)
    assert found[:, 0].tolist() == [3.0, 3.0, 3.0] and found[:, 1].tolist() == [10.0, 10.0, 10.0]
    nobody = mean_over_neighbors(values, table[:, :0], known & torch.tensor([True, False]))
    assert nobody[:, 0].tolist() == [1.0, 2.0, 6.0] and torch.isinf(nobody[:, 1]).all()


def test_what_is_unknown_may_be_anything():
    values, table = torch.tensor([[1.0], [torch.nan], [3.0]]), torch.tensor([[1], [2], [1]])
    known = torch.tensor([[True], [False], [True]])
    assert mean_over_neighbors(values, table, known).flatten().tolist() == [1.0, 3.0, 3.0]


@pytest.mark.parametrize("missing", [(), (3, 7, 20)])
def test_the_trainer_asks_the_neighbours(tmp_path, tiny_vit, tiny_image_dataset, missing):
    pool = make_pool(tiny_image_dataset, missing=missing)
    args = make_args(tmp_path, assignment="agreement", agreement_neighbors=4, rejection="none")
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool)
    trainer.train()
    plan = trainer.plans[1]
    # Slowly: the student of level 0, each teacher's distance on each example, and means over the nearest four.
    trainer.load_level(0)
    log_probs = torch.cat([part for _, part in trainer.predict_log_probs(trainer.student.examples)])
    teachers, answered = pool.decode_level(pool.hierarchy.level_indices(1), slice(None))
    scores = agreement_scores(log_probs, teachers, args.agreement_rule, args.agreement_min_prob)
    features = trainer.student.features(trainer.student.examples).double()
    for row in range(len(pool)):
        similar = torch.nn.functional.cosine_similarity(features[row].unsqueeze(0), features)
        similar[row] = 2
        near = similar.topk(5).indices
        means = [scores[near, k][answered[near, k]].mean().item() for k in range(2)]
        if answered[row].any():
            assert plan.assigned_teacher[row] == 1 + int(np.argmin(means)), row
        else:
            assert plan.assigned_teacher[row] == -1


def test_who_has_no_features_is_told(tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"assignment": "agreement", "agreement_neighbors": 4, "student_training": "full"}
    with pytest.raises(ValueError, match="`agreement_neighbors` needs a linear head on a frozen backbone"):
        CoSupervisedTrainer(tiny_vit, make_args(tmp_path, **changes), pool=make_pool(tiny_image_dataset))
    changes |= {"student_training": "probe", "agreement_neighbors": 48}
    with pytest.raises(ValueError, match="must be below the 48 examples of the pool, got 48"):
        CoSupervisedTrainer(tiny_vit, make_args(tmp_path, **changes), pool=make_pool(tiny_image_dataset))
    with pytest.raises(ValueError, match="`agreement_neighbors` is for `assignment` 'agreement', got 5 with"):
        make_args(tmp_path, agreement_neighbors=5, assignment="scope")
