"""The history of the levels, kept on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import load_json, without_nan


class LevelHistory:
    """Keep what a run was made of, and the numbers of every finished level, in one JSON file."""

    def __init__(self, path: str | os.PathLike[str], run: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.run: dict[str, Any] = dict(run or {})
        self.records: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any]:
        """Read the records of an earlier run, none where there is no file."""
        content = load_json(self.path) if self.path.is_file() else {}
        content = {"levels": content} if isinstance(content, list) else content  # of a version before 0.2
        self.records = content.get("levels", [])
        return content.get("run", {})

    def clear(self) -> None:
        """Forget all records, on disk too."""
        self.records = []
        self.path.unlink(missing_ok=True)

    def to_json(self) -> str:
        """Give the content of the file."""
        # Without NaN, which is no JSON to most readers.
        return json.dumps(without_nan({"run": self.run, "levels": self.records}), indent=2) + "\n"
