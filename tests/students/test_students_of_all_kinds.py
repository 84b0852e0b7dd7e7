"""Students that are unlike most: layers that are no plain ones, and models that come as they are."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from test_trainer import LABELS, make_args, make_pool, weights
from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForTokenClassification,
    BertModel,
    BitConfig,
    BitForImageClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ReformerConfig,
    ReformerForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    XLNetConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from hf_cosupervise import CoSupervisedTrainer, Teacher, TeacherHierarchy, build_pool, load_student
from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.students.head import head_parameters, prepare_student
from hf_cosupervise.students.publishing import export_student

pytestmark = pytest.mark.core


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class _Centred(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - weight.mean()


def _parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", _Centred())
    return layer


# What stands in the place of a ViT's projection of patches, and of a linear layer.
CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "BiT": WeightStandardizedConv2d,
    "standardised": StdConv2d,
    "standardised, same": StdConv2dSame,
    "scaled": ScaledStdConv2d,
    "spectral norm": lambda *shape, **kw: spectral_norm(nn.Conv2d(*shape, **kw)),
    "reflecting": lambda *shape, **kw: nn.Conv2d(*shape, **kw, padding=1, padding_mode="reflect"),
    "dilated": lambda *shape, **kw: nn.Conv2d(*shape, **kw, padding=1, dilation=(2, 1)),
}
LINEARS: dict[str, Callable[..., nn.Module]] = {
    "own forward": _Doubled,
    "parametrized": lambda *shape: _parametrized(nn.Linear(*shape)),
    "orthogonal": lambda *shape: parametrizations.orthogonal(nn.Linear(*shape)),
    "weight norm": lambda *shape: parametrizations.weight_norm(nn.Linear(*shape)),
    "weight norm by a hook": lambda *shape: weight_norm(nn.Linear(*shape)),
    "spectral norm by a hook": lambda *shape: spectral_norm(nn.Linear(*shape)),
}


def tiny_model(**changes: Any) -> PreTrainedModel:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape, **names, **changes))


def unlike(kind: str) -> tuple[PreTrainedModel, str]:
    """A model with one layer that is not plain, and the layer's name."""
    model = tiny_model()
    if kind in CONVOLUTIONS:
        name, layer = "vit.embeddings.patch_embeddings.projection", CONVOLUTIONS[kind](3, 16, kernel_size=4, stride=4)
    else:
        squares = (n for n, p in model.named_parameters() if p.shape == (16, 16) and n.endswith(".weight"))
        name, layer = next(squares).removesuffix(".weight"), LINEARS[kind](16, 16)
    model.set_submodule(name, layer)
    return model, name


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *LINEARS])
def test_adapters_leave_out_layers_that_do_not_merge(kind):
    model, name = unlike(kind)
    plain = {n for n, layer in tiny_model().named_modules() if isinstance(layer, nn.Linear) and n != "classifier"}
    found = {layer.removeprefix("base_model.model.") for layer in adapted_layers(prepare_student(model, "lora"))}
    assert found == plain - {name}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *LINEARS])
@pytest.mark.parametrize("as_regex", [False, True])
def test_layers_that_do_not_merge_are_refused_by_name(kind, as_regex):
    model, name = unlike(kind)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    targets: Any = f".*{re.escape(name)}" if as_regex else [name.split(".", 2)[-1]]
    with pytest.raises(ValueError) as error:
        prepare_student(model, "lora", LoraConfig(r=2, target_modules=targets))
    layer = type(model.get_submodule(name)).__name__
    assert str(error.value) == (
        f"Adapters must be of plain layers, which merge exactly, got '{name}' ({layer}; 1 such in all), which "
        "transforms its weights or inputs, or shares its weights. Leave it out of `lora_target_modules`, or use "
        "`student_training` 'full'."
    )
    # the model is the user's, and is as it was
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before and not adapted_layers(model)


def test_networks_without_a_plain_layer_are_refused():
    config = BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1], num_labels=4)
    with pytest.raises(ValueError) as error:
        prepare_student(BitForImageClassification(config), "lora")
    assert str(error.value) == (
        "Adapters need plain linear or convolution layers in the backbone, got none in BitForImageClassification. "
        "Use `student_training` 'probe' or 'full'."
    )


def test_all_linear_layers_are_those_of_the_backbone():
    named, found = (
        adapted_layers(prepare_student(tiny_model(), "lora", LoraConfig(r=2, target_modules=targets)))
        for targets in (None, "all-linear")
    )
    assert named == found and len(found) > 3


def test_a_model_that_holds_adapters_is_refused():
    model = tiny_model()
    adapted = prepare_student(model, "lora")
    assert prepare_student(adapted, "lora") is adapted
    with pytest.raises(ValueError, match="must hold no adapters before it is given new ones, got some in the ViTFor"):
        prepare_student(model, "lora")


@pytest.mark.parametrize("kind", ["BiT", "standardised", "scaled", "own forward", "parametrized"])
def test_ready_made_adapters_that_do_not_merge_are_refused(kind):
    model, name = unlike(kind)
    with pytest.raises(ValueError, match=rf"plain layers, which merge exactly, got '{re.escape(name)}' \("):
        prepare_student(get_peft_model(model, LoraConfig(r=2, target_modules=[name])), "lora")


@pytest.mark.parametrize("kind", ["BiT", "reflecting", "own forward", "parametrized", "orthogonal", "weight norm"])
def test_a_student_that_merging_changes_is_not_written(kind, tiny_vit: str, tmp_path: Path):
    """Whatever it is that does not merge: here adapters that nobody refused."""
    model, name = unlike(kind)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[name]))
    processor = AutoImageProcessor.from_pretrained(tiny_vit)
    export_student(adapted, tmp_path / "untrained", processor)  # adapters that are zero merge
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(ValueError, match=r"must answer as the one that was trained, got logits that differ by \d"):
        export_student(adapted, tmp_path / "out", processor)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert adapted.training == model.training


# ── models that come as they are ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def make_trainer(
    tmp_path: Path, tiny_vit: str, tiny_bert: str, tiny_image_dataset: Dataset, tiny_text_dataset: Dataset
):
    def make(model: Any, training: str = "probe", *, text: bool = False, **changes: Any) -> CoSupervisedTrainer:
        pool = make_pool(tiny_text_dataset if text else tiny_image_dataset)
        processor = AutoTokenizer.from_pretrained(tiny_bert) if text else AutoImageProcessor.from_pretrained(tiny_vit)
        processor = None if isinstance(model, str) else processor  # which lies in its folder
        args = make_args(tmp_path / "out", student_training=training, **changes)
        return CoSupervisedTrainer(model, args, pool=pool, processing_class=processor)

    return make


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_models_of_another_precision_are_trained_in_float32(make_trainer, tiny_vit, training, dtype, caplog, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(tiny_vit, dtype=getattr(torch, dtype))
    same = AutoModelForImageClassification.from_pretrained(tiny_vit, dtype=getattr(torch, dtype)).float()
    with caplog.at_level("WARNING", "hf_cosupervise"):
        trainer = make_trainer(model, training, max_steps=2)
    assert f"The weights of ViTForImageClassification are changed from {dtype} to float32" in caplog.text
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    first, _ = weights(trainer), caplog.clear()
    shutil.rmtree(tmp_path / "out")
    with caplog.at_level("WARNING", "hf_cosupervise"):
        again = make_trainer(same, training, max_steps=2)
    assert "float32" not in caplog.text
    again.train()
    assert all(torch.equal(value, first[name]) for name, value in weights(again).items())


def of_labels(model_class: Any, folder: str, **changes: Any) -> PreTrainedModel:
    return model_class.from_pretrained(folder, num_labels=4, id2label=dict(enumerate(LABELS)), **changes)


def test_frozen_models(make_trainer, tiny_vit, tmp_path):
    def frozen(name: str = "") -> PreTrainedModel:
        model = of_labels(AutoModelForImageClassification, tiny_vit)
        for own, parameter in model.named_parameters():
            parameter.requires_grad_(bool(name) and name in own)
        return model

    with pytest.raises(ValueError) as error:
        make_trainer(frozen(), "full")
    assert str(error.value) == (
        "`student_training` 'full' needs weights that learn, got a ViTForImageClassification all of which are frozen. "
        "Call `model.requires_grad_(True)`, or load adapters with `is_trainable=True`."
    )
    adapted = prepare_student(of_labels(AutoModelForImageClassification, tiny_vit), "lora")
    adapted.save_pretrained(tmp_path / "adapter")
    saved = PeftModel.from_pretrained(of_labels(AutoModelForImageClassification, tiny_vit), tmp_path / "adapter")
    for training in ("lora", "full"):
        with pytest.raises(ValueError, match=f"'{training}' needs weights that learn, got a PeftModel"):
            make_trainer(saved, training)
    # a head and adapters learn whatever was frozen, and what is frozen in part is so on purpose
    for model, training in ((frozen(), "probe"), (frozen(), "lora"), (frozen("layernorm"), "full")):
        trainer = make_trainer(model, training)
        before = weights(trainer)
        trainer.train()
        moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
        assert moved == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
        shutil.rmtree(tmp_path / "out")


NO_CLASSIFIERS = {
    "ViT": (ViTModel, "an answer without `logits`"),
    "masked images": (ViTForMaskedImageModeling, r"(ValueError: .*|an answer without `logits`)"),
    "BERT": (BertModel, "an answer without `logits`"),
    "masked words": (BertForMaskedLM, r"logits of shape \(2, \d+, \d+\)"),
    "tokens": (BertForTokenClassification, r"logits of shape \(2, \d+, 4\)"),
    "next sentence": (BertForNextSentencePrediction, r"logits of shape \(2, 2\)"),
}


@pytest.mark.parametrize("kind", NO_CLASSIFIERS)
def test_models_that_are_no_classifiers_are_refused_before_any_work(make_trainer, tiny_vit, tiny_bert, kind):
    model_class, found = NO_CLASSIFIERS[kind]
    is_text = "Bert" in model_class.__name__
    make = partial(of_labels, model_class, tiny_bert if is_text else tiny_vit)
    with pytest.raises(ValueError, match=rf"logits of shape \(2, 4\), got {found} from {model_class.__name__}\."):
        make_trainer(make(), "full", text=is_text)
    for training in ("probe", "lora"):
        with pytest.raises(ValueError, match=r"must (be a model with a backbone and a class|answer two)"):
            make_trainer(make(), training, text=is_text)


def test_models_without_weights_are_refused(make_trainer, tiny_vit):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tiny_vit))
    for training in ("probe", "lora", "full"):
        with pytest.raises(ValueError) as error:
            make_trainer(model, training)
        assert str(error.value) == (
            "A student must have its weights in memory, got a ViTForImageClassification on the device 'meta'. Load it "
            "with `from_pretrained`."
        )
    with pytest.raises(TypeError, match="`model` must be a Hub id, a folder, a `PreTrainedModel` .*got Linear"):
        make_trainer(nn.Linear(2, 2))


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_a_classifier_whose_backbone_has_parts_side_by_side(make_trainer, tiny_vit, training, tmp_path):
    """CLIP has a configuration of texts and images, and no one name for its backbone."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": 9}, vision_config={**shape, "image_size": 8, "patch_size": 4}
    )
    folder = tmp_path / "clip"
    CLIPModel(config).save_pretrained(folder)  # without a head
    AutoImageProcessor.from_pretrained(tiny_vit).save_pretrained(folder)
    trainer = make_trainer(str(folder), training)
    assert (trainer.student.head is not None) == (training == "probe")
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert any("classifier" in name for name in moved) and any("vision_model" in n for n in moved) == (
        training != "probe"
    )
    trainer.save_model()
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    inputs = trainer.processor.probe()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, trainer.model.eval()(**inputs).logits)
    hierarchy = TeacherHierarchy(LABELS, [Teacher(str(tmp_path / "out"), name="clip")])
    assert build_pool(trainer.pool.inputs.select_columns(["image"]), hierarchy).answered("clip").all()


def test_a_quantised_model_is_refused_before_it_is_read(tmp_path, tiny_bert):
    folder = tmp_path / "packed"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ValueError) as error:
        load_student(str(folder), LABELS)
    assert str(error.value) == (
        f"A student must have weights that can learn, got quantised ones in '{folder}'. Use the checkpoint that they "
        "were made of."
    )


def test_a_decoder_without_a_token_to_pad_with(make_trainer, tiny_bert, tiny_text_dataset, tmp_path):
    folder = tmp_path / "gpt"
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=15, eos_token_id=3)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.pad_token, tokenizer.eos_token = None, tokenizer.sep_token
    tokenizer.save_pretrained(folder)
    args = make_args(tmp_path / "out", student_training="probe")
    trainer = CoSupervisedTrainer(str(folder), args, pool=make_pool(tiny_text_dataset))
    trainer.train()
    trainer.save_model()
    plain, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert plain.config.pad_token_id == tokenizer.pad_token_id == 3
    texts = tiny_text_dataset[:6]["text"]
    with torch.no_grad():
        found = plain.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        torch.testing.assert_close(
            found, trainer.model.eval()(**trainer.processor(texts)).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("training", ["lora", "full"])
def test_convolutions_that_are_asked_for_their_stride(make_trainer, training, tmp_path):
    """MobileNet pads by hand, as much as the strides of its layers ask for."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, **names)
    trainer = make_trainer(MobileNetV2ForImageClassification(config), training, max_steps=1)
    trainer.train()
    trainer.save_model()
    inputs = trainer.processor.probe()
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_pooler_of_a_masked_language_model_is_trained_or_refused(make_trainer, tiny_bert, tmp_path):
    folder = tmp_path / "words"
    BertForMaskedLM.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    with pytest.raises(ValueError) as error:
        make_trainer(str(folder), "probe", text=True)
    assert str(error.value) == (
        f"Every weight of the student's backbone must be in the checkpoint, '{folder}' lacks "
        "['bert.pooler.dense.bias', 'bert.pooler.dense.weight'] (2 in all). Let the head read the tokens by `pooling` "
        "'mean', or train the pooler by `student_training` 'lora' or 'full'."
    )
    for training in ("lora", "full"):
        trainer = make_trainer(str(folder), training, text=True)
        name = next(
            name for name, value in trainer.model.named_parameters() if "pooler" in name and value.requires_grad
        )
        before = weights(trainer)
        trainer.train()
        assert not torch.equal(weights(trainer)[name], before[name])
        shutil.rmtree(tmp_path / "out")
        again = make_trainer(str(folder), training, text=True)  # the same random pooler
        assert all(torch.equal(value, before[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("training", ["probe", "full"])
def test_a_model_is_trained_in_place_and_a_copy_starts_anew(make_trainer, tiny_vit, training, tmp_path):
    model = of_labels(AutoModelForImageClassification, tiny_vit)
    kept, runs = copy.deepcopy(model), []
    for student in (model, kept, model):
        trainer = make_trainer(student, training)
        trainer.train()
        assert trainer.model is student
        runs.append(weights(trainer))
        shutil.rmtree(tmp_path / "out")
    first, second, third = runs
    assert all(torch.equal(value, first[name]) for name, value in second.items())
    assert not torch.equal(third["classifier.weight"], first["classifier.weight"])


def test_weights_that_layers_share_get_no_adapters():
    """Zamba ties whole layers to one another: merged, what one of these has learnt would be put on all."""
    model, other = tiny_model(), tiny_model()
    names = [n.removesuffix(".weight") for n, p in model.named_parameters() if p.shape == (16, 16)][:2]
    for some in (model, other):
        some.get_submodule(names[1]).weight = some.get_submodule(names[0]).weight
    found = {layer.removeprefix("base_model.model.") for layer in adapted_layers(prepare_student(model, "lora"))}
    assert len(names) == 2 and found and not found & {*names}
    with pytest.raises(ValueError, match=r"got '.*' \(Linear; 2 such in all\), .*, or shares its weights\. Leave"):
        prepare_student(other, "lora", LoraConfig(r=2, target_modules=names))


def test_a_layer_that_peft_takes_for_its_own_is_refused():
    model = tiny_model()
    model.vit.base_layer = nn.Identity()
    with pytest.raises(ValueError) as error:
        prepare_student(model, "lora")
    assert str(error.value) == (
        "Adapters need a model without a layer that is called `base_layer`, as peft calls what it adapts, got one in "
        "ViTModel. Use `student_training` 'probe' or 'full'."
    )


def test_a_model_of_relative_positions_reads_as_much_as_its_tokenizer(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    processor = InputProcessor(tokenizer, XLNetConfig(vocab_size=15, d_model=16, n_head=2, n_layer=1))
    assert processor.max_length == tokenizer.model_max_length > 1
    assert processor.probe()["input_ids"].shape[0] == 2


def test_weights_that_layers_of_timm_share_are_exported(make_trainer, tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    model.layer1[0].bn2.weight = model.layer1[0].bn1.weight
    folder = tmp_path / "model"
    folder.mkdir()
    timm.models.save_for_hf(model, folder, model_config={"label_names": ["a", "b"]}, safe_serialization=False)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    student, processor = load_student(str(folder), LABELS)
    student.timm_model.layer1[0].bn2.weight = student.timm_model.layer1[0].bn1.weight
    export_student(student, tmp_path / "out", processor)
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels), student.eval()(pixel_values=pixels).logits)


def test_a_reformer_is_refused(tiny_bert, tiny_text_dataset, tmp_path):
    config = ReformerConfig(
        attn_layers=["lsh"], axial_pos_embds_dim=[8, 8], hidden_size=16, feed_forward_size=16, axial_pos_shape=[4, 4]
    )
    config.is_decoder = False
    ReformerForSequenceClassification(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError) as error:
        CoSupervisedTrainer(str(tmp_path / "model"), make_args(tmp_path / "out"), pool=make_pool(tiny_text_dataset))
    assert str(error.value) == (
        "A student must answer alike whenever it is asked, and learn from texts of any length, got a Reformer, which "
        "hashes at random and is trained on one length only. Use another encoder of long texts, such as Longformer or "
        "BigBird."
    )


@pytest.mark.parametrize("training", ["probe", "lora"])
def test_a_classifier_that_calls_its_logits_otherwise(make_trainer, tiny_vit, training, tmp_path):
    if "pp_lcnet" not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        pytest.skip("this version of transformers has no PP-LCNet")
    config = AutoConfig.for_model(
        "pp_lcnet",
        class_expand=16,
        scale=0.25,
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
    )
    folder = tmp_path / "model"
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(tiny_vit).save_pretrained(folder)
    trainer = make_trainer(str(folder), training)
    trainer.train()
    trainer.save_model()
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    inputs = trainer.processor.probe()
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    trainer.create_model_card()
    assert "model(**inputs).last_hidden_state.softmax(-1)" in (tmp_path / "out" / "README.md").read_text()
    # And a teacher too.
    hierarchy = TeacherHierarchy(LABELS, [Teacher(str(tmp_path / "out"), name="lcnet")])
    assert build_pool(trainer.pool.inputs.select_columns(["image"]), hierarchy).answered("lcnet").all()


@pytest.mark.parametrize("training", ["probe", "full"])
def test_both_heads_of_a_distilled_model_are_trained(make_trainer, training, tmp_path: Path) -> None:
    settings = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, **settings)
    model.pretrained_cfg.update(input_size=(3, 32, 32))
    folder = tmp_path / "model"
    timm.models.save_for_hf(model, folder, model_config={"label_names": ["a", "b"]}, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": settings}))
    student, processor = load_student(str(folder), LABELS)
    heads = {name for name, _ in head_parameters(student)}
    assert heads == {f"timm_model.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}
    trainer = make_trainer(str(folder), training)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert heads <= moved and (heads == moved) == (training == "probe")
    trainer.save_model()
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = trainer.processor.probe()["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels), trainer.model.eval()(pixel_values=pixels).logits)
