"""All label models by name, and how a saved one is read."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..files import load_json
from .dawid_skene import DawidSkene
from .ebcc import Ebcc
from .glad import Glad
from .label_model import LabelModel, SharedMajority
from .mace import Mace

# Posteriors take memory for each label, and votes for each voter.
_MOST = 1_000_000
_WRONG = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)

LABEL_MODELS: dict[str, type[LabelModel]] = {
    model.name: model for model in (SharedMajority, DawidSkene, Glad, Mace, Ebcc)
}


def make_label_model(name: str, **settings: Any) -> LabelModel:
    """Make a label model by its name.

    Args:
        name (`str`):
            `"shared_majority"`, `"dawid_skene"`, `"glad"`, `"mace"` or `"ebcc"`.
        settings (`Any`):
            Of that model.

    Raises:
        ValueError: If there is no model of that name, or a setting is not usable.

    Examples:
        >>> make_label_model("ebcc", num_restarts=4).num_restarts
        4
    """
    if name not in LABEL_MODELS:
        raise ValueError(f"Unknown label model {name!r}. Choose one of {', '.join(LABEL_MODELS)}.")
    known = [field.name for field in fields(LABEL_MODELS[name])]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"`{name}` has the settings {known}, got {unknown}. Correct their names.")
    return LABEL_MODELS[name](**settings)


def load_label_model(path: str | os.PathLike[str]) -> LabelModel:
    """Read a label model that `save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no label model.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     SharedMajority().fit([[0, 1]]).save(f"{folder}/model.json")
        ...     load_label_model(f"{folder}/model.json").predict_proba([[1, -1]]).tolist()
        [[0.0, 1.0]]
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no label model '{path}'. Write one by `save`.")
    try:
        facts = load_json(Path(path))
    except ValueError as error:
        raise ValueError(f"'{path}' must be a label model as JSON, got: {error}. Save it again.") from error
    name = facts.get("model") if isinstance(facts, dict) else None
    if name not in LABEL_MODELS:
        raise ValueError(f"'{path}' must be one of the label models {', '.join(LABEL_MODELS)}, got {name!r}.")
    try:
        _check_numbers(facts)
        model = LABEL_MODELS[name].from_dict(facts)
        _try_out(model)
    except _WRONG as error:
        found = str(error).removesuffix(" Save it again.").rstrip(".")
        raise ValueError(f"'{path}' must be a label model as `save` wrote it, got: {found}. Save it again.") from error
    return model


def _check_numbers(facts: dict[str, Any]) -> None:
    """See that a model's labels and voters are numbered as a fit numbers them."""
    for count, places in (("num_labels", "named"), ("num_voters", "speakers")):
        most, found = facts.get(count), facts.get(places)
        # By type: `true` of JSON would pass for an integer in Python.
        if type(most) is not int or not 0 <= most <= _MOST:
            raise ValueError(f"{str(most)[:80]} as `{count}`, which must be an integer in 0..{_MOST}")
        numbers = found if isinstance(found, list) else [found]
        if not all(type(place) is int and 0 <= place < most for place in numbers) or found != sorted(set(numbers)):
            raise ValueError(f"`{places}` that are not different integers below `{count}`, the least first")
    names = facts.get("voter_names")
    if names is not None and (not isinstance(names, list) or len(names) != facts["num_voters"]):
        raise ValueError("`voter_names` that are not one for each of `num_voters`")


def _try_out(model: LabelModel) -> None:
    """Ask a model about its first and its last label: its parameters must fit its labels and voters."""
    if not len(model.named):
        return
    votes = np.full((2, model.num_voters), -1)
    votes[:, model.speakers] = model.named[[0, -1], None]
    sums = model.predict_proba(votes).sum(axis=1)
    if not np.allclose(sums, 1):
        raise ValueError(f"parameters by which probabilities of a row sum to {sums[0]:g}")
