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
from conftest import save_tiny_vit
from datasets import Dataset, Image, concatenate_datasets
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
from hf_cosupervise.data.keys import row_keys

pytestmark = pytest.mark.core

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
        "train begins",
        "level 0 begins",
        "level 0 ends",
        "level 1 begins",
        "level 1 ends",
        "train ends",
    ]
    assert witness.steps == sorted(witness.steps) and witness.steps[-1] == 12
    assert output.global_step == trainer.state.global_step == 12
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    assert output.training_loss == pytest.approx(np.mean(losses), rel=1e-5)
    history = json.loads((tmp_path / "_run" / "history.json").read_text())["levels"]
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
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=4,
    )
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


@pytest.mark.parametrize("names", ["label", "labels", "oracle_label"])
@pytest.mark.parametrize("lacking", ["label", "input"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_an_evaluation_set_that_lacks_a_cell_is_refused_before_any_work(
    kind, lacking, names, tmp_path, tiny_vit, tiny_bert, tiny_image_dataset, tiny_text_dataset
):
    data, student = (tiny_image_dataset, tiny_vit) if kind == "image" else (tiny_text_dataset, tiny_bert)
    pool = make_pool(data)
    trainer = CoSupervisedTrainer(student, make_args(tmp_path), pool=pool)
    if names == "labels" and lacking == "label":  # label ids that the trainer itself would read as they are
        data = data.remove_columns("label").add_column("label", [None, *data["label"][1:]])
    whole = data if names == "label" else data.rename_column("label", names)
    column = names if lacking == "label" else kind
    cells = whole.select_columns([column]).with_format(None)
    cells = cells.cast_column(column, Image(decode=False)) if column == "image" else cells
    table = {column: [None if row in (5, 7) else cell for row, cell in enumerate(cells[column])]}
    lost = Dataset.from_dict(table, features=cells.features).cast_column(column, whole.features[column])
    broken = concatenate_datasets([whole.remove_columns(column), lost], axis=1)
    trainer.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    sentence = f"Column `{column}` must hold "
    asked = [
        lambda: trainer.evaluate(broken),
        lambda: trainer.evaluate({"a": broken}),
        lambda: trainer.predict(broken),
        lambda: CoSupervisedTrainer(student, make_args(tmp_path / "b"), pool=pool, eval_dataset=broken),
        lambda: CoSupervisedTrainer(student, make_args(tmp_path / "b"), pool=pool, eval_dataset={"a": broken}),
    ]
    if lacking == "input":
        asked.append(lambda: trainer.predict(broken.remove_columns(names)))
        sentence += (
            "what the student can read in every row, got no input, or a text without a token, in row 5 (2 such rows). "
            "Leave these rows out."
        )
    for ask in asked:
        with pytest.raises(ValueError) as error:
            ask()
        assert str(error.value).startswith(sentence), error.value
        if lacking == "label":
            first, count = (0, 3) if names == "labels" else (5, 2)
            assert f"got None in row {first} ({count} such rows)" in str(error.value)


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_the_best_checkpoint_of_a_level_comes_back_whole(tmp_path, tiny_vit, tiny_image_dataset, training):
    """A level ends with every weight of its best step, here the second of four by a score that says so."""
    scores, seen = iter([0.1, 0.9, 0.2, 0.3]), []

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    args = make_args(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        learning_rate=0.1,
        student_training=training,
    )
    pool = make_pool(tiny_image_dataset)
    pool = pool.with_hierarchy(TeacherHierarchy(LABELS, pool.hierarchy.levels[0]))
    trainer = CoSupervisedTrainer(
        tiny_vit,
        args,
        eval_dataset=tiny_image_dataset,
        pool=pool,
        callbacks=[Keep()],
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    assert len(seen) == 4 and not all(torch.equal(value, seen[-1][name]) for name, value in seen[1].items())
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, seen[1][name], atol=0, rtol=0, msg=name)


def test_evaluation_and_checkpoints_within_a_level(tmp_path, tiny_vit, tiny_image_dataset):
    """What the fast loop cannot honour falls back to the standard one, early stopping included."""
    args = make_args(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        learning_rate=1e-2,
        student_training="full",
    )
    trainer = CoSupervisedTrainer(
        tiny_vit,
        args,
        eval_dataset=tiny_image_dataset,
        pool=make_pool(tiny_image_dataset),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=10)],
    )
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
        Teacher("insects", level=1, domains=["insect"]),
        Teacher("pets", level=1, domains=["pet"]),
    ]
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
    ("k too small", {"rejection_k": 0}, lambda pool, data: {}, r"`rejection_k` must be a whole number of at least 1"),
    (
        "assignments",
        {"assignment": ["scope"] * 3},
        lambda pool, data: {},
        r"one for each of the 2 levels, got \['scope'",
    ),
    (
        "root of several",
        {"assignment": "scope"},
        lambda pool, data: {
            "pool": pool.with_hierarchy(TeacherHierarchy(LABELS, [Teacher("generalist"), Teacher("pets")]))
        },
        r"A root level of several teachers .*'ensemble', got 'scope'",
    ),
    (
        "no scopes",
        {"assignment": "scope"},
        lambda pool, data: {
            "pool": pool.with_hierarchy(
                TeacherHierarchy(
                    LABELS, [Teacher("generalist"), Teacher("pets", level=1), Teacher("insects", level=1)]
                )
            )
        },
        r"needs teachers with a `scope`, got none among \['pets', 'insects'\]",
    ),
    ("metadata", {"assignment": "metadata"}, lambda pool, data: {}, "needs `metadata_column`, got none"),
    (
        "metadata column",
        {"assignment": "metadata", "metadata_column": "nothing"},
        lambda pool, data: {},
        "must have a column 'nothing', got",
    ),
    (
        "no oracle",
        {"assignment": "oracle_scope"},
        lambda pool, data: {
            "pool": PseudolabelPool(pool.hierarchy, pool.teachers, pool.inputs.remove_columns("oracle_label"))
        },
        "needs `oracle_label` in the pool, got none",
    ),
    (
        "no inputs",
        {},
        lambda pool, data: {"pool": PseudolabelPool(pool.hierarchy, pool.teachers)},
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
        "too few rows",
        {},
        lambda pool, data: {"train_dataset": data.select(range(40))},
        "must hold the same examples, got 40 and 48",
    ),
    (
        "other rows",
        {},
        lambda pool, data: {"train_dataset": data.select([0] * 48)},
        "`train_dataset` must hold every id of the other side, got 47 missing of 48",
    ),
    (
        "no eval labels",
        {},
        lambda pool, data: {"eval_dataset": data.remove_columns("label")},
        r"An evaluation set needs labels in a column .*, got \['image'\]",
    ),
]


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


@pytest.mark.parametrize("head_solver", ["steps", "ridge"])
@pytest.mark.parametrize(("num_examples", "levels"), [(1, 1), (1, 2), (7, 1), (7, 2)])
def test_the_smallest_tasks(tmp_path, tiny_image_dataset, num_examples, levels, head_solver):
    # one example, one teacher, two labels; from storage that cannot be written to
    labels, inputs = ["dark", "light"], tiny_image_dataset.select(range(num_examples)).remove_columns("label")
    teachers = [Teacher("all"), *(Teacher(name, level=1, scope=[name]) for name in labels)][: 1 if levels == 1 else 3]
    probs = np.random.default_rng(0).dirichlet([1, 1], num_examples)
    predictions = {teacher.name: probs for teacher in teachers}
    PseudolabelPool.from_predictions(
        TeacherHierarchy(labels, teachers), list(range(num_examples)), predictions, inputs=inputs
    ).save(tmp_path / "pool")
    for path in [*(tmp_path / "pool").rglob("*"), tmp_path / "pool"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    args = make_args(tmp_path / "run", rejection="none", head_solver=head_solver)
    student = save_tiny_vit(tmp_path / "student", labels)
    trainer = CoSupervisedTrainer(student, args, pool=PseudolabelPool.load(tmp_path / "pool"))
    assert math.isfinite(trainer.train().training_loss)
    assert [record["consistency/num_kept"] for record in trainer.history.records] == [num_examples] * levels


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


# --- a head in closed form -------------------------------------------------------------------------------------------


def features_of(trainer: CoSupervisedTrainer, data: Dataset) -> np.ndarray:
    """What the head reads, by a hook of our own, one image at a time."""
    rows: list[torch.Tensor] = []
    hook = trainer.model.classifier.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    with torch.no_grad():
        for image in data["image"]:
            trainer.model.eval()(**trainer.processor([image]))
    hook.remove()
    return torch.cat(rows).numpy()


def logits_of(trainer: CoSupervisedTrainer, data: Dataset) -> np.ndarray:
    inputs = trainer.processor(list(data["image"]))
    with torch.no_grad():
        return trainer.model.eval()(**inputs).logits.numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pseudolabels": "hard"},
        {"label_smoothing_factor": 0.2},
        {"ridge_alpha": 1.0, "ridge_logit_scale": 3.0},
        {"rejection": "none"},
        {"rejection_k": 1},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_a_ridge_head_is_that_of_scikit_learn(tmp_path, tiny_vit, tiny_image_dataset, changes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    args = make_args(tmp_path, head_solver="ridge", **changes)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset, missing=(0, 7)))
    output = trainer.train()
    plan = trainer.plans[-1]
    kept = np.flatnonzero(plan.keep_mask)
    assert 4 < len(kept) <= 46
    features = features_of(trainer, tiny_image_dataset).astype(np.float64)
    targets = np.stack(
        [trainer.pool.decode(trainer.pool.source_names[plan.assigned_teacher[row]])[row] for row in kept]
    ).astype(np.float64)
    if args.pseudolabels == "hard":
        targets = np.eye(4)[targets.argmax(axis=1)]
    targets = (1 - args.label_smoothing_factor) * targets + args.label_smoothing_factor / 4
    alpha = trainer.history.records[-1]["head/ridge_alpha"]
    assert args.ridge_alpha in ("auto", alpha)
    penalty = alpha * features[kept].var(axis=0).mean() * len(kept)
    theirs = linear_model.Ridge(alpha=penalty).fit(features[kept], targets)
    expected = args.ridge_logit_scale * theirs.predict(features)
    np.testing.assert_allclose(logits_of(trainer, tiny_image_dataset), expected, atol=2e-3)
    # the loss is that of the fitted head on what it was fitted to
    log_probs = expected[kept] - np.log(np.exp(expected[kept]).sum(axis=1, keepdims=True))
    loss = -(targets * log_probs).sum(axis=1).mean()
    assert trainer.history.records[-1]["train_loss"] == pytest.approx(loss, rel=1e-3)
    assert output.global_step == 2


def test_a_ridge_student_is_an_ordinary_model(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path, head_solver="ridge"), pool=pool)
    before = weights(trainer)
    output = trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert output.global_step == trainer.state.global_step == 2 and math.isfinite(output.training_loss)
    assert [(record["level"], record["num_steps"]) for record in trainer.history.records] == [(0, 1), (1, 1)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(record["train_loss"]) for record in trainer.history.records]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    trainer.save_model()
    trainer.create_model_card()
    found = ", ".join(str(record["head/ridge_alpha"]) for record in trainer.history.records)
    assert f"| `ridge_alpha` | `auto: {found}` |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    batch = AutoImageProcessor.from_pretrained(tmp_path)(list(tiny_image_dataset["image"]), return_tensors="pt")
    with torch.no_grad():
        plain = torch.log_softmax(model(**batch).logits, dim=1)
    ours = torch.cat([chunk for _, chunk in trainer.predict_log_probs(tiny_image_dataset)])
    torch.testing.assert_close(plain, ours, atol=1e-4, rtol=1e-4)
    assert trainer.measure_accuracy(tiny_image_dataset) > 0.5


def test_callbacks_see_a_ridge_level_as_one_step(tmp_path, tiny_vit, tiny_image_dataset):
    class Witness(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[tuple[str, int]] = []

        def on_level_begin(self, args, state, control, plan, **kwargs):
            self.events.append(("level begins", plan.level))

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.events.append(("epoch begins", state.global_step))

        def on_step_end(self, args, state, control, **kwargs):
            self.events.append(("step ends", state.global_step))
            assert state.max_steps == 1

        def on_epoch_end(self, args, state, control, **kwargs):
            self.events.append(("epoch ends", state.global_step))

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                assert math.isfinite(logs["loss"])
                self.events.append(("log", state.global_step))

        def on_level_end(self, args, state, control, plan, metrics, **kwargs):
            self.events.append(("level ends", plan.level))

    witness = Witness()
    args = make_args(tmp_path, head_solver="ridge")
    CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[witness]).train()
    assert witness.events == [
        ("level begins", 0),
        ("epoch begins", 0),
        ("step ends", 1),
        ("log", 1),
        ("epoch ends", 1),
        ("level ends", 0),
        # steps of a level count from 0, those of the log go on
        ("level begins", 1),
        ("epoch begins", 0),
        ("step ends", 1),
        ("log", 2),
        ("epoch ends", 1),
        ("level ends", 1),
    ]


def test_a_silent_ridge(tmp_path, tiny_vit, tiny_image_dataset):
    args = make_args(tmp_path, head_solver="ridge", logging_strategy="no")
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    trainer.train()
    assert not [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(record["train_loss"]) for record in trainer.history.records)


def test_a_ridge_knows_no_seed_batch_or_rate(tmp_path, tiny_vit, tiny_image_dataset):
    pool, heads = make_pool(tiny_image_dataset), []
    for number, changes in enumerate(
        ({}, {"seed": 7, "data_seed": 9}, {"per_device_train_batch_size": 5, "learning_rate": 1.0, "max_steps": 99})
    ):
        args = make_args(tmp_path / str(number), head_solver="ridge", **changes)
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool)
        assert trainer.train().global_step == 2
        heads.append(weights(trainer)["classifier.weight"])
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_a_ridge_run_twice_in_rounds_and_after_a_crash(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    undisturbed = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "a", head_solver="ridge"), pool=pool)
    undisturbed.train()
    expected = weights(undisturbed)["classifier.weight"]
    undisturbed.train()  # what was kept of the run before (features, sums of them) is still right
    assert torch.equal(weights(undisturbed)["classifier.weight"], expected)

    class Crash(TrainerCallback):
        def on_level_begin(self, args, state, control, plan, **kwargs):
            if plan.level == 1:
                raise KeyboardInterrupt

    args = make_args(tmp_path / "b", head_solver="ridge")
    with pytest.raises(KeyboardInterrupt):
        CoSupervisedTrainer(tiny_vit, args, pool=pool, callbacks=[Crash()]).train()
    again = CoSupervisedTrainer(tiny_vit, args, pool=pool)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 2 and [record["num_steps"] for record in again.history.records] == [1, 1]
    torch.testing.assert_close(weights(again)["classifier.weight"], expected, atol=1e-4, rtol=0)

    args = make_args(tmp_path / "c", head_solver="ridge", rounds_per_level=3)
    assert CoSupervisedTrainer(tiny_vit, args, pool=pool).train().global_step == 4


RIDGE_REFUSED = [
    ({"fit_head_on_features": False}, "`fit_head_on_features` is off"),
    ({"save_strategy": "steps"}, "checkpoints within a level are asked for"),
    ({"eval_strategy": "epoch"}, "evaluation within a level is asked for"),
]


@pytest.mark.parametrize(("changes", "reason"), RIDGE_REFUSED, ids=[next(iter(case[0])) for case in RIDGE_REFUSED])
def test_a_ridge_that_cannot_be(tmp_path, tiny_vit, tiny_image_dataset, changes, reason):
    args = make_args(tmp_path / "out", head_solver="ridge", **changes)
    with pytest.raises(ValueError) as error:
        CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), eval_dataset=tiny_image_dataset)
    assert str(error.value) == (f"`head_solver` 'ridge' needs a linear head on features, but {reason}. Use 'steps'.")
    assert not (tmp_path / "out" / "_run").exists()


def test_a_ridge_needs_a_head_on_one_feature_per_example(tmp_path, tiny_bert, tiny_text_dataset):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=4,
    )
    with pytest.raises(ValueError, match="'ridge' needs a linear head on features, but the student is not a linear"):
        CoSupervisedTrainer(
            GPT2ForSequenceClassification(config),
            make_args(tmp_path, head_solver="ridge"),
            pool=make_pool(tiny_text_dataset),
            processing_class=tokenizer,
        )


def test_a_ridge_loss_of_the_user_s_own_is_refused(tmp_path, tiny_vit, tiny_image_dataset):
    with pytest.raises(ValueError, match=r"'ridge' needs .*, but `compute_loss_func` is given\. Use 'steps'\."):
        CoSupervisedTrainer(
            tiny_vit,
            make_args(tmp_path, head_solver="ridge"),
            pool=make_pool(tiny_image_dataset),
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
        )


# --- pseudolabels that name some of many labels ----------------------------------------------------------------------

MANY = tuple(f"kind-{number}" for number in range(40))


@pytest.mark.parametrize(
    ("training", "rows"),
    [
        *(("probe", rows) for rows in ([0], [47], [0, 1, 2, 3], [20], [3, 30, 46])),
        *((training, rows) for training in ("lora", "full") for rows in ([0], [3, 30, 46])),
    ],
)
def test_rows_without_an_input_train_nobody(training, rows, tiny_vit, tiny_image_dataset, tmp_path):
    # the same as from a pool that has no such rows, wherever they are, and whether somebody answered them or not
    others = np.setdiff1d(np.arange(48), rows)
    whole = make_pool(tiny_image_dataset, missing=tuple(rows[1:]))
    cells = tiny_image_dataset.cast_column("image", Image(decode=False))["image"]
    broken = Dataset.from_dict({"image": [None if row in rows else cell for row, cell in enumerate(cells)]})
    broken = broken.cast_column("image", Image()).add_column("id", whole.ids.tolist())
    plans = []
    for folder, pool in (("a", PseudolabelPool(whole.hierarchy, whole.teachers, broken)), ("b", whole.select(others))):
        args = make_args(tmp_path / folder, student_training=training, rejection="none")
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool)
        trainer.train()
        plans.append((trainer.plans, trainer.student.tensors()))
    (found, student), (expected, same) = plans
    for plan, other in zip(found, expected, strict=True):
        assert np.flatnonzero(plan.keep_mask).tolist() == others[other.keep_mask].tolist()
        assert np.array_equal(plan.assigned_teacher[others], other.assigned_teacher)
        assert (plan.assigned_teacher[rows] == -1).all() and (plan.labels[rows] == -1).all()
        assert plan.metrics == {name: other.metrics[name] for name in plan.metrics}
    for name, value in student.items():
        torch.testing.assert_close(value, same[name], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="session")
def vit_of_many(tiny_folder: Path) -> str:
    return save_tiny_vit(tiny_folder / "vit-40", MANY)


def make_pool_of_many(data: Dataset, pool_k: int = 4, *, missing: tuple[int, ...] = (2,)) -> PseudolabelPool:
    """Three teachers of 40 labels, each sure of the colour that an image has."""
    rng, gold = np.random.default_rng(0), np.array(data["label"])
    teachers = [Teacher("generalist"), Teacher("first", level=1), Teacher("second", level=1)]
    predictions = {}
    for teacher in teachers:
        probs = 0.5 * rng.dirichlet(np.full(40, 0.2), len(data)) + 0.5 * np.eye(40)[10 * gold + rng.integers(2)]
        probs[list(missing)] = 0.0
        predictions[teacher.name] = probs
    predictions["first"][5] = 0.0
    return PseudolabelPool.from_predictions(
        TeacherHierarchy(MANY, teachers),
        row_keys(data, "image"),
        predictions,
        pool_k=pool_k,
        inputs=data.remove_columns("label"),
    )


def decoded_pool(pool: PseudolabelPool) -> PseudolabelPool:
    """The same pseudolabels over all labels, but for one more rounding to float16."""
    predictions = {name: pool.decode(name) for name in pool.hierarchy.names}
    return PseudolabelPool.from_predictions(
        pool.hierarchy, pool.ids, predictions, pool_k=40, inputs=pool.inputs.remove_columns("id")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "max_grad_norm": 0.3},
        {"pseudolabels": "hard", "label_smoothing_factor": 0.1},
        {"assignment": "ensemble"},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_sparse_pseudolabels_train_the_same_student(tmp_path, vit_of_many, tiny_image_dataset, changes, monkeypatch):
    pool = make_pool_of_many(tiny_image_dataset)
    changes = {"assignment": "agreement", "learning_rate": 1e-2} | changes
    found, asked = [], []
    for number, (fast, sparse) in enumerate(((True, True), (False, True), (False, False))):
        with monkeypatch.context() as patch:
            if not sparse:  # the same pool, by way of all labels
                patch.setattr("hf_cosupervise.training.level_loss._pays_sparse", lambda pool, plan: False)
            args = make_args(tmp_path / str(number), fit_head_on_features=fast, **changes)
            trainer = CoSupervisedTrainer(vit_of_many, args, pool=pool)
            trainer.train()
        targets = trainer.data_collator.pseudolabels(np.array([0, 1]))
        asked.append(isinstance(targets, tuple))
        found.append((weights(trainer), [record["train_loss"] for record in trainer.history.records]))
    # an ensemble has no stored rows, so its level is trained on all labels
    assert asked == [changes["assignment"] != "ensemble"] * 2 + [False]
    for other, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-4)
        for name, value in found[0][0].items():
            torch.testing.assert_close(value, other[name], atol=1e-5, rtol=0, msg=name)


def test_sparse_and_decoded_pools_give_the_same_ridge(tmp_path, vit_of_many, tiny_image_dataset):
    pool, heads = make_pool_of_many(tiny_image_dataset), []
    for number, own in enumerate((pool, decoded_pool(pool))):
        args = make_args(
            tmp_path / str(number),
            assignment="agreement",
            rejection="none",
            head_solver="ridge",
            label_smoothing_factor=0.1,
        )
        trainer = CoSupervisedTrainer(vit_of_many, args, pool=own)
        trainer.train()
        heads.append(weights(trainer)["classifier.weight"])
        assert isinstance(trainer.data_collator.pseudolabels(np.array([0])), tuple) is (number == 0)
    # float16 rounds to 5e-4 of each probability, and logits are ten times a prediction
    torch.testing.assert_close(*heads, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("pool_k", "expected"), [(1, True), (10, True), (11, False), (40, False)])
def test_sparse_pseudolabels_where_they_pay(tmp_path, vit_of_many, tiny_image_dataset, pool_k, expected):
    # 4 * k <= 40
    args = make_args(tmp_path, assignment="agreement", max_steps=1)
    trainer = CoSupervisedTrainer(vit_of_many, args, pool=make_pool_of_many(tiny_image_dataset, pool_k))
    trainer.train()
    assert isinstance(trainer.data_collator.pseudolabels(np.array([0])), tuple) is expected


def test_teachers_that_keep_different_numbers_of_labels_are_trained_on_all(tmp_path, vit_of_many, tiny_image_dataset):
    four, eight = (make_pool_of_many(tiny_image_dataset, k) for k in (4, 8))
    mixed = PseudolabelPool(four.hierarchy, four.teachers | {"first": eight.teachers["first"]}, four.inputs)
    args = make_args(tmp_path, assignment="agreement", rejection="none", max_steps=2)
    trainer = CoSupervisedTrainer(vit_of_many, args, pool=mixed)
    trainer.train()
    plan, rows = trainer.plans[1], np.array([0, 1, 3, 4])
    found = trainer.data_collator.pseudolabels(rows)
    names = [mixed.source_names[source] for source in plan.assigned_teacher[rows]]
    assert np.array_equal(found, np.stack([mixed.decode(name)[row] for name, row in zip(names, rows)]))


def test_a_loss_of_the_user_s_own_gets_all_labels(tmp_path, vit_of_many, tiny_image_dataset):
    shapes, sums = set(), []

    def compute_loss(outputs, labels, num_items_in_batch=None):
        shapes.add(tuple(labels.shape[1:]))
        sums.extend(labels.sum(dim=1).tolist())
        return -(labels * torch.log_softmax(outputs.logits, dim=1)).sum(dim=1).mean()

    pool, found = make_pool_of_many(tiny_image_dataset), []
    for number, own in enumerate((compute_loss, None)):
        args = make_args(tmp_path / str(number), assignment="agreement", learning_rate=1e-2)
        trainer = CoSupervisedTrainer(vit_of_many, args, pool=pool, compute_loss_func=own)
        trainer.train()
        found.append(weights(trainer)["classifier.weight"])
    assert shapes == {(40,)} and sums == pytest.approx([1.0] * len(sums), abs=1e-5)
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)  # and it is the loss that is used without it


def test_evaluation_within_a_level_of_sparse_pseudolabels(tmp_path, vit_of_many, tiny_image_dataset):
    labels = [MANY[10 * label] for label in tiny_image_dataset["label"]]
    held_out = tiny_image_dataset.remove_columns("label").add_column("label", labels)
    args = make_args(
        tmp_path,
        assignment="agreement",
        rejection="none",
        eval_strategy="steps",
        eval_steps=3,
        student_training="full",
    )
    trainer = CoSupervisedTrainer(vit_of_many, args, pool=make_pool_of_many(tiny_image_dataset), eval_dataset=held_out)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    # loss on rows of the pool itself, as a user may ask for while a level is in training
    loader = trainer.get_test_dataloader(trainer.train_dataset)
    (batch, *_) = loader
    loss, logits, found = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
    plan, rows = trainer.plans[1], np.array(trainer.train_dataset[: len(logits)]["cosupervise_row"])
    targets = torch.from_numpy(trainer.pool.pseudolabels(plan.assigned_teacher[rows], rows))
    expected = -(targets * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
    assert found is None and float(loss) == pytest.approx(float(expected), rel=1e-4)


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["steps", "ridge"])
def test_features_in_half_the_space_give_nearly_the_same_student(tmp_path, tiny_vit, tiny_image_dataset, solver):
    pool, log_probs = make_pool(tiny_image_dataset), []
    for dtype in ("float32", "float16"):
        args = make_args(
            tmp_path / dtype,
            features_dtype=dtype,
            head_solver=solver,
            learning_rate=1e-2,
            rejection="none",
            assignment="oracle_scope",
            ridge_alpha=0.1,
        )
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool)
        trainer.train()
        log_probs.append(torch.cat([chunk for _, chunk in trainer.predict_log_probs(tiny_image_dataset)]))
        (path,) = (tmp_path / dtype / "_run" / "features").glob("*/shard-*/features.npy")
        assert np.load(path, mmap_mode="r").dtype == np.dtype(dtype)
        assert trainer.feature_store.dtype == np.dtype(dtype)
    torch.testing.assert_close(*log_probs, atol=0.02, rtol=0)
    assert not torch.equal(*log_probs)


@pytest.mark.parametrize("solver", ["steps", "ridge"])
def test_features_computed_elsewhere_are_trained_on(tmp_path, tiny_vit, tiny_image_dataset, solver):
    args = make_args(tmp_path, head_solver=solver, features_dir=str(tmp_path / "features"), max_steps=100)
    args.learning_rate = 0.05
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    given = np.random.default_rng(0).normal(scale=0.1, size=(48, 16)).astype(np.float32)
    given[np.arange(48), np.array(tiny_image_dataset["label"])] += 5.0  # as no backbone would: the labels themselves
    trainer.feature_store.write(tiny_image_dataset, "image", [given[:20], given[20:]])
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    trainer.train()
    assert trainer.measure_accuracy(tiny_image_dataset) > 0.9 and not seen
    (store,) = (tmp_path / "features").iterdir()
    assert len(list(store.iterdir())) == 1 and not (tmp_path / "_run" / "features").exists()


def test_only_a_frozen_backbone_has_features(tmp_path, tiny_vit, tiny_image_dataset):
    for training in ("lora", "full"):
        args = make_args(tmp_path / training, student_training=training)
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
        with pytest.raises(ValueError) as error:
            _ = trainer.feature_store
        assert str(error.value) == (
            "Only a linear head on a frozen backbone has features, got another kind of student."
        )


def test_rejected_examples_are_trained_on_with_the_students_label(tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"relabel_above": 0.3, "rejection_rule": "agreement_set", "rejection_k": 1}
    plain = CoSupervisedTrainer(
        tiny_vit, make_args(tmp_path / "a", **changes | {"relabel_above": None}), pool=make_pool(tiny_image_dataset)
    )
    plain.train()
    trainer = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "b", **changes), pool=make_pool(tiny_image_dataset))
    trainer.train()
    first, plan = plain.plans[1], trainer.plans[1]
    own = plan.relabelled >= 0
    assert own.any() and not (own & first.keep_mask).any() and (plan.keep_mask == (first.keep_mask | own)).all()
    assert trainer.history.records[1]["consistency/num_kept"] == plan.keep_mask.sum()
    slow = CoSupervisedTrainer(
        tiny_vit, make_args(tmp_path / "c", fit_head_on_features=False, **changes), pool=make_pool(tiny_image_dataset)
    )
    slow.train()
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, weights(slow)[name], atol=1e-5, rtol=0)
    again = CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "b", **changes), pool=make_pool(tiny_image_dataset))
    again.train(resume_from_checkpoint=True)
    np.testing.assert_array_equal(again.plans[1].relabelled, plan.relabelled)
