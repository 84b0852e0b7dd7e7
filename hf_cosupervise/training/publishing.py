"""What a student was made of, and how it is published: in one commit of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from ..files import explain_full_disk, without_nan
from ..hub.client import open_repo
from ..pool.base import TeacherPool
from ..processes import Processes
from ..students.publishing import export_student, push_student
from .config import CoSupervisedConfig
from .history import LevelHistory
from .run_folder import versions


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
        "teachers": [
            {
                "name": teacher.name,
                "level": teacher.level,
                "model": pool.published_model(teacher),
                "revision": teacher.revision,
                "commit": pool.facts.get(teacher.name, {}).get("commit"),
            }
            for teacher in pool.hierarchy.teachers
        ],
        "pool": {} if pool.repo_id is None else {"repo_id": pool.repo_id, "commit": pool.commit},
        "source": dict(pool.source or {}),
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
    blocking: bool = True,
    report: Mapping[str, Any] | None = None,
    figure: str | None = None,
    **options: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Publish an exported student in one commit, by the first of all processes; for `options`, [`push_student`]."""
    story: dict[str, bytes | Path] = {"history.json": history.to_json().encode("utf-8")}
    if report:
        story["report.json"] = (json.dumps(without_nan(report), indent=2) + "\n").encode("utf-8")
    if figure:
        story[figure] = Path(folder, figure)
    commit = partial(push_student, folder, repo_id, story=story, **options)
    # A list, since what a function gives back is sent to all processes, and a future cannot be.
    pushed: list[CommitInfo | Future[CommitInfo]] = []

    def publish() -> None:
        write_card()
        pushed.append(commit() if blocking else HfApi().run_as_future(commit))

    # All of it in one process; the others must not wait for it where it fails.
    processes.on_first(publish)
    return pushed[0] if pushed else None
