"""What a push or a load of a pool may find on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi

from ..data.columns import shorten
from ..hub.client import hub_errors
from .files import HEADER


def check_not_overtaken(there: Mapping[str, Any], own: Mapping[str, Any], repo_id: str) -> None:
    """Refuse to undo what somebody else has pushed since this pool was loaded from there."""
    files, known = there.get("files", {}), own["files"]
    if changed := sorted(path for path in set(files) & set(known) if files[path] != known[path]):
        raise ValueError(
            f"The pool must be the latest one of '{repo_id}' with what you add, got other content of "
            f"{shorten(changed)}, which was pushed since it was loaded. Load it again and add to that, or overwrite "
            "it by `replace=True`."
        )


def no_pool(repo_id: str, commit: str, token: str | None) -> FileNotFoundError:
    """Say what a repository holds instead of a pool."""
    with hub_errors("The pool", repo_id, revision=commit, repo_type="dataset"):
        files = HfApi(token=token).list_repo_files(repo_id, repo_type="dataset", revision=commit)
    return FileNotFoundError(
        f"'{repo_id}' is no pool: it has no '{HEADER}' but {shorten(sorted(files))}. Make one with `build_pool` and "
        "`push_to_hub`, or correct the id."
    )
