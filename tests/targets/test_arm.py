"""The target `arm`: artefacts of both forms run under qemu, and what their machine code consists of."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir
from tests import _qemu
from tests._harness import model as parsed
from tests.targets._kernels import library, machine, normal
from tests.targets._kernels import model as kernel_model
from tests.targets.test_static import MODELS, build, compressed

pytestmark = [pytest.mark.slow, pytest.mark.tvm, pytest.mark.zig]
CPUS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-n2", "neoverse-v1")


def equal(model: onnx_ir.Model, folder: Path) -> None:
    """The artefact gives what ONNX Runtime gives, call after call: fp32 sums in another order."""
    inputs = [s.inputs for s in ir.seeded_data(model, 3, 3)]
    session = ir.Session(model)
    for given, outputs in zip(inputs, _qemu.run_arm(folder, inputs), strict=True):
        expected = session.run(given)
        assert list(outputs) == list(expected)
        for name, wanted in expected.items():
            assert outputs[name].dtype == wanted.dtype
            np.testing.assert_allclose(outputs[name], wanted, rtol=0, atol=1e-4 * np.ptp(wanted), err_msg=name)


CI = [("cnn", "vm"), ("lstm", "vm"), ("cnn", "static")]


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[pytest.mark.ci] if (name, form) in CI else [])
        for name in MODELS
        for form in ("vm", "static")
    ],
)
def test_an_artefact_equals_the_model(name: str, form: str, tmp_path: Path) -> None:
    model = compressed(name)
    prefix = f" prefix={name}" if form == "static" else ""
    equal(model, build(model, tmp_path / "arm", f"arm{{form={form}{prefix}}}"))


@pytest.mark.qemu
@pytest.mark.parametrize("cpu", CPUS)
def test_every_processor(cpu: str, tmp_path: Path) -> None:
    model = compressed("cnn")
    equal(model, build(model, tmp_path / "arm", f"arm{{cpu={cpu}}}"))


@pytest.mark.qemu
def test_threads_share_large_kernels(tmp_path: Path) -> None:
    model = parsed(
        "g (float[1,16,40,40] x) => (float[1,32,40,40] y) <float[32,16,3,3] w> { y = Conv<pads=[1,1,1,1]>(x, w) }"
    )
    folder = build(model, tmp_path / "arm", "arm{threads=2}")
    assert '"threads": 2' in (folder / "manifest.json").read_text()
    equal(model, folder)


@pytest.mark.qemu
def test_a_wrong_shape_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """Of open sizes: kernels of fixed ones look at no shape, their loaders have."""
    model = parsed("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    folder = build(model, tmp_path / "arm", "arm")
    with _qemu.artefact(folder) as run:
        with pytest.raises(RuntimeError, match="the artefact under qemu: "):
            run({"x": np.ones((3, 5), np.float32)})
        np.testing.assert_array_equal(run({"x": np.ones((2, 4), np.float32)})["y"], 1)


# --- machine code --------------------------------------------------------------------------------

# (value, mask) of an instruction word.
FMLA = ((0x4E20CC00, 0xFFE0FC00), (0x4F801000, 0xFFC0F400))  # of four lanes: by a vector, by one lane of another
TBL = ((0x4E000000, 0xFFE0FC00),)  # one register of 16 bytes
TWO = """g (float[1,64] x, float[8,64] z) => (float[1,48] y, float[8,48] v)
    {
        w = mc_opt.Lookup<bits=4, shape=[64,48], axes=[1], group_size=0>(codes, book, scale)
        y = MatMul(x, w)
        v = MatMul(z, w)
    }"""


def instructions(library: Path) -> np.ndarray:
    """The words of the executable segments of a shared library."""
    data = library.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01" and struct.unpack_from("<H", data, 18) == (183,), "no 64-bit ARM library"
    return np.concatenate([np.frombuffer(data[at : at + size // 4 * 4], "<u4") for at, size in _segments(data)])


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for k in range(count):
        kind, flags, offset = struct.unpack_from("<IIQ", data, table + k * size)
        (length,) = struct.unpack_from("<Q", data, table + k * size + 32)
        if kind == 1 and flags & 1:
            yield offset, length


def count(words: np.ndarray, forms: tuple[tuple[int, int], ...]) -> int:
    return sum(int(np.count_nonzero(words & mask == value)) for value, mask in forms)


@pytest.mark.parametrize("powers", [pytest.param(False, marks=pytest.mark.ci), True])
def test_products_are_fmla_and_lookups_are_tbl(powers: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    book = 2.0 ** -np.arange(16) if powers else rng.standard_normal(16)
    codes = ir.pack_codes(rng.integers(0, 16, (48, 64)).astype(np.uint8), 4)
    weights = {"codes": codes, "book": book.astype(np.float32), "scale": np.ones((48, 1), np.float32)}
    words = machine_code(TWO, weights, tmp_path)
    # 8 codes of 4 lanes a word: 2 (of powers) or 4 tables for 4 of them, in a product of 2 vectors and in a decode.
    tables = 2 if powers else 4
    assert count(words, TBL) >= (2 + 1) * 2 * tables
    assert count(words, FMLA) >= 2 * 8 + 8
    words = machine_code("g (float[8,64] z) => (float[8,48] v) { v = MatMul(z, w) }", {"w": normal(64, 48)}, tmp_path)
    assert count(words, TBL) == 0 and count(words, FMLA) >= 8


def machine_code(text: str, weights: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    return instructions(library(kernel_model(text, weights), machine("cortex-a72"), folder)[0])


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for form in ("vm", "static"):
        made = [build(compressed("lstm"), tmp_path / f"{form}{k}", f"arm{{form={form}}}") for k in (1, 2)]
        first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in made)
        assert first == second
