from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets._kernels import check, normal
from tests.targets.test_kernels_gemm import packed

pytestmark = pytest.mark.tvm

PROCESSORS = ["native", "x86-64-v3"]
GROUPED = {"group": 16, "scale": "groups"}


def text(rows, depth, columns, node):
    shape = f"float[{rows},{depth}] x, float[{columns}] b"
    return f"g ({shape}) => (float[{rows},{columns}] y) {{ {node} c = MatMul(x, w) y = Add(c, b) }}"


@pytest.mark.parametrize("cpu", PROCESSORS)
@pytest.mark.parametrize("form", [{"bits": 4}, {"bits": 2, **GROUPED}, {"bits": 3, **GROUPED, "offset": True}], ids=str)
@pytest.mark.parametrize("rows", [2, 8, 16, 17, 41])
def test_rows_in_registers_and_in_blocks(rows, form, cpu):
    node, weights = packed((301, 70), (1,), **form)
    check(text(rows, 301, 70, node), weights, cpu=cpu)


def test_a_gemm_of_some_rows_adds_its_bias():
    node, weights = packed((50, 67), (0,), 4)
    check(
        f"g (float[20,67] x) => (float[20,50] y) {{ {node} y = Gemm<transB=1>(x, w, b) }}", weights | {"b": normal(50)}
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 66),
    depth=st.integers(1, 200),
    columns=st.integers(1, 130),
    bits=st.integers(1, 5),
    group=st.sampled_from([0, 8, 32, 33, 64]),
    offset=st.booleans(),
    cpu=st.sampled_from(PROCESSORS),
)
def test_products_of_any_size(rows, depth, columns, bits, group, offset, cpu):
    scale = "groups" if group else "rows"
    node, weights = packed((depth, columns), (1,), bits, group=group, scale=scale, offset=offset)
    check(text(rows, depth, columns, node), weights, cpu=cpu)
