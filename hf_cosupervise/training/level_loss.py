"""The loss of one level: what it makes of a batch, and whether it is still a number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ..method.linear_head import SparseTargets
from ..method.losses import LossAndGradient, LossFunction, soft_cross_entropy, sparse_soft_cross_entropy
from ..method.published_losses import EarlyLearningRegularization, choose_loss, weigh_loss
from ..pool.pseudolabels import PseudolabelPool
from ..processes import CHUNK_ROWS, Processes
from .collator import TARGETS
from .config import CoSupervisedConfig
from .plan import LevelPlan

# Pseudolabels of a level are decoded once where they fit in this many bytes, else batch by batch.
_MAX_DECODED_BYTES = 2**30


class LevelLoss:
    """Measure how far a student is from the pseudolabels of one level."""

    def __init__(
        self,
        pool: PseudolabelPool,
        plan: LevelPlan,
        args: CoSupervisedConfig,
        loss_func: LossFunction | None = None,
        weights: np.ndarray | None = None,
        needs_all_labels: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.args, self.plan = args, plan
        self._num_examples, self._num_labels = len(pool), pool.hierarchy.num_labels
        self._loss_func = loss_func
        # How far the level is, 0 to 1: some losses change on the way. Whoever goes through its steps sets it.
        self.fraction_done: Callable[[], float] = lambda: 0.0
        self._weights = None if weights is None else self._scale(weights)
        self._processes = processes or Processes(0, 1)
        self.forget()
        # Losses other than the cross-entropy are given all labels.
        is_plain = self._own is None and not needs_all_labels
        # A partial of a plain function, which workers of any start method can pickle; no method of an object.
        form = args.pseudolabels == "hard", is_plain and _pays_sparse(pool, plan)
        self.pseudolabels: Callable[[np.ndarray], Any] = partial(_pseudolabels, pool, plan, *form)
        # float64: a sum in float32 would lose the small losses at the end of a long level.
        self.total, self.count = torch.zeros((), dtype=torch.float64), 0  # of the steps so far
        self._micro_losses: list[torch.Tensor] = []  # of the step in training

    def forget(self) -> None:
        """Begin anew, for another student: some losses remember what the last one said of each example."""
        self._own: tuple[LossFunction, LossAndGradient] | None = None
        if self._loss_func is None and self.args.loss == "cross_entropy" and self._weights is None:
            return  # which is computed faster than by its name
        # `fraction_done` is looked up at each call: it is set after this, see `train_level`.
        loss, shape = self._loss_func or self.args.loss, (self._num_examples, self._num_labels)
        pair = choose_loss(loss, self.args.loss_kwargs, lambda: self.fraction_done(), shape)
        if isinstance(pair[0], EarlyLearningRegularization) and self._processes.count > 1:
            pair = _share_memory(pair, pair[0].memory, self._processes)
        self._own = pair if self._weights is None else weigh_loss(pair, self._weights)

    def _scale(self, weights: np.ndarray) -> torch.Tensor:
        """Weights with a mean of 1 over what is kept, so that the learning rate means the same at every level."""
        total = weights[self.plan.keep_mask].sum()
        if total == 0:
            raise ValueError(
                f"`weight_column` '{self.args.weight_column}' must be above 0 somewhere, got 0 for all that level "
                f"{self.plan.level} keeps."
            )
        return torch.from_numpy((weights * (self.plan.keep_mask.sum() / total)).astype(np.float32))

    # --- a batch -----------------------------------------------------------------------------------------------------

    @property
    def with_gradient(self) -> LossAndGradient | None:
        """`Callable`, *optional*: Losses with their gradient in the logits; none for the plain cross-entropy."""
        return None if self._own is None else self._own[1]

    def __call__(self, logits: torch.Tensor, targets: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Measure a batch."""
        # Label ids are no probabilities, and are not smoothed.
        wanted = {name: value if name == "target_ids" else self.smooth(value) for name, value in targets.items()}
        if self._own is not None:
            return self._own[0](logits, wanted["target_probs"], rows).mean()
        return pseudolabel_losses(logits, wanted).mean()

    def smooth(self, probs: torch.Tensor) -> torch.Tensor:
        """Spread a share of the pseudolabels evenly, as `label_smoothing_factor` says."""
        share, probs = self.args.label_smoothing_factor, probs.float()
        return probs * (1 - share) + share / self._num_labels if share else probs

    def lookup(self, kept: np.ndarray, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor | SparseTargets]:
        """Give smoothed pseudolabels by row: decoded once where all fit in memory, else batch by batch."""

        def read(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
            targets = self.pseudolabels(rows)
            arrays = targets if isinstance(targets, tuple) else (targets,)
            tensors = [torch.from_numpy(array).to(device) for array in arrays]
            return tuple(self.smooth(values) if values.is_floating_point() else values for values in tensors)

        # One row tells how large all would be, sparse or dense.
        first = read(kept[:1])
        if self._num_examples * sum(values.nbytes for values in first) > _MAX_DECODED_BYTES:
            return lambda rows: _as_targets(read(rows.cpu().numpy()))
        # Rows that are not kept have a place too, so that a row of the pool is found without a second index.
        table = [values.new_zeros(self._num_examples, *values.shape[1:]) for values in first]
        for part in np.array_split(kept, max(len(kept) // CHUNK_ROWS, 1)):
            for values, wanted in zip(table, read(part)):
                values[torch.from_numpy(part).to(values.device)] = wanted
        return lambda rows: _as_targets(tuple(values.index_select(0, rows) for values in table))

    # --- all steps so far --------------------------------------------------------------------------------------------

    def watch(self, loss: torch.Tensor, *, ends_step: bool = True) -> None:
        """Remember the loss of a batch; nothing waits for it."""
        self._micro_losses.append(loss.detach())
        if not ends_step:  # losses of micro-batches are averaged, so that a step counts once whatever its parts
            return
        mean = self._micro_losses[0] if len(self._micro_losses) == 1 else torch.stack(self._micro_losses).mean()
        dtype = torch.float32 if mean.device.type == "mps" else torch.float64  # which Apple's devices do not have
        self.total = self.total.to(mean.device, dtype) + mean
        self.count, self._micro_losses = self.count + 1, []

    def mean(self) -> float:
        """Average all steps of all processes, those before a crash too."""
        # All processes make as many steps, so that one count serves for all.
        return float(self._processes.sum(self.total.reshape(1))) / (max(self.count, 1) * self._processes.count)

    def told(self) -> dict[str, Any]:
        """Tell what [`take_up`] wants, of all processes."""
        sums = self._processes.gather(self.total).tolist()
        return {"num_losses": self.count, "loss_sums": sums, "num_processes": self._processes.count}

    def take_up(self, total: float, count: int) -> None:
        """Go on after steps of an earlier process."""
        self.total, self.count = torch.tensor(total, dtype=torch.float64), count

    def check(self, where: str, kept_in: str) -> None:
        """Stop where the loss is no longer a number: nothing that is trained from there on is worth keeping."""
        # Of the sum: one NaN stays in it, so that a look now and then misses none. It is of all processes, which so
        # stop together instead of waiting for the one that stopped.
        if self.count and not torch.isfinite(self._processes.sum(self.total.reshape(1))):
            raise FloatingPointError(
                f"The loss must be a number, got NaN or infinity by {where}. Lower `learning_rate`, or set "
                f"`max_grad_norm`, and begin in another folder; what was finished before stays in '{kept_in}'."
            )


def pseudolabel_losses(logits: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the cross-entropy against what the collator gave."""
    if "target_ids" not in targets:
        return soft_cross_entropy(logits, targets["target_probs"].float())
    return sparse_soft_cross_entropy(logits, *(targets[name] for name in TARGETS))


def _share_memory(
    pair: tuple[LossFunction, LossAndGradient], memory: torch.Tensor, processes: Processes
) -> tuple[LossFunction, LossAndGradient]:
    """Let every process know what the others remember: in the next epoch an example may be another's."""

    def sharing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> Any:
            result, rows = function(logits, targets, rows), rows.to(memory.device)
            # Batches of one step are of one size in all processes, which is what lets them be put side by side.
            everyone, known = processes.gather(rows), processes.gather(memory[rows])
            memory[everyone.flatten().to(memory.device)] = known.flatten(0, 1).to(memory.device)
            return result

        return call

    return sharing(pair[0]), sharing(pair[1])


def _pseudolabels(pool: PseudolabelPool, plan: LevelPlan, hard: bool, is_sparse: bool, rows: np.ndarray) -> Any:
    """Give what is trained on, where it is sparse without the labels that the teachers left out."""
    if is_sparse:
        return pool.sparse_pseudolabels(plan.assigned_teacher[rows], rows, hard=hard)
    probs = pool.pseudolabels(plan.assigned_teacher[rows], rows, hard=hard)
    if plan.relabelled is not None:
        own = plan.relabelled[rows]  # the student's own label, -1 where the teacher's stays
        probs[own >= 0] = np.eye(probs.shape[1], dtype=np.float32)[own[own >= 0]]
    return probs


def _pays_sparse(pool: PseudolabelPool, plan: LevelPlan) -> bool:
    """Tell whether rows of k labels are cheaper than rows of all; an ensemble has no stored rows."""
    num_teachers = len(pool.hierarchy.teachers)
    k = pool.label_ids(pool.hierarchy.names[0]).shape[1]
    is_narrow = pool.has_one_k and 4 * k <= pool.hierarchy.num_labels
    return is_narrow and plan.relabelled is None and bool((plan.assigned_teacher < num_teachers).all())


def _as_targets(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor | SparseTargets:
    return tensors[0] if len(tensors) == 1 else SparseTargets(*tensors)
