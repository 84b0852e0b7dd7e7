"""The door to the Hub: pinned, fetched and published as a whole, and every refusal in one clear sentence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from traceback import format_exception

import pytest
from hub_server import OTHER_TOKEN, READ_TOKEN
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from hf_cosupervise.hub.client import UNREACHABLE, fetch_files, is_folder, open_repo, publish, resolve_commit

WHAT = "The student"


def publish_files(files: dict, repo_id: str = "someone/thing", **keywords):
    return publish(files, repo_id, what=WHAT, message="Some files", **keywords)


# ── pinning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_branch_and_tag_are_pinned_and_a_commit_needs_no_request(hub):
    first = hub.create("someone/thing", {"config.json": b"{}"})
    HfApi().create_tag("someone/thing", tag="v1")
    publish_files({"config.json": b'{"a": 1}'})
    assert resolve_commit("someone/thing", "v1", what=WHAT) == first
    assert resolve_commit("someone/thing", what=WHAT) == hub.commits("someone/thing")[0].oid != first
    before = len(hub.requests)
    assert resolve_commit("someone/thing", first, what=WHAT) == first and len(hub.requests) == before


def test_without_a_connection_the_cache_tells_the_commit(hub):
    commit = hub.create("someone/thing", {"config.json": b"{}"})
    hf_hub_download("someone/thing", "config.json")
    with hub.down():
        assert resolve_commit("someone/thing", what=WHAT) == commit
        with pytest.raises(RevisionResolutionError, match="The student needs .* Go online and try again"):
            resolve_commit("someone/other", what=WHAT)
    code = (
        "from hf_cosupervise.hub.client import resolve_commit\n"
        f"print(resolve_commit('someone/thing', what='x') == '{commit}')\nresolve_commit('a/b', what='x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "True\n" and "x needs the model 'a/b'. Go online and try" in done.stderr.splitlines()[-1]


def test_a_renamed_repository_is_followed(hub):
    commit = hub.create("someone/old", {"config.json": b"{}"})
    hub.rename("someone/old", "someone/new")
    assert resolve_commit("someone/old", what=WHAT) == commit
    assert (fetch_files("someone/old", commit, ["*.json"], what=WHAT) / "config.json").read_bytes() == b"{}"


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("repo_id", ["someone/a thing", "a/b/c", "someone/-x-", ""])
def test_an_id_that_cannot_be_one(hub, repo_id):
    with pytest.raises(HFValidationError, match=f"The student needs the model '{repo_id}'. Check the id, or the path"):
        resolve_commit(repo_id, what=WHAT)
    assert not hub.requests


def test_a_repository_that_is_not_there_or_of_another_type(hub):
    hub.create("someone/data", {"a.csv": b"a"}, repo_type="dataset")
    for repo_id in ("someone/nothing", "someone/data"):
        hub.requests.clear()
        with pytest.raises(
            RepositoryNotFoundError,
            match=f"The student needs the model '{repo_id}'. Check the id; if it is private, log",
        ):
            resolve_commit(repo_id, what=WHAT)
        assert len(hub.requests) == 1  # none to explain it
    with pytest.raises(RepositoryNotFoundError, match="The pool needs the data set 'someone/nothing' at 'v1'."):
        resolve_commit("someone/nothing", "v1", what="The pool", repo_type="dataset")


def test_a_private_repository_of_somebody_else(hub, monkeypatch):
    hub.create("someone/secret", {"config.json": b"{}"}, private=True)
    assert resolve_commit("someone/secret", what=WHAT)
    with pytest.raises(RepositoryNotFoundError, match="if it is private, log in"):
        resolve_commit("someone/secret", what=WHAT, token=OTHER_TOKEN)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match="if it is private, log in"):
        resolve_commit("someone/secret", what=WHAT)


def test_a_gated_repository(hub):
    commit = hub.create("other/gated", {"config.json": b"{}"}, gated=True)
    with pytest.raises(
        GatedRepoError, match=f"needs the model 'other/gated' at '{commit}'. Accept its terms on its page"
    ):
        fetch_files("other/gated", commit, ["*"], what=WHAT)


def test_a_revision_that_does_not_exist(hub):
    hub.create("someone/thing", {"config.json": b"{}"})
    with pytest.raises(RevisionNotFoundError, match="model 'someone/thing' at 'v2'. Correct the revision.") as caught:
        resolve_commit("someone/thing", "v2", what=WHAT)
    assert len(caught.value.__notes__) == 1
    with pytest.raises(RevisionNotFoundError, match="Correct the revision"):
        fetch_files("someone/thing", "0" * 40, ["*"], what=WHAT)


def test_a_wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nonsense")
    with pytest.raises(
        HfHubHTTPError, match="The student is pushed to the model 'someone/new'. Log in by `hf auth login`"
    ):
        open_repo("someone/new", what=WHAT)


def test_who_may_not_write_is_told_before_any_work(hub, monkeypatch):
    with pytest.raises(PermissionError, match="got one that may read. Log in by `hf auth login` with a token of role"):
        open_repo("someone/thing", what=WHAT, token=READ_TOKEN)
    with pytest.raises(HfHubHTTPError, match="role `write`"):
        open_repo("other/thing", what=WHAT)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LocalTokenNotFoundError, match="role `write`"):
        open_repo("someone/thing", what=WHAT)
    assert not [request for request in hub.requests if request.method == "POST" and request.status == 200]


def test_no_error_and_no_log_shows_a_token(hub, caplog):
    caplog.set_level(logging.DEBUG)
    for repo_id, token in (("someone/thing", READ_TOKEN), ("someone/thing", OTHER_TOKEN)):
        with pytest.raises(OSError) as caught:
            open_repo(repo_id, what=WHAT, token=token)
        assert token not in "".join(format_exception(caught.value))
    publish_files({"a.json": b"{}"}, open_repo("someone/thing", what=WHAT))
    assert "TokenOfTheTests" not in caplog.text


def test_a_revision_of_nothing(hub):
    with pytest.raises(
        ValueError, match="at a branch, tag or commit of 'someone/thing', got ''. Leave `revision` out"
    ):
        resolve_commit("someone/thing", "", what=WHAT)


def test_of_several_downloads_the_first_to_fail_closes_the_others(hub, monkeypatch):
    def fail(*args, **keywords):
        raise RuntimeError("Cannot send a request, as the client has been closed.")

    monkeypatch.setattr("hf_cosupervise.hub.client.snapshot_download", fail)
    with pytest.raises(RuntimeError, match="Go online and try again; what has arrived is kept"):
        fetch_files("someone/thing", "0" * 40, ["*"], what=WHAT)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a/b", False), ("a", False), ("./a", True), ("a/b/c", True), ("a/", True), ("~/a", True), ("/a", True),
     ("C:/a", True), ("a\\b", True), (Path("a/b"), True), ("https://huggingface.co/a/b", False), ("here", True)],
)  # fmt: skip
def test_a_folder_or_an_id(tmp_path, monkeypatch, source, expected):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_folder(source) == expected


# ── fetching ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_download_that_breaks_off_goes_on(hub):
    commit = hub.create("someone/thing", {"config.json": b"{}", "model.safetensors": bytes(300_000)})
    hub.fault("GET .*/model.safetensors", "cut", times=50)
    with pytest.raises(UNREACHABLE, match="try again; what has arrived is kept"):
        fetch_files("someone/thing", commit, ["*"], what=WHAT)
    hub.clear_faults()
    folder = fetch_files("someone/thing", commit, ["*"], what=WHAT)
    assert (folder / "model.safetensors").read_bytes() == bytes(300_000)


# ── publishing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_commit_for_all_files_and_none_for_the_same_again(hub, tmp_path):
    repo_id = open_repo("thing", what=WHAT)
    assert repo_id == "someone/thing"
    (tmp_path / "w").write_bytes(bytes(1000))
    files = {"config.json": b"{}", "model.safetensors": tmp_path / "w", "sub/a.json": b"1"}
    before = len(hub.commits(repo_id))
    commit = publish_files(files)
    assert len(hub.commits(repo_id)) == before + 1 and commit.oid == hub.commits(repo_id)[0].oid
    publish_files(files)
    assert len(hub.commits(repo_id)) == before + 1
    assert sum(request.method == "PUT" for request in hub.requests) == 1  # the weights, once


def test_what_was_left_by_a_push_before_goes_and_the_rest_stays(hub):
    hub.create("someone/thing", {"old.json": b"1", "sub/old.json": b"1", "docs/deep.json": b"1", "mine.txt": b"mine"})
    publish_files({"new.json": b"2"}, replaced=["*.json", "sub/*"])
    assert set(hub.files("someone/thing")) == {".gitattributes", "new.json", "docs/deep.json", "mine.txt"}


def test_a_branch_is_made_where_it_is_missing(hub):
    repo_id = open_repo("someone/thing", what=WHAT)
    for content in (b"1", b"2"):
        publish_files({"a.json": content}, revision="draft")
    assert hub.files(repo_id, "draft")["a.json"] == b"2" and "a.json" not in hub.files(repo_id)


def test_only_a_branch_can_be_pushed_to(hub):
    commit = hub.create("someone/thing", {"a.json": b"1"})
    HfApi().create_tag("someone/thing", tag="v1")
    for revision in ("v1", commit, commit[:8], "refs/pr/1"):
        with pytest.raises(ValueError, match="must be a branch, or the name of a new one, got"):
            publish_files({"a.json": b"2"}, revision=revision)
    publish_files({"a.json": b"2"}, revision="feature/x")
    assert hub.files("someone/thing", "feature/x")["a.json"] == b"2" and hub.files("someone/thing")["a.json"] == b"1"


def test_private_is_not_ignored_where_the_repository_is_public(hub):
    hub.create("someone/thing")
    with pytest.raises(ValueError, match="must be private for `private=True`, got a public model that is there"):
        open_repo("someone/thing", what=WHAT, private=True)
    assert open_repo("someone/secret", what=WHAT, private=True) == "someone/secret"
    assert open_repo("someone/secret", what=WHAT, private=True) and HfApi().model_info("someone/secret").private


def test_what_the_hub_says_is_passed_on(hub):
    hub.create("someone/thing")
    hub.fault("validate-yaml", 400)
    with pytest.raises(ValueError, match="Nothing was changed in 'someone/thing'; correct the metadata of the card"):
        publish_files({"README.md": b"---\nlicense: my own\n---\n\n# Thing\n"})
    hub.fault("POST .*/commit/", 400)
    with pytest.raises(BadRequestError, match="Nothing was changed; correct what it names"):
        publish_files({"a.json": b"1"})


@pytest.mark.parametrize(
    "card",
    [b"---\n: [\n---\n\n# Broken\n", "---\n---\n\n# Gr\u00fc\u00dfe\n".encode("latin-1")],
    ids=["yaml", "latin-1"],
)
def test_a_card_that_cannot_be_read_names_its_repository(hub, card):
    hub.create("someone/thing", {"README.md": card})
    with pytest.raises(ValueError, match="The card of 'someone/thing' must be a card to merge into, got"):
        publish_files({"README.md": b"---\ntags:\n- ours\n---\n\n# Ours\n"})
    assert hub.files("someone/thing")["README.md"] == card


def test_a_card_edited_by_hand_keeps_its_text(hub, caplog):
    hub.create("someone/thing", {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n\nBy hand.\n"})
    publish_files({"README.md": b"---\ntags:\n- ours\n---\n\n# Ours\n\n## Use\n\nLike this.\n"})
    card = hub.files("someone/thing")["README.md"].decode()
    assert "license: mit" in card and "- ours" in card and card.endswith("-->\n\n# Mine\n\nBy hand.\n")
    assert "edited by hand" in caplog.text


@pytest.mark.parametrize("where", ["PUT ", "POST .*/commit/", "POST .*/batch", "POST .*/preupload"])
@pytest.mark.parametrize("action", ["drop", 503])
def test_a_push_that_dies_leaves_the_repository_as_it_was_and_can_be_made_again(hub, where, action):
    hub.create("someone/thing", {"a.json": b"1", "model.safetensors": bytes(100)})
    before = hub.files("someone/thing")
    files = {"a.json": b"2", "model.safetensors": bytes(200)}
    hub.fault(where, action, times=50)
    with pytest.raises(UNREACHABLE, match="go online and push again"):
        publish_files(files)
    assert hub.files("someone/thing") == before
    hub.clear_faults()
    publish_files(files)
    assert hub.files("someone/thing")["model.safetensors"] == bytes(200)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub):
    hub.create("someone/thing")
    hub.fault("POST .*/commit/", "cut")
    with pytest.raises(UNREACHABLE, match="All of it is there, or nothing; go online and push again"):
        publish_files({"a.json": b"1"})
    count = len(hub.commits("someone/thing"))
    publish_files({"a.json": b"1"})
    assert hub.files("someone/thing")["a.json"] == b"1" and len(hub.commits("someone/thing")) == count


def test_of_two_pushes_at_the_same_moment_none_overwrites_the_other(hub):
    hub.create("someone/thing", {"a.json": b"0"})
    hub.fault("POST .*/commit/", "slow", times=2)

    def push(number: int):
        try:
            return publish_files({"a.json": str(number).encode(), f"{number}.json": b"x"})
        except HfHubHTTPError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(push, [1, 2]))
    errors = [outcome for outcome in outcomes if isinstance(outcome, HfHubHTTPError)]
    assert len(errors) == 1 and "Somebody else pushed at the same moment" in errors[0].__notes__[0]
    winner = 2 if isinstance(outcomes[0], HfHubHTTPError) else 1
    assert hub.files("someone/thing")["a.json"] == str(winner).encode()
