"""The Hub of the tests, asked by the real clients."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from datasets import Dataset, get_dataset_config_names, load_dataset
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    create_repo,
    hf_hub_download,
    list_repo_files,
    snapshot_download,
    upload_file,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "someone/things"


def uploads(hub: HubServer) -> int:
    return sum(request.method == "PUT" and request.path.startswith("/lfs/") for request in hub.requests)


def sent_commits(hub: HubServer) -> int:
    return sum(request.method == "POST" and "/commit/" in request.path for request in hub.requests)


def refused(call, *arguments, status: int, **options) -> HfHubHTTPError:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*arguments, **options)
    assert caught.value.response.status_code == status
    return caught.value


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_transformers_model_comes_back_pinned_by_branch_tag_and_commit(hub: HubServer, tiny_vit: str) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    first = model.push_to_hub(REPO, commit_message="First").oid
    AutoImageProcessor.from_pretrained(tiny_vit).push_to_hub(REPO)
    api = HfApi()
    api.create_tag(REPO, tag="v1", revision=first)
    api.create_branch(REPO, branch="old", revision="v1")
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.push_to_hub(REPO, commit_message="Second")

    load = AutoModelForImageClassification.from_pretrained
    assert_same_weights(load(REPO), model)
    for revision in ("v1", "old", first):
        pinned = load(REPO, revision=revision, adapter_kwargs={"revision": revision})
        torch.testing.assert_close(pinned.classifier.bias, model.classifier.bias - 1)
    assert AutoImageProcessor.from_pretrained(REPO).size["height"] == 8
    assert [commit.title for commit in hub.commits(REPO)][::3] == ["Second", "initial commit"]
    assert hub.commits(REPO)[0].added == ("model.safetensors",)
    assert [commit.title for commit in api.list_repo_commits(REPO)][0] == "Second"


def test_a_timm_model_comes_back_from_hf_hub(hub: HubServer, tiny_timm: str) -> None:
    import timm

    model = timm.create_model(f"local-dir:{tiny_timm}", pretrained=True)
    timm.models.push_to_hf_hub(model, REPO, private=True)
    assert hub.files(REPO).keys() >= {"config.json", "model.safetensors"}
    HfApi().create_tag(REPO, tag="v1")
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@v1"):
        assert_same_weights(timm.create_model(name, pretrained=True), model)


def test_a_peft_adapter_comes_back_on_its_base(hub: HubServer, tiny_vit: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageClassification

    AutoModelForImageClassification.from_pretrained(tiny_vit).push_to_hub("someone/base")
    base = AutoModelForImageClassification.from_pretrained("someone/base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.push_to_hub("someone/adapter")
    fresh = AutoModelForImageClassification.from_pretrained("someone/base")
    assert_same_weights(PeftModel.from_pretrained(fresh, "someone/adapter"), adapted)
    assert json.loads(hub.files("someone/adapter")["adapter_config.json"])["base_model_name_or_path"] == "someone/base"


def test_a_trainer_pushes_its_folder(hub: HubServer, tiny_vit: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    arguments = TrainingArguments(
        str(tmp_path), hub_model_id=REPO, push_to_hub=True, hub_private_repo=True, report_to="none", use_cpu=True
    )
    Trainer(model, arguments).push_to_hub()
    assert hub.files(REPO).keys() >= {"README.md", "config.json", "model.safetensors"}
    assert HfApi().model_info(REPO).private
    assert_same_weights(AutoModelForImageClassification.from_pretrained(REPO), model)


# -- datasets ---------------------------------------------------------------------------------------------------------


def test_datasets_of_two_configs_load_stream_and_stay_pinned(hub: HubServer) -> None:
    one, two = Dataset.from_dict({"x": list(range(20))}), Dataset.from_dict({"y": ["a", "b"]})
    one.push_to_hub(REPO, "one", split="train")
    two.push_to_hub(REPO, "two", split="test")
    HfApi().create_tag(REPO, tag="v1", repo_type="dataset")
    one.select(range(5)).push_to_hub(REPO, "one", split="train")

    assert get_dataset_config_names(REPO) == ["one", "two"]
    assert load_dataset(REPO, "one", split="train")["x"][:] == list(range(5))
    assert load_dataset(REPO, "two", split="test")["y"][:] == ["a", "b"]
    assert len(load_dataset(REPO, "one", split="train", revision="v1")) == 20
    streamed = load_dataset(REPO, "one", split="train", revision="v1", streaming=True)
    assert [row["x"] for row in streamed] == list(range(20))
    assert any(request.status == 206 for request in hub.requests)


def test_a_dataset_lands_on_a_branch(hub: HubServer) -> None:
    Dataset.from_dict({"x": [1]}).push_to_hub(REPO)
    Dataset.from_dict({"x": [1, 2]}).push_to_hub(REPO, revision="bigger")
    assert len(load_dataset(REPO, split="train")) == 1
    assert len(load_dataset(REPO, split="train", revision="bigger")) == 2


# -- files, cache and commits -----------------------------------------------------------------------------------------


def test_create_needs_no_client(hub: HubServer) -> None:
    commit = hub.create(REPO, {"a.txt": b"a", "sub/b.bin": b"\0" * 100})
    other = hub.create(REPO, {"a.txt": b"changed"}, branch="side")
    folder = Path(snapshot_download(REPO))
    assert folder.name == commit
    assert (folder / "sub/b.bin").read_bytes() == b"\0" * 100
    assert Path(hf_hub_download(REPO, "a.txt", revision=other)).read_text() == "changed"
    assert hub.files(REPO, "side")["a.txt"] == b"changed"
    assert {one.name for one in HfApi().list_repo_refs(REPO).branches} == {"main", "side"}


def test_listings_tell_size_hash_and_folders(hub: HubServer) -> None:
    hub.create(REPO, {"a.txt": b"hello\n", "sub/b.bin": b"12345", "sub/deep/c.txt": b"", "photo.x": b"\xff\xd8"})
    api = HfApi()
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert tree.keys() == {".gitattributes", "a.txt", "photo.x", "sub", "sub/b.bin", "sub/deep", "sub/deep/c.txt"}
    assert tree["a.txt"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # of `git hash-object`
    assert tree["a.txt"].lfs is None
    assert (tree["sub/b.bin"].lfs.size, tree["photo.x"].lfs.size) == (5, 2)
    assert [entry.path for entry in api.list_repo_tree(REPO, "sub")] == ["sub/b.bin", "sub/deep"]
    assert [entry.path for entry in api.get_paths_info(REPO, ["a.txt", "none", "sub"])] == ["a.txt", "sub"]
    sizes = {sibling.rfilename: sibling.size for sibling in api.model_info(REPO, files_metadata=True).siblings}
    assert sizes["sub/b.bin"] == 5
    assert HfFileSystem().cat_file(f"{REPO}/sub/b.bin", start=1, end=3) == b"23"
    assert [one.id for one in api.list_models(author="someone", search="thing")] == [REPO]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))


def test_what_has_not_changed_is_neither_uploaded_nor_committed(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    create_repo(REPO)
    first = upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert (uploads(hub), sent_commits(hub)) == (1, 1)
    assert upload_folder(repo_id=REPO, folder_path=tmp_path).oid == first.oid
    assert (uploads(hub), sent_commits(hub)) == (1, 1)
    (tmp_path / "config.json").write_text('{"a": 1}')
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert (uploads(hub), sent_commits(hub)) == (1, 2)  # the copy has a known content
    assert hub.commits(REPO)[0].added == ("config.json", "copy.safetensors")


def test_files_are_deleted_and_copied(hub: HubServer) -> None:
    hub.create(REPO, {"a.txt": b"a", "b.bin": b"b", "sub/c.txt": b"c", "sub/d.txt": b"d"})
    operations = [
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("sub/"),
        CommitOperationCopy("b.bin", "copied.bin"),
        CommitOperationAdd("new.txt", b"new"),
    ]
    HfApi().create_commit(REPO, operations, commit_message="Tidy up")
    assert hub.files(REPO).keys() == {".gitattributes", "b.bin", "copied.bin", "new.txt"}
    newest = hub.commits(REPO)[0]
    assert (newest.title, newest.deleted) == ("Tidy up", ("a.txt", "sub/c.txt", "sub/d.txt"))
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        HfApi().delete_file("a.txt", REPO)


def test_a_stale_parent_is_refused(hub: HubServer) -> None:
    old = hub.create(REPO, {"a.txt": b"a"})
    hub.create(REPO, {"a.txt": b"b"})
    add = [CommitOperationAdd("c.txt", b"c")]
    refused(HfApi().create_commit, REPO, add, commit_message="Late", parent_commit=old, status=412)
    assert "c.txt" not in hub.files(REPO)


def test_the_cache_serves_without_a_connection(hub: HubServer) -> None:
    commit = hub.create(REPO, {"a.txt": b"a"})
    path = hf_hub_download(REPO, "a.txt")
    code = "import sys; from huggingface_hub import hf_hub_download as d; print(d(sys.argv[1], 'a.txt'))"
    offline = subprocess.run(
        [sys.executable, "-c", code, REPO],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert offline.stdout.strip() == path
    with hub.down():
        assert hf_hub_download(REPO, "a.txt") == path
        assert hf_hub_download(REPO, "a.txt", revision=commit) == path
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(REPO, "b.txt")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "b.txt")


def test_cards_are_checked(hub: HubServer) -> None:
    create_repo(REPO)
    # Not `ModelCard.push_to_hub`: in huggingface_hub 1 it asks huggingface.co, whatever HF_ENDPOINT says.
    upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n# Title\n", path_in_repo="README.md", repo_id=REPO)
    assert ModelCard.load(REPO).data.to_dict() == {"license": "mit"}
    for broken in (b"---\nlicense: mit\n", b"---\n---\n# Title\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id=REPO)


# -- who may do what --------------------------------------------------------------------------------------------------


def test_whoami_knows_the_tokens(hub: HubServer) -> None:
    assert whoami()["name"] == "someone"
    assert whoami(OTHER_TOKEN)["name"] == "other"
    assert whoami(READ_TOKEN)["auth"]["accessToken"]["role"] == "read"
    assert "Invalid user token" in str(refused(whoami, "hf_wrong", status=401))


def test_missing_things_are_named(hub: HubServer) -> None:
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("someone/nothing", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("gpt2")
    hub.create(REPO)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(REPO, revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "a.txt")
    assert not HfApi().repo_exists(REPO, repo_type="dataset")


def test_a_private_repository_is_hidden(hub: HubServer) -> None:
    hub.create(REPO, {"a.txt": b"a"}, private=True)
    assert list_repo_files(REPO, token=READ_TOKEN) == [".gitattributes", "a.txt"]
    for token, status in ((False, 401), (OTHER_TOKEN, 404)):
        for call in (HfApi().model_info, list_repo_files, lambda *a, **k: hf_hub_download(*a, "a.txt", **k)):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call(REPO, token=token)
            assert caught.value.response.status_code == status
    assert not list(HfApi().list_models(author="someone", token=OTHER_TOKEN))
    HfApi().update_repo_settings(REPO, gated="manual")
    assert HfApi().model_info(REPO).private
    HfApi().update_repo_settings(REPO, private=False)
    assert list_repo_files(REPO, token=False) == [".gitattributes", "a.txt"]


def test_a_gated_repository_shows_itself_but_not_its_files(hub: HubServer) -> None:
    hub.create(REPO, {"a.txt": b"a"}, gated=True)
    assert HfApi().model_info(REPO, token=OTHER_TOKEN).gated == "auto"
    for token, status in ((False, 401), (OTHER_TOKEN, 403)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download(REPO, "a.txt", token=token)
        assert caught.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            HfApi().auth_check(REPO, token=token)
    assert Path(hf_hub_download(REPO, "a.txt")).read_text() == "a"


def test_writing_needs_a_writer_of_the_namespace(hub: HubServer) -> None:
    hub.create(REPO)
    add = {"path_or_fileobj": b"a", "path_in_repo": "a.txt", "repo_id": REPO}
    refused(upload_file, **add, token=READ_TOKEN, status=403)
    refused(upload_file, **add, token=OTHER_TOKEN, status=403)
    refused(upload_file, **add, token=False, status=401)
    refused(upload_file, **add, token="hf_wrong", status=401)
    refused(create_repo, "someone/more", token=READ_TOKEN, status=403)
    refused(create_repo, "other/more", status=403)
    refused(create_repo, REPO, status=409)
    assert create_repo(REPO, exist_ok=True).repo_id == REPO
    assert len(hub.commits(REPO)) == 1
    upload_file(**add)


def test_a_renamed_repository_is_followed(hub: HubServer) -> None:
    hub.create(REPO, {"a.txt": b"a"})
    hub.rename(REPO, "someone/renamed")
    assert HfApi().model_info(REPO).id == "someone/renamed"
    assert Path(hf_hub_download(REPO, "a.txt")).read_text() == "a"
    upload_file(path_or_fileobj=b"\0", path_in_repo="b.bin", repo_id=REPO)
    assert hub.files("someone/renamed")["b.bin"] == b"\0"
    HfApi().move_repo("someone/renamed", "someone/again")
    assert list_repo_files(REPO) == [".gitattributes", "a.txt", "b.bin"]
    HfApi().delete_repo("someone/again")
    assert not HfApi().repo_exists(REPO)


def test_branches_and_tags_come_and_go(hub: HubServer) -> None:
    first = hub.create(REPO, {"a.txt": b"a"})
    api = HfApi()
    api.create_branch(REPO, branch="dev/one", revision=first)
    refused(api.create_branch, REPO, branch="dev/one", status=409)
    upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id=REPO, revision="dev/one")
    api.create_tag(REPO, tag="v1", revision="dev/one")
    refused(api.create_tag, REPO, tag="v1", status=409)
    assert "b.txt" in api.list_repo_files(REPO, revision="v1")
    assert "b.txt" not in api.list_repo_files(REPO)
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="dev/one")
    refs = api.list_repo_refs(REPO)
    assert [(one.name, one.target_commit) for one in refs.branches] == [("main", first)]
    assert not refs.tags


# -- faults -----------------------------------------------------------------------------------------------------------


def test_the_client_survives_what_passes(hub: HubServer) -> None:
    data = bytes(range(256)) * 100_000  # a client takes 10 MB at once, and resumes after them
    hub.create(REPO, {"a.bin": data})
    hub.fault(r"GET .*/resolve/", "cut")
    assert Path(hf_hub_download(REPO, "a.bin")).read_bytes() == data
    assert [request.status for request in hub.requests if request.method == "GET"] == [200, 206]
    hub.fault(r"PUT /lfs/", 503, times=2)
    hub.fault(r"PUT /lfs/", "drop", after=2)
    upload_file(path_or_fileobj=b"\0", path_in_repo="b.bin", repo_id=REPO)
    assert [request.status for request in hub.requests if request.method == "PUT"] == [503, 503, 0, 200]
    assert hub.files(REPO)["b.bin"] == b"\0"


def test_a_commit_may_happen_though_its_answer_is_lost(hub: HubServer) -> None:
    hub.create(REPO)
    add = {"path_or_fileobj": b"a", "path_in_repo": "a.txt", "repo_id": REPO}
    hub.fault(r"/commit/", 500)
    refused(upload_file, **add, status=500)
    assert "a.txt" not in hub.files(REPO)
    hub.fault(r"/commit/", "cut", method="POST")
    with pytest.raises(Exception, match="(?i)closed|incomplete|disconnected"):
        upload_file(**add)
    assert "a.txt" in hub.files(REPO)


def test_a_fault_that_stays_ends_the_retries(hub: HubServer) -> None:
    hub.create(REPO)
    hub.fault(r"/preupload/", 503, times=math.inf)
    refused(upload_file, path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO, status=503)
    assert sum("/preupload/" in request.path for request in hub.requests) == 6


def test_a_slow_answer_arrives(hub: HubServer) -> None:
    hub.create(REPO)
    hub.fault(r"GET /api/models/", "slow")
    assert HfApi().model_info(REPO).id == REPO


def test_the_log_tells_who_asked_what(hub: HubServer) -> None:
    hub.create(REPO, {"a b.txt": b"a"})
    hf_hub_download(REPO, "a b.txt", token=READ_TOKEN)
    head = hub.requests[-2] if hub.requests[-1].method == "GET" else hub.requests[-1]
    assert (head.path, head.token, head.status) == (f"/{REPO}/resolve/main/a b.txt", READ_TOKEN, 200)
    upload_file(path_or_fileobj=b"\0" * 1234, path_in_repo="b.bin", repo_id=REPO)
    assert [request.body_bytes for request in hub.requests if request.method == "PUT"] == [1234]
    assert {request.token for request in hub.requests if "/preupload/" in request.path} == {WRITE_TOKEN}
    hub.reset()
    assert hub.requests == []
    assert not HfApi().repo_exists(REPO)


def test_a_forked_process_reaches_it(hub: HubServer) -> None:
    hub.create(REPO)
    HfApi().model_info(REPO)  # so that a connection is open
    process = multiprocessing.get_context("fork").Process(target=create_repo, args=("someone/forked",))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 0
    assert HfApi().repo_exists("someone/forked")


def test_no_other_machine_is_reached(hub: HubServer) -> None:
    with pytest.raises(OSError, match="501"):
        urllib.request.urlopen("https://example.com", timeout=5)


def test_it_serves_from_the_command_line(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "hub_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--home", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline().strip()
        assert line.startswith("export HF_ENDPOINT=http://127.0.0.1:")
        api = HfApi(endpoint=line.partition("=")[2], token=WRITE_TOKEN)
        assert api.create_repo(REPO).repo_id == REPO
    finally:
        process.terminate()
        process.wait(timeout=10)
        process.stdout.close()
