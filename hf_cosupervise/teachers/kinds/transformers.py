"""Teachers of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from ...data.inputs import InputProcessor
from ...data.vectors import VECTOR_MODEL
from ...models.classifier import image_class, load_adapted, load_processor, load_whole, read_config, reads_text
from ...models.source import TIMM_PREFIXES, ModelSource
from .base import Kind, Preparation, TeacherSource, add_up, for_inference, head_labels, label_positions, try_out


class TransformersTeacher:
    """An image or text classifier of transformers."""

    column: str | None = None

    def __init__(self, source: TeacherSource, labels: Sequence[str], device: torch.device) -> None:
        name = source.name
        load = load_adapted if source.model_source.is_adapter else _load_classifier
        model, processor_folder = load(source.model_source)
        config = model.config
        own_labels = head_labels(source.teacher, config)
        is_text = reads_text(config, f"Teacher '{name}'")
        processing_class = load_processor(source.model_source, processor_folder, is_text)
        self.positions, self.num_labels = label_positions(source.teacher, own_labels, labels), len(labels)
        processor = InputProcessor(processing_class, config, f"Teacher '{name}'")
        samples = processor.probe()
        self.prepare = Preparation(name, is_text, processor)
        self.device = device
        self.model = for_inference(model, device)
        try_out(source, lambda: self(samples))
        self.facts = source.facts("transformers", type(model).__name__, processor.fingerprint)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        with torch.inference_mode():
            logits = self.model(**on_device).logits
        # In half precision, small probabilities would be 0.
        own_probs = torch.softmax(logits.float(), dim=-1).cpu().numpy()
        return add_up(own_probs, self.positions, self.num_labels)


def _load_classifier(model_source: ModelSource) -> tuple[Any, Path]:
    """A whole classifier, and the folder of its tokenizer or image processor."""
    folder, config = model_source.fetch(), read_config(model_source)
    # The head of a SetFit folder is a pickle whichever it is: torch heads are put into one too.
    if (folder / "config_setfit.json").is_file() or (folder / "model_head.pkl").is_file():
        raise ValueError(
            f"{model_source.what} must have a classifier that is read without pickle, got a SetFit model in "
            f"'{model_source.place}', whose head 'model_head.pkl' is one. If you trust it, load it by "
            "`setfit = SetFitModel.from_pretrained(…)` and give it as a function of rows: `lambda rows: "
            "[dict(zip(setfit.labels, p)) for p in setfit.predict_proba([row['text'] for row in rows]).tolist()]` in "
            "`labeling_function(…, name='setfit', version='1', batched=True)`; or keep its head by "
            "`save_sklearn_teacher(setfit.model_head, folder, {'kind': 'values'}, setfit.labels)` for a column of the "
            "vectors `setfit.model_body.encode(texts)`."
        )
    is_text = reads_text(config, model_source.what)
    auto_model = AutoModelForSequenceClassification if is_text else image_class(config)
    return load_whole(model_source, auto_model, config), folder


KIND = Kind(
    load=TransformersTeacher,
    recognizes=lambda source, model: (
        source.is_adapter
        # A student of vectors is read by its scikit-learn form.
        or source.config.get("model_type", VECTOR_MODEL) != VECTOR_MODEL
        and not model.startswith(TIMM_PREFIXES)
    ),
)
