"""Teachers of scikit-learn: load one, and write one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from ...data.inputs import RowError, to_pil
from ...data.vectors import VECTOR_MODEL
from ...files import check_free, whole_folder, write_json
from .base import Kind, Preparation, TeacherSource, add_up, fingerprint, label_positions

_SKLEARN_FILE = "model.skops"
_FEATURE_KINDS = ("pixels", "values", "text")
# Of an archive, how many times its size what is in it may have, and how many bytes in any case.
_MOST_PACKED, _LEAST_BYTES = 100, 1 << 26


def save_sklearn_teacher(
    model: Any, folder: str | os.PathLike[str], feature: Mapping[str, Any], labels: Sequence[str] | None = None
) -> None:
    """Write a scikit-learn classifier as a teacher: `model.skops` without pickle, and `config.json`.

    `feature` says how a row becomes what the classifier reads: `{"kind": "text"}`, `{"kind": "values"}` of a vector,
    or `{"kind": "pixels", "size": None, "mode": "L", "divide_by": 255.0}` of an image, where `size` is [height, width]
    or the image's own and `mode` "L" or "RGB". `labels` names classes that are positions; else they are the names.
    """
    skops_io = _import_skops()
    _check_predict_proba(model, f"'{folder}'")
    settings = _feature_settings(feature, f"`feature` of '{folder}'")
    _check_num_pixels(model, settings, f"`feature` of '{folder}'")
    config: dict[str, Any] = {"library_name": "sklearn", "feature": settings}
    classes = np.asarray(model.classes_).tolist()
    if labels is not None:
        if unnamed := [value for value in classes if not isinstance(value, int) or not 0 <= value < len(labels)]:
            raise ValueError(
                f"With `labels`, the classes of the model must be positions 0..{len(labels) - 1}, got {unnamed}. "
                "Leave `labels` out if the classes are label names."
            )
        config["id2label"] = {str(value): str(labels[value]) for value in classes}
    elif all(isinstance(value, str) for value in classes):
        config["label_names"] = classes  # whoever has only the folder need not name the task's labels
    folder = Path(folder)
    check_free(folder, "Load the teacher that is there, or choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unfinished:
        skops_io.dump(model, unfinished / _SKLEARN_FILE)
        write_json(unfinished / "config.json", config)


class SklearnTeacher:
    """A scikit-learn classifier kept by skops, which declares how an example becomes its feature vector."""

    column: str | None = None

    def __init__(self, source: TeacherSource, labels: Sequence[str]) -> None:
        skops_io = _import_skops()
        name = source.name
        declared = source.config.get("feature")
        feature = _feature_settings(declared, f"`feature` in 'config.json' of teacher '{name}'")
        source.model_source.fetch()
        path = source.model_source.file(_SKLEARN_FILE)
        try:
            _check_size(path)
            untrusted = set(skops_io.get_untrusted_types(file=path))
        # What skops raises for a file that it has not written.
        except (BadZipFile, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"Teacher '{name}' must have a '{_SKLEARN_FILE}' that skops wrote, got another or a damaged file: "
                f"{error}. Save it again by `save_sklearn_teacher`."
            ) from error
        if refused := sorted(untrusted - set(source.teacher.trusted_types)):
            raise ValueError(
                f"Teacher '{name}' must hold types that skops or you trust, got {refused}. If you trust its origin, "
                "name them in `trusted_types` (on a command line `--teacher_trusted_types`)."
            )
        # All of them were looked at above.
        self.model = skops_io.load(path, trusted=sorted(untrusted))
        _check_predict_proba(self.model, f"teacher '{name}'")
        if _opens_files(self.model):
            raise ValueError(
                f"Teacher '{name}' must read the texts that it is given, got a vectoriser that opens them as names of "
                "files. Save it with `input='content'`."
            )
        _check_num_pixels(self.model, feature, f"`feature` in 'config.json' of teacher '{name}'")
        # Of a student of vectors the classes are label names, among which "0" is no position.
        is_named = source.config.get("model_type") == VECTOR_MODEL
        id2label = {} if is_named else source.config.get("id2label") or {}
        classes = [str(value) for value in np.asarray(self.model.classes_).tolist()]
        own_labels = [str(id2label.get(value, value)) for value in classes]
        self.positions, self.num_labels = label_positions(source.teacher, own_labels, labels), len(labels)
        matrix = partial(_feature_matrix, feature=feature, model_needs=_needs(self.model))
        self.prepare = Preparation(name, feature["kind"] == "text", matrix)
        self.facts = source.facts("sklearn", type(self.model).__name__, fingerprint(feature))

    def __call__(self, inputs: Any) -> np.ndarray:
        return add_up(np.asarray(self.model.predict_proba(inputs)), self.positions, self.num_labels)


def _import_skops() -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise ImportError(
            'Teachers of scikit-learn are kept by skops: `pip install "hf_cosupervise[sklearn]"`.'
        ) from error
    return skops.io


def _check_size(path: Path) -> None:
    with ZipFile(path) as archive:
        num_bytes = sum(item.file_size for item in archive.infolist())
    if num_bytes > max(_LEAST_BYTES, _MOST_PACKED * path.stat().st_size):
        raise ValueError(f"{num_bytes:,} bytes packed into {path.stat().st_size:,}")


def _opens_files(model: Any) -> bool:
    """Tell whether some part of a classifier takes a text for the name of a file, which it opens."""
    waiting, seen = [model], set[int]()
    # Through lists, dictionaries and attributes: what was fitted is a parameter of nothing.
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, np.ndarray):
            waiting += part.ravel().tolist() if part.dtype == object else []
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif hasattr(part, "__dict__") and not isinstance(part, type):
            reads = vars(part).get("input")
            if isinstance(reads, str) and reads != "content" and hasattr(part, "decode_error"):
                return True
            waiting += vars(part).values()
    return False


def _check_predict_proba(model: Any, name: str) -> None:
    if not hasattr(model, "predict_proba") or np.ndim(getattr(model, "classes_", 0)) != 1:
        raise TypeError(
            f"A scikit-learn teacher must be a fitted classifier with `predict_proba`, got {type(model).__name__} for "
            f"{name}. Wrap it in `CalibratedClassifierCV`, or fit it first."
        )


# ── what a classifier reads of a row ────────────────────────────────────────────────────────────────────────────────


def _feature_settings(feature: Any, what: str) -> dict[str, Any]:
    """The checked declaration of how an example becomes a feature vector, with its defaults filled in."""
    if not isinstance(feature, Mapping) or feature.get("kind") not in _FEATURE_KINDS:
        raise ValueError(
            f"{what} must be a mapping whose `kind` is one of {list(_FEATURE_KINDS)}, got {feature!r}. "
            "Declare how an example becomes the classifier's feature vector, an image by 'pixels'."
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
    # Texts and vectors are read as they are.
    if settings["kind"] != "pixels":
        return settings
    size = settings["size"]
    if size is not None and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(f"{what} must have a `size` of [height, width] in pixels or None, got {size!r}.")
    # Written so that NaN is refused too.
    if settings["mode"] not in ("L", "RGB") or not settings["divide_by"] > 0:
        raise ValueError(
            f"{what} must have a `mode` of 'L' or 'RGB' and a positive `divide_by`, got {settings['mode']!r} and "
            f"{settings['divide_by']!r}."
        )
    return settings | {"size": None if size is None else list(size), "divide_by": float(settings["divide_by"])}


def _check_num_pixels(model: Any, feature: Mapping[str, Any], what: str) -> None:
    """Refuse a size or mode of images that the classifier cannot have been fitted on: no row would do."""
    needed, _ = _needs(model)
    if feature["kind"] != "pixels" or feature["size"] is None or needed is None:
        return
    height, width = feature["size"]
    if (found := height * width * len(feature["mode"])) != needed:
        raise ValueError(
            f"{what} must give the {needed} numbers that the classifier was fitted on, got {found}: `size` "
            f"{[height, width]} in `mode` '{feature['mode']}'. Name those that it was fitted with; 'RGB' is three "
            "numbers a pixel."
        )


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


KIND = Kind(
    load=lambda source, labels, device: SklearnTeacher(source, labels),
    # The tools of skops for the Hub write `sklearn`, ours `library_name`.
    recognizes=lambda source, model: (
        any(source.folder.glob("*.skops"))
        or "sklearn" in (source.config.get("library_name"), *source.config)
        or source.config.get("model_type") == VECTOR_MODEL
    ),
)
