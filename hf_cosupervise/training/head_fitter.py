"""Fit a linear head on features that are kept, in the order and with the events of a standard training loop.

The backbone is frozen, so that running it again in every step would give the same features again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..method.linear_head import (
    FeatureScaling,
    SparseTargets,
    cross_products,
    dense_targets,
    feature_origin,
    fit_linear_head,
    fit_ridge_head,
    gram_matrix,
    linear_logits,
    measure_scaling,
)
from ..method.losses import LossAndGradient
from ..method.ridge import choose_ridge_alpha, draw_left_out
from ..processes import Processes
from .config import CoSupervisedConfig
from .level_loss import LevelLoss

logger = logging.getLogger(__name__)
_ROWS_ASKED = 4096
_MAX_SCALED_BYTES = 2**28
# Under this name the penalty of a level is logged, and kept in its record.
RIDGE_ALPHA = "head/ridge_alpha"
TargetLookup = Callable[[torch.Tensor], torch.Tensor | SparseTargets]


class _Solved(NamedTuple):
    """A ridge regression that was made, and what it was made of."""

    asked: tuple[Any, float]
    kept: np.ndarray
    cross: torch.Tensor
    alpha: float
    loss: float
    head: dict[str, torch.Tensor]


@dataclass
class FitEvents:
    """Tell callbacks and logs how a fit goes on."""

    callbacks: Any
    args: CoSupervisedConfig
    state: TrainerState
    control: TrainerControl
    log: Callable[[dict[str, float], TrainerControl], TrainerControl]

    def tell(self, event: str) -> TrainerControl:
        """Tell that something happens."""
        self.control = getattr(self.callbacks, event)(self.args, self.state, self.control)
        return self.control

    def tell_numbers(self, numbers: dict[str, float]) -> None:
        """Log numbers."""
        self.control = self.log(numbers, self.control)


class HeadFitter:
    """Fit the head of a frozen backbone, level after level, on the same features."""

    def __init__(
        self,
        head: nn.Linear,
        features: torch.Tensor,
        args: CoSupervisedConfig,
        processes: Processes | None = None,
        readable: np.ndarray | None = None,
        known: dict[str, Any] | None = None,
    ) -> None:
        self.head, self.features, self.args = head, features, args
        # What was found out about the features, by this fitter or by another of the same ones.
        self._known = {} if known is None else known
        self.processes = processes or Processes(0, 1)
        self._readable = np.arange(len(features)) if readable is None else np.flatnonzero(readable)
        self._has_told = False

    def fit(
        self,
        kept: np.ndarray,
        loss: LevelLoss,
        events: FitEvents,
        make_dataloader: Callable[[], DataLoader],
        make_optimizer: Callable[[], torch.optim.Optimizer],
        make_scheduler: Callable[[int], Any],
    ) -> TrainOutput:
        """Fit the head on what a level kept, as `head_solver` says."""
        targets, state = loss.lookup(kept, self.features.device), events.state
        if self.args.head_solver == "ridge":
            # Progress bars and callbacks read these.
            state.max_steps, state.num_train_epochs, state.train_batch_size = 1, 1, len(kept)
            return self.fit_at_once(kept, targets, events)
        dataloader = make_dataloader()
        state.max_steps, per_epoch = self.count_steps(dataloader, len(kept))
        state.num_train_epochs = math.ceil(state.max_steps / per_epoch)
        state.train_batch_size = self.args.train_batch_size
        state.compute_steps(self.args, state.max_steps)
        optimizer = _merge_equal_groups(make_optimizer())
        # Only now: a schedule holds on to the groups that it finds.
        output = self.fit_by_steps(
            kept,
            targets,
            dataloader,
            optimizer,
            make_scheduler(state.max_steps),
            events,
            loss=loss.with_gradient,
            watch=loss.watch,
        )
        self._tell_of_idleness(kept, targets)
        return output

    def _tell_of_idleness(self, kept: np.ndarray, targets: TargetLookup) -> None:
        """Warn, once, of a head that says what a constant would: a rate too small for few steps shows nowhere else."""
        if self._has_told or self.processes.rank:
            return
        rows = torch.from_numpy(kept[:: -(-len(kept) // _ROWS_ASKED)]).to(self.features.device)
        wanted = dense_targets(targets(rows), self.head.out_features).argmax(dim=1)
        agreed = float((linear_logits(self.head, self.features[rows]).argmax(dim=1) == wanted).float().mean())
        most = int(wanted.bincount().max()) / len(rows)
        if agreed < most + 0.05 * (1 - most) < 1:
            self._has_told = True
            logger.warning(
                f"The head agrees with {agreed:.0%} of the pseudolabels that it was trained on, one label for all "
                f"examples with {most:.0%}: it has hardly learnt. Set a larger `learning_rate` (it is "
                f"{self.args.learning_rate:g}), more `num_train_epochs`, `standardize_features`, or "
                "`head_solver='ridge'`, which has no rate."
            )

    # --- by steps ----------------------------------------------------------------------------------------------------

    def count_steps(self, dataloader: DataLoader, num_kept: int) -> tuple[int, int]:
        """Tell how many optimizer steps a level takes."""
        if not len(dataloader):
            raise ValueError(
                f"A level must keep at least one whole batch under `dataloader_drop_last`, got {num_kept} examples. "
                "Use a smaller batch."
            )
        # Rounded up, as the Trainer does: the last step of an epoch may have fewer micro-batches.
        per_epoch = math.ceil(len(dataloader) / self.args.gradient_accumulation_steps)
        all_epochs = math.ceil(self.args.num_train_epochs * per_epoch)
        return self.args.max_steps if self.args.max_steps > 0 else all_epochs, per_epoch

    def fit_by_steps(
        self,
        kept: np.ndarray,
        targets: TargetLookup,
        dataloader: DataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        events: FitEvents,
        *,
        loss: LossAndGradient | None = None,
        watch: Callable[[torch.Tensor], None] = lambda loss: None,
    ) -> TrainOutput:
        """Do what the standard loop does: same order, optimizer, schedule, logs and callbacks."""
        _, per_epoch = self.count_steps(dataloader, len(kept))
        # The handler gives these to every callback; those of the level before would be told otherwise.
        events.callbacks.optimizer, events.callbacks.lr_scheduler = optimizer, scheduler
        events.tell("on_train_begin")
        started, meter = time.time(), _LossMeter()

        def after_step(loss: torch.Tensor, norm: float | None) -> None:
            watch(loss)
            self._after_step(events, meter, loss, norm, per_epoch)

        scaling, features = self._scaling() if self.args.standardize_features else None, self.features
        # Once for all steps and members, where a second copy of the features is small.
        if scaling is not None and 4 * features.numel() <= _MAX_SCALED_BYTES:
            features = self._once("scaled", lambda: scaling.apply(self.features))
        fit_linear_head(
            self.head,
            features,
            targets,
            self._steps(dataloader, torch.from_numpy(kept), per_epoch, optimizer, events, meter),
            optimizer,
            scheduler,
            max_grad_norm=self.args.max_grad_norm,
            loss=loss,
            scaling=scaling,
            is_scaled=features is not self.features,
            average_gradients=self._average if self.processes.count > 1 else None,
            on_step=after_step,
        )
        mean = meter.mean(self.processes)  # read first: what callbacks do at the end does not count
        events.tell("on_train_end")
        num_steps = events.state.global_step
        return TrainOutput(num_steps, mean, speed_metrics("train", started, num_steps=num_steps))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Give what hangs on the features and the rows that were read alone, made once for all levels and members."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def _origin(self) -> torch.Tensor:
        return self._once("origin", lambda: feature_origin(self.features))

    def _scaling(self) -> FeatureScaling:
        return self._once("scaling", lambda: measure_scaling(self.features, torch.from_numpy(self._readable)))

    def _steps(
        self,
        dataloader: DataLoader,
        rows: torch.Tensor,
        per_epoch: int,
        optimizer: torch.optim.Optimizer,
        events: FitEvents,
        meter: _LossMeter,
    ) -> Iterator[Sequence[torch.Tensor]]:
        """Give the rows of each step, in the order in which the standard loop would read them."""
        accumulation = self.args.gradient_accumulation_steps
        for epoch in range(events.state.num_train_epochs):
            if hasattr(dataloader, "set_epoch"):  # as the Trainer's loop does: the order of an epoch hangs on it
                dataloader.set_epoch(epoch)
            events.tell("on_epoch_begin")
            batches = _read_batches(dataloader.batch_sampler, rows)
            for number in range(per_epoch):
                events.tell("on_step_begin")
                # Before the schedule moves on: what is logged is the rate that the step was made with.
                meter.learning_rate = float(optimizer.param_groups[0]["lr"])
                # The step is made while this waits; what callbacks said of it is known after.
                yield batches[number * accumulation : (number + 1) * accumulation]
                if events.control.should_epoch_stop or events.control.should_training_stop:
                    break
            events.tell("on_epoch_end")
            self._log_step(events, meter)
            if events.control.should_training_stop:
                return

    def _after_step(
        self, events: FitEvents, meter: _LossMeter, loss: torch.Tensor, norm: float | None, per_epoch: int
    ) -> None:
        meter.add(loss, norm)
        events.state.global_step += 1
        events.state.epoch = events.state.global_step / per_epoch
        events.tell("on_step_end")
        if events.state.global_step >= events.state.max_steps:  # a callback's task, which heads of folds have none of
            events.control.should_training_stop = True
        self._log_step(events, meter)

    def _log_step(self, events: FitEvents, meter: _LossMeter) -> None:
        if events.control.should_log and meter.num_since:
            events.tell_numbers(meter.read(self.processes))

    def _average(self, gradient: torch.Tensor) -> None:
        gradient.copy_(self.processes.sum(gradient) / self.processes.count)  # in place, as the optimizer holds it

    # --- at once -----------------------------------------------------------------------------------------------------

    def fit_at_once(self, kept: np.ndarray, targets: TargetLookup, events: FitEvents) -> TrainOutput:
        """Fit by ridge regression; for logs and callbacks it is a level of one step."""
        started = time.time()
        events.tell("on_train_begin")
        events.tell("on_epoch_begin")
        alpha, loss = self._solve(kept, targets)
        events.state.global_step, events.state.epoch = 1, 1.0
        events.tell("on_step_end")
        if self.args.logging_strategy != "no":
            events.tell_numbers({"loss": loss, RIDGE_ALPHA: alpha})
        events.tell("on_epoch_end")
        events.tell("on_train_end")
        metrics = speed_metrics("train", started, num_steps=1)
        return TrainOutput(1, loss, {**metrics, RIDGE_ALPHA: alpha})

    def _solve(self, kept: np.ndarray, targets: TargetLookup) -> tuple[float, float]:
        """Put the solution into the head; gives the penalty and the loss."""
        # Each process sums its share; the products are added up, and all solve the same system.
        rows, asked = self._own_share(kept), (self.args.ridge_alpha, self.args.ridge_logit_scale)
        cross = self.processes.sum(
            cross_products(self.features, rows, targets, self.head.out_features, self._origin())
        )
        # Members that go down the hierarchy begin with the same root, which has the same products.
        root: _Solved | None = self._known.get("root")
        is_same = root is not None and asked == root.asked and np.array_equal(kept, root.kept)
        if root is not None and is_same and torch.equal(cross, root.cross):
            self.head.load_state_dict(root.head)
            return root.alpha, root.loss
        gram = self._gram_of(kept)
        alpha = self._find_alpha(kept, targets, gram, cross)
        loss = fit_ridge_head(
            self.head,
            self.features,
            rows,
            targets,
            gram,
            alpha=alpha,
            logit_scale=self.args.ridge_logit_scale,
            cross=cross,
            origin=self._origin(),
            sum_over_processes=self.processes.sum,
        )
        head = {name: value.clone() for name, value in self.head.state_dict().items()}
        self._known.setdefault("root", _Solved(asked, kept, cross, alpha, float(loss), head))
        return alpha, float(loss)

    def _find_alpha(self, kept: np.ndarray, targets: TargetLookup, gram: torch.Tensor, cross: torch.Tensor) -> float:
        """Give the penalty: a number as it is, or what predicts the pseudolabels best that a fit has not seen."""
        if not isinstance(self.args.ridge_alpha, str | None):
            return float(self.args.ridge_alpha)
        # Always of the same seed: whatever the run's own is, a ridge gives the same student.
        left_out = self._own_share(draw_left_out(torch.from_numpy(kept), seed=0).numpy())
        # Roots and averages are all fitted to all that was read.
        is_whole = len(kept) == len(self._readable)
        return choose_ridge_alpha(
            self.features,
            lambda rows: dense_targets(targets(rows), self.head.out_features),
            left_out.to(self.features.device),
            gram,
            cross,
            self._origin(),
            bias=self.head.bias is not None,
            once=lambda turn: self._once("left_out", turn) if is_whole else turn(),
            sum_over_processes=self.processes.sum,
        )

    def _gram_of(self, kept: np.ndarray) -> torch.Tensor:
        """Give the Gram matrix of the kept rows: that of all that were read, made once, less that of the others."""
        whole = self._once("gram", lambda: self._sum_gram(self._readable))
        others = np.setdiff1d(self._readable, kept, assume_unique=True)
        # Whatever is less work: Gram matrices add up.
        return whole - self._sum_gram(others) if len(others) < len(kept) else self._sum_gram(kept)

    def _sum_gram(self, rows: np.ndarray) -> torch.Tensor:
        return self.processes.sum(gram_matrix(self.features, self._own_share(rows), self._origin()))

    def _own_share(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array_split(rows, self.processes.count)[self.processes.rank])


def why_not_on_features(
    args: CoSupervisedConfig, head: nn.Linear | None, *, has_own_loss: bool, has_own_collator: bool, is_sharded: bool
) -> str | None:
    """Name what a fit on features cannot honour."""
    reasons = {
        "`fit_head_on_features` is off": not args.fit_head_on_features,
        "the student is not a linear head on a frozen backbone": head is None,
        "checkpoints within a level are asked for": args.save_strategy != "no",
        "evaluation within a level is asked for": args.eval_strategy != "no",
        "`compute_loss_func` is given": has_own_loss,
        "the data collator is not ours": has_own_collator,
        "FSDP or DeepSpeed is used": is_sharded,
        "a ReduceLROnPlateau or Greedy schedule is asked for": args.lr_scheduler_type
        in ("reduce_lr_on_plateau", "greedy"),
        "fp16 scales the loss": args.fp16,
        "evaluation before the first step is asked for": args.eval_on_start,
        "`debug` looks into the backbone": bool(args.debug),
        "memory is measured": not args.skip_memory_metrics,
        "input tokens are counted": args.include_num_input_tokens_seen not in (False, "no"),
        f"`optim` {args.optim} has a step of its own": str(args.optim).startswith(
            ("lomo", "adalomo", "schedule_free")
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def outside_of_fold(kept: np.ndarray, fold: int, num_folds: int, level: int) -> np.ndarray:
    """Give what a head may be trained on that is to judge the examples of a fold, every `num_folds`-th of the pool."""
    own = kept[kept % num_folds != fold]
    if not len(own):
        raise ValueError(
            f"Level {level} must keep examples outside of every fold, got {len(kept)} all in fold {fold}. Leave "
            "`cross_fit_folds` and `self_training_rounds` out."
        )
    return own


def _merge_equal_groups(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Keep weight and bias in one group where their options are equal: one kernel per step then updates both."""
    first, *others = optimizer.param_groups
    for group in others:
        if {**group, "params": None} == {**first, "params": None}:
            first["params"] = [*first["params"], *group["params"]]
            optimizer.param_groups.remove(group)
    return optimizer


def _read_batches(batch_sampler: Any, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Give the rows of all batches of an epoch."""
    sampler: Any = getattr(batch_sampler, "sampler", None)
    # By exact type: a subclass, as of several processes, may give other rows than its parent.
    is_plain = type(batch_sampler) is BatchSampler and type(sampler) is SeedableRandomSampler
    if not is_plain or sampler.replacement or len(sampler) != len(rows):
        return [rows[batch] for batch in batch_sampler]
    # What the sampler does, without an iterator that gives one number at a time.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(sampler.initial_seed + sampler.epoch))
    sampler.set_epoch(sampler.epoch + 1)  # as at the end of its own iterator
    return rows[order].split(batch_sampler.batch_size)[: len(batch_sampler)]


class _LossMeter:
    """Mean loss since the last log and over all steps, summed on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.total, self.num_steps = 0.0, 0
        self.since: torch.Tensor | float = 0.0
        self.num_since = 0
        self.norm: float | None = None
        self.learning_rate = 0.0

    def add(self, loss: torch.Tensor, norm: float | None) -> None:
        self.since, self.num_since, self.norm = self.since + loss, self.num_since + 1, norm

    def read(self, processes: Processes) -> dict[str, float]:
        """Give the numbers of the `Trainer`'s own log, and begin anew."""
        # This waits for the device, which no step does that does not clip.
        mean = float(processes.gather(torch.as_tensor(self.since)).mean()) / max(self.num_since, 1)
        self.total, self.num_steps = self.total + mean * self.num_since, self.num_steps + self.num_since
        self.since, self.num_since = 0.0, 0
        logs = {"loss": mean, "learning_rate": self.learning_rate}
        return logs if self.norm is None else {**logs, "grad_norm": self.norm}

    def mean(self, processes: Processes) -> float:
        if self.num_since:  # steps after the last log
            self.read(processes)
        return self.total / max(self.num_steps, 1)
