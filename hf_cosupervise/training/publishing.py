"""What a student's repository is told: the facts of its card and history, and one commit of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel

from ..data.vectors import VECTOR_MODEL
from ..files import explain_full_disk, without_nan
from ..hub.cards import model_card, write_card
from ..hub.client import open_repo
from ..pool.base import TeacherPool
from ..pool.pseudolabels import PseudolabelPool
from ..processes import Processes
from ..students.pooling import exported_pooling
from ..students.publishing import export_student, push_student
from ..students.vectors import VectorClassifier
from .config import CoSupervisedConfig
from .head_fitter import RIDGE_ALPHA
from .history import LevelHistory
from .members import MEMBERS
from .plan_rules import level_assignment
from .run_folder import versions
from .self_training import NUM_ADDED

# What loads a student, by its type; any other is one of transformers.
_LIBRARIES = {"timm_wrapper": "timm", VECTOR_MODEL: "pytorch"}


def name_functions(**functions: Any) -> dict[str, str]:
    """Name the user's own functions."""
    return {
        name: getattr(function, "__name__", type(function).__name__)
        for name, function in functions.items()
        if function is not None
    }


def describe_run(student: dict[str, Any], pool: TeacherPool, num_processes: int) -> dict[str, Any]:
    """Tell what a run is made of, at the commits that everything was pinned to; folders are nobody's business."""
    return {
        "num_processes": num_processes,
        "student": student,
        "teachers": [describe_teacher(pool, name) for name in pool.hierarchy.names],
        "pool": {} if pool.repo_id is None else {"repo_id": pool.repo_id, "commit": pool.commit},
        "source": dict(pool.source or {}),
    }


def describe_teacher(pool: TeacherPool, name: str) -> dict[str, Any]:
    """Tell which weights spoke for a teacher, as cards and histories show it."""
    teacher = pool.hierarchy.teachers[pool.hierarchy.index(name)]
    return {
        "name": name,
        "level": teacher.level,
        "model": pool.published_model(teacher),
        "revision": teacher.revision,
        "commit": pool.facts.get(name, {}).get("commit"),
    }


def made_of(run: Mapping[str, Any], pool: TeacherPool) -> dict[str, Any]:
    """What a student's card tells of all that the student was made of, from the `run` of its history."""
    student, source = run["student"], run["source"].get("dataset")
    return {
        "base_model": student.get("model"),
        "base_model_revision": student.get("revision"),
        "base_model_commit": student.get("commit"),
        "labels": list(pool.hierarchy.labels),
        "num_examples": len(pool),
        "pool": run["pool"].get("repo_id"),
        "pool_revision": run["pool"].get("commit"),
        "datasets": [source] if source else [],
        "teachers": [
            {**teacher.to_dict(), **known} for teacher, known in zip(pool.hierarchy.teachers, run["teachers"])
        ],
        "versions": versions(),
    }


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
        "levels": [_level_facts(args, pool, record, functions) for record in _own_records(args, history)],
        "hyperparameters": args.changed_arguments()
        | _found_alphas(args, history)
        | _told_stop(history)
        | dict(functions),
    }


def _own_records(args: CoSupervisedConfig, history: LevelHistory) -> list[dict[str, Any]]:
    """The levels that a card shows: of a committee, those of the first member that went down the hierarchy."""
    # Members of one pseudolabel have a single level, at which nobody is chosen.
    lead = next((name for name in args.members if MEMBERS[name].aggregator is None), None)
    return [record for record in history.records if record.get("member", lead) == lead]


def _found_alphas(args: CoSupervisedConfig, history: LevelHistory) -> dict[str, str]:
    """Tell which penalties were found for the levels, where they had to be."""
    found = [record[RIDGE_ALPHA] for record in _own_records(args, history) if RIDGE_ALPHA in record]
    return {"ridge_alpha": f"auto: {', '.join(map(str, found))}"} if found and args.ridge_alpha == "auto" else {}


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


def open_student_repo(
    args: CoSupervisedConfig, processes: Processes, *, token: str | None = None, private: bool | None = None
) -> str:
    """Make the model repository where there is none, and see that the token may write, before any work."""
    # As the parent names it.
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    token = token or args.hub_token
    return processes.on_first(partial(open_repo, name, what="The student", private=private, token=token))


def export(model: Any, folder: str, processing_class: Any, processes: Processes) -> None:
    """Write the student as an ordinary model, by the first of all processes, see [`export_student`]."""
    with explain_full_disk(Path(folder), "Free some space and save it again: the trained levels are kept."):
        processes.on_first(partial(export_student, model, folder, processing_class))


def push(
    folder: str,
    repo_id: str,
    history: LevelHistory,
    write_card: Callable[[], None],
    processes: Processes,
    *,
    message: str | None = None,
    blocking: bool = True,
    revision: str | None = None,
    token: str | None = None,
    report: Mapping[str, Any] | None = None,
    figure: str | None = None,
) -> CommitInfo | Future[CommitInfo] | None:
    """Publish an exported student in one commit, by the first of all processes."""
    story: dict[str, bytes | Path] = {"history.json": history.to_json().encode("utf-8")}
    if report:
        story["report.json"] = (json.dumps(without_nan(report), indent=2) + "\n").encode("utf-8")
    if figure:
        story[figure] = Path(folder, figure)
    title = message or "Co-supervised student"
    commit = partial(push_student, folder, repo_id, message=title, story=story, revision=revision, token=token)
    # A list, since what a function gives back is sent to all processes, and a future cannot be.
    pushed: list[CommitInfo | Future[CommitInfo]] = []

    def publish() -> None:
        write_card()
        pushed.append(commit() if blocking else HfApi().run_as_future(commit))

    # All of it in one process; the others must not wait for it where it fails.
    processes.on_first(publish)
    return pushed[0] if pushed else None


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
