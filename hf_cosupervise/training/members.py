"""What a committee is made of: how each of its members is trained, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NEIGHBORS = {"assignment": ["agreement"], "agreement_neighbors": 10}
_STEPS = {"standardize_features": True}


@dataclass(frozen=True)
class Member:
    """One way to train a student."""

    arguments: Mapping[str, Any] = field(default_factory=dict)  # which differ from the committee's own
    # Makes one pseudolabel of what all teachers say, see [`aggregated_pool`]; without, it goes down the hierarchy.
    aggregator: str | None = None


# The names of what a committee can be made of; the default was found on the development tasks of recipes/README.md.
MEMBERS: Mapping[str, Member] = {
    "csl": Member(_STEPS),
    "csl_ridge": Member({"head_solver": "ridge"}),
    "neighbors": Member({**_NEIGHBORS, **_STEPS}),
    "neighbors_ridge": Member({**_NEIGHBORS, "head_solver": "ridge"}),
    "neighbors_reverse_kl": Member({**_NEIGHBORS, **_STEPS, "loss": "reverse_kl"}),
    "neighbors_elr": Member({**_NEIGHBORS, **_STEPS, "loss": "early_learning_regularization"}),
    "ensemble": Member(_STEPS, "mean_probs"),
    "ensemble_ridge": Member({"head_solver": "ridge"}, "mean_probs"),
    "mean_logits": Member(_STEPS, "mean_logits"),
    "mean_logits_ridge": Member({"head_solver": "ridge"}, "mean_logits"),
}
# Losses that doubt their pseudolabels, by steps, beside closed forms, which cost little; and averages of all teachers,
# for those that all know everything.
DEFAULT_MEMBERS = (
    "csl_ridge",
    "neighbors_ridge",
    "neighbors_reverse_kl",
    "neighbors_elr",
    "ensemble_ridge",
    "mean_logits_ridge",
)
# What members decide; it is not chosen for all of them.
DECIDED_BY_MEMBERS = (
    *("assignment", "agreement_neighbors", "loss", "loss_kwargs", "head_solver", "standardize_features"),
    *("warm_start", "weight_column", "cross_fit_folds"),
)
