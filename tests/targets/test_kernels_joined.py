"""Convolutions and products in a row that run as one kernel, a block of rows at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mc_opt.targets import _row_blocks
from mc_opt.targets._build import fuse, llvm_target
from mc_opt.targets.kernels import _join, _split
from tests.targets._kernels import compare, feeds, lowered_model, machine, model, normal, running

pytestmark = [pytest.mark.tvm, pytest.mark.slow]

CPUS = ["native", "x86-64-v3"]
SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A first convolution, a channelwise one, a pointwise one and what is added at the end, as a text and its weights.

    Attributes:
        size: of the image.
        channels: of the input, between the convolutions, of the result.
        kernel: of the channelwise convolution; empty for a block without it.
        first: of the first convolution; empty for a block without it.
        strides, dilations, pads: of the channelwise convolution.
        last: whether there is a pointwise convolution behind it.
        residual: whether the input is added at the end.
    """

    size: tuple[int, int]
    channels: tuple[int, int, int]
    kernel: tuple[int, ...] = (3, 3)
    first: tuple[int, ...] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    last: bool = True
    images: int = 1
    residual: bool = False

    def model(self):
        c, m, o = self.channels
        at, nodes, weights = "x", [], {}
        if self.first:
            k = self.first[0] // 2
            weights |= {"w0": normal(m, c, *self.first), "b0": normal(m, seed=1)}
            nodes.append(f"s0 = Conv<pads=[{k},{k},{k},{k}]>({at}, w0, b0)  y0 = Relu(s0)")
            at = "y0"
        else:
            c = m
        if self.kernel:
            weights |= {"w1": normal(m, 1, *self.kernel, seed=2)}
            window = f"strides={list(self.strides)}, dilations={list(self.dilations)}, pads={list(self.pads)}"
            nodes.append(f"s1 = Conv<group={m}, {window}>({at}, w1)  y1 = HardSwish(s1)")
            at = "y1"
        if self.last:
            weights |= {"w2": normal(o, m, 1, 1, seed=3), "b2": normal(o, seed=4)}
            nodes.append(f"s2 = Conv({at}, w2, b2)  y2 = Clip(s2)")
            at = "y2"
        if self.residual:
            nodes.append(f"y3 = Add({at}, x)")
            at = "y3"
        given = f"float[{self.images},{c},{self.size[0]},{self.size[1]}] x"
        return model(f"g ({given}) => (float[a,b,c,d] y) {{ {' '.join(nodes)} y = Sigmoid({at}) }}", weights)

    def with_residual(self):
        """The block with its input added at the end: its convolutions keep sizes and channels."""
        spans = [d * (k - 1) for k, d in zip(self.kernel, self.dilations, strict=False)] or [0, 0]
        pads = (*(s // 2 for s in spans), *(s - s // 2 for s in spans))
        channels, first = (*self.channels[:2], self.channels[0]), self.first or (1, 1)
        kept = {"strides": (1, 1), "pads": pads, "channels": channels, "first": first}
        return dataclasses.replace(self, last=True, residual=True, **kept)

    def is_possible(self):
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)] if self.kernel else [1, 1]
        sizes = zip(self.size, self.pads[:2], self.pads[2:], reach, strict=True)
        return all(n + before + after >= span for n, before, after, span in sizes)


def joined_kernels(proto, target):
    with llvm_target(target):
        module, _ = _join.join(fuse(lowered_model(proto, target).module), target)
    return [v.name_hint for v in module.functions if v.name_hint.startswith("joined")]


def run(block, cpu, *, threads=1, cache=0, wanted=1):
    proto = block.model()
    target = dataclasses.replace(machine(cpu), threads=threads)
    target = dataclasses.replace(target, l2=cache or target.l2)
    found = joined_kernels(proto, target)
    assert len(found) >= wanted, found
    with running(proto, target) as (function, _):
        compare(proto, function, feeds(proto))


# By its own rule each is worth it; what it works on is larger than the cache.
BLOCKS = {
    "inverted residual": Block((24, 20), (8, 36, 8), residual=True),
    "strided, odd": Block((23, 21), (5, 33, 7), strides=(2, 2), pads=(0, 0, 0, 0)),
    "separable": Block((25, 19), (40, 40, 12), first=()),
    "stem": Block((20, 22), (3, 24, 8), first=(3, 3)),
    "factors without taps between": Block((24, 26), (9, 40, 9), kernel=()),
    "no last": Block((20, 22), (3, 24, 8), last=False),
    "tall window of images": Block((22, 9), (4, 17, 5), kernel=(5, 1), dilations=(2, 1), pads=(4, 0, 4, 0), images=3),
}


@pytest.mark.ci
@pytest.mark.parametrize(("cpu", "threads"), [("native", 1), ("x86-64-v3", 2)])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_of_rows(block, cpu, threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    run(block, cpu, threads=threads, cache=48 << 10)


@pytest.mark.ci
@pytest.mark.parametrize("right", [1, 3])
def test_rows_of_a_ring_are_those_of_the_block_before(right, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    monkeypatch.setattr(_row_blocks, "_WORTH", -1.0)
    # Of this size another buffer had the ring's memory between two blocks.
    run(Block((24, 12), (3, 16, 8), kernel=(3, right), pads=(0, 0, 0, right)), "native", cache=24 << 10)


APART = {
    "a cast between": ("float[96,12] x", "s = MatMul(x, w0) t = Cast<to=11>(s) u = MatMul(t, w1) y = Cast<to=1>(u)"),
    "channels of sequences": ("float[2,12,96] x", "s = Conv(x, w2) t = Conv<group=40>(s, w3) y = Conv(t, w4)"),
}


@pytest.mark.ci
@pytest.mark.parametrize(("given", "nodes"), APART.values(), ids=list(APART))
def test_what_rows_of_one_type_in_an_image_do_not_hold_stays_apart(given, nodes, monkeypatch):
    monkeypatch.setattr(_row_blocks, "_WORTH", -1.0)
    held = {"w0": normal(12, 40), "w1": normal(40, 12).astype(np.float64)}
    held |= {"w2": normal(40, 12, 1), "w3": normal(40, 1, 3), "w4": normal(12, 40, 1)}
    weights = {name: array for name, array in held.items() if f" {name})" in nodes}
    dims = "a,b" if "96,12" in given else "a,b,c"
    proto = model(f"g ({given}) => (float[{dims}] y) {{ {nodes} }}", weights)
    target = dataclasses.replace(machine(), l2=48 << 10)
    assert joined_kernels(proto, target) == []
    with running(proto, target) as (function, _):
        compare(proto, function, feeds(proto))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A factored linear layer with an activation: rows [*lead, inputs], ranks, outputs."""

    lead: tuple[int, ...]
    inputs: int
    ranks: int
    outputs: int

    def model(self):
        weights = {"f1": normal(self.ranks, self.outputs, 1), "f2": normal(self.ranks, 1, self.inputs, seed=1)}
        weights["b"] = normal(self.outputs, seed=2)
        lead = ",".join(map(str, self.lead))
        given, made = f"float[{lead},{self.inputs}] x", f"float[{lead},{self.outputs}] y"
        return model(f"g ({given}) => ({made}) {{ z = mc_opt.KronLinear(x, b, f1, f2) y = Relu(z) }}", weights)


@pytest.mark.ci
@pytest.mark.parametrize(("cpu", "threads"), [("native", 1), ("x86-64-v3", 2)])
@pytest.mark.parametrize("lead", [(480,), (1, 480), (3, 160)], ids=str)
def test_a_factored_linear_layer_of_many_ranks_is_one_kernel(lead, cpu, threads, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    run(Rows(lead, 17, 70, 21), cpu, threads=threads, cache=48 << 10)


@given(
    lead=st.one_of(st.tuples(st.integers(1, 90)), st.tuples(st.integers(1, 4), st.integers(1, 60))),
    inputs=st.integers(1, 50),
    ranks=st.integers(1, 70),
    outputs=st.integers(1, 50),
    threads=st.integers(1, 3),
    cache=st.sampled_from([24, 48, 256]),
)
@pytest.mark.parametrize("cpu", CPUS)
@SETTINGS
def test_any_factored_linear_layer(cpu, monkeypatch, threads, cache, **drawn):
    monkeypatch.setattr(_split, "_WORTH", 0)
    monkeypatch.setattr(_row_blocks, "_WORTH", -1.0)
    run(Rows(**drawn), cpu, threads=threads, cache=cache << 10, wanted=0)


@given(
    size=st.tuples(st.integers(2, 24), st.integers(1, 24)),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 50)),
    kernel=st.sampled_from([(), (3, 3), (5, 5), (1, 3), (3, 1), (2, 4)]),
    first=st.sampled_from([(), (1, 1), (1, 1), (3, 3)]),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    images=st.integers(1, 3),
    last=st.booleans(),
    residual=st.booleans(),
    threads=st.integers(1, 3),
    cache=st.sampled_from([24, 48, 256]),
)
@pytest.mark.parametrize("cpu", CPUS)
@SETTINGS
def test_any_block(cpu, monkeypatch, threads, cache, residual, **drawn):
    block = Block(**drawn).with_residual() if residual else Block(**drawn)
    assume(block.is_possible())
    monkeypatch.setattr(_split, "_WORTH", 0)
    monkeypatch.setattr(_row_blocks, "_WORTH", -1.0)  # whatever can be joined is
    run(block, cpu, threads=threads, cache=cache << 10, wanted=0)
