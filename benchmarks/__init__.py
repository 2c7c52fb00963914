"""Measurements of the library's own cost, run from a checkout: ``python -m benchmarks.<name>``."""
