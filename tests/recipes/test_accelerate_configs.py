"""The files for `accelerate launch`: accelerate reads them, they say what they are for, and two processes are two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
KINDS = {
    "cpu": DistributedType.NO,
    "cpu_two": DistributedType.MULTI_GPU,
    "one_gpu": DistributedType.NO,
    "several_gpus": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}
SCRIPT = """
import os, sys
from pathlib import Path
from accelerate.utils import gather_object
from hf_cosupervise import CoSupervisedConfig

args = CoSupervisedConfig(output_dir=sys.argv[1])
ranks = gather_object([args.process_index])
Path(sys.argv[1], f"{args.process_index}.txt").write_text(f"{args.world_size} {args.device.type} {ranks}")
"""


def test_these_are_all():
    assert {path.stem for path in FILES} == set(KINDS)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    facts = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(facts, ClusterConfig) and facts.distributed_type == KINDS[path.stem]
    assert facts.use_cpu == path.stem.startswith("cpu")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launcher_takes_every_key(path):
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), "script.py"])
    args.nondefault = set()
    options = {action.dest for action in parser._actions}
    nested = [value for value in yaml.safe_load(path.read_text()).values() if isinstance(value, dict)]
    for values in nested:  # which accelerate passes on without a look
        assert set(values) <= options, set(values) - options
    taken, _, _ = _validate_launch_command(args)
    assert taken.num_processes == (1 if path.stem in ("cpu", "one_gpu") else 2 if path.stem == "cpu_two" else 8)
    assert taken.use_fsdp == (path.stem == "fsdp2") and taken.use_deepspeed == path.stem.startswith("deepspeed")
    for values in nested:
        assert all(getattr(taken, key) == value for key, value in values.items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("cpu", 1), ("cpu_two", 2)])
def test_as_many_processes_as_it_says(name, number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / f"{name}.yaml"]
    root = str(Path(__file__).parents[2])
    # No accelerator to be found, so that this is the same test everywhere.
    environment = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, script, folder], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_text() for path in folder.glob("*.txt")}
    ranks = list(range(number))
    assert found == {f"{rank}.txt": f"{number} cpu {ranks}" for rank in ranks}
