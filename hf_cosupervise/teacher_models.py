"""Teachers that run: load one of any kind, mapped onto the labels of the task, and write one of scikit-learn."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from .checkpoints import (
    Checkpoint,
    check_no_missing,
    find_checkpoint,
    find_kind,
    load_adapted,
    load_processor,
    read_config,
    reads_text,
    whole_weights,
)
from .files import check_free, whole_folder, write_json
from .inputs import InputProcessor, RowError, as_label_id, shorten, to_pil
from .sparse import SUM_TOLERANCE
from .teachers import Teacher

SKLEARN_FEATURE_KINDS = ("pixels", "values", "text")
_SKLEARN_FILE = "model.skops"
_SAFETENSORS_FILE = "model.safetensors"
# What a model of timm says of its inputs and outputs; where its weights came from is not read.
_TIMM_SETTINGS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes"),
    *("pool_size", "first_conv", "classifier"),
)


class TeacherModel(Protocol):
    """A loaded teacher: cells are prepared, and probabilities over the task's labels come out.

    Attributes:
        facts (`dict[str, Any]`): What travels with its pseudolabels, JSON values: kind, revision, commit, class and
            `preprocessing`, a fingerprint of what `prepare` does. Teachers with the same one share what is prepared;
            one without a fingerprint (`None` or absent) shares with nobody.
        column (`str`, *optional*): The column that it reads instead of the inputs; `None` for a model of the inputs.
    """

    facts: dict[str, Any]
    column: str | None

    def prepare(self, cells: Sequence[Any]) -> Any:
        """Turn cells into what the model reads. It may run in a worker process, so it leaves the device alone.

        For a cell that cannot be read it raises [`RowError`]; any other error is taken for its own, not for the row's.

        Args:
            cells (`Sequence` of length `num_rows`): PIL images, texts or vectors; or the values of `column`.

        Returns:
            What `__call__` takes, such as tensors of `num_rows` rows.
        """
        ...

    def __call__(self, inputs: Any) -> np.ndarray:
        """Label a batch.

        Args:
            inputs: What `prepare` gave for it.

        Returns:
            `np.ndarray` of shape `(num_rows, num_labels)`, float32: rows sum to 1; a row of zeros is no answer.
        """
        ...


def check_teacher_model(model: Any, name: str) -> None:
    """See that an object can be run as a teacher.

    Args:
        model (`Any`):
            What should be a [`TeacherModel`].
        name (`str`):
            Its name in the hierarchy, for the error.

    Raises:
        TypeError: If it lacks a part of one, or its facts are no JSON values.
    """
    lacking = [] if callable(model) else ["`__call__(inputs)`"]
    lacking += [] if callable(getattr(model, "prepare", None)) else ["`prepare(cells)`"]
    lacking += [] if isinstance(getattr(model, "column", 0), str | None) else ["`column` (a name or None)"]
    try:
        is_json = json.dumps(facts := getattr(model, "facts", None)) and isinstance(facts, Mapping)
    except (TypeError, ValueError):
        is_json = False
    lacking += [] if is_json else ["`facts` (a dictionary of JSON values)"]
    if lacking or isinstance(model, type):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"`models[{name!r}]` must be a teacher object with `prepare(cells)`, `__call__(inputs)`, `column` and "
            f"`facts`, got {found}{' without ' + ', '.join(lacking) if lacking else ''}. Give an object of a class "
            "that has them (see `TeacherModel`), or put its answers into a column and read them by `kind='column'`."
        )


class WrongColumnError(TypeError):
    """Texts were given to a model of images, or the other way round: no row is at fault, the column is."""


def load_teacher(
    teacher: Teacher, labels: Sequence[str], device: str | torch.device | None = None, *, commit: str | None = None
) -> TeacherModel:
    """Load one teacher, mapped by label names onto the labels of the task.

    A label of the task that the teacher does not know gets probability 0; several labels of the teacher that are
    mapped to one label of the task add up. Only safetensors and skops files are read, and no code from the Hub is
    executed. An adapter of peft is merged into its base.

    Args:
        teacher (`Teacher`):
            Which one. `kind="auto"` is found out from the files: `config.json` with `model_type` or an
            `adapter_config.json` is transformers, with `architecture` timm; a skops file is scikit-learn.
        labels (`Sequence[str]`):
            The task's label names.
        device (`str` or `torch.device`, *optional*):
            Where it runs. Defaults to the first GPU if there is one.
        commit (`str`, *optional*):
            Its commit on the Hub, where [`identify_teacher`] has found it already: a branch may move in between.

    Returns:
        [`TeacherModel`]: Its `facts` hold `kind`, `class`, `preprocessing`, `revision` (as it was asked for), `commit`
        or for a folder `weights`; of an adapter also `base_model`, `base_commit` and, for a folder, `base_weights`.

    Raises:
        ImportError: If its library is not installed.
        OSError: If the model or one of its files does not exist, or the Hub refuses it or cannot be reached.
        ValueError: If its kind cannot be told, it has no trained head, its labels cannot be mapped, or its file holds
            types that are not trusted.
    """
    labels = tuple(labels)
    if teacher.kind == "column":
        return _ColumnTeacher(teacher, labels)
    device = torch.device(device) if device is not None else default_device()
    source = _find_source(teacher, commit)
    kind = find_kind(source.checkpoint, teacher.model) if teacher.kind == "auto" else teacher.kind
    if kind == "transformers":
        return _TransformersTeacher(source, labels, device)
    if kind == "timm":
        return _TimmTeacher(source, labels, device)
    return _SklearnTeacher(source, labels)


def save_sklearn_teacher(
    model: Any, folder: str | os.PathLike[str], feature: Mapping[str, Any], labels: Sequence[str] | None = None
) -> None:
    """Write a scikit-learn classifier as a teacher: `model.skops` without pickle, and `config.json`.

    Args:
        model (`sklearn.base.ClassifierMixin`):
            A fitted classifier with `predict_proba`.
        folder (`str` or `os.PathLike`):
            Folder to make; written whole or not at all.
        feature (`Mapping[str, Any]`):
            How an example becomes what the classifier reads. `kind` is `"pixels"` (with `size` `[height, width]` or
            `None` for the image's own, `mode` `"L"` or `"RGB"`, and `divide_by`), `"values"` (a vector of numbers) or
            `"text"` (a string).
        labels (`Sequence[str]`, *optional*):
            Label names, where the classifier was fitted to their positions. Without it, its classes are the names.

    Raises:
        FileExistsError: If the folder holds something already.
        ImportError: If skops is not installed.
        TypeError: If the model has no `predict_proba`.
        ValueError: If `feature` is not usable or a class of the model has no label.

    Examples:
        >>> save_sklearn_teacher(tree, "teachers/tree", {"kind": "pixels", "size": [8, 8]}, labels)  # doctest: +SKIP
    """
    skops_io = _import_skops()
    _check_predict_proba(model, f"'{folder}'")
    settings = _feature_settings(feature, f"`feature` of '{folder}'")
    config: dict[str, Any] = {"library_name": "sklearn", "feature": settings}
    classes = np.asarray(model.classes_).tolist()
    if labels is not None:
        if unnamed := [value for value in classes if not isinstance(value, int) or not 0 <= value < len(labels)]:
            raise ValueError(
                f"With `labels`, the classes of the model must be positions 0..{len(labels) - 1}, got {unnamed}. "
                "Leave `labels` out if the classes are label names."
            )
        config["id2label"] = {str(value): str(labels[value]) for value in classes}
    folder = Path(folder)
    check_free(folder, "Load the teacher that is there, or choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unfinished:
        skops_io.dump(model, unfinished / _SKLEARN_FILE)
        write_json(unfinished / "config.json", config)


def identify_teacher(teacher: Teacher) -> tuple[dict[str, Any], int]:
    """Tell which weights a teacher has, without loading them.

    Args:
        teacher (`Teacher`):
            Which one.

    Returns:
        `tuple[dict[str, Any], int]`: Its `commit` on the Hub or a hash of its local files as `weights`, as they stand
        in the facts of the loaded teacher; and the size of its weight files in bytes, 0 where none is here yet.

    Raises:
        FileNotFoundError: If the model or its `config.json` does not exist.
    """
    if teacher.kind == "column":
        return {}, 0
    checkpoint = _find_source(teacher).checkpoint
    return checkpoint.identity, sum(path.stat().st_size for path in checkpoint.weight_files)


# ── where a teacher is and what it is ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Source:
    """A teacher and its files."""

    teacher: Teacher
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    def facts(self, kind: str, class_name: str, preprocessing: str) -> dict[str, Any]:
        """What is known about this run."""
        where = {} if self.teacher.subfolder is None else {"subfolder": self.teacher.subfolder}
        return {
            "kind": kind,
            "revision": self.checkpoint.revision,
            **where,
            **self.checkpoint.identity,
            "class": class_name,
            "preprocessing": preprocessing,
        }


def _find_source(teacher: Teacher, commit: str | None = None) -> _Source:
    """Read the configuration, and pin a Hub repository to one commit."""
    checkpoint = find_checkpoint(
        teacher.model, what=f"Teacher '{teacher.name}'", revision=teacher.revision, subfolder=teacher.subfolder,
        commit=commit,
    )  # fmt: skip
    return _Source(teacher, checkpoint)


def default_device() -> torch.device:
    """Give the GPU of this process, if there is one.

    Returns:
        `torch.device`: `cuda:LOCAL_RANK`, or `cpu`.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _label_positions(teacher: Teacher, own_labels: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Position in the task's labels of each of the teacher's own labels, `(num_own_labels,)`."""
    label_map = dict(teacher.label_map or {})
    if unknown := sorted(set(label_map) - set(own_labels)):
        raise ValueError(
            f"`label_map` of teacher '{teacher.name}' must start from its own labels {shorten(own_labels)}, got "
            f"{shorten(unknown)}."
        )
    find = label_finder(labels)
    positions = [find(label_map.get(name, name)) for name in own_labels]
    unmapped = [name for name, position in zip(own_labels, positions, strict=True) if position is None]
    if not unmapped:
        return np.array(positions, dtype=np.int64)
    if all(name.startswith("LABEL_") for name in unmapped):
        raise ValueError(
            f"Teacher '{teacher.name}' must tell the names of its labels, got the placeholders {shorten(unmapped)}. "
            'Give the names in order with `label_map={"LABEL_0": ...}`.'
        )
    raise ValueError(
        f"Labels of teacher '{teacher.name}' must be labels of the task {shorten(labels)}, got {shorten(unmapped)}. "
        "Map them with `label_map`."
    )


def label_finder(labels: Sequence[str]) -> Callable[[str], int | None]:
    """Give a function that finds a name, exactly or else by the only label that differs in case alone.

    Args:
        labels (`Sequence[str]`):
            The task's label names.

    Returns:
        `Callable[[str], int | None]`: From a name to its position; `None` where no label, or more than one, is meant.

    Examples:
        >>> find = label_finder(["cat", "Dog"])
        >>> find("cat"), find("DOG"), find("cow")
        (0, 1, None)
    """
    exact = {label: position for position, label in enumerate(labels)}
    alike: dict[str, int | None] = {}
    for position, label in enumerate(labels):
        alike[label.casefold()] = None if label.casefold() in alike else position
    return lambda name: exact[name] if name in exact else alike.get(name.casefold())


def _add_up(own_probs: np.ndarray, positions: np.ndarray, num_labels: int) -> np.ndarray:
    """Probabilities over the teacher's labels `(n, num_own_labels)` as probabilities over the task's, float32."""
    if own_probs.ndim != 2 or own_probs.shape[1] != len(positions):
        raise ValueError(
            f"A teacher with {len(positions)} label names must give probabilities of shape "
            f"(num_rows, {len(positions)}), got {own_probs.shape}. Check its configuration."
        )
    probs = np.zeros((len(own_probs), num_labels), dtype=np.float32)
    if len(np.unique(positions)) == len(positions):
        probs[:, positions] = own_probs
    else:
        for own, position in enumerate(positions):
            probs[:, position] += own_probs[:, own]
    return probs


def _check_head(name: str, own_labels: Sequence[str]) -> None:
    if len(own_labels) < 2:
        raise ValueError(
            f"Teacher '{name}' must give a probability for each of at least two labels, got {len(own_labels)} (a "
            "regression head). Use a classifier."
        )


# ── the four kinds ──────────────────────────────────────────────────────────────────────────────────────────────────


class _TransformersTeacher:
    """An image or text classifier of transformers."""

    column: str | None = None

    def __init__(self, source: _Source, labels: Sequence[str], device: torch.device) -> None:
        name = source.name
        load = load_adapted if source.checkpoint.is_adapter else _load_classifier
        model, processor_folder = load(source.checkpoint)
        config = model.config
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"Teacher '{name}' must choose one label per example, got `problem_type` '{config.problem_type}'. "
                "Use a single-label classifier."
            )
        own_labels = [str(config.id2label[position]) for position in range(config.num_labels)]
        _check_head(name, own_labels)
        is_text = reads_text(config, f"Teacher '{name}'")
        processing_class = load_processor(source.checkpoint, processor_folder, is_text)
        self.positions, self.num_labels = _label_positions(source.teacher, own_labels, labels), len(labels)
        processor = InputProcessor(processing_class, config, f"Teacher '{name}'")
        processor.probe()  # what fails later is a row's fault
        self.prepare = _Preparation(name, is_text, processor)
        self.device = device
        self.model = _for_inference(model, device)
        self.facts = source.facts("transformers", type(model).__name__, processor.fingerprint)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        with torch.inference_mode():
            logits = self.model(**on_device).logits
        own_probs = torch.softmax(logits.float(), dim=-1).cpu().numpy()
        return _add_up(own_probs, self.positions, self.num_labels)


class _TimmTeacher:
    """An image classifier of timm, with the transforms of its own configuration."""

    column: str | None = None

    def __init__(self, source: _Source, labels: Sequence[str], device: torch.device) -> None:
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"Teacher '{source.name}' is a timm model: `pip install timm`.") from error
        name = source.name
        own_labels = _timm_labels(source)
        _check_head(name, own_labels)
        folder = source.checkpoint.fetch()
        source.checkpoint.file(_SAFETENSORS_FILE)
        model = _build_timm(source)
        try:
            with whole_weights(source.checkpoint):
                model.load_state_dict(load_file(folder / _SAFETENSORS_FILE))
        except RuntimeError as error:
            raise ValueError(
                f"Teacher '{name}' must have all of its weights (never a silently random teacher), got a "
                f"'{_SAFETENSORS_FILE}' that does not fit its architecture: {error}"
            ) from error
        data_config = timm.data.resolve_data_config(model=model)
        transform = timm.data.create_transform(**data_config, is_training=False)
        mode = "L" if data_config["input_size"][0] == 1 else "RGB"
        self.positions, self.num_labels = _label_positions(source.teacher, own_labels, labels), len(labels)
        self.prepare = _Preparation(name, False, partial(_transform_images, transform=transform, mode=mode))
        self.device = device
        self.model = _for_inference(model, device)
        self.facts = source.facts("timm", type(model).__name__, _fingerprint([repr(transform), mode]))

    def __call__(self, inputs: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            logits = self.model(inputs.to(self.device, non_blocking=True))
        own_probs = torch.softmax(logits.float(), dim=-1).cpu().numpy()
        return _add_up(own_probs, self.positions, self.num_labels)


class _SklearnTeacher:
    """A scikit-learn classifier kept by skops, which declares how an example becomes its feature vector."""

    column: str | None = None

    def __init__(self, source: _Source, labels: Sequence[str]) -> None:
        skops_io = _import_skops()
        name = source.name
        declared = source.config.get("feature")
        feature = _feature_settings(declared, f"`feature` in 'config.json' of teacher '{name}'")
        source.checkpoint.fetch()
        path = source.checkpoint.file(_SKLEARN_FILE)
        try:
            untrusted = set(skops_io.get_untrusted_types(file=path))
        except (BadZipFile, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"Teacher '{name}' must have a '{_SKLEARN_FILE}' that skops wrote, got another or a damaged file: "
                f"{error}. Save it again by `save_sklearn_teacher`."
            ) from error
        if refused := sorted(untrusted - set(source.teacher.trusted_types)):
            raise ValueError(
                f"Teacher '{name}' must hold types that skops or you trust, got {refused}. If you trust its origin, "
                "name them in `trusted_types`."
            )
        self.model = skops_io.load(path, trusted=sorted(untrusted))
        _check_predict_proba(self.model, f"teacher '{name}'")
        id2label = source.config.get("id2label") or {}
        classes = [str(value) for value in np.asarray(self.model.classes_).tolist()]
        own_labels = [str(id2label.get(value, value)) for value in classes]
        self.positions, self.num_labels = _label_positions(source.teacher, own_labels, labels), len(labels)
        matrix = partial(_feature_matrix, feature=feature, model_needs=_needs(self.model))
        self.prepare = _Preparation(name, feature["kind"] == "text", matrix)
        self.facts = source.facts("sklearn", type(self.model).__name__, _fingerprint(feature))

    def __call__(self, inputs: Any) -> np.ndarray:
        return _add_up(np.asarray(self.model.predict_proba(inputs)), self.positions, self.num_labels)


class _ColumnTeacher:
    """Answers that are in a column already: of people, of a language model, of an older system."""

    column: str | None

    def __init__(self, teacher: Teacher, labels: Sequence[str]) -> None:
        self.teacher, self.labels, self.column = teacher, tuple(labels), teacher.model
        self.find_label = label_finder(self.labels)
        self.facts: dict[str, Any] = {"kind": "column", "revision": None, "commit": None, "class": "column"}
        self.facts["preprocessing"] = None

    def prepare(self, cells: Sequence[Any]) -> list[int | np.ndarray]:
        return [
            self._read_vector(value) if isinstance(value, list | tuple | np.ndarray) else self._read_label(value)
            for value in cells
        ]

    def __call__(self, inputs: Sequence[int | np.ndarray]) -> np.ndarray:
        probs = np.zeros((len(inputs), len(self.labels)), dtype=np.float32)
        for row, answer in enumerate(inputs):
            if isinstance(answer, np.ndarray):
                probs[row] = answer
            elif answer >= 0:
                probs[row, answer] = 1.0
        return probs

    def _read_label(self, value: Any) -> int:
        """Label id of one answer; -1 where there is none."""
        value = as_label_id(value)
        if value is None or isinstance(value, str) and value == "":
            return -1
        if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < len(self.labels):
            return value
        if isinstance(value, str):
            name = (self.teacher.label_map or {}).get(value, value)
            if (position := self.find_label(name)) is not None:
                return position
        raise self._bad(value)

    def _read_vector(self, value: Sequence[Any] | np.ndarray) -> np.ndarray:
        if len(value) == 0 or all(item is None for item in value):
            return np.zeros(len(self.labels), dtype=np.float32)
        try:
            vector = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._bad(value) from error
        is_valid = vector.shape == (len(self.labels),) and np.isfinite(vector).all() and (vector >= 0).all()
        if not is_valid or not (vector.sum() == 0 or abs(vector.sum() - 1) <= SUM_TOLERANCE):
            raise self._bad(value)
        return vector

    def _bad(self, value: Any) -> RowError:
        return RowError(
            f"Answers in column '{self.teacher.model}' must be label names of the task ({shorten(self.labels)}; "
            f"other names can be mapped with `label_map`), label ids 0..{len(self.labels) - 1}, {len(self.labels)} "
            f"probabilities that sum to 1, or None, NaN, '' or -1 for no answer; got {value!r}"
        )


# What tokenizers and image processors of libraries make of a row that they cannot read.
_PREPARE_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class _Preparation:
    """What a model does to cells before it runs; kept apart from its weights, so that a worker needs only this."""

    name: str
    is_text: bool
    make: Callable[[Sequence[Any]], Any]

    def __call__(self, cells: Sequence[Any]) -> Any:
        if cells and isinstance(cells[0], str) != self.is_text:
            wanted = "texts" if self.is_text else "images or vectors"
            pairs = ", and make pairs of texts one text each" if self.is_text and isinstance(cells[0], list) else ""
            raise WrongColumnError(
                f"Teacher '{self.name}' must be given {wanted}, got {type(cells[0]).__name__}. Name the right column "
                f"with `input_column`{pairs}."
            )
        try:
            inputs = self.make(cells)
        except (RowError, torch.OutOfMemoryError):
            raise
        except _PREPARE_ERRORS as error:
            raise RowError(f"{type(error).__name__}: {error}") from error
        if isinstance(inputs, Mapping):
            return {key: _channels_last(value) for key, value in inputs.items()}
        return _channels_last(inputs)


def _channels_last(value: Any) -> Any:
    """Put images into the order in which convolutions run faster, on the CPU too: once for all who share them."""
    is_image = isinstance(value, torch.Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _transform_images(cells: Sequence[Any], transform: Callable[[Any], torch.Tensor], mode: str) -> torch.Tensor:
    return torch.stack([transform(to_pil(cell, mode)) for cell in cells])


def _for_inference(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def _load_classifier(checkpoint: Checkpoint) -> tuple[Any, Path]:
    """A whole classifier, and the folder of its tokenizer or image processor."""
    folder, config = checkpoint.fetch(), read_config(checkpoint)
    is_text = reads_text(config, checkpoint.what)
    auto_model = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    with whole_weights(checkpoint):
        model, info = auto_model.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    check_no_missing(checkpoint.what, info["missing_keys"])
    checkpoint.name_after(model)
    return model, folder


def _build_timm(source: _Source) -> Any:
    """A model of timm as its configuration describes it, with fresh weights.

    timm would read `config.json` itself, by `local-dir:`, and would then open whatever files that names.
    """
    import timm

    config = source.config
    try:
        args = dict(config.get("model_args") or {})
        described = config.get("pretrained_cfg") or config
        settings = {key: described[key] for key in _TIMM_SETTINGS if described.get(key) is not None}
        settings["num_classes"] = config.get("num_classes", settings.get("num_classes"))
        # timm 1.0.31 takes the size of the inputs from the arguments where it was not saved elsewhere.
        if args.get("dynamic_img_size") or args.get("strict_img_size") is False:
            settings["fixed_input_size"] = False
        channels, *size = settings.get("input_size", (3, 224, 224))
        if settings.get("fixed_input_size") and args.get("img_size"):
            size = [args["img_size"]] * 2 if isinstance(args["img_size"], int) else args["img_size"]
        settings["input_size"] = (args.get("in_chans", channels), *size)
        return timm.create_model(config["architecture"], pretrained=False, pretrained_cfg=settings, **args)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Teacher '{source.name}' must be a model that timm {timm.__version__} knows, got architecture "
            f"{config.get('architecture')!r} with `model_args` {config.get('model_args')}: {error}. Update timm, or "
            "save the model again."
        ) from error


def _timm_labels(source: _Source) -> list[str]:
    """Label names in the order of the classifier's outputs."""
    pretrained_cfg = source.config.get("pretrained_cfg") or {}
    names = source.config.get("label_names") or pretrained_cfg.get("label_names")
    num_classes = source.config.get("num_classes", pretrained_cfg.get("num_classes"))
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    if not names or len(names) != num_classes:
        raise ValueError(
            f"'config.json' of teacher '{source.name}' must tell the names of its {num_classes} labels as "
            f"`label_names`, got {len(names or [])}. Save it with "
            "`save_for_hf(..., model_config={'label_names': ...})`; a model of ImageNet's 1,000 "
            "classes can be loaded with `kind='transformers'`."
        )
    return [str(label) for label in names]


def _import_skops() -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise ImportError(
            'Teachers of scikit-learn are kept by skops: `pip install "hf_cosupervise[sklearn]"`.'
        ) from error
    return skops.io


def _check_predict_proba(model: Any, name: str) -> None:
    if not hasattr(model, "predict_proba") or np.ndim(getattr(model, "classes_", 0)) != 1:
        raise TypeError(
            f"A scikit-learn teacher must be a fitted classifier with `predict_proba`, got {type(model).__name__} for "
            f"{name}. Wrap it in `CalibratedClassifierCV`, or fit it first."
        )


def _feature_settings(feature: Any, what: str) -> dict[str, Any]:
    """The checked declaration of how an example becomes a feature vector, with its defaults filled in."""
    if not isinstance(feature, Mapping) or feature.get("kind") not in SKLEARN_FEATURE_KINDS:
        raise ValueError(
            f"{what} must be a mapping whose `kind` is one of {list(SKLEARN_FEATURE_KINDS)}, got {feature!r}. "
            "Declare how an example becomes the classifier's feature vector."
        )
    defaults: dict[str, Any] = {"kind": feature["kind"]}
    if feature["kind"] == "pixels":
        defaults |= {"size": None, "mode": "L", "divide_by": 255.0}
    if unknown := sorted(set(feature) - set(defaults)):
        raise ValueError(
            f"{what} of kind '{feature['kind']}' must have keys among {sorted(defaults)}, got unknown {unknown}. "
            "Drop them."
        )
    settings = defaults | dict(feature)
    if settings["kind"] != "pixels":
        return settings
    size = settings["size"]
    if size is not None and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(f"{what} must have a `size` of [height, width] in pixels or None, got {size!r}.")
    if settings["mode"] not in ("L", "RGB") or not settings["divide_by"] > 0:
        raise ValueError(
            f"{what} must have a `mode` of 'L' or 'RGB' and a positive `divide_by`, got {settings['mode']!r} and "
            f"{settings['divide_by']!r}."
        )
    return settings | {"size": None if size is None else list(size), "divide_by": float(settings["divide_by"])}


def _needs(model: Any) -> tuple[int | None, bool]:
    """How many features a classifier was fitted on, and whether they must be finite; as far as it tells."""
    tags = getattr(model, "__sklearn_tags__", None)  # from scikit-learn 1.6 on
    return getattr(model, "n_features_in_", None), tags is not None and not tags().input_tags.allow_nan


def _feature_matrix(cells: Sequence[Any], feature: Mapping[str, Any], model_needs: tuple[int | None, bool]) -> Any:
    """What the classifier reads: `(num_rows, num_features)` float32, or the texts as they are."""
    if feature["kind"] == "text":
        return list(cells)
    vectors = _read_vectors(cells, feature)
    num_features, is_finite = model_needs
    for vector in vectors:
        if num_features is not None and len(vector) != num_features:
            raise RowError(f"An input must give the {num_features} numbers of the classifier, got {len(vector)}")
        if is_finite and not np.isfinite(vector).all():
            raise RowError("An input must hold finite numbers, got one that is missing or infinite")
    return np.stack(vectors)


def _read_vectors(cells: Sequence[Any], feature: Mapping[str, Any]) -> list[np.ndarray]:
    if feature["kind"] == "values":
        return [np.asarray(cell, dtype=np.float32).ravel() for cell in cells]
    images = [to_pil(cell, feature["mode"]) for cell in cells]
    if feature["size"] is not None:
        height, width = feature["size"]
        # PIL names the width first; 2 is its bilinear filter.
        images = [image if image.size == (width, height) else image.resize((width, height), 2) for image in images]
    return [np.asarray(image, dtype=np.float32).ravel() / feature["divide_by"] for image in images]


def _fingerprint(facts: Any) -> str:
    """Hash of what decides what a model gets to see, 16 hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
