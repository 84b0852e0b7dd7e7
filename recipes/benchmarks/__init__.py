"""Sections of `benchmark.py`."""
