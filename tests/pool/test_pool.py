"""The pool: what is stored comes back byte for byte, mapped and not copied; what cannot be right is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage

from hf_cosupervise.files import file_digest
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool import base as base_module
from hf_cosupervise.pool.files import FORMAT_VERSION, teacher_dataset, write_arrow
from hf_cosupervise.pool.ids import match_ids
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.pool.top_k import encode_top_k

pytestmark = pytest.mark.core

LABELS = ["a", "b", "c"]
ROOT = np.array([[0.5, 0.25, 0.25], [0, 1.0, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
LEFT = np.array([[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0], [0.125, 0.75, 0.125]])
RIGHT = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [0, 0, 0]])


@pytest.fixture()
def hierarchy() -> TeacherHierarchy:
    return TeacherHierarchy(LABELS, [Teacher("t/root"), Teacher("t/left", level=1), Teacher("t/right", level=1)])


@pytest.fixture()
def inputs() -> Dataset:
    return Dataset.from_dict(
        {"id": ["w", "x", "y", "z"], "text": ["one", "two", "three", "four"], "oracle_label": [0, 1, 2, 2]}
    )


@pytest.fixture()
def pool(hierarchy, inputs) -> PseudolabelPool:
    predictions = {"root": ROOT, "left": LEFT, "right": RIGHT}
    return PseudolabelPool.from_predictions(
        hierarchy, inputs["id"], predictions, inputs=inputs, facts={"root": {"seconds": 2}}
    )


def stored(probs: np.ndarray, ids: object, k: int = 3) -> Dataset:
    return teacher_dataset(ids, *encode_top_k(probs, k))


def make(root: Dataset, inputs: Dataset | None = None) -> PseudolabelPool:
    """A pool of one teacher whose dataset is already there."""
    return PseudolabelPool(TeacherHierarchy(LABELS, [Teacher("t/root")]), {"root": root}, inputs)


def random_rows(num_examples: int, num_labels: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=3.0, size=(num_examples, num_labels))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def is_mapped(array: np.ndarray) -> bool:
    """Tell whether an array is a view of memory that numpy did not allocate."""
    while isinstance(array, np.ndarray):
        if array.flags.owndata:
            return False
        array = array.base
    return array is not None


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reading_by_hand(pool):
    assert len(pool) == 4 and pool.labels == ("a", "b", "c") and pool.ids.tolist() == ["w", "x", "y", "z"]
    # sorted by probability, ties to the lowest label; a row without an answer is all zero
    assert pool.label_ids("root").tolist() == [[0, 1, 2], [1, 0, 2], [0, 0, 0], [2, 0, 1]]
    assert pool.label_probs("root").tolist() == [[0.5, 0.25, 0.25], [1.0, 0, 0], [0, 0, 0], [0.5, 0.25, 0.25]]
    assert pool.label_ids("root").dtype == np.uint8 and pool.label_probs("root").dtype == np.float16
    assert pool.answered("root").tolist() == [True, True, False, True]
    assert pool.hard_labels("root").tolist() == [0, 1, -1, 2] and pool.hard_labels("root").dtype == np.int64
    assert pool.hard_labels("left").tolist() == [1, -1, -1, 1]
    for name, probs in {"root": ROOT, "left": LEFT, "right": RIGHT}.items():
        assert pool.decode(name).tolist() == probs.tolist()
        assert pool.decode(name).dtype == np.float32
    assert pool.decode("root", np.array([3, 0])).tolist() == ROOT[[3, 0]].tolist()
    assert pool.decode("root", slice(1, 3)).tolist() == ROOT[1:3].tolist()
    assert pool.oracle_labels.tolist() == [0, 1, 2, 2]
    assert pool.column("text") == ["one", "two", "three", "four"]


def test_several_teachers_at_once(pool):
    probs, answered = pool.decode_level(pool.hierarchy.level_indices(1), slice(0, 2))
    assert probs.tolist() == np.stack([LEFT[:2], RIGHT[:2]], axis=1).tolist()
    assert answered.tolist() == [[True, True], [False, True]]


def test_pseudolabels_by_hand(pool):
    assert pool.source_names == ("root", "left", "right", "ensemble-0", "ensemble-1")
    rows = np.arange(4)
    # root, right, nobody, left
    found = pool.pseudolabels(np.array([0, 2, -1, 1]), rows)
    assert found.tolist() == [[0.5, 0.25, 0.25], [0.5, 0.5, 0], [0, 0, 0], [0.125, 0.75, 0.125]]
    assert found.dtype == np.float32
    hard = pool.pseudolabels(np.array([0, 2, -1, 1]), rows, hard=True)
    assert hard.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]  # the tie of row 1 goes to the lowest label
    # the mean of level 1: both answered row 0, only "right" row 1, nobody row 2, only "left" row 3
    found = pool.pseudolabels(np.full(4, 4), rows)
    assert found.tolist() == [[0.5, 0.25, 0.25], [0.5, 0.5, 0], [0, 0, 0], [0.125, 0.75, 0.125]]
    assert pool.pseudolabels(np.full(4, 4), rows, hard=True)[2].tolist() == [0, 0, 0]
    # the "ensemble" of a level of one is that teacher
    assert pool.pseudolabels(np.full(4, 3), rows).tolist() == ROOT.tolist()
    # rows in any order, and more than once
    found = pool.pseudolabels(np.array([1, 0, 1]), np.array([3, 0, 3]))
    assert found.tolist() == [LEFT[3].tolist(), ROOT[0].tolist(), LEFT[3].tolist()]


def test_a_source_that_did_not_answer_gives_nothing(pool):
    assert pool.pseudolabels(np.array([0]), np.array([2]), hard=True).tolist() == [[0, 0, 0]]


def test_missing_column(pool, hierarchy):
    with pytest.raises(ValueError) as error:
        pool.column("weather")
    assert str(error.value) == (
        "The pool's inputs must have a column 'weather', got ['id', 'text', 'oracle_label']. "
        "Build the pool from data with it."
    )
    bare = PseudolabelPool(hierarchy, pool.teachers)
    assert bare.oracle_labels is None
    with pytest.raises(ValueError, match=r"must have a column 'text', got \[\]"):
        bare.column("text")


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fewer_labels_stored_than_there_are():
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(5)], [Teacher("t/root")])
    probs = np.array([[0.5, 0.125, 0.125, 0.125, 0.125], [0, 0, 0, 0, 0]])
    pool = PseudolabelPool.from_predictions(hierarchy, [7, 8], {"root": probs}, pool_k=1)
    assert pool.label_ids("root").shape == (2, 1)
    # the half that was not stored is spread over the four other labels: 1/8 each
    assert pool.decode("root").tolist() == probs.tolist()
    assert pool.hard_labels("root").tolist() == [0, -1]


def test_default_number_of_stored_labels():
    probs = random_rows(4, 40)
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(40)], [Teacher("t/root")])
    pool = PseudolabelPool.from_predictions(hierarchy, range(4), {"root": probs})
    assert pool.label_ids("root").shape == (4, 16)
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"`k` must lie in 1..40 .*, got {k}"):
            PseudolabelPool.from_predictions(hierarchy, range(4), {"root": probs}, pool_k=k)


@pytest.mark.parametrize(("num_labels", "kind"), [(256, "uint8"), (257, "uint16"), (300, "uint16")])
def test_many_labels(num_labels, kind, tmp_path):
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(num_labels)], [Teacher("t/root")])
    probs = np.eye(num_labels, dtype=np.float32)[::-1]
    PseudolabelPool.from_predictions(hierarchy, range(num_labels), {"root": probs}).save(tmp_path / "pool")
    pool = PseudolabelPool.load(tmp_path / "pool")
    assert pool.label_ids("root").dtype == np.dtype(kind)
    assert pool.hard_labels("root").tolist() == list(range(num_labels))[::-1]


def test_half_precision_is_enough():
    # 100 labels of a softmax: rounding to float16 moves the sum of a row by less than 3e-4
    probs = random_rows(200, 100)
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(100)], [Teacher("t/root")])
    decoded = PseudolabelPool.from_predictions(hierarchy, range(200), {"root": probs}, pool_k=100).decode("root")
    np.testing.assert_allclose(decoded.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(decoded, probs, atol=5e-4)
    assert (decoded.argmax(axis=1) == probs.argmax(axis=1)).mean() > 0.99


# ── saving and loading ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ids", [["w", "x", "y", "z"], [40, 30, 20, 10]])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_round_trip(hierarchy, ids, with_inputs, tmp_path):
    inputs = Dataset.from_dict({"text": ["one", "two", "three", "four"]}) if with_inputs else None
    pool = PseudolabelPool.from_predictions(
        hierarchy, ids, {"root": ROOT, "left": LEFT, "right": RIGHT}, inputs=inputs, facts={"root": {"seconds": 2}}
    )
    pool.save(tmp_path / "deep" / "pool")
    loaded = PseudolabelPool.load(str(tmp_path / "deep" / "pool"))
    assert loaded.hierarchy == pool.hierarchy and loaded.facts == pool.facts
    assert loaded.facts["root"] == {"seconds": 2, "dropped_mass": 0.0}  # all three labels are kept
    assert loaded.ids.tolist() == ids
    assert (loaded.inputs is not None) == with_inputs
    if with_inputs:
        assert loaded.inputs.to_dict() == {"text": ["one", "two", "three", "four"], "id": ids}
    for name in hierarchy.names:
        assert loaded.label_ids(name).tobytes() == pool.label_ids(name).tobytes()
        assert loaded.label_probs(name).tobytes() == pool.label_probs(name).tobytes()
        assert loaded.label_ids(name).dtype == pool.label_ids(name).dtype
        assert loaded.teachers[name].features == pool.teachers[name].features
    # the same pool gives the same bytes, wherever it is written
    loaded.save(tmp_path / "again")
    for path in sorted((tmp_path / "again").rglob("*")):
        if path.is_file():
            assert (
                path.read_bytes() == (tmp_path / "deep" / "pool" / path.relative_to(tmp_path / "again")).read_bytes()
            )


def test_nothing_but_the_pool_is_written(pool, tmp_path):
    pool.save(tmp_path / "pool")
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    files = sorted(
        str(path.relative_to(tmp_path / "pool")) for path in (tmp_path / "pool").rglob("*") if path.is_file()
    )
    assert files == [
        "README.md",
        "inputs/data.arrow",
        "pool.json",
        "teachers/left/data.arrow",
        "teachers/right/data.arrow",
        "teachers/root/data.arrow",
    ]


def test_loaded_pools_are_mapped_not_read(hierarchy, tmp_path):
    # more rows than one chunk of a writer or of the check
    num_examples = 20_000
    probs = random_rows(num_examples, 3)
    predictions = dict.fromkeys(hierarchy.names, probs)
    PseudolabelPool.from_predictions(hierarchy, range(num_examples), predictions).save(tmp_path / "pool")
    allocated = pa.total_allocated_bytes()
    pool = PseudolabelPool.load(tmp_path / "pool")
    # one teacher takes 180 kB of labels and probabilities: Arrow reads none of it, only ids go through Python
    assert pa.total_allocated_bytes() - allocated < 20_000
    for view in (pool.label_ids("left"), pool.label_probs("left")):
        assert is_mapped(view) and view.shape == (num_examples, 3)
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 0
    assert len(pool.teachers["left"].cache_files) == 1


def test_other_hierarchy_copies_nothing(pool, tmp_path):
    pool.save(tmp_path / "pool")
    pool = PseudolabelPool.load(tmp_path / "pool")
    flat = TeacherHierarchy(LABELS, [Teacher("t/right"), Teacher("t/root")])
    other = pool.with_hierarchy(flat)
    assert other.source_names == ("right", "root", "ensemble-0")
    for name in ("right", "root"):
        assert np.shares_memory(other.label_probs(name), pool.label_probs(name))
        assert other.teachers[name] is pool.teachers[name]
    assert other.inputs is pool.inputs and other.facts == pool.facts
    assert other.pseudolabels(np.array([2]), np.array([1])).tolist() == [
        [0.25, 0.75, 0.0]
    ]  # mean of ROOT[1] and RIGHT[1]
    with pytest.raises(ValueError) as error:
        pool.with_hierarchy(TeacherHierarchy(["a", "c", "b"], [Teacher("t/root")]))
    assert str(error.value) == "Both hierarchies must have the labels ['a', 'b', 'c'], got ['a', 'c', 'b']."
    with pytest.raises(ValueError, match=r"got none of \['stranger'\] \(level \[0\]\)"):
        pool.with_hierarchy(TeacherHierarchy(LABELS, [Teacher("t/stranger")]))


def test_existing_folder_is_left_alone(pool, tmp_path):
    (tmp_path / "pool").mkdir()
    pool.save(tmp_path / "pool")  # an empty folder may be filled
    before = (tmp_path / "pool" / "pool.json").read_bytes()
    with pytest.raises(FileExistsError) as error:
        pool.save(tmp_path / "pool")
    assert str(error.value) == (
        f"'{tmp_path / 'pool'}' must not exist or be empty, got files there. Load it, or choose another folder."
    )
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="must not exist or be empty"):
        pool.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "pool" / "pool.json").read_bytes() == before


def test_killed_while_writing_leaves_nothing(pool, tmp_path, monkeypatch):
    written = []

    def write_and_die(dataset: Dataset, path: Path) -> None:
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(path)
        write_arrow(dataset, path)

    monkeypatch.setattr(base_module, "write_arrow", write_and_die)
    with pytest.raises(OSError, match="No space left"):
        pool.save(tmp_path / "pool")
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_killed_for_good_leaves_no_pool(pool, tmp_path, monkeypatch):
    # a process that is killed cleans nothing up: what it left must not be taken for a pool
    replace = os.replace

    def die_at_the_last_move(source: Path, target: Path) -> None:
        if target == tmp_path / "pool":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_last_move)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        pool.save(tmp_path / "pool")
    monkeypatch.undo()
    assert not (tmp_path / "pool").exists()
    assert [path.name.startswith(".pool-") for path in tmp_path.iterdir()] == [True]
    with pytest.raises(FileNotFoundError, match="is not a pool"):
        PseudolabelPool.load(tmp_path / "pool")
    pool.save(tmp_path / "pool")
    assert len(PseudolabelPool.load(tmp_path / "pool")) == 4


def test_what_cannot_be_loaded(pool, tmp_path):
    folder = tmp_path / "pool"
    with pytest.raises(FileNotFoundError) as error:
        PseudolabelPool.load(folder)
    assert str(error.value) == f"'{folder}' is not a pool: it has no 'pool.json'. Make one with `build_pool`."
    pool.save(folder)
    header = json.loads((folder / "pool.json").read_text())
    (folder / "pool.json").write_text(json.dumps({**header, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError) as error:
        PseudolabelPool.load(folder)
    assert str(error.value) == (
        f"Pool '{folder}' must have format version 1, got 2. Update hf_cosupervise, or label the data again."
    )
    (folder / "pool.json").write_text(json.dumps({**header, "num_examples": 5}))
    with pytest.raises(ValueError, match="must hold 5 examples, got 4"):
        PseudolabelPool.load(folder)
    (folder / "pool.json").write_text(json.dumps(header))
    (folder / "teachers" / "left" / "data.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="Pool '.*' lacks '.*left/data.arrow'. Label the data again"):
        PseudolabelPool.load(folder)


def test_plain_datasets_read_the_files(pool, tmp_path):
    # without this package: any tool that reads Arrow, or the Hub's viewer
    pool.save(tmp_path / "pool")
    plain = Dataset.from_file(str(tmp_path / "pool" / "teachers" / "right" / "data.arrow"))
    assert plain.features == Features(
        {
            "id": Value("string"),
            "label_ids": List(Value("uint8"), length=3),
            "label_probs": List(Value("float16"), length=3),
        }
    )
    assert plain[1] == {"id": "x", "label_ids": [0, 1, 2], "label_probs": [0.5, 0.5, 0.0]}
    assert plain.data.num_rows == 4 and plain.data.column("label_probs").num_chunks == 1
    inputs = Dataset.from_file(str(tmp_path / "pool" / "inputs" / "data.arrow"))
    assert inputs["text"][3] == "four"


def test_image_files_travel_with_the_pool(tmp_path):
    # an image column that names a file must hold its bytes when it is saved
    PILImage.fromarray(np.full((4, 4, 3), 9, dtype=np.uint8)).save(tmp_path / "image.png")
    inputs = Dataset.from_dict({"image": [str(tmp_path / "image.png")] * 2}, features=Features({"image": Image()}))
    hierarchy = TeacherHierarchy(LABELS, [Teacher("t/root")])
    PseudolabelPool.from_predictions(hierarchy, [1, 2], {"root": ROOT[:2]}, inputs=inputs).save(tmp_path / "pool")
    (tmp_path / "image.png").unlink()
    image = PseudolabelPool.load(tmp_path / "pool").inputs[1]["image"]
    assert np.asarray(image).tolist() == np.full((4, 4, 3), 9).tolist()


def test_files_that_lie_in_a_pool_are_linked(pool, hierarchy, tmp_path):
    pool.save(tmp_path / "one")
    loaded = PseudolabelPool.load(tmp_path / "one")
    loaded.with_hierarchy(hierarchy).save(tmp_path / "two")
    for path in ("inputs", "teachers/root"):
        assert (tmp_path / "one" / path / "data.arrow").samefile(tmp_path / "two" / path / "data.arrow")
    assert (tmp_path / "one" / "pool.json").read_bytes() == (tmp_path / "two" / "pool.json").read_bytes()


def test_a_file_that_took_the_place_of_the_inputs_is_not_taken_for_them(pool, hierarchy, inputs, tmp_path):
    pool.save(tmp_path / "one")
    loaded = PseudolabelPool.load(tmp_path / "one")
    file = tmp_path / "one" / "inputs" / "data.arrow"
    stat = file.stat()
    other = tmp_path / "inputs" / "other.arrow"
    write_arrow(inputs.map(lambda row: {"text": row["text"].upper()}), other)
    assert other.stat().st_size == stat.st_size
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, file)
    loaded.save(tmp_path / "two")
    assert PseudolabelPool.load(tmp_path / "two", verify=True).column("text") == ["one", "two", "three", "four"]
    # neither are inputs that somebody put into the pool
    again = PseudolabelPool.load(tmp_path / "two")
    again.inputs = inputs.select_columns(["id"])
    again.save(tmp_path / "three")
    assert PseudolabelPool.load(tmp_path / "three", verify=True).inputs.column_names == ["id"]


ROOT_FILE, LEFT_FILE, RIGHT_FILE = (f"teachers/{name}/data.arrow" for name in ("root", "left", "right"))


@pytest.mark.parametrize(
    "places",
    [
        {LEFT_FILE: RIGHT_FILE, RIGHT_FILE: LEFT_FILE},
        {ROOT_FILE: LEFT_FILE, LEFT_FILE: ROOT_FILE},
        {ROOT_FILE: LEFT_FILE, LEFT_FILE: RIGHT_FILE, RIGHT_FILE: ROOT_FILE},
        {RIGHT_FILE: LEFT_FILE},
        {LEFT_FILE: ROOT_FILE, RIGHT_FILE: ROOT_FILE},
        {"inputs/data.arrow": ROOT_FILE},
    ],
)
@pytest.mark.parametrize("knows_sizes", [True, False])
def test_files_in_the_place_of_others_are_refused(places, knows_sizes, hierarchy, inputs, tmp_path):
    # of one size, all of them, and each by itself as it was written
    predictions = {name: random_rows(4, 3, seed) for seed, name in enumerate(hierarchy.names)}
    pool = PseudolabelPool.from_predictions(hierarchy, inputs["id"], predictions, inputs=inputs)
    pool.save(tmp_path / "pool")
    folder = tmp_path / "pool"
    if "inputs/data.arrow" in places or not knows_sizes:  # as in a header that somebody wrote
        header = json.loads((folder / "pool.json").read_text())
        (folder / "pool.json").write_text(json.dumps({**header, "files": {}}))
    contents = {path: (folder / source).read_bytes() for path, source in places.items()}
    for path, content in contents.items():
        (folder / path).unlink()
        (folder / path).write_bytes(content)
    with pytest.raises(ValueError, match="must be the Arrow file that was written, got what was written as another f"):
        PseudolabelPool.load(folder)


def without_owners(folder: Path) -> None:
    """Make a pool one of an older version, which says nowhere in a file whose it is."""
    for path in folder.glob("*/**/data.arrow"):
        content = path.read_bytes()
        table = pa.ipc.open_stream(content).read_all()
        known = {key: value for key, value in table.schema.metadata.items() if key == b"huggingface"}
        assert len(known) < len(table.schema.metadata)
        path.unlink()
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema.with_metadata(known)) as writer:
            writer.write_table(table.replace_schema_metadata(known))
    header = json.loads((folder / "pool.json").read_text())
    header["files"] = {name: [(folder / name).stat().st_size, file_digest(folder / name)] for name in header["files"]}
    (folder / "pool.json").write_text(json.dumps(header))


def test_pools_that_do_not_say_whose_a_file_is_go_on(pool, tmp_path):
    pool.save(tmp_path / "one")
    without_owners(tmp_path / "one")
    loaded = PseudolabelPool.load(tmp_path / "one", verify=True)
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one" / ROOT_FILE).samefile(tmp_path / "two" / ROOT_FILE)
    again = PseudolabelPool.load(tmp_path / "two", verify=True)
    assert {name: again.decode(name).tolist() for name in again.teachers} == {
        name: pool.decode(name).tolist() for name in pool.teachers
    }


def test_answers_under_another_name_are_written_under_it(pool, inputs, tmp_path):
    pool.save(tmp_path / "one")
    loaded = PseudolabelPool.load(tmp_path / "one")
    renamed = TeacherHierarchy(LABELS, [Teacher("t/root", name="top"), Teacher("t/left", name="right", level=1)])
    datasets = {"top": loaded.teachers["root"], "right": loaded.teachers["left"]}
    PseudolabelPool(renamed, datasets, loaded.inputs).save(tmp_path / "two")
    again = PseudolabelPool.load(tmp_path / "two", verify=True)
    assert again.decode("top").tolist() == ROOT.tolist() and again.decode("right").tolist() == LEFT.tolist()
    assert not (tmp_path / "one" / ROOT_FILE).samefile(tmp_path / "two" / "teachers/top/data.arrow")


def test_damage_is_found(pool, tmp_path):
    pool.save(tmp_path / "pool")
    file = tmp_path / "pool" / "inputs" / "data.arrow"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"three", b"threw"))
    assert PseudolabelPool.load(tmp_path / "pool").column("text")[2] == "threw"
    with pytest.raises(ValueError) as error:
        PseudolabelPool.load(tmp_path / "pool", verify=True)
    assert str(error.value) == (
        f"'{file}' of pool '{tmp_path / 'pool'}' must be the Arrow file that was written, got other content than its "
        f"digest tells. Delete '{file}'. Label the data again, or copy the whole folder."
    )
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"got {len(content) - 1} bytes instead of {len(content)}"):
        PseudolabelPool.load(tmp_path / "pool")


def test_garbage_is_an_error_and_no_crash(pool, tmp_path):
    # Arrow follows whatever offsets a file names, so wrong ones end the process unless somebody looks at them first
    pool.save(tmp_path / "pool")
    header = json.loads((tmp_path / "pool" / "pool.json").read_text())
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({**header, "files": {}}))
    rng = np.random.default_rng(0)
    for path in ("inputs/data.arrow", "teachers/root/data.arrow"):
        file = tmp_path / "pool" / path
        content = file.read_bytes()
        for place in rng.integers(len(content), size=60).tolist():
            file.unlink()
            file.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
            try:
                loaded = PseudolabelPool.load(tmp_path / "pool")
                loaded.inputs[:]
            except ValueError as error:
                assert str(error)
        file.write_bytes(content)


def test_the_source_stays_with_the_pool(pool, hierarchy, tmp_path):
    source = {"dataset": "org/animals", "config": "default", "split": "train", "commit": "a" * 40}
    pool = PseudolabelPool(hierarchy, pool.teachers, pool.inputs, source=source)
    pool.select([0]).with_hierarchy(hierarchy).save(tmp_path / "pool")
    loaded = PseudolabelPool.load(tmp_path / "pool")
    assert loaded.source == source and (loaded.repo_id, loaded.commit) == (None, None)
    assert "org/animals" in (tmp_path / "pool" / "README.md").read_text(encoding="utf-8")


# ── ids ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_teachers_in_another_order_are_joined_on_id(hierarchy, inputs, tmp_path):
    teachers = {
        "root": stored(ROOT, ["w", "x", "y", "z"]),
        "left": stored(LEFT[[2, 0, 3, 1]], ["y", "w", "z", "x"]),
        "right": concatenate_datasets([stored(RIGHT[[3]], ["z"]), stored(RIGHT[:3], ["w", "x", "y"])]),  # two chunks
    }
    pool = PseudolabelPool(hierarchy, teachers, inputs)
    assert pool.decode("left").tolist() == LEFT.tolist()
    assert pool.decode("right").tolist() == RIGHT.tolist()
    pool.save(tmp_path / "pool")
    loaded = PseudolabelPool.load(tmp_path / "pool")
    assert loaded.ids.tolist() == ["w", "x", "y", "z"]
    for name, probs in {"root": ROOT, "left": LEFT, "right": RIGHT}.items():
        assert loaded.decode(name).tolist() == probs.tolist()
        assert loaded.teachers[name].data.column("label_probs").num_chunks == 1  # saved as one chunk whatever it was


def test_without_inputs_the_first_teacher_gives_the_order(hierarchy):
    teachers = {
        "root": stored(ROOT[[1, 0]], [11, 10]),
        "left": stored(LEFT[:2], [10, 11]),
        "right": stored(RIGHT[:2], [10, 11]),
    }
    pool = PseudolabelPool(hierarchy, teachers)
    assert pool.ids.tolist() == [11, 10]
    assert pool.decode("left").tolist() == LEFT[[1, 0]].tolist()


def test_a_teacher_may_know_more_examples(inputs):
    more = stored(np.concatenate([RIGHT[:1], ROOT]), ["v", "w", "x", "y", "z"])
    assert make(more, inputs).decode("root").tolist() == ROOT.tolist()


def test_missing_ids(inputs):
    with pytest.raises(ValueError) as error:
        make(stored(ROOT[:2], ["w", "x"]), inputs)
    assert str(error.value) == (
        "Pseudolabels of 'root' must hold every id of the other side, got 2 missing of 4 (such as 'y'). "
        "Use the data that the pool was built from."
    )
    with pytest.raises(ValueError, match="got 4 missing of 4"):
        make(stored(ROOT, [0, 1, 2, 3]), inputs)


@pytest.mark.parametrize("ids", [["w", "x", "x", "x"], [1, 2, 2, 2]])
def test_repeated_ids(ids):
    with pytest.raises(ValueError) as error:
        make(stored(ROOT, ids))
    assert str(error.value) == f"Ids of the pool must be unique, got {ids[1]!r} 3 times (1 repeated in all)."
    inputs = Dataset.from_dict({"id": [*ids[:2], ids[0]]})
    with pytest.raises(ValueError, match="must be unique"):
        make(stored(ROOT[:2], ids[:2]), inputs)
    # in a teacher's dataset, not in the inputs
    inputs = Dataset.from_dict({"id": ids[:2]})
    with pytest.raises(ValueError, match="Ids of 'root' must be unique"):
        make(stored(ROOT, ids), inputs)


def test_empty_ids():
    table = stored(ROOT, ["w", "x", "y", "z"]).data.table
    table = table.set_column(0, "id", pa.array(["w", None, "y", "z"]))
    with pytest.raises(ValueError, match="Ids of the pool must not be missing, got 1 empty ones"):
        make(Dataset(table))


def test_inputs_without_id():
    with pytest.raises(ValueError) as error:
        make(stored(ROOT, range(4)), Dataset.from_dict({"text": list("abcd")}))
    assert str(error.value) == "Every dataset of a pool needs an `id` column, the pool got ['text']."


def test_match_ids():
    assert match_ids(np.array([5, 3, 4]), np.array([3, 5]), "It").tolist() == [1, 0]
    assert match_ids(np.array(["b", "a"]), np.array(["a", "b", "a"]), "It").tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"It must hold every id .* got 1 missing of 2 \(such as 9\)"):
        match_ids(np.array([5, 3, 4]), np.array([3, 9]), "It")


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def raw(label_ids: np.ndarray, label_probs: np.ndarray) -> Dataset:
    return teacher_dataset(range(len(label_ids)), np.asarray(label_ids, np.uint8), np.asarray(label_probs, np.float16))


@pytest.mark.parametrize(
    ("label_ids", "label_probs", "sentence"),
    [
        ([[0, 1]], [[0.5, -0.25]], "row 0 is negative"),
        ([[0, 1], [0, 1]], [[0.5, 0.5], [np.nan, 0.5]], "row 1 is not finite"),
        ([[0, 1]], [[np.inf, 0.5]], "row 0 is not finite"),
        ([[0, 1]], [[0.75, 0.5]], "row 0 sums to more than 1"),
        ([[0, 3]], [[0.5, 0.25]], r"Label ids of 'root' must lie in 0..2, got 0..3"),
        ([[1, 1]], [[0.5, 0.25]], "must name each label once"),
        ([[0, 1]], [[0.25, 0.5]], "must stand in descending order"),
        ([[0, 1, 2, 0]], [[0.5, 0.25, 0.25, 0]], r"with k in 1..3, got \(1, 4\)"),
    ],
)
def test_wrong_rows(label_ids, label_probs, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(raw(label_ids, label_probs))


def test_wrong_row_beyond_the_first_chunk():
    label_probs = np.full((20_000, 2), 0.5)
    label_probs[19_999] = [0.75, 0.5]
    with pytest.raises(ValueError, match="sums to more than 1"):
        make(raw(np.tile([0, 1], (20_000, 1)), label_probs))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([-0.5, 1.0, 0.5], "is negative"),
        ([np.nan, 0.5, 0.5], "is not finite"),
        ([1, 1, 0], "more than 1"),
        ([0.5, 0.25, 0], "sum to 1"),
    ],
)
def test_wrong_predictions(row, sentence):
    hierarchy = TeacherHierarchy(LABELS, [Teacher("t/root")])
    with pytest.raises(ValueError, match=sentence):
        PseudolabelPool.from_predictions(hierarchy, [0, 1], {"root": np.array([[0, 0, 1.0], row])})


@pytest.mark.parametrize("column", ["label_ids", "label_probs"])
@pytest.mark.parametrize("inside", [False, True])
def test_nulls_are_refused(column, inside):
    # Arrow's flat values leave a null row out, which would shift every later row
    values = [[0, 1], None, [0, 1]] if not inside else [[0, 1], [0, None], [0, 1]]
    kind = pa.list_(pa.uint8() if column == "label_ids" else pa.float16(), 2)
    if column == "label_probs":
        values = [row and [None if cell is None else np.float16(0.5) for cell in row] for row in values]
    dataset = raw([[0, 1]] * 3, [[0.5, 0.5]] * 3)
    table = dataset.data.table
    position = table.column_names.index(column)
    table = table.set_column(position, column, pa.array(values, type=kind))
    with pytest.raises(ValueError) as error:
        make(Dataset(table))
    assert str(error.value) == f"Column `{column}` of 'root' must hold no nulls. A missing answer is a row of zeros."


def test_lists_of_no_fixed_length():
    dataset = Dataset.from_dict({"id": [0], "label_ids": [[0, 1]], "label_probs": [[0.5, 0.5]]})
    with pytest.raises(ValueError, match="Column `label_ids` of 'root' must hold lists of one fixed length"):
        make(dataset)


def test_missing_teacher_and_level(hierarchy):
    with pytest.raises(ValueError) as error:
        PseudolabelPool.from_predictions(hierarchy, range(4), {"root": ROOT})
    assert str(error.value) == (
        "The pool must hold pseudolabels of every teacher of the hierarchy, got none of ['left', 'right'] (level [1])"
        ". Label the data with them by `build_pool`."
    )


def test_missing_columns(hierarchy):
    with pytest.raises(ValueError) as error:
        make(Dataset.from_dict({"id": [0], "label_ids": [[0]]}))
    assert (
        str(error.value)
        == "Pseudolabels of 'root' must have the columns id, label_ids and label_probs, got no ['label_probs']."
    )


def test_wrong_shape(hierarchy):
    with pytest.raises(ValueError) as error:
        PseudolabelPool.from_predictions(hierarchy, range(4), {"root": ROOT[:, :2]})
    assert str(error.value) == "Predictions of 'root' must have shape (4, 3), got (4, 2)."
    with pytest.raises(ValueError, match=r"must have shape \(3, 3\), got \(4, 3\)"):
        PseudolabelPool.from_predictions(hierarchy, range(3), {"root": ROOT})


@pytest.mark.parametrize("wrong", [None, -1, 3])
def test_ground_truth_must_be_labels_of_the_task(wrong):
    # -1 is what `datasets` stores for an unknown label: taken as a position it would mean the last label
    inputs = Dataset.from_dict({"id": [0, 1], "oracle_label": [0, wrong]})
    with pytest.raises(ValueError, match="oracle_label"):
        _ = make(stored(ROOT[:2], [0, 1]), inputs).oracle_labels


# ── other views ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_select(pool, tmp_path):
    rows = [3, 1, 0]
    some = pool.select(rows)
    assert some.ids.tolist() == ["z", "x", "w"] and some.column("text") == ["four", "two", "one"]
    assert some.oracle_labels.tolist() == [2, 1, 0]
    for name, probs in {"root": ROOT, "left": LEFT, "right": RIGHT}.items():
        assert some.decode(name).tolist() == probs[rows].tolist()
    assert some.select(np.array([2, 0])).decode("root").tolist() == ROOT[[0, 3]].tolist()
    some.save(tmp_path / "some")
    loaded = PseudolabelPool.load(tmp_path / "some")
    assert loaded.decode("left").tolist() == LEFT[rows].tolist()
    assert len(Dataset.from_file(str(tmp_path / "some" / "teachers" / "left" / "data.arrow"))) == 3
    # a slice of consecutive rows is kept by `datasets` in another way than a list of rows
    assert pool.select(range(1, 3)).decode("root").tolist() == ROOT[1:3].tolist()
    pool.select(range(1, 4)).save(tmp_path / "slice")
    assert PseudolabelPool.load(tmp_path / "slice").decode("right").tolist() == RIGHT[1:].tolist()


def test_select_where_teachers_stand_in_another_order(hierarchy, inputs):
    # rows are rows of the pool, not of each teacher's own file
    teachers = {
        "root": stored(ROOT, list("wxyz")),
        "left": stored(LEFT[::-1], list("zyxw")),
        "right": stored(RIGHT, list("wxyz")),
    }
    pool = PseudolabelPool(hierarchy, teachers, inputs)
    some = pool.select([0, 1])
    assert some.ids.tolist() == ["w", "x"]
    assert some.decode("left").tolist() == LEFT[:2].tolist()
    more = PseudolabelPool(
        hierarchy, {**teachers, "right": stored(np.concatenate([RIGHT, ROOT[:1]]), list("wxyzv"))}, inputs
    )
    assert more.select([2, 3]).decode("right").tolist() == RIGHT[2:].tolist()


def test_select_nothing(pool):
    # an empty selection is an empty pool, not an error deep inside Arrow
    nothing = pool.select([])
    assert len(nothing) == 0 and nothing.decode("left").shape == (0, 3)


def test_wide_view(pool, hierarchy):
    wide = pool.to_dataset()
    assert wide.column_names == [
        "id",
        "text",
        "oracle_label",
        "root_label",
        "root_prob",
        "left_label",
        "left_prob",
        "right_label",
        "right_prob",
    ]
    assert wide[0] == {
        "id": "w",
        "text": "one",
        "oracle_label": 0,
        "root_label": "a",
        "root_prob": 0.5,
        "left_label": "b",
        "left_prob": 0.5,
        "right_label": "a",
        "right_prob": 1.0,
    }
    assert wide["left_label"][:] == ["b", None, None, "b"]
    assert wide["left_prob"][:] == [0.5, 0.0, 0.0, 0.75]
    bare = PseudolabelPool(hierarchy, pool.teachers).to_dataset()
    assert bare.column_names[0] == "id" and bare["id"][:] == ["w", "x", "y", "z"]


def test_wide_view_of_a_column_teacher():
    # answers that were already in the data: the teacher has the column's name, and inputs may still hold the column
    hierarchy = TeacherHierarchy(LABELS, [Teacher("guess", kind="column")])
    inputs = Dataset.from_dict({"id": [0, 1], "guess": ["a", "b"]})
    wide = PseudolabelPool.from_predictions(hierarchy, [0, 1], {"guess": ROOT[:2]}, inputs=inputs).to_dataset()
    assert (
        wide["guess"][:] == ["a", "b"] and wide["guess_label"][:] == ["a", "b"] and wide["guess_prob"][:] == [0.5, 1.0]
    )


def test_repr(pool):
    assert repr(pool) == (
        "PseudolabelPool(4 examples, TeacherHierarchy(1-2 teachers, 3 labels), inputs: ['id', 'text', 'oracle_label'])"
    )


def test_construction_touches_nothing(hierarchy, inputs):
    # what was given stays as it was, and later changes to it do not reach the pool
    facts, teachers = {"root": {"seconds": 2}}, {name: stored(ROOT, list("wxyz")) for name in hierarchy.names}
    pool = PseudolabelPool(hierarchy, teachers, inputs, facts)
    teachers.clear()
    facts.clear()
    assert pool.facts == {"root": {"seconds": 2}} and set(pool.teachers) == {"root", "left", "right"}
    assert inputs.column_names == ["id", "text", "oracle_label"]


@pytest.mark.parametrize("ids", [[0.5, 1.5], [None, 1], [b"a", b"b"]], ids=str)
def test_ids_are_integers_or_strings(ids):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t")])
    with pytest.raises(ValueError, match=r"`ids` must be integers or strings, got .*Number the examples"):
        PseudolabelPool.from_predictions(hierarchy, ids, {"t": np.full((2, 2), 0.5)})


def test_inputs_of_another_length_are_refused():
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t")])
    inputs = Dataset.from_dict({"text": ["x", "y", "z"]})
    with pytest.raises(ValueError, match="`inputs` must hold one row for each of the 2 ids, got 3"):
        PseudolabelPool.from_predictions(hierarchy, [0, 1], {"t": np.full((2, 2), 0.5)}, inputs=inputs)


def test_what_truncation_costs_is_measured_and_on_the_card(hierarchy, tmp_path):
    probs = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.0, 0.0, 0.0]], dtype=np.float32)
    pool = PseudolabelPool.from_predictions(hierarchy, [0, 1, 2], dict.fromkeys(hierarchy.names, probs), pool_k=1)
    # 0.5 and 0.4 are left out of the two rows that have an answer
    assert [pool.facts[name]["dropped_mass"] for name in hierarchy.names] == pytest.approx([0.45] * 3)
    pool.save(tmp_path / "pool")
    card = (tmp_path / "pool" / "README.md").read_text(encoding="utf-8")
    assert "mass left out %" in card and card.count("| 45.0 |") == 3
