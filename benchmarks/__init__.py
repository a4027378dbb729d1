"""Benchmark programs, run as `python -m benchmarks.NAME`, and their dated results."""
