"""The Hub in one place: pin to a commit, fetch, publish in one commit, and say clearly what went wrong."""

from __future__ import annotations

import fnmatch
import logging
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
    constants,
    get_token,
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
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from .card_merging import merge_card

logger = logging.getLogger(__name__)

KINDS = {"model": "model", "dataset": "data set"}
CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_UNREACHABLE = (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, FileMetadataError, XetDownloadError)
_UNREACHABLE += (RevisionResolutionError, ConnectionError, TimeoutError)  # type: ignore[assignment]


@contextmanager
def hub_errors(
    what: str,
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    token: str | None = None,
    writing: bool = False,
) -> Iterator[None]:
    """Turn what the client raises into one clear error that names the repository and says what to do."""
    kind = KINDS[repo_type]
    try:
        yield
    except HFValidationError as error:
        place = "pushed to" if writing else "a folder or"
        raise ValueError(
            f"{what} must be {place} the id of a {kind} on the Hub (`name` or `user/name`), got {repo_id!r}. Check "
            f"the {'id' if writing else 'path and the spelling'}."
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{what} needs access to the gated {kind} '{repo_id}', got refused {_who(token)}. Accept its terms at "
            f"{_page(repo_id, repo_type)}, then log in by `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        place = "pushed to" if writing else "a folder, or"
        raise FileNotFoundError(
            f"{what} must be {place} a {kind} on the Hub that you can see, got '{repo_id}', which does not exist "
            f"or is private{_other_type(repo_id, repo_type, token)}. Check the id{_ask_login(token)}."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{what} must be at a branch, tag or commit of '{repo_id}', got revision '{revision}', which is none"
            f"{_known_revisions(repo_id, repo_type, token)}. Correct the revision."
        ) from error
    except LocalTokenNotFoundError as error:
        raise _no_write(what, repo_id, kind, token) from error
    except HfHubHTTPError as error:
        raise _by_status(error, what, repo_id, kind, token) from error
    except _UNREACHABLE as error:
        raise _unreachable(what, repo_id, kind, writing, error) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{what} must have all of its files in '{repo_id}', got: {_first_line(error)}. Check the repository."
        ) from error


def _by_status(error: HfHubHTTPError, what: str, repo_id: str, kind: str, token: str | None) -> Exception:
    """The error of an answer that has no class of its own."""
    status = getattr(error.response, "status_code", 0)
    if status in (401, 403):
        return _no_write(what, repo_id, kind, token, error)
    if status == 412:
        return RuntimeError(
            f"{what} must be pushed onto the latest commit of '{repo_id}', got a newer one: somebody else pushed at "
            "the same moment. Nothing was changed; push again."
        )
    if status == 429 or status >= 500:
        return ConnectionError(
            f"{what} needs an answer of the Hub about '{repo_id}', got status {status}. Nothing was changed; wait a "
            "little and try again."
        )
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(
            f"{what} must have all of its files in '{repo_id}', got: {_first_line(error)}. Check the repository."
        )
    return OSError(
        f"{what} could not use the {kind} '{repo_id}', got status {status}: {_reason(error)}. Nothing was changed; "
        "correct what it names and try again."
    )


def _unreachable(what: str, repo_id: str, kind: str, writing: bool, error: BaseException) -> ConnectionError:
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    if writing:
        return ConnectionError(
            f"{what} must be pushed to the {kind} '{repo_id}' on {constants.ENDPOINT}, got no connection{offline}: "
            f"{_first_line(error)}. All of it is there, or nothing; go online and push again."
        )
    return ConnectionError(
        f"{what} needs the {kind} '{repo_id}' from {constants.ENDPOINT} or the cache, got no connection{offline} "
        f"and no whole copy: {_first_line(error)}. Go online and try again; what has arrived is kept."
    )


def _no_write(
    what: str, repo_id: str, kind: str, token: str | None, error: BaseException | None = None
) -> PermissionError:
    reason = f" ({_reason(error)})" if isinstance(error, HfHubHTTPError) else ""
    return PermissionError(
        f"{what} needs a token that may use the {kind} '{repo_id}' in this way, got refused {_who(token)}{reason}. "
        "Log in by `hf auth login` with a token of role `write`, or set HF_TOKEN."
    )


def _reason(error: HfHubHTTPError) -> str:
    """What the Hub itself says, in one line."""
    return _one_line(error.server_message or error)


def _one_line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")


def _who(token: str | None) -> str:
    return "with the token given" if token else "with your token" if get_token() else "without a token"


def _ask_login(token: str | None) -> str:
    return "" if token or get_token() else "; if it is private, log in by `hf auth login` or set HF_TOKEN"


def _page(repo_id: str, repo_type: str) -> str:
    return f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(repo_type, '')}{repo_id}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _other_type(repo_id: str, repo_type: str, token: str | None) -> str:
    """Whether the id is one of another type of repository, the commonest mistake."""
    [other] = KINDS.keys() - {repo_type}
    try:
        found = HfApi(token=token).repo_exists(repo_id, repo_type=other)
    except (HTTPError, HfHubHTTPError, OSError):
        return ""
    return f" (there is a {KINDS[other]} of that id)" if found else ""


def _known_revisions(repo_id: str, repo_type: str, token: str | None) -> str:
    try:
        refs = HfApi(token=token).list_repo_refs(repo_id, repo_type=repo_type)
    except (HTTPError, HfHubHTTPError, OSError):
        return ""
    return f" (it has {[ref.name for ref in [*refs.branches, *refs.tags]][:8]})"


def resolve_commit(
    repo_id: str, revision: str | None = None, *, what: str, repo_type: str = "model", token: str | None = None
) -> str:
    """Pin a repository: find the commit that a branch or tag is at now."""
    if revision == "":
        raise ValueError(f"{what} must be at a branch, tag or commit of '{repo_id}', got ''. Leave `revision` out.")
    with hub_errors(what, repo_id, revision=revision, repo_type=repo_type, token=token):
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
    with hub_errors(what, repo_id, revision=commit, repo_type=repo_type, token=token):
        try:
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
        except RuntimeError as error:
            # Of several downloads at once, the first that loses its connection closes the client of the others.
            if "client has been closed" not in str(error):
                raise
            raise ConnectionError("the connection was lost") from error


def open_repo(
    repo_id: str, *, what: str, repo_type: str = "model", private: bool | None = None, token: str | None = None
) -> str:
    """Make a repository where there is none, and see that the token may write, before any work."""
    with hub_errors(what, repo_id, repo_type=repo_type, token=token, writing=True):
        api = HfApi(token=token)
        access = api.whoami().get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise _no_write(what, repo_id, KINDS[repo_type], token)
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
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
    with hub_errors(what, repo_id, revision=revision, repo_type=repo_type, token=token, writing=True):
        if revision is not None:
            open_branch(api, repo_id, revision, repo_type)
        info: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        present = {sibling.rfilename for sibling in info.siblings or ()}
        contents = dict(files)
        if CARD in contents and CARD in present:
            there = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=info.sha)
            contents[CARD] = _merge(Path(there).read_bytes(), contents[CARD], repo_id)
        gone = sorted(
            name
            for name in present - set(contents)
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
                commit_message=message or what,
                repo_type=repo_type,
                revision=revision,
                parent_commit=parent or info.sha,
            )
        except RuntimeError as error:  # so the client tells that a large file has not arrived
            raise ConnectionError(_first_line(error.__cause__ or error)) from error
        except ValueError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            raise ValueError(
                f"The card of '{repo_id}' must have metadata that the Hub takes, such as a licence by its short name "
                f"('apache-2.0'), got: {_one_line(error)}. Nothing was changed; correct it and push again."
            ) from error


def open_branch(api: HfApi, repo_id: str, revision: str, repo_type: str) -> None:
    """Make a branch where it is missing; nothing can be pushed to a tag or a commit."""
    refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    if revision in {ref.name for ref in refs.branches}:
        return
    is_tag = revision in {ref.name for ref in refs.tags}
    if is_tag or _COMMIT.fullmatch(revision) or revision.startswith("refs/") or not revision:
        raise ValueError(
            f"`revision` of a push to '{repo_id}' must be a branch, or the name of a new one, got "
            f"{'the tag ' if is_tag else ''}{revision!r}. Leave it out for the main branch."
        )
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)


def _merge(existing: bytes, new: str | Path | bytes, repo_id: str) -> bytes:
    text = new.decode("utf-8") if isinstance(new, bytes) else Path(new).read_text(encoding="utf-8")
    try:
        merged = merge_card(existing.decode("utf-8"), text)
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(
            f"The card that is in '{repo_id}' must be text with a YAML header, to be kept and merged, got: "
            f"{_one_line(error)}. Correct or delete its {CARD} there, and push again."
        ) from error
    if merged.kept:
        logger.warning(
            f"The card of '{repo_id}' was edited by hand; these parts of it are kept as they are: {list(merged.kept)}."
        )
    return merged.text.encode("utf-8")


def is_folder(source: str | os.PathLike[str]) -> bool:
    """Whether a pool is to be looked for on this machine: no id of the Hub looks like this, or the folder exists."""
    text = os.fspath(source)
    if "://" in text:  # an address in place of an id: the client says so
        return False
    is_path = not isinstance(source, str) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    return is_path or Path(text).is_dir()
