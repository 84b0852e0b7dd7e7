"""Pools on the Hub: pushed in one commit, pinned when loaded, and never in the way of somebody else's data."""

from __future__ import annotations

import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from accelerate import debug_launcher
from conftest import HF_HOME
from datasets import Dataset, DatasetDict, Features, Image, load_dataset
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image as PILImage

from hf_cosupervise.data import loading
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.hub.client import UNREACHABLE
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.teachers.labeling import build_pool

pytestmark = pytest.mark.core

LABELS = ("ant", "bee", "cat")
ID = "someone/pool"
TEACHERS = [Teacher("org/root"), Teacher("org/left", level=1), Teacher("org/right", level=1)]


def make_pool(
    teachers: list[Teacher] = TEACHERS[:2], num_examples: int = 40, first: int = 0, inputs: bool = True
) -> PseudolabelPool:
    """A pool of random answers; a teacher's answers depend on its name alone."""
    predictions = {
        teacher.name: np.random.default_rng(sum(teacher.name.encode())).dirichlet(np.ones(3), num_examples)
        for teacher in teachers
    }
    ids = list(range(first, first + num_examples))
    texts = Dataset.from_dict({"text": [f"text {value}" for value in ids]}) if inputs else None
    hierarchy = TeacherHierarchy(LABELS, teachers)
    return PseudolabelPool.from_predictions(hierarchy, ids, predictions, inputs=texts, facts={"root": {"seconds": 2}})


def assert_same(one: PseudolabelPool, other: PseudolabelPool) -> None:
    assert one.hierarchy == other.hierarchy and one.facts == other.facts and one.source == other.source
    assert one.ids.tolist() == other.ids.tolist()
    assert (one.inputs is None) == (other.inputs is None)
    if one.inputs is not None and other.inputs is not None:
        assert one.inputs.to_dict() == other.inputs.to_dict()
    for name in one.hierarchy.names:
        np.testing.assert_array_equal(one.label_ids(name), other.label_ids(name))
        np.testing.assert_array_equal(one.label_probs(name), other.label_probs(name))


def uploads(hub: HubServer) -> list[int]:
    """Sizes of the large files that were sent since the log was last emptied."""
    return [request.body_bytes for request in hub.requests if request.method == "PUT" and request.status == 200]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header(hub: HubServer) -> dict[str, Any]:
    return json.loads(hub.files(ID, repo_type="dataset")["pool.json"])


# ── there and back ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_pushed_in_one_commit_and_loaded(hub: HubServer, tmp_path: Path) -> None:
    pool = make_pool()
    pool.save(tmp_path / "pool")
    before = files(tmp_path / "pool")
    info = PseudolabelPool.load(tmp_path / "pool").push_to_hub(ID, commit_message="Answers", license="mit", tags=["x"])

    [commit, _] = hub.commits(ID, "dataset")
    assert (commit.title, commit.oid) == ("Answers", info.oid)
    assert sorted(hub.files(ID, repo_type="dataset")) == [".gitattributes", *sorted(before)]
    assert files(tmp_path / "pool") == before
    loaded = PseudolabelPool.load(ID, verify=True)
    assert_same(loaded, pool)
    assert (loaded.repo_id, loaded.commit) == (ID, info.oid) and (pool.repo_id, pool.commit) == (None, None)
    card = hub.files(ID, repo_type="dataset")["README.md"].decode()
    assert "license: mit" in card and "- x\n" in card and ID in card


def test_a_loaded_pool_is_mapped_from_the_cache(hub: HubServer, tmp_path: Path) -> None:
    make_pool().push_to_hub(ID)
    pool = PseudolabelPool.load(ID)
    paths = [file["filename"] for data in (*pool.teachers.values(), pool.inputs) for file in data.cache_files]  # type: ignore[union-attr]
    assert len(paths) == 3 and all(str(HF_HOME) in path and pool.commit in path for path in paths)  # type: ignore[operator]
    pool.save(tmp_path / "pool")
    for path in (tmp_path / "pool").rglob("*"):
        assert not path.is_symlink()
    shutil.rmtree(HF_HOME / "hub")
    assert_same(PseudolabelPool.load(tmp_path / "pool", verify=True), pool)
    # What was mapped is still there, though its files are not: it can be written again.
    pool.save(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "pool")


def test_where_a_pool_is_from_stays_true(hub: HubServer) -> None:
    make_pool().push_to_hub(ID)
    pool = PseudolabelPool.load(ID)
    fewer = pool.with_hierarchy(TeacherHierarchy(LABELS, TEACHERS[:1]))
    assert (fewer.repo_id, fewer.commit) == (ID, pool.commit)
    some = pool.select([0, 1])
    assert (some.repo_id, some.commit) == (None, None)


def test_each_revision_is_what_it_was(hub: HubServer) -> None:
    first = make_pool().push_to_hub(ID).oid
    HfApi().create_tag(ID, tag="v1", repo_type="dataset")
    make_pool(TEACHERS).push_to_hub(ID, revision="wide")
    assert PseudolabelPool.load(ID).hierarchy.names == ("root", "left")
    for revision, number in (("v1", 2), (first, 2), ("wide", 3), ("main", 2)):
        assert len(PseudolabelPool.load(ID, revision=revision).hierarchy.names) == number
    hub.rename(ID, "someone/other", "dataset")
    assert PseudolabelPool.load(ID).commit == PseudolabelPool.load("someone/other").commit == first


def test_plain_datasets_read_a_pushed_pool(hub: HubServer) -> None:
    pool = make_pool()
    pool.push_to_hub(ID)
    plain = load_dataset(ID, "left", split="train")
    assert plain["label_ids"][:] == pool.label_ids("left").tolist() and plain["id"][:] == pool.ids.tolist()
    first = next(iter(load_dataset(ID, "left", split="train", streaming=True)))
    np.testing.assert_array_equal(first["label_probs"], pool.label_probs("left")[0])
    assert load_dataset(ID, split="train")["text"][:2] == ["text 0", "text 1"]


def test_images_go_there_and_back(hub: HubServer, tmp_path: Path) -> None:
    PILImage.fromarray(np.full((4, 4, 3), 9, dtype=np.uint8)).save(tmp_path / "image.png")
    images = Dataset.from_dict({"image": [str(tmp_path / "image.png")] * 2}, features=Features({"image": Image()}))
    hierarchy = TeacherHierarchy(LABELS, TEACHERS[:1])
    pool = PseudolabelPool.from_predictions(hierarchy, [1, 2], {"root": np.eye(3)[:2]}, inputs=images)
    pool.push_to_hub(ID)
    (tmp_path / "image.png").unlink()
    found = PseudolabelPool.load(ID).inputs
    assert found is not None and np.asarray(found[1]["image"]).tolist() == np.full((4, 4, 3), 9).tolist()


# ── pushing again ───────────────────────────────────────────────────────────────────────────────────────────────────


def several_pools(folder: Path) -> dict[str, PseudolabelPool]:
    """The same pool in every way in which it may be met."""
    made = make_pool()
    made.save(folder / "pool")
    mapped = PseudolabelPool.load(folder / "pool")
    return {
        "made": made,
        "mapped": mapped,
        "from the Hub": PseudolabelPool.load(ID),
        "all rows selected": mapped.select(range(len(mapped))),
        "all rows in a list": mapped.select(list(range(len(mapped)))),
        "under the same hierarchy": mapped.with_hierarchy(mapped.hierarchy),
        "of a wider one": make_pool(TEACHERS).with_hierarchy(mapped.hierarchy),
    }


def test_the_same_pool_makes_no_second_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = make_pool().push_to_hub(ID).oid
    for what, pool in several_pools(tmp_path).items():
        if what == "of a wider one":
            pool.facts.pop("right")
        hub.requests.clear()
        assert pool.push_to_hub(ID).oid == commit, what
        assert uploads(hub) == [] and len(hub.commits(ID, "dataset")) == 2, what


def test_another_teacher_uploads_its_file_alone(hub: HubServer, tmp_path: Path) -> None:
    make_pool().push_to_hub(ID)
    before = hub.files(ID, repo_type="dataset")
    hub.requests.clear()
    make_pool(TEACHERS).push_to_hub(ID)
    after = hub.files(ID, repo_type="dataset")
    assert uploads(hub) == [len(after["teachers/right/data.arrow"])]
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"teachers/right/data.arrow", "pool.json", "README.md"}
    assert PseudolabelPool.load(ID, verify=True).hierarchy.names == ("root", "left", "right")


def test_a_teacher_is_dropped_only_on_demand(hub: HubServer) -> None:
    make_pool(TEACHERS).push_to_hub(ID)
    with pytest.raises(ValueError) as error:
        make_pool().push_to_hub(ID)
    assert str(error.value) == (
        "The pool must hold everything that the one in 'someone/pool' holds, got one without [\"teacher 'right'\"]. "
        "Add it to this pool by `build_pool(..., reuse=...)`, or delete it there by `replace=True`."
    )
    assert len(hub.commits(ID, "dataset")) == 2
    make_pool().push_to_hub(ID, replace=True)
    [commit, *_] = hub.commits(ID, "dataset")
    assert list(commit.deleted) == ["teachers/right/data.arrow"]
    assert PseudolabelPool.load(ID).hierarchy.names == ("root", "left")


def test_inputs_stay_at_home(hub: HubServer) -> None:
    pool = make_pool()
    pool.push_to_hub(ID)
    pool.push_to_hub(ID, inputs=False)
    [commit, *_] = hub.commits(ID, "dataset")
    assert list(commit.deleted) == ["inputs/data.arrow"]
    card = hub.files(ID, repo_type="dataset")["README.md"].decode()
    assert "config_name: inputs" not in card and "inputs =" not in card
    loaded = PseudolabelPool.load(ID)
    assert loaded.inputs is None and loaded.ids.tolist() == pool.ids.tolist()
    loaded.push_to_hub(ID)
    assert len(hub.commits(ID, "dataset")) == 3
    # A pool that never had them does not delete those of others.
    pool.push_to_hub(ID)
    with pytest.raises(ValueError, match=r"got one without \['the inputs'\]"):
        loaded.push_to_hub(ID)


def test_a_card_edited_by_hand_and_the_licence_stay(hub: HubServer) -> None:
    make_pool().push_to_hub(ID, license="cc-by-4.0", tags=["ants"], source_dataset="org/ants")
    card = hub.files(ID, repo_type="dataset")["README.md"].decode()
    hub.create(ID, {"README.md": f"{card}\n## Thanks\n\nTo the ants.\n".encode()}, repo_type="dataset")
    make_pool(TEACHERS).push_to_hub(ID)
    card = hub.files(ID, repo_type="dataset")["README.md"].decode()
    for words in ("To the ants.", "config_name: right", "license: cc-by-4.0", "- ants\n", "- org/ants\n"):
        assert words in card
    make_pool(TEACHERS).push_to_hub(ID, license="mit")
    assert "license: mit" in hub.files(ID, repo_type="dataset")["README.md"].decode()


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: make_pool(num_examples=39), "a pool of the same 40 examples in the same order, got one of 39"),
        (lambda: make_pool(first=1), "same 40 examples in the same order, got one of 40 examples with other ids"),
    ],
)
def test_a_pool_of_other_examples_is_left_alone(hub: HubServer, other: Any, sentence: str) -> None:
    other().push_to_hub(ID)
    hub.requests.clear()
    with pytest.raises(ValueError, match=f"{sentence}.*Push to another repository, or delete this one."):
        make_pool().push_to_hub(ID)
    assert len(hub.commits(ID, "dataset")) == 2 and not uploads(hub)


def edit_header(hub: HubServer, **changes: Any) -> None:
    new = {key: value for key, value in (header(hub) | changes).items() if value is not None}
    hub.create(ID, {"pool.json": json.dumps(new).encode()}, repo_type="dataset")


def test_a_pool_of_an_older_version_is_known_by_its_size(hub: HubServer) -> None:
    make_pool(first=1).push_to_hub(ID)
    edit_header(hub, ids_digest=None, files=None)
    assert len(PseudolabelPool.load(ID)) == 40
    with pytest.raises(ValueError, match="must have digests to be verified"):
        PseudolabelPool.load(ID, verify=True)
    make_pool().push_to_hub(ID)
    assert PseudolabelPool.load(ID).ids.tolist() == list(range(40))


def test_other_contents_are_left_alone(hub: HubServer) -> None:
    make_pool().push_to_hub(ID)
    edit_header(hub, hierarchy={"labels": ["x", "y", "z"], "teachers": [{"model": "root"}, {"model": "left"}]})
    with pytest.raises(ValueError, match=r"must hold a pool of the labels \['ant', 'bee', 'cat'\], got one of \['x',"):
        make_pool().push_to_hub(ID)
    edit_header(hub, format_version=2)
    with pytest.raises(ValueError, match="must have format version 1, got 2. Update hf_cosupervise"):
        make_pool().push_to_hub(ID)
    hub.create("someone/photos", {"train.parquet": b"PAR1", "README.md": b"# Photos"}, repo_type="dataset")
    with pytest.raises(ValueError) as error:
        make_pool().push_to_hub("someone/photos")
    assert str(error.value) == (
        "'someone/photos' must be new, empty or hold a pool, got the files ['train.parquet']. Push to another "
        "repository, or delete this one."
    )
    hub.create("someone/new", {"README.md": b"# Mine\n"}, repo_type="dataset")
    make_pool().push_to_hub("someone/new")
    assert b"# Mine" in hub.files("someone/new", repo_type="dataset")["README.md"]


def test_what_somebody_else_pushed_since_is_not_overwritten(hub: HubServer) -> None:
    make_pool().push_to_hub(ID)
    mine = PseudolabelPool.load(ID)
    probs = {name: np.roll(mine.decode(name), 1, axis=1) for name in mine.hierarchy.names}
    corrected = PseudolabelPool.from_predictions(mine.hierarchy, mine.ids.tolist(), probs, inputs=mine.inputs)
    corrected.push_to_hub(ID)
    with pytest.raises(ValueError, match="must be the latest one of .* which was pushed since it was loaded"):
        mine.push_to_hub(ID)
    count = len(hub.commits(ID, "dataset"))
    PseudolabelPool.load(ID).push_to_hub(ID)  # the latest one: nothing to do
    assert len(hub.commits(ID, "dataset")) == count
    mine.push_to_hub(ID, replace=True)
    assert len(hub.commits(ID, "dataset")) == count + 1


def test_an_address_is_no_id(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="The pool needs the data set 'https://.*Check the id"):
        PseudolabelPool.load("https://huggingface.co/datasets/someone/pool")


def test_private_means_private(hub: HubServer) -> None:
    make_pool().push_to_hub("someone/secret", private=True)
    with pytest.raises(RepositoryNotFoundError, match="if it is private, log in"):
        PseudolabelPool.load("someone/secret", token=OTHER_TOKEN)
    assert len(PseudolabelPool.load("someone/secret", token=READ_TOKEN)) == 40
    make_pool().push_to_hub(ID)
    with pytest.raises(ValueError, match="must be private for `private=True`, got a public data set"):
        make_pool().push_to_hub(ID, private=True)


def test_who_may_not_push(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (READ_TOKEN, OTHER_TOKEN, "hf_wrong"):
        with pytest.raises(OSError, match="The pool .* `hf auth login`"):
            make_pool().push_to_hub(ID, token=token)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LocalTokenNotFoundError, match="`hf auth login`"):
        make_pool().push_to_hub(ID)
    with pytest.raises(HFValidationError, match="The pool is pushed to the data set 'a b'"):
        make_pool().push_to_hub("a b", token=WRITE_TOKEN)


@pytest.mark.parametrize(
    ("source", "kind", "sentence"),
    [
        ("someone/missing", RepositoryNotFoundError, "needs the data set 'someone/missing'. Check the id"),
        ("someone/model", RepositoryNotFoundError, "needs the data set 'someone/model'"),
        ("someone/data", FileNotFoundError, r"'someone/data' is no pool: .* but \['.gitattributes', 'train.csv'\]"),
        ("other/gated", GatedRepoError, "needs the data set 'other/gated' at .* Accept its terms"),
        ("a b", HFValidationError, "The pool needs the data set 'a b'. Check the id, or the path"),
        ("./pool", FileNotFoundError, "'pool' is not a pool: it has no 'pool.json'"),
        (Path("some/pool"), FileNotFoundError, "'some/pool' is not a pool: it has no 'pool.json'"),
    ],
)
def test_what_is_no_pool(hub: HubServer, source: Any, kind: type[Exception], sentence: str) -> None:
    hub.create("someone/model", {"config.json": b"{}"})
    hub.create("someone/data", {"train.csv": b"text\na\n"}, repo_type="dataset")
    hub.create("other/gated", {"pool.json": b"{}"}, repo_type="dataset", gated=True)
    with pytest.raises(kind, match=sentence):
        PseudolabelPool.load(source)


def test_revisions_that_are_none(hub: HubServer, tmp_path: Path) -> None:
    make_pool().push_to_hub(ID)
    for revision in ("v9", "0" * 40):
        with pytest.raises(RevisionNotFoundError, match=f"'someone/pool' at '{revision}'. Correct the revision"):
            PseudolabelPool.load(ID, revision=revision)
    make_pool().save(tmp_path / "pool")
    with pytest.raises(ValueError, match="`revision` is for pools on the Hub, got 'v9'"):
        PseudolabelPool.load(tmp_path / "pool", revision="v9")


HOSTILE: list[tuple[bytes, str]] = [
    (b"{", "got no JSON"),
    (b"\xff\xfe", "got no JSON"),
    (b"[" * 100_000, "got no JSON"),
    (b'{"format_version": 1' + b"0" * 10_000 + b"}", "got no JSON"),
    (b"[1]", "got a list"),
    (b"{}", "must have format version 1, got None"),
    (b'{"format_version": 1}', "got no int as `num_examples`"),
]


@pytest.mark.parametrize(("content", "sentence"), HOSTILE, ids=range(len(HOSTILE)))
def test_headers_that_are_none(hub: HubServer, content: bytes, sentence: str) -> None:
    hub.create(ID, {"pool.json": content}, repo_type="dataset")
    with pytest.raises(ValueError, match=sentence):
        PseudolabelPool.load(ID)
    with pytest.raises(ValueError, match=sentence):
        make_pool().push_to_hub(ID)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": 2}, "must have format version 1, got 2. Update hf_cosupervise"),
        ({"num_examples": 10**60}, "must hold 1000.* examples, got 40"),
        ({"num_examples": "many"}, "got no int as `num_examples`"),
        ({"has_inputs": 1}, "got no bool as `has_inputs`"),
        ({"hierarchy": []}, "got no dict as `hierarchy`"),
        ({"hierarchy": {"labels": ["a", "b"], "teachers": [3]}}, "got no list of teachers"),
        ({"hierarchy": {"labels": 3, "teachers": [{"model": "a"}]}}, "`labels` of a hierarchy must be a list, got 3"),
        ({"hierarchy": {"labels": ["a", "b"], "teachers": [{"model": "a", "level": 10**12}]}}, "1 teachers cannot"),
        ({"hierarchy": {"labels": ["a", "b"], "teachers": [{"model": "a", "name": "../x"}]}}, "got '../x'"),
        ({"hierarchy": {"labels": ["a", "b"], "teachers": [{"model": "a", "name": "*"}]}}, r"got '\*'"),
        ({"hierarchy": {"labels": ["a", "b"], "teachers": [{"model": "a/.."}]}}, r"got '\.\.'"),
        ({"facts": {"root": 3}}, "got `facts` that are no dictionary per teacher"),
        ({"source": {"dataset": 3}}, "got a `source` that is not all text"),
        ({"files": {"inputs/data.arrow": ["big", 3]}}, r"got \['big', 3\] among `files`"),
        ({"files": {"inputs/data.arrow": [10**30, "00"]}}, "inputs/data.arrow' of pool .* bytes instead of 1000"),
    ],
    ids=str,
)
def test_headers_that_cannot_be_right(hub: HubServer, changes: dict[str, Any], sentence: str) -> None:
    make_pool().push_to_hub(ID)
    edit_header(hub, **changes)
    hub.requests.clear()
    with pytest.raises(ValueError, match=sentence):
        PseudolabelPool.load(ID)
    if "files" not in changes and changes.get("num_examples") != 10**60:
        assert not [request for request in hub.requests if ".arrow" in request.path]


def test_files_that_are_not_what_was_written(hub: HubServer) -> None:
    make_pool().push_to_hub(ID)
    path = "teachers/left/data.arrow"
    content = hub.files(ID, repo_type="dataset")[path]
    hub.create(ID, {path: content[:-100]}, repo_type="dataset")
    with pytest.raises(ValueError, match=rf"{path}' of pool .*got {len(content) - 100} bytes instead of"):
        PseudolabelPool.load(ID)
    flipped = bytearray(content)
    flipped[content.rindex(make_pool().label_ids("left").tobytes()) + 1] ^= 1
    hub.create(ID, {path: bytes(flipped)}, repo_type="dataset")
    with pytest.raises(ValueError, match=rf"{path}' of pool .*got other content than its digest tells"):
        PseudolabelPool.load(ID, verify=True)
    HfApi().delete_file(path, ID, repo_type="dataset")
    with pytest.raises(FileNotFoundError, match=rf"Pool 'someone/pool' at [0-9a-f]* lacks '.*{path}'. Go online"):
        PseudolabelPool.load(ID)


def test_nothing_of_a_pool_is_run(hub: HubServer, tmp_path: Path) -> None:
    make_pool().push_to_hub(ID)
    payload = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()".encode()
    pickled = b"cbuiltins\nexec\n(V" + payload + b"\ntR."
    hub.create(ID, {"pool.py": payload, "data.pkl": pickled, "teachers/left/x.pt": pickled}, repo_type="dataset")
    hub.requests.clear()
    assert len(PseudolabelPool.load(ID)) == 40
    assert not (tmp_path / "ran").exists()
    assert not [request for request in hub.requests if request.path.endswith((".py", ".pkl", ".pt"))]


# ── when things break ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", [500, "drop"])
@pytest.mark.parametrize("where", ["PUT /lfs/", "POST .*/commit/"])
def test_a_push_that_dies_leaves_everything_as_it_was(
    hub: HubServer, tmp_path: Path, where: str, action: int | str
) -> None:
    make_pool().push_to_hub(ID)
    make_pool(TEACHERS).save(tmp_path / "pool")
    before, local = hub.files(ID, repo_type="dataset"), files(tmp_path / "pool")
    hub.fault(where, action, times=math.inf)
    with pytest.raises(UNREACHABLE, match=f"The pool is pushed to the data set '{ID}'"):
        PseudolabelPool.load(tmp_path / "pool").push_to_hub(ID)
    assert hub.files(ID, repo_type="dataset") == before and files(tmp_path / "pool") == local
    hub.clear_faults()
    hub.requests.clear()
    PseudolabelPool.load(tmp_path / "pool").push_to_hub(ID)
    arrived = where.startswith("POST")  # before the commit died
    assert len(uploads(hub)) == (0 if arrived else 1)
    assert_same(PseudolabelPool.load(ID, verify=True), make_pool(TEACHERS))


def test_two_who_push_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pool().push_to_hub(ID)
    write, others = PseudolabelPool._write, [make_pool(TEACHERS)]

    def slow_write(self: PseudolabelPool, folder: Path, inputs: bool = True) -> Any:
        while others:  # meanwhile, somebody else adds a teacher
            others.pop().push_to_hub(ID)
        return write(self, folder, inputs)

    monkeypatch.setattr(PseudolabelPool, "_write", slow_write)
    with pytest.raises(ValueError, match=r"got one without \[\"teacher 'right'\"\]"):
        make_pool().push_to_hub(ID)
    hub.fault("POST .*/commit/", 412)
    with pytest.raises(HfHubHTTPError, match="Somebody else pushed at the same moment: push again"):
        make_pool(TEACHERS).push_to_hub(ID, license="mit")


def test_loading_goes_on_where_it_was(hub: HubServer) -> None:
    make_pool().push_to_hub(ID)
    hub.fault("GET .*left/data.arrow", "drop", times=math.inf)
    with pytest.raises(UNREACHABLE, match="The pool needs the data set 'someone/pool'.* what has arrived is kept"):
        PseudolabelPool.load(ID)
    hub.clear_faults()
    assert_same(PseudolabelPool.load(ID, verify=True), make_pool())
    shutil.rmtree(HF_HOME / "hub")
    assert_same(PseudolabelPool.load(ID, verify=True), make_pool())


def test_a_cache_that_vanishes_meanwhile(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_cosupervise.pool import hub as pool_module

    make_pool().push_to_hub(ID)
    read = pool_module.read_header

    def read_and_lose(path: Path, what: Any) -> Any:
        found = read(path, what)
        shutil.rmtree(HF_HOME / "hub")
        return found

    monkeypatch.setattr(pool_module, "read_header", read_and_lose)
    assert_same(PseudolabelPool.load(ID), make_pool())  # the other files come after the header
    hub.fault("GET .*data.arrow", "drop", times=math.inf)
    with pytest.raises(UNREACHABLE, match="Go online and try again"):
        PseudolabelPool.load(ID)
    hub.clear_faults()
    monkeypatch.setattr(pool_module, "read_header", read)
    assert_same(PseudolabelPool.load(ID), make_pool())


def test_the_cache_is_enough(hub: HubServer) -> None:
    commit = make_pool().push_to_hub(ID).oid
    with hub.down(), pytest.raises(UNREACHABLE, match="Go online and try again"):
        PseudolabelPool.load(ID)
    PseudolabelPool.load(ID)
    with hub.down():
        assert_same(PseudolabelPool.load(ID), make_pool())
        assert PseudolabelPool.load(ID).commit == commit


def test_the_token_is_written_nowhere(hub: HubServer, tmp_path: Path) -> None:
    make_pool().push_to_hub(ID, token=WRITE_TOKEN)
    PseudolabelPool.load(ID, token=READ_TOKEN).save(tmp_path / "pool")
    for folder in (tmp_path, HF_HOME):
        for path in folder.rglob("*"):
            if path.is_file():
                assert b"TokenOfTheTests" not in path.read_bytes(), path


# ── data from the Hub ───────────────────────────────────────────────────────────────────────────────────────────────

quiet_pool = partial(build_pool, disable_tqdm=True)
ANSWERS = TeacherHierarchy(LABELS, [Teacher("answer", kind="column")])
DATA = "someone/data"


def push_data(repo_id: str = DATA, config: str = "default", split: str = "train", last: str = "cat") -> str:
    """Three answered rows on the Hub, and their commit."""
    rows = {"id": [1, 2, 3], "answer": ["ant", "bee", last], "text": ["a", "b", "c"]}
    Dataset.from_dict(rows).push_to_hub(repo_id, config, split=split, set_default=False)
    return str(HfApi().dataset_info(repo_id).sha)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_are_pinned_and_remembered(hub: HubServer, tmp_path: Path, streaming: bool) -> None:
    first = push_data()
    push_data(last="ant")
    pool = quiet_pool(DATA, ANSWERS, revision=first, streaming=streaming, output_dir=tmp_path / "pool")
    assert pool.hard_labels("answer").tolist() == [0, 1, 2]
    source = {"dataset": DATA, "config": "default", "split": "train", "commit": first}
    assert pool.source == pool.select([0]).source == pool.with_hierarchy(ANSWERS).source == source
    assert PseudolabelPool.load(tmp_path / "pool").source == source
    pool.push_to_hub(ID)
    assert PseudolabelPool.load(ID).source == source
    card = hub.files(ID, repo_type="dataset")["README.md"].decode()
    assert f"- {DATA}\n" in card and first[:12] in card
    newest = quiet_pool(DATA, ANSWERS, streaming=streaming)
    assert newest.hard_labels("answer").tolist() == [0, 1, 0] and newest.source["commit"] != first  # type: ignore[index]


def test_one_of_several(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    explain_offline(hub, monkeypatch)
    push_data()
    push_data(split="test", last="bee")
    for config in ("one", "two"):
        push_data("someone/several", config)
    assert quiet_pool(DATA, ANSWERS, split="test").hard_labels("answer").tolist() == [0, 1, 1]
    assert len(quiet_pool(DATA, ANSWERS, split="train[:2]+test[2:]")) == 3
    for streaming in (False, True):
        with pytest.raises(ValueError) as error:
            quiet_pool(DATA, ANSWERS, split="valid", streaming=streaming)
        assert str(error.value) == "`split` must be one of ['train', 'test'], got 'valid'. Choose one of them."
    assert quiet_pool("someone/several", ANSWERS, config_name="two").source["config"] == "two"  # type: ignore[index]
    for name in (None, "three"):
        with pytest.raises(ValueError) as error:
            quiet_pool("someone/several", ANSWERS, config_name=name)
        assert str(error.value) == (
            f"`config_name` must be one of ['one', 'two'] of 'someone/several', got {name!r}. Choose one."
        )


def explain_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """See that nothing is asked of the Hub inside an error handler."""
    explain = loading._explain

    def explain_alone(*arguments: Any) -> ValueError:
        with hub.down():
            return explain(*arguments)

    monkeypatch.setattr(loading, "_explain", explain_alone)


PAYLOAD = b"open('ran', 'w')"
REFUSED: list[tuple[str, dict[str, bytes], type[Exception], str]] = [
    ("someone/script", {"script.py": PAYLOAD, "train.csv": b"a"}, ValueError, "by a script: no code from the Hub is"),
    ("someone/pickles", {"data.pkl": b"cbuiltins\nexec\n(V" + PAYLOAD + b"\ntR."}, ValueError, "could run code when"),
    ("someone/none", {"notes.xyz": b""}, ValueError, "'notes.xyz'], none of which holds data"),
    ("someone/broken", {"train.json": b"{{{"}, ValueError, "must be data that `datasets` can read, got 'someone/b"),
    ("other/gated", {"train.csv": b"a"}, GatedRepoError, "`dataset` needs the data set 'other/gated'"),
    ("other/private", {"train.csv": b"a"}, RepositoryNotFoundError, "`dataset` needs the data set 'other/private'"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("repo_id", "content", "kind", "sentence"), REFUSED, ids=[case[0] for case in REFUSED])
def test_data_that_cannot_be_read(
    hub: HubServer,
    repo_id: str,
    content: dict[str, bytes],
    kind: type[Exception],
    sentence: str,
    streaming: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    explain_offline(hub, monkeypatch)
    hub.create(
        repo_id, content, repo_type="dataset", gated=repo_id == "other/gated", private=repo_id == "other/private"
    )
    with pytest.raises(kind, match=re.escape(sentence)):
        quiet_pool(repo_id, ANSWERS, streaming=streaming)
    assert not (tmp_path / "ran").exists()


def test_data_that_are_not_there(hub: HubServer, tmp_path: Path) -> None:
    push_data()
    for name, kind, sentence in (
        ("someone/missing", RepositoryNotFoundError, "needs the data set 'someone/missing'. Check the id"),
        ("a b", HFValidationError, "`dataset` needs the data set 'a b'. Check the id, or the path"),
        (str(tmp_path), ValueError, "`dataset` must be a folder that `save_to_disk` wrote"),
        ("./nowhere", ValueError, "`dataset` must be a folder that `save_to_disk` wrote, got './nowhere'"),
    ):
        with pytest.raises(kind, match=sentence):
            quiet_pool(name, ANSWERS)
    with pytest.raises(RevisionNotFoundError, match="at 'v9'. Correct the revision"):
        quiet_pool(DATA, ANSWERS, revision="v9")


def test_another_commit_in_the_cache_is_not_taken_for_the_one_wanted(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `datasets` falls back to whatever it has cached under that name, whichever commit was asked for
    push_data()
    quiet_pool(DATA, ANSWERS)
    hub.create(DATA, {"data.py": PAYLOAD}, repo_type="dataset")
    with pytest.raises(ValueError, match="no code from the Hub is run"):
        quiet_pool(DATA, ANSWERS)
    hub.create(DATA, gated=True, repo_type="dataset")
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    with pytest.raises(GatedRepoError, match="Accept its terms"):
        quiet_pool(DATA, ANSWERS)


def test_data_in_a_folder(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"id": [1, 2], "answer": ["ant", "bee"]})
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"a": rows, "b": rows.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert quiet_pool(str(tmp_path / "one"), ANSWERS).source is None
    assert len(quiet_pool(str(tmp_path / "two"), ANSWERS, split="b")) == 1
    with pytest.raises(ValueError, match=r"`split` must be one of \['a', 'b'\] of '.*two', got 'train'"):
        quiet_pool(str(tmp_path / "two"), ANSWERS)
    for options in ({"revision": "main"}, {"config_name": "x"}, {"streaming": True}):
        for data in (rows, str(tmp_path / "one")):
            with pytest.raises(ValueError, match=f"`{next(iter(options))}` is for data sets on the Hub, got it for"):
                quiet_pool(data, ANSWERS, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`split` is for data that are given by name, got 'test'"):
        quiet_pool(rows, ANSWERS, split="test")


def test_the_source_of_loaded_data_is_what_they_say_themselves() -> None:
    rows = Dataset.from_dict({"id": [1, 2], "answer": ["ant", "bee"]})
    assert quiet_pool(rows, ANSWERS).source is None
    urls = [f"hf://datasets/org/ants@{'a' * 40}/{name}.parquet" for name in ("one", "two")]
    rows.info.download_checksums = dict.fromkeys(urls, {})
    assert quiet_pool(rows.select([1]), ANSWERS).source == {"dataset": "org/ants", "commit": "a" * 40}
    for other in (f"hf://datasets/org/ants@{'b' * 40}/three.parquet", "https://elsewhere.org/three.parquet"):
        rows.info.download_checksums = dict.fromkeys([*urls, other], {})
        assert quiet_pool(rows, ANSWERS).source is None


def test_the_cache_is_enough_offline(hub: HubServer) -> None:
    commit = push_data()
    quiet_pool(DATA, ANSWERS)
    pushed = make_pool(num_examples=33).push_to_hub(ID).oid  # no other test's: the client remembers listings
    PseudolabelPool.load(ID)
    code = f"""
from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool
print(PseudolabelPool.load({ID!r}).commit, PseudolabelPool.load({ID!r}, revision={pushed!r}).commit)
answers = TeacherHierarchy({LABELS}, [Teacher("answer", kind="column")])
print(build_pool({DATA!r}, answers, disable_tqdm=True).source["commit"])
for changes in ({{"revision": "0" * 40}}, {{"config_name": "other"}}):
    try:
        build_pool({DATA!r}, answers, disable_tqdm=True, **changes)
    except Exception as error:
        print("Go online and try again" in "".join(getattr(error, "__notes__", [])))
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert done.stdout.split() == [pushed, pushed, commit, "True", "True"], done.stderr[-2000:]


# ── teachers that are labelled already ──────────────────────────────────────────────────────────────────────────────


def test_a_teacher_is_the_same_at_a_branch_and_at_its_commit(
    hub: HubServer, tiny_vit: str, tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    content = {path.name: path.read_bytes() for path in Path(tiny_vit).iterdir()}
    commit = hub.create("someone/vit", content)
    images = tiny_image_dataset.remove_columns("label").select(range(4))

    def hierarchy(**fields: Any) -> TeacherHierarchy:
        return TeacherHierarchy(("ant", "bee", "cat", "dog"), [Teacher("someone/vit", **fields)])

    quiet_pool(images, hierarchy(revision="main")).push_to_hub(ID)
    old = PseudolabelPool.load(ID)
    assert old.facts["vit"]["commit"] == commit
    hub.fault("GET .*model.safetensors", 500, times=math.inf)
    shutil.rmtree(HF_HOME / "hub" / "models--someone--vit")
    for same in (hierarchy(revision=commit), hierarchy()):
        new = quiet_pool(images, same, reuse=old)  # the weights cannot even be loaded
        np.testing.assert_array_equal(new.label_probs("vit"), old.label_probs("vit"))
    quiet_pool(images, hierarchy(), reuse=old, output_dir=tmp_path / "pool")
    file = tmp_path / "pool" / "teachers" / "vit" / "data.arrow"
    assert not file.is_symlink() and file.samefile(old.teachers["vit"].cache_files[0]["filename"])
    hub.create("someone/vit", {"config.json": content["config.json"] + b" "})
    for other in (hierarchy(), hierarchy(revision=commit, scope=["ant"])):
        with pytest.raises((OSError, RuntimeError)):
            quiet_pool(images, other, reuse=old)


def test_paths_of_this_machine_stay_here(
    hub: HubServer, tiny_vit: str, tiny_image_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tiny_image_dataset.remove_columns("label").select(range(4))
    monkeypatch.chdir(Path(tiny_vit).parent)
    teachers = [Teacher(tiny_vit, name="one"), Teacher("vit", name="two")]  # the same folder, as a path and a name
    pool = quiet_pool(images, TeacherHierarchy(("ant", "bee", "cat", "dog"), teachers))
    commit = pool.push_to_hub(ID).oid
    for path, content in hub.files(ID, repo_type="dataset").items():
        assert b"/tmp" not in content and str(Path(tiny_vit).parent).encode() not in content, path
    old = PseudolabelPool.load(ID)
    assert [teacher.model for teacher in old.hierarchy.teachers] == ["./vit", "./vit"]
    assert old.push_to_hub(ID).oid == pool.push_to_hub(ID).oid == commit
    monkeypatch.setattr("hf_cosupervise.teachers.forms.load_teacher", None)
    again = quiet_pool(images, pool.hierarchy, reuse=old)  # known by their weights
    np.testing.assert_array_equal(again.label_probs("two"), pool.label_probs("two"))


# ── several processes ───────────────────────────────────────────────────────────────────────────────────────────────


def _push_in_process(folder: Path, token: str) -> None:
    from torch.distributed import get_rank

    pool = make_pool()
    try:
        found = pool.push_to_hub(ID, token=token).oid
    except HfHubHTTPError as error:
        found = f"{type(error).__name__}: {error.__notes__}"
    (folder / f"{token[:5]}-{get_rank()}").write_text(found)


def test_only_the_first_process_pushes(hub: HubServer, tmp_path: Path) -> None:
    debug_launcher(_push_in_process, (tmp_path, WRITE_TOKEN), num_processes=2)
    [commit, _] = hub.commits(ID, "dataset")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [commit.oid] * 2
    assert sum("/preupload/" in request.path for request in hub.requests) == 1
    debug_launcher(_push_in_process, (tmp_path, OTHER_TOKEN), num_processes=2)
    refusals = {path.read_text() for path in tmp_path.glob(f"{OTHER_TOKEN[:5]}-*")}
    assert len(refusals) == 1 and refusals.pop().startswith('HfHubHTTPError: ["The pool is pushed to the data set')


def _build_in_process(folder: Path) -> None:
    from torch.distributed import get_rank

    pool = quiet_pool(DATA, ANSWERS, output_dir=folder / "pool")
    (folder / f"source-{get_rank()}").write_text(json.dumps(pool.source))


def test_two_processes_read_one_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = push_data()
    hub.requests.clear()
    debug_launcher(_build_in_process, (tmp_path,), num_processes=2)
    sources = [json.loads(path.read_text())["commit"] for path in sorted(tmp_path.glob("source-*"))]
    assert sources == [commit] * 2
    downloads = [request.path for request in hub.requests if request.method == "GET" and "parquet" in request.path]
    assert len(downloads) == 1


# ── the recipe ──────────────────────────────────────────────────────────────────────────────────────────────────────

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "build_pool.py"


def run_recipe(*arguments: str, folder: Path | None = None) -> str:
    """What the recipe prints: run here, or in a folder on two processes."""
    if folder is None:
        printed = io.StringIO()
        with patch.object(sys, "argv", ["build_pool.py", *arguments]), redirect_stdout(printed):
            runpy.run_path(str(RECIPE), run_name="__main__")
        return printed.getvalue()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(RECIPE)]
    done = subprocess.run([*start, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def test_the_recipe_goes_from_the_hub_to_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit = push_data()
    ANSWERS.save("hierarchy.yaml")
    hub.create("someone/teachers", {"hierarchy.yaml": Path("hierarchy.yaml").read_bytes()})
    wanted = ["--dataset", DATA, "--hierarchy", "someone/teachers", "--push_to_hub", ID, "--pool_dir", "pool"]
    wanted += ["--license", "mit", "--push_inputs", "false"]

    with pytest.raises(HfHubHTTPError, match="`hf auth login`"):  # before any work
        run_recipe(*wanted, "--push_to_hub", "other/pool")
    assert not Path("pool").exists()
    hub.fault("POST .*/commit/", 412)
    with pytest.raises(HfHubHTTPError, match="push again"):
        run_recipe(*wanted)
    assert len(PseudolabelPool.load("pool")) == 3
    printed = run_recipe(*wanted)  # only the push is left
    [pushed, _] = hub.commits(ID, "dataset")
    assert f"/commit/{pushed.oid}" in printed
    pool = PseudolabelPool.load(ID, verify=True)
    assert pool.source["commit"] == commit and pool.inputs is None  # type: ignore[index]
    assert b"license: mit" in hub.files(ID, repo_type="dataset")["README.md"]
    for changes in (["--split", "train[:1]"], ["--dataset", "someone/other"]):  # the pool of other data
        with pytest.raises(FileExistsError, match="choose another folder"):
            run_recipe(*wanted, *changes)
    wanted[-1] = "true"
    run_recipe(*wanted, "--pool_dir", "again", "--reuse", ID, "--revision", commit, "--hierarchy", "hierarchy.yaml")
    assert PseudolabelPool.load(ID).inputs is not None


@pytest.mark.slow
def test_the_recipe_on_two_processes(hub: HubServer, tmp_path: Path) -> None:
    push_data()
    ANSWERS.save(tmp_path / "hierarchy.yaml")
    wanted = ["--dataset", DATA, "--hierarchy", "hierarchy.yaml", "--push_to_hub", ID, "--private"]
    printed = run_recipe(*wanted, "--pool_dir", "pool", folder=tmp_path)
    assert printed.count("in pool") == printed.count("pushed to") == 1
    assert len(hub.commits(ID, "dataset")) == 2 and len(PseudolabelPool.load(ID)) == 3
    with pytest.raises(RuntimeError, match=r"\]: `dataset` needs the data set 'someone/missing'"):
        run_recipe(*wanted, "--pool_dir", "other", "--dataset", "someone/missing", folder=tmp_path)
