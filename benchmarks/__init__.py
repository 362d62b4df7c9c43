"""Measurements of mc-opt; each file is run as `python -m benchmarks.<name>` from the repository's root."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of ONNX Runtime, the peer of every timing
