"""Text students whose head reads the mean, the first or the last token, and what is exported of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import LABELS, make_args, make_pool
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, Teacher, TeacherHierarchy, build_pool, load_student
from hf_cosupervise.students.pooling import exported_pooling, pool_tokens
from hf_cosupervise.students.publishing import export_student

pytestmark = pytest.mark.core
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_WORDS = {"vocab_size": 15, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0}
_DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, **_WORDS}
_GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 15, "initializer_range": 0.5}
_MODERN = {**_SHAPE, **_WORDS, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
BACKBONES: dict[str, Any] = {
    "roberta": lambda: RobertaModel(RobertaConfig(**_SHAPE, **_WORDS)),
    "electra": lambda: ElectraModel(ElectraConfig(**_SHAPE, **_WORDS, embedding_size=16)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**_DISTIL)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**_SHAPE, **_WORDS)),
    "gpt2": lambda: GPT2Model(GPT2Config(**_GPT)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**_MODERN)),
}


@pytest.fixture
def backbone(tmp_path: Path, tiny_bert: str):
    def save(kind: str) -> str:
        folder = tmp_path / kind
        if kind == "bert":  # without a pooler
            BertForMaskedLM.from_pretrained(tiny_bert).save_pretrained(folder)
        else:
            torch.manual_seed(0)
            BACKBONES[kind]().save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
        return str(folder)

    return save


def test_tokens_are_pooled_by_their_mask() -> None:
    states = torch.tensor([[[1.0], [3.0], [9.0]], [[7.0], [2.0], [4.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padded on the right, and on the left
    assert pool_tokens(states, mask, "mean").tolist() == [[2.0], [3.0]]
    assert pool_tokens(states, mask, "cls").tolist() == [[1.0], [2.0]]
    assert pool_tokens(states, mask, "last").tolist() == [[3.0], [4.0]]
    assert pool_tokens(states, None, "last").tolist() == [[9.0], [4.0]]


def answers(folder: Path, texts: list[str]) -> torch.Tensor:
    """What an exported student says, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    kind = exported_pooling(folder).get("token_pooling")
    auto_model = AutoModelForSequenceClassification if kind is None else AutoModelForTokenClassification
    with torch.no_grad():
        logits = auto_model.from_pretrained(folder).eval()(**batch).logits
    mask = batch["attention_mask"][..., None]
    pooled = {
        None: lambda: logits,
        "mean": lambda: (logits * mask).sum(1) / mask.sum(1),
        "cls": lambda: logits[:, 0],
        "last": lambda: logits[torch.arange(len(logits)), mask[..., 0].sum(1) - 1],
    }
    return pooled[kind]()


@pytest.mark.parametrize(
    ("pooling", "training"),
    [("mean", "probe"), ("mean", "lora"), ("mean", "full"), ("cls", "full"), ("last", "probe")],
)
def test_it_is_trained_and_exported_as_an_ordinary_model(
    tmp_path, backbone, tiny_text_dataset, pooling, training, caplog
):
    args = make_args(tmp_path / "out", student_training=training, pooling=pooling, learning_rate=0.05)
    trainer = CoSupervisedTrainer(backbone("bert"), args, pool=make_pool(tiny_text_dataset))
    assert (trainer.student.head is not None) == (training == "probe")  # fitted on features
    trainer.train()
    with caplog.at_level(logging.WARNING, "hf_cosupervise"):
        trainer.save_model()
    texts = tiny_text_dataset[:9]["text"]  # of several lengths
    with torch.no_grad():
        expected = trainer.model.eval()(**trainer.processor(texts)).logits
    torch.testing.assert_close(answers(tmp_path / "out", texts), expected, atol=1e-5, rtol=1e-5)
    # No classifier of BERT's reads the last token.
    assert exported_pooling(tmp_path / "out").get("token_pooling") == ("last" if pooling == "last" else None)
    assert ("can read 'last' of the tokens" in caplog.text) == (pooling == "last")
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("AutoModelForTokenClassification" in card) == (pooling == "last")
    assert ("In float32 or bfloat16" in card) == (pooling == "mean")
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("kind", "pooling", "exported"),
    [
        ("roberta", "mean", None),
        ("roberta", "cls", None),
        ("electra", "mean", None),  # a rectifier stands before its last layer
        ("electra", "cls", None),
        ("distilbert", "mean", None),
        ("distilbert", "cls", None),
        ("mpnet", "cls", None),
        ("mpnet", "mean", "mean"),  # its attention adds distances, and is never even
        ("gpt2", "mean", "mean"),
        ("gpt2", "last", None),
        ("modernbert", "mean", None),
        ("modernbert", "cls", None),
    ],
)
def test_each_architecture_as_ordinary_as_it_can_be(backbone, tmp_path, tiny_text_dataset, kind, pooling, exported):
    student, tokenizer = load_student(backbone(kind), LABELS, pooling=pooling)
    assert student.config.classifier_pooling == pooling
    torch.manual_seed(1)
    torch.nn.init.normal_(list(student.parameters())[-1])
    export_student(student, tmp_path / "out", tokenizer)
    assert exported_pooling(tmp_path / "out").get("token_pooling") == exported
    texts = tiny_text_dataset[:6]["text"]
    with torch.no_grad():
        expected = student.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(answers(tmp_path / "out", texts), expected, atol=1e-5, rtol=1e-5)


def test_the_head_reads_what_is_pooled(backbone, tiny_text_dataset) -> None:
    """By the backbone alone, without anything of ours."""
    student, tokenizer = load_student(backbone("bert"), LABELS, pooling="mean")
    text = tiny_text_dataset[0]["text"]
    inputs = tokenizer([text, text + " often often"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = student.eval().bert(**{name: value[:1] for name, value in inputs.items()})[0]
        own = student.classifier(states[0][inputs["attention_mask"][0] == 1].mean(dim=0))
        torch.testing.assert_close(student(**inputs).logits[0], own)


def test_poolings_share_no_features(backbone, tmp_path, tiny_text_dataset) -> None:
    folder, pool, kept = backbone("bert"), make_pool(tiny_text_dataset), {}
    for pooling in ("mean", "cls", "last"):
        args = make_args(tmp_path / pooling, pooling=pooling, features_dir=str(tmp_path / "features"))
        kept[pooling] = CoSupervisedTrainer(folder, args, pool=pool).pool_features()
    assert not torch.allclose(kept["mean"], kept["cls"]) and not torch.allclose(kept["last"], kept["cls"])


def test_a_run_is_not_gone_on_with_under_another_pooling(backbone, tmp_path, tiny_text_dataset) -> None:
    folder, pool = backbone("bert"), make_pool(tiny_text_dataset)
    CoSupervisedTrainer(folder, make_args(tmp_path / "out", pooling="mean"), pool=pool).train()
    other = CoSupervisedTrainer(folder, make_args(tmp_path / "out", pooling="cls"), pool=pool)
    with pytest.raises(ValueError, match="pooling"):
        other.train(resume_from_checkpoint=True)


def test_an_exported_student_is_a_teacher_and_a_pipeline(backbone, tmp_path, tiny_text_dataset) -> None:
    student, tokenizer = load_student(backbone("bert"), LABELS, pooling="mean", seed=3)
    export_student(student, tmp_path / "out", tokenizer)
    texts = tiny_text_dataset[:5]["text"]
    with torch.no_grad():
        expected = student.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    answers = pipeline("text-classification", str(tmp_path / "out"))(texts, batch_size=2, top_k=None)
    found = torch.tensor([[{a["label"]: a["score"] for a in answer}[label] for label in LABELS] for answer in answers])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    hierarchy = TeacherHierarchy(LABELS, [Teacher(str(tmp_path / "out"), name="own")])
    pool = build_pool(tiny_text_dataset.remove_columns("label").select(range(5)), hierarchy)
    torch.testing.assert_close(torch.from_numpy(pool.decode("own")).float(), expected, atol=2e-3, rtol=0)


def test_what_cannot_have_a_pooling_is_told_so(backbone, tiny_vit, tiny_bert, tmp_path, tiny_text_dataset) -> None:
    with pytest.raises(ValueError) as error:
        load_student(tiny_vit, LABELS, pooling="mean")
    assert str(error.value) == (
        f"`pooling` is for students that read texts, got 'mean' for '{tiny_vit}', which reads images. Leave it out."
    )
    with pytest.raises(ValueError) as error:
        load_student(backbone("modernbert"), LABELS, pooling="last")
    assert str(error.value) == (
        "The student must have a `pooling` that its type 'modernbert' knows, one of ['mean', 'cls'], got 'last'. "
        "Choose one of these."
    )
    with pytest.raises(ValueError, match="`pooling` must be one of .*, got 'max'"):
        load_student(tiny_bert, LABELS, pooling="max")
    with pytest.raises(ValueError, match="`pooling` must be one of .*, got 'max'"):
        CoSupervisedConfig(str(tmp_path), pooling="max")
    student, tokenizer = load_student(tiny_bert, LABELS)
    with pytest.raises(ValueError, match="is for a student that is named, got 'mean' beside a BertForSequenceClass"):
        CoSupervisedTrainer(
            student, make_args(tmp_path, pooling="mean"), pool=make_pool(tiny_text_dataset), processing_class=tokenizer
        )


def test_without_a_choice_nothing_is_changed(tiny_bert) -> None:
    student, _ = load_student(tiny_bert, LABELS)
    assert type(student).__name__ == "BertForSequenceClassification" and not hasattr(student, "pooling")
