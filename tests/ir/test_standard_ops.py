"""Each standard op: the interpreter against ONNX Runtime, values, types and shapes, and a finite gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import helper

from mc_opt.ir.run.ort import Session

torch = pytest.importorskip("torch")

from mc_opt.ir.run.interp import interpret  # noqa: E402 - needs torch
from mc_opt.ir.run.module import run_module  # noqa: E402
from mc_opt.ir.run.standard import tables  # noqa: E402
from tests.ir._standard_cases import ALL, Case, f  # noqa: E402

# Sums of at most a few hundred fp32 terms in another order, and another implementation of exp, tanh and erf.
TOLERANCE = 2e-5


def one_node(c: Case) -> onnx_ir.Model:
    names = ["" if a is None else f"in.{k}" for k, a in enumerate(c.inputs)]
    outputs = [f"out.{k}" for k in range(c.outputs)]
    graph = helper.make_graph(
        [helper.make_node(c.op, names, outputs, **c.attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, c.inputs, strict=True)
            if array is not None
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", c.opset)], ir_version=10)
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize("c", ALL, ids=str)
def test_equals_onnx_runtime(c: Case) -> None:
    torch.set_num_threads(1)
    model = one_node(c)
    feeds = {f"in.{k}": array for k, array in enumerate(c.inputs) if array is not None}
    expected = Session(model, optimise=False).run(feeds)
    inputs = {
        name: torch.from_numpy(array.copy()).requires_grad_(array.dtype.kind == "f") for name, array in feeds.items()
    }
    actual = run_module(interpret(model), inputs)
    assert list(actual) == list(expected)
    for name, reference in expected.items():
        found = actual[name].detach().numpy()
        assert found.dtype == reference.dtype
        assert found.shape == reference.shape
        if reference.dtype.kind == "f":
            tolerance = TOLERANCE if reference.dtype == np.float32 else 2e-3  # half precision has 11 bits
            np.testing.assert_allclose(found, reference, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(found, reference)
    assert_finite_gradients(list(actual.values()), list(inputs.values()))


def assert_finite_gradients(outputs: list[Any], inputs: list[Any]) -> None:
    losses = [y.double().sum() for y in outputs if y.requires_grad]
    if not losses or not all(torch.isfinite(loss) for loss in losses):
        return
    sum(losses).backward()
    for x in inputs:
        assert x.grad is None or torch.isfinite(x.grad).all()


def test_every_op_of_the_tables_is_tested() -> None:
    single, multiple = tables()
    # Swish is younger than what ONNX Runtime has; it is held to its formula below.
    assert {*single, *multiple} - {c.op for c in ALL} == {"Swish"}


def test_swish() -> None:
    x = f(3, 4)
    swish = tables()[0]["Swish"]
    np.testing.assert_allclose(
        swish(torch.from_numpy(x), alpha=0.5).numpy(), x / (1 + np.exp(-0.5 * x)), rtol=TOLERANCE
    )
