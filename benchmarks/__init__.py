"""Benchmarks: `python -m benchmarks.decode`."""
