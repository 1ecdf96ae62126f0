"""Benchmarks, each a command: `python -m benchmarks.cpu`, `.cuda`, `.capture`, `.scaling`, `.plot`."""
