"""Processes that benchmarks start: one engine each, driven by the same job in the same way."""
