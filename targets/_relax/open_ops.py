"""The ops whose kernels take sizes that are known only at run time; any other is refused by name."""

from __future__ import annotations

import onnx_ir

from mc_opt.targets._relax import dims, elementwise
from mc_opt.targets._relax.emitter import Emitter

_MORE = """
Add ArgMax ArgMin AveragePool BatchNormalization Concat ConstantOfShape Conv CumSum DepthToSpace DequantizeLinear
Expand Flatten GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization
InstanceNormalization LSTM LayerNormalization LogSoftmax LpPool MatMul MaxPool Pad QuantizeLinear RMSNormalization RNN
Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Reshape ScatterND Shape Size Slice Softmax SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze
"""
_TAKEN = {*elementwise.HANDLERS, *_MORE.split()}


def takes(e: Emitter, node: onnx_ir.Node) -> bool:
    """Whether a node's kernel fits its inputs: all static, or of an op that takes open ones."""
    if not e.names or node.op_type in _TAKEN or node.domain not in ("", "ai.onnx"):
        return True
    return all(v is None or (dims.is_static(e.shape(v)) and not _is_open(e, v)) for v in node.inputs)


def _is_open(e: Emitter, value: onnx_ir.Value) -> bool:
    """Whether a value holds sizes that are known only at run time."""
    return e.constant(value) is None and e.sizes(value) is not None


def refusal(e: Emitter, node: onnx_ir.Node) -> str:
    """Why the op does not take the sizes, and what to do."""
    shapes = ", ".join("none" if v is None else "x".join(map(dims.text, e.shape(v))) or "scalar" for v in node.inputs)
    sizes = ", ".join(e.names)
    return f"its inputs are {shapes}, and its kernel is built for one shape; fix {sizes} with --shape"
