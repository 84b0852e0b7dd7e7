"""The Hub in one place: pin to a commit, fetch, publish in one commit, and say clearly what went wrong."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from .card_merging import merge_into

KINDS = {"model": "model", "dataset": "data set"}
CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_WRITE_ADVICE = "Log in by `hf auth login` with a token of role `write`, or set HF_TOKEN."
# By order: a gated repository is a `RepositoryNotFoundError` too, and needs other advice.
_ADVICE: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((HFValidationError,), "Check the id, or the path where a folder is meant."),
    ((GatedRepoError,), "Accept its terms on its page, then log in by `hf auth login` or set HF_TOKEN."),
    ((RepositoryNotFoundError,), "Check the id; if it is private, log in by `hf auth login` or set HF_TOKEN."),
    ((RevisionNotFoundError,), "Correct the revision."),
    ((LocalTokenNotFoundError,), _WRITE_ADVICE),
)
# 412 is how the Hub refuses a commit whose parent is not the latest one.
_STATUS_ADVICE = {401: _WRITE_ADVICE, 403: _WRITE_ADVICE, 412: "Somebody else pushed at the same moment: push again."}
UNREACHABLE: tuple[type[Exception], ...] = (
    *(HTTPError, LocalEntryNotFoundError, FileMetadataError, XetDownloadError, RevisionResolutionError),
    *(ConnectionError, TimeoutError),
    RuntimeError,  # that a large file has not arrived, or that another download closed the connection of all
)
# What the client raises by itself. A `ValueError` of ours that passes through must not get a note about the Hub.
_ERRORS = (HFValidationError, LocalTokenNotFoundError, EntryNotFoundError, *UNREACHABLE)


@contextmanager
def hub_errors(
    what: str, repo_id: str, *, revision: str | None = None, repo_type: str = "model", writing: bool = False
) -> Iterator[None]:
    """Let the errors of the client be what they are, and note who needed it and what to do."""
    try:
        yield
    except _ERRORS as error:
        at = "" if revision is None else f" at '{revision}'"
        verb = "is pushed to" if writing else "needs"
        # A note, where another type or text would break whoever handles errors of `huggingface_hub`.
        error.add_note(f"{what} {verb} the {KINDS[repo_type]} '{repo_id}'{at}. {_advise(error, writing)}")
        raise


def is_unreachable(error: Exception) -> bool:
    """Whether the Hub gave no answer, or none yet."""
    # Without an answer there is no status; 429 says that one is to come later.
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
    return isinstance(error, UNREACHABLE) and (status == 429 or status >= 500)


def _advise(error: Exception, writing: bool) -> str:
    known = [advice for kinds, advice in _ADVICE if isinstance(error, kinds)]
    if not known and isinstance(error, HfHubHTTPError) and error.response.status_code in _STATUS_ADVICE:
        known = [_STATUS_ADVICE[error.response.status_code]]
    # An answer of the Hub is final, and going online again does not change it.
    if known or not is_unreachable(error):
        return known[0] if known else "Nothing was changed; correct what it names and try again."
    if writing:
        return "All of it is there, or nothing; go online and push again."
    return "Go online and try again; what has arrived is kept."


def resolve_commit(
    repo_id: str, revision: str | None = None, *, what: str, repo_type: str = "model", token: str | None = None
) -> str:
    """Pin a repository: find the commit that a branch or tag is at now."""
    # The client takes an empty revision for none, and would give the main branch.
    if revision == "":
        raise ValueError(f"{what} must be at a branch, tag or commit of '{repo_id}', got ''. Leave `revision` out.")
    with hub_errors(what, repo_id, revision=revision, repo_type=repo_type):
        # By this call and not by `model_info`: it answers from the cache where there is no connection.
        return HfApi(token=token).resolve_revision(repo_id, repo_type=repo_type, revision=revision).resolved


def fetch_files(
    repo_id: str,
    commit: str,
    patterns: Sequence[str],
    *,
    what: str,
    repo_type: str = "model",
    token: str | None = None,
    ignore: Sequence[str] = (),
) -> Path:
    """Download files of a commit into the client's cache, those that are not there yet."""
    with hub_errors(what, repo_id, revision=commit, repo_type=repo_type):
        return Path(
            snapshot_download(
                repo_id,
                revision=commit,
                repo_type=repo_type,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignore) or None,
                token=token,
            )
        )


def open_repo(
    repo_id: str, *, what: str, repo_type: str = "model", private: bool | None = None, token: str | None = None
) -> str:
    """Make a repository where there is none, and see that the token may write, before any work."""
    with hub_errors(what, repo_id, repo_type=repo_type, writing=True):
        api = HfApi(token=token)
        # Asked before any work: gigabytes may have to be written and hashed for a push that then fails for its token.
        access = api.whoami().get("auth", {}).get("accessToken", {})
        # Fine-grained tokens name another role, and what they may do shows only at the commit.
        if access.get("role") == "read":
            raise PermissionError(
                f"{what} needs a token that may write to the {KINDS[repo_type]} '{repo_id}', got one that may read. "
                f"{_WRITE_ADVICE}"
            )
        # The client's answer has the user's name before a bare one.
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        # `exist_ok` leaves a repository as public as it is, and says nothing.
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(
                f"'{repo_id}' must be private for `private=True`, got a public {KINDS[repo_type]} that is there "
                "already. Make it private in its settings, or push to another repository."
            )
        return repo_id


def publish(
    files: Mapping[str, str | Path | bytes],
    repo_id: str,
    *,
    what: str,
    message: str,
    repo_type: str = "model",
    replaced: Sequence[str] = (),
    revision: str | None = None,
    token: str | None = None,
    parent: str | None = None,
) -> CommitInfo:
    """Upload files in one commit: all of them are there afterwards, or none."""
    api = HfApi(token=token)
    with hub_errors(what, repo_id, revision=revision, repo_type=repo_type, writing=True):
        # One look at one commit, from which the card is merged and what is gone is known; it is the commit's parent
        # too.
        present, commit = _list_files(api, repo_id, revision, repo_type)
        # The card is replaced by a merged one below, and the caller's files are not ours to change.
        contents = dict(files)
        if CARD in contents and CARD in present:
            there = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=commit)
            card = contents[CARD]
            new = (card if isinstance(card, bytes) else Path(card).read_bytes()).decode("utf-8")
            contents[CARD] = merge_into(Path(there).read_bytes(), new, f"The card of '{repo_id}'").encode("utf-8")
        gone = sorted(
            name
            for name in set(present) - set(contents)
            # `fnmatch` lets `*` match slashes: a pattern of the top folder must not reach into others.
            if any(fnmatch.fnmatch(name, pattern) and ("/" in pattern or "/" not in name) for pattern in replaced)
        )
        operations = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in gone),
        ]
        try:
            return api.create_commit(
                repo_id,
                operations,
                # The client refuses an empty title.
                commit_message=message or what,
                repo_type=repo_type,
                revision=revision,
                # What came in since that commit would be undone without anybody seeing it; so the Hub refuses instead.
                parent_commit=parent or commit,
            )
        except ValueError as error:
            if not isinstance(error, HfHubHTTPError):  # the client has asked the Hub about the card's header
                error.add_note(f"Nothing was changed in '{repo_id}'; correct the metadata of the card and push again.")
            raise


def list_files(repo_id: str, *, what: str, revision: str | None, token: str | None) -> tuple[list[str], str]:
    """Look at a repository that is to be pushed to: names of its files, and the commit that they are of."""
    with hub_errors(what, repo_id, revision=revision, writing=True):
        return _list_files(HfApi(token=token), repo_id, revision, "model")


def _list_files(api: HfApi, repo_id: str, revision: str | None, repo_type: str) -> tuple[list[str], str]:
    if revision is not None:
        _open_branch(api, repo_id, revision, repo_type)
    info: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    return [sibling.rfilename for sibling in info.siblings or ()], info.sha


def _open_branch(api: HfApi, repo_id: str, revision: str, repo_type: str) -> None:
    """Make a branch where it is missing; nothing can be pushed to a tag or a commit."""
    refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    # Asked first: a tag of the same name must not stand in the way of a branch that is there.
    if revision in {ref.name for ref in refs.branches}:
        return
    # Who gives what looks like a commit means to pin, not to begin a branch of that name.
    is_tag = revision in {ref.name for ref in refs.tags}
    if is_tag or _COMMIT.fullmatch(revision) or revision.startswith("refs/") or not revision:
        raise ValueError(
            f"`revision` of a push to '{repo_id}' must be a branch, or the name of a new one, got "
            f"{'the tag ' if is_tag else ''}{revision!r}. Leave it out for the main branch."
        )
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)


def has_file(repo_id: str, names: Sequence[str], *, what: str) -> bool:
    """Tell whether a repository of the Hub holds any of some files."""
    with hub_errors(what, repo_id):
        return any(HfApi().file_exists(repo_id, name) for name in names)


def is_folder(source: str | os.PathLike[str]) -> bool:
    """Whether to look on this machine and not on the Hub: no id looks like this, or the folder exists."""
    text = os.fspath(source)
    # An address has more slashes than an id and would else be looked for as a folder.
    if "://" in text:  # an address in place of an id: the client says so
        return False
    is_path = (
        not isinstance(source, str)
        or text.startswith((".", "/", "~"))
        or text.endswith("/")
        or bool({"\\", ":"} & set(text))
    )
    return is_path or text.count("/") > 1 or os.path.isdir(text)  # a name that no folder can have is none
