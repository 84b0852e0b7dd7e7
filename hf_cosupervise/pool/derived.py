"""Pools made of pools: several teachers as one, teachers made as sure as they are right, teachers smoothed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..hierarchy import Teacher, TeacherHierarchy
from ..method.aggregation import (
    AGGREGATORS,
    ROW_AGGREGATORS,
    VOTE_AGGREGATORS,
    Aggregator,
    aggregate,
    majority_vote,
)
from ..method.calibration import MIN_EXAMPLES, apply_temperature, fit_temperature
from ..method.crowdlab import crowdlab, crowdlab_labels
from ..method.linear_head import fit_ridge_head, gram_matrix, linear_logits
from ..method.neighbors import check_neighbors
from ..method.raven import fit_raven, unanimous
from ..method.weighting import boosting_weights, weighted_mean_probs, weighted_vote
from ..processes import row_chunks
from .files import teacher_dataset
from .pseudolabels import PseudolabelPool
from .top_k import default_pool_k, dropped_mass, encode_top_k, scale_top_k

_FOLDS = 5
_RIDGE_ALPHA, _LOGIT_SCALE = 0.01, 10.0


# ── all teachers as one ─────────────────────────────────────────────────────────────────────────────────────────────


def single_teacher_pool(
    pool: PseudolabelPool, name: str, probs: np.ndarray | Callable[[slice], np.ndarray]
) -> PseudolabelPool:
    """Give the examples of a pool with pseudolabels of one's own, or with what a function makes of some rows."""
    hierarchy = TeacherHierarchy(pool.labels, [Teacher(name, kind="column")])
    # An array is indexed by the same slices that a function is called with.
    label_ids, label_probs, dropped = _encode(probs if callable(probs) else probs.__getitem__, pool, name)
    teachers, facts = {name: teacher_dataset(pool.ids, label_ids, label_probs)}, {name: {"dropped_mass": dropped}}
    return PseudolabelPool(hierarchy, teachers, pool.inputs, facts, pool.source, input_column=pool.input_column)


def aggregated_pool(
    pool: PseudolabelPool,
    method: str | Aggregator,
    name: str | None = None,
    *,
    features: torch.Tensor | None = None,
) -> PseudolabelPool:
    """Make one pseudolabel per example of all teachers, whatever their levels.

    Args:
        pool (`PseudolabelPool`):
            All teachers.
        method (`str` or `Callable`):
            A name of [`AGGREGATORS`], or a function of your own from `teacher_probs` `(num_examples, num_teachers,
            num_labels)` and `answered` `(num_examples, num_teachers)` to probabilities `(num_examples, num_labels)`.
            `"raven"`: [`fit_raven`] on the features (with a warning and no easy start where teachers never agree), and
            the teachers' mean under its weights. `"crowdlab"`:
            [`crowdlab`] with a ridge head on the features, fitted on the majority vote of four fifths of the examples
            for each fifth; the most probable label is that of [`crowdlab_labels`].
        name (`str`, *optional*):
            What the one teacher is called. Defaults to the method's name.
        features (`torch.Tensor` of shape `(num_examples, feature_size)`, *optional*):
            What a frozen backbone makes of the examples, for `"raven"` and `"crowdlab"`, as from
            `CoSupervisedTrainer.pool_features`.

    Returns:
        `PseudolabelPool`: of one teacher; what nobody answered stays missing.

    Raises:
        ImportError: If the method needs a package that is not installed.
        ValueError: If the method is not known, features are missing, too few teachers answered for it (three for
            `"dawid_skene"`, `"glad"`, `"mace"` and `"ebcc"`, two on one example for `"crowdlab"`), or what it gives is
            not a pseudolabel per example.
    """
    known = method if isinstance(method, str) else None
    if known is not None and known not in (names := [*AGGREGATORS, *FEATURE_AGGREGATORS]):
        raise ValueError(f"Unknown `method` '{method}'. Choose one of {', '.join(names)}, or give a function.")
    title = str(name or known or getattr(method, "__name__", "aggregated")).replace("_", "-")
    everybody, num_labels = range(len(pool.hierarchy.teachers)), pool.hierarchy.num_labels
    if known in ROW_AGGREGATORS:  # not all probabilities of all teachers at once
        return single_teacher_pool(
            pool, title, lambda rows: aggregate(*pool.decode_level(everybody, rows), method).numpy()
        )
    if known in VOTE_AGGREGATORS:
        votes = torch.from_numpy(pool_votes(pool))
        if known == "majority_vote":  # the only one that looks at each row alone
            return single_teacher_pool(pool, title, lambda rows: majority_vote(votes[rows], num_labels).numpy())
        # These fit something on all rows together, but on labels alone: no probabilities are decoded for them.
        found = VOTE_AGGREGATORS[known](votes, num_labels)
    elif known in FEATURE_AGGREGATORS:
        found = FEATURE_AGGREGATORS[known](pool, _check_features(features, len(pool), known))
    else:  # a function of one's own may look across rows: it gets all at once
        found = aggregate(*pool.decode_level(everybody, slice(None)), method)
    return single_teacher_pool(pool, title, found.cpu().numpy())


def pool_votes(pool: PseudolabelPool, names: Sequence[str] | None = None) -> np.ndarray:
    """Give the most probable label of every teacher, or of those by these names, `(num_examples, num_teachers)`."""
    return np.stack([pool.hard_labels(name) for name in names or pool.hierarchy.names], axis=1)


def _check_features(features: torch.Tensor | None, num_examples: int, method: str) -> torch.Tensor:
    if features is None:
        raise ValueError(
            f"'{method}' needs `features` of the {num_examples} examples, got none. Give what a frozen backbone makes "
            "of them, such as `trainer.pool_features()`."
        )
    if features.ndim != 2 or len(features) != num_examples or not bool(features.isfinite().all()):
        raise ValueError(
            f"'{method}' needs finite `features` of shape ({num_examples}, feature_size), got "
            f"{tuple(features.shape)}. Compute them for the rows of the pool, in their order."
        )
    return features


def _raven_probs(pool: PseudolabelPool, features: torch.Tensor) -> torch.Tensor:
    decoded = pool.decode_level(range(len(pool.hierarchy.teachers)), slice(None))
    teacher_probs, answered = (values.to(features.device) for values in decoded)
    if bool((unanimous(teacher_probs, answered) & answered.any(dim=1)).any()):
        fit = fit_raven(features, teacher_probs, answered)
    # The easy start trains on examples with one voice, and none would be a mean over nothing.
    else:  # specialists that each know labels of their own never agree
        warnings.warn("There is no example on which all teachers agree: 'raven' does without its easy start.")
        fit = fit_raven(features, teacher_probs, answered, easy_epochs=0)
    # Only the weights are kept: the pool is to hold what teachers say, not what RAVEN's own student predicts.
    return weighted_mean_probs(teacher_probs, answered, fit.teacher_weights)


def _crowdlab_probs(pool: PseudolabelPool, features: torch.Tensor) -> torch.Tensor:
    # CROWDLAB is defined on labels of annotators, so that probabilities enter by the student alone: none are decoded.
    labels = torch.from_numpy(pool_votes(pool)).to(features.device)
    student_probs = _cross_fitted_probs(features, majority_vote(labels, pool.hierarchy.num_labels))
    posteriors, consensus = crowdlab(labels, student_probs), crowdlab_labels(labels, student_probs).clamp(min=0)
    # the label of an example is the consensus: where another one is more probable, the two change places
    rows, best = torch.arange(len(posteriors), device=posteriors.device), posteriors.argmax(dim=1)
    swapped = posteriors.clone()
    swapped[rows, best], swapped[rows, consensus] = posteriors[rows, consensus], posteriors[rows, best]
    return swapped


def _cross_fitted_probs(features: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
    """Predict each fifth of the examples by a ridge head on the votes of the others, `(num_examples, num_labels)`."""
    rows = torch.arange(len(votes), device=votes.device)
    has_vote = votes.sum(dim=1) > 0
    logits = torch.zeros_like(votes)
    gram = gram_matrix(features, rows[has_vote])
    # Ridge overwrites all of it; an ordinary layer would draw random numbers and move everybody's training.
    head = nn.utils.skip_init(nn.Linear, features.shape[1], votes.shape[1], device=features.device)
    for fold in range(_FOLDS):
        # By position, not at random: the same pool gives the same labels, and no random number is used up.
        inside = rows % _FOLDS == fold
        others = rows[has_vote & ~inside]
        # Some folds of a few examples are empty, and without a vote there is nothing to fit: all stays even.
        if not bool(inside.any()) or not bool(has_vote.any()):
            continue
        if not len(others):
            raise ValueError(
                f"'crowdlab' needs answered examples in two of {_FOLDS} folds, got {int(has_vote.sum())} in one. Use "
                "'majority_vote', or label more."
            )
        fit_ridge_head(
            head,
            features,
            others,
            votes.__getitem__,
            # What all give less what the fold gives: the large product over features is done once, not per fold.
            gram - gram_matrix(features, rows[has_vote & inside]),
            alpha=_RIDGE_ALPHA,
            logit_scale=_LOGIT_SCALE,
        )
        logits[inside] = linear_logits(head, features[inside])
    return logits.softmax(dim=1)


# By name: from a pool and features `(num_examples, feature_size)` to pseudolabels `(num_examples, num_labels)`.
FEATURE_AGGREGATORS: dict[str, Callable[[PseudolabelPool, torch.Tensor], torch.Tensor]] = {
    "raven": _raven_probs,
    "crowdlab": _crowdlab_probs,
}


# ── what a few labelled examples tell ───────────────────────────────────────────────────────────────────────────────


def _oracle_labels(pool: PseudolabelPool, labelled_pool: PseudolabelPool) -> np.ndarray:
    """Ground truth of labelled examples that all teachers of a pool were asked about."""
    if labelled_pool.labels != pool.labels:
        raise ValueError(
            f"`labelled_pool` must have the pool's labels {list(pool.labels)}, got {list(labelled_pool.labels)}."
        )
    if missing := [name for name in pool.hierarchy.names if name not in labelled_pool.hierarchy.names]:
        raise ValueError(
            f"`labelled_pool` must hold the pool's teachers {list(pool.hierarchy.names)}, got none of {missing}. "
            "Build it with the same hierarchy."
        )
    if labelled_pool.oracle_labels is None:
        raise ValueError(
            "`labelled_pool` must have ground truth, got no `oracle_label`. Build it with `oracle_column`."
        )
    return labelled_pool.oracle_labels


def boosted_pool(pool: PseudolabelPool, labelled_pool: PseudolabelPool) -> PseudolabelPool:
    """Make one pseudolabel per example of all teachers, weighted by how right they are on labelled examples.

    Args:
        pool (`PseudolabelPool`):
            All teachers.
        labelled_pool (`PseudolabelPool`):
            The same teachers on other examples, at least 10, with `oracle_label`.

    Returns:
        `PseudolabelPool`: of one teacher, `boosting`: shares of the vote under [`boosting_weights`]. Missing where
        only teachers of weight 0 answered.

    Raises:
        ValueError: If the labelled pool lacks teachers, ground truth or examples, or no teacher is better than chance
            on it.
    """
    # Ground truth of other examples: that of the pool itself stays for evaluation.
    truth = torch.from_numpy(_oracle_labels(pool, labelled_pool))
    names, num_labels = pool.hierarchy.names, pool.hierarchy.num_labels
    weights = boosting_weights(torch.from_numpy(pool_votes(labelled_pool, names)), truth, num_labels)
    votes = weighted_vote(torch.from_numpy(pool_votes(pool)), weights, num_labels)
    return single_teacher_pool(pool, "boosting", votes.numpy())


def fit_temperatures(pool: PseudolabelPool, labelled_pool: PseudolabelPool) -> dict[str, float]:
    """Find how sure each teacher should be, from labelled examples."""
    truth = _oracle_labels(pool, labelled_pool)
    temperatures = {}
    for teacher in pool.hierarchy.teachers:
        rows = np.flatnonzero(labelled_pool.answered(teacher.name))
        where = "that it answered"
        # Of labels outside its scope a specialist is wrong by construction: they would make its temperature, and so
        # every answer, far too unsure.
        if teacher.scope is not None:
            rows = rows[np.isin(truth[rows], [pool.labels.index(label) for label in teacher.scope])]
            where += " with a label of its scope"
        if len(rows) < MIN_EXAMPLES:
            raise ValueError(
                f"Calibration of teacher '{teacher.name}' needs {MIN_EXAMPLES} labelled examples {where}, got "
                f"{len(rows)} of {len(truth)}. Label more, or leave the teacher out of the pool that is calibrated."
            )
        probs = torch.from_numpy(labelled_pool.decode(teacher.name, rows))
        temperatures[teacher.name] = fit_temperature(probs, torch.from_numpy(truth[rows]))
    return temperatures


def calibrated_pool(pool: PseudolabelPool, labelled_pool: PseudolabelPool) -> PseudolabelPool:
    """Make every teacher as sure as it is right, so that they can be compared and mixed.

    A teacher's most probable label stays, but where rounding to half precision makes two of them equal.

    Args:
        pool (`PseudolabelPool`):
            The teachers.
        labelled_pool (`PseudolabelPool`):
            See [`fit_temperatures`].

    Returns:
        `PseudolabelPool`: of the same hierarchy, under the temperatures of [`fit_temperatures`], which are in `facts`
        too.

    Raises:
        ValueError: As [`fit_temperatures`].

    Source:
        Guo et al. 2017 for each teacher; the scope is ours.
    """
    temperatures = fit_temperatures(pool, labelled_pool)

    def tempered(name: str, rows: slice) -> np.ndarray:
        return apply_temperature(torch.from_numpy(pool.decode(name, rows)), temperatures[name]).numpy()

    return _rewritten_pool(pool, tempered, {name: {"temperature": value} for name, value in temperatures.items()})


# ── what neighbours say ─────────────────────────────────────────────────────────────────────────────────────────────


def smoothed_pool(pool: PseudolabelPool, neighbors: torch.Tensor) -> PseudolabelPool:
    """Average what each teacher says about an example and about those next to it.

    Args:
        pool (`PseudolabelPool`):
            The teachers.
        neighbors (`torch.LongTensor` of shape `(num_examples, k)`):
            Rows of the pool, as from [`nearest_neighbors`]. Those that the teacher did not answer do not count.

    Returns:
        `PseudolabelPool`: of the same hierarchy; what a teacher did not answer stays missing.

    Raises:
        ValueError: If `neighbors` are not rows of the pool for each of its examples.

    Source:
        Ours, measured in `recipes/README.md`.
    """
    check_neighbors(neighbors, len(pool))
    # Each example counts itself too; first, because `_mean_rows` asks the first column who answered.
    own = torch.arange(len(pool))[:, None]
    near = torch.cat([own, neighbors.cpu().long()], dim=1).numpy()

    def averaged(name: str, rows: slice) -> np.ndarray:
        return _mean_rows(pool, name, near[rows])

    return _rewritten_pool(
        pool, averaged, {name: {"smoothed_over": neighbors.shape[1]} for name in pool.hierarchy.names}
    )


def _mean_rows(pool: PseudolabelPool, name: str, near: np.ndarray) -> np.ndarray:
    """Mean of a teacher's answers over the rows `(num_rows, k + 1)` of each example; zero where the first has none."""
    num_labels, (num_rows, width) = pool.hierarchy.num_labels, near.shape
    # `(num_rows * width, k)` and `(num_rows * width,)`: never `width` dense rows for each example.
    probs, rest_probs = scale_top_k(pool.label_probs(name)[near.reshape(-1)], num_labels)
    rest, shape = torch.from_numpy(rest_probs), (num_rows, width * probs.shape[1])
    excess = (torch.from_numpy(probs) - rest[:, None]).reshape(shape)
    label_ids = torch.from_numpy(pool.label_ids(name)[near.reshape(-1)].astype(np.int64)).reshape(shape)
    # Labels that a row leaves out all have its rest, so that no row is spread over all labels by itself.
    total = rest.reshape(num_rows, width).sum(dim=1, keepdim=True).repeat(1, num_labels)
    total.scatter_add_(1, label_ids, excess).clamp_(min=0)  # rounding may leave less than nothing
    # Neighbours never speak for a teacher that had no answer: a specialist stays silent outside of what it saw.
    total *= torch.from_numpy(pool.answered(name, near[:, 0]))[:, None]
    return functional.normalize(total, p=1, dim=1).numpy()


def _rewritten_pool(
    pool: PseudolabelPool, rewrite: Callable[[str, slice], np.ndarray], facts: dict[str, dict[str, Any]]
) -> PseudolabelPool:
    """The same teachers with other probabilities, from name and rows to `(num_rows, num_labels)`, and more facts."""
    # A copy: facts of the pool that this one is made of must not tell of temperatures that it has not.
    teachers, known = {}, dict(pool.facts)
    for name in pool.hierarchy.names:
        # As many labels as before, so that a calibrated or smoothed pool can be read as its original is.
        k = pool.label_ids(name).shape[1]
        label_ids, label_probs, dropped = _encode(partial(rewrite, name), pool, name, k)
        teachers[name] = teacher_dataset(pool.ids, label_ids, label_probs)
        known[name] = {**known.get(name, {}), "dropped_mass": dropped, **facts[name]}
    return PseudolabelPool(pool.hierarchy, teachers, pool.inputs, known, pool.source, input_column=pool.input_column)


def _encode(
    make: Callable[[slice], np.ndarray], pool: PseudolabelPool, name: str, k: int | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Keep the most probable labels of all rows of a pool, never all of the probabilities; and what an answer lost."""
    k, dropped, pieces = k or default_pool_k(pool.hierarchy.num_labels), 0.0, []
    # At least one piece, if an empty one, so that a pool of no rows keeps its types and its k.
    for rows in row_chunks(len(pool)) or [slice(0, 0)]:
        probs = make(rows)
        # A chunk dense, then k of each row: at 1,000 labels and 16 kept a sixtieth stays.
        pieces.append(encode_top_k(probs, k, f"'{name}'"))
        dropped += dropped_mass(probs, pieces[-1][0])
    label_ids, label_probs = (np.concatenate(parts) for parts in zip(*pieces))
    return label_ids, label_probs, dropped / max(int((label_probs[:, 0] > 0).sum()), 1)
