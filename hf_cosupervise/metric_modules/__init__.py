"""Metrics as modules of `evaluate`, each a folder that `evaluate.load` takes by path."""

from __future__ import annotations

from pathlib import Path

# Never loaded by a Hub id: `evaluate.load` runs whatever code it downloads.
performance_gap_recovered_dir = str(Path(__file__).parent / "performance_gap_recovered")
