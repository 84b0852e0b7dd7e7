"""Self-training: which rows that the teachers left out a student may label itself, and when it should stop."""

from __future__ import annotations

import math

import torch

from .rejection import select_by_loss_rank

# Labels of rows left out that must change from round to round for another one to be worth its time, as a share.
MIN_CHANGE = 0.005
# How much less of the rows left out the second opinions may agree on than in the best round so far.
MAX_DROP = 0.02


def growing_share(round: int, num_rounds: int) -> float:
    """Give the share of the rows left out that a round (from 0) takes: from half of them, evenly, to all in the last.

    Examples:
        >>> [growing_share(round, 3) for round in range(3)], growing_share(0, 1)
        ([0.5, 0.75, 1.0], 1.0)
    """
    return 0.5 + 0.5 * round / (num_rounds - 1) if num_rounds > 1 else 1.0


def select_surest(
    entropy: torch.Tensor, labels: torch.Tensor, candidates: torch.Tensor, share: float, num_labels: int
) -> torch.Tensor:
    """Choose of each label's candidates those that the student is surest of, and of no label more than its fair part.

    Of m candidates, of which m_c have label c, the ceil(share * min(m_c, m / num_labels)) of lowest entropy are taken,
    with a share from 0 to 1: a label that the student gives too readily does not crowd out the others, round after
    round. Takes [`rejection.student_entropy`], the student's most probable labels and booleans, `(num_examples,)` all,
    and gives booleans; a `ValueError` if something is out of range.
    Source: Yu et al., NAACL 2021 (COSINE), choose by confidence too, with a threshold; parts by label are ours.

    Examples:
        >>> entropy, labels = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 0, 1])
        >>> select_surest(entropy, labels, torch.ones(4, dtype=torch.bool), share=1.0, num_labels=2).tolist()
        [True, True, False, True]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must lie in 0..1, got {share!r}. Use 1 for each label's fair part.")
    if not entropy.shape == labels.shape == candidates.shape or entropy.ndim != 1:
        found = [tuple(values.shape) for values in (entropy, labels, candidates)]
        raise ValueError(
            f"`entropy`, `labels` and `candidates` must have one shape (num_examples,), got {found}. Give all for the "
            "same examples."
        )
    chosen, fair = torch.zeros_like(candidates), int(candidates.sum()) / num_labels
    for label in labels[candidates].unique().tolist():
        own = candidates & (labels == label)
        chosen |= select_by_loss_rank(entropy, math.ceil(share * min(int(own.sum()), fair)), own)
    return chosen


def why_stop(agreement: float | None, best_agreement: float | None, change: float | None) -> str | None:
    """Tell in words why a student should label no more rows itself, if it should not.

    Of the rows left out, shares from 0 to 1: those that second opinions label as the student does, the highest of the
    rounds before, and those that the student labels otherwise than a round ago. Labels that stay the same teach
    nothing new; opinions that part tell of errors that feed themselves.
    Source: ours.

    Examples:
        >>> why_stop(0.9, 0.91, 0.1), why_stop(0.8, 0.91, 0.1), why_stop(None, None, 0.001)
        (None, 'agreement fell from 91.0 to 80.0 %', 'only 0.1 % of the labels changed')
    """
    if change is not None and change < MIN_CHANGE:
        return f"only {100 * change:.1f} % of the labels changed"
    if agreement is not None and best_agreement is not None and agreement < best_agreement - MAX_DROP:
        return f"agreement fell from {100 * best_agreement:.1f} to {100 * agreement:.1f} %"
    return None
