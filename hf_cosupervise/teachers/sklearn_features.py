"""What a classifier of scikit-learn reads of a row: declared beside it, checked, and made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.inputs import RowError, to_pil

_FEATURE_KINDS = ("pixels", "values", "text")


def feature_settings(feature: Any, what: str) -> dict[str, Any]:
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


def check_num_pixels(model: Any, feature: Mapping[str, Any], what: str) -> None:
    """Refuse a size or mode of images that the classifier cannot have been fitted on: no row would do."""
    needed, _ = needs(model)
    if feature["kind"] != "pixels" or feature["size"] is None or needed is None:
        return
    height, width = feature["size"]
    if (found := height * width * len(feature["mode"])) != needed:
        raise ValueError(
            f"{what} must give the {needed} numbers that the classifier was fitted on, got {found}: `size` "
            f"{[height, width]} in `mode` '{feature['mode']}'. Name those that it was fitted with; 'RGB' is three "
            "numbers a pixel."
        )


def needs(model: Any) -> tuple[int | None, bool]:
    """How many features a classifier was fitted on, and whether they must be finite; as far as it tells."""
    tags = getattr(model, "__sklearn_tags__", None)  # from scikit-learn 1.6 on
    return getattr(model, "n_features_in_", None), tags is not None and not tags().input_tags.allow_nan


def feature_matrix(cells: Sequence[Any], feature: Mapping[str, Any], model_needs: tuple[int | None, bool]) -> Any:
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
