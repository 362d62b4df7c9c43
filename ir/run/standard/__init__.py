"""What the standard ONNX ops mean in torch: one file a family of ops.

A family file has `HANDLERS` (op type -> function of the input tensors and the attributes as keywords, returning one
tensor) or `MULTIPLE` (the same, returning a tuple). A missing optional input is None.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

Table = dict[str, Callable[..., Any]]

_HOMES = {
    "attention.py": ("Attention", "RotaryEmbedding", "FlexAttention"),
    "control.py": ("Loop", "Scan"),
    "conv.py": ("Deform", "Global", "Lp", "Max", "Col2Im"),
    "image.py": ("Affine", "CenterCrop", "Grid", "Image", "NonMax", "Roi", "Upsample"),
    "quant.py": ("QLinear",),
    "random.py": ("Bernoulli", "Multinomial", "Random"),
    "reduce.py": ("Reduce",),
    "sequence.py": ("ConcatFromSequence", "Optional", "Sequence", "SplitToSequence"),
    "signal.py": ("Blackman", "DFT", "Hamming", "Hann", "MelWeight", "STFT"),
    "indexing.py": ("Scatter", "TensorScatter", "Unique"),
    "text.py": ("Regex", "String", "TfIdf"),
}


@functools.cache
def tables() -> tuple[Table, Table]:
    """Every family's HANDLERS and MULTIPLE, merged."""
    single: Table = {}
    multiple: Table = {}
    for module in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module.name}")
        single |= getattr(family, "HANDLERS", {})
        multiple |= getattr(family, "MULTIPLE", {})
    return single, multiple


def home(domain: str, op_type: str) -> str:
    """The file in which an op that has no meaning yet would get one."""
    if domain not in ("", "ai.onnx"):
        return f"ir/run/standard/{domain.rpartition('.')[2]}.py"
    file = next((f for f, prefixes in _HOMES.items() if op_type.startswith(prefixes)), "elementwise.py")
    return f"ir/run/standard/{file}"
