"""Small nets with channels of every kind, and the model in which channels are 0 where they are summed over."""

from __future__ import annotations

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._channels import STAYS, channels_of


def masked(source: onnx_ir.Model, removed: np.ndarray) -> onnx_ir.Model:
    """The model with its size, times 0 for every unit that goes, in front of every sum over units."""
    model = source.clone()
    channels = channels_of(model)
    for number, place in enumerate(channels.sums):
        units = channels.at(place)
        if units is None or not removed[units[units != STAYS]].any():
            continue
        shape = [1] * len(place.value.shape or ())
        shape[place.axis] = len(units)
        keep = np.where(units == STAYS, True, ~removed[units]).reshape(shape)
        mask = ir.initializer(model.graph, f"mask{number}", keep.astype(np.float32))
        node = onnx_ir.node("Mul", [place.value, mask], name=f"mask{number}")
        node.outputs[0].name = f"masked{number}"
        node.outputs[0].type, node.outputs[0].shape = place.value.type, place.value.shape
        model.graph.insert_before(place.node, node)
        place.node.replace_input_with(place.index, node.outputs[0])
    return model


def random_net(seed: int) -> str:
    """Five random blocks between a stem and a head, in onnx.parser's syntax."""
    rng = np.random.default_rng(seed)
    net = _Net(rng)
    x, c = net.conv("x", 3, int(rng.integers(3, 7)))
    for _ in range(5):
        block = rng.choice(["plain", "residual", "concat", "depthwise", "grouped", "squeeze", "split", "transpose"])
        x, c = getattr(net, str(block))(x, c)
    if rng.integers(2):
        net.add("flat = Flatten(", x, ")")
        features = c * 36
    else:
        net.add("pooled = GlobalAveragePool(", x, ")")
        net.add("flat = Reshape(pooled, flat_shape)")
        net.constants.append(f"int64[2] flat_shape = {{2, {c}}}")
        features = c
    net.weights += [f"float[{features},5] fc_w", "float[5] fc_b", "float[3,5] head_w"]
    net.add("fc = MatMul(flat, fc_w)")
    net.add("fb = Add(fc, fc_b)")
    net.add("ft = Sigmoid(fb)")
    net.add("y = Gemm<transB = 1>(ft, head_w)")
    declared = ", ".join([*net.weights, *net.constants])
    return f"net (float[2,3,6,6] x) => (float[2,3] y) <{declared}> {{ {' '.join(net.lines)} }}"


class _Net:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.lines: list[str] = []
        self.weights: list[str] = []
        self.constants: list[str] = []

    def add(self, *parts: str) -> None:
        self.lines.append(" ".join(parts))

    def name(self) -> str:
        return f"v{len(self.lines)}"

    def conv(self, x: str, c: int, out: int, *, group: int = 1, k: int = 3) -> tuple[str, int]:
        """Conv, BatchNormalization and an activation that is not 0 at 0."""
        n = self.name()
        self.weights += [f"float[{out},{c // group},{k},{k}] w_{n}"]
        self.weights += [f"float[{out}] {kind}_{n}" for kind in ("scale", "bias", "mean", "var")]
        pad = k // 2
        attributes = f"<pads: ints = [{pad},{pad},{pad},{pad}], group = {group}>"
        self.add(f"c_{n} = Conv {attributes} ({x}, w_{n})")
        self.add(f"b_{n} = BatchNormalization(c_{n}, scale_{n}, bias_{n}, mean_{n}, var_{n})")
        self.add(f"{n} = {self.rng.choice(['Relu', 'Sigmoid', 'Softplus'])}(b_{n})")
        return n, out

    def plain(self, x: str, c: int) -> tuple[str, int]:
        return self.conv(x, c, int(self.rng.integers(2, 8)))

    def residual(self, x: str, c: int) -> tuple[str, int]:
        inner, width = self.conv(x, c, int(self.rng.integers(2, 8)))
        back, _ = self.conv(inner, width, c)
        n = self.name()
        self.add(f"{n} = Add({x}, {back})")
        return n, c

    def concat(self, x: str, c: int) -> tuple[str, int]:
        a, first = self.conv(x, c, int(self.rng.integers(2, 5)))
        b, second = self.conv(x, c, int(self.rng.integers(2, 5)), k=1)
        n = self.name()
        self.add(f"{n} = Concat<axis = 1>({a}, {b}, {x})")
        return n, first + second + c

    def depthwise(self, x: str, c: int) -> tuple[str, int]:
        return self.conv(x, c, c * int(self.rng.integers(1, 3)), group=c)

    def grouped(self, x: str, c: int) -> tuple[str, int]:
        x, c = self.conv(x, c, 2 * int(self.rng.integers(2, 4)))
        return self.conv(x, c, 6, group=2)

    def squeeze(self, x: str, c: int) -> tuple[str, int]:
        """Squeeze and excitation."""
        n = self.name()
        self.add(f"s_{n} = ReduceMean<keepdims = 1>({x}, space)")
        if "int64[2] space = {2, 3}" not in self.constants:
            self.constants.append("int64[2] space = {2, 3}")
        inner, width = self.conv(f"s_{n}", c, 2, k=1)
        gate, _ = self.conv(inner, width, c, k=1)
        self.add(f"{n} = Mul({x}, {gate})")
        return n, c

    def split(self, x: str, c: int) -> tuple[str, int]:
        x, c = self.conv(x, c, 6)
        n = self.name()
        self.constants.append(f"int64[2] at_{n} = {{2, 4}}")
        self.add(f"l_{n}, r_{n} = Split<axis = 1>({x}, at_{n})")
        left, _ = self.conv(f"l_{n}", 2, 4)
        out = self.name()
        self.add(f"{out} = Mul({left}, r_{n})")
        return out, 4

    def transpose(self, x: str, c: int) -> tuple[str, int]:
        """A linear layer over channels that stand last."""
        n = self.name()
        self.weights += [f"float[{c},4] w_{n}", f"float[4] bias_{n}"]
        self.add(f"t_{n} = Transpose<perm = [0,2,3,1]>({x})")
        self.add(f"m_{n} = MatMul(t_{n}, w_{n})")
        self.add(f"a_{n} = Add(m_{n}, bias_{n})")
        self.add(f"{n} = Transpose<perm = [0,3,1,2]>(a_{n})")
        return n, 4


RECURRENT = """
net (float[4,2,5] x, float[{d},2,6] h0) => (float[4,2,3] y)
<float[{d},{rows},5] w, float[{d},{rows},6] r, float[{d},{bias}] b, float[{d},{peep}] p, float[{d},2,6] c0,
 float[{wide},3] last, int64[3] shape = {{0, 0, {wide}}}>
{{
  seq{outputs} = {op} <hidden_size = 6, direction = "{direction}"> (x, w, r, b{states})
  t = Transpose <perm = [0,2,1,3]> (seq)
  f = Reshape (t, shape)
  y = MatMul (f, last)
}}
"""


def recurrent_net(op: str, direction: str = "forward") -> str:
    """A cell and a linear layer on its states."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    d = 2 if direction == "bidirectional" else 1
    text = RECURRENT.format(
        d=d,
        rows=6 * gates,
        bias=12 * gates,
        peep=18,
        wide=6 * d,
        op=op,
        direction=direction,
        outputs=", hidden, cell" if op == "LSTM" else ", hidden",
        states=", , c0, c0, p" if op == "LSTM" else ", , c0",
    )
    return text.replace(f", float[{d},2,6] h0", "")


RESIDUAL = """
net (float[2,4,5,5] x) => (float[2,3] y)
<int64[2] space = {2, 3}, float[4,4,3,3] w0, float[4,4,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4,4,3,3] w3,
 float[4,3] w4>
{
  a = Conv <pads = [1,1,1,1]> (x, w0)
  c1 = Conv <pads = [1,1,1,1]> (a, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2)
  s1 = Add (a, c2)
  c3 = Conv <pads = [1,1,1,1]> (s1, w3)
  s2 = Add (c3, s1)
  g = ReduceMean <keepdims = 0> (s2, space)
  y = MatMul (g, w4)
}
"""
