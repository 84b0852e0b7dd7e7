"""What the arguments inherited from `TrainingArguments` may be here: each works, or is refused before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import trainer_log_levels

# What a number must be, in words and as a test, and the fields that hold one.
Numbers = Iterable[tuple[str, type, Callable[[Any], bool], tuple[str, ...]]]
_NUMBERS: Numbers = (
    (
        "a finite number above 0",
        Real,
        lambda value: 0 < value < math.inf,
        ("learning_rate", "adam_epsilon", "logging_steps", "eval_steps", "save_steps", "neftune_noise_alpha"),
    ),
    (
        "a finite number of at least 0",
        Real,
        lambda value: 0 <= value < math.inf,
        ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"),
    ),
    (
        "a number of at least 0 and below 1",
        Real,
        lambda value: 0 <= value < 1,
        ("adam_beta1", "adam_beta2", "label_smoothing_factor"),
    ),
    (
        "a whole number of at least 1",
        Integral,
        lambda value: value >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("save_total_limit", "eval_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps"),
            *("ddp_timeout", "ddp_bucket_cap_mb"),
        ),
    ),
    ("a whole number of at least 0", Integral, lambda value: value >= 0, ("dataloader_num_workers",)),
    ("a whole number from 0 to 2**32 - 1", Integral, lambda value: 0 <= value < 2**32, ("seed", "data_seed")),
    ("-1 (no limit), or a whole number of at least 1", Integral, lambda v: v == -1 or v >= 1, ("max_steps",)),
)
# What stays off, and why.
_HALF = "it leaves the student itself in half precision. Use `bf16`"
_OFF = {
    "auto_find_batch_size": "another batch size makes another student. Set `per_device_train_batch_size`",
    "bf16_full_eval": _HALF,
    "fp16_full_eval": _HALF,
    "enable_jit_checkpoint": "a run that was ended goes on by itself. Use `train(resume_from_checkpoint=True)`",
    "ignore_data_skip": "a level that is gone on with would see its examples in another order. Leave it out",
    "remove_unused_columns": "the collator reads the raw columns. Leave it out",
    "restore_callback_states_from_checkpoint": "a run goes on with the callbacks that it is given. Leave it out",
    "save_only_model": "a checkpoint is there to go on from, which needs the optimizer. Leave it out",
}
# What else a field must be, in words and as a test.
_CHOICES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "dataloader_multiprocessing_context": (
        "'fork', 'forkserver' or 'spawn'",
        lambda value: value in (None, "fork", "forkserver", "spawn"),
    ),
    "include_for_metrics": (
        "a list of 'inputs' and 'loss'",
        lambda value: isinstance(value, list) and {*value} <= {"inputs", "loss"},
    ),
    "label_names": ("['labels'], as the collator calls them", lambda value: value in (None, ["labels"])),
    "log_level": (f"one of {list(trainer_log_levels)}", lambda value: value in trainer_log_levels),
    "log_level_replica": (f"one of {list(trainer_log_levels)}", lambda value: value in trainer_log_levels),
    # From the command line it comes as text, which the parent reads.
    "lr_scheduler_kwargs": (
        "a dictionary",
        lambda value: value is None or isinstance(value, dict) or isinstance(value, str) and value.startswith("{"),
    ),
    "optim_args": (
        "`name=value` pairs with commas between them",
        lambda value: not value or isinstance(value, str) and all("=" in pair for pair in value.split(",")),
    ),
    "parallelism_config": ("a `ParallelismConfig`", lambda value: value is None or hasattr(value, "total_size")),
    "torch_compile_backend": (
        "a backend that accelerate knows, such as 'inductor'",
        lambda value: value is None or str(value).upper() in DynamoBackend.list(),
    ),
    # Lengths are not known before a batch is read.
    "train_sampling_strategy": ("'random' or 'sequential'", lambda value: value in ("random", "sequential")),
}


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether it is one; `True` and `False` are none here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def default_of(item: Field) -> Any:
    """What a field is where nobody gives it."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def check_numbers(args: TrainingArguments, numbers: Numbers) -> None:
    """See that numbers are in their range; None passes where it is the default."""
    defaults = {item.name: default_of(item) for item in fields(args)}
    for wanted, kind, fits, names in numbers:
        for name in names:
            value, default = getattr(args, name), defaults[name]
            if value is None and default is None or is_number(value, kind) and fits(value):
                continue
            advice = "" if default is None else f" for {default}"
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}. Leave it out{advice}.")


def check_inherited(args: TrainingArguments) -> None:
    """Refuse what would be wrong in silence, late, or by an error from inside; called before the parent looks."""
    for item in fields(TrainingArguments):
        value = getattr(args, item.name)
        # A text such as "False" would count as True.
        if isinstance(item.default, bool) and not isinstance(value, bool):
            raise ValueError(f"`{item.name}` must be True or False, got {value!r}. Write it without quotes.")
    check_amounts(args)
    for name, reason in _OFF.items():
        if getattr(args, name, False):  # older releases lack some
            raise ValueError(f"`{name}` must stay False: {reason}.")
    for name, (wanted, fits) in _CHOICES.items():
        if not fits(value := getattr(args, name)):
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}. Leave it out.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if (value := getattr(args, name)) and not args.dataloader_num_workers:
            raise ValueError(f"`{name}` is for `dataloader_num_workers` above 0, got {value!r} with 0. Leave it out.")


def check_read(args: TrainingArguments) -> None:
    """Refuse what the parent reads and only the `Trainer` would refuse; called after the parent looked."""
    if unknown := [name for name in args.report_to if name not in INTEGRATION_TO_CALLBACK]:
        known = sorted(INTEGRATION_TO_CALLBACK)
        raise ValueError(f"`report_to` must name trackers, {known}, got {unknown[0]!r}. Correct the name.")
    for name in {*args.report_to} - {*get_available_reporting_integrations()}:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:  # names the package
            raise ValueError(
                f"`report_to` must name trackers that are installed, got {name!r}: {str(error).rstrip('.')}. Install "
                "it, or leave it out."
            ) from error
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        return  # wait for evaluations, which the parent asks for
    # Made once for nothing: what a schedule lacks or does not take shows before any work. Any optimizer will do.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    own = dict(args.lr_scheduler_kwargs or {})
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=own)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs` must be what `lr_scheduler_type` '{args.lr_scheduler_type.value}' takes, got "
            f"{args.lr_scheduler_kwargs}: {error}."
        ) from error


def check_amounts(args: TrainingArguments) -> None:
    """Refuse numbers by which nothing, or nothing of use, would be trained."""
    check_numbers(args, _NUMBERS)
    epochs = args.num_train_epochs
    if not (is_number(epochs) and math.isfinite(epochs) and (epochs > 0 or args.max_steps >= 1)):
        raise ValueError(
            f"`num_train_epochs` must be a finite number above 0, or `max_steps` be given, got {epochs!r}: nothing "
            "would be trained."
        )


def check_together(args: TrainingArguments, model: torch.nn.Module, has_own_metrics: bool) -> None:
    """Refuse what does not fit this model, these metrics or what is installed."""
    asked = {
        f"`eval_do_concat_batches` {args.eval_do_concat_batches}": not args.eval_do_concat_batches,
        f"`batch_eval_metrics` {args.batch_eval_metrics}": args.batch_eval_metrics,
        f"`metric_for_best_model` {args.metric_for_best_model!r}": args.metric_for_best_model
        not in (None, *(prefix + name for name in ("loss", "accuracy", args.metric) for prefix in ("", "eval_"))),
    }
    # Our own measure wants all logits of a set, in one piece.
    if not has_own_metrics and (wrong := next((what for what, applies in asked.items() if applies), None)):
        raise ValueError(f"{wrong} needs `compute_metrics` of your own, got none. Give it, or leave that out.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:  # names the package that is missing, or the argument
        error.add_note(f"`optim` '{args.optim}' cannot be had. Install what it needs, or choose another.")
        raise
