"""The target `cuda`. No test here runs a kernel on a GPU, but the last one where there is a GPU.

What is emitted for a GPU runs on the processor with loops in the place of threads, and equals ONNX Runtime; what is
scheduled for a GPU goes through the assembler where there is one, and as C++ through fibers where there is g++.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

import mc_opt
from mc_opt import ir, targets
from mc_opt.ir import IRError
from mc_opt.targets import _cuda, _gpu, _machine
from mc_opt.targets._manifest import Port
from mc_opt.targets._runner import runner
from tests._harness import model

pytestmark = pytest.mark.tvm

if importlib.util.find_spec("tvm") is not None:
    from tests.targets import _cuda_on_cpu, _kernels
    from tests.targets._kernels import check, normal
    from tests.targets.test_kernels_gemm import packed as lookup
    from tests.targets.test_kernels_kron import _text as kron

NETWORK = """g (float[1,3,13,13] x) => (float[1,10] y) {
    a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b) r = Relu(a)
    d = Conv<group=16, pads=[1,1,1,1]>(r, dw) s = Conv<group=4>(d, gw) t = Add(s, s)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t) p = GlobalAveragePool(m) f = Flatten(p)
    y = Gemm<transB=1>(f, fw, fb) }"""
BLOCK = """g (float[2,7,32] x) => (float[2,7,32] y) {
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t)
    p = Softmax(s) o = MatMul(p, v) a = Add(o, x) z = LayerNormalization(a, gain, bias) u = Gelu(z)
    y = MatMul(u, wo) }"""
LSTM = """g (float[5,2,6] x) => (float[5,2,2,20] y, float[2,2,20] h, float[2,2,20] c) {
    y, h, c = LSTM<direction="bidirectional", hidden_size=20>(x, w, r, b) }"""
GRU = """g (float[5,2,6] x) => (float[5,1,2,33] y) { y = GRU<direction="reverse", hidden_size=33>(x, w, r, b) }"""


def example(name: str) -> tuple[str, dict[str, np.ndarray]]:
    match name:
        case "network":
            weights = {"w": normal(16, 3, 3, 3), "b": normal(16), "dw": normal(16, 1, 3, 3), "gw": normal(20, 4, 1, 1)}
            return NETWORK, weights | {"fw": normal(10, 20), "fb": normal(10)}
        case "block":
            matrices = {f"w{k}": normal(32, 32, seed=i) for i, k in enumerate("qkvo")}
            return BLOCK, matrices | {"gain": normal(32), "bias": normal(32)}
        case "lstm":
            return LSTM, {"w": normal(2, 80, 6), "r": normal(2, 80, 20, seed=1), "b": normal(2, 160)}
        case _:
            return GRU, {"w": normal(1, 99, 6), "r": normal(1, 99, 33, seed=1), "b": normal(1, 198)}


KRON = [(op, name) for op in ("SeKronConv", "KronLinear") for name in ("gkpd-bias", "free")]


def packed(bits: int, consumer: str) -> tuple[str, dict[str, np.ndarray]]:
    """A model whose weight is a Lookup of this width."""
    shape = {"conv": (12, 8, 3, 3), "matmul": (24, 18), "vector": (24, 18), "gather": (9, 14)}[consumer]
    node, weights = lookup(shape, [1 if consumer in ("matmul", "vector") else 0], bits)
    texts = {
        "conv": f"g (float[1,8,9,9] x) => (float[1,12,9,9] y) {{ {node} y = Conv<pads=[1,1,1,1]>(x, w) }}",
        "matmul": f"g (float[5,24] x) => (float[5,18] y) {{ {node} y = MatMul(x, w) }}",
        "vector": f"g (float[1,24] x) => (float[1,18] y) {{ {node} y = MatMul(x, w) }}",
        "gather": f"g (int64[5] x) => (float[5,14] y) {{ {node} y = Gather(w, x) }}",
    }
    return texts[consumer], weights


# --- on the processor ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["network", "block", "lstm", "gru"])
def test_what_is_emitted_for_a_gpu_equals_the_export_on_the_processor(name: str) -> None:
    check(*example(name), cpu="cuda")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("consumer", ["conv", "matmul", "vector", "gather"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_weights_of_every_width(bits: int, consumer: str) -> None:
    check(*packed(bits, consumer), cpu="cuda")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("key", KRON, ids="-".join)
def test_kronecker_layers(key: tuple[str, str]) -> None:
    check(*kron(key), cpu="cuda")


@pytest.mark.slow
@pytest.mark.ci
def test_any_size_of_a_batch_and_a_sequence() -> None:
    text = BLOCK.replace("[2,7,32]", "[b,s,32]")
    check(
        text, example("block")[1], cpu="cuda", sizes=[{"b": b, "s": s} for b in (1, 3) for s in (1, 7, 16)], quiet=False
    )


def test_a_state_that_no_block_can_share_is_refused_by_name() -> None:
    from mc_opt.targets._relax import lower

    held = onnx_ir.from_proto(_kernels.model(*example("gru")))
    ir.infer_shapes(held)
    small = dataclasses.replace(_machine.cuda("sm_80"), l1=4 * 2 * 32)  # 32 units: h, and what the gate resets of it
    with pytest.raises(targets.TargetError, match=r"GRU '.*': 33 hidden units; expected at most 32"):
        lower.lower(held, small, lambda _done, _total, _what: None)


PACKED = """g (float[1,16,9,9] x) => (float[1,40] y) {
    c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)
    y = MatMul(f, m) }"""


def built(name: str, target: str, folder: Path) -> tuple[onnx.ModelProto, mc_opt.Report]:
    """The export of an example, and what building it said; `packed` has weights of three bits."""
    if name == "packed":
        weights = {"w": normal(32, 16, 3, 3), "b": normal(32), "m": normal(32, 40)}
        held = onnx_ir.from_proto(_kernels.model(PACKED, weights))
    else:
        held = onnx_ir.from_proto(_kernels.model(*example(name)))
    ir.infer_shapes(held)
    if name == "packed":
        held, _ = mc_opt.compress(held, "denseshift{bits=3 skip=none}")
        assert sum(node.op_type == "Lookup" for node in held.graph) == 2
    return onnx_ir.to_proto(held), mc_opt.build(held, target, folder)


@pytest.mark.zig
@pytest.mark.slow
@pytest.mark.parametrize("name", ["network", "block", "lstm", "gru", "packed"])
def test_the_scheduled_kernels_equal_the_export_as_fibers(name: str, tmp_path: Path) -> None:
    """The artefact's own CUDA source, barriers and launches, by g++: close to a GPU, and none."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here: the scheduled kernels did not run")
    proto, _ = built(name, "cuda{code=source}", tmp_path)
    inputs = _kernels.feeds(proto)
    got = _cuda_on_cpu.run(tmp_path / "cuda", inputs)
    for wanted, array in zip(_kernels.reference(proto, inputs), got.values(), strict=True):
        assert np.abs(wanted - array).max() <= 1e-5 * np.abs(wanted).max()  # float32 sums in another order


@pytest.mark.zig
@pytest.mark.slow
def test_one_artefact_of_open_sizes_as_fibers(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here: the scheduled kernels did not run")
    proto = _kernels.model(BLOCK.replace("[2,7,32]", "[b,s,32]"), example("block")[1])
    held = onnx_ir.from_proto(proto)
    ir.infer_shapes(held)
    mc_opt.build(held, "cuda{code=source}", tmp_path)
    for b, s in ((1, 1), (3, 16), (2, 70)):
        inputs = _kernels.feeds(proto, {"b": b, "s": s})
        (wanted,) = _kernels.reference(proto, inputs)
        (array,) = _cuda_on_cpu.run(tmp_path / "cuda", inputs).values()
        assert np.abs(wanted - array).max() <= 1e-5 * np.abs(wanted).max()


# --- assembled, not run --------------------------------------------------------------------------


@pytest.mark.zig
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_assembles_every_kernel_and_nothing_is_executed(arch: str, tmp_path: Path) -> None:
    if _cuda.nvcc() is None:
        pytest.skip("nvcc is not here: no kernel was assembled")
    for name in ("network", "block", "lstm", "packed"):
        source = tmp_path / name / "source"
        built(name, f"cuda{{arch={arch} code=source}}", source)
        kernels = _cuda.kernels(_cuda_on_cpu.source_of(source / "cuda/model.so"))
        _, report = built(name, f"cuda{{arch={arch} code=fatbin}}", tmp_path / name)
        library = (tmp_path / name / "cuda/model.so").read_bytes()
        assert report.targets[0].resolved == f"cuda{{arch={arch} code=fatbin}}"
        assert kernels
        assert set(kernels) <= _cuda.compiled_kernels(library)
        assert b"__global__" not in library  # PTX and machine code, and no source


@pytest.mark.slow
def test_the_program_for_a_gpu_compiles(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here: runner.cc was not compiled")
    for shape in ((2, 3), ("batch", 3)):
        (tmp_path / "runner.cc").write_text(runner((Port("x", shape, "float32"),), (), _machine.cuda("sm_80")))
        places = [importlib.util.find_spec(name) for name in ("tvm", "tvm_ffi")]
        words = [f"-I{p.submodule_search_locations[0]}/include" for p in places if p and p.submodule_search_locations]
        subprocess.run(["g++", "-std=c++17", "-fsyntax-only", *words, "runner.cc"], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_nvrtc_compiles_what_nvcc_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if _cuda.nvrtc() is None:
        pytest.skip("NVRTC is not here: no kernel was compiled by it")
    built("network", "cuda{code=source}", tmp_path)
    source = _cuda_on_cpu.source_of(tmp_path / "cuda/model.so")
    monkeypatch.setattr(_cuda, "nvcc", lambda: None)
    assert _cuda.compile_source(source, "sm_90", "cubin").startswith(b"\x7fELF")
    assert b".target sm_90" in _cuda.compile_source(source, "sm_90", "ptx")


def test_kernels_are_found_in_source_and_in_compiled_code() -> None:
    source = (
        'extern "C" __global__ void __launch_bounds__(64) a_kernel(float* x) {\n __global__ void b_kernel_1(int n) {'
    )
    assert _cuda.kernels(source) == ["a_kernel", "b_kernel_1"]
    assert _cuda.compiled_kernels(b"x\0.text.a_kernel\0.nv.info\0 .visible .entry b_kernel(") == {
        "a_kernel",
        "b_kernel",
    }


# --- refusals ------------------------------------------------------------------------------------


def test_options() -> None:
    assert str(targets.parse_target("cuda")) == "cuda"
    assert str(targets.parse_target("cuda{arch=sm_90 code=ptx}")) == "cuda{arch=sm_90 code=ptx}"
    with pytest.raises(ir.OptionError, match="sm_80, sm_86"):
        targets.parse_target("cuda{arch=sm_42}")


def test_without_a_compiler_only_source_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "nvcc", lambda: None)
    monkeypatch.setattr(_cuda, "nvrtc", lambda: None)
    assert targets.parse_target("cuda").resolved() == "cuda{arch=sm_80 code=source}"
    small = model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(IRError, match=r"neither nvcc nor NVRTC is here to make it; pip install nvidia-cuda-nvrtc"):
        targets.parse_target("cuda{code=ptx}").check(small)
    monkeypatch.setattr(_cuda, "nvrtc", lambda: "libnvrtc.so.13")
    assert targets.parse_target("cuda").resolved() == "cuda{arch=sm_80 code=cubin}"
    with pytest.raises(IRError, match="needs nvcc, and only NVRTC is here; build with code=cubin or code=ptx"):
        targets.parse_target("cuda{code=fatbin}").check(small)


@pytest.mark.zig
@pytest.mark.slow
@pytest.mark.ci
def test_loading_without_a_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mc_opt.build(model("g (float[2] x) => (float[2] y) { y = Relu(x) }"), "cuda{code=source}", tmp_path)
    monkeypatch.setattr(_gpu, "find", lambda: "NVIDIA's driver is not here (libcuda.so.1)")
    with pytest.raises(IRError, match=r"cannot run here: built for sm_80, and NVIDIA's driver is not here") as caught:
        mc_opt.load(tmp_path, target="cuda")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(_gpu, "find", lambda: _gpu.Gpu("Tesla T4", 75))
    with pytest.raises(IRError, match=r"this GPU \(Tesla T4\) is sm_75; build with cuda\{arch=sm_75\}"):
        mc_opt.load(tmp_path, target="cuda")


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.zig
@pytest.mark.parametrize("name", ["network", "block", "lstm", "gru", "packed"])
def test_an_artefact_on_a_gpu_equals_the_export(name: str, tmp_path: Path) -> None:
    gpu = _gpu.find()
    assert isinstance(gpu, _gpu.Gpu), gpu
    proto, _ = built(name, f"cuda{{arch=sm_{gpu.architecture}}}", tmp_path)
    inputs = _kernels.feeds(proto)
    got = mc_opt.load(tmp_path, target="cuda").run(inputs)
    for wanted, array in zip(_kernels.reference(proto, inputs), got.values(), strict=True):
        assert np.abs(wanted - array).max() <= 1e-5 * np.abs(wanted).max()
