"""A pool that knows no labels: written answers are stored, matched, selected and published like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hub_server import HubServer

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.base import TeacherPool
from hf_cosupervise.pool.pseudolabels import PseudolabelPool

HIERARCHY = TeacherHierarchy(["short", "long"], [Teacher("one", kind="column"), Teacher("two", 1, kind="column")])


class AnswerPool(TeacherPool):
    """What teachers wrote."""

    columns = ("answers", "seconds")

    def answers_of(self, name: str) -> list[str]:
        """Texts in the order of the pool."""
        written = list(self.teachers[name]["answers"])
        return [written[row] for row in self._orders.get(name, range(len(self)))]


def make_pool(names: tuple[str, ...] = ("one", "two")) -> AnswerPool:
    ids = ["a", "b", "c", "d"]
    one = {"id": ids, "answers": [f"one {key}" * 3 for key in ids], "seconds": [1.0, 2.0, 3.0, 4.0]}
    two = {"id": ids[::-1], "answers": [f"two {key}" for key in ids[::-1]], "seconds": [0.5] * 4}
    inputs = Dataset.from_dict({"id": ids, "text": ["w", "x", "y", "z"]})
    teachers = {"one": Dataset.from_dict(one), "two": Dataset.from_dict(two)}
    hierarchy = TeacherHierarchy(HIERARCHY.labels, [item for item in HIERARCHY.teachers if item.name in names])
    facts = {name: {"kind": "column", "tokens": 7} for name in names}
    return AnswerPool(hierarchy, teachers, inputs, facts, {"dataset": "someone/texts"}, input_column="text")


def assert_same(found: TeacherPool, expected: AnswerPool) -> None:
    assert isinstance(found, AnswerPool) and found.ids.tolist() == expected.ids.tolist()
    assert found.hierarchy == expected.hierarchy and found.facts == expected.facts
    assert found.source == expected.source and found.input_column == expected.input_column
    for name in expected.hierarchy.names:
        assert found.answers_of(name) == expected.answers_of(name)
        assert found.teachers[name]["seconds"][:] == expected.teachers[name]["seconds"][:]
    assert found.column("text") == expected.column("text")


def test_written_answers_are_saved_and_loaded(tmp_path: Path) -> None:
    pool = make_pool()
    assert pool.answers_of("two") == ["two a", "two b", "two c", "two d"]  # joined on `id`
    pool.save(tmp_path / "pool")
    loaded = AnswerPool.load(tmp_path / "pool", verify=True)
    assert_same(loaded, pool)
    header = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert "pool_k" not in header and set(header["files"]) == {
        *("inputs/data.arrow", "teachers/one/data.arrow", "teachers/two/data.arrow"),
    }
    loaded.save(tmp_path / "again")  # linked, not written
    for path in header["files"]:
        assert (tmp_path / "pool" / path).stat().st_ino == (tmp_path / "again" / path).stat().st_ino


def test_a_changed_answer_is_found(tmp_path: Path) -> None:
    make_pool().save(tmp_path / "pool")
    path = tmp_path / "pool" / "teachers" / "one" / "data.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"one aone a", b"one zone z"))
    assert path.stat().st_size == len(content) and path.read_bytes() != content
    with pytest.raises(ValueError, match="got other content than its digest tells"):
        AnswerPool.load(tmp_path / "pool", verify=True)


def test_some_answers(tmp_path: Path) -> None:
    part = make_pool().select([3, 1])
    assert isinstance(part, AnswerPool) and part.column("text") == ["z", "x"]
    assert part.answers_of("two") == ["two d", "two b"]
    part.save(tmp_path / "part")
    assert_same(AnswerPool.load(tmp_path / "part", verify=True), part)
    fewer = make_pool().with_hierarchy(make_pool(("one",)).hierarchy)
    assert isinstance(fewer, AnswerPool) and list(fewer.teachers) == ["one"]


def test_each_kind_of_pool_refuses_the_other(tmp_path: Path) -> None:
    pool = make_pool()
    with pytest.raises(ValueError, match=r"Answers of 'one' must have the columns id, answers and seconds, got no \["):
        AnswerPool(pool.hierarchy, {name: data.select_columns(["id"]) for name, data in pool.teachers.items()})
    pool.save(tmp_path / "pool")
    with pytest.raises(ValueError, match="Pseudolabels of 'one' must have the columns id, label_ids and label_probs"):
        PseudolabelPool.load(tmp_path / "pool")


def test_written_answers_on_the_hub(hub: HubServer) -> None:
    commit = make_pool().push_to_hub("someone/answers")
    loaded = AnswerPool.load("someone/answers", verify=True)
    assert_same(loaded, make_pool())
    assert (loaded.repo_id, loaded.commit) == ("someone/answers", commit.oid)
    with pytest.raises(ValueError, match=r"got one without \[\"teacher 'two'\"\]"):
        make_pool(("one",)).push_to_hub("someone/answers")
