"""The doors by which foreign files come in, and those by which ours go out: what the README says of each holds there.

Only safetensors is read, no code is run, no pickle is read or published, no token is written, no teacher is random.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import itertools
import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import TINY_LABELS
from datasets import Dataset
from hub_server import WRITE_TOKEN, HubServer
from safetensors.torch import load_file, save_file
from test_architecture import SOURCES, dotted_name
from test_features import Counter
from test_hostile_data import change_header, choose
from test_hostile_data import make_pool as make_small_pool
from test_hostile_models import Payload, load_low, marker, save_adapter
from test_prompted import save_language_model
from test_run_folder import run
from test_trainer import make_args, make_pool
from transformers.utils.chat_template_utils import render_jinja_template

from hf_cosupervise import (
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    build_pool,
    load_hierarchy,
    load_label_model,
    load_student,
    make_label_model,
    push_hierarchy,
    read_wrench,
)
from hf_cosupervise.arguments import parse_recipe_args, read_recipe_config
from hf_cosupervise.data.loading import find_data
from hf_cosupervise.files import file_digest
from hf_cosupervise.hub.cards import model_card, write_card
from hf_cosupervise.models import chat
from hf_cosupervise.models.classifier import load_processor
from hf_cosupervise.models.source import find_model
from hf_cosupervise.processes import Processes
from hf_cosupervise.students import features
from hf_cosupervise.teachers.kinds.prompted import compile_template
from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher
from hf_cosupervise.training.checkpointing import last_checkpoint
from hf_cosupervise.training.run_folder import DIGESTS, _json_digest

ALONE = Processes(0, 1)


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(marker(folder)))


def archived(folder: Path) -> bytes:
    """The pickle as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save({"a": Payload(marker(folder))}, file)
    return file.getvalue()


def objects(folder: Path) -> bytes:
    """The pickle as the array of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, np.array([Payload(marker(folder))], dtype=object), allow_pickle=True)
    return file.getvalue()


def object_arrays(folder: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, level=np.array([Payload(marker(folder))], dtype=object), allow_pickle=True)
    return file.getvalue()


def nothing(folder: Path) -> bytes:
    return b""


def no_zip(folder: Path) -> bytes:
    """What begins like an archive."""
    return b"PK\3\4"


PICKLES = {"pickle": pickled, "torch": archived}


def test_the_payloads_are_real_ones(tmp_path):
    readers = {
        pickled: lambda file: pickle.load(file),
        archived: lambda file: torch.load(file, weights_only=False),
        objects: lambda file: np.load(file, allow_pickle=True),
        object_arrays: lambda file: np.load(file, allow_pickle=True)["level"],
    }
    for make, read in readers.items():
        content = make(tmp_path / "model")
        assert holds_pickle(content)
        read(io.BytesIO(content))
        marker(tmp_path / "model").rmdir()  # which is there


# ── what comes in ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Place:
    """A folder for something foreign, and what the tests have to make it of."""

    folder: Path
    request: pytest.FixtureRequest

    def copy(self, fixture: str) -> Path:
        """A copy of what a fixture keeps in a folder."""
        return Path(shutil.copytree(self.request.getfixturevalue(fixture), self.folder))

    @property
    def images(self) -> Dataset:
        return self.request.getfixturevalue("tiny_image_dataset")

    @property
    def command(self) -> str:
        """A value of YAML by which Python makes the folder of the marker."""
        return f"!!python/object/apply:os.mkdir [{str(marker(self.folder))!r}]"


Door = Callable[[Place], Callable[[], Any]]
# Name, what is offered, and words of the sentence that refuses it; "" where the work goes on without it.
DOORS: dict[str, tuple[Door, str]] = {}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# Teachers and students: `model.safetensors` and `adapter_model.safetensors` are in `test_hostile_models.py`.
LOADS: dict[str, Callable[[Path], Any]] = {
    "teacher": load_low,
    "student": lambda folder: load_student(folder, TINY_LABELS),
}
MODELS = [("teacher", kind) for kind in ("vit", "timm", "bert", "adapter", "sklearn")]
MODELS += [("student", kind) for kind in ("vit", "timm", "bert", "adapter")]
WEIGHTS = {"adapter": "adapter_model.safetensors", "sklearn": "model.skops"}
LOOSE = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "model.pkl")
LOOSE += ("tf_model.h5", "flax_model.msgpack", "model.joblib", "vocab.pkl", "modeling.py", "setup.py", "__init__.py")


def instead(load: str, kind: str, name: str, place: Place) -> Callable[[], Any]:
    folder = place.copy(f"tiny_{kind}")
    (folder / WEIGHTS.get(kind, "model.safetensors")).unlink()
    put(folder, {name: archived(folder)})
    return lambda: LOADS[load](folder)


def beside(load: str, kind: str, place: Place) -> Callable[[], Any]:
    folder = place.copy(f"tiny_{kind}")
    code = f"import os\nos.mkdir({str(marker(folder))!r})\n".encode()
    put(folder, {name: code if name.endswith(".py") else archived(folder) for name in LOOSE})
    return lambda: LOADS[load](folder)


for load, kind in MODELS:
    DOORS[f"{load}-{kind}-beside"] = partial(beside, load, kind), ""
    loose = "adapter_model.bin" if kind == "adapter" else "model.pkl" if kind == "sklearn" else "pytorch_model.bin"
    DOORS[f"{load}-{kind}-{loose}"] = partial(instead, load, kind, loose), loose


# Pools: each file in turn, with the digests of a whole pool.
ARROW_FILES = ("inputs/data.arrow", "teachers/root/data.arrow")


def extension_type(folder: Path, table: pa.Table) -> bytes:
    """An Arrow file whose column says that its type is to be unpickled."""
    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled(folder)}
    sink, schema = io.BytesIO(), table.schema
    schema = schema.set(schema.names.index("id"), schema.field("id").with_metadata(told))
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table(table.columns, schema=schema))
    return sink.getvalue()


def pool_with(name: str, make: Callable[[Path], bytes] | None, place: Place) -> Callable[[], Any]:
    folder = make_small_pool(place.folder)
    path = folder / name
    if make is None:
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        content = extension_type(folder, table)
    else:
        content = make(folder)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    if name in ARROW_FILES:
        change_header(folder, {name: [len(content), file_digest(path)]})
    return lambda: PseudolabelPool.load(folder).select([1]).inputs[0]


for name in ARROW_FILES:
    for kind, make in {**PICKLES, "npy": objects}.items():
        DOORS[f"pool-{name}-{kind}"] = partial(pool_with, name, make), "data.arrow"
    DOORS[f"pool-{name}-extension"] = partial(pool_with, name, None), ""
DOORS["pool-header"] = partial(pool_with, "pool.json", pickled), "pool.json"
for name in ("dataset.py", "state.json", "dataset_info.json", "inputs/state.json", "data.pkl"):
    DOORS[f"pool-beside-{name}"] = partial(pool_with, name, pickled), ""


def twice(text: str, key: str) -> str:
    """JSON whose first key is there once more, in front, with another value."""
    return f'{{"{key}": [], ' + text.lstrip()[1:]


def pool_header_twice(place: Place) -> Callable[[], Any]:
    path = make_small_pool(place.folder) / "pool.json"
    path.write_text(twice(path.read_text(), "hierarchy"))
    return lambda: PseudolabelPool.load(place.folder)


DOORS["pool-header-twice"] = pool_header_twice, "the key 'hierarchy' twice"


# Data of `save_to_disk`.
def data_with(name: str, make: Callable[[Path], bytes], place: Place) -> Callable[[], Any]:
    Dataset.from_dict({"id": [1, 2]}).save_to_disk(place.folder)
    put(place.folder, {name: make(place.folder)})
    return lambda: find_data(str(place.folder), choose(), ALONE)[0][0]


def data_extension(place: Place) -> Callable[[], Any]:
    content = extension_type(place.folder, pa.table({"id": [1, 2]}))
    return data_with("data-00000-of-00001.arrow", lambda folder: content, place)


for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
    for kind, make in PICKLES.items():
        DOORS[f"data-{name}-{kind}"] = partial(data_with, name, make), "`dataset` must be a folder"
DOORS["data-extension"] = data_extension, ""
for name in ("data.py", "dataset.pkl", "dataset_dict.pkl"):
    DOORS[f"data-beside-{name}"] = partial(data_with, name, pickled), ""


# Features: the notes of their digests are written anew, as a stranger would.
def features_with(name: str, make: Callable[[Path], bytes], place: Place) -> Callable[[], Any]:
    student = Counter(place.request.getfixturevalue("tiny_vit"), place.folder)
    images = place.images.select(range(8))
    store = student.store()
    whole = np.array(store.features(images, "image", disable_tqdm=True))
    near = store.neighbors(images, "image", torch.from_numpy(whole), 2)
    found = list(store.folder.glob(f"*/{name}"))
    assert len(found) == 1
    found[0].write_bytes(make(place.folder))
    features._seal(found[0].parent, store.folder.name)
    features._verified.clear()

    def enter() -> None:
        again = store.features(images, "image", disable_tqdm=True)
        assert np.array_equal(again, whole)
        assert torch.equal(store.neighbors(images, "image", torch.from_numpy(whole), 2), near)

    return enter


for name in (features._KEYS, features._VALUES, features._ROWS):
    for kind, make in {**PICKLES, "npy": objects, "nothing": nothing, "zip": no_zip}.items():
        DOORS[f"features-{name}-{kind}"] = partial(features_with, name, make), ""


# A run folder: levels and checkpoints, with the digests of whole ones.
CHANGES = {"student_training": "full", "save_strategy": "steps", "save_steps": 2}
CHECKPOINT = "_run/level-1/checkpoint-4"


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory, tiny_vit, tiny_image_dataset) -> Path:
    """A run that was cut off in its last level, after a checkpoint."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    run(folder, tiny_vit, tiny_image_dataset, CHANGES, stop=(1, 5))
    assert (folder / CHECKPOINT / "optimizer.pt").is_file()
    return folder


def run_with(name: str, make: Callable[[Path], bytes], place: Place) -> Callable[[], Any]:
    folder = place.copy("cut_run")
    path = folder / name
    path.write_bytes(make(folder))
    if path.parent.name.startswith("checkpoint-") and path.name != DIGESTS:
        digests = json.loads((path.parent / DIGESTS).read_text())
        (path.parent / DIGESTS).write_text(json.dumps(digests | {path.name: file_digest(path)}))
    elif path.parent.name == "level-0" and path.name != "stage.json":
        facts = json.loads((path.parent / "stage.json").read_text())
        facts.pop("digest")
        facts["files"][path.name] = file_digest(path)
        (path.parent / "stage.json").write_text(json.dumps({**facts, "digest": _json_digest(facts)}))
    student = place.request.getfixturevalue("tiny_vit")
    return lambda: run(folder, student, place.images, CHANGES, resume=True)


for name in ("plan.npz", "student.safetensors", "stage.json"):
    for kind, make in {**PICKLES, "npz": object_arrays, "nothing": nothing, "zip": no_zip}.items():
        DOORS[f"run-level-{name}-{kind}"] = partial(run_with, f"_run/level-0/{name}", make), ""
for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"):
    for kind, make in PICKLES.items():
        words = "" if name == "config.json" else "checkpoint-4' must hold the tensors"
        DOORS[f"run-checkpoint-{name}-{kind}"] = partial(run_with, f"{CHECKPOINT}/{name}", make), words


def saved(value: Any) -> Callable[[Path], bytes]:
    """What `torch.save` makes of what is no pickle of code, but not what the parent wrote either."""

    def make(folder: Path) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    return make


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        state = torch.load(folder / CHECKPOINT / name, weights_only=True)
        change(state)
        return saved(state)(folder)

    return make


FOREIGN: dict[str, dict[str, Callable[[Path], bytes]]] = {
    "optimizer.pt": {
        "moments": changed("optimizer.pt", lambda state: state["state"][0].update(exp_avg=torch.zeros(3))),
        "groups": changed("optimizer.pt", lambda state: state["param_groups"].pop()),
        "rate": changed("optimizer.pt", lambda state: state["param_groups"][0].update(lr="fast")),
        "betas": changed("optimizer.pt", lambda state: state["param_groups"][0].update(betas=(0.9,))),
    },
    "scheduler.pt": {
        "epoch": changed("scheduler.pt", lambda state: state.update(last_epoch=[1])),
        "rates": changed("scheduler.pt", lambda state: state.update(base_lrs=[0.1] * 9)),
    },
    "scaler.pt": {"scale": saved({"scale": 2.0, "growth_factor": 2.0}), **PICKLES},
    "rng_state.pth": {
        "python": saved({"python": (3, (1,), None), "numpy": None, "cpu": None}),
        "short": saved({"python": None, "numpy": None, "cpu": torch.zeros(3, dtype=torch.uint8)}),
    },
}
for name, own in FOREIGN.items():
    others = {"nothing": nothing, "zip": no_zip, "noise": lambda folder: b"\x93\xff noise " * 9}
    shapes = {"list": saved([1]), "number": saved(1.0), "tensor": saved(torch.ones(2)), "empty": saved({})}
    for kind, make in {**others, **shapes, **own}.items():
        DOORS[f"run-foreign-{name}-{kind}"] = partial(run_with, f"{CHECKPOINT}/{name}", make), "must hold the tensors"


@pytest.mark.parametrize("make", [pickled, archived, nothing, saved({"scale": 2.0})], ids=["a", "b", "c", "d"])
@pytest.mark.parametrize("name", ["scaler.pt", "optimizer.bin", "pytorch_model.bin", "rng_state_0.pth", "add.json"])
def test_a_checkpoint_that_somebody_added_to_is_passed_over(name, make, tmp_path, cut_run, caplog):
    folder = tmp_path / "run"
    shutil.copytree(cut_run, folder)
    (folder / CHECKPOINT / "notes.txt").write_text("mine")
    level = folder / CHECKPOINT
    assert last_checkpoint(level.parent) == level
    (level / name).write_bytes(make(folder))
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(level.parent) == level.with_name("checkpoint-2")
    assert f"'{level / name}' was not written by the run: the checkpoint before it is taken." in caplog.text


for name in ("trainer_state.json", "story.json", "digests.json", "training_args.bin", "pytorch_model.bin"):
    DOORS[f"run-checkpoint-{name}"] = partial(run_with, f"{CHECKPOINT}/{name}", archived), ""
for name in (
    "_run/level-0/stage.json",
    f"{CHECKPOINT}/trainer_state.json",
    f"{CHECKPOINT}/digests.json",
    "history.json",
):
    DOORS[f"run-deep-{name}"] = partial(run_with, name, lambda folder: b"[" * 100000), ""
DOORS["run-history"] = partial(run_with, "history.json", pickled), ""
DOORS["run-run.json"] = partial(run_with, "_run/run.json", pickled), "run.json"


# Files that people write: hierarchies, recipes, label models and cards.
TEACHERS = "\nteachers:\n- model: a\n"


def text_with(name: str, text: str, load: Callable[[Path], Any], place: Place) -> Callable[[], Any]:
    place.folder.mkdir()
    path = place.folder / name
    path.write_text(text.replace("COMMAND", place.command))
    return lambda: load(path)


def from_recipe(path: Path) -> Any:
    return read_recipe_config(path, [CoSupervisedConfig])


DEEP = "[" * 100000
HALF = '"\\ud800"'


@dataclass
class Extras:
    """Options of a recipe."""

    extras: dict[str, int] = field(default_factory=dict)


HIERARCHIES = {
    "labels": ("x.yaml", "labels: COMMAND" + TEACHERS, "python/object/apply"),
    "label": ("x.yaml", "labels: [a, COMMAND]" + TEACHERS, "python/object/apply"),
    "key": ("x.yml", "? COMMAND\n: a", "python/object/apply"),
    "name": ("x.yaml", "labels: [a, b]\nteachers: !!python/name:os.system", "python/name"),
    "module": ("x.yaml", "labels: [a, b]\nteachers: !!python/module:os", "python/module"),
    "new": ("x.yaml", "labels: [a, b]\nteachers: !!python/object/new:os.stat_result [a]", "python/object/new"),
    "twice": ("x.yaml", "labels: [a, b]\nlabels: [a, b]" + TEACHERS, "`labels` is there twice"),
    "json-twice": ("x.json", '{"labels": ["a", "b"], "labels": [], "teachers": []}', "the key 'labels' twice"),
    "deep": ("x.yaml", DEEP, "hierarchy of teachers"),
    "json-deep": ("x.json", DEEP, "hierarchy of teachers"),
    "half": ("x.json", f'{{"labels": ["a", {HALF}], "teachers": [{{"model": "a"}}]}}', "lone surrogates"),
    "nul": ("x.yaml", 'labels: [a, "\\0"]' + TEACHERS, "without NUL"),
    "half-scope": ("x.json", f'{{"labels": ["a", "b"], "teachers": [{{"model": "a", "scope": [{HALF}]}}]}}', "lone"),
    "half-model": ("x.json", f'{{"labels": ["a", "b"], "teachers": [{{"model": {HALF}}}]}}', "`model`"),
    "nul-name": (
        "x.json",
        '{"labels": ["a", "b"], "teachers": [{"model": "a", "name": "a\\u0000"}]}',
        "`name` must be",
    ),
    "pickle": ("x.yaml", "\x80\x04", "YAML"),
}
for name, (file, text, words) in HIERARCHIES.items():
    DOORS[f"hierarchy-{name}"] = partial(text_with, file, text, TeacherHierarchy.load), words
    where = partial(text_with, file.replace("x.", "hierarchy."), text, lambda path: load_hierarchy(str(path.parent)))
    if file != "x.yml":
        DOORS[f"hierarchy-folder-{name}"] = where, words
RECIPES = {
    "value": ("output_dir: COMMAND", "python/object/apply"),
    "inside": ("output_dir: [a, {b: COMMAND}]", "python/object/apply"),
    "name": ("output_dir: !!python/name:os.system", "python/name"),
    "tuple": ("output_dir: !!python/tuple [a]", "python/tuple"),
    "twice": ("seed: 1\nseed: 2", "`seed` is there twice"),
    "deep": (DEEP, "valid YAML"),
    "list": ("- a", "one `name: value` per line"),
}
for name, (text, words) in RECIPES.items():
    DOORS[f"recipe-{name}"] = partial(text_with, "x.yaml", text, from_recipe), words
DOORS["recipe-command-line-twice"] = (
    lambda place: lambda: parse_recipe_args([Extras], ["--extras", '{"a": 1, "a": 2}']),
    "the key 'a' twice",
)
for name, text, words in [
    ("pickle", "\x80\x04", "must be a label model as JSON"),
    ("deep", DEEP, "must be a label model as JSON"),
    ("twice", '{"model": "a", "model": "b"}', "the key 'model' twice"),
]:
    DOORS[f"label-model-{name}"] = partial(text_with, "model.json", text, load_label_model), words

# What names itself over and over: a kilobyte that stands for more values than any memory holds.
LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(12))
MERGES = "a0: &a0 {k: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))
for name, text in {"laughs": LAUGHS, "merges": MERGES}.items():
    words = "more than 1,000,000 values"
    DOORS[f"hierarchy-{name}"] = partial(text_with, "x.yaml", text, TeacherHierarchy.load), words
    DOORS[f"recipe-{name}"] = partial(text_with, "x.yaml", text, from_recipe), words
DOORS["hierarchy-long"] = partial(text_with, "x.yaml", "a: " + "x" * (1 << 24), TeacherHierarchy.load), "characters"


def label_model_with(change: dict[str, Any], place: Place) -> Callable[[], Any]:
    place.folder.mkdir()
    path = place.folder / "model.json"
    make_label_model("dawid_skene").fit([[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]]).save(path)
    assert load_label_model(path).num_voters == 3
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return lambda: load_label_model(path)


LABEL_MODEL_CHANGES: dict[str, dict[str, Any]] = {
    "labels": {"num_labels": 10**12},
    "labels-negative": {"num_labels": -1},
    "labels-true": {"num_labels": True},
    "labels-text": {"num_labels": "2"},
    "voters": {"num_voters": 10**12},
    "voters-fewer": {"num_voters": 2},
    "names": {"voter_names": ["a"]},
    "named-outside": {"named": [0, 7]},
    "named-order": {"named": [1, 0]},
    "named-twice": {"named": [0, 0]},
    "speakers-outside": {"speakers": [0, 1, 9]},
    "speakers-text": {"speakers": "012"},
    "parameters-none": {"parameters": {}},
    "parameters-list": {"parameters": [1]},
    "parameters-text": {"parameters": {"prior": "x", "confusion": "y"}},
    "parameters-shape": {"parameters": {"prior": [0.5, 0.5], "confusion": [[1.0]]}},
    "parameters-zero": {"parameters": {"prior": [0.0, 0.0], "confusion": [[0.0, 0.0]] * 6}},
    "silence": {"silence_is_answer": "no"},
    "settings-unknown": {"settings": {"zz": 1}},
    "settings-text": {"settings": {"max_iterations": "x"}},
    "settings-list": {"settings": [1]},
}
for name, changes in LABEL_MODEL_CHANGES.items():
    DOORS[f"label-model-{name}"] = partial(label_model_with, changes), "must be a label model as `save` wrote it, got:"


# Classifiers of texts that would open files, and an archive that is larger than it looks.
def sklearn_texts(change: Callable[[Any, Path], Any], place: Place) -> Callable[[], Any]:
    text, linear = pytest.importorskip("sklearn.feature_extraction.text"), pytest.importorskip("sklearn.linear_model")
    pipeline, rows = pytest.importorskip("sklearn.pipeline"), ["the ant", "a bee", "cats", "dogs"]
    union = pipeline.make_union(text.CountVectorizer(), text.TfidfVectorizer())
    model = pipeline.make_pipeline(union, linear.LogisticRegression()).fit(rows, list(TINY_LABELS))
    change(model, place.folder)
    save_sklearn_teacher(model, place.folder, {"kind": "text"})
    return lambda: load_low(place.folder)


def input_of(position: int, value: str) -> Callable[[Any, Path], Any]:
    return lambda model, folder: setattr(model[0].transformer_list[position][1], "input", value)


def sklearn_packed(place: Place) -> Callable[[], Any]:
    enter = sklearn_texts(lambda model, folder: None, place)
    with zipfile.ZipFile(place.folder / "model.skops", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("schema.json", b" " * ((1 << 26) + 1))
    return enter


for name, position, value in [("first", 0, "filename"), ("second", 1, "file"), ("other", 1, "of tomorrow")]:
    DOORS[f"sklearn-opens-{name}"] = partial(sklearn_texts, input_of(position, value)), "opens them as names of files"
DOORS["sklearn-content"] = partial(sklearn_texts, lambda model, folder: None), ""
DOORS["sklearn-packed"] = sklearn_packed, "67,108,865 bytes packed into"

# Templates of prompts, which come with a hierarchy.
TEMPLATES = {
    "join": ("{{ text|join(text)|join(text)|join(text) }}", "`join` of something else than `labels`"),
    "join-labels": ("{{ text }}{{ labels|join(labels|join(text)) }}", "`join` of something else than `labels`"),
    "join-text": ("{{ text }}{{ labels|join(text) }}", "`join` of something else than `labels`"),
    "join-attribute": ("{{ text }}{{ labels|join(attribute='x') }}", "`join` of something else than `labels`"),
    "deep-not": ("{% if " + "not " * 300 + "text %}a{% endif %}{{ text }}", "nested more than 50 deep"),
    "deep-filter": ("{{ text" + "|lower" * 150 + " }}", "nested more than 50 deep"),
    "long": ("{{ text }}" * 100_000, "got: 1,000,000 letters, more than 65,536. Correct it."),
    "deep-if": ("{% if text %}" * 150 + "{{ text }}" + "{% endif %}" * 150, "nested more than 50 deep"),
    "deep-and": ("{% if " + "text and " * 3000 + "text %}a{% endif %}{{ text }}", "must be"),
    "powers": ("{{ 10**10**10 }}{{ text }}", "got `Pow`"),
    "products": ("{{ text * 10 }}", "got `Mul`"),
    "loops": ("{% for a in text %}{{ text }}{% endfor %}", "got `For`"),
}
for name, (text, words) in TEMPLATES.items():
    DOORS[f"template-{name}"] = partial(lambda text, place: lambda: compile_template(text, "low"), text), words
DOORS["template-labels"] = lambda place: lambda: compile_template("{{ text }}{{ labels|join(', ') }}", "low"), ""


# Chat templates, which come with a tokenizer.
def chat_with(template: str, place: Place) -> Callable[[], Any]:
    save_language_model(place.folder, "llama", "chat")
    tokenizer = load_processor(find_model(str(place.folder), what="The model"), place.folder, is_text=True)
    tokenizer.chat_template = template.replace("MARKER", str(marker(place.folder)))
    monkeypatch = place.request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(chat, "_MOST_SECONDS", 0.3)
    monkeypatch.setattr(chat, "_MOST_BYTES", 1 << 27)
    return lambda: read_chat(tokenizer)


def read_chat(tokenizer: Any) -> str:
    try:
        return chat.apply_chat_template(tokenizer, [{"role": "user", "content": "a text"}])
    except chat.ChatTemplateError as error:
        raise ValueError(f"{error}.") from error


CALLS_ITSELF = "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(80) }}"
GROWS = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CHATS = {
    "loops": (LOOPS, "takes more than"),
    "calls": (CALLS_ITSELF, "takes more than"),
    "grows": (GROWS, "takes more than"),
    "recursion": ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "calls itself, or takes too much memory"),
    "powers": ("{{ 10**10000 }}", "one operation makes"),
    "code": ("{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}", "is unsafe"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "raises": ("{{ raise_exception('no user here') }}", "no user here"),
    "broken": ("{% for %}", "Expected an expression"),
    "usual": ("{% for m in messages %}**{{ m.role }}**: {{ m.content }}{% endfor %}", ""),
}
for name, (text, words) in CHATS.items():
    DOORS[f"chat-{name}"] = partial(chat_with, text), words


def test_a_chat_template_that_took_too_long_is_not_waited_for_again(tmp_path, request, monkeypatch):
    enter = chat_with(LOOPS + "again", Place(tmp_path / "model", request))
    for most in (0.3, 600.0):  # at the second time nobody waits
        monkeypatch.setattr(chat, "_MOST_SECONDS", most)
        with pytest.raises(ValueError, match="^it takes more than 10 seconds, or a gigabyte of memory.$") as caught:
            enter()
        assert isinstance(caught.value.__cause__, chat.BrokenChatTemplateError)


@dataclass
class Talker:
    """What a chat template needs of a tokenizer."""

    chat_template: str
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}

    def get_chat_template(self) -> str:
        return self.chat_template


# Each grows by one operation in C, which nobody can stop: within a time, or by what the process has, is too late.
MANY = "10000000000"
GROWTHS = {
    "text": f"{{{{ 'a' * {MANY} }}}}",
    "text-left": f"{{{{ {MANY} * 'a' }}}}",
    "bytes": f"{{{{ 'a'.encode() * {MANY} }}}}",
    "list": f"{{{{ [0] * {MANY} }}}}",
    "tuple": f"{{{{ (1,) * {MANY} }}}}",
    "steps": "{% set many = 100000 %}{{ 'a' * many * many }}",
    "power": "{% set n = 9999 %}{{ n ** n }}",
    "number": "{% set n = namespace(a=3) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}{{ n.a % 7 }}",
}


@pytest.mark.parametrize("name", GROWTHS)
def test_one_operation_of_a_chat_template_makes_little(name):
    with pytest.raises(chat.ChatTemplateError, match="one operation makes [0-9,]+ letters, items or bits, more than"):
        chat.apply_chat_template(Talker(GROWTHS[name]), [{"role": "user", "content": "a text"}])


SLOW = {
    "range": ("{{ range(1000000000000)|list }}", "Range too big"),
    "deep": ("{{ " + "not " * 200 + "1 }}", "nested more than 100 deep"),
    "brackets": ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "calls itself, or takes too much"),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_a_chat_template_may_not_ask_for(name):
    with pytest.raises(chat.ChatTemplateError, match=SLOW[name][1]):
        chat.apply_chat_template(Talker(SLOW[name][0]), [{"role": "user", "content": "a text"}])


TALKS = [[{"role": "user", "content": "a {text}\n with 100% 'x'"}]]
TALKS += [
    [
        {"role": "system", "content": "be <b>"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"},
        {"role": "user", "content": " again "},
    ]
]
TALKED = {
    "operators": "{% for m in messages %}{{ m.role[:1] * 3 + '%05d|' % loop.index ~ loop.index ** 2 }}{% endfor %}",
    "methods": "{{ messages[0].content.replace('t', 'T').center(40).split(' ')|join('_') }}{{ '{:>9}'.format(1) }}",
    "filters": "{{ messages|map(attribute='role')|list|tojson(indent=2) }}{{ 'a\nb'|indent(3) }}{{ 2.567|round(1) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content|trim }}{% endgeneration %}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n  {{ m['role'] }}\n{% endfor %}",
    "names": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x, tools }}",
    "macros": "{% macro m(a, b='-') %}{{ a ~ b ~ varargs }}{% endmacro %}{{ m(bos_token, eos_token, dict(a=1)) }}",
    "tests": "{{ 'yes' if messages[-1]['role'] in ['user', 'tool'] and tools is none and x is not defined }}",
    "raises": "{{ raise_exception('no ' + messages[0].role) }}",
    "prompt": "{{ messages[0].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


def real_templates() -> dict[str, str]:
    """Those of many published models, where a package that brings them is there."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("nowhere")
    return {path.stem: path.read_text() for path in sorted(folder.glob("chat_templates/*.jinja"))[::6]}


def test_a_chat_is_written_as_transformers_writes_it():
    def outcome(write: Callable[[], str]) -> str:
        try:
            return write()
        except (jinja2.TemplateError, TypeError) as error:
            return f"{error}"

    for name, template in {**TALKED, **real_templates()}.items():
        for talk, asks in itertools.product(TALKS, (True, False)):
            told = {"add_generation_prompt": asks, **Talker.special_tokens_map}
            theirs = outcome(lambda: render_jinja_template([talk], chat_template=template, **told)[0][0])  # noqa: B023
            ours = outcome(lambda: chat.apply_chat_template(Talker(template), talk, asks=asks))  # noqa: B023
            assert ours == theirs, name


ROW = '{"label": 0, "weak_labels": [0], "data": {}}'
for name, text, words in [
    ("pickle", "\x80\x04", "train.json' must be JSON"),
    ("deep", DEEP, "train.json' must be JSON"),
    ("row-twice", f'{{"0": {ROW}, "0": {ROW}}}', "the key '0' twice"),
]:
    DOORS[f"wrench-{name}"] = partial(text_with, "train.json", text, lambda path: read_wrench(path.parent)), words

JINJA = "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}{% for x in y %}<script>x</script>"


def card_with(header: str, body: str, place: Place) -> Callable[[], Any]:
    place.folder.mkdir()
    path = place.folder / "README.md"
    body = body.replace("MARKER", str(marker(place.folder)))
    path.write_text(f"---\n{header.replace('COMMAND', place.command)}\n---\n\n# Mine\n\n{body}\n")

    def enter() -> None:
        write_card(model_card({"labels": ["a", "b"], "hub_model_id": "me/x"}), place.folder)
        assert body in path.read_text()

    return enter


DOORS["card-header-command"] = partial(card_with, "license: COMMAND", ""), "YAML header"
DOORS["card-header-name"] = partial(card_with, "license: !!python/name:os.system", ""), "YAML header"
DOORS["card-body-jinja"] = partial(card_with, "license: mit", JINJA), ""
DOORS["card-header-jinja"] = partial(card_with, "license: '{{ 7 * 7 }}'", "x"), ""


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_vit: str) -> str:
    """Folder of a LoRA adapter for the tiny ViT."""
    folder = tmp_path_factory.mktemp("tiny") / "adapter"
    save_adapter(folder, tiny_vit)
    return str(folder)


@pytest.mark.parametrize("name", DOORS)
def test_nothing_foreign_is_run(name, tmp_path, request):
    offer, words = DOORS[name]
    folder = tmp_path / "model"
    enter = offer(Place(folder, request))
    if words:
        with pytest.raises((ValueError, OSError, TypeError)) as caught:
            enter()
        assert words in str(caught.value) and str(caught.value).rstrip().endswith((".", "…"))
    else:
        enter()
    assert not marker(folder).exists()


READERS = {
    "pickle",
    "dill",
    "joblib",
    "cloudpickle",
    "eval",
    "exec",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
}


def unsafe_readers(source: str) -> list[str]:
    """Calls that would run what they read, or could be told to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name, told = dotted_name(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            loose = name == "np.load" and told.get("allow_pickle") != "False"
            if loose or name in READERS or name.split(".")[0] in READERS or told.get("trust_remote_code") == "True":
                found.append(f"{name}, line {node.lineno}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_of_ours_reads_a_pickle(name):
    assert not unsafe_readers(SOURCES[name])


@pytest.mark.parametrize(
    "source",
    [
        "pickle.loads(x)",
        "torch.load(x, weights_only=True)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
        "Model.from_pretrained(x, trust_remote_code=True)",
        "yaml.full_load(x)",
    ],
)
def test_the_reader_of_unsafe_readers(source):
    assert len(unsafe_readers(source)) == 1
    assert not unsafe_readers("np.load(x, allow_pickle=False); model.eval(); a.load(x, trust_remote_code=False)")


# ── what goes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def holds_pickle(content: bytes) -> bool:
    """Whether a file is a pickle, an archive of one, or an array of objects."""
    if content[:1] == b"\x80" and content[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return True
    if content.startswith(b"\x93NUMPY"):
        return b"|O" in content[:200]
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return any(
            name.endswith((".pkl", ".pickle")) or holds_pickle(archive.read(name)) for name in archive.namelist()
        )


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pickles_in(files: dict[str, bytes]) -> list[str]:
    return [name for name, content in files.items() if holds_pickle(content)]


def tell_token(files: dict[str, bytes]) -> list[str]:
    """The files that hold the token."""
    return [name for name, content in files.items() if WRITE_TOKEN.encode() in content]


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_a_student_leaves_no_pickle_and_no_token(training, hub: HubServer, tmp_path, tiny_vit, tiny_image_dataset):
    args = make_args(
        tmp_path / "out",
        student_training=training,
        hub_model_id="someone/student",
        hub_token=WRITE_TOKEN,
        push_to_hub=True,
        save_strategy="steps",
        save_steps=3,
    )
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.push_to_hub()
    files, pushed = files_below(tmp_path), hub.files("someone/student")
    assert not tell_token(files | pushed)
    inside = [name for name in pickles_in(files) if not name.startswith("out/_run/") or "/checkpoint-" not in name]
    assert not inside and not pickles_in(pushed)
    assert not [name for name in pushed if "_run" in name or "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert "saved/model.safetensors" in files and "model.safetensors" in pushed


def test_a_pool_and_a_hierarchy_leave_no_pickle_and_no_token(
    hub: HubServer, tmp_path, tiny_vit, tiny_timm, tiny_bert, tiny_sklearn, tiny_adapter, tiny_image_dataset
):
    pool = make_pool(tiny_image_dataset)
    pool.save(tmp_path / "pool")
    pool.push_to_hub("someone/pool", token=WRITE_TOKEN)
    teachers = [Teacher(tiny_vit, name="vit"), Teacher(tiny_timm, name="timm"), Teacher(tiny_sklearn, name="sk")]
    for teacher in teachers:  # what lies beside a model is not the model
        folder = Path(shutil.copytree(teacher.model, tmp_path / teacher.name))
        put(folder, {name: archived(folder) for name in LOOSE})
    teachers = [Teacher(str(tmp_path / teacher.name), name=teacher.name) for teacher in teachers]
    hierarchy = TeacherHierarchy(TINY_LABELS, teachers)
    hierarchy.save(tmp_path / "hierarchy.yaml")
    push_hierarchy(hierarchy, "someone/weak", token=WRITE_TOKEN)
    built = build_pool(tiny_image_dataset.remove_columns("label"), hierarchy, output_dir=tmp_path / "built")
    written = files_below(tmp_path / "pool") | {"h": (tmp_path / "hierarchy.yaml").read_bytes()}
    written |= {f"built/{name}": content for name, content in files_below(tmp_path / "built").items()}
    pushed = {f"d/{name}": data for name, data in hub.files("someone/pool", repo_type="dataset").items()}
    pushed |= hub.files("someone/weak")
    assert len(built) == 48 and {"vit/model.safetensors", "sk/model.skops"} <= set(pushed)
    assert not pickles_in(written | pushed) and not tell_token(written | pushed)
    assert not marker(tmp_path / "vit").exists()


# ── no teacher is silently random ───────────────────────────────────────────────────────────────────────────────────

HEADS = {"vit": "classifier.", "bert": "classifier.", "timm": "fc.", "adapter": "base_model.model.classifier."}
LAYERS = {
    "vit": "vit.encoder.layer.0.",
    "bert": "bert.encoder.layer.0.attention.self.query.",
    "timm": "layer2.",
    "adapter": "base_model.model.vit.",
}


def without(folder: Path, kind: str, start: str) -> None:
    path = folder / WEIGHTS.get(kind, "model.safetensors")
    tensors = load_file(path)
    kept = {name: value for name, value in tensors.items() if not name.startswith(start)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("part", ["head", "layer"])
def test_a_teacher_without_a_part_is_refused(kind, part, tmp_path, request, tiny_image_dataset, tiny_text_dataset):
    folder = Place(tmp_path / "model", request).copy(f"tiny_{kind}")
    without(folder, kind, (HEADS if part == "head" else LAYERS)[kind])
    with pytest.raises(ValueError, match="^Teacher 'low' must .*"):
        load_low(folder)
    hierarchy = TeacherHierarchy(TINY_LABELS, [Teacher(str(folder), name="low")])
    data = (tiny_text_dataset if kind == "bert" else tiny_image_dataset).remove_columns("label")
    with pytest.raises(ValueError, match="^Teacher 'low' must .*"):
        build_pool(data, hierarchy, output_dir=tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_student_without_a_layer_is_refused(kind, tmp_path, request):
    folder = Place(tmp_path / "model", request).copy(f"tiny_{kind}")
    without(folder, kind, LAYERS[kind])
    with pytest.raises(
        ValueError, match="^(The student must|Every weight of the student's backbone must be in the checkpoint)"
    ):
        load_student(folder, TINY_LABELS)
