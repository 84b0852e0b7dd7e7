"""Zero-shot teachers, which are told their labels in words: models of inference (NLI), and of images beside texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ...data.columns import shorten
from ...data.inputs import InputProcessor
from ...models.classifier import load_adapted, load_processor, load_whole, read_config, reads_text
from ...models.files import read_labels
from ...models.source import ModelSource, explained
from .base import (
    Kind,
    Preparation,
    TeacherSource,
    add_up,
    check_option,
    directions,
    fill_templates,
    fingerprint,
    for_inference,
    label_positions,
    label_texts,
    read_options,
    try_out,
    whole_precision,
)

_OPTIONS: dict[str, Any] = {"template": None, "correct_prior": False, "entailment": None}
_NLI_TEMPLATE, _IMAGE_TEMPLATE = "This example is {}.", "This is a photo of {}."
_TOLD = "an NLI classifier of texts, or a model of images and texts such as CLIP or SigLIP"


class _ZeroShotTeacher(ABC):
    """What both families share: texts of labels, and answers over them corrected for an empty input."""

    column: str | None = None
    facts: dict[str, Any]
    prepare: Preparation
    model: Any

    def __init__(
        self, source: TeacherSource, labels: Sequence[str], device: torch.device, default_template: str
    ) -> None:
        teacher, self.device = source.teacher, device
        options = read_options(teacher, "zero_shot", _OPTIONS)
        check_option(teacher, options, "correct_prior", (False, True))
        texts = label_texts(teacher, labels)
        if len(texts) < 2:
            raise ValueError(
                f"Teacher '{source.name}' must choose between at least two labels, got {list(texts)}. Give it more in "
                "`label_texts` or `scope`."
            )
        template = default_template if options["template"] is None else options["template"]
        self.options, each = options, list(fill_templates(teacher, template, texts).values())
        self.sentences = [sentence for some in each for sentence in some]
        # For the card.
        self.template = template if isinstance(template, str) else " or ".join(template)
        self.num_labels = len(labels)
        self.positions = label_positions(teacher, list(texts), labels)
        # Row i adds up the sentences of label i with equal weights.
        self.means = torch.block_diag(*(torch.full((1, len(some)), 1 / len(some)) for some in each)).to(device)
        self.prior: torch.Tensor | None = None

    def _settle(self, source: TeacherSource, empty: Any, samples: Any, preprocessing: str) -> None:
        """Find what the model answers to an empty input, whatever the texts of the labels are, and try it out."""
        if self.options["correct_prior"]:
            self.prior = self._logits(self.prepare([empty]))
        try_out(source, lambda: self(samples))
        self.facts = source.facts("zero_shot", type(self.model).__name__, preprocessing) | {"template": self.template}

    @abstractmethod
    def _logits(self, inputs: Any) -> torch.Tensor:
        """Give a logit for each label that it knows, `(num_rows, num_own_labels)`."""

    def __call__(self, inputs: Any) -> np.ndarray:
        logits = self._logits(inputs)
        # To divide probabilities and to make them sum to 1 again is to subtract logits, up to what softmax forgets.
        logits = logits if self.prior is None else logits - self.prior
        return add_up(torch.softmax(logits, dim=-1).cpu().numpy(), self.positions, self.num_labels)


class NliTeacher(_ZeroShotTeacher):
    """A model that tells whether a text entails a sentence, asked a sentence for each text of a label."""

    def __init__(self, source: TeacherSource, labels: Sequence[str], device: torch.device) -> None:
        super().__init__(source, labels, device, _NLI_TEMPLATE)
        name, model_source = source.name, source.model_source
        if model_source.is_adapter:
            model, processor_folder = load_adapted(model_source)
        else:
            processor_folder = model_source.fetch()
            model = load_whole(model_source, AutoModelForSequenceClassification, read_config(model_source))
        own_labels = read_labels(model.config.id2label, f"Teacher '{name}'", "id2label")
        self.entailment = _find_entailment(source, own_labels, self.options["entailment"])
        tokenizer = load_processor(model_source, processor_folder, True)
        processor = InputProcessor(tokenizer, model.config, f"Teacher '{name}'")
        # Half of the tokens are left to the text that is asked about.
        _check_lengths(source, tokenizer, self.sentences, (processor.max_length or 0) // 2)
        samples = [processor.probe(sentence) for sentence in self.sentences]
        self.prepare = Preparation(name, True, partial(_pair, processor, self.sentences))
        self.model = for_inference(model, device)
        self._settle(source, "", samples, fingerprint([processor.fingerprint, self.sentences]))

    def _logits(self, inputs: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        with torch.inference_mode():
            columns = [
                # A sentence at a time, so that memory is that of one batch however many labels there are.
                self.model(**{key: value.to(self.device, non_blocking=True) for key, value in pairs.items()}).logits
                for pairs in inputs
            ]
            each = torch.stack([logits[:, self.entailment].float() for logits in columns], dim=1)
            with whole_precision(self.device):
                return each @ self.means.T


def _check_lengths(source: TeacherSource, tokenizer: Any, sentences: Sequence[str], longest: int) -> None:
    """Refuse texts of labels that would be cut: two of them might be equal then."""
    with explained(source.model_source, "preparation of texts"):
        lengths = [len(ids) for ids in tokenizer(list(sentences))["input_ids"]]
    if max(lengths) > longest:
        raise ValueError(
            f"Texts of labels of teacher '{source.name}' must have at most {longest} tokens, got {max(lengths)} in "
            f"{sentences[lengths.index(max(lengths))]!r}. Shorten it, or the `template`."
        )


def _pair(processor: InputProcessor, sentences: Sequence[str], cells: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
    """Each text of a batch beside each sentence: a batch of pairs per sentence."""
    return [processor(cells, sentence) for sentence in sentences]


def _find_entailment(source: TeacherSource, own_labels: Sequence[str], wanted: Any) -> int:
    """Position of the label that says that the text entails the sentence."""
    if wanted is not None:
        found = [position for position, label in enumerate(own_labels) if label == wanted]
        looked = f"the one called {wanted!r} by the option `entailment`"
    else:
        found = [position for position, label in enumerate(own_labels) if label.casefold().startswith("entail")]
        looked = "one whose name begins with 'entail' (such as 'entailment' or 'ENTAILS', in any case)"
    if len(found) != 1:
        raise ValueError(
            f"Teacher '{source.name}' must be an NLI classifier with one label of entailment, {looked}, got "
            f"{shorten(own_labels)}. Name its label by `options={{'entailment': …}}`, or use another model or `kind`."
        )
    return found[0]


class DualTeacher(_ZeroShotTeacher):
    """A model that puts images and texts into one space, such as CLIP and SigLIP; texts of labels only once."""

    def __init__(self, source: TeacherSource, labels: Sequence[str], device: torch.device) -> None:
        # Who writes texts of labels for such a model writes whole captions.
        super().__init__(source, labels, device, _IMAGE_TEMPLATE if source.teacher.label_texts is None else "{}")
        name, model_source = source.name, source.model_source
        if self.options["entailment"] is not None:
            raise ValueError(
                f"`entailment` of teacher '{name}' is for NLI classifiers, got a model of images. Leave it out."
            )
        folder = model_source.fetch()
        model = load_whole(model_source, AutoModel, read_config(model_source))
        parts = ("get_text_features", "get_image_features", "logit_scale")
        if lacking := [part for part in parts if not hasattr(model, part)]:
            raise ValueError(
                f"Teacher '{name}' must be {_TOLD}, got {type(model).__name__} without `{lacking[0]}`. Use another."
            )
        tokenizer = load_processor(model_source, folder, True)
        processing_class = load_processor(model_source, folder, False)
        vision_config = getattr(model.config, "vision_config", model.config)
        processor = InputProcessor(processing_class, vision_config, f"Teacher '{name}'")
        samples = processor.probe()
        self.prepare = Preparation(name, False, processor)
        self.model = for_inference(model, device)
        self.text_features = self._embed_texts(source, tokenizer)
        # Grey is about zero once it is normalised: a picture of nothing.
        grey = Image.new(processor.mode, (224, 224), 127 if processor.mode == "L" else (127, 127, 127))
        self._settle(source, grey, samples, processor.fingerprint)

    def _embed_texts(self, source: TeacherSource, tokenizer: Any) -> torch.Tensor:
        """A direction for each label: the mean of those of its texts, `(num_own_labels, size)`."""
        text_config = getattr(self.model.config, "text_config", self.model.config)
        # Tokenizers that know of no limit give 10**30, and some models have no positions to count.
        longest = min(tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", None) or 10**9)
        _check_lengths(source, tokenizer, self.sentences, longest)
        # SigLIP was trained on texts that are padded to the full length, and does not mask the padding.
        is_full = str(self.model.config.model_type).startswith("siglip")
        padding = {"padding": "max_length", "max_length": longest} if is_full else {"padding": True}
        with explained(source.model_source, "preparation of texts"), torch.inference_mode():
            batch = tokenizer(self.sentences, return_tensors="pt", **padding)
            known = ("input_ids",) if is_full else ("input_ids", "attention_mask")
            parts = [
                self.model.get_text_features(**{key: batch[key][start : start + 64].to(self.device) for key in known})
                # Some at a time, since a task may have thousands of labels.
                for start in range(0, len(self.sentences), 64)
            ]
            features = self.means @ torch.cat([directions(part) for part in parts])
        return features / features.norm(dim=-1, keepdim=True)

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            on_device = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
            features = directions(self.model.get_image_features(**on_device))
            # SigLIP's bias is the same for every label, and softmax forgets it.
            with whole_precision(self.device):
                return features @ self.text_features.T * self.model.logit_scale.float().exp()


def _is_dual(source: ModelSource) -> bool:
    named = source.config.get("architectures") or []
    known = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(str(source.config.get("model_type")))
    return not source.is_adapter and isinstance(named, list) and known in named


def _load(source: TeacherSource, labels: Sequence[str], device: torch.device) -> _ZeroShotTeacher:
    if _is_dual(source.model_source):
        return DualTeacher(source, labels, device)
    model_source = source.model_source
    # The configuration of an adapter does not tell what its base reads.
    config = read_config(model_source.base or model_source)
    if not reads_text(config, f"Teacher '{source.name}'"):
        raise ValueError(
            f"Teacher '{source.name}' of kind 'zero_shot' must be {_TOLD}, got a classifier of images. Leave `kind` "
            "out for a classifier that has labels of its own."
        )
    return NliTeacher(source, labels, device)


KIND = Kind(
    load=_load,
    # Not NLI models: they are classifiers by their files, of labels that are another task's.
    recognizes=lambda source, model: _is_dual(source),
    options=_OPTIONS,
    reads_label_texts=True,
)
