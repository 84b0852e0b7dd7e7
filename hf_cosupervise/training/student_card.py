"""The card of a student: what is known of how it was trained, written beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data.vectors import VECTOR_MODEL
from ..hub.cards import model_card, write_card
from ..pool.pseudolabels import PseudolabelPool
from ..students.pooling import exported_pooling
from ..students.vectors import VectorClassifier
from .config import CoSupervisedConfig
from .head_fitter import RIDGE_ALPHA
from .history import LevelHistory
from .members import MEMBERS
from .plan_rules import level_assignment
from .publishing import made_of
from .self_training import NUM_ADDED

# What loads a student, by its type; any other is one of transformers.
_LIBRARIES = {"timm_wrapper": "timm", VECTOR_MODEL: "pytorch"}


def student_facts(
    args: CoSupervisedConfig,
    pool: PseudolabelPool,
    history: LevelHistory,
    functions: Mapping[str, str],
    hub_model_id: str | None,
    model: Any,
    modality: str,
) -> dict[str, Any]:
    """Gather what is known of a trained student for its card; folders of this machine are nobody's business."""
    records = _own_records(args, history)
    return made_of(history.run, pool) | {
        "name": str(hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1],
        "hub_model_id": hub_model_id or args.hub_model_id,
        "hub_branch": args.hub_revision,
        "modality": modality,
        "vectors": model.card_facts() if isinstance(model, VectorClassifier) else None,
        "library_name": _LIBRARIES.get(model.config.model_type, "transformers"),
        # That of a student with a pooling is not published, see `export_student`.
        "has_adapter": isinstance(model, PeftModel) and not hasattr(model, "pooling"),
        "student_training": args.student_training,
        "rejects": args.rejection != ["none"],
        "is_closed_form": is_closed_form(args),
        "levels": [_level_facts(args, pool, record, functions) for record in records],
        "levels_of": records[0].get("member") if records else None,
        "hyperparameters": args.changed_arguments()
        | _found_alphas(args, history)
        | _told_stop(history)
        | dict(functions),
    }


def is_closed_form(args: CoSupervisedConfig) -> bool:
    """Tell whether all heads of a student are found in closed form, so that no seed changes it."""
    if args.method == "committee":
        return all(MEMBERS[name].arguments.get("head_solver") == "ridge" for name in args.members)
    return args.head_solver == "ridge" and "random" not in args.assignment


def _own_records(args: CoSupervisedConfig, history: LevelHistory) -> list[dict[str, Any]]:
    """The levels that a card shows: of a committee, those of the first member that went down the hierarchy."""
    # Members of one pseudolabel have a single level, at which nobody is chosen.
    lead = next((name for name in args.members if MEMBERS[name].aggregator is None), None)
    return [record for record in history.records if record.get("member", lead) == lead]


def _found_alphas(args: CoSupervisedConfig, history: LevelHistory) -> dict[str, str]:
    """Tell which penalties were found for the levels, where they had to be."""
    records = [record for record in _own_records(args, history) if RIDGE_ALPHA in record]
    if not records or args.ridge_alpha != "auto":
        return {}
    of_member = f" (of {records[0]['member']})" if "member" in records[0] else ""
    return {"ridge_alpha": f"auto: {', '.join(str(record[RIDGE_ALPHA]) for record in records)}{of_member}"}


def _told_stop(history: LevelHistory) -> dict[str, str]:
    """Tell how often self-training was done, and why not more often."""
    told = history.run.get("self_training", {})
    if "stopped" in told:
        return {"self_training_rounds": f"{told['num_rounds']} ({told['stopped']})"}
    members = [f"{name}: {own['num_rounds']} ({own['stopped']})" for name, own in told.items()]
    return {"self_training_rounds": "; ".join(members)} if members else {}


def _level_facts(
    args: CoSupervisedConfig, pool: PseudolabelPool, record: Mapping[str, Any], functions: Mapping[str, str]
) -> dict[str, Any]:
    level, keys = record["level"], {name: f"assignment/{name}" for name in pool.source_names}
    # Rounds of self-training count as one level more.
    if level == pool.hierarchy.num_levels:  # no share of the pseudolabels: it is trained on more than those
        told = f"self-training, {record[NUM_ADDED]:.0f} examples added"
        return {"level": level, "assignment": told, "num_kept": record["consistency/num_kept"]}
    method = level_assignment(args, level, pool.hierarchy)
    return {
        "level": level,
        "assignment": functions.get("assign_func", method) if level else method,  # the root has nothing to assign by
        "keep_rate": record["consistency/keep_rate"],
        "num_kept": record["consistency/num_kept"],
        "teachers": {name: record[key] for name, key in keys.items() if key in record},
    }


def make_card(
    folder: str,
    facts: dict[str, Any],
    # From here on as `Trainer.create_model_card` has them, so that whoever calls that needs to know no other names.
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
    """Write a model card of what is known; one that was edited by hand is kept, and this one is merged into it."""
    given = {
        "language": language,
        "license": license,
        "tags": _as_list(tags),
        "report": report,
        "figure": figure,
        "hub_branch": branch or facts["hub_branch"],
        "dataset_name": next(iter(_as_list(dataset)), None),
        "dataset_split": next(iter(_as_list(dataset_args)), None),
    }
    facts = facts | given | exported_pooling(folder)
    # Each once: the source of a pool may be named again by whoever pushes.
    facts["datasets"] = list(dict.fromkeys([*facts["datasets"], *_as_list(dataset_tags)]))
    facts["name"] = model_name or facts["name"]
    facts["base_model"] = finetuned_from or facts["base_model"]
    write_card(model_card(facts), folder)


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
