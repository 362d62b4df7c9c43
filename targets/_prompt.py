"""The two functions of a language model's artefact: a step of one token, and one that takes many tokens of a prompt.

Both share their constants. What reads a prompt fills the caches and computes no logits: those of the last token are all
that anybody asks for, and it goes through the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mc_opt import ir

if TYPE_CHECKING:  # a process that only runs an artefact reads no model
    import onnx_ir

NAME = "prompt"
IDS, POSITION = "input_ids", "position"

_CHUNK = 32
# Reading a chunk takes as long as some steps; fewer tokens than this share of it are faster one by one.
_SHARE = 4


def chunk_of(model: onnx_ir.Model) -> int:
    """How many tokens at once a model's artefact shall read; 0 unless it is a language model of any length.

    That is one as `ir.capture_causal_lm` makes it: token ids [1, length], the position of the first, caches of a fixed
    size [1, heads, room, size] as states.
    """
    states = ir.states_of(model)
    inputs = {str(v.name): v.shape for v in model.graph.inputs}
    if not states or set(inputs) != {IDS, POSITION, *states.values()}:
        return 0
    ids = inputs[IDS]
    if ids is None or len(ids) != 2 or ids[0] != 1 or isinstance(ids[1], int):
        return 0
    caches = [inputs[name] for name in states.values()]
    if any(c is None or len(c) != 4 or not all(isinstance(d, int) for d in c) for c in caches):
        return 0
    return min(_CHUNK, *(int(c[2]) for c in caches if c is not None))  # type: ignore[arg-type]  # they are fixed


def step_of(model: onnx_ir.Model) -> onnx_ir.Model:
    """The model with one token a step."""
    return _fixed(model, 1)


def reader_of(model: onnx_ir.Model, chunk: int) -> onnx_ir.Model:
    """The model with a chunk of tokens a step, and its states alone as outputs."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    reader = _fixed(model, chunk)
    states = ir.states_of(model)
    kept = [value for value in reader.graph.outputs if value.name in states]
    reader.graph.outputs[:] = kept
    RemoveUnusedNodesPass()(reader)
    return reader


def _fixed(model: onnx_ir.Model, length: int) -> onnx_ir.Model:
    fixed = model.clone()
    fixed.meta.update(model.meta)
    ir.fix_shapes(fixed, {IDS: (1, length)})
    return fixed


def pieces(count: int, chunk: int, room: int) -> Iterator[int]:
    """How many of `count` tokens go in together, one time after the other.

    Args:
        count: the tokens.
        chunk: how many the artefact reads at once; fewer are filled up, which takes as long.
        room: the positions that are left in the cache, for what is filled up too.
    """
    while count:
        taken = min(count, chunk)
        if taken * _SHARE < chunk or chunk > room:
            taken = 1
        yield taken
        count, room = count - taken, room - taken
