"""Benchmarks: `python -m tools.bench NAME`. Each prints a table and, with --json, writes the figures."""
