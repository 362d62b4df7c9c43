"""Tests of passes read as two texts: a model before, in onnx.parser's syntax, and its nodes after, in ours."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir
import pytest

from mc_opt import ir, passes
from mc_opt.ir.run import interp, module

HEADER = '<ir_version: 10, opset_import: ["": 21]>'


def sampled(cases: Iterable[Any], chosen: Container[Any]) -> list[Any]:
    """Cases for `parametrize`: those chosen run in `make check` already, the others in `make test`."""
    marks = [pytest.mark.slow, pytest.mark.ci]
    return [case if case in chosen else pytest.param(case, marks=marks) for case in cases]


def model(text: str, weights: Mapping[str, np.ndarray] | None = None) -> onnx_ir.Model:
    """A model from onnx.parser's text; the header may be left out.

    What stands among the declared values without data is a weight: taken from `weights`, or else seeded by its
    name (values for a variance, so named, are positive).
    """
    text = dedent(text).strip()
    parsed = onnx.parser.parse_model(text if text.startswith("<") else f"{HEADER} {text}")
    made = {name for node in parsed.graph.node for name in node.output} | {i.name for i in parsed.graph.input}
    declared = [v for v in parsed.graph.value_info if v.name not in made]
    for value in declared:
        parsed.graph.value_info.remove(value)
        array = (weights or {}).get(value.name)
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = onnx_ir.DataType(value.type.tensor_type.elem_type).numpy()
        if array is None:
            rng = np.random.default_rng([ord(c) for c in value.name])
            array = rng.uniform(0.5, 2, shape) if value.name.startswith("var") else rng.standard_normal(shape)
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), value.name))
    loaded = onnx_ir.from_proto(parsed)
    ir.infer_shapes(loaded)
    ir.add_functions(loaded)
    ir.verify(loaded)
    return loaded


def check(
    spec: str,
    before: str,
    after: str | None = None,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    allow_scripts: bool = False,
) -> onnx_ir.Model:
    """Run passes on a model and hold the result to everything that holds for every pass.

    The nodes are those of `after`, line for line. The run itself verifies, runs both models in ONNX Runtime and
    holds exact passes to their promise; here the result also gives the same numbers in torch.
    """
    source = model(before, weights)
    context = passes.Context(allow_scripts=allow_scripts)
    result = passes.run(source, passes.Pipeline.parse(spec), context).model
    if after is not None:
        assert lines(ir.nodes_text(result.graph)) == lines(after)
    same_in_torch(result)
    return result


def lines(text: str) -> list[str]:
    """The lines of a text without indentation and empty ones."""
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def same_in_torch(result: onnx_ir.Model) -> None:
    """torch and ONNX Runtime give the same numbers, up to the order of fp32 sums."""
    session = ir.Session(result)
    graph = interp.interpret(result)
    for sample in ir.seeded_data(result, 2, 0):
        expected = session.run(sample.inputs)
        for name, value in module.run_module(graph, sample.inputs).items():
            np.testing.assert_allclose(value.detach(), expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def skipped(spec: str, before: str, weights: Mapping[str, np.ndarray] | None = None) -> dict[str, str]:
    """Layer to reason, for what one pass leaves alone; the model must come out as it went in where all is left."""
    source = model(before, weights)
    step = passes.Pipeline.parse(spec).passes[0]
    clone, context = source.clone(), passes.Context()
    rewrites = step.run(clone, context)
    assert rewrites or to_bytes(clone) == to_bytes(source)
    return dict(context.log.skips)


def apply(spec: str, source: onnx_ir.Model) -> tuple[onnx_ir.Model, int]:
    """One pass on a clone, without any check: the clone and the number of rewrites."""
    clone = source.clone()
    step = passes.Pipeline.parse(spec).passes[0]
    rewrites = step.run(clone, passes.Context(allow_scripts=True))
    ir.add_functions(clone)
    return clone, rewrites


def to_bytes(source: onnx_ir.Model) -> bytes:
    """The model as one proto: equal bytes, equal models."""
    proto: bytes = onnx_ir.to_proto(source).SerializeToString(deterministic=True)
    return proto


def largest_difference(a: onnx_ir.Model, b: onnx_ir.Model, inputs: Mapping[str, np.ndarray]) -> float:
    """max |a − b| over all outputs, in ONNX Runtime."""
    first, second = ir.Session(a).run(inputs), ir.Session(b).run(inputs)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def script(folder: Path, body: str) -> Path:
    """A Python file for `surgeon`."""
    path = folder / "fix.py"
    path.write_text(dedent(body))
    return path
