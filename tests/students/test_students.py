"""Students: a fresh head on an untouched backbone, frozen as asked, and back as an ordinary model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTModel,
)

from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.students.head import head_parameters, linear_head, prepare_student, reset_head
from hf_cosupervise.students.loading import load_student
from hf_cosupervise.students.publishing import export_student

pytestmark = pytest.mark.core

# another number of labels than the checkpoints' four
LABELS = ["red", "green", "blue", "grey", "black", "white"]
KINDS = ("vit", "timm", "bert")


@pytest.fixture(scope="module")
def folders(tiny_vit: str, tiny_timm: str, tiny_bert: str) -> dict[str, str]:
    return {"vit": tiny_vit, "timm": tiny_timm, "bert": tiny_bert}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str]) -> dict[str, tuple[PreTrainedModel, Any]]:
    return {kind: load_student(folder, LABELS) for kind, folder in folders.items()}


@pytest.fixture()
def student(
    request: pytest.FixtureRequest, loaded: dict[str, tuple[PreTrainedModel, Any]]
) -> tuple[PreTrainedModel, Any]:
    """A copy of its own for each test."""
    return copy.deepcopy(loaded[request.param])


@pytest.fixture(scope="module")
def inputs(
    loaded: dict[str, tuple[PreTrainedModel, Any]], tiny_image_dataset: Dataset, tiny_text_dataset: Dataset
) -> dict[str, dict[str, torch.Tensor]]:
    cells = {
        "vit": tiny_image_dataset[:5]["image"],
        "timm": tiny_image_dataset[:5]["image"],
        "bert": tiny_text_dataset[:5]["text"],
    }
    return {kind: InputProcessor(processor, model.config)(cells[kind]) for kind, (model, processor) in loaded.items()}


def each_kind(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "student"), [(kind, kind) for kind in kinds or KINDS], indirect=["student"]
    )


def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def train_a_little(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Move whatever learns, far enough to see it."""
    torch.manual_seed(0)
    model.eval()
    for _ in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([0, 1, 2, 3, 4])).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad.sign() * torch.rand_like(parameter)


def auto_class(kind: str) -> Any:
    return AutoModelForSequenceClassification if kind == "bert" else AutoModelForImageClassification


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_kind()
def test_fresh_head_on_the_checkpoint_s_backbone(kind, student, folders, inputs):
    model, processor = student
    head = {name for name, _ in head_parameters(model)}
    assert len(head) == 2
    checkpoint = auto_class(kind).from_pretrained(folders[kind]).state_dict()
    state = model.state_dict()
    assert set(state) == set(checkpoint)
    for name, value in state.items():
        assert name in head or torch.equal(value, checkpoint[name]), name
    assert logits_of(model, inputs[kind]).shape == (5, 6)
    assert model.config.num_labels == 6 and model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {name: index for index, name in enumerate(LABELS)}
    assert all(value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_head_is_fresh_even_where_the_checkpoint_s_would_fit(kind, folders, tiny_labels):
    first, second, other = (load_student(folders[kind], tiny_labels, seed=seed)[0] for seed in (1, 1, 2))
    checkpoint = auto_class(kind).from_pretrained(folders[kind]).state_dict()
    for (name, one), (_, two), (_, three) in zip(*(head_parameters(model) for model in (first, second, other))):
        assert torch.equal(one, two), name
        assert not torch.equal(one, three), name
        assert one.shape == checkpoint[name].shape and not torch.equal(one, checkpoint[name]), name
        assert one.abs().max() > 0  # not zeros either: level 1's assignment must not hang on ties


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_torch_s_own_generator_is_left_alone(kind, folders):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_student(folders[kind], LABELS)
    assert torch.equal(torch.rand(3), expected)


def test_prefixes_of_timm_are_understood(folders):
    model, _ = load_student(f"local-dir:{folders['timm']}", LABELS)
    assert type(model).__name__ == "TimmWrapperForImageClassification"


def test_processors(loaded):
    assert loaded["bert"][1](["the animal hums"])["input_ids"] == [[2, 12, 13, 6, 3]]
    assert loaded["vit"][1].size == {"height": 8, "width": 8}
    assert type(loaded["timm"][1]).__name__ == "TimmWrapperImageProcessor"


def test_timm_1_0_31_writes_num_classes_twice(folders, tmp_path):
    # `model_args.num_classes`, which transformers' wrapper would hand on a second time
    shutil.copytree(folders["timm"], tmp_path / "timm")
    path = tmp_path / "timm" / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] = {**config.get("model_args", {}), "num_classes": 4}
    path.write_text(json.dumps(config))
    model, _ = load_student(tmp_path / "timm", LABELS)
    assert linear_head(model).out_features == 6


def test_bare_backbones_can_be_students(tmp_path, folders):
    # what self-supervised training leaves: no head in the checkpoint
    config = ViTConfig.from_pretrained(folders["vit"])
    backbone = ViTModel(config, add_pooling_layer=False)
    backbone.save_pretrained(tmp_path / "vit")
    shutil.copy(Path(folders["vit"]) / "preprocessor_config.json", tmp_path / "vit")
    model, _ = load_student(tmp_path / "vit", LABELS)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, model.state_dict()[f"vit.{name}"]), name
    assert model.config.num_labels == 6


def test_half_precision_checkpoints_become_float32(tmp_path, folders):
    AutoModelForImageClassification.from_pretrained(folders["vit"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    shutil.copy(Path(folders["vit"]) / "preprocessor_config.json", tmp_path)
    model, _ = load_student(tmp_path, LABELS)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def change_config(source: str, target: Path, **values: object) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def test_backbone_that_lacks_weights_is_refused(folders, tmp_path):
    # a frozen layer at random values would make every feature worthless without a word
    folder = change_config(folders["vit"], tmp_path / "deeper", num_hidden_layers=2)
    with pytest.raises(ValueError) as error:
        load_student(folder, LABELS)
    assert str(error.value).startswith(
        f"Every weight of the student's backbone must be in the checkpoint, '{folder}' lacks ['vit."
    )
    assert str(error.value).endswith("Use a checkpoint of this architecture.")
    folder = change_config(folders["vit"], tmp_path / "wider", intermediate_size=64)
    with pytest.raises(ValueError, match=r"'.*wider' lacks \['vit\..*intermediate|'.*wider' lacks \['vit\..*mlp"):
        load_student(folder, LABELS)


def test_text_backbone_without_pooler_is_refused(folders, tmp_path):
    # BERT's head reads the pooler, which a checkpoint of the encoder alone does not have
    BertModel.from_pretrained(folders["bert"], add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks \['bert.pooler.dense.bias', 'bert.pooler.dense.weight'\] \(2 in all\)"
    ):
        load_student(tmp_path, LABELS)


def test_what_is_no_classifier_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(ValueError) as error:
        load_student(tmp_path, LABELS)
    assert str(error.value) == (
        f"A student must be an image or text classification model, got 'wav2vec2' at '{tmp_path}'."
    )


def test_pickled_weights_are_refused(folders, tmp_path):
    shutil.copytree(folders["vit"], tmp_path / "vit")
    state = load_file(tmp_path / "vit" / "model.safetensors")
    (tmp_path / "vit" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights in safetensors .*got only \['pytorch_model.bin'\]"):
        load_student(tmp_path / "vit", LABELS)


# ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_kind()
def test_linear_head(kind, student, inputs):
    model, _ = student
    head = linear_head(model)
    assert isinstance(head, nn.Linear) and head.out_features == 6
    caught = []
    head.register_forward_hook(lambda module, given, output: caught.append(output))
    assert torch.equal(logits_of(model, inputs[kind]), caught[0])  # nothing comes after it


def test_heads_of_several_layers(folders, tmp_path):
    shared = {"vocab_size": 30, "num_labels": 4, "max_position_embeddings": 40}
    models = {
        "distilbert": DistilBertForSequenceClassification(
            DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **shared)
        ),
        "roberta": RobertaForSequenceClassification(
            RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **shared)
        ),
    }
    heads = {"distilbert": ("pre_classifier", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(folders["bert"]).save_pretrained(tmp_path / kind)
        student, _ = load_student(tmp_path / kind, LABELS)
        assert {name.rsplit(".", 1)[0] for name, _ in head_parameters(student)} == set(heads[kind])
        assert linear_head(student) is None
        # the whole head is fresh, also the layer whose shape would have fitted
        for name, value in head_parameters(student):
            if name.endswith("weight"):
                assert value.shape != model.state_dict()[name].shape or not torch.equal(
                    value, model.state_dict()[name]
                )
        prepare_student(student, "probe")
        trained = {name for name, value in student.named_parameters() if value.requires_grad}
        assert trained == {name for name, _ in head_parameters(student)} and len(trained) == 4


def test_reset_head_reads_the_global_generator(loaded):
    model = copy.deepcopy(loaded["vit"][0])
    backbone = {name: value.clone() for name, value in model.vit.state_dict().items()}
    torch.manual_seed(3)
    reset_head(model)
    torch.manual_seed(3)
    expected = nn.Linear(16, 6)
    assert torch.equal(linear_head(model).weight, expected.weight) and torch.equal(
        linear_head(model).bias, expected.bias
    )
    assert all(torch.equal(value, backbone[name]) for name, value in model.vit.state_dict().items())


def test_head_needs_a_backbone_beside_it():
    with pytest.raises(ValueError) as error:
        head_parameters(nn.Linear(2, 2))
    assert str(error.value) == (
        "A student must be a model with a backbone and a classification head, which is what it has outside of its "
        "`base_model_prefix`, or else what hangs on its number of labels in a classifier of transformers, got neither "
        "in Linear. Load it with `AutoModelForImageClassification` or `AutoModelForSequenceClassification`."
    )


# ── what is trained ─────────────────────────────────────────────────────────────────────────────────────────────────


@each_kind()
def test_probe_trains_the_head_only(kind, student, inputs):
    model, _ = student
    prepared = prepare_student(model, "probe")
    assert prepared is model
    head = {name for name, _ in head_parameters(model)}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == head
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_a_little(model, inputs[kind])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == head


@each_kind()
def test_full_trains_everything(kind, student):
    model = prepare_student(student[0], "full")
    assert model is student[0] and all(value.requires_grad for value in model.parameters())


@each_kind()
def test_lora_trains_adapters_and_head_only(kind, student, inputs):
    model, _ = student
    expected = logits_of(model, inputs[kind])
    lora = LoraConfig(r=2, lora_alpha=4)
    adapted = prepare_student(model, "lora", lora)
    assert isinstance(adapted, PeftModel)
    assert lora.modules_to_save is None and lora.target_modules is None  # the caller's own stays as it was
    # fresh adapters change nothing
    torch.testing.assert_close(logits_of(adapted, inputs[kind]), expected)
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert sum("modules_to_save" in name for name in trained) == 2  # weight and bias of the head
    assert sum("lora_" in name for name in trained) >= 2
    assert not any("lora_" in name and "modules_to_save" in name for name in trained)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    train_a_little(adapted, inputs[kind])
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= set(trained) and any("lora_" in name for name in moved)


def test_lora_on_named_modules(loaded):
    model = prepare_student(copy.deepcopy(loaded["bert"][0]), "lora", LoraConfig(r=2, target_modules=["query"]))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == {"query"}


def test_ready_made_adapters_are_taken(loaded):
    model = prepare_student(copy.deepcopy(loaded["vit"][0]), "lora")
    assert prepare_student(model, "lora", LoraConfig(r=4)) is model


# ── an ordinary model again ─────────────────────────────────────────────────────────────────────────────────────────


@each_kind()
def test_export_loads_without_this_package(kind, student, inputs, tiny_image_dataset, tiny_text_dataset, tmp_path):
    model, processor = student
    train_a_little(prepare_student(model, "probe"), inputs[kind])
    expected = logits_of(model, inputs[kind])
    export_student(model, tmp_path / "out", processor)
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "config.json" in files and "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    plain, loading = auto_class(kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    torch.testing.assert_close(logits_of(plain, inputs[kind]), expected, rtol=0, atol=1e-6)
    assert plain.config.id2label == dict(enumerate(LABELS))
    if kind == "bert":
        again = AutoTokenizer.from_pretrained(tmp_path / "out")(
            tiny_text_dataset[:5]["text"], padding=True, truncation=True, return_tensors="pt"
        )
        assert torch.equal(again["input_ids"], inputs[kind]["input_ids"])
    else:
        again = AutoImageProcessor.from_pretrained(tmp_path / "out")(
            tiny_image_dataset[:5]["image"], return_tensors="pt"
        )
        torch.testing.assert_close(again["pixel_values"], inputs[kind]["pixel_values"])


@each_kind("timm")
@pytest.mark.parametrize("training", ["probe", "lora"])
def test_timm_loads_its_student(training, kind, student, inputs, tmp_path):
    model, processor = student
    model = prepare_student(model, training, LoraConfig(r=2))
    train_a_little(model, inputs[kind])
    expected = logits_of(model, inputs[kind])
    export_student(model, tmp_path, processor)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(inputs[kind]["pixel_values"]), expected, rtol=0, atol=1e-4)
    assert plain.pretrained_cfg["label_names"] == LABELS and plain.pretrained_cfg["num_classes"] == 6
    config = json.loads((tmp_path / "config.json").read_text())
    assert "num_classes" not in (config.get("model_args") or {}) and config["num_classes"] == 6
    # and it can be a student again
    assert linear_head(load_student(tmp_path, LABELS[:3])[0]).out_features == 3


@each_kind("timm")
def test_timm_export_of_a_model_that_was_loaded_elsewhere(kind, student, inputs, tmp_path):
    # a model object comes as it is, with what timm 1.0.31 wrote in its configuration
    model, processor = student
    model.config.model_args = {"num_classes": 4}
    model.config.label_names = list(LABELS)
    export_student(model, tmp_path, processor)
    expected = logits_of(model, inputs[kind])
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain, inputs[kind]), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(inputs[kind]["pixel_values"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@each_kind()
def test_lora_export_is_merged(kind, student, inputs, folders, tmp_path):
    model, processor = student
    adapted = prepare_student(model, "lora", LoraConfig(r=2, lora_alpha=4))
    train_a_little(adapted, inputs[kind])
    expected = logits_of(adapted, inputs[kind])
    export_student(adapted, tmp_path, processor)
    # exporting does not merge the student that may go on training
    torch.testing.assert_close(logits_of(adapted, inputs[kind]), expected, rtol=0, atol=0)
    assert any("lora_" in name for name, _ in adapted.named_parameters())
    plain, loading = auto_class(kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(logits_of(plain, inputs[kind]), expected, rtol=0, atol=1e-4)
    # the adapter alone, on the backbone that it was trained on
    base, _ = load_student(folders[kind], LABELS, seed=99)
    assert not torch.allclose(logits_of(base, inputs[kind]), expected, atol=1e-2)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(with_adapter, inputs[kind]), expected, rtol=0, atol=1e-5)


def test_export_leaves_other_files_alone(loaded, tmp_path):
    model, processor = loaded["vit"]
    (tmp_path / "_run").mkdir()
    (tmp_path / "_run" / "history.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("old")
    export_student(model, tmp_path, processor)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "_run" / "history.json").read_text() == "[]"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("_student")]


def test_export_cut_off_leaves_the_old_model(loaded, tmp_path):
    model, processor = copy.deepcopy(loaded["vit"])
    export_student(model, tmp_path, processor)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Broken:
        def save_pretrained(self, folder: object) -> None:
            raise OSError("No space left on device")

    reset_head(model)
    with pytest.raises(OSError, match="No space left"):
        export_student(model, tmp_path, Broken())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_export_over_an_export(loaded, inputs, tmp_path):
    # a probe exported where a LoRA student was: nobody must find the other student's adapter there
    model, processor = copy.deepcopy(loaded["vit"])
    export_student(prepare_student(copy.deepcopy(model), "lora"), tmp_path, processor)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    export_student(model, tmp_path, processor)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain, inputs["vit"]), logits_of(model, inputs["vit"]), rtol=0, atol=1e-6)
    assert not (tmp_path / "adapter").exists()
