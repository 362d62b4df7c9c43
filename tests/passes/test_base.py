"""The base class of passes, the context and the store."""

from __future__ import annotations

import errno
import gc
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from mc_opt import ir
from mc_opt.passes import Context, PassError, Step, Store, _store
from tests.passes.toy import Toy


def test_the_name_is_the_file_and_the_text_holds_what_differs() -> None:
    assert Toy().name == "toy"
    assert str(Toy(bits=3, skip=("a", "b"))) == "toy{bits=3 skip=a,b}"


def test_layers_and_skip_choose_by_glob() -> None:
    toy = Toy(layers=("encoder.*", "fc"), skip=("*.bias",))
    assert toy.declines("fc") is None
    assert toy.declines("encoder.0.weight") is None
    assert toy.declines("decoder.w") == ir.Skip("layers=encoder.*,fc does not name it")
    assert toy.declines("encoder.0.bias") == ir.Skip("skip=*.bias names it")


def test_overrides_reach_only_their_layers() -> None:
    bound = Step(Toy(bits=4), (("fc*", {"bits": 2}), ("fc2", {"bits": 3, "deep": True}))).bound()
    assert bound.at("conv") is bound
    assert bound.at("fc1") == Toy(bits=2)
    assert bound.at("fc2") == Toy(bits=3, deep=True)
    assert bound == Toy(bits=4)


def test_an_error_says_where_what_and_what_ran_before() -> None:
    error = PassError("toy", "conv1", "weight is f32[64], expected rank 4", ("fold", "cut"))
    assert str(error) == "toy: conv1: weight is f32[64], expected rank 4 (after fold, cut)"
    assert str(PassError("toy", "", "no")) == "toy: no"


def _initializer(array: np.ndarray) -> onnx_ir.Value:
    return onnx_ir.Value(name="w", const_value=onnx_ir.Tensor(array, name="w"))


def test_weights_are_read_only_and_rows_are_slices() -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    ctx, value = Context(), _initializer(array)
    np.testing.assert_array_equal(ctx.rows(value, 1, 3), array[1:3])
    with pytest.raises(ValueError, match="read-only"):
        ctx.weight(value)[0, 0] = 1
    assert array.flags.writeable


def test_a_computed_value_has_no_weight() -> None:
    with pytest.raises(ir.IRError, match="x: is computed"):
        Context().weight(onnx_ir.Value(name="x"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int64])
@pytest.mark.parametrize("rows", [3, 600])
def test_the_store_gives_back_what_it_keeps(tmp_path: Path, dtype: type, rows: int) -> None:
    array = (np.arange(rows * 1000) % 251).reshape(rows, 1000).astype(dtype)
    tensor = Store(tmp_path).keep(array, "w")
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.dtype == onnx_ir.DataType.from_numpy(np.dtype(dtype))
    assert tensor.name == "w"
    assert not tensor.numpy().flags.writeable
    assert list(tmp_path.iterdir()) == []  # nothing to leave behind


def test_big_tensors_are_mapped_and_outlive_the_store(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32).T
    tensor = Store(tmp_path).keep(array, "w")
    tmp_path.rmdir()
    gc.collect()
    np.testing.assert_array_equal(tensor.numpy(), array)
    base: object = tensor.numpy()
    while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_small_tensors_do_not_alias_the_array() -> None:
    array = np.zeros(3, np.float32)
    tensor = Store().keep(array, "w")
    array[0] = 1
    assert tensor.numpy()[0] == 0


def test_a_full_disk_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(dir: Path) -> IO[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_store.tempfile, "TemporaryFile", full)
    with pytest.raises(ir.LimitError, match="w: no space for 8000000 bytes"):
        Store(tmp_path).keep(np.zeros(1_000_000), "w")


def test_the_first_reason_of_a_layer_stays() -> None:
    ctx = Context()
    ctx.skip("fc", ir.Skip("too small"))
    ctx.skip("fc", ir.Skip("other"))
    ctx.note("fc", "hello")
    assert ctx.log.skips == {"fc": "too small"}
    assert ctx.log.notes == [("fc", "hello")]


def test_progress_reaches_whoever_watches() -> None:
    seen: list[tuple[int, int, str]] = []
    Context(on_progress=lambda *step: seen.append(step)).progress(1, 2, "fc")
    Context().progress(1, 2, "fc")
    assert seen == [(1, 2, "fc")]
