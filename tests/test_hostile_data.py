"""Pools and data of strangers: nothing in them makes us open, copy or publish one of our files, or an address."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, DatasetDict, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from hub_server import HubServer
from huggingface_hub import HfApi
from PIL import Image as PILImage

from hf_cosupervise import AnswerPool, labeling_function
from hf_cosupervise.data.loading import DataChoice, find_data, load_splits
from hf_cosupervise.data.local import load_images, load_table
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.processes import Processes
from hf_cosupervise.teachers.labeling import build_pool

HIERARCHY = TeacherHierarchy(["a", "b"], [Teacher("t/root")])
CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ALONE = Processes(0, 1)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of ours that strangers would like to have; an image, so that nothing fails where it is opened."""
    path = tmp_path / "secret.png"
    path.write_bytes(png(200))
    return path


def make_pool(folder: Path, inputs: Dataset | None = None) -> Path:
    probs = np.full((2, 2), 0.5, np.float32)
    inputs = Dataset.from_dict({"id": [0, 1], "text": ["x", "y"]}) if inputs is None else inputs
    PseudolabelPool.from_predictions(HIERARCHY, [0, 1], {"root": probs}, inputs=inputs).save(folder)
    return folder


def put_inputs(folder: Path, features: Features, column: list[Any], **more: list[Any]) -> None:
    """Replace a pool's inputs by others, as a stranger would, with digests that fit."""
    path, schema = folder / "inputs/data.arrow", features.arrow_schema
    with ArrowWriter(path=str(path), features=features) as writer:
        writer.write_table(pa.table({"id": [0, 1], "cell": column, **more}, schema=schema))
        writer.finalize()
    change_header(
        folder, files={"inputs/data.arrow": [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]}
    )


def change_header(folder: Path, files: dict[str, Any]) -> None:
    header = json.loads((folder / "pool.json").read_text())
    header["files"] |= files
    (folder / "pool.json").write_text(json.dumps(header))


def nothing_opened(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    """Make every way in which the file could be read an error."""
    import builtins

    real_open, real_bytes = builtins.open, Path.read_bytes

    def refuse(real: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            assert str(path) != str(secret), "the file was opened"
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr(builtins, "open", refuse(real_open))
    monkeypatch.setattr(io, "open", refuse(io.open))
    monkeypatch.setattr(Path, "read_bytes", refuse(real_bytes))


# ── cells of a pool ─────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = {
    "image": (Image(), lambda cell: cell),
    "not decoded": (Image(decode=False), lambda cell: cell),
    "list of images": (List(Image()), lambda cell: [{"bytes": b"x", "path": None}, cell]),
    "fixed list": (List(Image(), length=2), lambda cell: [cell, cell]),
    "struct": ({"inner": Image()}, lambda cell: {"inner": cell}),
    "list of structs": (List({"inner": {"page": Image()}}), lambda cell: [{"inner": {"page": cell}}]),
    "audio": (Audio(), lambda cell: cell),
    "plain struct": ({"bytes": Value("binary"), "path": Value("string")}, lambda cell: cell),
}


@pytest.mark.parametrize("place", ["file", "address", "relative", "empty"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_with_a_path_for_a_cell_is_refused(kind, place, tmp_path, secret, monkeypatch):
    path = {"file": str(secret), "address": "http://127.0.0.1:9/x.png", "relative": "secret.png", "empty": ""}[place]
    feature, wrap = KINDS[kind]
    folder = make_pool(tmp_path / "pool")
    good, bad = ({"bytes": content, "path": name} for content, name in ((png(1), "x.png"), (None, path)))
    put_inputs(folder, Features({"id": Value("int64"), "cell": feature}), [wrap(good), wrap(bad)])
    monkeypatch.chdir(tmp_path)
    nothing_opened(monkeypatch, secret)
    with pytest.raises(ValueError) as error:
        PseudolabelPool.load(folder, verify=True)
    assert f"the path {path!r} without content in row 1 of column 'cell'. It was not opened." in str(error.value)


def test_null_cells_and_bytes_with_a_path_are_fine(tmp_path, secret):
    folder = make_pool(tmp_path / "pool")
    features = Features({"id": Value("int64"), "cell": List(Image())})
    put_inputs(folder, features, [None, [{"bytes": png(1), "path": str(secret)}, None]])
    pool = PseudolabelPool.load(folder)
    pool.select([1]).save(tmp_path / "mine")
    again = PseudolabelPool.load(tmp_path / "mine").inputs
    assert np.array_equal(np.asarray(again[0]["cell"][0])[0, 0], [1, 0, 0])
    assert secret.read_bytes() not in (tmp_path / "mine/inputs/data.arrow").read_bytes()


def test_the_row_is_counted_through_chunks_and_empty_lists(tmp_path):
    rows = [
        [],
        None,
        [{"bytes": b"x", "path": None}] * 3,
        [{"bytes": b"x", "path": None}, {"bytes": None, "path": "p"}],
    ]
    probs = np.full((4, 2), 0.5, np.float32)
    inputs = Dataset.from_dict({"id": range(4)})
    PseudolabelPool.from_predictions(HIERARCHY, range(4), {"root": probs}, inputs=inputs).save(tmp_path / "pool")
    features = Features({"id": Value("int64"), "cell": List(Image())})
    path = tmp_path / "pool/inputs/data.arrow"
    with ArrowWriter(path=str(path), features=features) as writer:
        for start in (0, 2):
            ids, cells = list(range(start, start + 2)), rows[start : start + 2]
            writer.write_table(pa.table({"id": ids, "cell": cells}, schema=features.arrow_schema))
        writer.finalize()
    change_header(tmp_path / "pool", {"inputs/data.arrow": [path.stat().st_size, ""]})
    with pytest.raises(ValueError, match="in row 3 of column 'cell'"):
        PseudolabelPool.load(tmp_path / "pool")


def test_a_users_own_files_are_read_into_the_pool(tmp_path, secret):
    # the paths in data that the user gives are the user's own
    own = Dataset.from_dict(
        {"id": [0, 1], "image": [str(secret), None]}, features=Features({"id": Value("int64"), "image": Image()})
    )
    folder = make_pool(tmp_path / "pool", own)
    cell = PseudolabelPool.load(folder).inputs.cast_column("image", Image(decode=False))[0]["image"]
    assert cell == {"bytes": secret.read_bytes(), "path": "secret.png"}


def test_inputs_of_teachers_are_looked_at_too(tmp_path, secret):
    folder = make_pool(tmp_path / "pool")
    path = folder / "teachers/root/data.arrow"
    plain = Dataset(pa.ipc.open_stream(path.read_bytes()).read_all())  # not mapped: the file is written anew
    features = Features({**plain.features, "extra": Image()})
    with ArrowWriter(path=str(path), features=features) as writer:
        cells = pa.array([{"bytes": None, "path": str(secret)}] * 2, CELL)
        writer.write_table(plain.data.table.append_column("extra", cells).cast(features.arrow_schema))
        writer.finalize()
    change_header(folder, {"teachers/root/data.arrow": [path.stat().st_size, ""]})
    with pytest.raises(ValueError, match="in row 0 of column 'extra'"):
        PseudolabelPool.load(folder)


# ── names and links of a pool ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "teachers/root/../../x", "inputs\\data.arrow", "other"])
def test_the_header_names_only_files_of_the_pool(name, tmp_path):
    folder = make_pool(tmp_path / "pool")
    change_header(folder, {name: [3, "abc"]})
    with pytest.raises(ValueError, match="among `files`, which is no file of a pool"):
        PseudolabelPool.load(folder)


@pytest.mark.parametrize("name", ["inputs/data.arrow", "teachers/root/data.arrow", "inputs", "teachers", "pool.json"])
@pytest.mark.parametrize("is_relative", [True, False])
def test_a_link_out_of_the_pool_is_refused(name, is_relative, tmp_path):
    folder = make_pool(tmp_path / "pool")
    place = shutil.move(folder / name, tmp_path / "elsewhere")
    depth = len(Path(name).parts)
    (folder / name).symlink_to("../" * depth + "elsewhere" if is_relative else place)
    with pytest.raises(ValueError, match="must hold its .* itself, got .*link"):
        PseudolabelPool.load(folder)


def test_a_link_within_and_a_link_to_the_pool_are_fine(tmp_path):
    folder = make_pool(tmp_path / "pool")
    shutil.move(folder / "inputs/data.arrow", folder / "inputs/real.arrow")
    (folder / "inputs/data.arrow").symlink_to("real.arrow")
    (tmp_path / "link").symlink_to(folder)
    assert len(PseudolabelPool.load(tmp_path / "link")) == 2


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/abs", ".hidden", "a\\b", "", "a\n", "inputs", "Inputs"])
def test_a_teachers_name_is_a_plain_folder(name, tmp_path):
    folder = make_pool(tmp_path / "pool")
    header = json.loads((folder / "pool.json").read_text())
    header["hierarchy"]["teachers"][0]["name"] = name
    header["hierarchy"]["teachers"][0]["model"] = "t/.."
    (folder / "pool.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="must be a header that `save` wrote, got"):
        PseudolabelPool.load(folder)


# ── a folder of `save_to_disk` ──────────────────────────────────────────────────────────────────────────────────────


def choose(split: str = "train", streaming: bool = False) -> DataChoice:
    return DataChoice(split=split, revision=None, config_name=None, streaming=streaming)


def swap_state(folder: Path, name: str) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Private data of ours."""
    Dataset.from_dict({"text": ["private"]}).save_to_disk(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("how", ["relative", "absolute", "link", "link of a folder", "splits", "list of files"])
def test_a_folder_that_leads_elsewhere_is_refused(how, tmp_path, mine):
    data, theirs = Dataset.from_dict({"text": ["theirs"]}), tmp_path / "theirs"
    DatasetDict({"train": data}).save_to_disk(theirs)
    name = "data-00000-of-00001.arrow"
    if how == "relative":
        swap_state(theirs / "train", f"../../mine/{name}")
    elif how == "absolute":
        swap_state(theirs / "train", str(mine / name))
    elif how == "link":
        (theirs / "train" / name).unlink()
        (theirs / "train" / name).symlink_to(mine / name)
    elif how == "link of a folder":
        shutil.rmtree(theirs / "train")
        (theirs / "train").symlink_to(mine)
    elif how == "splits":
        (theirs / "dataset_dict.json").write_text(json.dumps({"splits": ["../mine"]}))
    else:
        (theirs / "train/state.json").unlink()
        (theirs / "train/state.json").symlink_to(mine / "state.json")
    with pytest.raises(ValueError, match="holds all of its files itself, got .*, which leads to .* It was not opened"):
        find_data(str(theirs), choose("../mine" if how == "splits" else "train"), ALONE)


@pytest.mark.parametrize("as_dict", [True, False])
def test_cells_of_a_saved_folder_hold_their_bytes(as_dict, tmp_path, secret):
    data = Dataset.from_dict({"image": [str(secret)]}, features=Features({"image": Image()}))
    folder = tmp_path / "theirs"
    (DatasetDict({"train": data}) if as_dict else data).save_to_disk(folder)
    held, _ = find_data(str(folder), choose(), ALONE)
    assert held.cast_column("image", Image(decode=False))[0]["image"]["bytes"] == secret.read_bytes()
    (arrow,) = folder.rglob("*.arrow")
    arrow.write_bytes(_arrow_of(data))
    with pytest.raises(ValueError, match="in row 0 of column 'image'. It was not opened"):
        find_data(str(folder), choose(), ALONE)


def _arrow_of(data: Dataset) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.data.table.schema) as writer:
        writer.write_table(data.data.table)
    return sink.getvalue().to_pybytes()


# ── the Hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def upload(repo_id: str, files: dict[str, bytes]) -> None:
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    for name, content in files.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id, repo_type="dataset")


CARD = b"---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n---\n"


def parquet(cell: dict[str, Any]) -> bytes:
    features, file = Features({"image": Image()}), io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": png(1), "path": None}, cell]}, schema=features.arrow_schema), file)
    return file.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["file", "address", "hub"])
@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_data_of_the_hub_with_a_path_for_a_cell_are_refused(
    kind, place, streaming, hub: HubServer, secret, monkeypatch
):
    path = {"file": str(secret), "address": "http://127.0.0.1:9/x.png", "hub": "hf://datasets/other/private/x.png"}[
        place
    ]
    content = {
        "parquet": parquet({"bytes": None, "path": path}),
        "csv": f"image\n{path}\n".encode(),
        "json": (json.dumps({"image": {"path": path, "bytes": None}}) + "\n").encode(),
    }[kind]
    upload("someone/evil", {f"data.{kind}": content, "README.md": CARD})
    nothing_opened(monkeypatch, secret)
    with pytest.raises(ValueError, match=f"in row {int(kind == 'parquet')} of column 'image'. It was not opened"):
        find_data("someone/evil", choose(streaming=streaming), ALONE)
    if not streaming:
        with pytest.raises(ValueError, match="It was not opened"):
            load_splits("someone/evil", HfApi().dataset_info("someone/evil").sha)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["files", "archive", "metadata", "parquet"])
def test_real_images_on_the_hub_go_on_working(kind, streaming, hub: HubServer, tmp_path):
    files = {f"{shade}.png": png(shade) for shade in (1, 2, 3)}
    if kind == "archive":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        files = {"train.zip": file.getvalue()}
    elif kind == "metadata":
        files["metadata.csv"] = b"file_name,note\n1.png,x\n2.png,y\n3.png,z\n"
    elif kind == "parquet":
        files = {"data.parquet": parquet({"bytes": png(2), "path": "x/2.png"})}
    upload("someone/images", files)
    data, _ = find_data("someone/images", choose(streaming=streaming), ALONE)
    shades = [np.asarray(image)[0, 0, 0] for image in data["image"]]
    assert shades == ([1, 2] if kind == "parquet" else [1, 2, 3])
    if streaming or kind == "archive":
        assert all(cell["bytes"] for cell in data.cast_column("image", Image(decode=False))["image"])
    make_pool(tmp_path / "pool", data.select(range(2)).select_columns(["image"]).add_column("id", [0, 1]))
    cells = PseudolabelPool.load(tmp_path / "pool").inputs.cast_column("image", Image(decode=False))["image"]
    assert [cell["bytes"] for cell in cells] == [png(1), png(2)]


def test_images_in_the_cache_need_no_connection(hub: HubServer):
    upload("someone/images", {f"{shade}.png": png(shade) for shade in (1, 2)})
    find_data("someone/images", choose(), ALONE)
    with hub.down():
        data, _ = find_data("someone/images", choose(), ALONE)
    assert [np.asarray(image)[0, 0, 0] for image in data["image"]] == [1, 2]


@pytest.mark.parametrize("name", ["../../secret.png", "SECRET", "x::SECRET", "file://SECRET"])
@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_of_an_image_folder_lead_nowhere_else(name, streaming, hub: HubServer, secret, monkeypatch):
    name = name.replace("SECRET", str(secret))
    upload("someone/images", {"1.png": png(1), "metadata.csv": f"file_name,note\n{name},x\n".encode()})
    nothing_opened(monkeypatch, secret)
    with pytest.raises((ValueError, OSError)):
        find_data("someone/images", choose(streaming=streaming), ALONE)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_card_names_no_data_files_elsewhere(streaming, hub: HubServer, secret, monkeypatch):
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n"
    upload("someone/evil", {"1.png": png(1), "README.md": card.encode()})
    nothing_opened(monkeypatch, secret)
    with pytest.raises(ValueError, match="`dataset` must be data that `datasets` can read, got 'someone/evil'"):
        find_data("someone/evil", choose(streaming=streaming), ALONE)


def test_a_pool_of_the_hub_with_a_path_for_a_cell_is_refused(hub: HubServer, tmp_path, secret, monkeypatch):
    folder = make_pool(tmp_path / "pool")
    PseudolabelPool.load(folder).push_to_hub("someone/pool")
    assert len(PseudolabelPool.load("someone/pool")) == 2
    features = Features({"id": Value("int64"), "cell": Image()})
    put_inputs(folder, features, [{"bytes": None, "path": str(secret)}] * 2)
    HfApi().upload_folder(folder_path=folder, repo_id="someone/pool", repo_type="dataset")
    nothing_opened(monkeypatch, secret)
    with pytest.raises(ValueError, match="pool 'someone/pool' at .* in row 0 of column 'cell'"):
        PseudolabelPool.load("someone/pool")


def test_build_pool_refuses_them_before_a_teacher_runs(hub: HubServer, secret):
    upload("someone/evil", {"data.parquet": parquet({"bytes": None, "path": str(secret)})})
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("no/such-model", name="root")])
    with pytest.raises(ValueError, match="It was not opened. Ask its author for the content"):
        build_pool("someone/evil", hierarchy, models={"root": _Never()})


class _Never:
    """A teacher that must not be asked."""

    column, facts = None, {}

    def prepare(self, cells: Any) -> Any:
        raise AssertionError("it was asked")

    __call__ = prepare


# ── plain files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def packed(kind: str) -> bytes:
    """A line of JSON as an archive."""
    line, file = b'{"text": "x"}\n', io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../data.jsonl", line)
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo("{data}.jsonl")
            member.size = len(line)
            archive.addfile(member, io.BytesIO(line))
    else:
        file.write({"gzip": gzip, "bz2": bz2, "xz": lzma}[kind].compress(line))
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ["zip", "tar", "gzip", "bz2", "xz"])
def test_an_archive_is_no_table(kind, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(packed(kind))
    with pytest.raises(ValueError, match=rf"^`dataset` must be a plain table, got an archive, .*\({kind}\)\. Unpack"):
        load_table(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"text,g\na,b,c\nd,e,f\n", "its lines have 3 cells for the 2 names"),
        ("a.csv", b"text,g\na,b,c\nd\n", "its lines have 3 cells for the 2 names"),
        ("a.jsonl", b"", "it holds no data"),
        ("a.jsonl", b"null\n", "one JSON object per line"),
        ("a.json", b"1\n2\n", "one JSON object per line"),
        ("a.json", b"\n", "it holds no data"),
        ("a.csv", b"text,g\n", "it holds no data"),
        ("a.jsonl", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}\n", "."),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', "twice"),
    ],
)
def test_a_table_that_would_be_read_as_another_one(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^`dataset` must be a table that can be read, got '.*': .*({reason})"):
        load_table(tmp_path / name)


def images_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(png(10))
    return folder


def test_a_pipe_is_no_image(tmp_path):
    folder = images_in(tmp_path / "images")
    os.mkfifo(folder / "b.png")  # whoever opens it waits for ever
    with pytest.raises(ValueError, match=r"got 1 files in '.*' that are none: \['b.png'\]"):
        load_images(folder)
    assert load_images(folder, on_error="missing")["id"] == ["a.png"]


def test_linked_folders_of_images_are_listed_once_or_refused(tmp_path):
    folder, other = images_in(tmp_path / "images"), images_in(tmp_path / "other")
    (images_in(folder / "more") / "loop").symlink_to(folder)
    assert load_images(folder)["id"] == ["a.png", "more/a.png"]
    (folder / "more" / "out").symlink_to(other)
    with pytest.raises(ValueError, match="a link 'out' that leads out of it"):
        load_images(folder)


def test_a_picture_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    ran: list[Any] = []
    monkeypatch.setattr("subprocess.check_call", lambda *command, **options: ran.append(command))
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4)).save(file, "EPS")
    cells = [{"bytes": file.getvalue(), "path": None}, {"bytes": png(9), "path": None}]
    data = Dataset.from_dict({"image": cells, "root": ["a", "b"]}).cast_column("image", Image())
    function = labeling_function(lambda row: "a" if row["image"] else None, name="look", version="1")
    pool = build_pool(data, TeacherHierarchy(["a", "b"], [Teacher(function)]), on_error="missing", disable_tqdm=True)
    assert pool.answered("look").tolist() == [False, True] and not ran


# ── pools of answers ────────────────────────────────────────────────────────────────────────────────────────────────

MESSAGE_OF_PARTS = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


@pytest.mark.parametrize(
    ("column", "cells", "sentence"),
    [
        ("samples", pa.array([["a\0"], ["b"]]), "must hold no NUL"),
        ("samples", pa.array([[1], [2]]), "`samples` of 'a' must be lists of texts, got list<item: int64>"),
        ("samples", pa.array(["a", "b"]), "`samples` of 'a' must be lists of texts, got string"),
        ("num_tokens", pa.array([-5, 1], pa.int32()), "`num_tokens` of 'a' must be at least 0, got -5"),
        ("log_prob", pa.array([float("inf"), -1], pa.float32()), "`log_prob` of 'a' must be the logarithm of a prob"),
        ("num_tokens", pa.array([2**40, 1]), "not in range"),
    ],
)
def test_answers_that_a_pool_does_not_hold(column, cells, sentence):
    pool = AnswerPool.from_answers({"a": ["x", "y"]}, ["p", "q"], samples={"a": [["x"], ["y"]]})
    table = pool.teachers["a"].data.table
    spoilt = Dataset(pa.table({name: cells if name == column else table[name] for name in table.column_names}))
    with pytest.raises(ValueError, match=sentence):
        AnswerPool(pool.hierarchy, {"a": spoilt}, pool.inputs)


@pytest.mark.parametrize(
    "cells",
    [
        [1, 2],
        [[1.0], [2.0]],
        [["x"], ["y"]],
        [[{"content": "x"}]] * 2,
        [[{"role": "user", "content": 1}]] * 2,
        [MESSAGE_OF_PARTS] * 2,
    ],
)
def test_prompts_that_would_be_written_as_python_shows_them(cells):
    with pytest.raises(ValueError, match="^Prompts must be texts, or lists of messages with the texts `role` and"):
        AnswerPool.from_answers({"a": ["x", "y"]}, cells)
