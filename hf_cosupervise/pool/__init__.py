"""Pseudolabels on disk and on the Hub: nothing else knows the names of their columns."""
