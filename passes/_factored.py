"""How a layer that was factorised is recognised: the ops that take factors, and the mark that each factor carries."""

from __future__ import annotations

import onnx_ir

CHAINS = ("SeKronConv", "KronLinear")
"""Ops of ours that use weights, as a Conv or a MatMul does; all others decode one."""

FACTOR_OF = "mc_opt.factor_of"
"""Metadata of a factor, and of what decodes to it: the layer whose weight it is a part of."""


def factored_layer(value: onnx_ir.Value) -> str | None:
    """The layer that a factor belongs to; None for any other value."""
    return value.metadata_props.get(FACTOR_OF)


def factor_names(model: onnx_ir.Model) -> tuple[str, ...]:
    """The initialisers that are factors, in the order of the model; those that something decodes are none."""
    values = (v for graph in model.graphs() for v in graph.initializers.values())
    return tuple(str(v.name) for v in values if factored_layer(v) is not None and v.uses())


def is_chain(node: onnx_ir.Node) -> bool:
    """Whether a node takes the factors of a weight."""
    return node.domain == "mc_opt" and node.op_type in CHAINS
