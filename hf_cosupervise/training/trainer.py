"""Co-supervised training: `train` goes down the hierarchy; run, student, loss and fast fit of a head are held."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, PredictionOutput, TrainOutput

from ..data.inputs import InputProcessor
from ..method.losses import LossFunction, hard_cross_entropy
from ..pool.derived import smoothed_pool
from ..pool.pseudolabels import PseudolabelPool
from ..processes import Processes
from ..students.student import Student, label_inputs, open_student, prediction_measure
from .advice import explain_lone_example, explain_memory
from .callbacks import LevelCallbackHandler
from .checkpointing import explain_checkpoint, explained, read_back, sealing
from .checks import check_arguments, check_first, check_student, match_inputs, read_weights, refuse_search
from .collator import ROW, DataCollatorForCoSupervision, split_batch
from .committee import TrainedCommittee, train_members
from .config import CoSupervisedConfig
from .head_fitter import FitEvents, HeadFitter, outside_of_fold, why_not_on_features
from .level_loss import LevelLoss, pseudolabel_losses
from .plan import LevelPlan, plan_by_student, plan_level
from .plan_rules import AssignFunction, KeepFunction
from .publishing import describe_run, export, name_functions, open_student_repo, push
from .run import RUN_DIR, TrainingRun, describe_settings
from .self_training import SelfTraining
from .student_card import make_card, student_facts

logger = get_logger(__name__)


class CoSupervisedTrainer(Trainer):
    """Train one student on the pseudolabels of a hierarchy of teachers, without ground truth.

    `train()` goes down the levels. At each it asks the student so far which teacher to trust on each example
    ([`prepare_level`]), rejects pseudolabels that student and teachers do not agree on, and trains on the rest
    ([`train_level`]) with a new optimizer, schedule and shuffle order. What comes out is an ordinary model.
    Source: Liu and Alahi, arXiv 2402.15505.

    Args:
        model (`str`, `os.PathLike`, `PreTrainedModel` or `PeftModel`):
            The student: a Hub id or folder, which gets a fresh head, `"linear"` or `"mlp"` for vectors, or a model.
            A model is trained in place, in float32, as by the parent: another run of it goes on from there.
        args (`CoSupervisedConfig`, *optional*):
            What to do. Defaults write to `trainer_output`.
        data_collator (`DataCollatorForCoSupervision`, *optional*):
            Made from `processing_class` by default.
        train_dataset (`datasets.Dataset`, *optional*):
            The inputs, where the pool has none: matched by `id`, or by content where it has no such column.
        eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            Inputs with a label column, for `evaluate`. Never used to choose anything by itself.
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*):
            The student's; loaded with it where that is an id.
        pool (`PseudolabelPool`):
            What the teachers say.
        input_column (`str` or `list[str]`, *optional*):
            The column that the student reads, or those of numbers. Found by itself where only one can be meant.
        peft_config (`peft.LoraConfig`, *optional*):
            Adapters for `student_training="lora"`, instead of the `lora_…` fields.
        loss_func (`Callable`, *optional*):
            A loss of your own, instead of `args.loss`: from logits and pseudolabels, `(batch, num_labels)` both, and
            rows of the pool `(batch,)` to losses `(batch,)`. Unlike `compute_loss_func` it is fitted on features too.
        assign_func, keep_func (`Callable`, *optional*):
            An assignment and a rejection of your own for the levels below the root, instead of `args.assignment` and
            `args.rejection`: see [`plan_rules.AssignFunction`] and [`plan_rules.KeepFunction`]. Both are called for
            chunks of 1,024 rows, on the CPU.
        kwargs: Passed on to [`~transformers.Trainer`].

    Raises:
        ValueError: If pool, data, student and configuration do not fit together.
        TypeError: If `args` is not a [`CoSupervisedConfig`].
    """

    _tag_names = ["co-supervised-learning", "weak-to-strong"]
    hyperparameter_search = refuse_search
    args: CoSupervisedConfig
    callback_handler: LevelCallbackHandler
    control: TrainerControl
    state: TrainerState
    level_loss: LevelLoss  # of the level in training

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
        input_column: str | list[str] | None = None,
        peft_config: LoraConfig | None = None,
        loss_func: LossFunction | None = None,
        assign_func: AssignFunction | None = None,
        keep_func: KeepFunction | None = None,
        **kwargs: Any,
    ) -> None:
        args = check_first(args, kwargs, pool, assign_func, keep_func)
        self.pool = self._own_pool = pool  # that in use may be smoothed over neighbours
        self.loss_func, self.assign_func, self.keep_func = loss_func, assign_func, keep_func
        functions = {"loss_func": loss_func, "assign_func": assign_func, "keep_func": keep_func}
        inputs = match_inputs(pool, train_dataset, input_column)
        self._given = None if train_dataset is None else inputs  # in the order of the pool
        (self.input_column,) = inputs.column_names
        examples = inputs.add_column(ROW, np.arange(len(pool)))  # by which a shuffled batch finds its pseudolabels
        model, processing_class, origin = open_student(model, pool.labels, args, processing_class, peft_config, inputs)
        self.processor = InputProcessor(processing_class, model.config)
        check_student(args, model, self.processor, inputs, origin, has_own_metrics="compute_metrics" in kwargs)
        data_collator = data_collator or DataCollatorForCoSupervision(self.processor, self.input_column)
        kwargs = {"compute_metrics": prediction_measure(args.metric), "processing_class": processing_class, **kwargs}
        # Every column that is left would reach the model, and some models refuse what they do not know.
        eval_dataset = label_inputs(eval_dataset, self.input_column, pool.labels, self.processor)
        self.processes = Processes(args.process_index, args.world_size, args.device)  # a push asks for it at once
        super().__init__(model, args, data_collator, examples, eval_dataset, **kwargs)
        # The loss is a mean over the batch: the Trainer must divide it by the accumulation steps itself, which it does
        # not where `forward` takes any argument, as ViT's does. Older releases read the first flag only.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        # The parent trains once per level; trackers are to hear of one training.
        self.callback_handler = LevelCallbackHandler(self.callback_handler)
        self._is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        first, local_first = self.is_world_process_zero(), self.is_local_process_zero()
        self._new_state = partial(TrainerState, is_world_process_zero=first, is_local_process_zero=local_first)
        path, facts = Path(args.output_dir) / RUN_DIR, describe_run(origin, pool, args.world_size)
        self.committee: TrainedCommittee | None = None  # once it is trained
        num_levels = 0 if args.method == "committee" else pool.hierarchy.num_levels  # its members have them
        self.run = TrainingRun(path, args, num_levels, facts, self.processes, self._new_state)
        # The student is made after the parent has put the model on its device, and of the model itself, unwrapped.
        task = self.processor, examples, self.input_column, pool.labels, args, path / "features"
        bare_model, prepare = self.accelerator.unwrap_model(self.model), self._prepare_inputs
        answered = np.any([pool.answered(name) for name in pool.hierarchy.names], axis=0)
        means: dict[str, Any] = {"answered": answered, "processes": self.processes, "prepare_inputs": prepare}
        self.student = Student(bare_model, *task, **means, disable_tqdm=bool(args.disable_tqdm) or not local_first)
        self._head_fitter: HeadFitter | None = None  # made at the first level, when features are needed
        self._weights = None if args.weight_column is None else read_weights(pool, args.weight_column)
        check_arguments(args, pool, self.student.head, self._why_not_on_features(), functions, self.compute_loss_func)
        self._functions = name_functions(**functions)
        self._settings = partial(describe_settings, args, pool, self.student.digest, self._functions)
        self.self_training = SelfTraining(pool, args, self.student, self.run)

    # --- the algorithm -----------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Go down the hierarchy: assign, select, train, and on to the next level.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                True to go on where an earlier run in this `output_dir` was cut off, or to begin where there is none.
                What it finished is not done again, and the student is the same as if it had not been cut off.

        Raises:
            FileExistsError: If `output_dir` holds another run, or another process works there.
            FloatingPointError: If the loss is no longer a number.
            ValueError: If a level keeps nothing to train on, or the run that is gone on with was begun otherwise.
        """
        if trial is not None or isinstance(resume_from_checkpoint, str):
            raise ValueError(
                "`train` takes `resume_from_checkpoint=True` or nothing: a run finds by itself where it was cut off."
            )
        with self.run.open(self._settings, resume=bool(resume_from_checkpoint)) as last:
            self.student.restore(last)  # as after the last finished stage, or as given
            self.state = self.run.story
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            if self.args.method == "committee":  # each member goes down the hierarchy by itself
                new = partial(CoSupervisedTrainer, self.student.model, processing_class=self.processing_class)
                known = self._own_pool, self._given, self.input_column, self.student, self.run, self.callback_handler
                self.committee = train_members(new, self.args, *known, resume=bool(resume_from_checkpoint))
            for stage in self.run.unfinished(self.self_training.why_stop):  # (level, round): a committee has none
                plan = self.prepare_level(*stage)  # E-step: who speaks, what is kept
                self.train_level(plan, ignore_keys_for_eval)  # M-step: a new student on what is kept
                self.finish_level(plan)
            output = self.run.close()
            self.state = self.run.story
            self.log(dict(output.metrics))
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return output

    def prepare_level(self, level: int, round: int = 0) -> LevelPlan:
        """Let the student so far choose a teacher for each example, and what to keep of it.

        Both count from 0. Below the root, `model` must be the student of the level above. Raises what [`train`] does.
        """
        self.run.check_turn(level)
        self.run.claim(self._settings)
        args = self.args
        with explain_memory(f"Predicting before level {len(self.plans)}", args, "per_device_eval_batch_size"):
            if args.teacher_neighbors and self.pool is self._own_pool:  # smoothed once, not again at each level
                self.pool = smoothed_pool(self.pool, self.student.nearest(args.teacher_neighbors))
            if level == self.run.num_levels and args.self_training_rounds:
                return self.self_training.plan(round)
            if level == 0:  # there is no student yet, and nobody above to fall back to
                nobody, readable = np.full(len(self.pool), -1), self.student.readable
                return plan_level(self.pool, level, args, nobody, round=round, readable=readable)
            # Every round falls back to the level above, not to the round before: choices do not accumulate.
            above, add_up = self.plans[level - 1].assigned_teacher, self.processes.sum_array
            own: dict[str, Any] = {"assign_func": self.assign_func, "keep_func": self.keep_func}
            return plan_by_student(self.pool, level, args, above, self.student, add_up, round=round, **own)

    def train_level(self, plan: LevelPlan, ignore_keys_for_eval: list[str] | None = None) -> TrainOutput:
        """Train the student on what [`prepare_level`] kept. Raises what [`train`] does."""
        self.run.claim(self._settings)
        kept = np.flatnonzero(plan.keep_mask)
        self.train_dataset = self.student.examples.select(kept)  # of which the parent makes its dataloader
        has_own = self.compute_loss_func is not None
        self.level_loss = LevelLoss(self.pool, plan, self.args, self.loss_func, self._weights, has_own, self.processes)
        self.level_loss.fraction_done = lambda: min(self.state.global_step / max(self.state.max_steps, 1), 1.0)
        self.data_collator.pseudolabels = self.level_loss.pseudolabels  # and with it every worker
        if not self.args.warm_start:  # what an earlier level got wrong is not to be unlearnt
            self.student.start_anew()
        reason = self._why_not_on_features()
        with self._level_arguments(plan):
            # What early-learning regularization remembers of each example is not in a checkpoint.
            can_resume = reason is not None and self.args.loss != "early_learning_regularization"
            checkpoint = self.run.begin_stage(plan, can_resume)
            if checkpoint is None:
                self.log({"level": plan.level, "round": plan.round, **plan.metrics})
            else:  # it was logged before the run was cut off
                self.level_loss.take_up(*self.run.take_up(checkpoint))
            self._tell("on_level_begin", plan=plan)
            with explain_memory(f"Training level {len(self.plans)}", self.args, "per_device_train_batch_size"):
                if reason is None:
                    output = self._fit_head(kept)
                else:
                    logger.info(f"Level {plan.level} is trained by the standard loop: {reason}.")
                    # Bits hang on the layout of weights, which a run for features may have changed.
                    self.student.model.to(memory_format=torch.contiguous_format)
                    with explain_lone_example(plan.level, len(kept)), explain_checkpoint(checkpoint):
                        output = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
                    # The parent's mean is over its own steps, which after a crash are not all.
                    output = output._replace(training_loss=self.level_loss.mean())
        self.student.folds = self._fit_folds(plan, kept) if reason is None and self.run.num_folds(plan) else []
        self._check_loss()  # before anything is written: a level of NaN must not count as finished
        record = self.run.record(plan, output, self.state)
        self.state = self.run.story  # the parent has made a state of its own for the level
        self._tell("on_level_end", plan=plan, metrics=record)
        return output

    def finish_level(self, plan: LevelPlan) -> None:
        """Keep the student of a level (or a round) and its plan: the next one, or another run, goes on from here."""
        self.run.save(plan, self.student.tensors(), self.student.fold_tensors())
        is_whole, strategy = plan.round == self.run.num_rounds(plan.level) - 1, self.args.hub_strategy
        # The last level is for the user to push, with a report.
        if self.args.push_to_hub and strategy == HubStrategy.EVERY_SAVE and is_whole and not self.run.is_last(plan):
            self.push_to_hub(commit_message=f"Student of level {plan.level}")

    # --- one level ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _level_arguments(self, plan: LevelPlan) -> Iterator[None]:
        """Set what differs from level to level: epochs, shuffle order, place of checkpoints, a new optimizer."""
        output_dir, num_train_epochs = self.args.output_dir, self.args.num_train_epochs
        number = len(self.history.records)  # rounds count too, so that no two stages have one order
        self.optimizer = self.lr_scheduler = None  # or the moments of the level before would go on
        set_seed(self.args.seed + 1000 * number)  # dropout must not hang on what ran before
        # `args.data_seed` is read once, when the Trainer is made, so the order of a level is set where it is used.
        self.accelerator.dataloader_config.data_seed = self.args.data_seed + 1000 * number
        if self.args.max_steps <= 0:  # fewer examples, more epochs: about as many steps at every level
            scaled = num_train_epochs / plan.keep_rate  # rounded down as in the paper's code, but never to none
            self.args.num_train_epochs = math.floor(scaled) if scaled >= max(num_train_epochs, 1) else scaled
        # Steps are counted anew at each level: in one folder its checkpoints would take the names of another's.
        self.args.output_dir = str(self.run.stage_dir(plan.level, plan.round))
        self.callback_handler.in_level = True
        try:
            yield
        finally:
            self.args.output_dir, self.args.num_train_epochs = output_dir, num_train_epochs
            self.callback_handler.in_level = False

    def _why_not_on_features(self) -> str | None:
        facts = {"has_own_loss": self.compute_loss_func is not None, "is_sharded": self._is_sharded}
        has_own = type(self.data_collator) is not DataCollatorForCoSupervision
        return why_not_on_features(self.args, self.student.head, has_own_collator=has_own, **facts)

    def _fit_head(self, kept: np.ndarray) -> TrainOutput:
        """Fit the head on features, with the order, optimizer, schedule, logs and callbacks of the standard loop."""
        if self._head_fitter is None:
            held = self.student.example_features(), self.args, self.processes, self.student.readable
            self._head_fitter = HeadFitter(self.student.head, *held, self.student.known)  # type: ignore[arg-type]

        def log(logs: dict[str, float], control: TrainerControl) -> TrainerControl:
            self.control = control
            self.log(logs)
            return self.control

        self.state = self._new_state()  # as the parent makes one: the steps of this level, from 0
        events = FitEvents(self.callback_handler, self.args, self.state, self.control, log)
        make = self.get_train_dataloader, self.create_optimizer, self.create_scheduler
        output = self._head_fitter.fit(kept, self.level_loss, events, *make)
        self.control = events.control
        return output

    def _fit_folds(self, plan: LevelPlan, kept: np.ndarray) -> list[nn.Linear]:
        """Fit a head for each fold on what a level kept outside of it, in silence; the student stays as it is."""
        student, loud = self.student.copy_head(), (self.callback_handler, self.control, self.state)
        self.callback_handler, heads, num_folds = self.callback_handler.silent(), [], self.run.num_folds(plan)
        try:
            for fold in range(num_folds):
                own = outside_of_fold(kept, fold, num_folds, plan.level)
                # A new control: that a callback has stopped the level is no reason to stop its folds.
                self.control, self.train_dataset = TrainerControl(), self.student.examples.select(own)
                self.level_loss.forget()  # what it remembers was said by the head before
                self.student.start_anew()
                with self._level_arguments(plan):
                    self._fit_head(own)
                heads.append(self.student.copy_head())
        finally:
            self.callback_handler, self.control, self.state = loud
            self.student.head.load_state_dict(student.state_dict())  # type: ignore[union-attr]
        return heads

    # Levels, features, history and checkpoints, inside `output_dir` (within a level another one) but not of the model.
    run_dir = property(attrgetter("run.path"), doc="`pathlib.Path`: See [`TrainingRun`].")
    history = property(attrgetter("run.history"), doc="[`LevelHistory`]: Records of all finished levels.")
    plans = property(attrgetter("run.plans"), doc="`list[LevelPlan]`: What each finished level was trained on.")
    feature_store = property(attrgetter("student.store"), doc="[`FeatureStore`]: See [`Student.store`].")
    pool_features = property(attrgetter("student.example_features"), doc="See [`Student.example_features`].")
    predict_log_probs = property(attrgetter("student.predict_log_probs"), doc="See [`Student.predict_log_probs`].")
    predict_labels = property(attrgetter("student.predict_labels"), doc="See [`Student.predict_labels`].")
    measure_accuracy = property(attrgetter("student.measure_accuracy"), doc="See [`Student.measure_accuracy`].")

    def load_level(self, level: int) -> None:
        """Put the student as it was at the end of a finished level into `model`, see [`TrainingRun.load`]."""
        self.student.put_back(self.run.load(level).student)

    # --- logging: one story over all levels --------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log numbers on the story of all levels, where steps go on counting."""
        if not self.callback_handler.in_level:
            super().log(logs, start_time)
            return
        if "train_runtime" in logs:  # a level's own summary is part of its record
            return
        if "loss" in logs:  # all processes add theirs up: not where only one of them may call this
            self._check_loss()
        level, story = self.state, self.run.story
        before = story.global_step, story.epoch
        if level is not story:  # the level in training comes on top of those that are finished
            story.global_step += level.global_step
            story.epoch = (story.epoch or 0.0) + (level.epoch or 0.0)
        self.state = story
        try:
            super().log(logs, start_time)
        finally:
            self.state = level
            story.global_step, story.epoch = before

    def _tell(self, event: str, **kwargs: Any) -> None:
        self.callback_handler.call_event(event, self.args, self.run.story, self.control, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Compute the mean loss against pseudolabels, or the cross-entropy against labels in evaluation."""
        if self.args.student_training == "probe":
            model.eval()  # a frozen backbone must not drift (BatchNorm) nor drop out
        targets, labels, rows = split_batch(inputs)
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            wanted = targets["target_probs"] if targets else labels
            loss = self.compute_loss_func(outputs, wanted, num_items_in_batch=None)
        else:
            with torch.autocast(outputs.logits.device.type, enabled=False):  # losses are float32 at any precision
                logits = outputs.logits.float()
                loss = self.level_loss(logits, targets, rows) if targets else hard_cross_entropy(logits, labels).mean()
        if targets:
            self.level_loss.watch(loss, ends_step=self.accelerator.sync_gradients)
        return (loss, outputs) if return_outputs else loss

    def _check_loss(self) -> None:
        self.level_loss.check(f"step {self.state.global_step} of level {len(self.history.records)}", str(self.run_dir))

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *_: Any, **__: Any) -> Any:
        """Run one batch without gradients; gives loss, logits and labels, each `None` where not known or wanted."""
        # The parent's gives the model all of a batch that has no labels, and timm's models refuse what is not theirs.
        inputs = self._prepare_inputs(inputs)
        targets, labels, _rows = split_batch(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits.float()
        loss = None
        if labels is not None or targets:
            losses = pseudolabel_losses(logits, targets) if labels is None else hard_cross_entropy(logits, labels)
            loss = losses.mean()
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    # --- evaluation, saving, publishing ------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the student on inputs with a label column, by default the trainer's `eval_dataset`."""
        # What is labelled already comes from the parent, which asks here again for each of several sets.
        is_known = eval_dataset is self.eval_dataset
        return super().evaluate(eval_dataset if is_known else self.student.label(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict with the student, and measure where the data has labels."""
        return super().predict(self.student.label_or_check(test_dataset), *args, **kwargs)

    # Both loaders of the parent lose weights of some models in silence, see `read_back`.
    def _load_best_model(self) -> None:
        best, parent = self.state.best_model_checkpoint, super()._load_best_model
        self.student.put_back(read_back(self.student.model, best, parent, is_sharded=self._is_sharded))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, parent = resume_from_checkpoint, partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.student.put_back(read_back(self.student.model, folder, parent, is_sharded=self._is_sharded))

    _load_optimizer_and_scheduler = explained(Trainer._load_optimizer_and_scheduler)
    _load_scaler = explained(Trainer._load_scaler)
    _load_rng_state = explained(Trainer._load_rng_state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Keep with a checkpoint what the parent does not know of: the story, and buffers that an adapter lacks."""
        self._check_loss()
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        told = {"log_history": self.run.story.log_history, **self.level_loss.told()}
        buffers = self.student.buffers() if isinstance(self.student.model, PeftModel) else None
        with sealing(folder, told, buffers, self.processes):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as an ordinary model, see [`export_student`]; with `args.push_to_hub`, push it as well."""
        if _internal_call:  # a checkpoint, which stays as the parent writes it
            return super().save_model(output_dir, _internal_call=True)
        self._export(output_dir or self.args.output_dir)
        if self.args.push_to_hub and output_dir in (None, self.args.output_dir):
            self.push_to_hub()

    def _export(self, folder: str) -> None:
        if self._is_sharded:
            return super().save_model(folder, _internal_call=True)
        export(self.student.model, folder, self.processing_class, self.processes)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the pickle of the arguments, which nobody reads and which would hold the user's token."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the model repository where there is none, and see that the token may write, before any work."""
        self.hub_model_id = open_student_repo(self.args, self.processes, token=token, private=private)

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

        All processes must call it; one of them pushes, see [`publishing.push`] and, for `kwargs`, `make_card`.
        """
        self.run.check_trained()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or private:
            self.init_hf_repo(token, private)
        self._export(self.args.output_dir)
        revision = revision or self.args.hub_revision
        options: dict[str, Any] = {"message": commit_message, "blocking": blocking, "revision": revision}
        options |= {name: kwargs.get(name) for name in ("report", "figure")}
        write_card = partial(self.create_model_card, **kwargs, branch=revision)
        what = self.args.output_dir, str(self.hub_model_id), self.history, write_card, self.processes
        return push(*what, token=token or self.args.hub_token, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave checkpoints here: they hold pickles, and are of one level."""

    def card_facts(self) -> dict[str, Any]:
        """Give what is known of the student for its card."""
        known = self.args, self.pool, self.history, self._functions, self.hub_model_id, self.model
        return student_facts(*known, self.processor.modality)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a model card of what is known and what is given, see [`student_card.make_card`]."""
        if self.is_world_process_zero():
            make_card(self.args.output_dir, self.card_facts(), *args, **kwargs)
