"""Run recipes/train.py again and again, each time in a fork that is killed somewhere, until it ends by itself.

    python tests/killing.py FOLDER SEED NUM_KILLS ARGUMENT...

The parent has only imported, so that a fork begins at once. Kills come by a clock, around a rename, or at a step of
the head, by SIGKILL or SIGTERM. A run that ends is kept, and the next one begins in a folder of its own. Prints a
line of JSON: kills by kind, the folders of finished runs, and stages that ran again although they had been finished.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import experiment  # noqa: E402
import matplotlib.backends.backend_agg  # noqa: E402, F401  # every run that ends draws its report
import mpl_toolkits.mplot3d  # noqa: E402, F401  # as matplotlib does when it first draws
import prepare  # noqa: E402, F401
import pretrain  # noqa: E402
import task  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402
import train_teachers  # noqa: E402
import transformers.models.convnext.modeling_convnext  # noqa: E402, F401  # the student, and its teachers below
import transformers.models.resnet.modeling_resnet  # noqa: E402, F401
import transformers.models.vit.image_processing_vit  # noqa: E402, F401

from hf_cosupervise import CoSupervisedTrainer  # noqa: E402
from hf_cosupervise.training.head_fitter import HeadFitter  # noqa: E402

KINDS = ("clock", "rename", "head")


def die(how: int) -> None:
    """End this process as a crash would: SIGTERM, which nothing here catches, ends it as abruptly as SIGKILL."""
    os.kill(os.getpid(), how)
    time.sleep(60)


def around(function: Callable, *, before: Callable | None = None, after: Callable | None = None) -> Callable:
    def wrapped(*args, **kwargs):
        if before is not None:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    return wrapped


def watch_stages(journal: Path) -> None:
    """Write down when a stage begins to be worked on and when it is finished."""

    def tell(what: str, key: str) -> None:
        with journal.open("a") as file:
            file.write(f"{what} {key}\n")

    def level(trainer, plan, *args) -> str:
        return f"{trainer.args.output_dir} level {plan.level} round {plan.round}"

    def told(what: str, key: Callable) -> Callable:
        return lambda *args, **kwargs: tell(what, key(*args, **kwargs))

    train_teachers._train_all = around(train_teachers._train_all, before=told("begin", lambda *a: "teachers"))
    experiment.train_teachers = around(train_teachers.train_teachers, after=told("end", lambda *a: "teachers"))
    pretrain.vicreg = around(pretrain.vicreg, before=told("begin", lambda *a, **k: "student"))
    pretrain.vicreg.__module__ = "pretrain"
    experiment.find_student = around(task.find_student, after=told("end", lambda *a: "student"))
    key = told("begin", lambda *args, output_dir, **kwargs: f"pool {output_dir}")
    task.build_pool = around(
        task.build_pool, before=key, after=told("end", lambda *args, output_dir, **kwargs: f"pool {output_dir}")
    )
    CoSupervisedTrainer.train_level = around(CoSupervisedTrainer.train_level, before=told("begin", level))
    CoSupervisedTrainer.finish_level = around(CoSupervisedTrainer.finish_level, after=told("end", level))


def plan_death(kind: str, generator: random.Random) -> None:
    """Have this process killed at some point."""
    how = generator.choice([signal.SIGKILL, signal.SIGTERM])
    if kind == "clock":
        threading.Timer(generator.uniform(0.05, 1.5), die, [how]).start()
        return
    number, is_before, seen = generator.randrange(1, 13 if kind == "rename" else 250), generator.random() < 0.5, [0]

    def count(*args, **kwargs) -> None:
        seen[0] += 1
        if seen[0] == number:
            die(how)

    side = {"before" if is_before else "after": count}
    if kind == "rename":
        os.replace = around(os.replace, **side)
    else:
        HeadFitter._after_step = around(HeadFitter._after_step, **side)


def run(folder: Path, arguments: list[str], kind: str | None, generator: random.Random) -> int:
    """Run the recipe in a fork; gives its exit code, below 0 where a signal ended it."""
    sys.stdout.flush()
    seed, child = generator.random(), os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            watch_stages(folder / "stages.txt")
            if kind is not None:
                plan_death(kind, random.Random(seed))
            sys.argv = ["train.py", *arguments]
            train.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def repeated_stages(folder: Path) -> list[str]:
    finished, repeated = set(), []
    for line in (folder / "stages.txt").read_text().splitlines():
        what, _, key = line.partition(" ")
        if what == "end":
            finished.add(key)
        elif key in finished:
            repeated.append(key)
    return repeated


def main() -> None:
    place, seed, num_kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    generator, kills, folders, repeated = random.Random(seed), dict.fromkeys(KINDS, 0), [], []
    while True:
        folder = place / f"run-{len(folders)}"
        folder.mkdir(parents=True)
        shutil.copytree(place / "data", folder / "data")  # made once, by whoever calls this
        while True:
            kind = KINDS[sum(kills.values()) % 3] if sum(kills.values()) < num_kills else None
            code = run(folder, arguments, kind, generator)
            if code == 0:
                break
            if code > 0 or kind is None:
                sys.exit(f"The recipe failed with {code} after {kills}:\n{(folder / 'log.txt').read_text()[-5000:]}")
            kills[kind] += 1
        folders.append(str(folder))
        repeated += repeated_stages(folder)
        if sum(kills.values()) >= num_kills:
            break
    print(json.dumps({"kills": kills, "folders": folders, "repeated": repeated}))


if __name__ == "__main__":
    main()
