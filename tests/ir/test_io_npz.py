"""npz files: arrays mapped where they stand, unpacked where they are packed, and told apart."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_opt import ir
from mc_opt.ir.io.npz import file_digest, open_arrays, read_headers


def opened(*files: Path) -> list[dict[str, np.ndarray]]:
    arrays = open_arrays(files, [read_headers(file) for file in files])
    return [arrays(number) for number in range(len(files))]


def content(k: int = 0) -> dict[str, Any]:
    return {
        "rows": np.arange(12, dtype=np.float32).reshape(3, 4) + k,
        "columns": np.asfortranarray(np.arange(12).reshape(3, 4) - k),
        "bytes": np.arange(3, dtype=np.uint8),  # the arrays after it start anywhere
        "small": np.arange(6, dtype=np.float16).reshape(3, 2),
        "none": np.zeros((3, 0)),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mapped_arrays_are_the_saved_ones(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", **content())
    (arrays,) = opened(tmp_path / "a.npz")
    for name, expected in content().items():
        np.testing.assert_array_equal(arrays[name], expected)
        assert (arrays[name].dtype, arrays[name].flags.writeable) == (expected.dtype, False)


def test_a_zip_by_another_tool(tmp_path: Path) -> None:
    """The headers of its members have other lengths than numpy writes; one member is packed, one is not."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, packing in (("rows", zipfile.ZIP_STORED), ("small", zipfile.ZIP_DEFLATED)):
            np.save(tmp_path / f"{name}.npy", content()[name])
            archive.write(tmp_path / f"{name}.npy", f"{name}.npy", packing)
    (arrays,) = opened(path)
    for name in ("rows", "small"):
        np.testing.assert_array_equal(arrays[name], content()[name])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_folder_of_many_files_keeps_few_open(tmp_path: Path, save: Any) -> None:
    files = [tmp_path / f"{k:03}.npz" for k in range(100)]
    for k, file in enumerate(files):
        save(file, x=np.full((2, 3), k))
    arrays = open_arrays(files, [read_headers(file) for file in files])
    before = len(os.listdir("/proc/self/fd"))
    assert [int(arrays(k)["x"][1, 2]) for k in (*range(100), *range(100))] == [*range(100)] * 2
    assert len(os.listdir("/proc/self/fd")) - before <= 70


def test_a_digest_follows_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    x = np.zeros((2, 6), np.float32)
    digests = []
    for k, arrays in enumerate(({"x": x}, {"x": x}, {"y": x}, {"x": x.reshape(2, 3, 2)}, {"x": x + 1})):
        path = tmp_path / f"{k}.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy takes its own options for arrays
        digests.append(file_digest(path, read_headers(path)))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((100, 10)))
    arrays = open_arrays([path], [{"x": ir.Header((1000, 10), np.dtype(float))}])
    with pytest.raises(ir.DataError, match=r"a\.npz: cannot be read to its end \(an array ends early\)"):
        arrays(0)
