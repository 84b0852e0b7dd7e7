"""Work in progress on disk: torn, damaged, foreign and locked."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from hf_cosupervise.files import check_free, explain_full_disk
from hf_cosupervise.teachers import progress as journal_module
from hf_cosupervise.teachers.progress import Progress

PLAN = {"pool_k": 2, "hierarchy": {"labels": ["a", "b"]}}


def make_journal(folder: Path, num_rows: int = 10) -> Progress:
    return Progress(folder, num_rows, 2, np.dtype(np.uint8))


def append(journal: Progress, *spans: tuple[int, int], name: str = "t") -> None:
    part = journal.start_part(name)
    for start, stop in spans:
        numbers = np.arange(start, stop)[:, None]
        part.append(start, np.hstack([numbers, numbers + 1]).astype(np.uint8), (numbers / [16, 32]).astype(np.float16))
    part.close()


def read(journal: Progress, name: str = "t") -> list[int]:
    return [row for ids, _ in journal.rows(journal.segments(name)) for row in ids[:, 0].tolist()]


def files(journal: Progress, suffix: str, name: str = "t") -> list[Path]:
    return sorted((journal.folder / "parts" / name).glob(f"*.{suffix}"))


def test_rows_come_back_in_order_from_any_number_of_parts(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    append(journal, (8, 10), (0, 3))
    append(journal, (3, 5))

    assert journal.missing("t") == [(5, 8)] and journal.missing("other") == [(0, 10)]
    append(journal, (5, 8))
    assert journal.missing("t") == [] and read(journal) == list(range(10))
    probs = np.concatenate([probs for _, probs in journal.rows(journal.segments("t"))])
    np.testing.assert_array_equal(probs, (np.arange(10)[:, None] / [16, 32]).astype(np.float16))


def test_what_is_known_of_a_batch_comes_back(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    part = journal.start_part("t")
    label_probs = np.array([[0.5, 0.25], [0, 0], [1, 0]], dtype=np.float16)
    part.append(4, np.zeros((3, 2), np.uint8), label_probs, failed_rows=[5], dropped=0.1)
    part.append(7, np.zeros((3, 2), np.uint8), label_probs * 0, failed_rows=range(7, 10))
    part.close()

    first, second = journal.segments("t")
    assert (first.start, first.stop, first.num_answered, first.num_failed, first.failed_rows) == (4, 7, 2, 1, (5,))
    assert first.dropped == 0.1 and second.failed_rows == (7, 8, 9) and second.num_answered == 0


def test_rows_labelled_twice_count_once(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    append(journal, (0, 6))
    append(journal, (4, 8), (0, 3))
    assert read(journal) == list(range(8)) and journal.missing("t") == [(8, 10)]


@pytest.mark.parametrize("cut", [1, 7])
def test_a_torn_line_does_not_count(tmp_path: Path, cut: int) -> None:
    journal = make_journal(tmp_path)
    append(journal, (0, 4), (4, 8))
    (path,) = files(journal, "journal")
    os.truncate(path, path.stat().st_size - cut)
    assert journal.missing("t") == [(4, 10)]


def test_torn_data_do_not_count(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    append(journal, (0, 4), (4, 8))
    (path,) = files(journal, "data")
    os.truncate(path, path.stat().st_size - 1)
    assert journal.missing("t") == [(4, 10)]


@pytest.mark.parametrize("suffix", ["data", "journal"])
def test_any_flipped_byte_costs_its_own_batch_only(tmp_path: Path, suffix: str) -> None:
    journal = make_journal(tmp_path)
    append(journal, (0, 4), (4, 8), (8, 10))
    (path,) = files(journal, suffix)
    whole = path.read_bytes()
    end = len(whole) if suffix == "data" else whole.rindex(b"\n", 0, -1)
    for position in range(0, end, 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        missing = journal.missing("t")
        # A line break that is gone takes the line after it along.
        assert missing in ([(0, 4)], [(4, 8)], [(8, 10)], [(0, 8)], [(4, 10)]), position
        assert set(read(journal)) == set(range(10)) - {row for gap in missing for row in range(*gap)}


def test_another_plan_is_refused_and_the_difference_is_shown(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    journal.open(PLAN)
    journal.add_facts({"t": {"commit": None, "weights": "12"}})
    journal.close()

    journal.open(json.loads(json.dumps(PLAN)))
    journal.add_facts({"t": {"commit": None, "weights": "12", "preprocessing": "ab"}})
    assert journal.facts == {"t": {"commit": None, "weights": "12", "preprocessing": "ab"}}
    with pytest.raises(ValueError) as error:
        journal.add_facts({"t": {"weights": "34"}})
    journal.close()
    advice = "Use the old settings to go on with it, or delete that folder to start afresh."
    assert str(error.value) == (
        f"'{tmp_path}' must hold the beginning of this pool, got that of another one "
        f'(t.weights: "12" -> "34"). {advice}'
    )
    other = make_journal(tmp_path)
    with pytest.raises(ValueError) as error:
        other.open({"pool_k": 3, "hierarchy": {"labels": ["a", "c"]}})
    other.close()
    assert str(error.value) == (
        f"'{tmp_path}' must hold the beginning of this pool, got that of another one "
        f'(hierarchy.labels[1]: "b" -> "c"; pool_k: 2 -> 3). {advice}'
    )


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = make_journal(tmp_path), make_journal(tmp_path)
    first.open(PLAN)
    with pytest.raises(RuntimeError) as error:
        second.open(PLAN)
    assert str(error.value) == (
        f"'{tmp_path}' must be worked on by one run at a time, got another run that is at it. Wait until it has "
        "ended, or stop it; this one can then go on from there."
    )
    first.close()
    second.open(PLAN)
    second.close()


def test_a_run_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        make_journal(tmp_path).open(PLAN)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    journal = make_journal(tmp_path)
    journal.open(PLAN)
    with pytest.raises(RuntimeError, match="got another run that is at it"):
        make_journal(tmp_path).open(PLAN)
    journal.close()


def test_a_disk_without_locks_is_worked_on_all_the_same(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    def refuse(lock: FileLock) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    journal = make_journal(tmp_path)
    with caplog.at_level(logging.INFO):
        journal.open(PLAN)
    assert f"'{tmp_path}' cannot be locked ([Errno 37] No locks available): use it by one run" in caplog.text
    append(journal, (0, 10))
    journal.close()
    assert make_journal(tmp_path).missing("t") == []


def test_writing_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: Any) -> None:
    real = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda file, data: real(file, bytes(data[:3])))
    journal = make_journal(tmp_path)
    append(journal, (0, 10))
    assert read(journal) == list(range(10))


def test_a_full_disk_is_explained_and_other_errors_are_not_touched(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, explain_full_disk(tmp_path, "Free some space.", 5_000_000):
        raise OSError(errno.ENOSPC, "No space left on device")
    text = str(error.value)
    assert error.value.errno == errno.ENOSPC and text.endswith("Free some space.")
    assert f"The disk of '{tmp_path}' must have room for about 5.0 MB in all, got it full (" in text
    with pytest.raises(FileNotFoundError, match="^nothing$"), explain_full_disk(tmp_path, "", 1):
        raise FileNotFoundError("nothing")


def test_only_an_empty_place_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "new", "Go.")
    check_free(tmp_path, "Go.")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="must not exist or be empty, got files there. Go."):
            check_free(path, "Go.")
