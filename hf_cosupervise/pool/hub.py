"""A pool on the Hub: what a push may destroy there, and what a load finds. Of a pool it knows the header alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..data.columns import shorten
from ..hub.cards import pool_card
from ..hub.client import CARD, fetch_files, hub_errors, open_repo, publish, resolve_commit
from .files import HEADER, dump_header, file_names, read_header

_WHAT = "The pool"
_KEPT = ("license", "source_dataset", "tags")  # of the card, from one push to the next


def push_pool(
    repo_id: str,
    header: dict[str, Any],
    card_facts: dict[str, Any],
    write: Callable[[Path], tuple[dict[str, Path], dict[str, Any]]],
    *,
    lacks_inputs: bool,
    origin: tuple[str | None, str | None],
    card: Mapping[str, Any],
    private: bool | None,
    token: str | None,
    revision: str | None,
    replace: bool,
    message: str,
) -> CommitInfo:
    """Put a pool on the Hub in one commit, if nothing is destroyed by it; of its files `header` knows nothing yet."""
    repo_id = open_repo(repo_id, what=_WHAT, repo_type="dataset", private=private, token=token)
    check = partial(_check_repo, repo_id, header, lacks_inputs, replace, revision, token)
    check()
    # For what is not on disk yet: files that lie in a pool are uploaded from where they are.
    with tempfile.TemporaryDirectory(prefix="cosupervise-push-") as folder:
        files, digests = write(Path(folder))
        header = header | {"files": digests}
        # Writing may have taken long, and others may push too.
        there, parent = check()
        # Only who loaded it from there can have overlooked a push; for others it was checked what would be lost.
        if (repo_id, parent) != origin and repo_id == origin[0] and not replace:
            check_not_overtaken(there, header, repo_id)
        known = there.get("card", {})
        card = {key: known[key] for key in _KEPT if key in known} | dict(card)
        # Known only now: the client completes a bare name by the user's own.
        facts = card_facts | {"hub_dataset_id": repo_id, "hub_branch": revision}
        if card.get("source_dataset", facts["source_dataset"]) != facts["source_dataset"]:
            facts |= {"source_revision": None, "source_split": None}  # those of another data set
        texts = {CARD: pool_card(facts | card), HEADER: dump_header(header | ({"card": card} if card else {}))}
        return publish(
            {**files, **{path: text.encode("utf-8") for path, text in texts.items()}},
            repo_id,
            what=_WHAT,
            message=message,
            repo_type="dataset",
            # What this pool has not got any more goes in the same commit; files beside them are the owner's and stay.
            replaced=["teachers/*", "inputs/*"],
            revision=revision,
            token=token,
            # The commit that was looked at: a push that came in between is refused by the Hub, not overwritten.
            parent=parent,
        )


def _check_repo(
    repo_id: str, header: Mapping[str, Any], lacks_inputs: bool, replace: bool, revision: str | None, token: str | None
) -> tuple[dict[str, Any], str]:
    """Refuse a repository in which a push would destroy something; its pool's header, if any, and its commit."""
    api, advice = HfApi(token=token), "Push to another repository, or delete this one."
    with hub_errors(_WHAT, repo_id, revision=revision, repo_type="dataset", writing=True):
        try:
            info = api.repo_info(repo_id, repo_type="dataset", revision=revision)
        except RevisionNotFoundError:  # the branch will be made of the main one
            info = api.repo_info(repo_id, repo_type="dataset")
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if HEADER not in names:
        # A new repository has the second from the start, and often a card that somebody has begun by hand.
        if others := sorted(names - {CARD, ".gitattributes"}):
            raise ValueError(
                f"'{repo_id}' must be new, empty or hold a pool, got the files {shorten(others)}. {advice}"
            )
        # Nothing there that could be lost.
        return {}, str(info.sha)
    folder = fetch_files(repo_id, str(info.sha), [HEADER], what=_WHAT, repo_type="dataset", token=token)
    there = read_header(folder / HEADER, repo_id)
    _check_same(there, header, repo_id, advice)
    own = {teacher["name"] for teacher in header["hierarchy"]["teachers"]}
    names_there = [teacher["name"] for teacher in there["hierarchy"]["teachers"]]
    lost = [f"teacher '{name}'" for name in names_there if name not in own]
    # Inputs that the user leaves at home are deleted on demand; a pool that never had them would delete them unasked.
    if there["has_inputs"] and lacks_inputs:
        lost.append("the inputs")
    if lost and not replace:
        raise ValueError(
            f"The pool must hold everything that the one in '{repo_id}' holds, got one without {shorten(lost)}. "
            "Add it to this pool by `build_pool(..., reuse=...)`, or delete it there by `replace=True`."
        )
    return there, str(info.sha)


def _check_same(there: Mapping[str, Any], own: Mapping[str, Any], repo_id: str, advice: str) -> None:
    """Refuse a pool of another task or of other examples."""
    if (labels := there["hierarchy"]["labels"]) != own["hierarchy"]["labels"]:
        raise ValueError(
            f"'{repo_id}' must hold a pool of the labels {shorten(own['hierarchy']['labels'])}, got one of "
            f"{shorten(labels)}. {advice}"
        )
    # Headers of older versions have no digest of the ids: of those, the number must do.
    is_same = there.get("ids_digest", own["ids_digest"]) == own["ids_digest"]
    if there["num_examples"] != own["num_examples"] or not is_same:
        raise ValueError(
            f"'{repo_id}' must hold a pool of the same {own['num_examples']} examples in the same order, got one of "
            f"{there['num_examples']} examples with other ids or another order. {advice}"
        )


def check_not_overtaken(there: Mapping[str, Any], own: Mapping[str, Any], repo_id: str) -> None:
    """Refuse to undo what somebody else has pushed since this pool was loaded from there."""
    files, known = there.get("files", {}), own["files"]
    # Files that only one side has were judged before, by the teachers' names.
    if changed := sorted(path for path in set(files) & set(known) if files[path] != known[path]):
        raise ValueError(
            f"The pool must be the latest one of '{repo_id}' with what you add, got other content of "
            f"{shorten(changed)}, which was pushed since it was loaded. Load it again and add to that, or overwrite "
            "it by `replace=True`."
        )


def fetch_pool(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, dict[str, Any], str]:
    """Download the files of a pool and nothing else: the folder of the cache, the header and the commit."""
    # Once, and everything from that commit: header and files of two commits would not fit together.
    commit = resolve_commit(repo_id, revision, what=_WHAT, repo_type="dataset", token=token)
    folder = fetch_files(repo_id, commit, [HEADER], what=_WHAT, repo_type="dataset", token=token)
    if not (folder / HEADER).is_file():
        raise _no_pool(repo_id, commit, token)
    header = read_header(folder / HEADER, repo_id)
    # By name and not by pattern: a repository may hold gigabytes of other things beside its pool.
    fetch_files(repo_id, commit, file_names(header), what=_WHAT, repo_type="dataset", token=token)
    return folder, header, commit


def _no_pool(repo_id: str, commit: str, token: str | None) -> FileNotFoundError:
    """Say what a repository holds instead of a pool."""
    with hub_errors(_WHAT, repo_id, revision=commit, repo_type="dataset"):
        files = HfApi(token=token).list_repo_files(repo_id, repo_type="dataset", revision=commit)
    return FileNotFoundError(
        f"'{repo_id}' is no pool: it has no '{HEADER}' but {shorten(sorted(files))}. Make one with `build_pool` and "
        "`push_to_hub`, or correct the id."
    )
