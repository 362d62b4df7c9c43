"""Attention of whole sequences as one kernel: every form of the chain, odd sizes, and what stays apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt.targets._relax import lower
from tests.targets._kernels import check, machine, model

pytestmark = pytest.mark.tvm

SCALE = "<float s = {0.3}, float root = {3.0}>"


def chain(
    name: str,
    *,
    lead: str = "2,3",
    rows: int | str = 5,
    keys: int | str = 7,
    sizes: tuple[int, int] = (8, 8),
    mask: str = "",
    scale: str = "",
) -> tuple[list[str], str, str]:
    """Inputs, nodes and output of one attention, their names ending in `name`."""
    size, width = sizes
    inputs = [
        f"float[{lead},{rows},{size}] q{name}",
        f"float[{lead},{size},{keys}] k{name}",
        f"float[{lead},{keys},{width}] v{name}",
        *([f"float[{mask}] m{name}"] if mask else []),
    ]
    held = f"a{name}"
    nodes = f"{held} = MatMul(q{name}, k{name}) "
    if scale:
        nodes += f"b{name} = {scale.format(x=held)} "
        held = f"b{name}"
    if mask:
        nodes += f"c{name} = Add({held}, m{name}) "
        held = f"c{name}"
    nodes += f"p{name} = Softmax<axis=-1>({held}) y{name} = MatMul(p{name}, v{name}) "
    return inputs, nodes, f"float[{lead},{rows},{width}] y{name}"


def graph(*chains: tuple[list[str], str, str]) -> str:
    """One model of several attentions."""
    inputs = ", ".join(i for c in chains for i in c[0])
    return f"g ({inputs}) => ({', '.join(c[2] for c in chains)}) {SCALE} {{ {''.join(c[1] for c in chains)} }}"


def kernels(text: str, weights: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """The attentions that a build would note."""
    held = lower.lower(onnx_ir.from_proto(model(text, weights)), machine("x86-64-v4"), lambda *_: None)
    return [k for k in held.kernels if k.startswith("attention")]


FORMS = [
    chain("1", scale="Mul({x}, s)", mask="2,1,5,7"),
    chain("2", scale="Div({x}, root)", mask="7", sizes=(5, 3)),
    chain("3", rows=33, keys=70, sizes=(32, 64), mask="1,1,33,70", scale="Mul({x}, s)"),
    chain("4", lead="4", rows=14, keys=32, sizes=(17, 40)),
    chain("5", rows=4, keys=1, sizes=(1, 1), mask="3,1,1"),
    chain("6", lead="1,2", rows=16, keys=64, sizes=(16, 48), scale="Mul({x}, s)", mask="16,64"),
    chain("7", rows=29, keys=17, sizes=(16, 33), mask="2,3,29,17"),
]


@pytest.mark.parametrize("cpu", ["x86-64-v3", "native"])
@pytest.mark.slow
@pytest.mark.ci
def test_every_form_of_the_chain(cpu: str) -> None:
    text = graph(*FORMS)
    assert len(kernels(text)) == len(FORMS)
    check(text, cpu=cpu)


OPEN = """g (float[b,s,48] x, float[b,s] seen) => (float[b,3,s,16] y)
    <float f = {0.3}, int64[4] heads = {0,0,3,16}, int64[2] axes = {1,2}> {
    h = Reshape(x, heads) q = Transpose<perm=[0,2,1,3]>(h) k = Transpose<perm=[0,2,3,1]>(h) v = Tanh(q)
    m = Unsqueeze(seen, axes) a = MatMul(q, k) b = Mul(a, f) c = Add(b, m) p = Softmax<axis=-1>(c) y = MatMul(p, v) }"""


def test_open_sizes() -> None:
    sizes = [{"b": b, "s": s} for b, s in ((1, 1), (2, 7), (1, 16), (3, 17), (2, 32), (1, 45), (1, 64))]
    assert len(kernels(OPEN)) == 1
    check(OPEN, sizes=sizes)


GROUPED = """g (float[2,6,9,8] q, float[2,2,11,8] keys, float[2,2,11,16] values) => (float[2,6,9,16] y)
    <float s = {0.3}, int64[1] two = {2}, int64[5] wide_k = {2,2,3,11,8}, int64[4] flat_k = {2,6,11,8},
     int64[5] wide_v = {2,2,3,11,16}, int64[4] flat_v = {2,6,11,16}> {
    k1 = Unsqueeze(keys, two) k2 = Expand(k1, wide_k) k3 = Reshape(k2, flat_k) k4 = Transpose<perm=[0,1,3,2]>(k3)
    v1 = Unsqueeze(values, two) v2 = Expand(v1, wide_v) v3 = Reshape(v2, flat_v)
    a = MatMul(q, k4) b = Mul(a, s) c = Add(b, causal) p = Softmax<axis=-1>(c) y = MatMul(p, v3) }"""


def test_heads_that_share_keys_and_a_causal_mask() -> None:
    mask = np.triu(np.full((9, 11), np.finfo(np.float32).min), 1)
    assert "attention" in kernels(GROUPED, {"causal": mask})[0]
    check(GROUPED, {"causal": mask})


def test_rows_that_see_nothing_and_large_scores() -> None:
    mask = np.zeros((9, 11), np.float32)
    mask[2], mask[3, :8], mask[4] = np.finfo(np.float32).min, -np.inf, 80.0
    check(GROUPED, {"causal": mask})


def test_what_stays_apart() -> None:
    shared = graph(chain("1")).replace("=> (", "=> (float[2,3,5,7] p1, ")  # the weights are read elsewhere
    short = graph(chain("1", rows=3))
    broadcast = graph(chain("1")).replace("float[2,3,7,8] v1", "float[1,3,7,8] v1")
    other = graph(chain("1")).replace("axis=-1", "axis=1")
    assert [kernels(text) for text in (shared, short, broadcast, other)] == [[], [], [], []]


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(4, 40),
    keys=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mask=st.sampled_from(["", "{k}", "{r},{k}", "3,1,{k}", "2,1,{r},{k}"]),
    cpu=st.sampled_from(["native", "x86-64-v3"]),
)
def test_any_size(rows: int, keys: int, sizes: tuple[int, int], mask: str, cpu: str) -> None:
    form = chain(
        "1",
        rows=rows,
        keys=keys,
        sizes=sizes,
        mask=mask.format(r=rows, k=keys),
        scale="Mul({x}, s)" if rows % 2 else "",
    )
    check(graph(form), cpu=cpu)
