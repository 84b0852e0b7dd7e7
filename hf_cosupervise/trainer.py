"""Co-supervised training: down the hierarchy, level by level, with a `transformers.Trainer`."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalPrediction, HubStrategy, PredictionOutput, TrainOutput, speed_metrics

from . import __version__
from .callbacks import LevelCallbackHandler, LevelHistory
from .cards import model_card, write_card
from .collator import ROW, ROWS, TARGETS, DataCollatorForCoSupervision
from .config import CoSupervisedConfig
from .consistency import check_top_k_value
from .derived_pools import smoothed_pool
from .features import FeatureStore
from .heads import BatchReader, SparseTargets, fit_linear_head, fit_ridge_head, gram_matrix, linear_logits
from .hub import open_repo
from .inputs import LABEL_NAMES, InputProcessor, find_input_column, find_label_column, read_labels, row_keys
from .levels import LevelPlan, plan_level
from .losses import (
    LossAndGradient,
    LossFunction,
    choose_loss,
    hard_cross_entropy,
    soft_cross_entropy,
    sparse_soft_cross_entropy,
    weigh_loss,
)
from .metrics import accuracy, without_nan
from .pool import ORACLE_DOMAIN, ORACLE_LABEL, PseudolabelPool, match_ids
from .plan_rules import AssignFunction, KeepFunction, assign_by_neighbors, level_assignment
from .processes import CHUNK_ROWS, Processes, row_chunks
from .runs import (
    RunFolder,
    Stage,
    explain_full_disk,
    last_checkpoint,
    make_output_dir,
    model_digest,
    pool_digest,
    read_story,
    seal_checkpoint,
    write_whole,
)
from .students import (
    export_student,
    head_gives_logits,
    linear_head,
    load_pinned_student,
    prepare_student,
    push_student,
)

logger = get_logger(__name__)

RUN_DIR = "_run"
_BUFFERS = "buffers.safetensors"
_GO_ON = "call `train(resume_from_checkpoint=True)`: what was finished is kept"
_STORY = ("global_step", "epoch", "total_flos", "log_history")
# Arguments that do not change what is trained, but where and how loudly.
_NEUTRAL = (
    "output_dir", "features_dir", "disable_tqdm", "run_name", "project", "log_level", "logging_", "report_to", "hub_",
    "push_to_hub", "dataloader_num_workers", "dataloader_prefetch", "dataloader_persistent", "dataloader_pin",
    "save_total_limit", "use_cpu", "ddp_", "trackio_", "per_device_eval_batch_size",
    "student_revision",
)  # fmt: skip
# Pseudolabels of a level are decoded once where they fit in this many bytes, else batch by batch.
_MAX_DECODED_BYTES = 2**30


class CoSupervisedTrainer(Trainer):
    """Train one student on the pseudolabels of a hierarchy of teachers, without ground truth.

    `train()` goes down the levels. At each it asks the student so far which teacher to trust on each example
    ([`prepare_level`]), rejects pseudolabels that student and teachers do not agree on, and trains on the rest
    ([`train_level`]) with a new optimizer, schedule and shuffle order. What comes out is an ordinary model.

    Args:
        model (`str`, `os.PathLike`, `PreTrainedModel` or `PeftModel`):
            The student: a Hub id or folder, which gets a fresh head, or a model whose head fits the pool's labels.
        args (`CoSupervisedConfig`, *optional*):
            What to do. Defaults write to `trainer_output`.
        data_collator (`DataCollatorForCoSupervision`, *optional*):
            Made from `processing_class` by default.
        train_dataset (`datasets.Dataset`, *optional*):
            The inputs, where the pool has none: matched by `id`, or by content where it has no such column.
        eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            Inputs with a label column, for `evaluate`. Never used to choose anything by itself.
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*):
            The student's. Loaded with the student where that is an id.
        pool (`PseudolabelPool`):
            What the teachers say.
        input_column (`str`, *optional*):
            The column that the student reads. Found by itself where only one can be meant.
        peft_config (`peft.LoraConfig`, *optional*):
            Adapters for `student_training="lora"`, instead of the `lora_…` fields.
        loss_func (`Callable`, *optional*):
            A loss of your own, instead of `args.loss`: from logits and pseudolabels, `(batch, num_labels)` both, and
            rows of the pool `(batch,)` to losses `(batch,)`. Unlike `compute_loss_func` it is fitted on features too.
        assign_func (`Callable`, *optional*):
            An assignment of your own for the levels below the root, instead of `args.assignment`: from the student's
            log-probabilities `(rows, num_labels)`, the probabilities of the level's teachers `(rows, num_teachers,
            num_labels)` and who answered `(rows, num_teachers)` to positions in the level `(rows,)`, -1 for nobody.
        keep_func (`Callable`, *optional*):
            A rejection of your own for the levels below the root, instead of `args.rejection`: from the student's
            log-probabilities and the pseudolabels, `(rows, num_labels)` both, to booleans `(rows,)`, True to keep.
            Both are called for chunks of 1,024 rows, on the CPU.
        kwargs (`Any`):
            Passed on to [`~transformers.Trainer`].

    Raises:
        ValueError: If pool, data, student and configuration do not fit together.
        TypeError: If `args` is not a [`CoSupervisedConfig`].

    Source:
        Liu and Alahi, arXiv 2402.15505.
    """

    _tag_names = ["co-supervised-learning", "weak-to-strong"]
    args: CoSupervisedConfig
    callback_handler: LevelCallbackHandler
    control: TrainerControl
    state: TrainerState

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        args: CoSupervisedConfig | None = None,
        data_collator: DataCollatorForCoSupervision | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        pool: PseudolabelPool,
        input_column: str | None = None,
        peft_config: LoraConfig | None = None,
        loss_func: LossFunction | None = None,
        assign_func: AssignFunction | None = None,
        keep_func: KeepFunction | None = None,
        **kwargs: Any,
    ) -> None:
        args = CoSupervisedConfig() if args is None else args
        if not isinstance(args, CoSupervisedConfig):
            raise TypeError(f"`args` must be a `CoSupervisedConfig`, got `{type(args).__name__}`.")
        make_output_dir(Path(args.output_dir))
        if any(kwargs.get("optimizers") or ()):
            raise ValueError(
                "`optimizers` cannot be given: each level makes its own. Use `optim` or `optimizer_cls_and_kwargs`."
            )
        _check_levels(pool, args, has_own_assignment=assign_func is not None)
        self.pool = pool
        self.loss_func, self.assign_func, self.keep_func = loss_func, assign_func, keep_func
        inputs = _match_inputs(pool, train_dataset, input_column)
        self.input_column = find_input_column(inputs, input_column)
        self._rows = inputs.add_column(ROW, np.arange(len(pool)))
        origin: dict[str, Any] = {}
        if isinstance(model, (str, os.PathLike)):
            model, loaded, origin = load_pinned_student(
                model, pool.labels, revision=args.student_revision, seed=args.seed
            )
            processing_class = loaded if processing_class is None else processing_class
        _check_student(model, pool)
        if processing_class is None:
            raise ValueError(
                "`processing_class` (the student's tokenizer or image processor) is needed beside a model object."
            )
        self.processor = InputProcessor(processing_class, model.config)
        student = prepare_student(model, args.student_training, peft_config or _lora_config(args), seed=args.seed)
        if isinstance(student, PeftModel) and origin:
            student.peft_config[student.active_adapter].revision = origin["commit"]
        if data_collator is None:
            data_collator = DataCollatorForCoSupervision(self.processor, self.input_column)
        kwargs.setdefault("compute_metrics", _accuracy_metrics)
        super().__init__(
            student, args, data_collator, self._rows, self._label(eval_dataset),
            processing_class=processing_class, **kwargs,
        )  # fmt: skip
        # The loss is a mean over the batch: the Trainer must divide it by the accumulation steps itself.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.callback_handler = LevelCallbackHandler(self.callback_handler)
        self._run = RunFolder(Path(args.output_dir) / RUN_DIR)
        self.history = LevelHistory(self.run_dir / "history.json", _describe_run(origin, pool, args.world_size))
        self.plans: list[LevelPlan] = []
        self._loss_sum, self._num_losses = torch.zeros((), dtype=torch.float64), 0  # of the level in training
        self._micro_losses: list[torch.Tensor] = []  # of the step in training
        self._owns_run = self._goes_on = False
        self._fresh = {name: value.detach().cpu().clone() for name, value in self._trained_tensors().items()}
        self._head = self._find_head() if args.student_training == "probe" else None
        self._story = self._new_story()  # of all levels; `state` is that of the level in training
        self._pool_features: torch.Tensor | None = None
        self._gram: torch.Tensor | None = None
        self._neighbors: torch.Tensor | None = None
        self._own_pool = pool  # as it was given: that in use may be smoothed
        self._fold_heads: list[nn.Linear] = []
        self._level_loss: tuple[LossFunction, LossAndGradient] | None = None
        self._weights = None if args.weight_column is None else _read_weights(pool, args.weight_column)
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Refuse what does not go together, before any work starts."""
        args, reason = self.args, self._why_not_on_features()
        if args.head_solver == "ridge" and reason:
            raise ValueError(f"`head_solver` 'ridge' needs a linear head on features, but {reason}. Use 'steps'.")
        if args.cross_fit_folds and reason:
            raise ValueError(f"`cross_fit_folds` needs a linear head on features, but {reason}. Leave it out.")
        for name in ("agreement_neighbors", "teacher_neighbors"):
            if getattr(args, name) and self._head is None:
                raise ValueError(
                    f"`{name}` needs a linear head on a frozen backbone, got another kind of student. Set it to 0."
                )
            if getattr(args, name) >= len(self.pool):
                raise ValueError(
                    f"`{name}` must be below the {len(self.pool)} examples of the pool, got {getattr(args, name)}. "
                    "Use fewer."
                )
        given = [name for name in ("loss_func", "assign_func", "keep_func") if getattr(self, name) is not None]
        if wrong := [name for name in given if not callable(getattr(self, name))]:
            raise TypeError(f"`{wrong[0]}` must be a function, got {type(getattr(self, wrong[0])).__name__}.")
        losses = [name for name in ("loss_func", "compute_loss_func") if getattr(self, name) is not None]
        losses += [f"loss {args.loss!r}"] if args.loss != "cross_entropy" else []
        if len(losses) > 1:
            raise ValueError(f"One loss is needed, got {' and '.join(losses)}. Leave the others out.")
        if self.loss_func is not None and args.head_solver == "ridge":
            raise ValueError("`head_solver` 'ridge' has a loss of its own, got `loss_func`. Use 'steps'.")
        if self.compute_loss_func is not None and args.weight_column is not None:
            raise ValueError(
                f"`compute_loss_func` sees no `weight_column`, got {args.weight_column!r}. Use `loss_func`, which is "
                "weighted."
            )
        if args.loss == "early_learning_regularization" and args.world_size > 1:
            raise ValueError(
                "`loss` 'early_learning_regularization' remembers every example, which several processes would share "
                f"out anew in each epoch, got {args.world_size} processes. Use one."
            )

    def _find_head(self) -> nn.Linear | None:
        """Find the head if the rest of the student can be replaced by its features."""
        model, head = self.accelerator.unwrap_model(self.model).eval(), linear_head(self.model)
        if head is None or not len(self.pool):
            return None
        inputs = self._prepare_inputs(self.processor(self._rows[:1][self.input_column]))
        return head if head_gives_logits(model, head, inputs) else None

    # --- what is known of the run ------------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """`pathlib.Path`: Levels, features, history and checkpoints, inside `output_dir` but not part of the model."""
        return self._run.path  # `args.output_dir` is another one within a level

    def _trained_tensors(self) -> dict[str, torch.Tensor]:
        """What training can change: parameters that learn, and buffers where the backbone is not frozen."""
        model = self.accelerator.unwrap_model(self.model)
        tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return tensors if self.args.student_training == "probe" else tensors | dict(model.named_buffers())

    def _restore(self, values: dict[str, torch.Tensor]) -> None:
        tensors = self._trained_tensors()
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)

    def load_level(self, level: int) -> None:
        """Put the student as it was at the end of a level into `model`.

        Args:
            level (`int`):
                A finished level, from 0.

        Raises:
            FileNotFoundError: If that level has not been finished in this output folder.
        """
        stage = self._run.load_stage(self._stage_dir(level, self._num_rounds(level) - 1))
        if stage is None:
            raise FileNotFoundError(f"No student of level {level} in '{self.run_dir}'. Call `train()` first.")
        self._restore(stage.student)

    def _stage_dir(self, level: int, round: int) -> Path:
        return self._run.stage_dir(level, round, is_last=round == self._num_rounds(level) - 1)

    # --- the algorithm -----------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Go down the hierarchy: assign, select, train, and on to the next level.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                True to go on where an earlier run in this `output_dir` was cut off, or to begin where there is none.
                What it finished is not done again, and the student is the same as if it had not been cut off. Another
                number of processes takes over finished levels, and begins the one that was cut off anew.
            trial (`Any`, *optional*):
                Not supported.
            ignore_keys_for_eval (`list[str]`, *optional*):
                Passed on to the evaluation within a level.

        Returns:
            `TrainOutput`: steps of all levels, mean loss over them, and metrics of the whole.

        Raises:
            FileExistsError: If `output_dir` holds another run, or another process works there.
            FloatingPointError: If the loss is no longer a number.
            ValueError: If a level keeps nothing to train on, the run that is gone on with was begun otherwise, or an
                argument is not supported.
        """
        if trial is not None or isinstance(resume_from_checkpoint, str):
            raise ValueError(
                "`train` takes `resume_from_checkpoint=True` or nothing: a run finds by itself where it was cut off."
            )
        with self._only_run():
            finished = self._open_run(bool(resume_from_checkpoint))
            started, outputs = time.time(), []
            self.control = self.callback_handler.on_train_begin(self.args, self._story, self.control)
            for level, round_ in self._stages()[finished:]:
                plan = self.prepare_level(level, round_)
                outputs.append(self.train_level(plan, ignore_keys_for_eval))
                self.finish_level(plan)
                self._goes_on = False
            return self._close_run(outputs, started)

    def _stages(self) -> list[tuple[int, int]]:
        """All levels and their rounds, in order."""
        levels = range(self.pool.hierarchy.num_levels)
        return [(level, round_) for level in levels for round_ in range(self._num_rounds(level))]

    @contextmanager
    def _only_run(self) -> Iterator[None]:
        """Lock the output folder, by the first of all processes."""
        with ExitStack() as stack:
            if self.is_world_process_zero():
                self._processes.on_first(lambda: None if stack.enter_context(self._run.lock()) else None)
            else:
                self._processes.on_first(lambda: None)
            yield

    def _num_rounds(self, level: int) -> int:
        return self.args.rounds_per_level if level else 1  # the root has nothing to choose again

    def prepare_level(self, level: int, round: int = 0) -> LevelPlan:
        """Let the student so far choose a teacher for each example, and what to keep of it.

        Args:
            level (`int`):
                Level, from 0. Below the root, `model` must be the student of the level above.
            round (`int`, *optional*, defaults to 0):
                Round within the level.

        Returns:
            `LevelPlan`

        Raises:
            FileExistsError: If `output_dir` holds another run.
            ValueError: If nothing is left to train on, or the level above is not finished.
        """
        if len(self.plans) < level:
            raise ValueError(
                f"Level {level} must follow a finished level {level - 1} of this trainer, got {len(self.plans)} "
                "finished. Prepare, train and finish those above, or call `train(resume_from_checkpoint=True)`."
            )
        self._claim_folder()
        with self._memory_advice("per_device_eval_batch_size", "Predicting before"):
            return self._plan(level, round)

    def _plan(self, level: int, round: int) -> LevelPlan:
        if self.args.teacher_neighbors and self.pool is self._own_pool:
            self.pool = smoothed_pool(self.pool, self._nearest(self.args.teacher_neighbors))
        previous = self.plans[level - 1].assigned_teacher if level else np.full(len(self.pool), -1)
        if level == 0:
            return plan_level(self.pool, level, self.args, previous, round=round)
        chosen, asks_neighbors = None, self.args.agreement_neighbors and self.assign_func is None
        if asks_neighbors and level_assignment(self.args, level) == "agreement":
            chosen = assign_by_neighbors(
                self.pool, level, self.args, self._ask_student(), self._nearest(self.args.agreement_neighbors),
                self._sum_over_processes,
            )  # fmt: skip
        return plan_level(
            self.pool, level, self.args, previous, self._ask_student(), round=round, chosen=chosen,
            assign_func=self.assign_func, keep_func=self.keep_func, sum_over_processes=self._sum_over_processes,
        )  # fmt: skip

    def _ask_student(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stream what the student says of this process's share of the pool; under cross-fitting, what heads say that
        were not trained on the example."""
        if not self._fold_heads:
            yield from self.predict_log_probs(self._rows, share=True)
            return
        features, num_folds = self._features_of(self._rows), len(self._fold_heads)
        for chunk in row_chunks(len(self.pool))[self.args.process_index :: self.args.world_size]:
            logits = torch.empty(chunk.stop - chunk.start, self.pool.hierarchy.num_labels)
            for fold, head in enumerate(self._fold_heads):
                first = (fold - chunk.start) % num_folds  # example i is in fold i modulo their number
                logits[first::num_folds] = linear_logits(head, features[chunk][first::num_folds]).cpu()
            yield chunk, torch.log_softmax(logits, dim=1)

    def _nearest(self, k: int) -> torch.Tensor:
        """Give each example's neighbours in the features of the backbone, which is frozen: they are found once."""
        if self._neighbors is None:
            most = max(self.args.agreement_neighbors, self.args.teacher_neighbors)
            self._neighbors = self.feature_store.neighbors(
                self._rows, self.input_column, self.pool_features(), most,
                is_first=self.args.process_index == 0, wait=self.accelerator.wait_for_everyone,
            )  # fmt: skip
        return self._neighbors[:, :k]

    def train_level(self, plan: LevelPlan, ignore_keys_for_eval: list[str] | None = None) -> TrainOutput:
        """Train the student on what a level kept.

        Args:
            plan (`LevelPlan`):
                What [`prepare_level`] decided.
            ignore_keys_for_eval (`list[str]`, *optional*):
                Passed on to the evaluation within the level.

        Returns:
            `TrainOutput` of this level.

        Raises:
            FileExistsError: If `output_dir` holds another run.
            FloatingPointError: If the loss is no longer a number.
        """
        self._claim_folder()
        number = len(self.history.records)
        kept = np.flatnonzero(plan.keep_mask)
        self.train_dataset = self._rows.select(kept)
        self._level_loss = self._make_loss(plan)
        # Losses other than the cross-entropy are given all labels.
        is_plain = self.compute_loss_func is None and self._level_loss is None
        read = _sparse_pseudolabels if is_plain and _pays_sparse(self.pool, plan) else _pseudolabels
        self.data_collator.pseudolabels = partial(read, self.pool, plan, self.args.pseudolabels == "hard")
        if not self.args.warm_start:
            self._restore(self._fresh)
        with self._level_arguments(plan, number):
            self._loss_sum, self._num_losses, self._micro_losses = torch.zeros((), dtype=torch.float64), 0, []
            checkpoint = self._find_checkpoint(plan)
            if checkpoint is None:
                # Checkpoints of an attempt that nobody goes on with must not pass for those of this one.
                self._processes.on_first(lambda: self._run.forget([self._stage_dir(plan.level, plan.round)]))
                self._log_story({"level": plan.level, "round": plan.round, **plan.metrics})
            else:
                self._recall(checkpoint)
            self.callback_handler.call_event("on_level_begin", self.args, self._story, self.control, plan=plan)
            with self._memory_advice("per_device_train_batch_size", "Training"):
                if reason := self._why_not_on_features():
                    logger.info(f"Level {plan.level} is trained by the standard loop: {reason}.")
                    # Bits hang on the layout of weights, which the run of the backbone for features may have changed.
                    self.accelerator.unwrap_model(self.model).to(memory_format=torch.contiguous_format)
                    with self._batch_advice(plan):
                        output = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
                    # The parent's mean is over its own steps, which after a crash are not all.
                    num_losses = max(self._num_losses, 1) * self.args.world_size
                    output = output._replace(
                        training_loss=float(self._sum_tensors(self._loss_sum.reshape(1))) / num_losses
                    )
                elif self.args.head_solver == "ridge":
                    output = self._fit_ridge(kept)
                else:
                    output = self._train_on_features(kept)
        is_last = plan.level == self.pool.hierarchy.num_levels - 1 and plan.round == self._num_rounds(plan.level) - 1
        if self.args.cross_fit_folds and not is_last:
            self._fold_heads = self._fit_folds(plan, kept, number)
        self._check_loss()
        self._record_level(plan, output)
        return output

    def _fit_folds(self, plan: LevelPlan, kept: np.ndarray, number: int) -> list[nn.Linear]:
        """Fit a head for each fold on what a level kept outside of it, in silence; the student stays as it is."""
        if self._head is None:
            raise ValueError("Only a linear head on a frozen backbone has features.")
        student, loud = copy.deepcopy(self._head.state_dict()), (self.callback_handler, self.control, self.state)
        heads = []
        self.callback_handler = copy.copy(self.callback_handler)
        self.callback_handler.callbacks = []
        try:
            for fold in range(self.args.cross_fit_folds):
                own = kept[kept % self.args.cross_fit_folds != fold]
                if not len(own):
                    raise ValueError(
                        f"Level {plan.level} must keep examples outside of every fold, got {len(kept)} all in fold "
                        f"{fold}. Leave `cross_fit_folds` out."
                    )
                self.control, self.train_dataset = TrainerControl(), self._rows.select(own)
                self._level_loss = self._make_loss(plan)
                self._restore(self._fresh)
                with self._level_arguments(plan, number):
                    self._fit_ridge(own) if self.args.head_solver == "ridge" else self._train_on_features(own)
                heads.append(copy.deepcopy(self._head))
        finally:
            self.callback_handler, self.control, self.state = loud
            self._head.load_state_dict(student)
        return heads

    def finish_level(self, plan: LevelPlan) -> None:
        """Keep the level's student and what it was trained on: the next level, or another run, goes on from here.

        Args:
            plan (`LevelPlan`):
                What the level (or a round of it) was trained on.
        """
        self.plans = [*self.plans[: plan.level], plan]
        is_last = plan.level == self.pool.hierarchy.num_levels - 1
        self._processes.on_first(lambda: self._save_stage(plan))
        is_whole = plan.round == self._num_rounds(plan.level) - 1
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE and is_whole and not is_last:
            self.push_to_hub(commit_message=f"Student of level {plan.level}")

    def _save_stage(self, plan: LevelPlan) -> None:
        own = plan.level, plan.round
        # What comes after was made from another student of this level.
        self._run.forget(self._stage_dir(*stage) for stage in self._stages() if stage > own)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._trained_tensors().items()}
        folds = [
            {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
            for head in self._fold_heads
        ]
        story = {name: getattr(self._story, name) for name in _STORY}
        with explain_full_disk(self.run_dir, _GO_ON):
            stage = Stage(plan, tensors, folds, self.history.records[-1], story)
            self._run.save_stage(self._stage_dir(*own), stage)

    def _load_folds(self, folds: Sequence[dict[str, torch.Tensor]]) -> list[nn.Linear]:
        heads = []
        for tensors in folds:
            head = copy.deepcopy(self._head)
            if head is not None:
                head.load_state_dict(tensors)
                heads.append(head)
        return heads

    def _find_checkpoint(self, plan: LevelPlan) -> str | None:
        """The last checkpoint of a level that was cut off; where there is none it is trained from its beginning."""
        # What early-learning regularization remembers of each example is not in a checkpoint.
        is_exact = self.args.loss != "early_learning_regularization" and self._why_not_on_features()
        if not self._goes_on or not is_exact:
            return None
        release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        if self.args.world_size > 1 and self.args.device.type == "cpu" and release < (5, 23):
            logger.warning(
                f"Level {plan.level} is begun anew: on CPU several processes go on inside a level with transformers "
                "5.23 or later only."
            )
            return None
        folder, num_processes = self._stage_dir(plan.level, plan.round), self.args.world_size
        found = self._processes.on_first(lambda: last_checkpoint(folder, num_processes))
        return None if found is None else str(found)

    # --- one level ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _level_arguments(self, plan: LevelPlan, number: int) -> Iterator[None]:
        """Set what differs from level to level: epochs, shuffle order, place of checkpoints, a new optimizer."""
        output_dir, num_train_epochs = self.args.output_dir, self.args.num_train_epochs
        self.optimizer = self.lr_scheduler = None
        set_seed(self.args.seed + 1000 * number)  # dropout must not hang on what ran before
        # `args.data_seed` is read once, when the Trainer is made, so the order of a level is set where it is used.
        self.accelerator.dataloader_config.data_seed = self.args.data_seed + 1000 * number
        if self.args.max_steps <= 0:
            scaled = num_train_epochs / plan.keep_rate
            self.args.num_train_epochs = math.floor(scaled) if scaled >= 1 else scaled
        self.args.output_dir = str(self._stage_dir(plan.level, plan.round))
        self.callback_handler.in_level = True
        try:
            yield
        finally:
            self.args.output_dir, self.args.num_train_epochs = output_dir, num_train_epochs
            self.callback_handler.in_level = False

    @contextmanager
    def _memory_advice(self, name: str, what: str) -> Iterator[None]:
        """Say what to do where a batch does not fit."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            is_full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
            if not is_full or name in str(error):
                raise
            more = " with more `gradient_accumulation_steps`" if name == "per_device_train_batch_size" else ""
            raise torch.OutOfMemoryError(
                f"{what} level {len(self.plans)} needs less memory, got too little for batches of "
                f"{getattr(self.args, name)}. Use a smaller `{name}`{more}, or `bf16`; finished levels are kept."
            ) from error

    @contextmanager
    def _batch_advice(self, plan: LevelPlan) -> Iterator[None]:
        """Say what to do where the examples that a level keeps leave one alone in a batch."""
        try:
            yield
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "A student with batch normalization needs batches of at least 2 examples, got one of 1 among the "
                f"{int(plan.keep_mask.sum())} examples that level {plan.level} keeps. Set `dataloader_drop_last`, or "
                "another `per_device_train_batch_size`."
            ) from error

    def _recall(self, checkpoint: str) -> None:
        """Take up the story where a checkpoint left it."""
        story = read_story(Path(checkpoint))
        self._story.log_history = story["log_history"]
        own = story["loss_sums"][self.args.process_index]
        self._loss_sum, self._num_losses = torch.tensor(own, dtype=torch.float64), story["num_losses"]

    def _watch(self, loss: torch.Tensor) -> None:
        """Add the loss of a step to those of the level; nothing waits for it."""
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64  # which Apple's devices do not have
        self._loss_sum = self._loss_sum.to(dtype).to(loss.device) + loss.detach().to(dtype)
        self._num_losses += 1

    def _check_loss(self) -> None:
        """Stop where the loss is no longer a number: nothing that is trained from there on is worth keeping."""
        if self._num_losses and not torch.isfinite(self._sum_tensors(self._loss_sum.reshape(1))):
            raise FloatingPointError(
                f"The loss must be a number, got NaN or infinity by step {self.state.global_step} of level "
                f"{len(self.history.records)}. Lower `learning_rate`, or set `max_grad_norm`, and begin in another "
                f"folder; what was finished before stays in '{self.run_dir}'."
            )

    def _record_level(self, plan: LevelPlan, output: TrainOutput) -> None:
        """Count the level's steps, and tell the numbers to whoever listens."""
        self._story.global_step += output.global_step
        self._story.epoch = (self._story.epoch or 0.0) + (self.state.epoch or 0.0)
        self._story.total_flos += self.state.total_flos
        record = {
            "level": plan.level, "round": plan.round, **plan.metrics, "num_steps": output.global_step,
            "train_loss": output.training_loss, "train_runtime": output.metrics["train_runtime"],
        }  # fmt: skip
        self.state = self._story
        self.history.add(record, write=False)
        self._processes.on_first(self._write_history)
        self.callback_handler.call_event(
            "on_level_end", self.args, self._story, self.control, plan=plan, metrics=record
        )

    def _open_run(self, resume: bool) -> int:
        """Begin a story, or go on with the one on disk. Gives the number of finished stages."""
        found = self._find_run(resume)
        self._story = self._new_story()
        self.state = self._story
        self._restore(self._fresh)
        self.plans, self._fold_heads, self._goes_on = [], [], resume
        facts = self._describe_settings()
        if resume and found:
            self._processes.on_first(lambda: self._check_run(facts))
            self._owns_run = True
            return self._read_stages()
        self._begin_run(facts)
        return 0

    def _find_run(self, resume: bool) -> bool:
        """Tell whether a run is in this output folder; one that is not gone on with must be this trainer's own."""
        found = self._processes.on_first(lambda: self.history.path.is_file() or any(self.run_dir.glob("level-*")))
        if found and not resume and not self._owns_run:
            raise FileExistsError(
                f"`output_dir` must not hold another run, got one in '{self.run_dir}'. Choose another folder, delete "
                "that one, or go on with `resume_from_checkpoint=True`."
            )
        return found

    def _claim_folder(self) -> None:
        """Begin the run of a notebook that does not call `train`."""
        if not self._owns_run:
            self._find_run(resume=False)
            self._begin_run(self._describe_settings())

    def _new_story(self) -> TrainerState:
        return TrainerState(
            is_world_process_zero=self.is_world_process_zero(), is_local_process_zero=self.is_local_process_zero()
        )

    def _begin_run(self, facts: dict[str, Any]) -> None:
        def begin() -> None:
            with explain_full_disk(self.run_dir, _GO_ON):
                self.history.clear()
                self._run.begin(facts)

        self.history.records = []
        self._processes.on_first(begin)
        self._owns_run = True

    def _check_run(self, facts: dict[str, Any]) -> None:
        self._check_commit()
        self._run.check(facts)

    def _describe_settings(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        arguments = {
            name: value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)
            for name, value in self.args.changed_arguments().items() if not name.startswith(_NEUTRAL)
        }  # fmt: skip
        return {
            "arguments": {"seed": self.args.seed, "data_seed": self.args.data_seed, **arguments},
            "functions": self._name_functions(),
            "pool": pool_digest(self._own_pool),
            "student": model_digest(self.accelerator.unwrap_model(self.model)),
            "num_processes": self.args.world_size,
            "examples_per_step": self.args.train_batch_size * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "versions": {"hf_cosupervise": __version__, "transformers": transformers.__version__,
                         "torch": torch.__version__},
        }  # fmt: skip

    def _check_commit(self) -> None:
        """A student of the Hub must be gone on with at the commit that it was begun with."""
        try:
            known, own = self.history.read().get("student", {}), self.history.run["student"]
        except (ValueError, AttributeError) as error:  # stages are what counts, and tell all of it again
            logger.warning(f"'{self.history.path}' cannot be read ({error}): it is written anew.")
            return
        if self.history.records and any(known.get(key) != own.get(key) for key in ("model", "commit", "base_commit")):
            raise ValueError(
                f"The run in '{self.run_dir}' must go on with the student that it was begun with, {known}, got {own}. "
                "Name its commit by `student_revision`, or choose another folder."
            )

    def _read_stages(self) -> int:
        """Read the finished stages of this output folder back; gives their number."""
        self.history.records = []
        finished, last = 0, None
        for level, round_ in self._stages():
            stage = self._run.load_stage(self._stage_dir(level, round_))
            if stage is None:
                break
            finished, last = finished + 1, stage
            self.plans = [*self.plans[:level], stage.plan]
            self.history.records.append(stage.record)
        self._check_same_everywhere(finished)
        num_processes = self._processes.on_first(self._repair_history)
        if finished == len(self._stages()):  # whoever publishes it has not trained it
            self.history.run["num_processes"] = num_processes
        if last is not None:
            self._restore(last.student)
            self._fold_heads = self._load_folds(last.folds)
            for name, value in last.story.items():
                setattr(self._story, name, value)
        return finished

    def _check_same_everywhere(self, finished: int) -> None:
        """See that all processes read the same stages: they would wait for each other forever."""
        counts = self.accelerator.gather(torch.tensor([finished], device=self.args.device)).tolist()
        if len(set(counts)) > 1:
            raise FileNotFoundError(
                f"All processes must see the same levels in '{self.run_dir}', got {counts} finished ones. Choose an "
                "`output_dir` that they share."
            )

    def _repair_history(self) -> int:
        """Write the history anew where it does not tell of the stages that are there; gives by how many."""
        known, run = LevelHistory(self.history.path), dict[str, Any]()
        try:
            run = known.read()
        except (ValueError, AttributeError):
            known.records = []
        if known.records[: len(self.history.records)] != json.loads(json.dumps(without_nan(self.history.records))):
            self._write_history()
        return int(run.get("num_processes") or self.args.world_size)

    def _write_history(self) -> None:
        content = self.history.to_json()
        with explain_full_disk(self.run_dir, _GO_ON):
            write_whole(self.history.path, lambda path: path.write_text(content, encoding="utf-8"))

    def _close_run(self, outputs: list[TrainOutput], started: float) -> TrainOutput:
        """Sum the levels up in one `TrainOutput`."""
        steps = sum(output.global_step for output in outputs)
        loss = sum(output.training_loss * output.global_step for output in outputs) / max(steps, 1)
        metrics = speed_metrics("train", started, num_steps=steps)
        metrics |= {"total_flos": self._story.total_flos, "train_loss": loss, "num_levels": float(len(self.plans))}
        self.state = self._story
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self._story.global_step, loss, metrics)

    # --- logging: one story over all levels --------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log numbers on the story of all levels, where steps go on counting.

        Args:
            logs (`dict[str, float]`):
                Numbers.
            start_time (`float`, *optional*):
                Start of training.
        """
        # All processes add their losses up: not where only one of them may call this.
        if self.callback_handler.in_level and "loss" in logs:
            self._check_loss()
        if not self.callback_handler.in_level:
            super().log(logs, start_time)
        elif "train_runtime" not in logs:  # a level's own summary is part of its record
            self._log_story(logs, start_time)

    def _log_story(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        level_state, before = self.state, (self._story.global_step, self._story.epoch)
        running = level_state if level_state is not self._story else None
        if running is not None:
            self._story.global_step += running.global_step
            self._story.epoch = (before[1] or 0.0) + (running.epoch or 0.0)
        self.state = self._story
        try:
            super().log(logs, start_time)
        finally:
            self.state = level_state
            self._story.global_step, self._story.epoch = before

    # --- the student -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the mean loss against pseudolabels, or the cross-entropy against labels in evaluation.

        Args:
            model (`nn.Module`):
                The student.
            inputs (`dict[str, Any]`):
                Model inputs, with `target_probs` or `labels`.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Give the model's outputs too.
            num_items_in_batch (`int`, *optional*):
                Not used: the loss is a mean over the batch.

        Returns:
            `torch.Tensor` or `tuple[torch.Tensor, Any]`: the loss, and the outputs where asked for.
        """
        if self.args.student_training == "probe":
            model.eval()  # a frozen backbone must not drift (BatchNorm) nor drop out
        targets = {name: inputs.pop(name) for name in TARGETS if name in inputs}
        labels, rows = inputs.pop("labels", None), inputs.pop(ROWS, None)
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            wanted = labels if not targets else targets["target_probs"]
            loss = self.compute_loss_func(outputs, wanted, num_items_in_batch=None)
        else:
            with torch.autocast(outputs.logits.device.type, enabled=False):  # losses are float32 at any precision
                loss = self._mean_loss(outputs.logits.float(), targets, labels, rows)
        if targets:
            self._micro_losses.append(loss.detach())
            if self.accelerator.sync_gradients:  # the last of a step
                self._watch(torch.stack(self._micro_losses).mean())
                self._micro_losses = []
        return (loss, outputs) if return_outputs else loss

    def _mean_loss(
        self, logits: torch.Tensor, targets: dict[str, torch.Tensor], labels: torch.Tensor | None, rows: Any
    ) -> torch.Tensor:
        if not targets:
            return hard_cross_entropy(logits, labels).mean()  # type: ignore[arg-type]
        wanted = {name: targets[name] if name == "target_ids" else self._smooth(targets[name]) for name in targets}
        if self._level_loss is not None:
            return self._level_loss[0](logits, wanted["target_probs"], rows).mean()
        return _pseudolabel_losses(logits, wanted).mean()

    def _make_loss(self, plan: LevelPlan) -> tuple[LossFunction, LossAndGradient] | None:
        """The loss of a level with a memory of its own, and its gradient; None for the plain cross-entropy."""

        def fraction_done() -> float:  # a weight that climbs looks at the steps of the level
            return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

        if self.loss_func is None and self.args.loss == "cross_entropy" and self._weights is None:
            return None
        shape = len(self.pool), self.pool.hierarchy.num_labels
        pair = choose_loss(self.loss_func or self.args.loss, self.args.loss_kwargs, fraction_done, shape)
        if self._weights is None:
            return pair
        total = self._weights[plan.keep_mask].sum()
        if total == 0:
            raise ValueError(
                f"`weight_column` '{self.args.weight_column}' must be above 0 somewhere, got 0 for all that level "
                f"{plan.level} keeps."
            )
        return weigh_loss(pair, torch.from_numpy((self._weights * (plan.keep_mask.sum() / total)).astype(np.float32)))

    def _smooth(self, probs: torch.Tensor) -> torch.Tensor:
        """Spread a share of the pseudolabels evenly, as `label_smoothing_factor` says."""
        share, probs = self.args.label_smoothing_factor, probs.float()
        return probs * (1 - share) + share / self.pool.hierarchy.num_labels if share else probs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Run one batch without gradients.

        Args:
            model (`nn.Module`):
                The student.
            inputs (`dict[str, Any]`):
                Model inputs, with `labels` where they are known.
            prediction_loss_only (`bool`):
                Give the loss only.
            ignore_keys (`list[str]`, *optional*):
                Not used: only logits are given.

        Returns:
            `tuple`: loss, logits `(batch, num_labels)` and labels `(batch,)`, each `None` where not known or wanted.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        targets = {name: inputs.pop(name) for name in TARGETS if name in inputs}
        inputs.pop(ROWS, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits.float()
        loss = None
        if labels is not None or targets:
            losses = _pseudolabel_losses(logits, targets) if labels is None else hard_cross_entropy(logits, labels)
            loss = losses.mean()
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    @torch.no_grad()
    def predict_log_probs(self, dataset: Dataset, *, share: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stream the student's log-probabilities, a chunk of rows at a time.

        Args:
            dataset (`datasets.Dataset`):
                Inputs.
            share (`bool`, *optional*, defaults to `False`):
                With several processes, give each its own chunks only.

        Returns:
            `Iterator[tuple[slice, torch.Tensor]]`: rows and log-probabilities `(rows, num_labels)`, float32 on CPU.
        """
        chunks = row_chunks(len(dataset))
        if share:
            chunks = chunks[self.args.process_index :: self.args.world_size]
        if self._head is not None:
            features = self._features_of(dataset)
            for chunk in chunks:
                yield chunk, torch.log_softmax(linear_logits(self._head, features[chunk]), dim=1).cpu()
            return
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        for chunk in chunks:
            rows = range(chunk.start, chunk.stop)
            size = self.args.per_device_eval_batch_size
            logits = [
                self._logits(model, dataset[list(rows[start : start + size])]) for start in range(0, len(rows), size)
            ]
            yield chunk, torch.log_softmax(torch.cat(logits), dim=1).cpu()

    def _logits(self, model: nn.Module, examples: dict[str, list[Any]]) -> torch.Tensor:
        inputs = self._prepare_inputs(self.processor(examples[self.input_column]))
        with self.compute_loss_context_manager():
            return model(**inputs).logits.float()

    def predict_labels(self, dataset: Dataset) -> np.ndarray:
        """Give the student's most probable label of each example.

        Args:
            dataset (`datasets.Dataset`):
                Inputs; labels are not looked at.

        Returns:
            `np.ndarray` of shape `(num_examples,)`, int64.
        """
        parts = [log_probs.numpy().argmax(axis=1) for _, log_probs in self.predict_log_probs(dataset)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def measure_accuracy(self, dataset: Dataset) -> float:
        """Measure the student's accuracy on labelled data.

        Args:
            dataset (`datasets.Dataset`):
                Inputs with a label column.

        Returns:
            `float`: 0 to 1.

        Raises:
            ValueError: If the data has no labels of the task.
        """
        labels = read_labels(dataset, find_label_column(dataset), self.pool.labels)
        return accuracy(self.predict_labels(dataset), labels)

    # --- the fast way for a linear head on a frozen backbone ---------------------------------------------------------

    def _why_not_on_features(self) -> str | None:
        """Name what the fast loop cannot honour, None if there is nothing."""
        args = self.args
        reasons = {
            "`fit_head_on_features` is off": not args.fit_head_on_features,
            "the student is not a linear head on a frozen backbone": self._head is None,
            "checkpoints within a level are asked for": args.save_strategy != "no",
            "evaluation within a level is asked for": args.eval_strategy != "no",
            "`compute_loss_func` is given": self.compute_loss_func is not None,
            "the data collator is not ours": type(self.data_collator) is not DataCollatorForCoSupervision,
            "FSDP or DeepSpeed is used": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            "a ReduceLROnPlateau or Greedy schedule is asked for": args.lr_scheduler_type
            in ("reduce_lr_on_plateau", "greedy"),
            "fp16 scales the loss": args.fp16,
            f"`optim` {args.optim} has a step of its own": str(args.optim).startswith(
                ("lomo", "adalomo", "schedule_free")
            ),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    @property
    def feature_store(self) -> FeatureStore:
        """[`FeatureStore`]: Where the head's inputs are kept; features computed elsewhere can be put there.

        Raises:
            ValueError: If the student is not a linear head on a frozen backbone.
        """
        if self._head is None:
            raise ValueError("Only a linear head on a frozen backbone has features, got another kind of student.")
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        folder = Path(self.args.features_dir) if self.args.features_dir else self.run_dir / "features"
        precision = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
        return FeatureStore(
            folder, model, self._head, self.processor, autocast=self.compute_loss_context_manager,
            precision=precision, dtype=self.args.features_dtype,
        )  # fmt: skip

    def pool_features(self) -> torch.Tensor:
        """Give what a frozen backbone feeds the head, for each example of the pool.

        Returns:
            `torch.Tensor` of shape `(num_examples, feature_size)`: mapped from disk, or on the student's device.

        Raises:
            ValueError: If the student is not a linear head on a frozen backbone.
        """
        return self._features_of(self._rows)

    def _features_of(self, dataset: Dataset) -> torch.Tensor:
        """Give the head's inputs: mapped from disk, or on the student's device where that is another one."""
        if dataset is self._rows and self._pool_features is not None:
            return self._pool_features
        values = self.feature_store.features(
            dataset, self.input_column, batch_size=self.args.per_device_eval_batch_size,
            shard=(self.args.process_index, self.args.world_size), wait=self.accelerator.wait_for_everyone,
            disable_tqdm=bool(self.args.disable_tqdm) or not self.is_local_process_zero(),
        )  # fmt: skip
        features = torch.from_numpy(values).to(self.args.device)
        if dataset is self._rows:
            self._pool_features = features
        return features

    def _train_on_features(self, kept: np.ndarray) -> TrainOutput:
        """Do what the standard loop does, on features: same order, optimizer, schedule, logs and callbacks."""
        if self._head is None:
            raise ValueError("Only a linear head on a frozen backbone has features.")
        features, targets = self._features_of(self._rows), self._target_lookup(kept)
        dataloader = self.get_train_dataloader()
        if not len(dataloader):
            raise ValueError(
                f"A level must keep at least one whole batch under `dataloader_drop_last`, got {len(kept)} examples. "
                "Use a smaller batch."
            )
        per_epoch = math.ceil(len(dataloader) / self.args.gradient_accumulation_steps)
        max_steps = (
            self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * per_epoch)
        )
        self.state = TrainerState(
            is_world_process_zero=self.is_world_process_zero(), is_local_process_zero=self.is_local_process_zero(),
            max_steps=max_steps, num_train_epochs=math.ceil(max_steps / per_epoch),
            train_batch_size=self._train_batch_size,
        )  # fmt: skip
        self.state.compute_steps(self.args, max_steps)
        self.create_optimizer()
        _merge_equal_groups(self.optimizer)  # type: ignore[arg-type]  # made in the line above
        self.create_scheduler(max_steps)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        started, meter, reader = time.time(), _LossMeter(), BatchReader(features, targets)
        with reader.reading_ahead(self.pool.hierarchy.num_labels):
            fit_linear_head(
                self._head, features, targets, self._head_steps(dataloader, kept, per_epoch, meter, reader),
                self.optimizer,  # type: ignore[arg-type]
                self.lr_scheduler, reader=reader, max_grad_norm=self.args.max_grad_norm,
                loss=None if self._level_loss is None else self._level_loss[1],
                average_gradients=self._average_over_processes if self.args.world_size > 1 else None,
                on_step=lambda loss, norm: self._after_head_step(meter, loss, norm, per_epoch),
            )  # fmt: skip
        loss = meter.mean(self.accelerator.gather)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(
            self.state.global_step, loss, speed_metrics("train", started, num_steps=self.state.global_step)
        )

    def _fit_ridge(self, kept: np.ndarray) -> TrainOutput:
        """Fit the head of a level at once; for logs and callbacks it is a level of one step."""
        if self._head is None:
            raise ValueError("Only a linear head on a frozen backbone has features.")
        started, features = time.time(), self._features_of(self._rows)
        self.state = TrainerState(
            is_world_process_zero=self.is_world_process_zero(), is_local_process_zero=self.is_local_process_zero(),
            max_steps=1, num_train_epochs=1, train_batch_size=len(kept),
        )  # fmt: skip
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        loss = fit_ridge_head(
            self._head, features, self._own_share(kept), self._target_lookup(kept), self._gram_of(features, kept),
            alpha=self.args.ridge_alpha, logit_scale=self.args.ridge_logit_scale,
            sum_over_processes=self._sum_tensors,
        )  # fmt: skip
        self.state.global_step, self.state.epoch = 1, 1.0
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.args.logging_strategy != "no":
            self.log({"loss": float(loss)})
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(1, float(loss), speed_metrics("train", started, num_steps=1))

    def _gram_of(self, features: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
        """Give the Gram matrix of the kept rows: that of the whole pool, computed once, less that of the others."""
        if self._gram is None:
            self._gram = self._sum_tensors(gram_matrix(features, self._own_share(np.arange(len(self.pool)))))
        others = np.setdiff1d(np.arange(len(self.pool)), kept, assume_unique=True)
        if len(others) < len(kept):
            return self._gram - self._sum_tensors(gram_matrix(features, self._own_share(others)))
        return self._sum_tensors(gram_matrix(features, self._own_share(kept)))

    def _own_share(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array_split(rows, self.args.world_size)[self.args.process_index])

    def _sum_tensors(self, values: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum")

    def _head_steps(
        self, dataloader: DataLoader, kept: np.ndarray, per_epoch: int, meter: _LossMeter, reader: BatchReader
    ) -> Iterator[Sequence[torch.Tensor]]:
        """Give the rows of each step, in the order in which the standard loop would read them."""
        accumulation = self.args.gradient_accumulation_steps
        rows = torch.from_numpy(kept)
        for epoch in range(self.state.num_train_epochs):
            if hasattr(dataloader, "set_epoch"):
                dataloader.set_epoch(epoch)
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
            batches = _read_batches(dataloader.batch_sampler, rows)
            reader.announce(batches)
            for number in range(per_epoch):
                self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
                meter.learning_rate = float(self.optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]
                yield batches[number * accumulation : (number + 1) * accumulation]
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    break
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._log_head_step(meter)
            if self.control.should_training_stop:
                return

    def _after_head_step(self, meter: _LossMeter, loss: torch.Tensor, norm: float | None, per_epoch: int) -> None:
        meter.add(loss, norm)
        self._watch(loss)
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / per_epoch
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.state.global_step >= self.state.max_steps:  # a callback's task, which heads of folds have none of
            self.control.should_training_stop = True
        self._log_head_step(meter)

    def _log_head_step(self, meter: _LossMeter) -> None:
        if self.control.should_log and meter.num_since:
            self.log(meter.read(self.accelerator.gather))

    def _target_lookup(self, kept: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor | SparseTargets]:
        """Give pseudolabels by row: decoded once where they fit in memory, else batch by batch."""

        def read(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
            targets = self.data_collator.pseudolabels(rows)
            arrays = targets if isinstance(targets, tuple) else (targets,)
            tensors = [torch.from_numpy(array).to(self.args.device) for array in arrays]
            return tuple(self._smooth(values) if values.is_floating_point() else values for values in tensors)

        first = read(kept[:1])
        if len(self.pool) * sum(values.nbytes for values in first) > _MAX_DECODED_BYTES:
            return lambda rows: _as_targets(read(rows.cpu().numpy()))
        table = [values.new_zeros(len(self.pool), *values.shape[1:]) for values in first]
        for part in np.array_split(kept, max(len(kept) // CHUNK_ROWS, 1)):
            for values, wanted in zip(table, read(part)):
                values[torch.from_numpy(part).to(values.device)] = wanted
        return lambda rows: _as_targets(tuple(values.index_select(0, rows) for values in table))

    # --- several processes -------------------------------------------------------------------------------------------

    def _sum_over_processes(self, values: np.ndarray) -> np.ndarray:
        if self.args.world_size == 1:
            return values
        total = self.accelerator.reduce(torch.from_numpy(values).to(self.args.device), reduction="sum")
        return total.cpu().numpy().astype(values.dtype)

    def _average_over_processes(self, gradient: torch.Tensor) -> None:
        gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))

    # --- evaluation and saving ---------------------------------------------------------------------------------------

    def _label(self, dataset: Any) -> Any:
        """Reduce an evaluation set to inputs and label ids of the task."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, dict):
            return {name: self._label(part) for name, part in dataset.items()}
        column = find_label_column(dataset)
        labels = read_labels(dataset, column, self.pool.labels)
        inputs = dataset.select_columns([find_input_column(dataset, self.input_column)])
        return inputs.add_column("labels", labels)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the student on labelled data.

        Args:
            eval_dataset (`datasets.Dataset`, `dict[str, datasets.Dataset]` or `str`, *optional*):
                Inputs with a label column. Defaults to the trainer's `eval_dataset`.
            args (`Any`):
                Passed on to [`~transformers.Trainer.evaluate`].
            kwargs (`Any`):
                Passed on to [`~transformers.Trainer.evaluate`].

        Returns:
            `dict[str, float]`: loss, accuracy (or what `compute_metrics` gives) and speed.

        Raises:
            ValueError: If the data has no labels of the task.
        """
        known = (
            eval_dataset is self.eval_dataset
            or isinstance(eval_dataset, Dataset)
            and "labels" in eval_dataset.column_names
        )
        return super().evaluate(eval_dataset if known else self._label(eval_dataset), *args, **kwargs)

    def _load_best_model(self) -> None:
        """Read the best checkpoint of a level back through `from_pretrained`.

        The parent loads the file as it is, by keys that `save_pretrained` has renamed for ViT and its kin, and only
        warns of the weights that it thereby leaves as they are (transformers #43701, open in 5.23).
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            self._load_buffers(self.state.best_model_checkpoint)
            return
        best = type(model).from_pretrained(self.state.best_model_checkpoint, config=model.config, use_safetensors=True)
        model.load_state_dict(best.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read a checkpoint back through `from_pretrained`, for the reason of [`_load_best_model`]."""
        student = self.accelerator.unwrap_model(self.model)
        if not isinstance(student, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_buffers(resume_from_checkpoint)
            return
        saved = type(student).from_pretrained(resume_from_checkpoint, config=student.config, use_safetensors=True)
        student.load_state_dict(saved.state_dict())

    def _load_buffers(self, checkpoint: Any) -> None:
        """Read what [`_save_checkpoint`] wrote beside an adapter."""
        if (buffers := Path(checkpoint, _BUFFERS)).is_file():
            self._restore(load_file(buffers))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Seal what the parent writes, so that a spoilt or half written checkpoint is never gone on from."""
        self._check_loss()
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        loss_sums = self.accelerator.gather(self._loss_sum.reshape(1).to(self.args.device)).tolist()
        try:
            with explain_full_disk(self.run_dir, _GO_ON):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self._seal(folder, loss_sums)
        except OSError:  # half of it would only take room
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _seal(self, folder: Path, loss_sums: list[float]) -> None:
        if self.args.should_save and folder.is_dir():
            if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):  # an adapter leaves them out
                buffers = {name: value for name, value in self._trained_tensors().items() if not value.requires_grad}
                save_file(
                    {name: value.detach().cpu().contiguous() for name, value in buffers.items()}, folder / _BUFFERS
                )
            told = {"log_history": self._story.log_history, "num_losses": self._num_losses}
            seal_checkpoint(folder, {**told, "loss_sums": loss_sums, "num_processes": self.args.world_size})

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict with the student, and measure where the data has labels.

        Args:
            test_dataset (`datasets.Dataset`):
                Inputs, with or without a label column.
            args (`Any`):
                Passed on to [`~transformers.Trainer.predict`].
            kwargs (`Any`):
                Passed on to [`~transformers.Trainer.predict`].

        Returns:
            `PredictionOutput`: logits `(num_examples, num_labels)`, label ids where they are known, and metrics.
        """
        labelled = any(name in test_dataset.column_names for name in LABEL_NAMES)
        return super().predict(self._label(test_dataset) if labelled else test_dataset, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as an ordinary model: it loads with plain `Auto…` classes, timm students with timm too.

        With `args.push_to_hub` it is pushed as well.

        Args:
            output_dir (`str`, *optional*):
                Folder, `args.output_dir` by default. A LoRA student is merged; its adapter goes to `adapter/`.
            _internal_call (`bool`, *optional*, defaults to `False`):
                Set by the `Trainer` for its checkpoints, which stay as they are.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self._export(output_dir or self.args.output_dir)
        if self.args.push_to_hub and output_dir in (None, self.args.output_dir):
            self.push_to_hub()

    def _export(self, folder: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(folder, _internal_call=True)
        else:
            student = self.accelerator.unwrap_model(self.model)
            with explain_full_disk(Path(folder), "save it again: the trained levels are kept"):
                self._processes.on_first(partial(export_student, student, folder, self.processing_class))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the pickle of the arguments, which nobody reads and which would hold the user's token."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    # --- the Hub -----------------------------------------------------------------------------------------------------

    @property
    def _processes(self) -> Processes:
        return Processes(self.args.process_index, self.args.world_size)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the model repository where there is none, and see that the token may write, before any work.

        Args:
            token (`str`, *optional*):
                Defaults to `args.hub_token`, then to the token of the environment.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.

        Raises:
            OSError: If the Hub refuses it or cannot be reached.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = self._processes.on_first(
            partial(open_repo, name, what="The student", private=private, token=token or self.args.hub_token)
        )

    def push_to_hub(
        self,
        commit_message: str | None = "Co-supervised student",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Publish the student in one commit: the model as [`save_model`] writes it, its processor, card and history.

        Pickles, pools, optimizers and whatever else lies in `output_dir` stay here. A card that was edited by hand is
        kept, and ours is merged into it. All processes must call it; one of them pushes.

        Args:
            commit_message (`str`, *optional*):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Wait until it is there.
            token (`str`, *optional*):
                Defaults to `args.hub_token`, then to the token of the environment.
            revision (`str`, *optional*):
                Branch, made where it does not exist. Defaults to `args.hub_revision`, then to the main branch.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.
            kwargs (`Any`):
                Passed on to [`create_model_card`], such as `license` and `report`.

        Returns:
            `CommitInfo`, or a `Future` of it with `blocking=False`; `None` in the other processes.

        Raises:
            OSError: If the Hub refuses it or cannot be reached. The repository is then as it was, and the student is
                in `output_dir`.
            RuntimeError: If the student is not trained, or somebody else pushed at the same moment.
        """
        if not self.history.records:
            raise RuntimeError(
                "A student must be trained before it is pushed, got one without a finished level. Call `train()`, or "
                "`train(resume_from_checkpoint=True)` where it was trained in another process."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or private:
            self.init_hf_repo(token, private)
        self._export(self.args.output_dir)
        revision = revision or self.args.hub_revision
        story: dict[str, bytes | Path] = {"history.json": self.history.to_json().encode("utf-8")}
        if kwargs.get("report"):
            story["report.json"] = (json.dumps(without_nan(kwargs["report"]), indent=2) + "\n").encode("utf-8")
        if kwargs.get("figure"):
            story[kwargs["figure"]] = Path(self.args.output_dir, kwargs["figure"])
        push = partial(
            push_student, self.args.output_dir, str(self.hub_model_id),
            message=commit_message or "Co-supervised student", story=story, revision=revision,
            token=token or self.args.hub_token,
        )  # fmt: skip
        pushed: list[CommitInfo | Future[CommitInfo]] = []

        def publish() -> None:
            self.create_model_card(**kwargs, branch=revision)
            pushed.append(push() if blocking else HfApi().run_as_future(push))

        # All of it in one process; the others must not wait for it where it fails.
        self._processes.on_first(publish)
        return pushed[0] if pushed else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave checkpoints here: they hold pickles, and are of one level."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        report: Mapping[str, Any] | None = None,
        figure: str | None = None,
        branch: str | None = None,
    ) -> None:
        """Write a model card of what is known: teachers, levels, training arguments, and what was measured.

        A card in `output_dir` that was edited by hand is kept, and this one is merged into it.

        Args:
            language (`str`, *optional*):
                Language of the model's texts.
            license (`str`, *optional*):
                Licence of the model; left out where it is not given.
            tags (`str` or `list[str]`, *optional*):
                More tags.
            model_name (`str`, *optional*):
                Title of the card. Defaults to the name of the output folder.
            finetuned_from (`str`, *optional*):
                The pre-trained student. Defaults to what the model was loaded from, where that is on the Hub.
            tasks (`str` or `list[str]`, *optional*):
                Not used: the pool tells the task.
            dataset_tags (`str` or `list[str]`, *optional*):
                Hub ids of the unlabelled data.
            dataset (`str` or `list[str]`, *optional*):
                What the report was measured on.
            dataset_args (`str` or `list[str]`, *optional*):
                Its split.
            report (`Mapping[str, Any]`, *optional*):
                What [`~evaluation.merge_reports`] gave: accuracies and PGR of the methods, with seeds and levels.
            figure (`str`, *optional*):
                Name of a picture in `output_dir`, `pgr.png` or `teacher_shares.png`.
            branch (`str`, *optional*):
                Where the student is pushed to, if not to the main branch.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "language": language,
            "license": license,
            "tags": _as_list(tags),
            "report": report,
            "figure": figure,
            "hub_branch": branch or self.args.hub_revision,
            "dataset_name": next(iter(_as_list(dataset)), None),
            "dataset_split": next(iter(_as_list(dataset_args)), None),
        }
        facts = self._card_facts() | given
        facts["datasets"] = list(dict.fromkeys([*facts["datasets"], *_as_list(dataset_tags)]))
        facts["name"] = model_name or facts["name"]
        facts["base_model"] = finetuned_from or facts["base_model"]
        write_card(model_card(facts), self.args.output_dir)

    def _card_facts(self) -> dict[str, Any]:
        """What the trainer knows of its student; folders of this machine are nobody's business."""
        run, student = self.history.run, self.history.run["student"]
        return {
            "name": str(self.hub_model_id or Path(self.args.output_dir).absolute().name).split("/")[-1],
            "hub_model_id": self.hub_model_id or self.args.hub_model_id,
            "modality": "text" if self.processor.is_text else "image",
            "library_name": "timm" if self.model.config.model_type == "timm_wrapper" else "transformers",
            "base_model": student.get("model"),
            "base_model_revision": student.get("revision"),
            "base_model_commit": student.get("commit"),
            "student_training": self.args.student_training,
            "labels": list(self.pool.labels),
            "num_examples": len(self.pool),
            "pool": run["pool"].get("repo_id"),
            "pool_revision": run["pool"].get("commit"),
            "datasets": [run["source"]["dataset"]] if "dataset" in run["source"] else [],
            "has_adapter": isinstance(self.model, PeftModel),
            "teachers": [
                {**teacher.to_dict(), **known} for teacher, known in zip(self.pool.hierarchy.teachers, run["teachers"])
            ],
            "levels": [
                {
                    "level": record["level"],
                    "assignment": self._name_assignment(record["level"]),
                    "keep_rate": record["consistency/keep_rate"],
                    "num_kept": record["consistency/num_kept"],
                    "teachers": {
                        name: record[f"assignment/{name}"]
                        for name in self.pool.source_names
                        if f"assignment/{name}" in record
                    },
                }
                for record in self.history.records
            ],
            "hyperparameters": self.args.changed_arguments() | self._name_functions(),
            "versions": {
                "hf_cosupervise": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        }

    def _name_functions(self) -> dict[str, str]:
        functions = {name: getattr(self, name) for name in ("loss_func", "assign_func", "keep_func")}
        return {
            name: getattr(function, "__name__", type(function).__name__)
            for name, function in functions.items() if function is not None
        }  # fmt: skip

    def _name_assignment(self, level: int) -> str:
        return (
            level_assignment(self.args, level)
            if not level
            else self._name_functions().get("assign_func", level_assignment(self.args, level))
        )


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

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Give the numbers of the `Trainer`'s own log, and begin anew."""
        mean = float(gather(torch.as_tensor(self.since)).mean()) / max(self.num_since, 1)
        self.total, self.num_steps = self.total + mean * self.num_since, self.num_steps + self.num_since
        self.since, self.num_since = 0.0, 0
        logs = {"loss": mean, "learning_rate": self.learning_rate}
        return logs if self.norm is None else {**logs, "grad_norm": self.norm}

    def mean(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> float:
        if self.num_since:
            self.read(gather)
        return self.total / max(self.num_steps, 1)


def _pseudolabels(pool: PseudolabelPool, plan: LevelPlan, hard: bool, rows: np.ndarray) -> np.ndarray:
    """Give what is trained on; a plain function, so that workers of any start method can take it along."""
    probs = pool.pseudolabels(plan.assigned_teacher[rows], rows, hard=hard)
    if plan.relabelled is not None:
        own = plan.relabelled[rows]
        probs[own >= 0] = np.eye(probs.shape[1], dtype=np.float32)[own[own >= 0]]
    return probs


def _sparse_pseudolabels(
    pool: PseudolabelPool, plan: LevelPlan, hard: bool, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the same without the labels that the teachers left out."""
    return pool.sparse_pseudolabels(plan.assigned_teacher[rows], rows, hard=hard)


def _pays_sparse(pool: PseudolabelPool, plan: LevelPlan) -> bool:
    """Tell whether rows of k labels are cheaper than rows of all; an ensemble has no stored rows."""
    num_teachers = len(pool.hierarchy.teachers)
    k = pool.label_ids(pool.hierarchy.names[0]).shape[1]
    is_narrow = pool.has_one_k and 4 * k <= pool.hierarchy.num_labels
    return is_narrow and plan.relabelled is None and bool((plan.assigned_teacher < num_teachers).all())


def _read_batches(batch_sampler: Any, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Give the rows of all batches of an epoch."""
    sampler: Any = getattr(batch_sampler, "sampler", None)
    is_plain = type(batch_sampler) is BatchSampler and type(sampler) is SeedableRandomSampler
    if not is_plain or sampler.replacement or len(sampler) != len(rows):
        return [rows[batch] for batch in batch_sampler]
    # What the sampler does, without an iterator that gives one number at a time.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(sampler.initial_seed + sampler.epoch))
    sampler.set_epoch(sampler.epoch + 1)
    return rows[order].split(batch_sampler.batch_size)[: len(batch_sampler)]


def _merge_equal_groups(optimizer: torch.optim.Optimizer) -> None:
    """Keep weight and bias in one group where their options are equal: one kernel per step then updates both."""
    first, *others = optimizer.param_groups
    for group in others:
        if {**group, "params": None} == {**first, "params": None}:
            first["params"] = [*first["params"], *group["params"]]
            optimizer.param_groups.remove(group)


def _pseudolabel_losses(logits: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy `(batch,)` against what the collator gave."""
    if "target_ids" not in targets:
        return soft_cross_entropy(logits, targets["target_probs"].float())
    return sparse_soft_cross_entropy(logits, *(targets[name] for name in TARGETS))


def _as_targets(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor | SparseTargets:
    return tensors[0] if len(tensors) == 1 else SparseTargets(*tensors)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _describe_run(student: dict[str, Any], pool: PseudolabelPool, num_processes: int) -> dict[str, Any]:
    """What a run is made of, at the commits that everything was pinned to; folders are nobody's business."""
    return {
        "num_processes": num_processes,
        "student": student,
        "teachers": [describe_teacher(pool, name) for name in pool.hierarchy.names],
        "pool": {} if pool.repo_id is None else {"repo_id": pool.repo_id, "commit": pool.commit},
        "source": dict(pool.source or {}),
    }


def describe_teacher(pool: PseudolabelPool, name: str) -> dict[str, Any]:
    """Tell which weights spoke for a teacher, as cards and histories show it.

    Args:
        pool (`PseudolabelPool`):
            The pool.
        name (`str`):
            Name of a teacher.

    Returns:
        `dict[str, Any]`: `name`, `level`, `model` (a Hub id or a column; `None` for a folder of this machine),
        `revision` (as it was asked for) and `commit`, where they are known.
    """
    teacher = pool.hierarchy.teachers[pool.hierarchy.index(name)]
    return {
        "name": name, "level": teacher.level, "model": pool.published_model(teacher), "revision": teacher.revision,
        "commit": pool.facts.get(name, {}).get("commit"),
    }  # fmt: skip


def _accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy(prediction.predictions.argmax(axis=1), prediction.label_ids)}


def _lora_config(args: CoSupervisedConfig) -> LoraConfig:
    return LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules) or None,
    )  # fmt: skip


def _read_weights(pool: PseudolabelPool, column: str) -> np.ndarray:
    """Give the examples' weights, float64."""
    values = np.asarray(pool.column(column))
    is_number = values.dtype.kind in "iuf"
    if not is_number or not np.isfinite(values).all() or (values < 0).any() or not (values > 0).any():
        found = f"{values.min()}..{values.max()}" if is_number else f"{values.dtype.name} values"
        raise ValueError(
            f"`weight_column` '{column}' must hold finite numbers of at least 0, and not all 0, got {found}. Correct "
            "them, or name another column."
        )
    return values.astype(np.float64)


def _check_levels(pool: PseudolabelPool, args: CoSupervisedConfig, has_own_assignment: bool) -> None:
    """Refuse an assignment or rejection that cannot work on this pool, before any work starts."""
    hierarchy = pool.hierarchy
    if len(args.assignment) not in (1, hierarchy.num_levels):
        raise ValueError(
            f"`assignment` must hold one name, or one for each of the {hierarchy.num_levels} levels, "
            f"got {args.assignment}."
        )
    if args.rejection_k is not None:
        check_top_k_value(args.rejection_k, hierarchy.num_labels)
    if len(hierarchy.levels[0]) > 1 and level_assignment(args, 0) != "ensemble":
        raise ValueError(
            f"A root level of several teachers ({[teacher.name for teacher in hierarchy.levels[0]]}) needs the "
            f"assignment 'ensemble', got {level_assignment(args, 0)!r}: there is no student yet to choose among them."
        )
    for level in range(1, hierarchy.num_levels if not has_own_assignment else 1):
        _check_assignment(pool, args, level, level_assignment(args, level))


def _check_assignment(pool: PseudolabelPool, args: CoSupervisedConfig, level: int, method: str) -> None:
    teachers = pool.hierarchy.levels[level]
    if (
        method in ("scope", "oracle_scope")
        and len(teachers) > 1
        and all(teacher.scope is None for teacher in teachers)
    ):
        raise ValueError(
            f"Assignment {method!r} at level {level} needs teachers with a `scope`, got none among "
            f"{[teacher.name for teacher in teachers]}. Give them scopes, or use 'agreement'."
        )
    if method in ("metadata", "oracle_domain"):
        column = ORACLE_DOMAIN if method == "oracle_domain" else args.metadata_column
        if column is None:
            raise ValueError(
                f"Assignment 'metadata' at level {level} needs `metadata_column`, got none. Name the column."
            )
        pool.column(column)
        if all(teacher.domains is None for teacher in teachers):
            raise ValueError(f"Assignment {method!r} at level {level} needs teachers with `domains`, got none.")
    if method in ("oracle_scope", "oracle_loss") and pool.oracle_labels is None:
        raise ValueError(
            f"Assignment {method!r} needs `oracle_label` in the pool, got none. Build it with `oracle_column`."
        )


def _match_inputs(pool: PseudolabelPool, train_dataset: Dataset | None, input_column: str | None) -> Dataset:
    """Give the inputs alone, in the order of the pool; a label column stays behind."""
    dataset = pool.inputs if train_dataset is None else train_dataset
    if (
        dataset is None
        or train_dataset is None
        and not set(dataset.column_names) - {"id", ORACLE_LABEL, ORACLE_DOMAIN}
    ):
        raise ValueError("`train_dataset` is needed: the pool holds no inputs. Give the data that it was built from.")
    column = find_input_column(dataset, input_column)
    if train_dataset is not None:
        ids = np.asarray(list(dataset["id"]) if "id" in dataset.column_names else row_keys(dataset, column))
        if len(ids) != len(pool):
            raise ValueError(
                f"`train_dataset` and `pool` must hold the same examples, got {len(ids)} and {len(pool)}. "
                "Use the data that the pool was built from, or `pool.select`."
            )
        rows = match_ids(ids, pool.ids, "`train_dataset`")
        dataset = dataset if np.array_equal(rows, np.arange(len(rows))) else dataset.select(rows)
    return dataset.select_columns([column])


def _check_student(model: Any, pool: PseudolabelPool) -> None:
    """See that the head fits the task, and name its labels."""
    num_labels = int(model.config.num_labels)
    if num_labels != pool.hierarchy.num_labels:
        raise ValueError(
            f"The student must have {pool.hierarchy.num_labels} labels like the pool, got {num_labels}. "
            "Load it with `load_student(model, pool.labels)`."
        )
    names = [str(model.config.id2label[index]) for index in range(num_labels)]
    generic = [f"LABEL_{index}" for index in range(num_labels)]
    if names not in (generic, list(pool.labels)):
        raise ValueError(
            f"The student's labels must be those of the pool in the same order, {list(pool.labels)[:8]}, "
            f"got {names[:8]}. "
            "Load it with `load_student(model, pool.labels)`."
        )
    model.config.id2label = dict(enumerate(pool.labels))
    model.config.label2id = {name: index for index, name in enumerate(pool.labels)}
    if model.config.model_type == "timm_wrapper":
        model.config.label_names = list(pool.labels)  # timm's own name for them, which wins when it is loaded again
