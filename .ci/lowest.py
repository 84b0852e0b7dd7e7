"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `name>=x` becomes `name==x`."""

import re
import tomllib
from itertools import chain
from pathlib import Path

path = Path(__file__).resolve().parents[1] / "pyproject.toml"
project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for line in chain(project["dependencies"], *(extras[name] for name in extras if name != "dev")):
    if not line.startswith(project["name"]):
        print("{}=={}".format(*re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:,<[\w.]+)?", line).groups()))
