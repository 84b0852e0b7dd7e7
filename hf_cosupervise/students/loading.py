"""The student: loaded by id or folder, with a head for the labels of the task."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..data.inputs import InputProcessor
from ..models.classifier import (
    check_finite,
    check_no_layer_left,
    image_class,
    load_adapted,
    load_processor,
    quiet_loading,
    read_config,
    reads_text,
)
from ..models.source import ModelSource, building, explained, find_model, whole_weights
from .head import FRESH, head_parameters, name_labels, reset_head
from .pooling import POOLINGS, choose_pooling
from .vectors import VECTOR_STUDENTS, VectorClassifier, read_vector_config

logger = logging.getLogger(__name__)


def load_student(
    model: str | os.PathLike[str],
    labels: Sequence[str],
    *,
    revision: str | None = None,
    seed: int = 42,
    pooling: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a pre-trained backbone with a fresh classification head for the task.

    Args:
        model (`str` or `os.PathLike`):
            Hub id or folder of a transformers or timm image model, of a transformers text model, or of an adapter of
            peft for one, which is merged, or of a [`VectorClassifier`]. safetensors only, and no code from the Hub
            is run.
        labels (`Sequence[str]`):
            The task's label names.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        seed (`int`, *optional*, defaults to 42):
            Seed of the fresh head.
        pooling (`str`, *optional*):
            Of a text model, what a linear head reads: "mean" (over the tokens), "cls" (the first) or "last". By
            default the head that its architecture has, which on BERT is a trained pooler of the first token.

    Returns:
        `tuple[PreTrainedModel, Any]`: the model, and its image processor or tokenizer, None for one of vectors.

    Raises:
        OSError: If the model is not there, or the Hub refuses it or cannot be reached.
        ValueError: If the model is neither an image nor a text model, its backbone would be partly random, or it
            cannot have that pooling.
    """
    student, processor, _ = load_pinned_student(model, labels, revision=revision, seed=seed, pooling=pooling)
    return student, processor


def load_pinned_student(
    model: str | os.PathLike[str],
    labels: Sequence[str],
    *,
    revision: str | None = None,
    seed: int = 42,
    training: str = "probe",
    pooling: str | None = None,
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Do what [`load_student`] does, and tell what was loaded."""
    _check_asked(model, pooling)
    source = find_model(str(model), what="The student", revision=revision)
    origin: dict[str, Any] = {}
    # Of a folder nothing is told: where it lies concerns nobody.
    if not source.is_local:
        origin = {"model": source.repo, "revision": source.revision, "commit": source.commit}
    if source.is_adapter:
        student, processor, base = _load_adapted_student(source, labels, seed, pooling)
        return student, processor, origin | base
    config = _task_config(source, labels)
    is_vector = config.model_type == VectorClassifier.config_class.model_type
    auto_class = VectorClassifier if is_vector else _auto_class(config, source.repo)
    is_text = auto_class is AutoModelForSequenceClassification
    if pooling is not None:
        if not is_text:
            raise ValueError(
                f"`pooling` is for students that read texts, got {pooling!r} for '{source.repo}', which reads "
                f"{'vectors' if is_vector else 'images'}. Leave it out."
            )
        with explained(source, "configuration"):
            auto_class = choose_pooling(config, pooling, source.what)
    folder = source.fetch()
    # Forked, because loading must not move the random numbers that the user's own code draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with quiet_loading(), whole_weights(source), building(source):
            student, loading = auto_class.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # the head's, which had other labels; the rest is looked at below
                output_loading_info=True,
            )
        reset_head(student)  # always, or a head that happens to fit would stay as it was
    processor = None if is_vector else load_processor(source, folder, is_text)
    if not is_vector:
        reader = InputProcessor(processor, student.config, source.what)  # tells the model what texts are padded with
        if not is_text:
            reader.probe()
    _check_backbone(student, loading, source.repo, training)
    check_no_layer_left(source, student, loading["unexpected_keys"])
    check_finite(source, student)
    if is_vector and not bool(((student.backbone.scale > 0) & student.backbone.scale.isfinite()).all()):
        raise ValueError(
            f"{source.what} must divide by finite spreads above 0, got others as `scale` in '{source.place}'. Save it "
            "again."
        )
    source.name_after(student)
    # Weights that learn are kept in float32, whatever they were saved in.
    student.float()
    return student, processor, origin


def _check_asked(model: str | os.PathLike[str], pooling: str | None) -> None:
    """Refuse names that lead to nothing, before anything is looked for."""
    if model in VECTOR_STUDENTS:
        raise ValueError(
            f"A student {model!r} is made for its data, got none. Use `VectorClassifier.for_data(dataset, column, "
            "labels)`, or give the name to `CoSupervisedTrainer`."
        )
    if not os.path.exists(model) and get_close_matches(str(model).lower(), VECTOR_STUDENTS, cutoff=0.65):
        raise ValueError(
            f"The student must be a Hub id, a folder or one of {list(VECTOR_STUDENTS)}, got {str(model)!r}. Correct "
            "the name."
        )
    if pooling not in (None, *POOLINGS):
        raise ValueError(
            f"`pooling` must be one of {list(POOLINGS)}, got {pooling!r}. Leave it out for the model's own way."
        )


def _task_config(source: ModelSource, labels: Sequence[str]) -> Any:
    """The model's configuration with the labels of the task."""
    is_vector = source.config.get("model_type") == VectorClassifier.config_class.model_type
    # Their integers have no gradient.
    if source.config.get("quantization_config"):
        raise ValueError(
            f"A student must have weights that can learn, got quantised ones in '{source.place}'. Use the checkpoint "
            "that they were made of."
        )
    config: Any = read_vector_config(source) if is_vector else read_config(source)
    # The number first: setting it makes names of its own, which the task's then replace.
    config.num_labels = len(labels)
    name_labels(config, labels)
    return config


def _load_adapted_student(
    source: ModelSource, labels: Sequence[str], seed: int, pooling: str | None
) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """Load the base of an adapter with a fresh head, and give its backbone what the adapter has learnt."""
    adapted, processor_folder = load_adapted(source, random_head=True)
    base: Any = source.base
    # At the commit that was found, for the branch may have moved on.
    student, processor, origin = load_pinned_student(
        base.repo, labels, revision=base.commit, seed=seed, pooling=pooling
    )
    head = {name for name, _ in head_parameters(student)}
    # The head stays fresh, as that of any other student; the adapter's was of another task.
    student.load_state_dict({k: v for k, v in adapted.state_dict().items() if k not in head}, strict=False)
    if processor_folder == source.folder:
        processor = load_processor(source, processor_folder, reads_text(student.config, source.what))
    source.name_after(student)
    return student, processor, {f"base_{name}": value for name, value in origin.items() if name != "revision"}


def _auto_class(config: Any, path: str) -> Any:
    """The class of a student by its type, and by what a checkpoint was trained for where a type has both."""
    kind, was_for_texts = config.model_type, any("Sequence" in name for name in config.architectures or [])
    is_text = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    is_image = kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or kind == "timm_wrapper"
    if is_image and not (is_text and was_for_texts):
        return image_class(config)
    if is_text:
        return AutoModelForSequenceClassification
    raise ValueError(f"A student must be an image or text classification model, got '{kind}' at '{path}'.")


def _check_backbone(student: PreTrainedModel, loading: dict[str, Any], path: str, training: str) -> None:
    head = {name for name, _ in head_parameters(student)}
    lost = [
        str(key[0] if isinstance(key, tuple) else key)
        for key in [*loading["missing_keys"], *loading["mismatched_keys"]]
    ]
    # The classifier is meant to be new; anything else would be frozen at random values.
    random = sorted(name for name in lost if name not in head and not _belongs_to_head(name, head))
    # What masked language models are trained without, and their classifiers read.
    is_pooler = all(".pooler." in name for name in random)
    if random and is_pooler and training != "probe":
        # Beside adapters it is trained whole, as the head is.
        setattr(student, FRESH, sorted({name.rsplit(".", 1)[0] for name in random}))
    elif random:
        advice = "Use a checkpoint of this architecture."
        if is_pooler:
            advice = (
                "Let the head read the tokens by `pooling` 'mean', or train the pooler by `student_training` 'lora' "
                "or 'full'."
            )
        raise ValueError(
            f"Every weight of the student's backbone must be in the checkpoint, '{path}' lacks {random[:5]} "
            f"({len(random)} in all). {advice}"
        )


def _belongs_to_head(name: str, head: set[str]) -> bool:
    # A key of a file may lack the prefix that the model has, or have one more.
    return any(known.endswith(name) or name.endswith(known) for known in head)
