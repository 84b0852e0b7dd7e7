"""Measure what the package promises about speed and memory, on the machine at hand.

    python recipes/benchmark.py                                            # every section but `scale`
    python recipes/benchmark.py --sections head gather --repeats 3
    python recipes/benchmark.py --sections scale                           # 1.28M x 15 x 1,000: many minutes
    python recipes/benchmark.py --scale 0.05 --repeats 1                   # a quick look, without targets

Seconds differ from machine to machine, ratios hardly: contestants take turns within each repeat, in one process, on
the same data. Everything is made from a seed, nothing is downloaded. Prints a Markdown table and writes a JSON file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.answers import measure_answers
from benchmarks.finetune import measure_finetune
from benchmarks.head import measure_head, measure_head_1000, measure_truncation
from benchmarks.labelling import measure_labelling
from benchmarks.scale import measure_gather, measure_growth, measure_scale
from benchmarks.task import RECIPES, Bench, BenchmarkArguments, Row, Target, column, quieten

from hf_cosupervise.arguments import parse_recipe_args, recipe_arguments_to_dict
from hf_cosupervise.files import make_output_dir, write_text

# ── section `imports` ───────────────────────────────────────────────────────────────────────────────────────────────


def measure_imports(bench: Bench) -> list[Row]:
    """Measure what the package adds to the imports that a user has anyway, in fresh processes."""
    commands = {
        "plain": ["-c", "import torch, transformers"],
        "ours": ["-c", "import torch, transformers, hf_cosupervise"],
        "arguments": ["-c", "from transformers import TrainingArguments"],
        "help": [str(RECIPES / "train.py"), "--help"],
    }
    contestants = {name: lambda command=command: run_python(command) for name, command in commands.items()}
    bench.race(contestants, 0)  # the first ones find cold files
    seconds = [bench.race(contestants, repeat)[0] for repeat in range(bench.args.repeats)]
    best = {name: min(column(seconds, name)) for name in commands}
    note = "best of the repeats, fresh processes"
    return [
        Row(
            "`import hf_cosupervise` after torch and transformers",
            [best["ours"]],
            [best["plain"]],
            "ours - other",
            Target(high=0.3),
            note=note,
        ),
        Row(
            "`recipes/train.py --help` beyond `TrainingArguments`",
            [best["help"]],
            [best["arguments"]],
            "ours - other",
            Target(high=1.0),
            note=note,
        ),
    ]


def run_python(arguments: Sequence[str]) -> None:
    """Run a command in a fresh Python, and fail where it fails."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Section:
    """What can be measured: by which function, and on a GPU too or not."""

    measure: Callable[[Bench], list[Row]]
    on_gpu: bool = False


SECTIONS = {
    "head": Section(measure_head, on_gpu=True),
    "head_1000": Section(measure_head_1000, on_gpu=True),
    "labelling": Section(measure_labelling, on_gpu=True),
    "answers": Section(measure_answers, on_gpu=True),
    "finetune": Section(measure_finetune, on_gpu=True),
    "gather": Section(measure_gather),
    "growth": Section(measure_growth),
    "scale": Section(measure_scale),
    "imports": Section(measure_imports),
    "truncation": Section(measure_truncation),
}


def describe_machine(threads: int) -> dict[str, Any]:
    """Say where the numbers come from."""
    packages = ("hf_cosupervise", "torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow")
    has_pages = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if has_pages else None
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gb": None if memory is None else round(memory, 1),
        # Others at work spoil the ratios: a thread that waits for a core holds up all of its team.
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def cpu_name() -> str:
    """Name the processor, as well as the system can."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run_section(name: str, args: BenchmarkArguments, device: torch.device) -> list[dict[str, Any]]:
    """Measure one section in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=args.work_dir, ignore_cleanup_errors=True) as folder:
        rows = SECTIONS[name].measure(Bench(args, device, Path(folder)))
    # Targets are ratios of this size on a CPU; elsewhere there are numbers only.
    with_target = args.scale == 1 and device.type == "cpu"
    return [{"section": name, "device": device.type, **row.to_dict(with_target)} for row in rows]


def write_json(content: Any, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def format_number(value: float) -> str:
    """Write a number so that three digits of it can be read."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(digits, 5))}f}"


def format_spread(numbers: Mapping[str, float] | None, unit: str = "") -> str:
    """Write the median and, where they differ, the least and the largest."""
    if numbers is None:
        return ""
    text = format_number(numbers["median"])
    if numbers["min"] < numbers["max"]:
        text += f" ({format_number(numbers['min'])} … {format_number(numbers['max'])})"
    return f"{text} {unit}".rstrip()


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the table in Markdown."""
    lines = ["| section | what | ours | other | ratio | to reach | note |", "| --- " * 7 + "|"]
    for row in rows:
        reach = "" if row["target"] is None else f"{row['target']} {'✓' if row['met'] else '✗'}"
        ratio = "" if row["comparison"] == "ours" else f"{format_spread(row['ratio'])} ({row['comparison']})"
        more = "; ".join(f"{name} {format_number(value)}" for name, value in row["numbers"].items())
        section = row["section"] if row["device"] == "cpu" else f"{row['section']}, {row['device']}"
        cells = [
            section,
            row["name"],
            format_spread(row["ours"], row["unit"]),
            format_spread(row["other"], row["unit"]),
            ratio,
            reach,
            "; ".join(part for part in (row["note"], more) if part),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections, print the table, write the file after each section."""
    (args,) = parse_recipe_args([BenchmarkArguments], argv)
    if args.work_dir is not None:
        make_output_dir(Path(args.work_dir), "work_dir")
    threads_before = torch.get_num_threads()
    quieten(args.threads)
    gpus = [torch.device("cuda")] if torch.cuda.is_available() else []
    machine, rows = describe_machine(args.threads), []
    for name in args.sections:
        for device in [torch.device("cpu"), *(gpus if SECTIONS[name].on_gpu else [])]:
            started = time.time()
            rows += run_section(name, args, device)
            print(f"{name} on {device.type}: {time.time() - started:.0f} s", flush=True)
            facts = {"machine": machine, "arguments": recipe_arguments_to_dict([args]), "rows": rows}
            write_json(facts, Path(args.output_file))
    torch.set_num_threads(threads_before)
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None and key != "versions")
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    print(f"\n{format_rows(rows)}\n\n{where}; {versions}")
    print(f"Median (least … largest) of {args.repeats} repeats; scale {args.scale:g}. Numbers: {args.output_file}")


if __name__ == "__main__":
    main()
