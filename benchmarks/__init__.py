"""Measurements of mc-opt; each file is run as `python -m benchmarks.<name>` from the repository's root."""
