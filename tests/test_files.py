"""The one way in which files are written: whole, under names that nobody can guess, and through nobody's links."""

from __future__ import annotations

import ast
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset

from hf_cosupervise import files as files_module
from hf_cosupervise.evaluation.plots import plot_pgr
from hf_cosupervise.evaluation.report import save_report
from hf_cosupervise.files import is_inside, open_work_folder, whole_file, whole_folder, write_json, write_text
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.hub.cards import model_card, write_card
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.teachers.progress import Progress
from hf_cosupervise.training.checkpointing import last_checkpoint, seal_checkpoint
from hf_cosupervise.training.run import OneRound, TrainingRun
from hf_cosupervise.training.run_folder import RunFolder

HIERARCHY = TeacherHierarchy(["a", "b"], [Teacher("t/root")])
PACKAGE = Path(files_module.__file__).parent


REPORT = {"weak_accuracy": 0.4, "methods": {"csl": {"accuracy": 0.5, "pgr": 0.5}, "ceiling": {"accuracy": 0.6}}}
# Who writes which file, with the name that its temporary file once had.
WRITERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "card": (lambda folder: write_card(model_card({"name": "x"}), folder), "README.md", ".README.md.tmp"),
    "hierarchy": (lambda folder: HIERARCHY.save(folder / "h.yaml"), "h.yaml", ".h.yaml.tmp"),
    "report": (lambda folder: save_report({}, folder / "r.json"), "r.json", ".r.json.tmp"),
    "history": (lambda folder: TrainingRun(folder, OneRound(), 1, {}).conclude({}), "history.json", "history.tmp"),
    "run": (lambda folder: RunFolder(folder).begin({}), "run.json", ".run.json.tmp"),
    "checkpoint": (lambda folder: seal_checkpoint(folder, {}), "digests.json", ".digests.json.tmp"),
    "journal": (
        lambda folder: Progress(folder / "work", 1, 1, np.dtype("u1")).open({}),
        "work/plan.json",
        "work/plan.json.tmp",
    ),
    "figure": (lambda folder: plot_pgr(REPORT, folder / "f.png"), "f.png", ".f.tmp.png"),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_text("precious")
    return tmp_path / "victim"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_planted_link_is_not_written_through(kind, tmp_path, victim):
    write, name, old_temporary = WRITERS[kind]
    folder = tmp_path / "theirs"
    if kind == "figure":
        pytest.importorskip("matplotlib")
    for planted in (old_temporary, name):
        if kind == "journal":
            continue
        (folder / planted).parent.mkdir(parents=True, exist_ok=True)
        (folder / planted).symlink_to(victim)
    if kind in ("card", "history"):  # what is there is read, and must be such a file
        (folder / name).unlink()
    folder.mkdir(exist_ok=True)
    write(folder)
    assert victim.read_text() == "precious"
    assert (folder / name).is_file() and not (folder / name).is_symlink()
    assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_rights_that_any_new_ones_get(mask, tmp_path):
    old = os.umask(mask)
    try:
        write_text(tmp_path / "file", "x")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_a_name_that_is_guessed_is_refused_not_followed(tmp_path, victim, monkeypatch):
    monkeypatch.setattr(files_module.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".name-guessed.txt").symlink_to(victim)
    (tmp_path / ".folder-guessed").symlink_to(tmp_path)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "name.txt", "x")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "folder"):
        pass
    assert victim.read_text() == "precious" and (tmp_path / ".name-guessed.txt").is_symlink()


def test_a_file_or_folder_is_whole_or_not_there(tmp_path):
    write_text(tmp_path / "name", "old")
    with pytest.raises(OSError, match="No space left"), whole_file(tmp_path / "name") as path:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert (tmp_path / "name").read_text() == "old" and os.listdir(tmp_path) == ["name"]


LONG = ["x" * 240 + ".json", "é" * 120, "😀" * 60, "a" + "." * 100 + "b" * 100, ".hidden", "x.tar.gz"]


@pytest.mark.parametrize("name", LONG)
def test_long_and_odd_names_can_be_written(name, tmp_path):
    write_json(tmp_path / name, {"a": float("nan")})
    assert json.loads((tmp_path / name).read_text()) == {"a": None} and os.listdir(tmp_path) == [name]


# ── folders of work in progress ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "what", ["folder", "dangling", "file", "parts", "part", "scratch", "plan", "lock", "other user"]
)
def test_work_in_a_folder_that_leads_elsewhere_is_refused(what, tmp_path, victim, monkeypatch):
    work, elsewhere = tmp_path / ".pool.unfinished", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if what in ("folder", "dangling"):
        work.symlink_to(elsewhere if what == "folder" else tmp_path / "nowhere")
    elif what == "file":
        work.write_text("x")
    else:
        work.mkdir()
        place = {"part": "parts/root", "plan": "plan.json"}.get(what, what)
        if what == "other user":
            real = os.fstat
            monkeypatch.setattr(os, "fstat", lambda file: _another(real(file)))
        else:
            (work / place).parent.mkdir(exist_ok=True)
            (work / place).symlink_to(victim if what in ("plan", "lock") else elsewhere)
    found = {"folder": "a symbolic link", "dangling": "a symbolic link", "file": "a file"}.get(
        what, "the symbolic link"
    )
    found = "a folder of another user" if what == "other user" else found
    with pytest.raises(FileExistsError) as error:
        Progress(work, 1, 1, np.dtype("u1")).open({})
    assert f"'{work}' must be a folder in which a run of yours has left its work, got {found}" in str(error.value)
    assert str(error.value).endswith("See what it is, and delete it.")
    assert victim.read_text() == "precious" and os.listdir(elsewhere) == []


def _another(found: os.stat_result) -> os.stat_result:
    return os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))


def test_work_that_was_begun_is_gone_on_with(tmp_path):
    work = tmp_path / ".pool.unfinished"
    for _ in range(2):
        journal = Progress(work, 1, 1, np.dtype("u1"))
        journal.open({"a": 1})
        journal.close()
    open_work_folder(work)


def test_a_pool_is_not_saved_through_a_planted_folder(tmp_path, victim):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".pool").symlink_to(elsewhere)
    (tmp_path / ".pool-").symlink_to(elsewhere)
    pool = PseudolabelPool.from_predictions(
        HIERARCHY, [0], {"root": np.ones((1, 2)) / 2}, inputs=Dataset.from_dict({"x": [1]})
    )
    pool.save(tmp_path / "pool")
    assert os.listdir(elsewhere) == [] and len(PseudolabelPool.load(tmp_path / "pool")) == 1


@pytest.mark.parametrize("how", ["relative", "absolute", "link"])
def test_a_checkpoint_whose_digests_lead_elsewhere_is_passed_over(how, tmp_path, victim, caplog):
    PartialState()  # the logger asks it
    folder = tmp_path / "level-0/checkpoint-1"
    folder.mkdir(parents=True)
    write_json(folder / "trainer_state.json", {"global_step": 1, "max_steps": 2})
    seal_checkpoint(folder, {})
    assert last_checkpoint(tmp_path / "level-0") == folder
    name = {"relative": "../../victim", "absolute": str(victim), "link": "link"}[how]
    if how == "link":
        (folder / "link").symlink_to(victim)
    write_json(folder / "digests.json", {name: files_module.file_digest(victim)})
    assert last_checkpoint(tmp_path / "level-0") is None
    assert f"'{folder / name}' is not as it was written" in caplog.text


# ── where a path leads ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("in/x", True),
        ("in/../in/x", True),
        ("in/inner", True),
        ("in", True),
        ("x", False),
        ("in/../x", False),
        ("inside/x", False),
        ("in/out/x", False),
        ("in/outfile", False),
        ("in/missing", True),
        ("/etc/passwd", False),
    ],
)
def test_is_inside(path, expected, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_text("x")
    (tmp_path / "in/inner").symlink_to("x")
    (tmp_path / "in/out").symlink_to("..")
    (tmp_path / "in/outfile").symlink_to("/etc/passwd")
    assert is_inside(tmp_path / path, tmp_path / "in") is expected


def test_a_snapshot_of_the_hubs_cache_is_itself(tmp_path):
    repo = tmp_path / "datasets--someone--pool"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs/123").write_text("x")
    folder = repo / "snapshots/abc/inner"
    folder.mkdir(parents=True)
    (folder / "x").symlink_to("../../../blobs/123")
    (tmp_path / "secret").write_text("x")
    (folder / "y").symlink_to(tmp_path / "secret")
    assert is_inside(folder / "x", folder) and not is_inside(folder / "y", folder)


# ── nothing else writes ─────────────────────────────────────────────────────────────────────────────────────────────


def renames(source: str) -> list[int]:
    """Lines that rename or make temporary names by other means."""
    banned = ("os.replace", "os.rename", "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "shutil.move")
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in banned
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_only_files_renames(path):
    source = path.read_text(encoding="utf-8")
    assert path.name == "files.py" or not renames(source)
    assert '.tmp"' not in source and ".tmp'" not in source


def test_reader_of_renames():
    assert renames("import os\nos.replace(a, b)\nx.replace(a, b)\nshutil.move(a, b)") == [2, 4]
