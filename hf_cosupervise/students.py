"""The student: loaded by id, made ready for probe, LoRA or full training, and put back as an ordinary model."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from .checkpoints import (
    MODEL_FILES,
    Checkpoint,
    find_checkpoint,
    load_adapted,
    load_processor,
    quiet_loading,
    read_config,
    reads_text,
    whole_weights,
)
from .files import move_file
from .hub import publish

logger = logging.getLogger(__name__)


def load_student(
    model: str | os.PathLike[str], labels: Sequence[str], *, revision: str | None = None, seed: int = 42
) -> tuple[PreTrainedModel, Any]:
    """Load a pre-trained backbone with a fresh classification head for the task.

    Args:
        model (`str` or `os.PathLike`):
            Hub id or folder of a transformers or timm image model, of a transformers text model, or of an adapter of
            peft for one, which is merged. safetensors only, and no code from the Hub is run.
        labels (`Sequence[str]`):
            The task's label names.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        seed (`int`, *optional*, defaults to 42):
            Seed of the fresh head.

    Returns:
        `tuple[PreTrainedModel, Any]`: the model, and its image processor or tokenizer.

    Raises:
        OSError: If the model is not there, or the Hub refuses it or cannot be reached.
        ValueError: If the model is neither an image nor a text model, or its backbone would be partly random.
    """
    student, processor, _ = load_pinned_student(model, labels, revision=revision, seed=seed)
    return student, processor


def load_pinned_student(
    model: str | os.PathLike[str], labels: Sequence[str], *, revision: str | None = None, seed: int = 42
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Do what [`load_student`] does, and tell what was loaded.

    Args:
        model (`str` or `os.PathLike`):
            See [`load_student`].
        labels (`Sequence[str]`):
            The task's label names.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        seed (`int`, *optional*, defaults to 42):
            Seed of the fresh head.

    Returns:
        `tuple[PreTrainedModel, Any, dict[str, Any]]`: the model, its processor, and for a model of the Hub `model`,
        `revision` (as it was asked for) and `commit`; of a folder nothing is told.

    Raises:
        OSError: See [`load_student`].
        ValueError: See [`load_student`].
    """
    checkpoint = find_checkpoint(str(model), what="The student", revision=revision)
    origin: dict[str, Any] = {}
    if not checkpoint.is_local:
        origin = {"model": checkpoint.repo, "revision": checkpoint.revision, "commit": checkpoint.commit}
    if checkpoint.is_adapter:
        student, processor, base = _load_adapted_student(checkpoint, labels, seed)
        return student, processor, origin | base
    config = _task_config(checkpoint, labels)
    auto_class = _auto_class(config.model_type, checkpoint.repo)
    folder = checkpoint.fetch()
    with torch.random.fork_rng(devices=[]), quiet_loading(), whole_weights(checkpoint):
        torch.manual_seed(seed)
        student, loading = auto_class.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
        reset_head(student)
    processor = load_processor(checkpoint, folder, auto_class is AutoModelForSequenceClassification)
    _check_backbone(student, loading, checkpoint.repo)
    checkpoint.name_after(student)
    student.float()
    return student, processor, origin


def _task_config(checkpoint: Checkpoint, labels: Sequence[str]) -> Any:
    """The model's configuration with the labels of the task."""
    config = read_config(checkpoint)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in config.id2label.items()}
    if config.model_type == "timm_wrapper":
        config.label_names = list(labels)
    return config


def _load_adapted_student(
    checkpoint: Checkpoint, labels: Sequence[str], seed: int
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Load the base of an adapter with a fresh head, and give its backbone what the adapter has learnt."""
    adapted, processor_folder = load_adapted(checkpoint, random_head=True)
    base: Any = checkpoint.base
    student, processor, origin = load_pinned_student(base.repo, labels, revision=base.commit, seed=seed)
    head = {name for name, _ in head_parameters(student)}
    student.load_state_dict({k: v for k, v in adapted.state_dict().items() if k not in head}, strict=False)
    if processor_folder == checkpoint.folder:
        processor = load_processor(checkpoint, processor_folder, reads_text(student.config, checkpoint.what))
    checkpoint.name_after(student)
    return student, processor, {f"base_{name}": value for name, value in origin.items() if name != "revision"}


def _auto_class(model_type: str, path: str) -> Any:
    """The class of a student by its type, that of images where a type has both."""
    if model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or model_type == "timm_wrapper":
        return AutoModelForImageClassification
    if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForSequenceClassification
    raise ValueError(f"A student must be an image or text classification model, got '{model_type}' at '{path}'.")


def _check_backbone(student: PreTrainedModel, loading: dict[str, Any], path: str) -> None:
    head = {name for name, _ in head_parameters(student)}
    lost = [
        str(key[0] if isinstance(key, tuple) else key)
        for key in [*loading["missing_keys"], *loading["mismatched_keys"]]
    ]
    # The classifier is meant to be new; anything else would be frozen at random values.
    if random := sorted(name for name in lost if name not in head and not _belongs_to_head(name, head)):
        raise ValueError(
            f"Every weight of the student's backbone must be in the checkpoint, '{path}' lacks {random[:5]} "
            f"({len(random)} in all). Use a checkpoint of this architecture."
        )


def _belongs_to_head(name: str, head: set[str]) -> bool:
    return any(known.endswith(name) or name.endswith(known) for known in head)


def head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Find the parameters of a classifier that are not its backbone's.

    Args:
        model (`nn.Module`):
            A classification model of transformers, or timm's in transformers' wrapper.

    Returns:
        `list[tuple[str, nn.Parameter]]`: full names and parameters.

    Raises:
        ValueError: If the model does not tell its backbone from its head.
    """
    if hasattr(model, "timm_model"):
        classifier: nn.Module = model.timm_model.get_classifier()  # type: ignore[union-attr, operator]
        own = {id(parameter) for parameter in classifier.parameters()}
        return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own]
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        raise ValueError(
            f"A student must be a model with a backbone and a classification head, got {type(model).__name__}. "
            "Load it with `AutoModelForImageClassification` or `AutoModelForSequenceClassification`."
        )
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(f"{prefix}.")]


def linear_head(model: nn.Module) -> nn.Linear | None:
    """Find the head of a classifier if it is one linear layer and nothing else.

    Args:
        model (`nn.Module`):
            A classification model.

    Returns:
        `nn.Linear`, or `None` where the head has more parameters (RoBERTa, DistilBERT).
    """
    own = {id(parameter) for _, parameter in head_parameters(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and {id(parameter) for parameter in module.parameters()} == own:
            return module
    return None


def head_gives_logits(model: nn.Module, head: nn.Linear, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether the head's output on one vector per example is what the model answers.

    It is not where the head sees every token and the model chooses among its outputs, as GPT-2 does.

    Args:
        model (`nn.Module`):
            A classification model, in `eval()` mode.
        head (`nn.Linear`):
            Its head.
        inputs (`Mapping[str, torch.Tensor]`):
            What its forward reads, for a few examples.

    Returns:
        `bool`
    """
    captured: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, arguments: captured.append(arguments[0]))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(captured) != 1 or captured[0].ndim != 2:
        return False
    with torch.no_grad():
        return torch.allclose(head(captured[0]), logits, atol=1e-4)


def reset_head(model: nn.Module) -> None:
    """Give every layer of the head fresh weights from torch's global generator.

    Args:
        model (`nn.Module`):
            A classification model, changed in place.
    """
    own = {id(parameter) for _, parameter in head_parameters(model)}
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if (
            parameters
            and all(id(parameter) in own for parameter in parameters)
            and hasattr(module, "reset_parameters")
        ):
            module.reset_parameters()  # type: ignore[operator]


def prepare_student(
    model: PreTrainedModel, training: str, lora: LoraConfig | None = None, *, seed: int = 42
) -> PreTrainedModel | PeftModel:
    """Freeze what is not trained.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The student, changed in place.
        training (`str`):
            `"probe"` (only the head learns), `"lora"` (adapters and the head) or `"full"`.
        lora (`LoraConfig`, *optional*):
            Adapters for `"lora"`. Its `modules_to_save` is set to the head.
        seed (`int`, *optional*, defaults to 42):
            Seed of the adapters' first weights.

    Returns:
        `PreTrainedModel` or `PeftModel`: what the `Trainer` trains.
    """
    if training == "lora":
        if isinstance(model, PeftModel):
            return model
        config = copy.deepcopy(lora) if lora is not None else LoraConfig()
        heads = {name.rsplit(".", 1)[0] for name, _ in head_parameters(model)}
        config.modules_to_save = sorted(heads)
        if not config.target_modules:
            config.target_modules = _backbone_layers(model, heads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    if training == "probe":
        own = {id(parameter) for _, parameter in head_parameters(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        if linear_head(model) is None:
            logger.warning(
                f"The head of {type(model).__name__} is more than one linear layer and starts at random; it is "
                "trained whole by the standard loop. `student_training='lora'` usually does better here."
            )
    return model


def _backbone_layers(model: nn.Module, heads: set[str]) -> list[str]:
    """Full names of every linear layer outside the head, or of every plain convolution where there is none."""
    outside = [
        (name, module) for name, module in model.named_modules()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]  # fmt: skip
    # GPT-2 and its kin keep their linear layers transposed, as `Conv1D`.
    linears = [name for name, module in outside if isinstance(module, nn.Linear | Conv1D)]
    found = linears or [name for name, module in outside if isinstance(module, nn.Conv2d) and module.groups == 1]
    if not found:
        raise ValueError(
            f"Adapters need linear or plain convolution layers in the backbone, got none in {type(model).__name__}. "
            "Name layers by `lora_target_modules`."
        )
    return found


def export_student(model: nn.Module, folder: str | os.PathLike[str], processing_class: Any = None) -> None:
    """Write the student as an ordinary model that loads without this package.

    A LoRA student is merged, and its adapter is kept beside it in `adapter/`. Files are written to a temporary folder
    and moved when all of them are whole. Files of a model that was exported there before go, others stay.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The student.
        folder (`str` or `os.PathLike`):
            Where to write.
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*):
            Saved beside it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="_student-", dir=folder))
    try:
        plain = model
        if isinstance(model, PeftModel):
            model.save_pretrained(str(temporary / "adapter"))
            (temporary / "adapter" / "README.md").unlink(missing_ok=True)  # an empty form of peft's
            plain = copy.deepcopy(model).merge_and_unload()
        plain.save_pretrained(temporary)  # type: ignore[operator]
        # timm's processor is part of the configuration and only warns when it is asked to save itself.
        if processing_class is not None and not type(processing_class).__name__.startswith("TimmWrapper"):
            processing_class.save_pretrained(temporary)
        _fit_timm(temporary / "config.json")
        for pattern in (*MODEL_FILES, *_ADAPTER_FILES):  # of another student, exported here before
            for path in folder.glob(pattern):
                if not (temporary / path.relative_to(folder)).is_file():
                    path.unlink()
        with suppress(OSError):  # it stays where it holds something else
            (folder / "adapter").rmdir()
        _move_files(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# What a student's repository holds: the model, its processor, its story. No checkpoint, pool, pickle or folder else.
_ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
STORY_FILES = ("README.md", "history.json", "report.json", "pgr.png", "teacher_shares.png")
STUDENT_FILES = (*MODEL_FILES, *_ADAPTER_FILES, *STORY_FILES)


def push_student(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    message: str = "Co-supervised student",
    story: Mapping[str, bytes | Path] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Upload an exported student in one commit: model, processor, card, history, report and figures, and nothing else.

    Args:
        folder (`str` or `os.PathLike`):
            What [`export_student`] wrote, with a card.
        repo_id (`str`):
            The model repository, which exists.
        message (`str`, *optional*):
            Title of the commit.
        story (`Mapping[str, bytes | Path]`, *optional*):
            History, report and figures of this very student, by their names among `STORY_FILES`.
        revision (`str`, *optional*):
            Branch to commit to. Defaults to the main branch.
        token (`str`, *optional*):
            Instead of the token of the environment.

    Returns:
        `CommitInfo`: The commit.

    Raises:
        FileNotFoundError: If the folder holds no exported student.
        OSError: If the Hub refuses it or cannot be reached; the repository is then as it was.
        RuntimeError: If somebody else pushed at the same moment.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        str(path.relative_to(folder).as_posix()): path
        for pattern in (*MODEL_FILES, *_ADAPTER_FILES, "README.md")
        for path in sorted(folder.glob(pattern)) if path.is_file()
    }  # fmt: skip
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(
            f"'{folder}' must hold an exported student, got {sorted(files)}. Call `save_model` first."
        )
    if "adapter/adapter_config.json" in files:
        files["adapter/adapter_config.json"] = _without_local_base(folder / "adapter" / "adapter_config.json")
    return publish(
        files | dict(story or {}), repo_id, what="The student", message=message, replaced=STUDENT_FILES,
        revision=revision, token=token,
    )  # fmt: skip


def _without_local_base(path: Path) -> bytes:
    """An adapter's configuration without the folder of this machine that its base was read from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("revision") is None:  # that of the Hub is pinned
        config["base_model_name_or_path"] = None
    return (json.dumps(config, indent=2) + "\n").encode("utf-8")


def _fit_timm(config_path: Path) -> None:
    """Make the configuration of a timm model readable by timm and by transformers' wrapper."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if "architecture" not in config:
        return
    if isinstance(config.get("model_args"), dict):
        config["model_args"].pop("num_classes", None)
    for name in ("file", "url", "hf_hub_id"):  # where its pre-trained weights came from, perhaps on this machine
        (config.get("pretrained_cfg") or {}).pop(name, None)
    config["num_classes"] = len(config.get("label_names") or []) or config.get("num_classes")
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _move_files(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            move_file(path, place)
