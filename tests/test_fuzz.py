"""Damaged and mutated files: they load, or one clear error says which file is at fault, and nothing else happens."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, load_hierarchy
from hf_cosupervise.arguments import read_recipe_config
from hf_cosupervise.teachers.progress import Progress
from hf_cosupervise.training.config import CoSupervisedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
# Each seed is one damaged file; the one that fails is named. More of them: COSUPERVISE_FUZZ_SEEDS=5000.
NUM_SEEDS = int(os.environ.get("COSUPERVISE_FUZZ_SEEDS", "200"))
BATCH = 50

HIERARCHY = b"""\
labels: [cat, dog, "no"]
teachers:
  - {model: org/root, revision: v1}
  - model: org/cats
    level: 1
    name: cats
    scope: [cat]
    label_map: {kitty: cat, 1: dog}
  - {model: answers, level: 1, kind: column, domains: [day, night]}
"""
RECIPE = b"""\
# a recipe
output_dir: out
learning_rate: 1e-3
assignment: [scope, agreement]
rejection: [top_k]
rejection_window: [0.5, 1.0]
loss_kwargs: {q: 0.7}
warm_start: false
seed: 3
metadata_column: null
eval_strategy: "no"
steps: 10
"""
PLAN = b"""\
output_dir: out
seeds: 0,1
num_workers: 2
tasks:
  - {name: digits, config: digits.yaml}
  - {name: C1 hard, config: c1.yaml, set: {max_steps: 3}, methods: &names [csl, ridge]}
methods:
  - {name: csl, method: csl}
  - {name: ridge, method: csl, set: &ridge {head_solver: ridge}, tasks: [digits]}
  - {name: generalist, method: generalist, set: *ridge, calibrated: false}
"""
TOKENS = [
    b": ", b"- ", b"{", b"}", b"[", b"]", b"&a ", b"*a", b"!!float ", b"!!bool x", b"!!timestamp x", b"<<: ", b"\t",
    b"!!python/name:os.system ", b"\x00", b"\xff", b"\xed\xa0\x80", b"? ", b"|\n", b">", b"%", b"2024-13-45", b".nan",
    b"-.inf", b"1e999", b"null", b"no", b"'", b'"', b"\n", b"\n\n  ", b"---\n", b"...", b"#", b"@", b"`", b"0x", b"~",
    b"''", b"9" * 5000, b"[" * 2000, b"&a [*a]", b"{a: {b: [1, {c: d}]}}", b"\\ud800", "é".encode(), b"-1", b"1.5",
    b"true", b"[1, 2]", b"{}", b"[]",
]  # fmt: skip


@dataclass
class Settings:
    steps: int = 1


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of the kinds that editors, merges and disks make."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([1, 1, 2, 5, 20, 100]))
        lines = data.split(b"\n")
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:start] + data[stop:]
        elif kind == 1:
            data = data[:stop] + data[start:]  # said twice
        elif kind == 2:
            data = data[:start] + rng.choice(TOKENS) + data[start:]
        elif kind == 3:
            data = data[:start] + rng.choice(TOKENS) + data[stop:]
        elif kind == 4:
            data = data[:start]
        elif kind == 5:
            lines[rng.randrange(len(lines))] = rng.choice(lines)
            data = b"\n".join(lines)
        else:  # a value in place of what follows a colon
            at = rng.randrange(len(lines))
            lines[at] = lines[at].partition(b":")[0] + b": " + rng.choice(TOKENS)
            data = b"\n".join(lines)
    return data


def check(load: Callable[[], object], name: str, what: object) -> bool:
    """Whether it loads; anything but one of our errors that names the file fails, and says what was damaged how."""
    try:
        load()
    except Exception as error:
        # The very classes: a UnicodeDecodeError is a ValueError too.
        if type(error) in (ValueError, FileNotFoundError) and name in str(error):
            return False
        pytest.fail(f"{type(error).__name__} of {what!r}: {error}")
    return True


def seeds(first: int) -> Iterator[tuple[int, random.Random]]:
    for seed in range(first, min(first + BATCH, NUM_SEEDS)):
        yield seed, random.Random(seed)


FIRST = pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH), ids=lambda first: f"seeds from {first}")


# ── what people write ───────────────────────────────────────────────────────────────────────────────────────────────


@FIRST
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_mutated_hierarchies(first, suffix, tmp_path):
    (tmp_path / "whole.yaml").write_bytes(HIERARCHY)
    path = tmp_path / f"teachers{suffix}"
    load_hierarchy(tmp_path / "whole.yaml").save(path)
    whole, num_loaded = path.read_bytes(), 0
    for seed, rng in seeds(first):
        path.write_bytes(text := mutate(whole, rng))
        num_loaded += check(lambda: load_hierarchy(path), path.name, (seed, text))
    assert num_loaded < BATCH / 2  # or the mutations would mean nothing


@FIRST
def test_mutated_recipes(first, tmp_path):
    path = tmp_path / "recipe.yaml"
    for seed, rng in seeds(first):
        path.write_bytes(text := mutate(RECIPE, rng))
        check(lambda: read_recipe_config(path, [CoSupervisedConfig, Settings]), path.name, (seed, text))


@FIRST
def test_mutated_plans_of_a_comparison(first, tmp_path):
    for extra in ("sklearn", "skops", "matplotlib"):
        pytest.importorskip(extra)
    from comparison import plan

    path = tmp_path / "plan.yaml"
    for seed, rng in seeds(first):
        path.write_bytes(text := mutate(PLAN, rng))
        check(lambda: plan.parse_plan(["--config", str(path)]), "", (seed, text))


@pytest.mark.parametrize("text", [b"a: &a [*a]", b"a: &a {b: *a}", b"a: &a {b: 1}\nb: {<<: *a, c: 2}\nb: 3"])
def test_aliases_that_lead_nowhere(text, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(text)
    assert not check(lambda: read_recipe_config(tmp_path / "recipe.yaml", [Settings]), "recipe.yaml", text)


# ── pools ───────────────────────────────────────────────────────────────────────────────────────────────────────────

NUM_EXAMPLES = 20
FILES = ("inputs/data.arrow", "teachers/root/data.arrow", "teachers/left/data.arrow", "teachers/right/data.arrow")
ODD: list[Any] = [
    None, True, 0, -1, 1, 2**70, 10**400, 1.5, float("nan"), "", "x", "../x", "/etc", [], [1], [[]], {}, {"a": 1},
    "root", "LEFT", "inputs", "\ud800", "a" * 300, ".", ["a", "b"], ["a", "a", "b"], [0, "x"], {"teachers": []},
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of three teachers on disk."""
    teachers = [Teacher("t/root"), Teacher("t/left", level=1, scope=["a"]), Teacher("t/right", level=1)]
    hierarchy, rng = TeacherHierarchy(["a", "b", "c"], teachers), np.random.default_rng(0)
    inputs = Dataset.from_dict(
        {
            "id": [f"id-{row}" for row in range(NUM_EXAMPLES)],
            "text": ["text " * (row % 4) for row in range(NUM_EXAMPLES)],
            "oracle_label": [row % 3 for row in range(NUM_EXAMPLES)],
        }
    )
    predictions = {name: rng.dirichlet(np.ones(3), NUM_EXAMPLES).astype(np.float32) for name in hierarchy.names}
    folder = tmp_path_factory.mktemp("fuzz") / "pool"
    pool = PseudolabelPool.from_predictions(
        hierarchy, inputs["id"], predictions, inputs=inputs, facts={"root": {"commit": None}}
    )
    pool.save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A pool that may be damaged: a real copy, as files of a pool are often linked."""
    return Path(shutil.copytree(saved, tmp_path / "pool"))


def read_all(folder: Path, verify: bool) -> None:
    """Load a pool and read what is in it, as whoever has loaded it will."""
    pool = PseudolabelPool.load(folder, verify=verify)
    for name in pool.hierarchy.names:
        assert np.isfinite(pool.decode(name)).all()
    repr(pool)


def damage(data: bytes, rng: random.Random) -> bytes:
    """What disks, copies and downloads do to a file; most of it near the beginning, where Arrow's tables are."""
    damaged, kind = bytearray(data), rng.randrange(7)
    at = rng.randrange(min(len(data), rng.choice([1500, len(data)])))
    if kind == 0:
        return data[:at]
    if kind == 1:
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        damaged[at : at + rng.choice([1, 4, 8, 64])] = rng.randbytes(rng.choice([1, 4, 8, 64]))
    elif kind == 3:
        damaged[at:at] = rng.randbytes(rng.choice([1, 8, 64]))
    elif kind == 4:
        del damaged[at : at + rng.choice([1, 8, 64])]
    elif kind == 5:
        damaged[at:] = bytes(len(data) - at)
    else:
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(min(len(data), 1500))] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
    return bytes(damaged)


@FIRST
def test_damaged_arrow_files_are_found_by_their_digest(first, copied):
    for seed, rng in seeds(first):
        path = rng.choice(FILES)
        whole = (copied / path).read_bytes()
        (copied / path).write_bytes(damaged := damage(whole, rng))
        loaded = check(lambda: read_all(copied, verify=True), path, (seed, path))  # noqa: B023
        assert loaded == (damaged == whole), seed
        (copied / path).write_bytes(whole)


@FIRST
def test_damaged_arrow_files_without_a_digest_crash_nothing(first, copied):
    # as pools of older versions are: now Arrow itself reads what was damaged
    header = json.loads((copied / "pool.json").read_text())
    (copied / "pool.json").write_text(json.dumps({key: value for key, value in header.items() if key != "files"}))
    for seed, rng in seeds(first):
        path = rng.choice(FILES)
        whole = (copied / path).read_bytes()
        (copied / path).write_bytes(damage(whole, rng))
        check(lambda: read_all(copied, verify=False), str(copied), (seed, path))
        (copied / path).write_bytes(whole)


@FIRST
def test_damaged_headers(first, copied):
    whole = (copied / "pool.json").read_bytes()
    for seed, rng in seeds(first):
        (copied / "pool.json").write_bytes(text := rng.choice([damage, mutate])(whole, rng))
        check(lambda: read_all(copied, verify=rng.random() < 0.5), str(copied), (seed, text))  # noqa: B023


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON, but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from places(item, (*place, key))


@FIRST
def test_headers_that_say_something_else(first, copied, tmp_path):
    whole = json.loads((copied / "pool.json").read_text())
    everywhere = list(places(whole))
    for seed, rng in seeds(first):
        header, place = copy.deepcopy(whole), rng.choice(everywhere)
        inner = header
        for key in place[:-1]:
            inner = inner[key]
        if rng.random() < 0.1:
            del inner[place[-1]]
        else:
            inner[place[-1]] = rng.choice(ODD)
        (copied / "pool.json").write_text(json.dumps(header))
        if check(lambda: read_all(copied, verify=False), str(copied), (seed, place, inner)):
            PseudolabelPool.load(copied).save(tmp_path / f"again-{seed}")  # nor does it break what is written next


@pytest.mark.parametrize("path", [*FILES, "pool.json"])
def test_a_file_that_is_gone_empty_or_another_one(path, copied):
    whole = (copied / path).read_bytes()
    (copied / path).unlink()
    assert not check(lambda: read_all(copied, verify=False), str(copied), path)
    for content in (b"", b"\0" * len(whole), (copied / "README.md").read_bytes(), whole + whole):
        (copied / path).write_bytes(content)
        for verify in (False, True):
            assert not check(lambda: read_all(copied, verify=verify), str(copied), (path, content[:8]))  # noqa: B023
    (copied / path).unlink()
    (copied / path).mkdir()
    assert not check(lambda: read_all(copied, verify=False), str(copied), path)


@pytest.mark.parametrize(("path", "other"), [(FILES[0], FILES[1]), (FILES[1], FILES[0]), (FILES[1], FILES[2])])
def test_files_that_took_each_other_s_place(path, other, copied):
    contents = (copied / path).read_bytes(), (copied / other).read_bytes()
    (copied / path).write_bytes(contents[1])
    (copied / other).write_bytes(contents[0])
    assert not check(lambda: read_all(copied, verify=True), str(copied), path)


# ── work in progress ────────────────────────────────────────────────────────────────────────────────────────────────


@FIRST
def test_damaged_work_is_labelled_again_or_refused(first, tmp_path):
    shape = (4, 2)
    for seed, rng in seeds(first):
        folder = tmp_path / f"work-{seed}"
        journal = Progress(folder, 12, 2, np.dtype(np.uint8))
        journal.open({"rows": 12})
        part = journal.start_part("t")
        for start in (0, 4, 8):
            part.append(start, np.full(shape, start, np.uint8), np.full(shape, 0.5, np.float16), failed_rows=[start])
        part.close()
        journal.close()
        path = rng.choice(sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "lock"))
        path.write_bytes(damage(path.read_bytes(), rng))
        if rng.random() < 0.05 and path.name != "plan.json":
            path.unlink()

        def go_on(journal: Progress = journal) -> None:
            try:
                journal.open({"rows": 12})
                repr(journal.facts)
                segments = journal.segments("t")
                for segment, (label_ids, label_probs) in zip(segments, journal.rows(segments), strict=True):
                    assert (label_ids == segment.start).all() and (label_probs == 0.5).all()
                covered = {row for segment in segments for row in range(segment.start, segment.stop)}
                gaps = {row for start, stop in journal.missing("t") for row in range(start, stop)}
                assert covered | gaps == set(range(12)) and not covered & gaps
            finally:
                journal.close()

        check(go_on, str(folder), (seed, path.name))
