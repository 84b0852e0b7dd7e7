"""The trainer at its public door: what a user calls, and what is left afterwards."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2ForSequenceClassification,
    TrainerCallback,
)

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, Teacher, TeacherHierarchy
from hf_cosupervise.inputs import row_keys

LABELS = ("ant", "bee", "cat", "dog")


def make_hierarchy() -> TeacherHierarchy:
    return TeacherHierarchy(
        LABELS,
        [
            Teacher("generalist"),
            Teacher("insects", level=1, scope=LABELS[:2]),
            Teacher("pets", level=1, scope=LABELS[2:]),
        ],
    )


def make_pool(data: Dataset, *, seed: int = 0, inputs: bool = True, missing: tuple[int, ...] = ()) -> PseudolabelPool:
    """Teachers that are right more often than not, each inside its scope."""
    rng, gold = np.random.default_rng(seed), np.array(data["label"])
    predictions = {}
    for name, own in (("generalist", [0, 1, 2, 3]), ("insects", [0, 1]), ("pets", [2, 3])):
        probs = np.zeros((len(data), 4))
        probs[:, own] = rng.dirichlet(np.ones(len(own)), len(data))
        inside = np.isin(gold, own)
        probs[inside] = 0.4 * probs[inside] + 0.6 * np.eye(4)[gold[inside]]
        probs[list(missing)] = 0
        predictions[name] = probs
    column = "image" if "image" in data.column_names else "text"
    kept = data.rename_column("label", "oracle_label") if inputs else None
    return PseudolabelPool.from_predictions(make_hierarchy(), row_keys(data, column), predictions, inputs=kept)


def make_args(folder: Path, **changes: Any) -> CoSupervisedConfig:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "logging_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return CoSupervisedConfig(output_dir=str(folder), **settings | changes)


def weights(trainer: CoSupervisedTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def test_train_walks_the_levels_and_tells_one_story(tmp_path, tiny_vit, tiny_image_dataset):
    class Witness(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[str] = []
            self.steps: list[int] = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.events.append("train begins")

        def on_train_end(self, args, state, control, **kwargs):
            self.events.append("train ends")

        def on_level_begin(self, args, state, control, plan, **kwargs):
            self.events.append(f"level {plan.level} begins")

        def on_level_end(self, args, state, control, plan, metrics, **kwargs):
            self.events.append(f"level {plan.level} ends")
            assert metrics["num_steps"] == 6

        def on_log(self, args, state, control, logs, **kwargs):
            self.steps.append(state.global_step)

    witness, pool = Witness(), make_pool(tiny_image_dataset)
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=pool, callbacks=[witness])
    output = trainer.train()

    assert witness.events == [
        "train begins", "level 0 begins", "level 0 ends", "level 1 begins", "level 1 ends", "train ends",
    ]  # fmt: skip
    assert witness.steps == sorted(witness.steps) and witness.steps[-1] == 12
    assert output.global_step == trainer.state.global_step == 12
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    assert output.training_loss == pytest.approx(np.mean(losses), rel=1e-5)
    history = json.loads((tmp_path / "_run" / "history.json").read_text())
    assert [record["level"] for record in history] == [0, 1]
    assert history[0]["assignment/generalist"] == 1.0 and history[0]["consistency/keep_rate"] == 1.0
    assert history[1]["assignment/insects"] + history[1]["assignment/pets"] == pytest.approx(1.0)
    assert history[1]["consistency/keep_rate"] == pytest.approx(trainer.plans[1].keep_mask.mean())


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
@pytest.mark.parametrize("student", ["tiny_vit", "tiny_timm", "tiny_bert"])
def test_every_student_learns_what_it_should_and_loads_without_us(
    tmp_path, request, student, training, tiny_image_dataset, tiny_text_dataset
):
    data = tiny_text_dataset if student == "tiny_bert" else tiny_image_dataset
    args = make_args(tmp_path, student_training=training, learning_rate=1e-2, max_steps=3)
    trainer = CoSupervisedTrainer(request.getfixturevalue(student), args, pool=make_pool(data))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    learning = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    if training == "probe":
        assert moved == learning
    elif (
        training == "lora"
    ):  # timm starts the last BatchNorm of a residual branch at zero: some adapters get no gradient
        assert any("lora_B" in name for name in moved) and moved & {n for n in learning if "modules_to_save" in n}
        assert not [name for name in moved - learning if "running_" not in name and "num_batches" not in name]
    else:  # the bias of attention keys has no gradient
        assert {name for name in learning - moved if "key.bias" not in name and "k_proj.bias" not in name} == set()
    trainer.save_model()
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    if training == "lora":
        assert (tmp_path / "adapter" / "adapter_config.json").is_file()

    if student == "tiny_bert":
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(tmp_path),
            AutoTokenizer.from_pretrained(tmp_path),
        )
        batch = tokenizer(list(data["text"][:]), padding=True, return_tensors="pt")
    else:
        model, processor = (
            AutoModelForImageClassification.from_pretrained(tmp_path),
            AutoImageProcessor.from_pretrained(tmp_path),
        )
        batch = processor(list(data["image"][:]), return_tensors="pt")
    with torch.no_grad():
        plain = torch.log_softmax(model.eval()(**batch).logits, dim=1)
    ours = torch.cat([chunk for _, chunk in trainer.predict_log_probs(data)])
    torch.testing.assert_close(plain, ours, atol=1e-5, rtol=1e-5)
    assert model.config.id2label == dict(enumerate(LABELS))
    if student == "tiny_timm":
        import timm

        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        with torch.no_grad():
            logits = again(batch["pixel_values"])
        torch.testing.assert_close(torch.log_softmax(logits, dim=1), ours, atol=1e-5, rtol=1e-5)


def test_a_head_that_sees_every_token_is_trained_by_the_standard_loop(tmp_path, tiny_bert, tiny_text_dataset):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=tokenizer.pad_token_id,
        num_labels=4,
    )  # fmt: skip
    student, pool = GPT2ForSequenceClassification(config), make_pool(tiny_text_dataset)
    trainer = CoSupervisedTrainer(student, make_args(tmp_path), pool=pool, processing_class=tokenizer)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {"score.weight"} and trainer.history.records[-1]["num_steps"] == 6


def test_a_card_of_what_is_known(tmp_path, tiny_vit, tiny_image_dataset):
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=make_pool(tiny_image_dataset))
    trainer.train()
    trainer.create_model_card(tags="animals")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"co-supervised-learning", "animals"} <= set(
        card.data.tags
    ) and card.data.pipeline_tag == "image-classification"
    assert card.data.license is None and card.data.base_model is None  # unknown, so not said
    text = card.text
    assert "| cat, dog |" in text and "| `max_steps` | `6` |" in text and str(tmp_path) not in text


def test_the_pool_does_not_change_while_a_student_is_trained(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    before = {name: (pool.label_ids(name).copy(), pool.label_probs(name).copy()) for name in pool.hierarchy.names}
    CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=pool).train()
    for name, (label_ids, label_probs) in before.items():
        np.testing.assert_array_equal(pool.label_ids(name), label_ids)
        np.testing.assert_array_equal(pool.label_probs(name), label_probs)


def test_gold_labels_never_reach_training(tmp_path, tiny_vit, tiny_image_dataset):
    """Shuffled ground truth gives the same student, and only `oracle_` numbers move."""
    pool = make_pool(tiny_image_dataset)
    wrong = pool.inputs.remove_columns("oracle_label").add_column(
        "oracle_label", [3 - y for y in pool.oracle_labels.tolist()]
    )
    other = PseudolabelPool(pool.hierarchy, pool.teachers, wrong)
    records, heads = [], []
    for number, own in enumerate((pool, other)):
        trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / str(number)), pool=own)
        trainer.train()
        records.append(trainer.history.records[-1])
        heads.append(weights(trainer)["classifier.weight"])
    assert torch.equal(*heads)
    different = {key for key in records[0] if records[0][key] != records[1][key]}
    assert different and all(key.startswith("oracle_") or key == "train_runtime" for key in different)


def test_epochs_are_scaled_by_the_keep_rate(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset, seed=3)
    trainer = CoSupervisedTrainer(
        tiny_vit, make_args(tmp_path, max_steps=-1, num_train_epochs=5, rejection_k=1), pool=pool
    )
    trainer.train()
    kept = int(trainer.plans[1].keep_mask.sum())
    assert 0 < kept < 48
    # floor(E / r) epochs of ceil(kept / 8) batches.
    assert trainer.history.records[1]["num_steps"] == math.floor(5 / (kept / 48)) * math.ceil(kept / 8)
    assert trainer.history.records[0]["num_steps"] == 5 * 6


def test_less_than_an_epoch_and_less_than_a_batch(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    half = make_args(tmp_path / "half", max_steps=-1, num_train_epochs=0.5, rejection="none")
    assert CoSupervisedTrainer(tiny_vit, half, pool=pool).train().global_step == 2 * 3
    large = make_args(tmp_path / "large", per_device_train_batch_size=64, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="at least one whole batch under `dataloader_drop_last`, got 48 examples"):
        CoSupervisedTrainer(tiny_vit, large, pool=pool).train()


def test_workers_of_any_kind_can_take_the_pseudolabels_along(tmp_path, tiny_vit, tiny_image_dataset):
    import pickle

    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=make_pool(tiny_image_dataset))
    trainer.train()
    rows = np.arange(5)
    again = pickle.loads(pickle.dumps(trainer.data_collator.pseudolabels))
    np.testing.assert_array_equal(again(rows), trainer.data_collator.pseudolabels(rows))


def test_fresh_head_by_default_and_warm_start_on_request(tmp_path, tiny_vit, tiny_image_dataset):
    starts: dict[bool, list[torch.Tensor]] = {}

    class Starts(TrainerCallback):
        def __init__(self, kept: list[torch.Tensor]) -> None:
            self.kept = kept

        def on_level_begin(self, args, state, control, model, **kwargs):
            self.kept.append(model.classifier.weight.detach().clone())

    for warm in (False, True):
        starts[warm] = []
        args = make_args(tmp_path / str(warm), warm_start=warm)
        CoSupervisedTrainer(
            tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[Starts(starts[warm])]
        ).train()
    assert torch.equal(*starts[False]) and not torch.equal(*starts[True])


def test_rounds_repeat_a_level_below_the_root(tmp_path, tiny_vit, tiny_image_dataset):
    trainer = CoSupervisedTrainer(
        tiny_vit, make_args(tmp_path, rounds_per_level=3), pool=make_pool(tiny_image_dataset)
    )
    output = trainer.train()
    assert [(record["level"], record["round"]) for record in trainer.history.records] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert output.global_step == 24


def test_the_three_verbs_can_be_called_one_by_one(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    whole = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "whole"), pool=pool)
    whole.train()
    steps = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "steps"), pool=pool)
    for level in range(2):
        plan = steps.prepare_level(level)
        steps.train_level(plan)
        steps.finish_level(plan)
    assert torch.equal(weights(whole)["classifier.weight"], weights(steps)["classifier.weight"])


def test_train_twice_gives_the_same_student(tmp_path, tiny_vit, tiny_image_dataset):
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=make_pool(tiny_image_dataset))
    trainer.train()
    first, steps = weights(trainer), [entry["step"] for entry in trainer.state.log_history]
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history] == steps
    assert all(torch.equal(value, first[name]) for name, value in weights(trainer).items())


def test_a_run_goes_on_after_its_last_finished_level(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    undisturbed = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "a"), pool=pool)
    undisturbed.train()

    class Crash(TrainerCallback):
        def on_level_begin(self, args, state, control, plan, **kwargs):
            if plan.level == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "b"), pool=pool, callbacks=[Crash()]).train()
    again = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "b"), pool=pool)
    with pytest.raises(FileExistsError, match="must not hold another run.*resume_from_checkpoint=True"):
        again.train()
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 12 and [record["level"] for record in again.history.records] == [0, 1]
    assert torch.equal(weights(again)["classifier.weight"], weights(undisturbed)["classifier.weight"])


def test_rows_nobody_answered_leave_training(tmp_path, tiny_vit, tiny_image_dataset):
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=make_pool(tiny_image_dataset, missing=(0, 5, 7)))
    trainer.train()
    for plan in trainer.plans:
        assert not plan.keep_mask[[0, 5, 7]].any()
    assert trainer.plans[0].keep_mask.sum() == 45 and trainer.plans[0].keep_rate == 1.0


def test_inputs_may_come_from_a_dataset_in_another_order(tmp_path, tiny_vit, tiny_image_dataset):
    with_inputs = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "a"), pool=make_pool(tiny_image_dataset))
    with_inputs.train()
    pool = make_pool(tiny_image_dataset, inputs=False)
    shuffled = tiny_image_dataset.shuffle(seed=1)
    apart = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "b"), train_dataset=shuffled, pool=pool)
    apart.train()
    assert torch.equal(weights(with_inputs)["classifier.weight"], weights(apart)["classifier.weight"])


def test_evaluate_and_predict(tmp_path, tiny_vit, tiny_image_dataset):
    trainer = CoSupervisedTrainer(
        tiny_vit,
        make_args(tmp_path, max_steps=40),
        eval_dataset=tiny_image_dataset,
        pool=make_pool(tiny_image_dataset),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.4
    assert metrics["eval_accuracy"] == pytest.approx(trainer.measure_accuracy(tiny_image_dataset))
    assert trainer.evaluate(tiny_image_dataset)["eval_loss"] == pytest.approx(metrics["eval_loss"])
    # Another order of the class names: labels are matched by name.
    names = list(reversed(LABELS))
    other = tiny_image_dataset.cast_column("label", tiny_image_dataset.features["label"])
    other = other.map(lambda row: {"label": 3 - row["label"]}).cast_column(
        "label", type(other.features["label"])(names=names)
    )
    assert trainer.measure_accuracy(other) == pytest.approx(metrics["eval_accuracy"])
    labelled = trainer.predict(tiny_image_dataset)
    assert labelled.metrics["test_accuracy"] == pytest.approx(metrics["eval_accuracy"])
    logits = trainer.predict(tiny_image_dataset.remove_columns("label")).predictions
    np.testing.assert_array_equal(logits, labelled.predictions)
    np.testing.assert_array_equal(logits.argmax(axis=1), trainer.predict_labels(tiny_image_dataset))


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_the_best_checkpoint_of_a_level_comes_back_whole(tmp_path, tiny_vit, tiny_image_dataset, training):
    """A level ends with every weight of its best step, here the second of four by a score that says so."""
    scores, seen = iter([0.1, 0.9, 0.2, 0.3]), []

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    args = make_args(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True, learning_rate=0.1,
        student_training=training,
    )  # fmt: skip
    pool = make_pool(tiny_image_dataset)
    pool = pool.with_hierarchy(TeacherHierarchy(LABELS, pool.hierarchy.levels[0]))
    trainer = CoSupervisedTrainer(
        tiny_vit, args, eval_dataset=tiny_image_dataset, pool=pool, callbacks=[Keep()],
        compute_metrics=lambda prediction: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 4 and not all(torch.equal(value, seen[-1][name]) for name, value in seen[1].items())
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, seen[1][name], atol=0, rtol=0, msg=name)


def test_evaluation_and_checkpoints_within_a_level(tmp_path, tiny_vit, tiny_image_dataset):
    """What the fast loop cannot honour falls back to the standard one, early stopping included."""
    args = make_args(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="accuracy", learning_rate=1e-2, student_training="full",
    )  # fmt: skip
    trainer = CoSupervisedTrainer(
        tiny_vit, args, eval_dataset=tiny_image_dataset, pool=make_pool(tiny_image_dataset),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=10)],
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "_run" / "level-0" / "checkpoint-6").is_dir() and (
        tmp_path / "_run" / "level-1" / "checkpoint-6"
    ).is_dir()
    assert not list(tmp_path.glob("checkpoint-*"))
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(scores) == 6
    assert trainer.measure_accuracy(tiny_image_dataset) == pytest.approx(max(scores[3:]))


def test_a_callback_can_stop_a_level(tmp_path, tiny_vit, tiny_image_dataset):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    for fast in (True, False):
        args = make_args(tmp_path / str(fast), fit_head_on_features=fast)
        output = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[Stop()]).train()
        assert output.global_step == 8


def test_metadata_and_ensemble_assignment(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    kinds = ["insect" if label < 2 else "pet" for label in tiny_image_dataset["label"]]
    teachers = [
        Teacher("generalist"),
        Teacher("insects", level=1, domains=["insect"]), Teacher("pets", level=1, domains=["pet"]),
    ]  # fmt: skip
    pool = PseudolabelPool(TeacherHierarchy(LABELS, teachers), pool.teachers, pool.inputs.add_column("kind", kinds))
    args = make_args(tmp_path / "metadata", assignment="metadata", metadata_column="kind", rejection="none")
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool)
    trainer.train()
    assert trainer.plans[1].assigned_teacher.tolist() == [1 if kind == "insect" else 2 for kind in kinds]

    flat = pool.with_hierarchy(TeacherHierarchy(LABELS, [Teacher(name) for name in ("generalist", "insects", "pets")]))
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "ensemble", assignment="ensemble"), pool=flat)
    trainer.train()
    assert set(trainer.plans[0].assigned_teacher.tolist()) == {3}  # the ensemble of level 0 stands after the teachers
    mean = sum(pool.decode(name) for name in pool.hierarchy.names) / 3
    assert trainer.plans[0].labels.tolist() == mean.argmax(axis=1).tolist()


# --- bad input -------------------------------------------------------------------------------------------------------


def _other_head(tiny_vit: str) -> Any:
    config = copy.deepcopy(AutoModelForImageClassification.from_pretrained(tiny_vit).config)
    config.num_labels = 7
    return AutoModelForImageClassification.from_config(config)


BAD_INPUT: list[tuple[str, dict[str, Any], Callable[[PseudolabelPool, Dataset], dict[str, Any]], str]] = [
    ("k too large", {"rejection_k": 4}, lambda pool, data: {}, r"`rejection_k` must lie in 1..3, got 4"),
    ("k too small", {"rejection_k": 0}, lambda pool, data: {}, r"`rejection_k` must lie in 1..3, got 0"),
    (
        "assignments", {"assignment": ["scope"] * 3}, lambda pool, data: {},
        r"one for each of the 2 levels, got \['scope'",
    ),
    (
        "root of several", {},
        lambda pool, data: {
            "pool": pool.with_hierarchy(TeacherHierarchy(LABELS, [Teacher("generalist"), Teacher("pets")]))
        },
        r"A root level of several teachers .*'ensemble', got 'scope'",
    ),
    (
        "no scopes", {},
        lambda pool, data: {"pool": pool.with_hierarchy(
            TeacherHierarchy(LABELS, [Teacher("generalist"), Teacher("pets", level=1), Teacher("insects", level=1)]))},
        r"needs teachers with a `scope`, got none among \['pets', 'insects'\]",
    ),
    ("metadata", {"assignment": "metadata"}, lambda pool, data: {}, "needs `metadata_column`, got none"),
    (
        "metadata column", {"assignment": "metadata", "metadata_column": "nothing"}, lambda pool, data: {},
        "must have a column 'nothing', got",
    ),
    (
        "no oracle", {"assignment": "oracle_scope"},
        lambda pool, data: {
            "pool": PseudolabelPool(pool.hierarchy, pool.teachers, pool.inputs.remove_columns("oracle_label"))
        },
        "needs `oracle_label` in the pool, got none",
    ),
    (
        "no inputs", {}, lambda pool, data: {"pool": PseudolabelPool(pool.hierarchy, pool.teachers)},
        "`train_dataset` is needed: the pool holds no inputs",
    ),
    (
        "only ground truth",
        {},
        lambda pool, data: {
            "pool": PseudolabelPool(pool.hierarchy, pool.teachers, pool.inputs.remove_columns("image"))
        },
        "`train_dataset` is needed: the pool holds no inputs",
    ),
    (
        "too few rows", {}, lambda pool, data: {"train_dataset": data.select(range(40))},
        "must hold the same examples, got 40 and 48",
    ),
    (
        "other rows", {}, lambda pool, data: {"train_dataset": data.select([0] * 48)},
        "`train_dataset` must hold every id of the other side, got 47 missing of 48",
    ),
    (
        "no eval labels", {}, lambda pool, data: {"eval_dataset": data.remove_columns("label")},
        r"An evaluation set needs labels in a column .*, got \['image'\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "changes, arguments, message", [case[1:] for case in BAD_INPUT], ids=[case[0] for case in BAD_INPUT]
)
def test_bad_input_is_one_clear_error_before_work_starts(
    tmp_path, tiny_vit, tiny_image_dataset, changes, arguments, message
):
    pool = make_pool(tiny_image_dataset)
    keywords = {"pool": pool} | arguments(pool, tiny_image_dataset)
    with pytest.raises(ValueError, match=message):
        CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "out", **changes), **keywords)
    assert not (tmp_path / "out" / "_run").exists()


def test_a_student_must_fit_the_labels(tmp_path, tiny_vit, tiny_image_dataset):
    pool, processor = make_pool(tiny_image_dataset), AutoImageProcessor.from_pretrained(tiny_vit)
    with pytest.raises(ValueError, match="must have 4 labels like the pool, got 7"):
        CoSupervisedTrainer(_other_head(tiny_vit), make_args(tmp_path), pool=pool, processing_class=processor)
    student = AutoModelForImageClassification.from_pretrained(tiny_vit)
    student.config.id2label = dict(enumerate(reversed(LABELS)))
    with pytest.raises(ValueError, match="in the same order, .*got"):
        CoSupervisedTrainer(student, make_args(tmp_path), pool=pool, processing_class=processor)
    with pytest.raises(ValueError, match="`processing_class` .* is needed beside a model object"):
        CoSupervisedTrainer(AutoModelForImageClassification.from_pretrained(tiny_vit), make_args(tmp_path), pool=pool)
    with pytest.raises(TypeError, match="must be a `CoSupervisedConfig`, got `dict`"):
        CoSupervisedTrainer(tiny_vit, {"output_dir": "x"}, pool=pool)
    with pytest.raises(ValueError, match="`optimizers` cannot be given"):
        CoSupervisedTrainer(tiny_vit, make_args(tmp_path), pool=pool, optimizers=(object(), None))


def test_an_empty_keep_set_is_an_error(tmp_path, tiny_vit, tiny_image_dataset):
    """A generalist that always says 'ant' and specialists that never do: with k = 1 nothing agrees."""
    ids = row_keys(tiny_image_dataset, "image")
    sure = {"generalist": np.eye(4)[[0] * 48], "insects": np.eye(4)[[1] * 48], "pets": np.eye(4)[[2] * 48]}
    inputs = tiny_image_dataset.remove_columns("label")
    pool = PseudolabelPool.from_predictions(make_hierarchy(), ids, sure, inputs=inputs)
    trainer = CoSupervisedTrainer(
        tiny_vit, make_args(tmp_path, rejection_k=1, max_steps=200, learning_rate=1e-2), pool=pool
    )
    with pytest.raises(
        ValueError, match=r"Level 1 must keep at least one example, got none of 48.*larger `rejection_k`"
    ):
        trainer.train()
