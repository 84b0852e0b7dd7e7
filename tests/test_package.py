"""What a user gets by `pip install` and by `import hf_cosupervise`."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import hf_cosupervise

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_cosupervise"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    assert hf_cosupervise.__version__ == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_is_light():
    heavy = {"torch", "transformers", "transformers.trainer", "datasets", "evaluate", "matplotlib", "timm", "peft"}
    code = f"import sys, hf_cosupervise; sys.exit(' '.join({heavy} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_upper_cap_on_torch():
    torch = [line for line in PROJECT["project"]["dependencies"] if re.match(r"torch(vision)?\b", line)]
    assert torch and not any("<" in line or "==" in line for line in torch)


def test_third_party_imports_are_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *extras["sklearn"], *extras["plots"]]
    declared = {re.split(r"[<>=~!\[ ]", line)[0].lower() for line in lines}
    modules = {"pil": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    names = set()
    for path in PACKAGE.rglob("*.py"):
        names |= set(re.findall(r"^\s*(?:import|from) ([A-Za-z_]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE))
    third_party = {name.lower() for name in names - sys.stdlib_module_names - {"hf_cosupervise"}}
    # tqdm comes with datasets and huggingface_hub, which are declared; scipy with the extra that its error names.
    assert {modules.get(name, name) for name in third_party} - declared <= {"scipy", "tqdm"}


def test_readme_is_short():
    assert len((ROOT / PROJECT["project"]["readme"]).read_text(encoding="utf-8").splitlines()) < 200
