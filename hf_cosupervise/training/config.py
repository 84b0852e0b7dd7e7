"""What a user can choose about co-supervised training."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from numbers import Integral, Real
from typing import Annotated, Any, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy

from ..method.assignment import AGREEMENT_RULES
from ..method.metrics import METRICS
from ..method.published_losses import choose_loss
from ..method.rejection import SELECTION_RULES
from ..students.pooling import POOLINGS
from .inherited import Numbers, check_inherited, check_numbers, check_read, default_of, is_number
from .members import DECIDED_BY_MEMBERS, DEFAULT_MEMBERS, MEMBERS

ASSIGNMENTS = (
    "auto",
    "scope",
    "agreement",
    "metadata",
    "ensemble",
    "random",
    "oracle_scope",
    "oracle_domain",
    "oracle_loss",
)
REJECTIONS = (
    "none",
    "top_k",
    "parent_topk",
    "parent_confident",
    "student_entropy",
    "vote_entropy",
    "confidence_window",
)
# What a number must be, in words and as a test, and the fields that hold one.
_NUMBERS: Numbers = (
    (
        "a whole number of at least 0",
        Integral,
        lambda value: value >= 0,
        ("agreement_neighbors", "teacher_neighbors", "cross_fit_folds"),
    ),
    ("a whole number of at least 1", Integral, lambda value: value >= 1, ("lora_r", "lora_alpha", "rejection_k")),
    # Each round is a training, with a folder of its own.
    ("a whole number from 1 to 1000", Integral, lambda value: 1 <= value <= 1000, ("rounds_per_level",)),
    ("a whole number from 0 to 1000", Integral, lambda value: 0 <= value <= 1000, ("self_training_rounds",)),
    ("a number above 0 and below 1", Real, lambda value: 0 < value < 1, ("agreement_min_prob",)),
    ("a number above 0 and at most 1", Real, lambda value: 0 < value <= 1, ("rejection_share",)),
    ("a number of at least 0 and at most 1", Real, lambda value: 0 <= value <= 1, ("lora_dropout", "relabel_above")),
    ("a finite number above 0", Real, lambda value: 0 < value < math.inf, ("ridge_logit_scale",)),
)
_LISTS_OF_NAMES = ("assignment", "rejection", "lora_target_modules", "members")
# What an option may not count for, said in its annotation, where it counts for all of it otherwise. (Not in its
# metadata, which the parser of the command line takes for its own.)
# "resume": a run may be gone on with under another value. It says where the run is, and how loudly.
# "compare": it is no setting that makes a student another one.
# "publish": a card leaves it out.
# "ceiling": it means nothing to ground truth, which is one level of one-hot labels.
_PURPOSES = ("resume", "compare", "publish", "ceiling")
_NEUTRAL, _LOCAL, _NOT_FOR_CEILING = ("resume",), ("resume", "compare"), ("ceiling",)
# The same of the parent's fields, by how their names begin, for another release of transformers has others.
_INHERITED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("hub_", "push_to_hub", "use_cpu"): ("resume", "compare", "publish"),
    ("output_dir", "disable_tqdm", "dataloader_pin_memory"): _LOCAL,
    ("seed", "data_seed"): ("compare",),
    ("run_name", "project", "log_level", "logging_", "report_to", "trackio_", "save_total_limit", "ddp_"): _NEUTRAL,
    ("dataloader_num_workers", "dataloader_prefetch", "dataloader_persistent", "per_device_eval_batch_size"): _NEUTRAL,
}


def _option(default: Any, help: str) -> Any:
    """A field with what it is for, and with a list or dictionary of its own for each configuration."""
    if isinstance(default, list | dict):
        return field(default_factory=partial(copy.copy, default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class CoSupervisedConfig(TrainingArguments):
    """Configure [`CoSupervisedTrainer`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `learning_rate` 1e-3, `num_train_epochs` 20 per
    level, `per_device_train_batch_size` 100, cosine schedule, no clipping (`max_grad_norm` 0, which costs a small
    probe many points), `save_strategy` "no" (each finished level is kept anyway), `remove_unused_columns` False,
    `hub_strategy` "end" (one commit).
    `num_train_epochs` is divided by the keep rate of a level, so that the number of steps stays about constant;
    `max_steps` above 0 is the number of steps of each level and switches that off.

    Raises:
        ValueError: If a field has a value that it does not know.
    """

    # Defaults of the parent that do not suit the method
    learning_rate: float = _option(1e-3, "Peak learning rate of each level.")
    num_train_epochs: float = _option(20.0, "Epochs per level over the whole pool; divided by the level's keep rate.")
    per_device_train_batch_size: int = _option(100, "Batch size per device in training.")
    per_device_eval_batch_size: int = _option(64, "Batch size per device without gradients.")
    lr_scheduler_type: str = _option("cosine", "Schedule of each level.")
    max_grad_norm: float = _option(0.0, "Largest norm of the gradient; 0 for no clipping.")
    hub_strategy: str = _option("end", "When to push: at the 'end', or at 'every_save', which is after every level.")
    save_strategy: str = _option("no", "When to save checkpoints within a level. Finished levels are always kept.")
    remove_unused_columns: bool = _option(False, "The collator needs the raw columns, so this stays False.")
    ddp_find_unused_parameters: bool | None = _option(
        False, "Search for parameters without gradient in each step; frozen ones need none."
    )

    # The student
    student_revision: Annotated[str | None, _NEUTRAL] = _option(
        None, "Branch, tag or commit of a student that is named by its Hub id."
    )
    student_training: str = _option(
        "probe", "What is trained: 'probe' (a head on the frozen backbone), 'lora' (adapters) or 'full'."
    )
    pooling: str | None = _option(
        None,
        "What the linear head of a text student reads: 'mean' of the tokens, 'cls' (the first) or 'last'. Default: "
        "the head of its architecture.",
    )
    lora_r: int = _option(8, "Rank of the LoRA adapters.")
    lora_alpha: int = _option(16, "Scale of the LoRA adapters.")
    lora_dropout: float = _option(0.0, "Dropout of the LoRA adapters, 0 to 1.")
    lora_target_modules: list[str] = _option(
        [], "Names of the modules that get adapters. Empty: every linear layer of the backbone."
    )
    warm_start: bool = _option(False, "Let each level go on from the student before, not from a fresh head.")

    # One student, or several as one
    method: str = _option(
        "csl",
        "'csl' (co-supervision as published) or 'committee' (several students on one frozen backbone, each trained "
        "in another way, averaged into one linear head).",
    )
    members: list[str] = _option(list(DEFAULT_MEMBERS), f"What a committee is made of: some of {', '.join(MEMBERS)}.")

    # Assignment: which teacher speaks for which example
    assignment: Annotated[list[str], _NOT_FOR_CEILING] = _option(
        ["auto"],
        "How a level chooses its teachers: scope, agreement, metadata, ensemble, or for analysis random, "
        "oracle_scope, oracle_domain, oracle_loss; auto: scope where scopes tell its teachers apart, else agreement, "
        "and ensemble at a root of several. One for all levels, or one per level from the root.",
    )
    agreement_rule: Annotated[str, _NOT_FOR_CEILING] = _option(
        "ce_teacher_student", f"Distance from teacher to student: one of {AGREEMENT_RULES}."
    )
    agreement_min_prob: Annotated[float, _NOT_FOR_CEILING] = _option(
        1e-6, "Lowest probability inside the logarithms of the agreement rules, 0 to 1."
    )
    agreement_neighbors: Annotated[int, _NOT_FOR_CEILING] = _option(
        0,
        "Average each teacher's agreement over this many nearest examples in the backbone's features, for a linear "
        "head on a frozen backbone; 0: each example alone. 10 is a good value.",
    )
    metadata_column: Annotated[str | None, _NOT_FOR_CEILING] = _option(
        None, "Column of the pool that tells each example's domain, for 'metadata'."
    )
    rounds_per_level: Annotated[int, _NOT_FOR_CEILING] = _option(
        1, "How often a level below the root assigns, rejects and trains, at least 1."
    )

    # Rejection: which pseudolabels are trained on
    rejection: Annotated[list[str], _NOT_FOR_CEILING] = _option(
        ["top_k"],
        "'none', or what an example must pass to be kept: top_k, parent_topk, parent_confident, student_entropy, "
        "vote_entropy, confidence_window.",
    )
    rejection_k: Annotated[int | None, _NOT_FOR_CEILING] = _option(
        None, "k of top_k and parent_topk, below the number of labels. Default min(3, C-1)."
    )
    rejection_rule: Annotated[str, _NOT_FOR_CEILING] = _option(
        "loss_rank", "'loss_rank' keeps as many examples as agree, those of lowest loss; 'agreement_set' those."
    )

    rejection_share: Annotated[float, _NOT_FOR_CEILING] = _option(
        0.5, "Share of the examples that student_entropy keeps, above 0 to 1."
    )
    rejection_window: Annotated[list[float], _NOT_FOR_CEILING] = _option(
        [0.5, 1.0], "Lowest and highest confidence of a pseudolabel that confidence_window keeps."
    )
    relabel_above: Annotated[float | None, _NOT_FOR_CEILING] = _option(
        None,
        "A rejected example is trained on with the student's own label where the student is at least this sure of "
        "it, 0 to 1. Default: rejected examples stay out.",
    )

    # Training
    pseudolabels: Annotated[str, _NOT_FOR_CEILING] = _option(
        "soft",
        "Train on 'soft' or 'hard' pseudolabels. A hard one is the label that its teacher put first: of labels that "
        "are tied, as by a shared majority, the lowest, as by the `argmax` of the paper's code.",
    )
    loss: str = _option(
        "cross_entropy",
        "What is minimized: cross_entropy, kl_divergence, reverse_kl, confidence, product, adapt_conf, "
        "generalized_cross_entropy, early_learning_regularization or evidential.",
    )
    loss_kwargs: dict = _option({}, "Parameters of the loss by name, such as q or temperature.")
    weight_column: str | None = _option(
        None, "Column of the pool with a weight for each example's loss, at least 0; 1 each by default."
    )
    teacher_neighbors: Annotated[int, _NOT_FOR_CEILING] = _option(
        0,
        "Average each teacher's probabilities over this many nearest examples in the backbone's features, for a "
        "linear head on a frozen backbone; 0: each example alone.",
    )
    cross_fit_folds: Annotated[int, _NOT_FOR_CEILING] = _option(
        0,
        "Let heads that were not trained on an example choose its teacher and judge its pseudolabel: one more head "
        "per fold and level, for a linear head on a frozen backbone; 0: the student itself.",
    )
    self_training_rounds: Annotated[int, _NOT_FOR_CEILING] = _option(
        0,
        "How often, after the last level, the student is trained on own labels as well, of examples that no teacher "
        "answered or that were rejected; at most, and 0: not at all. 5 is a good value.",
    )
    fit_head_on_features: bool = _option(
        True, "Fit a linear head on features kept on disk, without running the backbone in every step."
    )
    features_dir: Annotated[str | None, _LOCAL] = _option(
        None, "Where features are kept, to share them between runs. Default: in the run."
    )
    features_dtype: str = _option("float32", "How features are kept: 'float32', or 'float16' for half the space.")
    head_solver: str = _option(
        "steps", "How a probe's head is fitted: 'steps' of `optim`, or 'ridge' (at once, in closed form)."
    )
    standardize_features: bool = _option(
        False,
        "Fit a head by steps on features less their mean, with a mean square of 1. The head that comes out is one of "
        "the features as they are.",
    )
    # With None, or the parser of the command line would take numbers alone, and fail on the default.
    ridge_alpha: float | str | None = _option(
        "auto",
        "Penalty of 'ridge', above 0, relative to the mean variance of a feature; 'auto': found at each level, by "
        "leave-one-out on the pseudolabels.",
    )
    ridge_logit_scale: float = _option(10.0, "Scale of the logits of 'ridge', above 0: its predictions lie near 0..1.")

    # Evaluation
    metric: Annotated[str, _NEUTRAL] = _option(
        "accuracy",
        "What is measured on labelled examples, and recovered by PGR: accuracy, balanced_accuracy, f1 (of label 1 of "
        "two), macro_f1, weighted_f1, mcc or worst_class_accuracy.",
    )

    def __post_init__(self) -> None:
        # As far as it can be seen: a default that somebody writes out is not told from none.
        self._given = {
            item.name for item in fields(self) if item.init and getattr(self, item.name) != default_of(item)
        }
        if not torch.accelerator.is_available():
            # bf16 runs on CPU too, and so do several processes, but the parent wants to be told, or each of them would
            # take itself for the only one; and pinned memory would only warn there.
            is_one_of_several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            self.use_cpu = self.use_cpu or self.bf16 or is_one_of_several  # type: ignore[has-type]
            self.dataloader_pin_memory = False
        check_inherited(self)
        try:
            super().__post_init__()
        except (ImportError, OSError, ValueError) as error:
            error.add_note("Training arguments must be what transformers takes. Correct that one, or leave it out.")
            raise
        check_read(self)
        # Without a seed of its own the shuffle order would hang on whatever used torch's global generator before.
        if self.data_seed is None:  # type: ignore[has-type]
            self.data_seed = self.seed
        self._check_names()
        check_numbers(self, _NUMBERS)
        self._check_window()
        self._check_alpha()
        self._check_loss()
        self._check_neighbors_and_folds()
        self._check_committee()
        # After the parent, which has made a `HubStrategy` of it.
        if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                "`hub_strategy` must be 'end' or 'every_save', got "
                f"{self.hub_strategy!r}: checkpoints hold pickles, which are never uploaded."
            )
        # Copies, so that a list that is changed in place counts as changed.
        self._settled = {item.name: copy.copy(getattr(self, item.name)) for item in fields(self) if item.init}

    def changed_arguments(self) -> dict[str, Any]:
        """Give by name what was chosen about the training; not where it runs or is published."""
        values = {name: getattr(self, name) for name in self._settled}
        return {
            name: asdict(value) if isinstance(value, AcceleratorConfig) else value
            for name, value in values.items()
            if (name in self._given or value != self._settled[name]) and name not in fields_without("publish")
        }

    def _check_names(self) -> None:
        for name in _LISTS_OF_NAMES:
            value = [] if getattr(self, name) is None else getattr(self, name)
            # One name is as good as a list of it, from a file as from the command line.
            names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [None]
            if not all(isinstance(item, str) for item in names):
                raise ValueError(f"`{name}` must be a name or a list of names, got {value!r}. Write names in quotes.")
            setattr(self, name, names)
        for name in ("student_revision", "metadata_column", "weight_column"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"`{name}` must be a name, got {value!r}. Put it in quotes, or leave it out.")
        for name, known in (
            ("student_training", ("probe", "lora", "full")),
            ("assignment", ASSIGNMENTS),
            ("agreement_rule", AGREEMENT_RULES),
            ("rejection", REJECTIONS),
            ("rejection_rule", SELECTION_RULES),
            ("pseudolabels", ("soft", "hard")),
            ("features_dtype", ("float32", "float16")),
            ("method", ("csl", "committee")),
            ("members", tuple(MEMBERS)),
            ("head_solver", ("steps", "ridge")),
            ("pooling", (None, *POOLINGS)),
            ("metric", tuple(METRICS)),
        ):
            value = getattr(self, name)
            for item in value if name in _LISTS_OF_NAMES else [value]:
                if item not in known:
                    raise ValueError(f"`{name}` must be one of {list(known)}, got {item!r}.")
        if not self.assignment or not self.rejection:
            raise ValueError("`assignment` and `rejection` need at least one name each, got an empty list.")
        if "none" in self.rejection and len(self.rejection) > 1:
            raise ValueError(f"`rejection` 'none' stands alone, got {self.rejection}.")

    def _check_window(self) -> None:
        window = self.rejection_window
        # YAML gives lists, and a person may write a pair.
        is_pair = isinstance(window, list | tuple) and len(window) == 2 and all(map(is_number, window))
        if not is_pair or not 0 <= window[0] <= window[1] <= 1:
            raise ValueError(
                f"`rejection_window` must be [lowest, highest] within 0..1, got {window!r}. Leave it out for "
                f"[0.5, 1.0]."
            )

    def _check_alpha(self) -> None:
        value = alpha = self.ridge_alpha
        if isinstance(value, str) and value != "auto":  # the command line gives text
            with suppress(ValueError):
                self.ridge_alpha = alpha = float(value)
        if alpha != "auto" and not (is_number(alpha) and 0 < float(alpha or 0) < math.inf):
            raise ValueError(
                f"`ridge_alpha` must be 'auto' or a finite number above 0, got {value!r}. Leave it out for 'auto'."
            )

    def _check_loss(self) -> None:
        if not isinstance(self.loss_kwargs, dict):
            raise ValueError(
                f"`loss_kwargs` must be a dictionary of parameters by name, got {self.loss_kwargs!r}. Leave it out "
                "for none."
            )
        # Refuses what it does not know, and at its first call parameters out of range.
        _, loss = choose_loss(self.loss, self.loss_kwargs, lambda: 0.0, (1, 2))
        loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        if self.head_solver != "ridge":
            return
        if self.loss != "cross_entropy":
            raise ValueError(f"`head_solver` 'ridge' has a loss of its own, got `loss` {self.loss!r}. Use 'steps'.")
        if self.weight_column is not None:
            raise ValueError(
                f"`head_solver` 'ridge' weighs all examples alike, got `weight_column` {self.weight_column!r}. Use "
                "'steps'."
            )
        if self.student_training != "probe" or self.warm_start:
            raise ValueError(
                "`head_solver` 'ridge' fits a fresh head on a frozen backbone, got `student_training` "
                f"{self.student_training!r} and `warm_start` {self.warm_start}. Use 'probe' without `warm_start`."
            )

    def _check_neighbors_and_folds(self) -> None:
        if self.agreement_neighbors and not {"agreement", "auto"} & {*self.assignment}:
            raise ValueError(
                f"`agreement_neighbors` is for `assignment` 'agreement', got {self.agreement_neighbors} with "
                f"{self.assignment}. Leave it out for 0."
            )
        if self.neftune_noise_alpha is not None and self.student_training == "probe":  # type: ignore[has-type]
            raise ValueError(
                "`neftune_noise_alpha` is for a backbone that learns, got `student_training` 'probe'. Leave one out."
            )
        # One fold is all of the pool, and would leave nothing to train on.
        if self.cross_fit_folds == 1:
            raise ValueError("`cross_fit_folds` must be 0, or at least 2, got 1. Leave it out for 0.")
        if self.cross_fit_folds and self.warm_start:
            raise ValueError(
                "`cross_fit_folds` needs a fresh head at each level, which has seen nothing, got `warm_start`. Leave "
                "one out."
            )

    def _check_committee(self) -> None:
        if self.standardize_features and (self.head_solver == "ridge" or self.warm_start):
            raise ValueError(
                "`standardize_features` is for fresh heads fitted by steps, got it with `head_solver` "
                f"{self.head_solver!r} and `warm_start` {self.warm_start}. Leave it out."
            )
        if self.method != "committee":
            if self.members != list(DEFAULT_MEMBERS):
                raise ValueError(
                    f"`members` are what `method` 'committee' is made of, got {self.members} beside {self.method!r}. "
                    "Use 'committee', or leave them out."
                )
            return
        if not self.members or len({*self.members}) < len(self.members):
            raise ValueError(f"`members` must name members once each, and at least one, got {self.members}.")
        if self.student_training != "probe":
            raise ValueError(
                "`method` 'committee' averages linear heads on one frozen backbone, got `student_training` "
                f"{self.student_training!r}. Use `method` 'csl' for it."
            )
        if given := [name for name in DECIDED_BY_MEMBERS if name in self._given]:
            raise ValueError(
                f"`{given[0]}` is decided by each of the `members`, got {getattr(self, given[0])!r} beside `method` "
                "'committee'. Leave it out, or use `method` 'csl'."
            )


@cache
def fields_without(purpose: str) -> frozenset[str]:
    """Name the fields that do not count for something."""
    if purpose not in _PURPOSES:
        raise ValueError(f"`purpose` must be one of {list(_PURPOSES)}, got {purpose!r}.")
    inherited = tuple(name for names, purposes in _INHERITED.items() if purpose in purposes for name in names)
    hints = get_type_hints(CoSupervisedConfig, include_extras=True)
    own = {name for name, hint in hints.items() for said in getattr(hint, "__metadata__", ()) if purpose in said}
    names = (item.name for item in fields(CoSupervisedConfig))
    return frozenset(name for name in names if name in own or name.startswith(inherited))
