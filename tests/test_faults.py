"""Killed, full, damaged and crowded: what is done stays done, and the result is bit by bit that of a quiet run.

Each kill is a `SIGKILL` or `SIGTERM` of a forked process: at a random moment, around a rename, or in the middle of a
write. Failing kills are named by their seed or place.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from filelock import FileLock
from PIL import Image as PILImage
from test_features import Counter, bits_in, names_in

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.teachers.labeling import build_pool
from hf_cosupervise.teachers.progress import Progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
NUM_ROWS, BATCH = 48, 8
_WRITE, _REPLACE = os.write, os.replace


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def start(work: Callable[[], Any]) -> int:
    """Do something in a forked process, which ends with 0 if it went well."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(30)  # whatever hangs
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """0, or minus the signal that killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL, -signal.SIGTERM), code
    return code


def run(work: Callable[[], Any]) -> int:
    return end_of(start(work))


def kill_somewhere(work: Callable[[], Any], log: Log, num_lines: int, rng: np.random.Generator) -> bool:
    """Do something, and kill it a moment after it has begun with a random batch, unless it ends before."""
    child, number, deadline = start(work), int(rng.integers(num_lines)), time.monotonic() + 20
    while log.count() <= number and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01))
    os.kill(child, rng.choice([signal.SIGKILL, signal.SIGTERM]))
    return end_of(child) != 0


def die_in(name: str, number: int, when: str, work: Callable[[], Any]) -> None:
    """Do something, and be killed before, within or after a certain call of `os.replace` or `os.write`."""
    real, numbers = getattr(os, name), itertools.count()

    def call(*args: Any) -> Any:
        if next(numbers) != number:
            return real(*args)
        if when == "within":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        if when == "after":
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, call)
    work()


def places(work: Callable[[], Any], folder: Path, num_points: int) -> list[tuple[str, int, str]]:
    """Before and after every rename, and before, within or after some writes through the whole run."""
    noted = folder.with_name(f"{folder.name}-calls")

    def count() -> None:
        numbers = dict.fromkeys(("replace", "write"), 0)
        for name in numbers:
            setattr(os, name, partial(_count_call, numbers, name, getattr(os, name)))
        work()
        noted.write_text(f"{numbers['replace']} {numbers['write']}")

    assert run(count) == 0
    num_replaces, num_writes = map(int, noted.read_text().split())
    found = [("replace", number, when) for number in range(num_replaces) for when in ("before", "after")]
    numbers = np.unique(np.linspace(0, num_writes - 1, num_points).astype(int)).tolist()
    return found + [
        ("write", number, when) for number, when in zip(numbers, itertools.cycle(["within", "after", "before"]))
    ]


def _count_call(numbers: dict[str, int], name: str, real: Callable[..., Any], *args: Any) -> Any:
    numbers[name] += 1
    return real(*args)


class Log:
    """What was run, by whichever process: one line per forward pass."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, line: str) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        _WRITE(file, f"{line}\n".encode())
        os.close(file)

    def count(self) -> int:
        return len(self.path.read_text().splitlines()) if self.path.exists() else 0

    def take(self) -> list[str]:
        """The lines since the last time."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.unlink(missing_ok=True)
        return lines


# ── labelling ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Shade:
    """A teacher of images that are all of one shade, the number of their row."""

    column = None

    def __init__(self, name: str, preprocessing: str, log: Log, seconds: float = 0.0) -> None:
        self.facts = {"kind": "object", "preprocessing": preprocessing}
        self.name, self.log, self.seconds = name, log, seconds

    def prepare(self, cells: Any) -> np.ndarray:
        return np.array([np.asarray(cell)[0, 0, 0] for cell in cells], dtype=np.float32)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        self.log.add(f"{self.name} {int(inputs[0])}")
        time.sleep(self.seconds)
        logits = np.sin(np.outer(inputs + 1, np.arange(1, 5)) * (1 + ord(self.name)))
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def shades() -> Dataset:
    images = [PILImage.fromarray(np.full((4, 4, 3), row, dtype=np.uint8)) for row in range(NUM_ROWS)]
    columns = {"image": images, "id": [f"row-{row}" for row in range(NUM_ROWS)]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "id": Value("string")}))


class Labelling:
    """Three teachers that label into a folder, and what they ran."""

    def __init__(self, shades: Dataset, folder: Path, preprocessings: str, seconds: float = 0.0) -> None:
        self.folder, self.log = folder, Log(folder.with_suffix(".log"))
        hierarchy = TeacherHierarchy(list("wxyz"), [Teacher(name, level=int(name != "a")) for name in "abc"])
        models = {name: Shade(name, kind, self.log, seconds) for name, kind in zip("abc", preprocessings)}
        self.work = partial(
            build_pool,
            shades,
            hierarchy,
            models=models,
            batch_size=BATCH,
            pool_k=3,
            output_dir=folder,
            disable_tqdm=True,
        )

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.unfinished")

    def done(self) -> set[str]:
        """The batches that are on disk, as the log names them."""
        if self.folder.exists():
            return {f"{name} {row}" for name in "abc" for row in range(0, NUM_ROWS, BATCH)}
        journal = Progress(self.unfinished, NUM_ROWS, 3, np.dtype(np.uint8))
        return {f"{name} {segment.start}" for name in "abc" for segment in journal.segments(name)}

    def go_on(self) -> None:
        """Finish, after a process was killed, and look at what that took."""
        done = self.done()
        if self.folder.exists():
            with pytest.raises(FileExistsError, match="Load the pool with"):
                self.work()
        else:
            assert run(self.work) == 0
            assert not self.unfinished.exists()
        again = self.log.take()
        assert not done & set(again) and len(done) + len(again) == 3 * NUM_ROWS // BATCH
        PseudolabelPool.load(self.folder, verify=True)


@pytest.mark.parametrize(("preprocessings", "step"), [("ppp", 3), ("ppq", 1)])
def test_labelling_killed_around_each_rename_and_in_writes(shades, tmp_path, preprocessings, step):
    whole = Labelling(shades, tmp_path / "whole", preprocessings)
    found = places(whole.work, whole.folder, 6)[::step]
    bits = bits_in(whole.folder)
    assert sorted(whole.log.take()) == sorted(f"{name} {row}" for name in "abc" for row in range(0, NUM_ROWS, BATCH))
    assert len([place for place in found if place[0] == "replace"]) >= 12 // step
    print(f"{len(found)} kills: {found}")
    for number, place in enumerate(found):
        job = Labelling(shades, tmp_path / str(number), preprocessings)
        assert run(partial(die_in, *place, job.work)) == -signal.SIGKILL, place
        assert all(count == 1 for count in map(job.log.take().count, job.done())), place
        job.go_on()
        assert bits_in(job.folder) == bits, place


@pytest.mark.parametrize("seed", range(6))
def test_labelling_killed_at_random_moments(shades, tmp_path, seed):
    rng = np.random.default_rng(seed)
    preprocessings = ["ppp", "ppq", "pqr"][seed % 3]
    whole = Labelling(shades, tmp_path / "whole", preprocessings, seconds=0.004)
    assert run(whole.work) == 0
    job = Labelling(shades, tmp_path / "job", preprocessings, seconds=0.004)
    num_kills, done = 0, set[str]()
    for _ in range(3):
        num_kills += kill_somewhere(job.work, job.log, 6, rng)
        assert not done & set(job.log.take()), seed
        assert done <= job.done(), seed
        done = job.done()
    print(f"seed {seed}: {num_kills} kills, then {len(done)} of {3 * NUM_ROWS // BATCH} batches were there")
    assert num_kills
    job.go_on()
    assert bits_in(job.folder) == bits_in(whole.folder), seed


def test_two_builds_into_one_folder(shades, tmp_path):
    first = Labelling(shades, tmp_path / "pool", "ppq", seconds=0.02)
    child = start(first.work)
    while not first.log.path.exists():
        time.sleep(0.005)
    with pytest.raises(RuntimeError, match="must be worked on by one run at a time, got another run that is at it."):
        first.work()
    assert end_of(child) == 0 and len(first.log.take()) == 3 * NUM_ROWS // BATCH
    # Many that start at once: one labels, the others are refused, and no batch is labelled twice.
    second = Labelling(shades, tmp_path / "crowded", "ppq", seconds=0.01)
    children = [start(partial(_or_be_refused, second)) for _ in range(4)]
    assert [end_of(child) for child in children] == [0] * 4
    assert len(second.log.take()) == 3 * NUM_ROWS // BATCH and bits_in(second.folder) == bits_in(first.folder)


def _or_be_refused(job: Labelling) -> None:
    try:
        job.work()
    except (RuntimeError, FileExistsError) as error:
        if "one run at a time" not in str(error) and "Load the pool with" not in str(error):
            raise


# ── features ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Featuring:
    """A student whose features are computed into a folder, and how often its backbone ran."""

    def __init__(self, student: Counter, data: Dataset, column: str, path: Path, seconds: float = 0.0) -> None:
        self.student, self.path, self.log = student, path, Log(path.with_suffix(".log"))
        self.data, self.column, self.seconds = data, column, seconds

    @property
    def folder(self) -> Path:
        return self.path / self.student.store().folder.name

    def work(self, batch_size: int = BATCH) -> np.ndarray:
        self.student.path = self.path
        store, prepare = self.student.store(), self.student.processor

        def count(cells: list[Any]) -> Any:
            self.log.add(str(len(cells)))
            time.sleep(self.seconds)
            return prepare(cells)

        store.processor = count  # type: ignore[assignment]
        return store.features(self.data, self.column, batch_size=batch_size, disable_tqdm=True)

    def num_done(self) -> int:
        """The batches that are on disk."""
        if list(self.folder.glob("shard-*")):
            return NUM_ROWS // BATCH
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob(".partial-*/batches.txt"))

    def go_on(self) -> None:
        num_done = self.num_done()
        assert run(self.work) == 0
        assert len(self.log.take()) == NUM_ROWS // BATCH - num_done


@pytest.fixture(params=["image", "text"])
def make_featuring(request, tiny_vit, tiny_bert, tiny_image_dataset, tiny_text_dataset, tmp_path) -> Any:
    folder, data = {"image": (tiny_vit, tiny_image_dataset), "text": (tiny_bert, tiny_text_dataset)}[request.param]
    student = Counter(folder, tmp_path)
    return lambda name, **options: Featuring(student, data, request.param, tmp_path / name, **options)


def test_features_killed_around_each_rename_and_in_writes(make_featuring, tmp_path):
    whole = make_featuring("whole")
    found = places(whole.work, tmp_path / "whole", 9)
    bits = bits_in(whole.path)
    print(f"{len(found)} kills: {found}")
    for number, place in enumerate(found):
        job = make_featuring(str(number))
        assert run(partial(die_in, *place, job.work)) == -signal.SIGKILL, place
        assert job.num_done() <= len(job.log.take()) <= job.num_done() + 1, place
        job.go_on()
        assert bits_in(job.path) == bits, place


@pytest.mark.parametrize("seed", range(3))
def test_features_killed_at_random_moments(make_featuring, seed):
    rng = np.random.default_rng(seed)
    whole = make_featuring("whole")
    assert run(whole.work) == 0
    job, num_kills = make_featuring("job", seconds=0.01), 0
    for _ in range(3):
        before = job.num_done()
        num_kills += kill_somewhere(job.work, job.log, 3, rng)
        assert 0 <= before + len(job.log.take()) - job.num_done() <= 1, seed
    print(f"seed {seed}: {num_kills} kills, then {job.num_done()} of {NUM_ROWS // BATCH} batches were there")
    assert num_kills
    job.go_on()
    assert bits_in(job.path) == bits_in(whole.path), seed


def test_several_runs_that_share_a_features_folder(make_featuring):
    whole, shared = make_featuring("whole"), make_featuring("shared", seconds=0.01)
    assert run(whole.work) == 0
    children = [start(shared.work) for _ in range(4)]
    # one is killed, which is not to harm the others
    time.sleep(0.05)
    os.kill(children[0], signal.SIGKILL)
    assert [end_of(child) for child in children[1:]] == [0] * 3 and end_of(children[0]) in (0, -signal.SIGKILL)
    assert run(shared.work) == 0  # and cleans what the dead one left
    assert bits_in(shared.path) == bits_in(whole.path)


# ── disks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own in memory, where this may be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or shutil.which("mount") is None:
        pytest.skip("file systems in memory are made on Linux only")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, num_free: int) -> Path:
    """Leave so many bytes on a disk."""
    stats = os.statvfs(folder)
    path = folder / "ballast"
    path.write_bytes(b"0" * (stats.f_bavail * stats.f_frsize - num_free))
    return path


def test_features_on_a_disk_that_is_really_full(tiny_bert, tmp_path):
    data = Dataset.from_dict({"text": [f"the animal often sleeps {row}" for row in range(400)]})
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        student = Counter(tiny_bert, tmp_path / "whole")
        whole = np.array(student.store().features(data, "text", batch_size=20, disable_tqdm=True))
        student.path, num_batches = disk / "features", len(student.batches)
        (disk / "features").mkdir()
        ballast = fill(disk, 40000)  # 12800 bytes are keys, 25600 are features
        with pytest.raises(OSError, match="No space left on device") as error:
            student.store().features(data, "text", batch_size=20, disable_tqdm=True)
        assert error.value.errno == errno.ENOSPC and f"The disk of '{student.store().folder}'" in str(error.value)
        assert [name[:15] for name in names_in(student.store().folder)] == [".partial-shard-"]
        ballast.unlink()
        student.batches.clear()
        found = np.array(student.store().features(data, "text", batch_size=20, disable_tqdm=True))
        assert np.array_equal(found, whole) and 0 < len(student.batches) < num_batches
        assert all(name.startswith("shard-") for name in names_in(student.store().folder))


def test_labelling_on_a_disk_that_is_really_full(shades, tmp_path):
    whole = Labelling(shades, tmp_path / "whole", "ppq")
    whole.work()
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        job = Labelling(shades, disk / "pool", "ppq")
        job.log = whole.log
        whole.log.take()
        for num_free in (0, 4096, 20000, 40000):
            ballast = fill(disk, num_free)
            with pytest.raises(OSError, match="must have room for about"):
                job.work()
            assert not job.folder.exists()
            ballast.unlink()
        job.work()
        assert bits_in(job.folder) == bits_in(whole.folder)


def refuse(*args: Any, **options: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "here")


@pytest.mark.parametrize("place", ["below a file", "not allowed"])
def test_a_folder_that_cannot_be_written(shades, make_featuring, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    name = "file/below" if place == "below a file" else "new"
    labelling, featuring = Labelling(shades, tmp_path / name, "ppp"), make_featuring(name)
    labelling.log = featuring.log = Log(tmp_path / "log")
    if place == "not allowed":  # who runs as root may do anything
        monkeypatch.setattr(os, "mkdir", refuse)
    for work in (labelling.work, featuring.work):
        with pytest.raises((NotADirectoryError, FileExistsError, PermissionError), match=r"/file|'here'"):
            work()
    monkeypatch.undo()
    assert not Log(tmp_path / "log").take() and bits_in(tmp_path).keys() == {"file"}


def test_no_lock_can_be_made(make_featuring, monkeypatch):
    job = make_featuring("job")
    monkeypatch.setattr(FileLock, "acquire", refuse)
    job.work()
    assert [name[:6] for name in names_in(job.folder)] == ["shard-"]


# ── damage, and clocks ──────────────────────────────────────────────────────────────────────────────────────────────


def damage(path: Path, rng: np.random.Generator) -> str:
    """Flip a bit of a file, or cut it off somewhere."""
    content, place = bytearray(path.read_bytes()), int(rng.integers(path.stat().st_size))
    kind = rng.choice(["flip", "cut"])
    if kind == "flip":
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content if kind == "flip" else content[:place])
    return f"{kind} of {path.name} at {place}"


def test_damaged_features_come_back_bit_by_bit(make_featuring, caplog):
    whole = make_featuring("whole")
    whole.work()
    bits, rng = bits_in(whole.path), np.random.default_rng(0)
    for name in bits:
        for _ in range(8):
            what = damage(whole.path / name, rng)
            caplog.clear()
            whole.log.take()
            found = whole.work()
            assert bits_in(whole.path) == bits and len(caplog.records) == 1, what
            assert len(whole.log.take()) == NUM_ROWS // BATCH and found.shape == (NUM_ROWS, 16), what


def test_damage_of_a_pool_is_found(shades, tmp_path):
    whole = Labelling(shades, tmp_path / "whole", "ppq")
    whole.work()
    bits, rng = bits_in(whole.folder), np.random.default_rng(0)
    files = [name for name in bits if name.endswith(".arrow")]
    assert len(files) == 4
    for name, _ in itertools.product(files, range(8)):
        path = whole.folder / name
        what = damage(path, rng)
        with pytest.raises(ValueError) as error:
            PseudolabelPool.load(whole.folder, verify=True)
        assert str(error.value).startswith(f"'{path}' of pool"), what
        path.write_bytes(bits[name])
    assert PseudolabelPool.load(whole.folder, verify=True).ids[5] == "row-5"


def test_a_clock_that_jumps_back(shades, make_featuring, tmp_path, monkeypatch):
    whole, whole_features = Labelling(shades, tmp_path / "whole", "ppq"), make_featuring("whole-features")
    whole.work()
    whole_features.work()
    job, featuring = Labelling(shades, tmp_path / "job", "ppq"), make_featuring("features")
    assert run(partial(die_in, "write", 20, "after", job.work)) < 0
    assert run(partial(die_in, "write", 8, "after", featuring.work)) < 0
    done = job.done()
    job.log.take()
    hours = itertools.count()
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: 1e9 - 3600.0 * next(hours))
    job.work.keywords["disable_tqdm"] = False
    monkeypatch.setenv("TQDM_DISABLE", "0")
    job.work()
    featuring.work()
    assert 0 < len(done) == 3 * NUM_ROWS // BATCH - len(job.log.take())
    assert bits_in(job.folder) == bits_in(whole.folder)
    assert bits_in(featuring.path) == bits_in(whole_features.path)
