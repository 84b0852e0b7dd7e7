"""Functions as teachers: what they may answer, how they are known, and every answer that is none."""

from __future__ import annotations

import copy
import linecache
import multiprocessing
import pickle
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from datasets import ClassLabel, Dataset

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool, labeling_function

pytestmark = pytest.mark.core

LABELS = ("ham", "spam")
WORDS = ["free", "win"]
SPAM = 1
LINK = re.compile("http")


def says_free(row: dict[str, Any]) -> str | None:
    return "spam" if "free" in row["text"] else None


def has_link(row: dict[str, Any]) -> int:
    return SPAM if LINK.search(row["text"]) else -1


@labeling_function(name="is-short", version="3", batched=True)
def is_short(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[0.75, 0.25] if len(row["text"]) < 12 else [0.0, 0.0] for row in rows])


@labeling_function(batched=True)
def counts(rows: list[dict[str, Any]]) -> list[Any]:
    return [{"Spam": 0.25, "good": 0.75} if len(row["text"]) < 12 else None for row in rows]


def make_data() -> Dataset:
    texts = ["free money", "see http://x.y", "lunch at noon?", "win a free car http://z", "hi"]
    return Dataset.from_dict({"id": [3, 1, 4, 15, 9], "text": texts, "sender": ["a", "b", "b", "a", None]})


def label_with(*functions: Any, **options: Any) -> PseudolabelPool:
    return build_pool(make_data(), TeacherHierarchy(LABELS, list(functions)), disable_tqdm=True, **options)


def answer(value: Any) -> Callable[[Any], Any]:
    """A function that gives one and the same answer."""
    return labeling_function(lambda row: value, name="f", version="1")


# ── what a function may say ─────────────────────────────────────────────────────────────────────────────────────────


def test_functions_label_as_easily_as_columns():
    pool = label_with(says_free, has_link, is_short, Teacher(counts, level=1, label_map={"good": "ham"}))

    assert pool.hierarchy.names == ("says_free", "has_link", "is-short", "counts")
    assert [teacher.level for teacher in pool.hierarchy.teachers] == [0, 0, 0, 1]
    np.testing.assert_array_equal(pool.decode("says_free"), [[0, 1], [0, 0], [0, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(pool.decode("has_link"), [[0, 0], [0, 1], [0, 0], [0, 1], [0, 0]])
    expected = [[0.75, 0.25], [0, 0], [0, 0], [0, 0], [0.75, 0.25]]
    np.testing.assert_array_equal(pool.decode("counts"), expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("SPAM", [0, 1]),
        (np.str_("ham"), [1, 0]),
        (np.int64(1), [0, 1]),
        (np.array(0), [1, 0]),
        ((0.5, 0.5), [0.5, 0.5]),
        (np.array([0.25, 0.75], dtype=np.float16), [0.25, 0.75]),
        ({"spam": 1}, [0, 1]),
        ({"ham": np.float64(0.5), "spam": 0.5}, [0.5, 0.5]),
        ({"ham": torch.tensor(0.25), "spam": Decimal("0.75")}, [0.25, 0.75]),
        ({"ham": np.array(1.0), "spam": 0}, [1, 0]),
        (None, [0, 0]),
        (-1, [0, 0]),
    ],
)
def test_answers_as_they_come(value, expected):
    np.testing.assert_allclose(label_with(answer(value)).decode("f"), [expected] * 5)


def test_labels_of_a_function_may_be_left_out_or_spread():
    def shares(row: dict[str, Any]) -> Any:
        return {3: {"ham": 0.5, "other": 0.5}, 1: "other", 4: "either", 15: {"other": 0.75, "either": 0.25}}.get(
            row["id"]
        )

    function = labeling_function(shares, version="1")
    label_map = {"other": None, "either": ["ham", "spam"]}
    pool = label_with(Teacher(function, label_map=label_map))
    expected = [[1, 0], [0, 0], [0.5, 0.5], [0.5, 0.5], [0, 0]]
    np.testing.assert_allclose(pool.decode("shares"), expected)
    few = Teacher(function, label_map={"either": ["ham", "spam"]}, max_outside_mass=0.6)
    np.testing.assert_allclose(label_with(few).decode("shares")[[0, 1, 3]], [[1, 0], [0, 0], [0, 0]])
    with pytest.raises(
        ValueError, match="Function 'shares' must give a label .* got {'ham': 0.5, 'other': 0.5} in row 0"
    ):
        label_with(function)


def test_a_number_in_words_is_a_name_to_functions():
    def pool_of(**fields: Any) -> PseudolabelPool:
        teacher = Teacher(labeling_function(lambda row: row["text"], name="f"), **fields)
        data = Dataset.from_dict({"id": [0, 1], "text": ["8", "1"]})
        return build_pool(data, TeacherHierarchy(["3", "5", "8"], [teacher]), disable_tqdm=True)

    with pytest.raises(ValueError, match=r"must give a label of the task .* got '1' in row 1"):
        pool_of()
    np.testing.assert_array_equal(pool_of(max_outside_mass=0.5).decode("f"), [[0, 0, 1], [0, 0, 0]])


def test_a_function_may_change_its_row():
    def change(row: dict[str, Any]) -> None:
        row["text"] = "free"

    np.testing.assert_array_equal(
        label_with(change, says_free).decode("says_free"), label_with(says_free).decode("says_free")
    )


def test_a_teacher_without_answers_is_told_of(caplog):
    pool = label_with(labeling_function(lambda row: None, name="silent"), says_free)
    assert not pool.answered("silent").any()
    assert [record.message for record in caplog.records] == [
        "Teacher 'silent' has no answer for any of 5 rows, and tells nothing of them. Correct it, or leave it out."
    ]


def test_a_function_sees_a_row_but_not_the_ground_truth():
    seen = []

    def look(row: dict[str, Any]) -> None:
        seen.append(row)

    data = make_data().add_column("truth", [0, 1, 0, 1, 0], feature=ClassLabel(names=list(LABELS)))
    teacher = Teacher(labeling_function(look, version="1"))
    build_pool(data, TeacherHierarchy(LABELS, [teacher]), oracle_column="truth", disable_tqdm=True)
    assert seen == make_data().to_list()


def test_images_are_decoded_for_functions_too(tiny_image_dataset):
    data = tiny_image_dataset.remove_columns("label").select(range(6))
    redness = labeling_function(lambda row: int(np.asarray(row["image"])[..., 0].mean() > 100), name="red")
    pool = build_pool(data, TeacherHierarchy(LABELS, [redness]), disable_tqdm=True)
    expected = [int(np.asarray(image)[..., 0].mean() > 100) for image in data["image"]]
    assert 0 < sum(expected) < 6 and pool.hard_labels("red").tolist() == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_functions_beside_models_label_as_alone(tiny_bert, tiny_text_dataset, tiny_labels, num_workers):
    data = tiny_text_dataset.remove_columns("label")
    barks = labeling_function(lambda row: "dog" if "barks" in row["text"] else None, name="barks")
    both = TeacherHierarchy(tiny_labels, [Teacher(tiny_bert), barks])
    pool = build_pool(data, both, batch_size=7, num_workers=num_workers, disable_tqdm=True)
    alone = build_pool(data, TeacherHierarchy(tiny_labels, [barks]), disable_tqdm=True)
    np.testing.assert_array_equal(pool.decode("barks"), alone.decode("barks"))
    assert pool.facts["barks"]["kind"] == "function" and pool.answered("bert").all()


# ── what is no answer ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    ["eggs", "1", 2, -2, True, 1.5, float("inf"), [1.0], [0.2, 0.3, 0.5], [0.5, float("nan")], [1.5, -0.5], [0.5, 0.1]]
    + [{"eggs": 1.0}, {"spam": 0.5}, {"spam": float("nan")}, {0: 1.0}, {"spam": "much"}, object, b"spam"],
)
def test_what_is_no_answer_names_the_row(value):
    def odd(row: dict[str, Any]) -> Any:
        return value if row["id"] == 4 else "ham"

    function = labeling_function(odd, version="1")
    message = (
        r"Function 'odd' must give a label of the task \(\['ham', 'spam'\]; .* NaN, -1 or -100 for no answer; got "
        + re.escape(repr(value))
        + r" in row 2 \(id 4\) for teacher 'odd'\. Fix or drop"
    )
    with pytest.raises(ValueError, match=message):
        label_with(function)
    pool = label_with(function, on_error="missing")
    assert pool.answered("odd").tolist() == [True, True, False, True, True] and pool.facts["odd"]["num_failed"] == 1


@pytest.mark.parametrize(
    "value",
    [1.0, 0.0, np.float32(1), np.float64(0), Decimal(1), np.int8(1), np.array(1.0), float("nan"), np.float32("nan")]
    + [None, -1, -100, -1.0, np.float64(-100)],
)
def test_a_function_reads_numbers_as_a_column_does(value):
    function = labeling_function(lambda row: value, name="says", version="1")
    cell = value.item() if isinstance(value, np.ndarray | np.generic) else None if value is None else float(value)
    data = Dataset.from_dict({"id": [0], "text": ["a"], "said": [cell]})
    column = Teacher("said", kind="column")
    pool = build_pool(data, TeacherHierarchy(["ham", "spam"], [Teacher(function), column]), disable_tqdm=True)
    np.testing.assert_array_equal(pool.decode("says"), pool.decode("said"))
    assert pool.answered("says")[0] == (value in (0, 1))


@pytest.mark.parametrize("batched", [False, True])
def test_an_exception_names_row_and_function(batched):
    def starts(rows: Any) -> Any:
        return [int(row["sender"][0] == "a") for row in rows] if batched else int(rows["sender"][0] == "a")

    function = labeling_function(starts, version="1", batched=batched)
    message = "Function 'starts' must answer every row, got TypeError: .*not subscriptable in row 4 .id 9. for teacher"
    with pytest.raises(ValueError, match=message) as caught:
        label_with(function)
    assert isinstance(caught.value.__cause__.__cause__, TypeError)
    pool = label_with(function, on_error="missing")
    assert pool.hard_labels("starts").tolist() == [1, 0, 0, 1, -1]


def test_a_function_of_rows_gives_as_many_answers():
    few = labeling_function(lambda rows: ["ham"], name="few", batched=True)
    with pytest.raises(ValueError, match="Function 'few' must give a list of as many answers.*5, got 1 answers"):
        label_with(few)
    one = labeling_function(lambda rows: "ham", name="one", batched=True)
    with pytest.raises(ValueError, match="Function 'one' must give .* got 'ham'. Correct it"):
        label_with(one)


def test_memory_that_runs_out_is_no_fault_of_a_row():
    def greedy(row: dict[str, Any]) -> None:
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="teacher 'greedy' must fit into memory"):
        label_with(greedy, on_error="missing")


# ── how a function is known ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_function_is_a_name_and_a_version(tmp_path):
    teacher = Teacher(says_free, level=1)
    assert (teacher.kind, teacher.name, teacher.model, teacher.level) == ("function", "says_free", "says_free", 1)
    assert re.fullmatch("[0-9a-f]{16}", str(teacher.revision)) and not teacher.has_files
    assert Teacher(is_short).revision.startswith("3+")
    assert teacher == Teacher(says_free, level=1) and hash(teacher) == hash(Teacher(says_free, level=1))
    assert copy.deepcopy(teacher).function is teacher.function and pickle.loads(pickle.dumps(teacher)).function is None
    assert set(teacher.to_dict()) == {"model", "level", "name", "kind", "revision"}
    hierarchy = TeacherHierarchy(LABELS, [says_free, is_short])
    hierarchy.save(tmp_path / "hierarchy.yaml")
    loaded = TeacherHierarchy.load(tmp_path / "hierarchy.yaml")
    assert loaded == hierarchy
    with pytest.raises(ValueError, match="'says_free' must be given its function, .*Pass it by `models="):
        build_pool(make_data(), loaded, disable_tqdm=True)
    pool = build_pool(make_data(), loaded, models={"says_free": says_free, "is-short": is_short}, disable_tqdm=True)
    np.testing.assert_array_equal(pool.decode("says_free"), label_with(says_free).decode("says_free"))
    with pytest.raises(ValueError, match=r"`models\['says_free'\]` must be the function .* of version '.*', got"):
        build_pool(make_data(), loaded, models={"says_free": has_link, "is-short": is_short})


def test_a_pool_keeps_answers_and_no_code(tmp_path):
    pool = label_with(says_free, output_dir=tmp_path / "pool")
    loaded = PseudolabelPool.load(tmp_path / "pool")
    np.testing.assert_array_equal(loaded.decode("says_free"), pool.decode("says_free"))
    assert loaded.hierarchy.teachers[0].function is None and loaded.facts["says_free"]["class"] == "function"
    held = b"".join(path.read_bytes() for path in (tmp_path / "pool").rglob("*") if path.is_file())
    assert b"says_free" in held and b'"free" in row' not in held
    # Whoever has the answers needs no function.
    again = build_pool(make_data(), loaded.hierarchy, reuse=loaded, disable_tqdm=True)
    np.testing.assert_array_equal(again.decode("says_free"), pool.decode("says_free"))


def test_another_version_is_labelled_anew():
    calls = []

    def make(version: str) -> Any:
        return labeling_function(lambda row: calls.append(row["id"]), name="f", version=version)

    pool = label_with(make("1"))
    label_with(make("1"), reuse=pool)
    assert len(calls) == 5
    label_with(make("2"), reuse=pool)
    assert len(calls) == 10


def test_work_is_not_continued_by_another_function(tmp_path):
    bad = [9]

    def make(version: str) -> Any:
        return labeling_function(lambda row: "eggs" if row["id"] in bad else 0, name="f", version=version)

    with pytest.raises(ValueError, match="in row 4"):
        label_with(make("1"), output_dir=tmp_path / "pool", batch_size=1)
    bad.clear()
    with pytest.raises(ValueError, match=r"another one \(hierarchy.teachers\[0\].revision: "):
        label_with(make("2"), output_dir=tmp_path / "pool", batch_size=1)
    assert label_with(make("1"), output_dir=tmp_path / "pool", batch_size=1).hard_labels("f").tolist() == [0] * 5


def make_version(source: str, **around: Any) -> str:
    """Version of the function `f` in a piece of source that can be looked up, as that of a module can."""
    import linecache

    name = f"<{len(linecache.cache)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = dict(around)
    exec(compile(source, name, "exec"), names)
    return Teacher(names["f"]).revision or ""


def test_what_changes_the_version():
    plain = "def f(row):\n    return LIMIT < len(row['text'])\n"
    calling = "def g(text):\n    return len(text) > 3\ndef f(row):\n    return g(row['text'])\n"
    inner = "def f(row):\n    return [x for x in row['text'] if x in LIMIT]\n"
    versions = [
        make_version(plain, LIMIT=3),
        make_version(plain, LIMIT=4),
        make_version(plain.replace("<", "<="), LIMIT=3),
        make_version(calling),
        make_version(calling.replace("3", "4")),
        make_version(inner, LIMIT=("a", "b")),
        make_version(inner, LIMIT=("a", "c")),
        make_version(inner, LIMIT=re.compile("a")),
        make_version("def f(row, limit=3):\n    return limit\n"),
    ]
    assert len(set(versions)) == len(versions)
    assert make_version(plain, LIMIT=3) == versions[0] and make_version(inner, LIMIT=("a", "b")) == versions[5]
    some = (lambda row: "ham", lambda row: "spam", lambda row: 1, lambda row: 2)
    assert len({labeling_function(function, name="f").version for function in some}) == len(some)


def test_what_may_change_needs_a_version(monkeypatch):
    def by_words(row: dict[str, Any]) -> int:
        return int(any(word in row["text"] for word in WORDS))

    def inside(row: dict[str, Any]) -> list[int]:
        return [len(WORDS) for _ in row]

    words = {"free"}

    def closing(row: dict[str, Any]) -> int:
        return int(row["text"] in words)

    def by_default(row: dict[str, Any], words: list[str] = WORDS) -> int:
        return len(words)

    def by_caller(row: dict[str, Any]) -> int:
        return by_words(row)

    for function, what in [
        (by_words, r"global 'WORDS' \(list\)"),
        (inside, r"global 'WORDS' \(list\)"),
        (closing, r"variable 'words' \(set\)"),
        (by_default, r"a default of 'by_default' \(list\)"),
        (by_caller, r"global 'WORDS' \(list\)"),
    ]:
        with pytest.raises(ValueError, match=f"'{function.__name__}' must say its `version`.*{what}.*Write"):
            Teacher(function)
        assert Teacher(labeling_function(function, version="7")).revision.startswith("7+")
    # `python -c` leaves its own source under the name that all that `exec` makes has, from Python 3.13 on.
    monkeypatch.setitem(linecache.cache, "<string>", (9, None, ["import somebody\n"], "<string>"))
    names: dict[str, Any] = {}
    exec("def f(row):\n    return 0\n", names)
    for function, name in ((names["f"], "f"), (len, "len"), (Teacher(says_free).__eq__, "__eq__")):
        with pytest.raises(ValueError, match=f"Labeling function '{name}' must say its `version`"):
            labeling_function(function)
    assert labeling_function(names["f"], version="1").version == "1"


def test_what_is_no_labeling_function():
    with pytest.raises(
        ValueError, match="must have a name, got a function without. Give .*labeling_function.function, name="
    ):
        TeacherHierarchy(LABELS, [lambda row: "ham"])
    with pytest.raises(ValueError, match="a Linear without. .*A model is no function of a row: name its folder"):
        Teacher(torch.nn.Linear(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`kind` of teacher 'says_free' must be 'function' .*, got 'column'. Leave"):
        Teacher(says_free, kind="column")
    with pytest.raises(ValueError, match="got its name 'says' only. Pass it by `models="):
        label_with(Teacher("says", kind="function"))
    with pytest.raises(TypeError, match="`labeling_function` must be given a function of a row, got '2'"):
        labeling_function("2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`version` of a labeling function must be a text, got 2. Put it in quotes"):
        labeling_function(says_free, version=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A teacher's `name` must be letters"):
        Teacher(says_free, name="says free")


# ── in several processes ────────────────────────────────────────────────────────────────────────────────────────────


def _label_in_process(folder: Path, number: int, **options: Any) -> PseudolabelPool:
    """Label by functions of which one closes over something, and cannot be sent to another process."""
    closing = labeling_function(lambda row: SPAM if len(row["text"]) > number else None, name="long", version="1")
    return label_with(says_free, is_short, closing, output_dir=folder, batch_size=1, **options)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_label_as_one_does(tmp_path):
    pool = _label_in_process(tmp_path / "one", 12)
    assert pool.hard_labels("long").tolist() == [-1, 1, 1, 1, -1]
    debug_launcher(_label_in_process, (tmp_path / "two", 12), num_processes=2)
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_rows_and_are_sent_no_function(method, tmp_path):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        _label_in_process(tmp_path / "workers", 12, num_workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    _label_in_process(tmp_path / "one", 12)
    assert _files(tmp_path / "workers") == _files(tmp_path / "one")


def test_a_function_without_a_name_takes_its_teachers():
    teacher = Teacher(lambda row: "spam" if "free" in row["text"] else None, name="free")
    assert (teacher.name, teacher.model) == ("free", "free")
    assert label_with(teacher).hard_labels("free").tolist() == label_with(says_free).hard_labels("says_free").tolist()
