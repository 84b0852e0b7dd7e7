"""How strong a ridge penalty is right: found by leave-one-out on the pseudolabels, all penalties at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .assignment import first_argmax

RIDGE_ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Rows that are left out in turn: the mean over more of them would not tell more.
MAX_LEFT_OUT = 4096
# Scores that differ by less are equal, or the order of the rows would decide.
_TIE = 1e-9


def draw_left_out(rows: torch.Tensor, seed: int, max_rows: int = MAX_LEFT_OUT) -> torch.Tensor:
    """Draw the rows that are left out in turn, in their order; all of them where they are few."""
    if len(rows) <= max_rows:
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:max_rows]
    return rows[drawn.sort().values.to(rows.device)]


class LeftOutRows(NamedTuple):
    """What of a search hangs on the rows alone, and not on their pseudolabels."""

    values: torch.Tensor  # eigenvalues of X^T X of all centred inputs: (feature_size,)
    vectors: torch.Tensor  # its eigenvectors: (feature_size, feature_size)
    # The centred rows that are left out in turn, in their directions: (num_left_out, feature_size).
    turned: torch.Tensor


@torch.no_grad()
def left_out_predictions(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    gram: torch.Tensor,
    cross: torch.Tensor,
    alphas: Sequence[float] = RIDGE_ALPHAS,
    *,
    bias: bool = True,
    once: Callable[[Callable[[], LeftOutRows]], LeftOutRows] = lambda make: make(),
) -> torch.Tensor:
    """Predict rows by the ridge regressions of all other rows, without fitting any of them.

    With A = X^T X of the centred inputs, lambda the penalty of [`fit_ridge_head`] for all n rows (of which a single
    row is too small a part to change it), r_i the residual of the fit to all rows and

        h_i = 1 / n + x_i^T (A + lambda I)^-1 x_i,

    the residual of the fit without row i is r_i / (1 - h_i), exactly. One eigendecomposition of A gives (A + lambda
    I)^-1 for every lambda. `inputs` `(num_left_out, feature_size)` and `targets` `(num_left_out, num_labels)` are of
    rows to predict, `gram` and `cross` sums of z z^T and z y^T over *all* rows of the training set, with z an input
    and a 1 appended; all is computed in the type of the inputs: in float64 to 1e-8, in float32 fast. Who asks of the
    same rows with other pseudolabels gives by `once` what was made of them. Gives `(num_alphas, num_left_out,
    num_labels)`, not scaled to logits.
    Source: Allen's PRESS, 1974; which rows are left out of how large a fit is ours.

    Examples:
        >>> x, y = torch.tensor([[-1.0], [0.0], [1.0]]).double(), torch.tensor([[0.0], [0.0], [1.0]]).double()
        >>> z = torch.cat([x, torch.ones_like(x)], dim=1)
        >>> found = left_out_predictions(x, y, z.T @ z, z.T @ y, [0.5])  # lambda 1
        >>> [abs(round(value, 6)) for value in found.flatten().tolist()]
        [0.0, 0.5, 0.0]
    """
    size, num_labels = inputs.shape[-1], targets.shape[-1]
    dtype, total = inputs.dtype, gram[size, size]
    second, products = gram[:size, :size], cross[:size]
    least = 1e-6 * second.diagonal().mean() + 1e-12  # as in `fit_ridge_head`
    mean, label_mean = torch.zeros_like(inputs[0]), targets.new_zeros(num_labels)
    if bias:
        mean, label_mean = (gram[:size, size] / total).to(dtype), (cross[size] / total).to(targets)
        second = second - torch.outer(gram[:size, size], gram[:size, size]) / total
        products = products - torch.outer(gram[:size, size], cross[size]) / total
    strength = second.diagonal().mean()

    def turn() -> LeftOutRows:
        values, vectors = torch.linalg.eigh(second.to(dtype))
        # Negative by rounding only, and a leverage must not be.
        return LeftOutRows(values.clamp(min=0), vectors, (inputs - mean) @ vectors)

    values, vectors, turned = once(turn)
    projected, squared = vectors.T @ products.to(dtype), turned.square()
    found = targets.new_empty(len(alphas), *targets.shape)
    for number, alpha in enumerate(alphas):
        inverse = 1 / (values + torch.maximum(alpha * strength, least).to(dtype))
        leverage = squared @ inverse + (1 / total if bias else 0)
        residuals = targets - label_mean - turned @ (inverse.unsqueeze(1) * projected)
        # A row that the fit hangs on entirely has a leverage near 1, and is predicted far away by the others.
        found[number] = targets - residuals / (1 - leverage).unsqueeze(1)
    return found


@torch.no_grad()
def choose_ridge_alpha(
    features: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor],
    left_out: torch.Tensor,
    gram: torch.Tensor,
    cross: torch.Tensor,
    origin: torch.Tensor,
    *,
    bias: bool = True,
    once: Callable[[Callable[[], LeftOutRows]], LeftOutRows] = lambda make: make(),
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> float:
    """Choose the penalty of [`fit_ridge_head`] whose regression predicts pseudolabels best that it has not seen.

    The score of a penalty is the mean squared distance of [`left_out_predictions`] from the label that each
    pseudolabel names, whatever probability it gives it; ties go to the strongest penalty. `left_out` is what this
    process leaves out in turn of what [`draw_left_out`] gave, `gram` and `cross` are of all processes and of features
    less `origin`; for `once` see there.
    Source: ours. On development tasks the squared distance from soft pseudolabels chose penalties that are too strong
    where teachers are unsure and rows few, the cross-entropy of the scaled logits everywhere, and the share of labels
    that agree ones that are too weak.

    Examples:
        >>> features = torch.linspace(-1, 1, 8).unsqueeze(1)
        >>> labels, rows = torch.eye(2)[(features[:, 0] > 0).long()], torch.arange(8)
        >>> z = torch.cat([features, torch.ones(8, 1)], dim=1).double()
        >>> choose_ridge_alpha(features, labels.__getitem__, rows, z.T @ z, z.T @ labels.double(), torch.zeros(1))
        0.1
    """
    # The number of rows goes last, so that processes add up once; one without rows takes part with zeros.
    errors = torch.zeros(len(RIDGE_ALPHAS) + 1, dtype=torch.float64, device=features.device)
    if len(left_out) and gram[-1, -1] >= 3:  # of two rows each is predicted by the other alone, whatever the penalty
        inputs, wanted = features[left_out].float() - origin, targets(left_out).float()
        if not bias:
            inputs, gram, cross = inputs + origin, *_move_back(gram, cross, origin)
        found = left_out_predictions(inputs, wanted, gram, cross, bias=bias, once=once)
        named = torch.nn.functional.one_hot(first_argmax(wanted), wanted.shape[1])
        errors[:-1] = (found - named).square().sum(dim=2).double().sum(dim=1)
        errors[-1] = len(inputs)
    errors = sum_over_processes(errors)
    scores = errors[:-1] / errors[-1].clamp(min=1e-12)
    is_best = scores <= scores.min() * (1 + _TIE) + _TIE
    return max(alpha for alpha, best in zip(RIDGE_ALPHAS, is_best.tolist()) if best)


def _move_back(gram: torch.Tensor, cross: torch.Tensor, origin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of the features as they are: with z + (o, 0) in place of z."""
    move = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    move[:-1, -1] = origin.to(gram)
    return move @ gram @ move.T, move @ cross
