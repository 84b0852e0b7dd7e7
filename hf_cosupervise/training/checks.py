"""What does not go together is refused before any work starts: arguments, pool, data, student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, Value

from ..data.columns import find_input_column, is_text_column, is_vector_column
from ..data.inputs import InputProcessor, check_depth
from ..data.keys import row_keys
from ..data.vectors import check_vectors, join_columns, name_columns, parts_of
from ..files import make_output_dir
from ..method.metrics import check_metric
from ..method.rejection import check_top_k_value
from ..pool.answers import AnswerPool
from ..pool.ids import match_ids
from ..pool.pseudolabels import ORACLE_DOMAIN, ORACLE_LABEL, PseudolabelPool
from ..students.student import check_answers
from .config import CoSupervisedConfig
from .inherited import check_together
from .plan_rules import level_assignment
from .self_training import check_self_training


def check_first(
    args: Any, given: Mapping[str, Any], pool: PseudolabelPool, assign_func: Any = None, keep_func: Any = None
) -> CoSupervisedConfig:
    """Refuse what no student could be trained with, and see that there is a place to write to."""
    if isinstance(pool, AnswerPool):
        raise TypeError(
            "`pool` must be a `PseudolabelPool`, got AnswerPool, whose teachers write. Use `co_supervise_answers`, or "
            "label the data by `build_pool`."
        )
    if not isinstance(pool, PseudolabelPool):
        raise TypeError(
            f"`pool` must be a `PseudolabelPool`, got {type(pool).__name__}. Load one by `PseudolabelPool.load`, or "
            "make one by `build_pool`."
        )
    args = CoSupervisedConfig() if args is None else args
    if not isinstance(args, CoSupervisedConfig):
        raise TypeError(f"`args` must be a `CoSupervisedConfig`, got `{type(args).__name__}`.")
    make_output_dir(Path(args.output_dir))  # before a student is fetched, which may take minutes
    if any(given.get("optimizers") or ()):
        raise ValueError(
            "`optimizers` cannot be given: each level makes its own. Use `optim` or `optimizer_cls_and_kwargs`."
        )
    if given.get("model_init") is not None:
        raise ValueError("`model_init` cannot be given: each level begins with a fresh head. Give a model or its id.")
    # Before a student is fetched too: it takes nothing but the pool.
    check_levels(pool, args, has_own_assignment=assign_func is not None)
    check_self_training(args, pool, keep_func)
    return args


def check_student(
    args: CoSupervisedConfig,
    model: Any,
    processor: InputProcessor,
    inputs: Dataset,
    origin: Mapping[str, Any],
    has_own_metrics: bool,
) -> None:
    """Refuse a student that cannot learn from these inputs, and arguments that do not fit it or what is installed."""
    (column,) = inputs.column_names
    check_depth(inputs, column)
    check_modality(processor, inputs, column)
    if processor.modality == "vector":
        check_vectors(inputs, column, processor.num_features)
    if not origin and not args.deepspeed:  # a model object; DeepSpeed may have shared out its weights already
        check_answers(model, processor, model.config.num_labels)
    check_metric(args.metric, model.config.num_labels)
    check_together(args, model, has_own_metrics)


def check_modality(processor: InputProcessor, inputs: Dataset, column: str, what: str = "the pool holds") -> None:
    """Refuse inputs of a kind that a student does not read."""
    held, read = _kind_of(inputs, column), f"{processor.modality}s"
    if held not in (None, read):
        raise ValueError(
            f"The student must read what {what}, got a student of {read} and {held} in column '{column}'. "
            "Choose another student, or another `input_column`."
        )


def _kind_of(inputs: Dataset, column: str) -> str | None:
    """What a column holds for certain: rows of pixels may be an image, and numbers the names of anything."""
    if is_text_column(inputs, column):
        return "texts"
    feature = inputs.features[column]
    is_flat = is_vector_column(inputs, column) and isinstance(getattr(feature, "feature", None), Value)
    return "vectors" if is_flat else "images" if isinstance(feature, Image) else None


def refuse_search(*_: Any, **__: Any) -> Any:
    """Refuse `hyperparameter_search`: it would choose by labels, of which there are none."""
    raise NotImplementedError(
        "`hyperparameter_search` would choose by labels, which co-supervision does without. Compare configurations by "
        "runs of their own."
    )


def check_arguments(
    args: CoSupervisedConfig,
    pool: PseudolabelPool,
    head: Any,
    reason: str | None,
    functions: Mapping[str, Any],
    compute_loss_func: Any = None,
) -> None:
    """Refuse arguments that do not go together."""
    if args.head_solver == "ridge" and reason:
        raise ValueError(f"`head_solver` 'ridge' needs a linear head on features, but {reason}. Use 'steps'.")
    if args.cross_fit_folds and reason:
        raise ValueError(f"`cross_fit_folds` needs a linear head on features, but {reason}. Leave it out.")
    if args.cross_fit_folds > len(pool):
        raise ValueError(
            f"`cross_fit_folds` must be at most the {len(pool)} examples of the pool, got {args.cross_fit_folds}. Use "
            "fewer."
        )
    for name in ("agreement_neighbors", "teacher_neighbors"):
        if getattr(args, name) and head is None:
            raise ValueError(
                f"`{name}` needs a linear head on a frozen backbone, got another kind of student. Set it to 0."
            )
        # No example is a neighbour of itself.
        if getattr(args, name) >= len(pool):
            raise ValueError(
                f"`{name}` must be below the {len(pool)} examples of the pool, got {getattr(args, name)}. Use fewer."
            )
    if wrong := [name for name, function in functions.items() if function is not None and not callable(function)]:
        raise TypeError(f"`{wrong[0]}` must be a function, got {type(functions[wrong[0]]).__name__}.")
    own = {"loss_func": functions["loss_func"], "compute_loss_func": compute_loss_func}
    losses = [name for name, function in own.items() if function is not None]
    # The default is no choice, and gives way to a function.
    losses += [f"loss {args.loss!r}"] if args.loss != "cross_entropy" else []
    if len(losses) > 1:
        raise ValueError(f"One loss is needed, got {' and '.join(losses)}. Leave the others out.")
    if functions["loss_func"] is not None and args.head_solver == "ridge":
        raise ValueError("`head_solver` 'ridge' has a loss of its own, got `loss_func`. Use 'steps'.")
    if compute_loss_func is not None and args.weight_column is not None:
        raise ValueError(
            f"`compute_loss_func` sees no `weight_column`, got {args.weight_column!r}. Use `loss_func`, which is "
            "weighted."
        )
    if args.method != "committee":
        if args.standardize_features and reason:
            raise ValueError(f"`standardize_features` needs a linear head on features, but {reason}. Leave it out.")
        return
    if given := [name for name, function in {**functions, "compute_loss_func": compute_loss_func}.items() if function]:
        raise ValueError(
            f"`{given[0]}` cannot be given to a committee, whose `members` have their own rules. Use `method` 'csl'."
        )
    if reason:
        raise ValueError(f"`method` 'committee' needs linear heads on features, but {reason}. Use `method` 'csl'.")


def read_weights(pool: PseudolabelPool, column: str) -> np.ndarray:
    """Give the examples' weights."""
    values = np.asarray(pool.column(column))
    is_number = values.dtype.kind in "iuf"
    if not is_number or not np.isfinite(values).all() or (values < 0).any() or not (values > 0).any():
        found = f"{values.min()}..{values.max()}" if is_number else f"{values.dtype.name} values"
        raise ValueError(
            f"`weight_column` '{column}' must hold finite numbers of at least 0, and not all 0, got {found}. Correct "
            "them, or name another column."
        )
    # They are summed over the whole pool before they are scaled.
    return values.astype(np.float64)


def check_levels(pool: PseudolabelPool, args: CoSupervisedConfig, has_own_assignment: bool) -> None:
    """Refuse an assignment or rejection that cannot work on this pool."""
    hierarchy = pool.hierarchy
    if len(args.assignment) not in (1, hierarchy.num_levels):
        raise ValueError(
            f"`assignment` must hold one name, or one for each of the {hierarchy.num_levels} levels, "
            f"got {args.assignment}."
        )
    if args.rejection_k is not None:
        check_top_k_value(args.rejection_k, hierarchy.num_labels)
    # 'auto' is settled here, so that what is refused below is what would be done.
    methods = [level_assignment(args, level, hierarchy) for level in range(hierarchy.num_levels)]
    if len(hierarchy.levels[0]) > 1 and methods[0] != "ensemble":
        raise ValueError(
            f"A root level of several teachers ({[teacher.name for teacher in hierarchy.levels[0]]}) needs the "
            f"assignment 'ensemble', got {methods[0]!r}: there is no student yet to choose among them."
        )
    if args.agreement_neighbors and hierarchy.num_levels > 1 and "agreement" not in methods[1:]:
        raise ValueError(
            f"`agreement_neighbors` is for `assignment` 'agreement', got {args.agreement_neighbors} with {methods}. "
            "Leave it out, or choose 'agreement'."
        )
    for level in range(1, hierarchy.num_levels if not has_own_assignment else 1):  # the root has nothing to choose
        _check_assignment(pool, args, level, methods[level])


def _check_assignment(pool: PseudolabelPool, args: CoSupervisedConfig, level: int, method: str) -> None:
    teachers, by_scope = pool.hierarchy.levels[level], method in ("scope", "oracle_scope")
    names = [teacher.name for teacher in teachers]
    if by_scope and len(teachers) > 1 and all(teacher.scope is None for teacher in teachers):
        raise ValueError(
            f"Assignment {method!r} at level {level} needs teachers with a `scope`, got none among {names}. Give them "
            "scopes, or use 'agreement'."
        )
    if by_scope and not pool.hierarchy.has_distinct_scopes(level):
        raise ValueError(
            f"Assignment {method!r} at level {level} needs teachers with different scopes, got the same one for all "
            f"of {names}. Use 'agreement'."
        )
    if method in ("metadata", "oracle_domain"):
        column = ORACLE_DOMAIN if method == "oracle_domain" else args.metadata_column
        if column is None:
            raise ValueError(
                f"Assignment 'metadata' at level {level} needs `metadata_column`, got none. Name the column."
            )
        # For its error alone, where the pool has no such column.
        pool.column(column)
        if all(teacher.domains is None for teacher in teachers):
            raise ValueError(f"Assignment {method!r} at level {level} needs teachers with `domains`, got none.")
    if method in ("oracle_scope", "oracle_loss") and pool.oracle_labels is None:
        raise ValueError(
            f"Assignment {method!r} needs `oracle_label` in the pool, got none. Build it with `oracle_column`."
        )


def match_inputs(
    pool: PseudolabelPool, train_dataset: Dataset | None, input_column: str | Sequence[str] | None
) -> Dataset:
    """Give the inputs alone, in the order of the pool; a label column stays behind."""
    dataset = pool.inputs if train_dataset is None else train_dataset
    no_inputs = {"id", ORACLE_LABEL, ORACLE_DOMAIN}
    if dataset is None or train_dataset is None and no_inputs.issuperset(dataset.column_names):
        raise ValueError("`train_dataset` is needed: the pool holds no inputs. Give the data that it was built from.")
    name = name_columns(input_column)
    if name is None and (train_dataset is None or parts_of(dataset, pool.input_column)):
        name = pool.input_column  # several columns of the data, which they cannot tell by themselves
    dataset, name = join_columns(dataset, name)
    column = find_input_column(dataset, name)
    if train_dataset is not None:
        # The data may be in another order than the pool: ids decide, or contents where it has none.
        ids = np.asarray(list(dataset["id"][:]) if "id" in dataset.column_names else row_keys(dataset, column))
        if len(ids) != len(pool):
            raise ValueError(
                f"`train_dataset` and `pool` must hold the same examples, got {len(ids)} and {len(pool)}. "
                "Use the data that the pool was built from, or `pool.select`."
            )
        rows = match_ids(ids, pool.ids, "`train_dataset`")
        dataset = dataset if np.array_equal(rows, np.arange(len(rows))) else dataset.select(rows)
    return dataset.select_columns([column])
