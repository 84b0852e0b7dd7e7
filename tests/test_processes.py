"""Several processes: what the first one does, all of them get, and its errors as well."""

from __future__ import annotations

import pytest
from accelerate import debug_launcher

from hf_cosupervise.processes import Processes, join_processes


def test_alone():
    processes = join_processes()
    assert processes == Processes(0, 1) and processes.on_first(lambda: 3) == 3
    processes.wait()
    with pytest.raises(KeyError):
        processes.on_first(lambda: {}["a"])


def _two(folder: str) -> None:
    processes = join_processes()
    assert processes.count == 2
    calls: list[int] = []

    def make() -> dict[str, int]:
        calls.append(processes.rank)
        return {"made by": processes.rank}

    def fail() -> None:
        raise FileNotFoundError(f"nothing here, says {processes.rank}")

    assert processes.on_first(make) == {"made by": 0}
    assert calls == [0] * (processes.rank == 0)
    processes.wait()
    with pytest.raises(FileNotFoundError, match="nothing here, says 0"):
        processes.on_first(fail)
    with open(f"{folder}/{processes.rank}", "x"):
        pass


def test_all_get_what_the_first_makes_or_its_error(tmp_path):
    debug_launcher(_two, (str(tmp_path),), num_processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
