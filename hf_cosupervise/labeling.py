"""Run every teacher over a dataset once: the only place where a teacher runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset, Value
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from .inputs import InputProcessor, find_input_column, row_keys, to_pil
from .pool import ORACLE_DOMAIN, ORACLE_LABEL, PseudolabelPool, teacher_dataset
from .sparse import SUM_TOLERANCE, default_pool_k, encode_top_k
from .teachers import Teacher, TeacherHierarchy

SKLEARN_FEATURE_KINDS = ("pixels", "values", "text")
_SKLEARN_FILE = "model.skops"
_SAFETENSORS_FILE = "model.safetensors"
_TIMM_PREFIXES = ("hf-hub:", "local-dir:")
# Column names that usually hold ground truth. Any `ClassLabel` column is taken for ground truth as well.
_GOLD_NAMES = frozenset(
    ("label", "labels", "target", "targets", "gold", "gold_label", "ground_truth", "class", "y", "coarse_label")
    + ("fine_label", "label_ids", ORACLE_LABEL, ORACLE_DOMAIN)
)
# Cheap columns are read in pieces of this many rows, images in pieces of `batch_size`.
_CHUNK = 8192


class TeacherModel(Protocol):
    """A loaded teacher: cells and rows go in, probabilities over the task's labels come out.

    Attributes:
        facts (`dict[str, Any]`): What travels with its pseudolabels: kind, revision, commit, class and a fingerprint
            of the preprocessing.
        column (`str`, *optional*): The column it reads besides the inputs; `None` for a model that reads inputs only.
    """

    facts: dict[str, Any]
    column: str | None

    def __call__(self, cells: Sequence[Any], rows: Mapping[str, Sequence[Any]], first_row: int = 0) -> np.ndarray:
        """Label a batch.

        Args:
            cells (`Sequence` of length `num_rows`): What models read: PIL images, texts or vectors.
            rows (`Mapping[str, Sequence]`): Other columns of the same rows.
            first_row (`int`, *optional*, defaults to 0): Position of the first row in the dataset, for errors.

        Returns:
            `np.ndarray` of shape `(num_rows, num_labels)`, float32: rows sum to 1; a row of zeros is no answer.
        """
        ...


def load_teacher(teacher: Teacher, labels: Sequence[str], device: str | torch.device | None = None) -> TeacherModel:
    """Load one teacher, mapped by label names onto the labels of the task.

    A label of the task that the teacher does not know gets probability 0; several labels of the teacher that are
    mapped to one label of the task add up. Only safetensors and skops files are read, and no code from the Hub is
    executed.

    Args:
        teacher (`Teacher`):
            Which one. `kind="auto"` is found out from the files: `config.json` with `model_type` is transformers, with
            `architecture` timm; a skops file is scikit-learn.
        labels (`Sequence[str]`):
            The task's label names.
        device (`str` or `torch.device`, *optional*):
            Where it runs. Defaults to the first GPU if there is one.

    Returns:
        [`TeacherModel`]

    Raises:
        FileNotFoundError: If the model or one of its files does not exist.
        ImportError: If its library is not installed.
        ValueError: If its kind cannot be told, it has no trained head, its labels cannot be mapped, or its file holds
            types that are not trusted.
    """
    labels = tuple(labels)
    if teacher.kind == "column":
        return _ColumnTeacher(teacher, labels)
    device = torch.device(device) if device is not None else _default_device()
    source = _find_source(teacher)
    kind = _find_kind(source) if teacher.kind == "auto" else teacher.kind
    if kind == "transformers":
        return _TransformersTeacher(source, labels, device)
    if kind == "timm":
        return _TimmTeacher(source, labels, device)
    return _SklearnTeacher(source, labels)


def build_pool(
    dataset: Dataset | IterableDataset,
    hierarchy: TeacherHierarchy,
    *,
    input_column: str | None = None,
    oracle_column: str | None = None,
    oracle_domain_column: str | None = None,
    pool_k: int | None = None,
    batch_size: int = 64,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    keep_inputs: bool = True,
    disable_tqdm: bool = False,
) -> PseudolabelPool:
    """Label a dataset with every teacher of a hierarchy, each of which is loaded and run once.

    Started on several processes (`torchrun`, `accelerate launch`), each labels its share of the rows, and every
    process gets the whole pool.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Unlabelled data. An `id` column of unique integers or strings is used if there is one; otherwise ids are
            hashes of the content.
        hierarchy (`TeacherHierarchy`):
            The teachers.
        input_column (`str`, *optional*):
            The column that models read. Defaults to the only image column, or `text` and the like.
        oracle_column (`str`, *optional*):
            Column of ground truth, kept as `oracle_label`, which nothing but `oracle_…` functions reads. Ground truth
            that is not declared here is refused.
        oracle_domain_column (`str`, *optional*):
            Column of the true domain, kept as `oracle_domain`.
        pool_k (`int`, *optional*):
            How many labels to keep per row, 1 to `num_labels`. Defaults to `min(16, num_labels)`.
        batch_size (`int`, *optional*, defaults to 64):
            Rows per forward pass.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where to save the pool, whole or not at all; the pool that comes back is then mapped from there.
        device (`str` or `torch.device`, *optional*):
            Where teachers run. Defaults to the first GPU if there is one.
        keep_inputs (`bool`, *optional*, defaults to `True`):
            Whether the pool keeps the input column. Without it, training needs the data as `train_dataset`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Hide the progress bars.

    Returns:
        [`PseudolabelPool`]

    Raises:
        FileExistsError: If `output_dir` holds something already.
        TypeError: If `dataset` is not one split of data.
        ValueError: If it is empty, holds undeclared ground truth or unusable ids, or a teacher's answer is not valid.
    """
    _check_arguments(dataset, hierarchy, pool_k, batch_size, output_dir)
    rank, num_processes = _process_shard()
    if isinstance(dataset, IterableDataset):
        dataset = _materialise(dataset)
    dataset = dataset.with_format(None)
    if len(dataset) == 0:
        raise ValueError("`dataset` must hold at least one example, got none. Check its split or its filter.")
    columns = _check_columns(dataset, hierarchy, input_column, oracle_column, oracle_domain_column)
    ids = _find_ids(dataset, columns.inputs)
    inputs = _pool_inputs(dataset, ids, hierarchy, columns, keep_inputs)

    bounds = np.linspace(0, len(dataset), num_processes + 1).astype(int)
    own_rows = range(bounds[rank], bounds[rank + 1])
    k = default_pool_k(hierarchy.num_labels) if pool_k is None else pool_k
    teachers, facts = {}, {}
    for teacher in hierarchy.teachers:
        model = load_teacher(teacher, hierarchy.labels, device)
        probs_of = _answers(model, dataset, own_rows, columns.inputs, batch_size)
        with tqdm(total=len(own_rows), desc=f"Teacher '{teacher.name}'", disable=disable_tqdm or rank > 0) as progress:
            encoded = [encode_top_k(np.zeros((0, hierarchy.num_labels)), k)]  # the share of a process may be empty
            for first_row, probs in probs_of:
                _check_probs(probs, teacher.name, first_row)
                encoded.append(encode_top_k(probs, k))
                progress.update(len(probs))
        facts[teacher.name] = model.facts
        # One teacher at a time: the memory of this one must be free before the next one is loaded.
        del model, probs_of
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        teachers[teacher.name] = teacher_dataset(ids, *_gather(encoded, num_processes))

    pool = PseudolabelPool(hierarchy, teachers, inputs, facts)
    if output_dir is None:
        return pool
    if rank == 0:
        pool.save(output_dir)
    if num_processes > 1:
        torch.distributed.barrier()
    return PseudolabelPool.load(output_dir)


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
    _check_free(folder, "Load the teacher that is there, or choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        skops_io.dump(model, unfinished / _SKLEARN_FILE)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ── where a teacher is and what it is ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Source:
    """A teacher's files: a local folder, or a Hub repository pinned to one commit."""

    teacher: Teacher
    repo: str
    is_local: bool
    commit: str | None
    config: dict[str, Any]

    def file(self, name: str) -> Path:
        """Path of one file, downloaded if need be."""
        path = _fetch(self.teacher, self.repo, name, self.commit)
        if path is None:
            raise FileNotFoundError(
                f"Teacher '{self.teacher.name}' must have a file '{name}', got none in '{self.repo}'. Save the model "
                "again in that format."
            )
        return path

    def facts(self, kind: str, class_name: str, preprocessing: str) -> dict[str, Any]:
        """What is known about this run."""
        return {
            "kind": kind,
            "revision": self.teacher.revision,
            "commit": self.commit,
            "class": class_name,
            "preprocessing": preprocessing,
        }


def _find_source(teacher: Teacher) -> _Source:
    """Read `config.json`, and pin a Hub repository to the commit that it came from."""
    repo, revision = teacher.model, teacher.revision
    for prefix in _TIMM_PREFIXES:
        repo = repo.removeprefix(prefix)
    is_local = Path(repo).is_dir()
    if not is_local and teacher.model.startswith("hf-hub:") and "@" in repo:
        repo, revision = repo.rsplit("@", 1)
    path = _fetch(teacher, repo, "config.json", revision)
    if path is None:
        raise FileNotFoundError(
            f"Teacher '{teacher.name}' must have a 'config.json', got none in '{repo}'. Save it with "
            "`save_pretrained`, `timm.models.save_for_hf` or `save_sklearn_teacher`."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"'config.json' of teacher '{teacher.name}' must be JSON, got: {error}. Save the model again."
        ) from error
    # A Hub file lies in the cache under snapshots/COMMIT/; everything else is then read at that commit.
    commit = None if is_local else path.parent.name
    return _Source(teacher, repo, is_local, commit, config)


def _fetch(teacher: Teacher, repo: str, name: str, revision: str | None) -> Path | None:
    """Path of one file in a folder or on the Hub; `None` if the folder or repository has no such file."""
    if Path(repo).is_dir():
        path = Path(repo) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except (RepositoryNotFoundError, HFValidationError, FileNotFoundError) as error:
        # Offline, the Hub's client raises a subclass of FileNotFoundError.
        raise FileNotFoundError(
            f"The `model` of teacher '{teacher.name}' must be a folder, or a model on the Hub that can be reached, "
            f"got '{teacher.model}'. Check the path, the id and your access to it."
        ) from error
    except EntryNotFoundError:
        return None


def _find_kind(source: _Source) -> str:
    """Tell the library by the files."""
    name = source.teacher.name
    if source.teacher.model.startswith(_TIMM_PREFIXES):
        return "timm"
    if "model_type" in source.config:
        return "transformers"
    if "architecture" in source.config:
        return "timm"
    has_skops = source.is_local and any(Path(source.repo).glob("*.skops"))
    if has_skops or source.config.get("library_name") == "sklearn":
        return "sklearn"
    raise ValueError(
        f"The kind of teacher '{name}' must show in its files: a 'config.json' with `model_type` (transformers) or "
        f"`architecture` (timm), or a '{_SKLEARN_FILE}' (scikit-learn); got a 'config.json' with "
        f"{sorted(source.config)}. Name it with `kind`."
    )


def _default_device() -> torch.device:
    """The GPU of this process, if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _label_positions(teacher: Teacher, own_labels: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Position in the task's labels of each of the teacher's own labels, `(num_own_labels,)`."""
    label_map = dict(teacher.label_map or {})
    if unknown := sorted(set(label_map) - set(own_labels)):
        raise ValueError(
            f"`label_map` of teacher '{teacher.name}' must start from its own labels {_shorten(own_labels)}, got "
            f"{_shorten(unknown)}."
        )
    positions = [_find_label(label_map.get(name, name), labels) for name in own_labels]
    unmapped = [name for name, position in zip(own_labels, positions, strict=True) if position is None]
    if not unmapped:
        return np.array(positions, dtype=np.int64)
    if all(name.startswith("LABEL_") for name in unmapped):
        raise ValueError(
            f"Teacher '{teacher.name}' must tell the names of its labels, got the placeholders {_shorten(unmapped)}. "
            'Give the names in order with `label_map={"LABEL_0": ...}`.'
        )
    raise ValueError(
        f"Labels of teacher '{teacher.name}' must be labels of the task {_shorten(labels)}, got {_shorten(unmapped)}. "
        "Map them with `label_map`."
    )


def _find_label(name: str, labels: Sequence[str]) -> int | None:
    """Position of a name, exactly or else by the only label that differs in case alone."""
    if name in labels:
        return labels.index(name)
    alike = [position for position, label in enumerate(labels) if label.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else None


def _add_up(own_probs: np.ndarray, positions: np.ndarray, num_labels: int) -> np.ndarray:
    """Probabilities over the teacher's labels `(n, num_own_labels)` as probabilities over the task's, float32."""
    if own_probs.ndim != 2 or own_probs.shape[1] != len(positions):
        raise ValueError(
            f"A teacher with {len(positions)} label names must give probabilities of shape "
            f"(num_rows, {len(positions)}), got {own_probs.shape}. Check its configuration."
        )
    probs = np.zeros((len(own_probs), num_labels), dtype=np.float32)
    for own, position in enumerate(positions):
        probs[:, position] += own_probs[:, own]
    return probs


def _shorten(names: Iterable[str], limit: int = 20) -> str:
    """The first names as a list, and how many more there are: a thousand labels make no readable error."""
    names = list(names)
    return str(names) if len(names) <= limit else f"{names[:limit]} and {len(names) - limit} more"


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
        name, repo, revision = source.teacher.name, source.repo, source.commit
        config = AutoConfig.from_pretrained(repo, revision=revision, trust_remote_code=False)
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"Teacher '{name}' must choose one label per example, got `problem_type` '{config.problem_type}'. "
                "Use a single-label classifier."
            )
        if config.model_type == "timm_wrapper" and config.model_args:
            # timm 1.0.31 writes num_classes here, and the wrapper passes it a second time.
            config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
        is_text = _reads_text(config, name)
        auto_model = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
        model, info = auto_model.from_pretrained(
            repo,
            revision=revision,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _check_no_missing(name, info["missing_keys"])
        own_labels = [str(model.config.id2label[position]) for position in range(model.config.num_labels)]
        _check_head(name, own_labels)
        auto_processor = AutoTokenizer if is_text else AutoImageProcessor
        processing_class = auto_processor.from_pretrained(repo, revision=revision, trust_remote_code=False)
        self.positions = _label_positions(source.teacher, own_labels, labels)
        self.name, self.num_labels, self.device = name, len(labels), device
        self.processor = InputProcessor(processing_class, config)
        self.model = model.to(device).eval().requires_grad_(False)
        self.facts = source.facts("transformers", type(model).__name__, self.processor.fingerprint)

    def __call__(self, cells: Sequence[Any], rows: Mapping[str, Sequence[Any]], first_row: int = 0) -> np.ndarray:
        _check_modality(self.name, cells, self.processor.is_text)
        inputs = {key: value.to(self.device) for key, value in self.processor(cells).items()}
        with torch.inference_mode():
            logits = self.model(**inputs).logits
        own_probs = torch.softmax(logits.float(), dim=-1).cpu().numpy()
        return _add_up(own_probs, self.positions, self.num_labels)


class _TimmTeacher:
    """An image classifier of timm, with the transforms of its own configuration."""

    column: str | None = None

    def __init__(self, source: _Source, labels: Sequence[str], device: torch.device) -> None:
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"Teacher '{source.teacher.name}' is a timm model: `pip install timm`.") from error
        name = source.teacher.name
        own_labels = _timm_labels(source)
        _check_head(name, own_labels)
        weights = source.file(_SAFETENSORS_FILE)
        try:
            # On the Hub, both files lie in one folder of the cache; loading from there keeps to the pinned commit.
            model = timm.create_model(f"local-dir:{weights.parent}", pretrained=True)
        except RuntimeError as error:
            raise ValueError(
                f"Teacher '{name}' must have all of its weights (never a silently random teacher), got a "
                f"'{_SAFETENSORS_FILE}' that does not fit its architecture: {error}"
            ) from error
        data_config = timm.data.resolve_data_config(model=model)
        self.transform = timm.data.create_transform(**data_config, is_training=False)
        self.mode = "L" if data_config["input_size"][0] == 1 else "RGB"
        self.positions = _label_positions(source.teacher, own_labels, labels)
        self.name, self.num_labels, self.device = name, len(labels), device
        self.model = model.to(device).eval().requires_grad_(False)
        self.facts = source.facts("timm", type(model).__name__, _fingerprint([repr(self.transform), self.mode]))

    def __call__(self, cells: Sequence[Any], rows: Mapping[str, Sequence[Any]], first_row: int = 0) -> np.ndarray:
        _check_modality(self.name, cells, is_text=False)
        pixel_values = torch.stack([self.transform(to_pil(cell, self.mode)) for cell in cells]).to(self.device)
        with torch.inference_mode():
            logits = self.model(pixel_values)
        own_probs = torch.softmax(logits.float(), dim=-1).cpu().numpy()
        return _add_up(own_probs, self.positions, self.num_labels)


class _SklearnTeacher:
    """A scikit-learn classifier kept by skops, which declares how an example becomes its feature vector."""

    column: str | None = None

    def __init__(self, source: _Source, labels: Sequence[str]) -> None:
        skops_io = _import_skops()
        name = source.teacher.name
        declared = source.config.get("feature")
        self.feature = _feature_settings(declared, f"`feature` in 'config.json' of teacher '{name}'")
        path = source.file(_SKLEARN_FILE)
        untrusted = set(skops_io.get_untrusted_types(file=path))
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
        self.positions = _label_positions(source.teacher, own_labels, labels)
        self.name, self.num_labels = name, len(labels)
        self.facts = source.facts("sklearn", type(self.model).__name__, _fingerprint(self.feature))

    def __call__(self, cells: Sequence[Any], rows: Mapping[str, Sequence[Any]], first_row: int = 0) -> np.ndarray:
        _check_modality(self.name, cells, self.feature["kind"] == "text")
        own_probs = np.asarray(self.model.predict_proba(_feature_matrix(cells, self.feature)))
        return _add_up(own_probs, self.positions, self.num_labels)


class _ColumnTeacher:
    """Answers that are in a column already: of people, of a language model, of an older system."""

    column: str | None

    def __init__(self, teacher: Teacher, labels: Sequence[str]) -> None:
        self.teacher, self.labels, self.column = teacher, tuple(labels), teacher.model
        self.facts: dict[str, Any] = {"kind": "column", "revision": None, "commit": None, "class": "column"}
        self.facts["preprocessing"] = None

    def __call__(self, cells: Sequence[Any], rows: Mapping[str, Sequence[Any]], first_row: int = 0) -> np.ndarray:
        values = rows[self.teacher.model]
        probs = np.zeros((len(values), len(self.labels)), dtype=np.float32)
        for offset, value in enumerate(values):
            if isinstance(value, list | tuple | np.ndarray):
                probs[offset] = self._read_vector(value, first_row + offset)
            elif (label := self._read_label(value, first_row + offset)) >= 0:
                probs[offset, label] = 1.0
        return probs

    def _read_label(self, value: Any, row: int) -> int:
        """Label id of one answer; -1 where there is none."""
        if value is None or value == "":
            return -1
        if isinstance(value, int | np.integer) and not isinstance(value, bool) and -1 <= value < len(self.labels):
            return int(value)
        if isinstance(value, str):
            name = (self.teacher.label_map or {}).get(value, value)
            if (position := _find_label(name, self.labels)) is not None:
                return position
        raise self._bad(value, row)

    def _read_vector(self, value: Sequence[Any] | np.ndarray, row: int) -> np.ndarray:
        if len(value) == 0 or all(item is None for item in value):
            return np.zeros(len(self.labels), dtype=np.float32)
        try:
            vector = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._bad(value, row) from error
        is_valid = vector.shape == (len(self.labels),) and np.isfinite(vector).all() and (vector >= 0).all()
        if not is_valid or not (vector.sum() == 0 or abs(vector.sum() - 1) <= SUM_TOLERANCE):
            raise self._bad(value, row)
        return vector

    def _bad(self, value: Any, row: int) -> ValueError:
        return ValueError(
            f"Answers in column '{self.teacher.model}' must be label names, label ids 0..{len(self.labels) - 1}, "
            f"{len(self.labels)} probabilities that sum to 1, or None, '' or -1 for no answer; got {value!r} "
            f"in row {row}. The task has {_shorten(self.labels)}; other names can be mapped with `label_map`."
        )


def _reads_text(config: Any, name: str) -> bool:
    """Whether a configuration belongs to a text classifier; by its architecture, else by what its type can be."""
    architectures = config.architectures or []
    for suffix, is_text in (("ForSequenceClassification", True), ("ForImageClassification", False)):
        if any(architecture.endswith(suffix) for architecture in architectures):
            return is_text
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return False
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True
    raise ValueError(
        f"Teacher '{name}' must be a classifier of images or of texts, got a model of type '{config.model_type}'. "
        "Put its answers into a column and use `kind='column'`."
    )


def _check_no_missing(name: str, missing_keys: Iterable[str]) -> None:
    if missing := sorted(missing_keys):
        raise ValueError(
            f"Teacher '{name}' must have all of its weights (never a silently random teacher), got a checkpoint "
            f"without {_shorten(missing, 5)}. Train its classifier first, or name a checkpoint that has one."
        )


def _timm_labels(source: _Source) -> list[str]:
    """Label names in the order of the classifier's outputs."""
    pretrained_cfg = source.config.get("pretrained_cfg") or {}
    names = source.config.get("label_names") or pretrained_cfg.get("label_names")
    num_classes = source.config.get("num_classes", pretrained_cfg.get("num_classes"))
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    if not names or len(names) != num_classes:
        raise ValueError(
            f"'config.json' of teacher '{source.teacher.name}' must tell the names of its {num_classes} labels as "
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


def _feature_matrix(cells: Sequence[Any], feature: Mapping[str, Any]) -> Any:
    """What the classifier reads: `(num_rows, num_features)` float32, or the texts as they are."""
    if feature["kind"] == "text":
        return list(cells)
    if feature["kind"] == "values":
        return np.stack([np.asarray(cell, dtype=np.float32).ravel() for cell in cells])
    images = [to_pil(cell, feature["mode"]) for cell in cells]
    if feature["size"] is not None:
        height, width = feature["size"]
        # PIL names the width first; 2 is its bilinear filter.
        images = [image if image.size == (width, height) else image.resize((width, height), 2) for image in images]
    return np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images]) / feature["divide_by"]


def _check_modality(name: str, cells: Sequence[Any], is_text: bool) -> None:
    if cells and isinstance(cells[0], str) != is_text:
        wanted = "texts" if is_text else "images or vectors"
        raise TypeError(
            f"Teacher '{name}' must be given {wanted}, got {type(cells[0]).__name__}. Name the right column with "
            "`input_column`."
        )


def _fingerprint(facts: Any) -> str:
    """Hash of what decides what a model gets to see, 16 hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


# ── the dataset ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Columns:
    """Which column of the data plays which part."""

    inputs: str | None
    oracle: str | None
    oracle_domain: str | None


def _check_arguments(
    dataset: Any, hierarchy: Any, pool_k: int | None, batch_size: int, output_dir: str | os.PathLike[str] | None
) -> None:
    """Everything that can be refused before any work."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`dataset` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}. Choose one "
            "split, such as `dataset['train']`."
        )
    if not isinstance(hierarchy, TeacherHierarchy):
        raise TypeError(f"`hierarchy` must be a `TeacherHierarchy`, got {type(hierarchy).__name__}.")
    if pool_k is not None and not 1 <= pool_k <= hierarchy.num_labels:
        raise ValueError(f"`pool_k` must lie in 1..{hierarchy.num_labels} (the number of labels), got {pool_k}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if output_dir is not None:
        _check_free(Path(output_dir), "Load the pool with `PseudolabelPool.load`, or choose another folder.")


def _check_free(folder: Path, advice: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' must not exist or be empty, got files there. {advice}")


def _materialise(stream: IterableDataset) -> Dataset:
    """Write a stream to a temporary Arrow file and map it: teachers walk over the data one after another."""
    folder = tempfile.mkdtemp(prefix="cosupervise-stream-")
    path = Path(folder) / "data.arrow"
    with ArrowWriter(path=str(path), features=stream.features, embed_local_files=True) as writer:
        for batch in stream.with_format(None).iter(batch_size=1000):
            writer.write_batch(batch)
        num_examples, _ = writer.finalize()
    dataset = Dataset.from_file(str(path)) if num_examples else Dataset.from_dict({})
    weakref.finalize(dataset.data, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def _check_columns(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    input_column: str | None,
    oracle_column: str | None,
    oracle_domain_column: str | None,
) -> _Columns:
    """Find the input column, and refuse ground truth that nobody declared."""
    answers = {teacher.model: teacher.name for teacher in hierarchy.teachers if teacher.kind == "column"}
    declared = {"`oracle_column`": oracle_column, "`oracle_domain_column`": oracle_domain_column}
    declared |= {f"`model` of teacher '{name}'": column for column, name in answers.items()}
    for what, column in declared.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"{what} must be a column of the data {dataset.column_names}, got {column!r}. Correct the name."
            )
    if oracle_column is not None and oracle_column in answers:
        raise ValueError(
            f"Ground truth must reach no teacher, got column '{oracle_column}' both as `oracle_column` and as "
            f"the answers of teacher '{answers[oracle_column]}'. Leave one of the two out."
        )
    allowed = {*answers, oracle_column, oracle_domain_column, input_column}
    undeclared = [
        name
        for name, feature in dataset.features.items()
        if (name.lower() in _GOLD_NAMES or isinstance(feature, ClassLabel)) and name not in allowed
    ]
    if undeclared:
        raise ValueError(
            f"Data for a pool must hold no undeclared ground truth, got the columns {undeclared}. Keep one for "
            f"analysis with `oracle_column={undeclared[0]!r}`, or drop them with "
            f"`dataset.remove_columns({undeclared})`."
        )
    is_needed = input_column is not None or any(teacher.kind != "column" for teacher in hierarchy.teachers)
    if is_needed or "id" not in dataset.column_names:
        input_column = find_input_column(dataset, input_column)
    return _Columns(input_column, oracle_column, oracle_domain_column)


def _find_ids(dataset: Dataset, input_column: str | None) -> list[int] | list[str]:
    """The ids in the data, or else keys made of the content."""
    if "id" not in dataset.column_names:
        return row_keys(dataset, str(input_column))
    ids = list(dataset["id"])
    wanted = str if isinstance(ids[0], str) else int
    if wrong := [row for row, value in enumerate(ids) if not isinstance(value, wanted) or isinstance(value, bool)]:
        raise ValueError(
            f"Column `id` must hold a string, or else an integer, in every row, got {ids[wrong[0]]!r} in "
            f"row {wrong[0]}. Fill it, or drop the column to have ids made of the content."
        )
    if len(set(ids)) < len(ids):
        [(repeated, count)] = Counter(ids).most_common(1)
        raise ValueError(
            f"Column `id` must be unique, got {repeated!r} {count} times. Renumber it, or drop the column to have ids "
            "made of the content."
        )
    return ids


def _pool_inputs(
    dataset: Dataset, ids: Sequence[int | str], hierarchy: TeacherHierarchy, columns: _Columns, keep_inputs: bool
) -> Dataset | None:
    """What the pool keeps of the data: inputs and metadata, ground truth under its `oracle_` names, and ids."""
    # Answers live on as pseudolabels; a column called `label` among the inputs would be taken for ground truth later.
    dropped = {teacher.model for teacher in hierarchy.teachers if teacher.kind == "column"}
    dropped -= {columns.inputs, columns.oracle_domain}
    if not keep_inputs and columns.inputs is not None:
        dropped.add(columns.inputs)
    inputs = dataset.remove_columns(sorted(dropped & set(dataset.column_names)))
    if columns.oracle is not None:
        gold = _oracle_label_ids(dataset, columns.oracle, hierarchy.labels)
        inputs = inputs.remove_columns(columns.oracle)
        inputs = inputs.add_column(ORACLE_LABEL, gold, feature=ClassLabel(names=list(hierarchy.labels)))
    if columns.oracle_domain is not None:
        domains = ["" if value is None else str(value) for value in _read_names(dataset, columns.oracle_domain)]
        inputs = inputs.remove_columns(columns.oracle_domain)
        inputs = inputs.add_column(ORACLE_DOMAIN, domains, feature=Value("string"))
    if "id" not in inputs.column_names:
        inputs = inputs.add_column("id", list(ids)) if inputs.column_names else Dataset.from_dict({"id": list(ids)})
    return inputs if inputs.column_names != ["id"] else None


def _read_names(dataset: Dataset, column: str, rows: range | None = None) -> list[Any]:
    """A column's values, those of a `ClassLabel` as names: its ids need not be those of the task."""
    values = dataset[column] if rows is None else dataset.select_columns([column])[rows.start : rows.stop][column]
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel):
        return list(values)
    return [None if value is None or value < 0 else feature.int2str(value) for value in values]


def _oracle_label_ids(dataset: Dataset, column: str, labels: Sequence[str]) -> list[int]:
    """Ground truth as label ids of the task, mapped by name where it has names."""
    values = _read_names(dataset, column)
    positions: dict[Any, int | None] = {}
    for value in set(values):
        if isinstance(value, str):
            positions[value] = _find_label(value, labels)
        else:
            positions[value] = value if isinstance(value, int) and 0 <= value < len(labels) else None
    if unknown := [value for value, position in positions.items() if position is None]:
        raise ValueError(
            f"Column '{column}' must hold labels of the task {_shorten(labels)} (or their ids) in every row, got "
            f"{unknown[:5]}, first in row {values.index(unknown[0])}. Rename them or drop these rows."
        )
    return [int(positions[value]) for value in values]  # type: ignore[arg-type]


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _answers(
    model: TeacherModel, dataset: Dataset, rows: range, input_column: str | None, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Batches of one teacher's probabilities, each with the position of its first row."""
    inputs = None if input_column is None else dataset.select_columns([input_column])
    step = batch_size if model.column is None else _CHUNK
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        if model.column is not None:
            yield start, model([], {model.column: _read_names(dataset, model.column, range(start, stop))}, start)
        elif inputs is not None:
            cells = inputs[start:stop][input_column]
            _check_cells(cells, str(input_column), start)
            yield start, model(cells, {}, start)


def _check_cells(cells: Sequence[Any], column: str, first_row: int) -> None:
    for offset, cell in enumerate(cells):
        if cell is None:
            raise ValueError(
                f"Column '{column}' must hold an input in every row, got None in row {first_row + offset}. "
                "Drop that row."
            )


def _check_probs(probs: np.ndarray, name: str, first_row: int) -> None:
    """Refuse what is neither a distribution nor a missing answer, naming the row."""
    sums = probs.sum(axis=1)
    is_valid = np.isfinite(sums) & (probs >= 0).all(axis=1) & ((np.abs(sums - 1) <= SUM_TOLERANCE) | (sums == 0))
    if (wrong := np.flatnonzero(~is_valid)).size:
        row = probs[wrong[0]]
        raise ValueError(
            f"Probabilities of teacher '{name}' must be finite, not negative and sum to 1, got {row[:8].tolist()} "
            f"(sum {row.sum():.4f}) in row {first_row + wrong[0]}. Check the teacher and that row's input."
        )


def _process_shard() -> tuple[int, int]:
    """Number of this process and of all processes that label together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # Joins the others. Without `cpu`, accelerate takes a launch on a machine without GPU for single processes.
        PartialState(cpu=not torch.cuda.is_available())
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gather(encoded: list[tuple[np.ndarray, np.ndarray]], num_processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Label ids and probabilities `(num_examples, k)` of all batches of all processes, in the order of the rows."""
    shares = [encoded]
    if num_processes > 1:
        shares = [[]] * num_processes
        torch.distributed.all_gather_object(shares, encoded)
    label_ids, label_probs = zip(*(batch for share in shares for batch in share), strict=True)
    return np.concatenate(label_ids), np.concatenate(label_probs)
