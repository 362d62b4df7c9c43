"""Writing models: the round trip, the same bytes, big weights streamed, and nothing left of what failed."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mc_opt import ir
from mc_opt.ir.io import direct, save

LINEAR = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 64] x) => (float[n, 64] y, float[n, 64] z) { y = MatMul (x, w) z = MatMul (x, v) }"""


def model(weight: np.ndarray, *, tied: bool = False) -> onnx_ir.Model:
    """y = x·w, z = x·v; `tied`: one tensor for both."""
    made = onnx_ir.from_proto(onnx.parser.parse_model(LINEAR))
    w = onnx_ir.Tensor(weight, name="w")
    for name, tensor in (("w", w), ("v", w if tied else onnx_ir.Tensor(weight[::-1].copy(), name="v"))):
        value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value, value.shape, value.dtype = tensor, onnx_ir.Shape(weight.shape), tensor.dtype
        made.graph.register_initializer(value)
    return made


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of 16 KiB goes to the data file, however small the model."""
    monkeypatch.setattr(save, "INLINE_LIMIT", 0)


def weight(size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    saved = ir.save_model(model(weight()), tmp_path / "out")
    assert files(tmp_path / "out") == ["model.onnx"]
    (path,) = saved.paths
    assert saved.bytes == (path.stat().st_size,)
    assert saved.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),)
    np.testing.assert_array_equal(ir.load_model(path).graph.initializers["w"].const_value.numpy(), weight())


def test_a_path_that_ends_in_onnx_is_the_file(tmp_path: Path) -> None:
    ir.save_model(model(weight()), tmp_path / "net.onnx")
    assert files(tmp_path) == ["net.onnx"]


@pytest.mark.usefixtures("external")
def test_big_weights_go_to_a_data_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    saved = ir.save_model(model(weight()), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert files(tmp_path) == ["model.onnx", "model.onnx.data"]
    for path, size, digest in zip(saved.paths, saved.bytes, saved.sha256, strict=True):
        assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (size, digest)
    assert seen[-1] == (saved.bytes[1], saved.bytes[1])
    loaded = ir.load_model(saved.paths[0])
    np.testing.assert_array_equal(loaded.graph.initializers["v"].const_value.numpy(), weight()[::-1])
    onnx.checker.check_model(str(saved.paths[0]))


@pytest.mark.usefixtures("external")
def test_a_tensor_that_two_weights_share_is_stored_once(tmp_path: Path) -> None:
    ir.save_model(model(weight(), tied=True), tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size == 64 * 64 * 4


@pytest.mark.usefixtures("external")
def test_a_model_may_replace_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    path = ir.save_model(model(weight()), tmp_path).paths[0]
    loaded = ir.load_model(path)
    first = loaded.graph.initializers["w"].const_value.numpy()
    loaded.graph.initializers["v"].const_value = onnx_ir.Tensor(np.zeros((128, 64), np.float32), name="v")
    loaded.graph.initializers["v"].shape = onnx_ir.Shape((128, 64))
    # v comes first now, so that w lies elsewhere in the new file.
    loaded.graph.register_initializer(loaded.graph.initializers.pop("w"))
    ir.save_model(loaded, tmp_path)
    np.testing.assert_array_equal(first, weight())
    np.testing.assert_array_equal(ir.load_model(path).graph.initializers["w"].const_value.numpy(), weight())


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("dtype", ["INT4", "UINT2", "BFLOAT16", "FLOAT16", "INT64", "BOOL", "DOUBLE"])
def test_every_type_survives(tmp_path: Path, dtype: str) -> None:
    kind = onnx_ir.DataType[dtype]
    array = np.random.default_rng(0).integers(0, 2, (257, 513)).astype(kind.numpy())
    value = onnx_ir.Value(
        name="w",
        const_value=onnx_ir.Tensor(array, kind),
        type=onnx_ir.TensorType(kind),
        shape=onnx_ir.Shape(array.shape),
    )
    graph = onnx_ir.Graph([], [value], nodes=[], initializers=[value], opset_imports={"": 25}, name="g")
    path = ir.save_model(onnx_ir.Model(graph, ir_version=13), tmp_path).paths[0]
    read = ir.load_model(path).graph.initializers["w"].const_value
    assert read.dtype == kind
    np.testing.assert_array_equal(read.numpy(), array)
    again = ir.save_model(ir.load_model(path), tmp_path / "again")
    assert again.paths[0].read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("external")
def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    ir.save_model(model(weight()), tmp_path / "a")
    path = ir.save_model(ir.load_model(tmp_path / "a/model.onnx"), tmp_path / "b").paths[0]
    for name in ("model.onnx.data", "model.onnx"):
        saved_again = ir.save_model(ir.load_model(path), tmp_path / "c").paths[0].parent / name
        assert (tmp_path / "b" / name).read_bytes() == saved_again.read_bytes()


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    made = model(weight())
    before = onnx_ir.to_proto(made).SerializeToString()
    ir.save_model(made, tmp_path)
    assert onnx_ir.to_proto(made).SerializeToString() == before


arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=4, max_side=5),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=arrays, name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_save_and_load_are_inverse(tmp_path: Path, array: np.ndarray, name: str) -> None:
    array = np.nan_to_num(array)
    tensor = onnx_ir.Tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph = onnx_ir.Graph([], [value], nodes=[], initializers=[value], opset_imports={"": 21}, name="g")
    path = ir.save_model(onnx_ir.Model(graph, ir_version=10), tmp_path).paths[0]
    read = ir.load_model(path, check="structure").graph.initializers[name].const_value.numpy()
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_a_file_that_reads_back_different_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: object, **__: object) -> onnx_ir.Model:
        return model(np.zeros((64, 64), np.float32))

    made = onnx_ir.from_proto(onnx_ir.to_proto(model(weight())))
    monkeypatch.setattr(save, "read_model", other)
    with pytest.raises(ir.IRError, match=r"weight 'w' reads back different"):
        ir.save_model(made, tmp_path / "out")
    ir.save_model(made, tmp_path / "out", reload="structure")
    monkeypatch.setattr(save, "read_model", lambda *_, **__: onnx_ir.from_proto(onnx.parser.parse_model(LINEAR)))
    with pytest.raises(ir.IRError, match="reads back as"):
        ir.save_model(made, tmp_path / "new/out", reload="structure")
    assert files(tmp_path) == ["out", "out/model.onnx"]


# A disk that fills up, a process that is interrupted


@pytest.mark.usefixtures("external")
def test_a_disk_without_room_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ir.LimitError, match=r"needs \d+ bytes, the disk has 1000 left"):
        ir.save_model(model(weight()), tmp_path / "a/b")
    assert not files(tmp_path)


@pytest.mark.usefixtures("external")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(direct, "_write", full)
    with pytest.raises(ir.LimitError, match="No space left on device"):
        ir.save_model(model(weight()), tmp_path / "a/b")
    assert not files(tmp_path)


def test_a_real_limit_on_file_size_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import resource, numpy as np
from tests.ir.test_io_save import model, weight
from mc_opt import ir
made = model(weight())
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ir.save_model(made, {str(tmp_path / "out")!r})
except ir.LimitError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert "cannot be written (File too large)" in done.stdout
    assert not files(tmp_path)


@pytest.mark.usefixtures("external")
def test_an_interrupt_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir.save_model(model(weight()), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(direct, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ir.save_model(model(weight() * 2), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ir.FolderError, match="is a file, a folder was expected"):
        ir.save_model(model(weight()), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert issubclass(ir.FolderError, PermissionError) and issubclass(ir.FolderError, ir.OptionError)


BIG = """
import re, sys, threading, time
import onnx_ir
from mc_opt import ir

layers, rows, folder = 20, 4096, sys.argv[1]
size = rows * rows * 4
with open(folder + "/raw", "wb") as file:
    file.truncate(size * layers)

def value(name, shape):
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(shape))

first = last = value("x", (1, rows))
weights, nodes = [], []
for i in range(layers):
    weights.append(value(f"w{i}", (rows, rows)))
    weights[-1].const_value = onnx_ir.ExternalTensor(
        "raw", i * size, size, onnx_ir.DataType.FLOAT, shape=weights[-1].shape, name=f"w{i}"
    )
    out = value(f"y{i}", (1, rows))
    nodes.append(onnx_ir.Node("", "MatMul", [last, weights[-1]], outputs=[out]))
    last = out
graph = onnx_ir.Graph([first], [last], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g")
onnx_ir.save(onnx_ir.Model(graph, ir_version=10), folder + "/big.onnx")

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
model = ir.load_model(folder + "/big.onnx", check=sys.argv[2])
ir.save_model(model, folder + "/out", reload=sys.argv[2])
print(peak >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("check", ["structure", "full"])
def test_a_model_of_gigabytes_takes_little_memory(tmp_path: Path, check: str) -> None:
    done = subprocess.run([sys.executable, "-c", BIG, str(tmp_path), check], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # MiB; the weights are 1.25 GiB
    assert (tmp_path / "out/model.onnx.data").stat().st_size == 20 * 4096 * 4096 * 4


@pytest.mark.parametrize("lengths", [[], [0], [5], [4096], [8 << 20], [3, 4093, 8 << 20], [(8 << 20) - 1, 2, 100_000]])
def test_blocks_of_any_length_are_written_in_order(tmp_path: Path, lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, n, np.uint8).tobytes() for n in lengths]
    size, digest = direct.write_blocks(tmp_path / "data", map(memoryview, blocks))
    written = (tmp_path / "data").read_bytes()
    assert written == b"".join(blocks)
    assert (size, digest) == (len(written), hashlib.sha256(written).hexdigest())
