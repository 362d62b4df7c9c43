from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt import ir
from tests.targets._kernels import check, lowered_model, machine, model, normal

pytestmark = [pytest.mark.tvm, pytest.mark.slow, pytest.mark.ci]


def _samples(op):
    return {s.name: s for s in ir.find_op(op).samples(np.random.default_rng(0)) if s.inputs[0].dtype == np.float32}


SAMPLES = {(op, name): sample for op in ("SeKronConv", "KronLinear") for name, sample in _samples(op).items()}
FEW = [("SeKronConv", "gkpd-bias"), ("SeKronConv", "free"), ("KronLinear", "gkpd-bias"), ("KronLinear", "free")]


def _text(key, *, lead=(), factors=(), nodes="", tail="y = Relu(c)", sample=None):
    """The text of a sample and its weights; `lead` replaces the first sizes of x, `factors` and `nodes` its factors."""
    sample = sample or SAMPLES[key]
    x, bias, *arrays = sample.inputs
    names = ["bias" if bias is not None else "", *(factors or (f"f{k}" for k in range(len(arrays))))]
    attributes = ", ".join(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in sample.attributes.items())
    shape = (*lead, *x.shape[len(lead) :])
    out = ",".join(f"d{i}" for i in range(x.ndim))
    weights = {"bias": bias} if bias is not None else {}
    if not factors:
        weights |= {f"f{k}": array for k, array in enumerate(arrays)}
    head = f"mc_opt.{key[0]}<{attributes}>" if attributes else f"mc_opt.{key[0]}"
    given = f"float[{','.join(map(str, shape))}] x"
    made = ", ".join(f"float[{','.join(map(str, a.shape))}] {n}" for n, a in zip(factors, arrays, strict=False))
    return f"g ({given}) => (float[{out}] y) <{made}> {{ {nodes} c = {head}(x, {', '.join(names)}) {tail} }}", weights


@pytest.mark.parametrize("key", SAMPLES, ids="-".join)
def test_layer_with_fused_activation(key):
    check(*_text(key))


@pytest.mark.parametrize("key", FEW, ids="-".join)
def test_layer_on_avx2(key):
    check(*_text(key), cpu="x86-64-v3")


@pytest.mark.parametrize("key", FEW, ids="-".join)
def test_open_batch(key):
    sizes = [{"b": b} for b in (1, 2, 7, 13)]
    check(*_text(key, lead=("b",)), sizes=sizes)


@pytest.mark.parametrize("name", ["gkpd-bias", "outer-first", "free", "low-rank"])
def test_open_rows(name):
    sizes = [{"b": b, "s": s} for b in (1, 3) for s in (1, 7, 16)]
    check(*_text(("KronLinear", name), lead=("b", "s")), sizes=sizes)


def _packed(key):
    """The Lookups of a sample's factors, in rows of what one output channel of a stage sums over."""
    rng = np.random.default_rng(3)
    op, sample = ir.find_op(key[0]), SAMPLES[key]
    node = ir.node(key[0], sample.inputs, sample.attributes)
    lines, weights = [], {}
    for k, factor in enumerate(sample.inputs[2:]):
        axes = op.row_axes(node, 2 + k)
        rows = math.prod(factor.shape[a] for a in axes)
        weights[f"codes{k}"] = ir.pack_codes(rng.integers(0, 16, (rows, factor.size // rows)).astype(np.uint8), 4)
        weights[f"book{k}"] = normal(16, seed=k)
        weights[f"scale{k}"] = (rng.random((rows, 1)) + 0.5).astype(np.float32)
        form = f"bits=4, shape={list(factor.shape)}, axes={list(axes)}, group_size=0"
        lines.append(f"w{k} = mc_opt.Lookup<{form}>(codes{k}, book{k}, scale{k})")
    return " ".join(lines), weights


@pytest.mark.parametrize("key", [*FEW, ("SeKronConv", "low-rank"), ("KronLinear", "low-rank-row")], ids="-".join)
def test_packed_factors(key):
    nodes, weights = _packed(key)
    factors = [f"w{k}" for k in range(len(SAMPLES[key].inputs) - 2)]
    text, rest = _text(key, factors=factors, nodes=nodes)
    check(text, weights | rest)


@pytest.mark.parametrize("key", FEW, ids="-".join)
def test_factors_that_the_model_computes(key):
    arrays = SAMPLES[key].inputs[2:]
    factors = [f"w{k}" for k in range(len(arrays))]
    at = {f"at{k}": np.array([0, a.size - 1]) for k, a in enumerate(arrays)}
    added = {f"v{k}": normal(2, seed=k) for k in range(len(arrays))}
    nodes = " ".join(f"w{k} = mc_opt.AddSparse(f{k}, at{k}, v{k})" for k in range(len(arrays)))
    text, rest = _text(key, factors=factors, nodes=nodes)
    check(text, at | added | rest | {f"f{k}": a for k, a in enumerate(arrays)}, quiet=False)


def test_the_report_says_which_kernels_took_a_layer():
    held = lowered_model(model(*_drawn_text(BLOCKS["tails"])), machine())
    assert held.kernels == ("SeKronConv by transpose, kron, kron_spread: c",)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A chain of two factors of one rank index: channels of both, taps of the first or second, sizes of the input."""

    rank: int
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    taps: tuple[int, int] = (1, 1)
    stride: int = 1
    size: tuple[int, ...] = (7, 9)
    bias: bool = False
    linear: bool = False

    @property
    def op(self):
        return "KronLinear" if self.linear else "SeKronConv"

    def sample(self):
        rng = np.random.default_rng(5)
        n = 0 if self.linear else 2
        count = self.rank * math.prod(self.inputs) * math.prod(self.taps) ** n
        factors = [
            (rng.standard_normal((self.rank, f, c, *[k] * n)) * count**-0.25).astype(np.float32)
            for f, c, k in zip(self.outputs, self.inputs, self.taps, strict=True)
        ]
        channels, pad = math.prod(self.inputs), math.prod(self.taps) // 2
        shape = (*self.size, channels) if self.linear else (2, channels, *self.size)
        bias = normal(math.prod(self.outputs), seed=1) if self.bias else None
        window = {"strides": (self.stride,) * n, "dilations": (1,) * n, "pads": (pad,) * 2 * n, "group": 1}
        x = rng.standard_normal(shape).astype(np.float32)
        return ir.Example("drawn", (x, bias, *factors), {} if self.linear else window)


# Second factors of 2, 4 and 8 outputs stay in vectors with the first's; of 3 and 16 they do not.
BLOCKS = {
    "few-positions": Drawn(5, (3, 4), (1, 8), size=(2, 2)),
    "tails": Drawn(3, (37, 4), (1, 8), bias=True),
    "channels-before": Drawn(4, (6, 8), (3, 4), (1, 3), bias=True),
    "taps-behind": Drawn(4, (20, 2), (3, 4), (3, 1), stride=2),
    "panels": Drawn(40, (96, 4), (4, 2)),
    "no-block": Drawn(4, (6, 3), (2, 4)),
    "whole-vectors": Drawn(4, (6, 16), (2, 4)),
    "rows": Drawn(6, (25, 4), (2, 8), size=(19,), bias=True, linear=True),
    "one-row": Drawn(6, (5, 8), (2, 8), size=(1,), linear=True),
    "sequences": Drawn(12, (40, 1), (1, 24), size=(3, 11), bias=True, linear=True),
}


def _drawn_text(drawn):
    return _text((drawn.op, ""), sample=drawn.sample())


def _drawn(drawn, cpu):
    check(*_drawn_text(drawn), cpu=cpu)


@pytest.mark.parametrize("cpu", ["native", "x86-64-v3"])
@pytest.mark.parametrize("drawn", BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_of_a_few_channels(drawn, cpu):
    _drawn(drawn, cpu)


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.builds(
        Drawn,
        rank=st.integers(1, 40),
        outputs=st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8, 12, 16, 32])),
        inputs=st.tuples(st.integers(1, 6), st.integers(1, 20)),
        taps=st.sampled_from([(1, 1), (1, 3), (3, 1)]),
        stride=st.sampled_from([1, 2]),
        size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
        bias=st.booleans(),
        linear=st.booleans(),
    ),
    cpu=st.sampled_from(["native", "x86-64-v3"]),
)
def test_chains_of_any_shape(drawn, cpu):
    _drawn(drawn, cpu)
