"""What must not change the student: batch shapes, the loop that is used, the order of teachers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_trainer import LABELS, make_args, make_pool, weights
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_cosupervise import CoSupervisedTrainer, PseudolabelPool, TeacherHierarchy
from hf_cosupervise.students.head import prepare_student
from hf_cosupervise.students.loading import load_student


def train(student, folder, pool, **changes):
    trainer = CoSupervisedTrainer(student, make_args(folder, **changes), pool=pool)
    trainer.train()
    return trainer


def assert_equal_students(first, second, tolerance):
    for name, value in weights(first).items():
        torch.testing.assert_close(value, weights(second)[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        {"max_grad_norm": 0.5, "weight_decay": 0.1},
        {"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 2},
        {"max_steps": -1, "num_train_epochs": 2, "label_smoothing_factor": 0.1},
        {"pseudolabels": "hard", "dataloader_drop_last": True},
        {"loss": "kl_divergence", "loss_kwargs": {"temperature": 2.0}},
        {"loss": "reverse_kl", "gradient_accumulation_steps": 2},
        {"loss": "confidence", "loss_kwargs": {"share": 0.5, "peak": 0.8}},
        {"loss": "product"},
        {"loss": "adapt_conf", "pseudolabels": "hard"},
        {"loss": "generalized_cross_entropy", "loss_kwargs": {"q": 0.5}},
    ],
    ids=lambda changes: "-".join([*changes, str(changes.get("loss", ""))]).strip("-") or "default",
)
def test_fast_head_and_standard_loop_give_the_same_student(tmp_path, tiny_vit, tiny_image_dataset, changes):
    pool = make_pool(tiny_image_dataset)
    fast = train(tiny_vit, tmp_path / "fast", pool, **changes)
    slow = train(tiny_vit, tmp_path / "slow", pool, fit_head_on_features=False, **changes)
    assert_equal_students(fast, slow, 1e-5)
    for one, other in zip(fast.history.records, slow.history.records, strict=True):
        assert one["num_steps"] == other["num_steps"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    # The logs agree too: same steps, losses and learning rates.
    keys = ("loss", "learning_rate")
    logs = [[(e["step"], *(e[k] for k in keys)) for e in t.state.log_history if "loss" in e] for t in (fast, slow)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-3, atol=1e-7)


def weighted(pool: PseudolabelPool) -> PseudolabelPool:
    values = np.random.default_rng(1).uniform(0.2, 3.0, len(pool))
    return PseudolabelPool(pool.hierarchy, pool.teachers, pool.inputs.add_column("weight", values))


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_a_batch_of_8_is_4_micro_batches_of_2(tmp_path, tiny_vit, tiny_image_dataset, training):
    pool = weighted(make_pool(tiny_image_dataset))
    changes = {"student_training": training, "rejection": "none", "optim": "sgd", "learning_rate": 0.01}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    found = {}
    for column in (None, "weight"):
        own = changes | {"weight_column": column}
        whole = found[column] = train(tiny_vit, tmp_path / f"8-{column}", pool, **own)
        parts = train(tiny_vit, tmp_path / f"2x4-{column}", pool, **own, **cut)
        assert_equal_students(whole, parts, 1e-5)
        for one, other in zip(whole.history.records, parts.history.records, strict=True):
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    plain, weighed = weights(found[None]), weights(found["weight"])
    assert max((weighed[name] - value).abs().max() for name, value in plain.items()) > 1e-4


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_last_step_of_fewer_examples_is_the_only_one_that_hangs_on_how_it_is_cut(
    tmp_path, tiny_vit, tiny_image_dataset, training
):
    """Micro-batches of a step count alike, as in every `Trainer`, also the last of 47 = 5 x 8 + 2 + 2 + 2 + 1."""
    pool = make_pool(tiny_image_dataset.select(range(47)))
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for steps, equal in ((5, True), (6, False)):
        changes = {"student_training": training, "rejection": "none", "optim": "sgd", "max_steps": steps}
        changes["learning_rate"] = 0.01
        one = pool.with_hierarchy(TeacherHierarchy(LABELS, pool.hierarchy.levels[0]))
        whole = train(tiny_vit, tmp_path / f"8-{steps}", one, **changes)
        parts = train(tiny_vit, tmp_path / f"2x4-{steps}", one, **changes, **cut)
        assert_equal_students(whole, parts, 1e-6 if equal else 1e-2)


@pytest.mark.parametrize("weight_column", [None, "weight"])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (5, 1), (8, 4), (5, 3)])
def test_uneven_last_batches_in_both_loops(tmp_path, tiny_vit, tiny_image_dataset, batch, accumulation, weight_column):
    pool = weighted(make_pool(tiny_image_dataset.select(range(47))))
    changes = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": -1,
        "num_train_epochs": 2,
        "rejection": "none",
        "weight_column": weight_column,
        "logging_steps": 1,
    }
    fast = train(tiny_vit, tmp_path / "fast", pool, **changes)
    slow = train(tiny_vit, tmp_path / "slow", pool, fit_head_on_features=False, **changes)
    assert_equal_students(fast, slow, 1e-5)
    steps = 2 * math.ceil(math.ceil(47 / batch) / accumulation)
    for one, other in zip(fast.history.records, slow.history.records, strict=True):
        assert one["num_steps"] == other["num_steps"] == steps
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    logs = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (fast, slow)]
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-3)


def test_one_teacher_is_plain_distillation(tmp_path, tiny_vit, tiny_image_dataset):
    """A hierarchy of one teacher equals `Trainer` with a soft cross-entropy."""
    full = make_pool(tiny_image_dataset)
    pool = full.with_hierarchy(TeacherHierarchy(LABELS, full.hierarchy.levels[0]))
    ours = train(tiny_vit, tmp_path / "ours", pool, student_training="full", optim="sgd")

    student, processor = load_student(tiny_vit, LABELS, seed=42)
    pixels = processor(list(tiny_image_dataset["image"]), return_tensors="pt")["pixel_values"]
    targets = torch.from_numpy(pool.decode("generalist"))
    rows = [{"pixel_values": pixel, "target": target} for pixel, target in zip(pixels, targets, strict=True)]

    class Distillation(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return functional.cross_entropy(model(pixel_values=inputs["pixel_values"]).logits, inputs["target"])

    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        optim="sgd",
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        data_seed=42,
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    plain = Distillation(prepare_student(student, "full"), args, train_dataset=rows)
    plain.model_accepts_loss_kwargs = False
    plain.train()
    assert_equal_students(ours, plain, 1e-6)


def test_permuted_teachers_are_permuted_assignments(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    generalist, insects, pets = pool.hierarchy.teachers
    swapped = pool.with_hierarchy(TeacherHierarchy(LABELS, [generalist, pets, insects]))
    for assignment in ("scope", "agreement"):
        first = train(tiny_vit, tmp_path / f"{assignment}-a", pool, assignment=assignment)
        second = train(tiny_vit, tmp_path / f"{assignment}-b", swapped, assignment=assignment)
        names = [
            [trainer.pool.source_names[i] for i in trainer.plans[1].assigned_teacher] for trainer in (first, second)
        ]
        assert names[0] == names[1] and len(set(names[0])) == 2
        assert_equal_students(first, second, 0)


def test_permuted_rows_are_the_same_e_step(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    order = np.random.default_rng(0).permutation(len(pool))
    changes = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 48, "optim": "sgd"}
    first = train(tiny_vit, tmp_path / "a", pool, **changes)
    second = train(tiny_vit, tmp_path / "b", pool.select(order), **changes)
    np.testing.assert_array_equal(first.plans[1].assigned_teacher[order], second.plans[1].assigned_teacher)
    np.testing.assert_array_equal(first.plans[1].keep_mask[order], second.plans[1].keep_mask)


def test_each_level_has_its_own_shuffle_order_and_another_trainer_changes_nothing(
    tmp_path, tiny_vit, tiny_image_dataset
):
    pool = make_pool(tiny_image_dataset)
    alone = train(tiny_vit, tmp_path / "alone", pool)
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "beside"), pool=pool)
    torch.manual_seed(123)
    CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "third", seed=7), pool=pool)
    trainer.train()
    assert_equal_students(alone, trainer, 0)
    other = train(tiny_vit, tmp_path / "seed", pool, seed=7)
    assert not torch.equal(weights(other)["classifier.weight"], weights(alone)["classifier.weight"])


@pytest.mark.parametrize("training", ["lora", "full"])
def test_one_seed_is_one_student_whatever_ran_before(tmp_path, tiny_bert, tiny_text_dataset, training):
    """Adapters start at random and dropout draws at every step; both hang on the seed alone."""
    pool, students = make_pool(tiny_text_dataset), []
    for number in range(2):
        torch.manual_seed(number)
        changes = {"student_training": training, "lora_dropout": 0.2, "max_steps": 3}
        students.append(train(tiny_bert, tmp_path / str(number), pool, **changes))
    assert_equal_students(*students, 0)


def test_dense_and_truncated_pools_agree_where_k_covers_all_labels(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    predictions = {name: pool.decode(name) for name in pool.hierarchy.names}
    ids = pool.ids
    inputs = pool.inputs.remove_columns("id")
    again = PseudolabelPool.from_predictions(pool.hierarchy, ids, predictions, inputs=inputs, pool_k=4)
    assert_equal_students(train(tiny_vit, tmp_path / "a", pool), train(tiny_vit, tmp_path / "b", again), 1e-4)
