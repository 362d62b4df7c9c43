"""What x86 refuses: by name, before a build starts where that is possible, always with what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir, targets
from mc_opt.targets import _machine
from mc_opt.targets._relax import lower
from tests._harness import model

pytestmark = [pytest.mark.tvm, pytest.mark.zig, pytest.mark.slow, pytest.mark.ci]

HEADER = '<ir_version: 10, opset_import: ["": 21]>'


def test_a_symbolic_shape_ends_with_the_option_to_paste() -> None:
    symbolic = model(f"{HEADER} g (float[n,3,h,w] x) => (float[n,3,h,w] y) {{ y = Relu(x) }}")
    with pytest.raises(targets.TargetError, match=r"'x' has .* f32\[n,3,h,w\], .*axis 2; .*--shape x=1x3x224x224$"):
        targets.parse_target("x86").check(symbolic)


def test_control_flow_names_the_node_and_the_pass(tmp_path: Path) -> None:
    text = f"""{HEADER} g (bool c, float[3] x) => (float[3] y) {{
        y = If (c) <then_branch = a () => (float[3] p) {{ p = Relu(x) }},
                    else_branch = b () => (float[3] q) {{ q = Neg(x) }}>
    }}"""
    with pytest.raises(targets.TargetError, match=r"If .*'specialize\{c=VALUE\},fold-constants'"):
        targets.parse_target("x86").compile(model(text), tmp_path, lambda *_: None)


def test_a_branch_that_a_shape_decides_needs_folding_alone(tmp_path: Path) -> None:
    text = f"""{HEADER} g (float[3] x) => (float[3] y) {{
        s = Shape (x)  n = Squeeze (s)  three = Constant <value_int = 3> ()  c = Equal (n, three)
        y = If (c) <then_branch = a () => (float[3] p) {{ p = Relu(x) }},
                    else_branch = b () => (float[3] q) {{ q = Neg(x) }}>
    }}"""
    with pytest.raises(targets.TargetError, match=r"If .*follows from constants and shapes: --passes fold-constants$"):
        targets.parse_target("x86").compile(model(text), tmp_path, lambda *_: None)


def test_an_op_without_a_kernel_is_named(tmp_path: Path) -> None:
    text = f"{HEADER} g (float[3,3] x) => (float y) {{ y = Det(x) }}"
    with pytest.raises(targets.TargetError, match="x86 has no kernel for Det; build --target onnx"):
        targets.parse_target("x86").compile(model(text), tmp_path, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_a_shape_computed_at_run_time_is_named() -> None:
    text = f"{HEADER} g (float[6] x, int64[2] s) => (float[2,3] y) {{ y = Reshape(x, s) }}"
    with pytest.raises(targets.TargetError, match=r"the new shape 's' is computed at run time"):
        lower.lower(model(text), _machine.named("x86-64-v3"), lambda *_: None)


@pytest.mark.parametrize("cpu", ["haswell", "znver3", "skylake-avx512"])
def test_a_build_for_a_named_processor_runs_on_a_later_one(cpu: str, tmp_path: Path) -> None:
    small = model(f"{HEADER} g (float[3,40] x) => (float y) {{ s = Softmax (x)  y = ReduceMax<keepdims=0> (s) }}")
    target = targets.parse_target(f"x86{{cpu={cpu}}}")
    target.compile(small, tmp_path, lambda *_: None)
    x = np.linspace(-1, 1, 120, dtype=np.float32).reshape(3, 40)
    artefact = target.load(tmp_path)
    if artefact is None:
        pytest.skip(f"this processor is older than {cpu}")
    (got,) = artefact.run({"x": x}).values()
    np.testing.assert_allclose(got, ir.Session(small).run({"x": x})["y"], rtol=1e-6)


def test_the_build_s_target_is_spelled_out() -> None:
    text = targets.parse_target("x86{cpu=x86-64-v3}").resolved()
    assert text.startswith("x86{cpu=x86-64-v3 features=+avx,+avx2,")
    assert "cpu=native" not in targets.parse_target("x86").resolved()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(float[3] x) => (float[3] y, string[1] s) { y = Relu(x) }", r"output 's' is s\[1\]; "),
        ("(float[3] x) => (seq(float[3]) s) { s = SequenceConstruct(x) }", "output 's' is "),
        ("(bfloat16[3] x) => (bfloat16[3] y) { y = Relu(x) }", r"input 'x' is bf16\[3\]; expected a tensor of bool, "),
        ("(float[0,3] x) => (float[0,3] y) { y = Relu(x) }", r"input 'x' is f32\[0,3\] and holds no element"),
    ],
)
def test_types_that_no_kernel_takes_are_named(text: str, message: str, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(f"{HEADER} g {text}")
    if "string" in text:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(["a"], object), "s"))
    with pytest.raises(targets.TargetError, match=message):
        targets.parse_target("x86").compile(onnx_ir.from_proto(proto), tmp_path, lambda *_: None)
