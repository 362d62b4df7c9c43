"""One node of each standard op, with inputs and attributes, that the interpreter is held to ONNX Runtime on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import helper


@dataclass(frozen=True)
class Case:
    """One node: its inputs (None: left out) and attributes."""

    op: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    note: str = ""

    def __str__(self) -> str:
        return "-".join([self.op, *(f"{k}={_short(v)}" for k, v in self.attributes.items()), self.note]).rstrip("-")


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)[:20]


def f(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).uniform(low, high, shape).astype(dtype)


def i(*values: Any, dtype: Any = np.int64) -> np.ndarray:
    return np.array(values, dtype)


def codes(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)


def scalar(value: Any, dtype: Any = np.int64) -> np.ndarray:
    return np.array(value, dtype)


def case(
    op: str, *inputs: np.ndarray | None, outputs: int = 1, opset: int = 21, note: str = "", **attributes: Any
) -> Case:
    return Case(op, inputs, attributes, outputs, opset, note)


x4 = f(2, 3, 6, 5)
whole = np.array([[-7, 7, 3], [5, -4, 9]], np.int32)
nan = np.array([1, np.nan, np.inf, -np.inf, -0.5], np.float32)
flags = np.array([[True, False, True], [False, False, True]])

ELEMENTWISE = [
    *(
        case(op, f(3, 4))
        for op in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Identity", "Mish", "Neg")
    ),
    *(case(op, f(3, 4)) for op in ("Relu", "Sigmoid", "Sign", "Sin", "Sinh", "Cosh", "Softplus", "Softsign", "Tan")),
    *(case(op, f(3, 4)) for op in ("Tanh", "Atan", "Asinh")),
    *(case(op, f(3, 4, low=0.2)) for op in ("Log", "Reciprocal", "Sqrt")),
    case("Sqrt", np.array([0, 0.25, 4], np.float32), note="zero"),
    *(case(op, f(3, 4, low=-0.9, high=0.9)) for op in ("Acos", "Asin", "Atanh")),
    case("Acosh", f(3, 4, low=1.1)),
    case("Round", np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.4], np.float32)),
    case("Abs", whole),
    case("Neg", whole),
    case("Sign", whole),
    case("IsNaN", nan),
    case("IsInf", nan),
    case("IsInf", nan, detect_negative=0),
    case("LeakyRelu", f(3, 4), alpha=0.3),
    case("LeakyRelu", f(3, 4)),
    case("PRelu", f(2, 3, 4), f(3, 1)),
    case("Elu", f(3, 4), alpha=0.5),
    case("Celu", f(3, 4), alpha=0.5),
    case("Selu", f(3, 4)),
    case("ThresholdedRelu", f(3, 4), alpha=0.7),
    case("HardSigmoid", f(3, 4), alpha=0.3, beta=0.4),
    case("HardSigmoid", f(3, 4)),
    case("Gelu", f(3, 4)),
    case("Gelu", f(3, 4), approximate="tanh"),
    case("Shrink", f(3, 4), lambd=0.8, bias=0.2),
    case("Clip", f(3, 4), scalar(-0.5, np.float32), scalar(0.7, np.float32)),
    case("Clip", f(3, 4), None, scalar(0.7, np.float32), note="high"),
    case("Clip", f(3, 4), scalar(0.7, np.float32), scalar(-0.5, np.float32), note="crossed"),
    case("Clip", whole, scalar(-3, np.int32), note="int"),
    *(case(op, f(3, 4), f(4)) for op in ("Add", "Sub", "Mul", "Max", "Min")),
    *(case(op, whole, i(3, -2, 2, dtype=np.int32), note="int") for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(
        case(op, i(7, 200, dtype=np.uint32), i(9, 3, dtype=np.uint32), note="uint32")
        for op in ("Add", "Mul", "Sub", "Div")
    ),
    case("Div", f(3, 4), f(4, low=0.5)),
    case("Mod", whole, i(3, -2, 2, dtype=np.int32)),
    case("Mod", f(2, 3), f(3, low=0.5), fmod=1),
    case("Pow", f(3, 4, low=0.1), f(4)),
    case("Pow", f(3, 4), scalar(2, np.int64), note="square"),
    case("Pow", whole, scalar(2.0, np.float32), note="int base"),
    case("Sum", f(3, 4), f(4), f(3, 1)),
    case("Mean", f(3, 4), f(4), f(3, 1)),
    case("Max", f(3, 4), f(4), f(3, 1), note="three"),
    case("Min", f(3, 4), note="one"),
    *(
        case(op, whole, i(3, -4, 9, dtype=np.int32))
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ),
    *(case(op, f(3, 4), f(4)) for op in ("Greater", "LessOrEqual")),
    case("Equal", flags, ~flags, note="bool"),
    *(case(op, flags, flags[:1]) for op in ("And", "Or", "Xor")),
    case("Not", flags),
    case("Where", flags, f(2, 3), f(3)),
    case("Where", flags, whole, scalar(0, np.int32), note="int"),
    *(
        case(
            "BitShift",
            np.array([1, 200, 77], dtype),
            np.array([3, 1, 0], dtype),
            direction=direction,
            note=dtype.__name__,
        )
        for dtype in (np.uint8, np.uint32, np.uint64)
        for direction in ("LEFT", "RIGHT")
    ),
    case("BitShift", i(2**63 + 5, 9, dtype=np.uint64), i(3, 0, dtype=np.uint64), direction="RIGHT", note="top bit"),
    *(case(op, whole, i(6, 3, 12, dtype=np.int32)) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    case("BitwiseNot", whole),
    *(case("Cast", f(2, 3, low=0, high=9), to=to) for to in (1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13)),
    case("Cast", flags, to=1, note="bool"),
    case("Cast", i(-1, 300), to=2, note="wraps"),
    case("CastLike", f(2, 3), i(1)),
    case("Erf", f(3, dtype=np.float16), note="half"),
]

SHAPE = [
    case("Reshape", x4, i(0, -1, 5)),
    case("Reshape", f(0, 3), i(3, 0), allowzero=1),
    case("Reshape", f(1), np.zeros(0, np.int64), note="scalar"),
    case("Flatten", x4),
    case("Flatten", x4, axis=0),
    case("Flatten", x4, axis=-1),
    case("Squeeze", f(1, 3, 1), i(0, -1)),
    case("Squeeze", f(1, 3, 1)),
    case("Unsqueeze", f(3, 4), i(0, -1)),
    case("Unsqueeze", f(3, 4), i(3, 1), note="unsorted"),
    case("Transpose", x4),
    case("Transpose", x4, perm=[0, 2, 3, 1]),
    case("Shape", x4),
    case("Shape", x4, start=1, end=-1),
    case("Size", x4),
    case("Expand", f(3, 1), i(2, 1, 4)),
    case("Expand", f(3, 4), i(1), note="smaller"),
    case("Tile", f(2, 3), i(2, 3)),
    case("Concat", f(2, 3), f(2, 1), axis=-1),
    case("Concat", i(1, 2), i(3), axis=0),
    case("Split", f(7, 2), outputs=3, axis=0, num_outputs=3),
    case("Split", f(2, 6), i(1, 5), outputs=2, axis=1),
    case("Slice", x4, i(1, 0), i(5, -1), i(2, -1), i(2, 1)),
    case("Slice", x4, i(-1), i(-1000), i(2), i(-2), note="backwards"),
    case("Slice", x4, i(4), i(0), i(2), i(-1), note="backwards to one"),
    case("Slice", x4, i(0), i(2**63 - 1), i(3), note="to the end"),
    case("Slice", x4, i(4), i(2), i(2), note="empty"),
    case("Slice", x4, i(0, 1)[:2], i(1, 3), note="no axes"),
    case("Pad", x4, i(0, 0, 1, 2, 0, 0, 3, 0), scalar(0.5, np.float32)),
    case("Pad", x4, i(0, 0, -1, 0, 0, 0, 0, -2), note="negative"),
    *(case("Pad", x4, i(0, 0, 2, 1, 0, 1, 1, 3), mode=mode) for mode in ("reflect", "edge", "wrap")),
    case("Pad", f(2, 3), i(1, 2), None, i(1), mode="edge"),
    case("Pad", whole, i(1, 0, 0, 1), scalar(4, np.int32), note="int"),
    case("ConstantOfShape", i(2, 3)),
    case("ConstantOfShape", i(2, 0), value=helper.make_tensor("v", 7, [1], [5])),
    case("ConstantOfShape", np.zeros(0, np.int64), value=helper.make_tensor("v", 1, [1], [5.0]), note="scalar"),
    case("Range", scalar(3), scalar(12), scalar(4)),
    case("Range", scalar(3), scalar(-4), scalar(-2)),
    case("Range", *(scalar(v, np.float32) for v in (0.0, 1.0, 0.3))),
    case("DepthToSpace", f(1, 8, 2, 3), blocksize=2),
    case("DepthToSpace", f(1, 8, 2, 3), blocksize=2, mode="CRD"),
    case("SpaceToDepth", f(1, 2, 4, 6), blocksize=2),
]

INDEXING = [
    case("Gather", f(4, 3), i(0, -1, 2), axis=0),
    case("Gather", f(2, 5, 3), i([0, -1], [4, 2]), axis=1),
    case("Gather", f(4, 3), scalar(-2), axis=-1),
    case("Gather", i(9, 8, 7, dtype=np.uint32), i(2, 0), note="uint32"),
    case("GatherElements", f(3, 4), i([0, -1, 2], [1, 1, 0]), axis=0),
    case("GatherElements", f(3, 4), i([0, -1], [3, 1], [0, 0]), axis=1),
    case("GatherND", f(2, 3, 4), i([0, 1], [-1, 2])),
    case("GatherND", f(2, 3, 4), i([0, 1, 3], [1, 2, -1])),
    case("GatherND", f(2, 3, 4), i([1], [-1]), batch_dims=1),
    case("GatherND", f(2, 3, 4), i([[1]], [[2]]), batch_dims=1, note="rank 3"),
    case("ScatterElements", f(3, 4), i([0, -1, 1, 0], [2, 2, 0, 1]), f(2, 4), axis=0),
    case("ScatterElements", f(3, 4), i([0, 0], [3, -1], [1, 1]), f(3, 2), axis=1, reduction="add"),
    case("ScatterElements", f(3, 4), i([0, 0], [3, -1], [1, 1]), f(3, 2), axis=1, reduction="max"),
    case("ScatterElements", f(3, 4), i([0, 0], [3, -1], [1, 1]), f(3, 2), axis=1, reduction="mul"),
    case("ScatterND", f(4, 3), i([0], [-1]), f(2, 3)),
    case("ScatterND", f(4, 3), i([0, 1], [3, -1]), f(2)),
    case("ScatterND", f(4, 3), i([0], [0]), f(2, 3), reduction="add"),
    case("OneHot", i([0, 2], [-1, 1]), scalar(4), np.array([0.5, 2.0], np.float32)),
    case("OneHot", i(0, 2), scalar(3), i(0, 1), axis=0),
    case("NonZero", i([0, 2, 0], [1, 0, 3])),
    *(case(op, i([3, 1, 3], [2, 2, 0]), axis=1) for op in ("ArgMax", "ArgMin")),
    case("ArgMax", f(3, 4), axis=0, keepdims=0),
    case("ArgMin", i([3, 1, 3], [2, 0, 0]), axis=1, select_last_index=1),
    case("ArgMax", i([3, 1, 3], [2, 0, 0]), axis=1, select_last_index=1),
    case("TopK", i([3, 1, 3, 0], [2, 0, 0, 5]), i(2), outputs=2),
    case("TopK", f(3, 4), i(2), outputs=2, axis=0, largest=0),
    case("CumSum", f(3, 4), scalar(1)),
    case("CumSum", f(3, 4), scalar(-2), exclusive=1),
    case("CumSum", whole, scalar(1), reverse=1),
    case("CumSum", f(3, 4), scalar(1), reverse=1, exclusive=1),
    case("Trilu", f(2, 4, 4)),
    case("Trilu", f(4, 5), scalar(-1), upper=0),
    case("EyeLike", f(3, 4), k=1, dtype=6),
    case("Compress", f(3, 4), np.array([True, False, True]), axis=1),
    case("Compress", f(2, 2), np.array([False, True, True])),
    case("ReverseSequence", f(4, 3), i(4, 1, 3), batch_axis=1, time_axis=0),
]

REDUCE = [
    *(
        case(f"Reduce{name}", f(2, 3, 4, low=0.1), i(0, -1), keepdims=keep)
        for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
        for keep in (0, 1)
    ),
    *(
        case(f"Reduce{name}", f(2, 3), keepdims=0, note="all axes")
        for name in ("Max", "Mean", "Min", "Prod", "Sum", "L2")
    ),
    case("ReduceSum", f(2, 3), np.zeros(0, np.int64), noop_with_empty_axes=1),
    case("ReduceSum", f(2, 3), np.zeros(0, np.int64), note="empty axes"),
    *(case(f"Reduce{name}", whole, i(1), note="int") for name in ("Max", "Mean", "Min", "Prod", "Sum")),
]

LINEAR = [
    case("MatMul", f(3, 4), f(4, 5)),
    case("MatMul", f(2, 1, 3, 4), f(3, 4, 5)),
    case("MatMul", f(4), f(4, 5), note="vector"),
    case("Gemm", f(3, 4), f(4, 5), f(5)),
    case("Gemm", f(4, 3), f(5, 4), f(3, 1), alpha=0.5, beta=2.0, transA=1, transB=1),
    case("Gemm", f(3, 4), f(4, 5), note="no bias"),
    case("Einsum", f(2, 3, 4), f(2, 4, 5), equation="bij, bjk -> bik"),
]

_SAME = [{"auto_pad": mode} for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")]

CONV = [
    case("Conv", x4, f(4, 3, 3, 3), f(4)),
    case("Conv", x4, f(4, 3, 3, 2), pads=[1, 0, 2, 1], strides=[2, 1]),
    case("Conv", x4, f(6, 1, 2, 2), group=3, dilations=[2, 3]),
    *(case("Conv", x4, f(4, 3, 3, 2), strides=[2, 2], **same) for same in _SAME),
    case("Conv", f(2, 3, 9), f(4, 3, 3), f(4), pads=[1, 1], strides=[2]),
    case("Conv", f(1, 2, 4, 5, 6), f(3, 2, 2, 2, 3), pads=[0, 1, 0, 1, 1, 0]),
    case("ConvTranspose", x4, f(3, 4, 2, 2), f(4), strides=[2, 2]),
    case("ConvTranspose", x4, f(3, 4, 3, 3), strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]),
    case("ConvTranspose", x4, f(3, 2, 3, 3), group=3, dilations=[2, 1]),
    case("ConvTranspose", x4, f(3, 4, 3, 3), strides=[2, 2], output_shape=[12, 11]),
    *(case("ConvTranspose", x4, f(3, 4, 3, 3), strides=[2, 2], **same) for same in _SAME),
    case("ConvTranspose", f(2, 3, 5), f(3, 2, 3), f(2), strides=[3], pads=[2, 1]),
    case("MaxPool", x4, kernel_shape=[2, 2], strides=[2, 2]),
    case("MaxPool", x4, kernel_shape=[3, 2], pads=[1, 0, 1, 1], strides=[2, 1]),
    case("MaxPool", x4, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("MaxPool", x4, kernel_shape=[2, 2], strides=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1),
    case("MaxPool", x4, kernel_shape=[2, 2], dilations=[2, 3]),
    *(case("MaxPool", x4, kernel_shape=[3, 2], strides=[2, 2], **same) for same in _SAME),
    case("MaxPool", f(2, 3, 9), kernel_shape=[3], strides=[2]),
    case("AveragePool", x4, kernel_shape=[3, 2], strides=[3, 2]),
    case("AveragePool", x4, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("AveragePool", x4, kernel_shape=[3, 3], pads=[1, 0, 1, 1], count_include_pad=1),
    case("AveragePool", x4, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("AveragePool", x4, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1),
    case("AveragePool", x4, kernel_shape=[2, 2], dilations=[2, 2]),
    *(case("AveragePool", x4, kernel_shape=[3, 2], strides=[2, 2], **same) for same in _SAME),
    case("GlobalAveragePool", x4),
    case("GlobalMaxPool", x4),
]

_r = f(1, 2, 5, 4)
_up = np.array([1, 1, 2, 1.5], np.float32)
_down = np.array([1, 1, 0.6, 0.8], np.float32)
_modes = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")

RESIZE = [
    *(
        case("Resize", _r, None, scales, mode=mode, coordinate_transformation_mode=coordinates, note=note)
        for mode in ("nearest", "linear", "cubic")
        for coordinates in _modes
        for scales, note in ((_up, "up"), (_down, "down"))
    ),
    *(
        case("Resize", _r, None, _up, nearest_mode=rounding, coordinate_transformation_mode="asymmetric")
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
    case("Resize", _r, None, None, i(1, 2, 8, 3), mode="linear", note="sizes"),
    case("Resize", _r, None, None, i(8, 3), mode="nearest", axes=[2, 3], note="sizes"),
    case("Resize", _r, None, None, i(9, 6), mode="linear", axes=[2, 3], keep_aspect_ratio_policy="not_larger"),
    case("Resize", _r, None, _down, mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5),
    case(
        "Resize", _r, np.array([0, 0, 0.1, -0.2, 1, 1, 0.9, 1.2], np.float32), None, i(1, 2, 4, 6),
        mode="linear", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=3.0,
    ),
]  # fmt: skip


def recurrent(
    op: str, gates: int, *, d: int = 1, h: int = 4, bias: bool = True, rest: Sequence[Any] = (), **attributes: Any
) -> Case:
    s, n, size = 5, 3, 6
    w, r = f(d, gates * h, size, low=-0.5, high=0.5), f(d, gates * h, h, low=-0.5, high=0.5, seed=9)
    b = f(d, 2 * gates * h, low=-0.5, high=0.5) if bias else None
    outputs = 3 if op == "LSTM" else 2
    return Case(op, (f(s, n, size), w, r, b, *rest), {"hidden_size": h, **attributes}, outputs, note=f"{len(rest)}")


_lens = np.array([5, 2, 1], np.int32)
_h0 = [f(d, 3, 4, seed=3) for d in (1, 2)]
RECURRENT = [
    *(recurrent(op, gates) for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))),
    *(recurrent(op, gates, direction="reverse") for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))),
    recurrent("LSTM", 4, d=2, direction="bidirectional", rest=(_lens, _h0[1], _h0[1])),
    recurrent("GRU", 3, d=2, direction="bidirectional", rest=(_lens, _h0[1])),
    recurrent("RNN", 1, d=2, direction="bidirectional", rest=(_lens, _h0[1])),
    recurrent("LSTM", 4, bias=False, rest=(None, _h0[0], _h0[0])),
    recurrent("LSTM", 4, rest=(None, _h0[0], _h0[0], f(1, 12, low=-0.5, high=0.5))),
    recurrent("LSTM", 4, clip=0.3),
    recurrent(
        "LSTM",
        4,
        activations=["HardSigmoid", "ScaledTanh", "Relu"],
        activation_alpha=[0.3, 0.8],
        activation_beta=[0.4, 0.7],
    ),
    recurrent("GRU", 3, linear_before_reset=1, rest=(None, _h0[0])),
    recurrent("GRU", 3, activations=["HardSigmoid", "Softsign"]),
    recurrent("RNN", 1, activations=["Relu"]),
]

NORMAL = [
    *(case(op, f(2, 3, 4), axis=axis) for op in ("Softmax", "LogSoftmax", "Hardmax") for axis in (-1, 1)),
    case("BatchNormalization", x4, f(3), f(3), f(3), f(3, low=0.5), epsilon=1e-3),
    case("LayerNormalization", f(2, 3, 4), f(4), f(4), outputs=3),
    case("LayerNormalization", f(2, 3, 4), f(3, 4), axis=1),
    case("InstanceNormalization", x4, f(3), f(3)),
    case("GroupNormalization", f(2, 4, 3, 3), f(4), f(4), num_groups=2),
    case("RMSNormalization", f(2, 3, 4), f(4), opset=23),
    case("LpNormalization", f(3, 4), axis=1),
    case("LpNormalization", f(3, 4), axis=0, p=1),
    case("LRN", f(2, 5, 3, 3), size=3, alpha=0.1, beta=0.6, bias=1.5),
    case("Dropout", f(3, 4)),
]

_scale = np.array([0.05, 0.1, 0.02], np.float32)
_zero = np.array([3, -5, 0], np.int8)
QUANT = [
    case("QuantizeLinear", x4, scalar(0.03, np.float32), scalar(120, np.uint8)),
    case("QuantizeLinear", x4, _scale, _zero, axis=1),
    case("QuantizeLinear", f(4, 6), f(4, 2, low=0.05, high=0.1), np.zeros((4, 2), np.int8), axis=1, block_size=3),
    case("QuantizeLinear", x4, scalar(0.03, np.float32), output_dtype=3),
    case("DequantizeLinear", np.arange(18, dtype=np.int8).reshape(2, 3, 3), _scale, _zero, axis=1),
    case("DequantizeLinear", np.arange(18, dtype=np.uint8), scalar(0.1, np.float32), scalar(7, np.uint8)),
    case("DequantizeLinear", np.arange(24, dtype=np.uint8).reshape(4, 6), f(4, 2), axis=1, block_size=3),
    case("DynamicQuantizeLinear", f(3, 4), outputs=3),
    case("DynamicQuantizeLinear", f(3, 4, low=1), outputs=3, note="positive"),
    case("MatMulInteger", codes(3, 4), codes(4, 2).astype(np.int8), scalar(3, np.uint8)),
    case("ConvInteger", codes(1, 1, 5, 5), codes(1, 1, 3, 3), scalar(7, np.uint8), pads=[1, 1, 1, 1]),
]

ALL = [*ELEMENTWISE, *SHAPE, *INDEXING, *REDUCE, *LINEAR, *CONV, *RESIZE, *RECURRENT, *NORMAL, *QUANT]
