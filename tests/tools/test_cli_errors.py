"""Bad input ends with one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from tests.tools.conftest import Ran, proto

Run = Callable[..., Ran]


def broken(path: Path, kind: str) -> None:
    """Write a file that is wrong in one way."""
    good = proto()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("hello, this is no model\n")
        case "truncated":
            path.write_bytes(good.SerializeToString()[:-500])
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(4000))
        case "missing external data":
            onnx.save(good, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
            (path.parent / "weights.bin").unlink()
        case "escaping external data":
            onnx.save(good, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
            (path.parent / "weights.bin").rename(path.parent.parent / "weights.bin")
            path.write_bytes(path.read_bytes().replace(b"weights.bin", b"../weigh.bi"))
            (path.parent.parent / "weights.bin").rename(path.parent.parent / "weigh.bi")
        case "cyclic graph":
            good.graph.node[0].input[0] = "d"
            path.write_bytes(good.SerializeToString())
        case "NaN weights":
            path.write_bytes(proto(fc2=np.full((32, 32), np.nan, np.float32)).SerializeToString())
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "empty"),
        ("text", "text"),
        ("truncated", ""),
        ("noise", ""),
        ("missing external data", "weights.bin"),
        ("escaping external data", "weigh.bi"),
        ("cyclic graph", "cycl"),
        ("NaN weights", "fc2"),
    ],
)
def test_an_unreadable_or_unfit_model(mc_opt: Run, tmp_path: Path, out: Path, kind: str, says: str) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "broken.onnx"
    broken(path, kind)
    before = sorted(tmp_path.rglob("*"))
    ran = mc_opt(path, "--passes", "denseshift", "-o", out)
    assert ran.code == 4, ran.err
    assert says.lower() in ran.error.lower()
    assert "broken.onnx" in ran.error
    assert ran.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_file(mc_opt: Run, tmp_path: Path, out: Path) -> None:
    ran = mc_opt(tmp_path / "none.onnx", "-o", out)
    assert ran.code == 4 and "none.onnx" in ran.error and not out.exists()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros((3, 16), np.float32)}, "'y'"),
        ({"x": np.zeros((3, 17), np.float32)}, "17"),
        ({"x": np.zeros((3, 16), np.float64)}, "float64"),
        ({"x": np.zeros((0, 16), np.float32)}, ""),
    ],
    ids=["name", "shape", "type", "no samples"],
)
def test_data_that_does_not_fit(mc_opt: Run, mlp: Path, out: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(mlp.parent / "data.npz", **arrays)
    ran = mc_opt(mlp, "--passes", "denseshift", "--data", mlp.parent / "data.npz", "-o", out)
    assert ran.code == 4, ran.err
    assert says in ran.error
    assert not out.exists()


@pytest.mark.parametrize("name", ["none.npz", "text.npz"])
def test_data_that_cannot_be_read(mc_opt: Run, mlp: Path, out: Path, name: str) -> None:
    (mlp.parent / "text.npz").write_text("no zip archive")
    ran = mc_opt(mlp, "--data", mlp.parent / name, "-o", out)
    assert ran.code == 4 and name in ran.error and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--passes", "densshift"), "did you mean 'denseshift'"),
        (("--passes", "denseshift{bit=4}"), "did you mean 'bits'"),
        (("--passes", "denseshift{bits=x}"), "whole number"),
        (("--passes", "denseshift,,"), "empty"),
        (("--target", "x87"), "did you mean 'x86'"),
        (("--target", "x86{thread=1}"), "did you mean 'threads'"),
        (("--target", "x86,x86"), "twice"),
        (("--target", "onnx", "--target", "x86"), "--target is given 2 times; give it once, as a list with commas"),
        (("--seed", "1", "--seed", "2"), "--seed is given 2 times; give it once"),
        (("--shape", "x=1y16"), "--shape"),
        (("--shape", "x"), "--shape"),
        (("--state", "y"), "--state"),
        (("--check", "some"), "full or structure"),
        (("--memory-limit", "much"), "4GiB"),
        (("--seed", "-1"), "--seed"),
        (("--stop-after", "denseshift"), "denseshift"),
        (("--passes", "denseshift", "--recipe", "r.toml"), "give one"),
        (("--from-torch", "a:b"), "--from-torch"),
        (("--bogus",), "--bogus"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_mistakes_of_usage(mc_opt: Run, mlp: Path, out: Path, arguments: tuple[str, ...], says: str) -> None:
    ran = mc_opt(mlp, *arguments, "-o", out)
    assert ran.code == 2, ran.err
    assert says in ran.error
    assert not out.exists()


def test_an_unknown_shape_input(mc_opt: Run, mlp: Path, out: Path) -> None:
    ran = mc_opt(mlp, "--shape", "z=1x16", "-o", out)
    assert ran.code in (2, 4) and "'z'" in ran.error and "x FLOAT" in ran.error and not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--passes", "denseshift{bits=4", "group_size=0}"),
        ("--passes", "denseshiftskip=first", "denseshiftlast"),
        ("--passes", "denseshiftbits=4"),
        ("--passes", "denseshift{bits=4"),
        ("--target", "x86{cpu=native", "threads=1}"),
    ],
    ids=" ".join,
)
def test_a_list_that_a_shell_took_apart_hints_to_quote(
    mc_opt: Run, mlp: Path, out: Path, words: tuple[str, ...]
) -> None:
    for arguments in ((mlp, *words), (*words, mlp)):
        ran = mc_opt(*arguments, "-o", out)
        assert ran.code == 2, ran.err
        assert "quote" in ran.error and not out.exists()


def test_an_unknown_verb(mc_opt: Run) -> None:
    ran = mc_opt("inspct", "model.onnx")
    assert ran.code == 2
    assert "did you mean 'inspect'" in ran.error and "doctor" in ran.error


def test_no_model_and_no_folder(mc_opt: Run, mlp: Path) -> None:
    assert "no model" in mc_opt("--passes", "denseshift").error
    assert "-o DIR" in mc_opt(mlp).error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[pass]\nname=1", "TOML"),
        ('[[pass]]\nname = "densshift"\n', "did you mean 'denseshift'"),
        ('[[pass]]\nname = "denseshift"\nbit = 4\n', "did you mean 'bits'"),
        ("[[passes]]\n", "did you mean 'pass'"),
    ],
    ids=["syntax", "pass", "option", "key"],
)
def test_a_wrong_recipe(mc_opt: Run, mlp: Path, out: Path, text: str, says: str) -> None:
    recipe = mlp.parent / "r.toml"
    recipe.write_text(text)
    ran = mc_opt(mlp, "--recipe", recipe, "-o", out)
    assert ran.code == 3, ran.err
    assert "r.toml" in ran.error and says in ran.error and not out.exists()


def test_a_missing_recipe(mc_opt: Run, mlp: Path, out: Path) -> None:
    assert mc_opt(mlp, "--recipe", "none.toml", "-o", out).code == 3


def test_an_output_folder_that_is_a_file(mc_opt: Run, mlp: Path, out: Path) -> None:
    out.write_text("mine")
    ran = mc_opt(mlp, "-o", out)
    assert ran.code == 2 and str(out) in ran.error and out.read_text() == "mine"


@pytest.mark.parametrize("place", ["/sys", "/proc"])
def test_an_unwritable_folder(mc_opt: Run, mlp: Path, place: str) -> None:
    # these take no folders, not even from root
    ran = mc_opt(mlp, "-o", f"{place}/mc-opt-out")
    assert ran.code == 2, ran.err
    assert f"{place}: cannot be written" in ran.error and ".mc-opt-" not in ran.error


def test_a_state_that_the_model_does_not_have(mc_opt: Run, mlp: Path, out: Path) -> None:
    ran = mc_opt(mlp, "--passes", "denseshift", "--state", "h=x", "-o", out)
    assert ran.code == 4 and "no output 'h'" in ran.error and not out.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(mc_opt: Run, mlp: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    before = sorted(mlp.parent.parent.rglob("*"))

    def full(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    ran = mc_opt(mlp, "--passes", "denseshift", "-o", out)
    assert ran.code == 6, ran.err
    assert "space" in ran.error
    assert sorted(mlp.parent.parent.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not allowed here; test_a_full_disk holds the same by a patched fsync")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(mc_opt: Run, tmp_path: Path, small_disk: Path) -> None:
    model = tmp_path / "big.onnx"
    big = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1,256] x) => (float[1,256] y) <float[256,256] w> { y = MatMul(x, w) }"""
    )
    del big.graph.initializer[:]
    weight = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    big.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(big, model)
    ran = mc_opt(model, "-o", small_disk / "out")
    assert ran.code == 6, ran.err
    assert list(small_disk.iterdir()) == []


def test_out_of_memory(mc_opt: Run, mlp: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_opt import ir

    def none(*_arguments: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ir, "load_model", none, raising=False)
    ran = mc_opt(mlp, "-o", out)
    assert ran.code == 6 and "memory" in ran.error and not out.exists()


def test_an_internal_error_keeps_its_traceback(
    mc_opt: Run, mlp: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mc_opt import ir

    def broken(*_arguments: object, **_options: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(ir, "load_model", broken, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ran = mc_opt(mlp, "-o", out)
    assert ran.code == 1
    (saved,) = tmp_path.glob("mc-opt-*.txt")
    assert str(saved) in ran.error and "planted" in saved.read_text()
    assert "Traceback" not in ran.err
    assert "Traceback" in mc_opt(mlp, "-o", out, "--traceback").err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_the_end_that_a_server_sends(mlp: Path, out: Path, number: signal.Signals) -> None:
    code = f"""
import sys, time
from mc_opt import ir
from mc_opt.tools import cli
def slow(*a, **k):
    print("loading", flush=True)
    time.sleep(30)
ir.load_model = slow
sys.argv[1:] = [{str(mlp)!r}, "-o", {str(out)!r}]
cli.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert not out.exists() and sorted(p.name for p in out.parent.iterdir()) == ["in"]


@pytest.mark.parametrize("words", [("inspect", "{}", "--json"), ("diff", "{}", "{}")], ids=["inspect", "diff"])
def test_a_reader_that_closes_the_pipe(mlp: Path, words: tuple[str, ...]) -> None:
    code = "from mc_opt.tools import cli; cli.main()"
    arguments = [word.format(mlp) for word in words]
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert done.returncode == 0 and done.stderr == b""


def test_a_factory_that_exits(mc_opt: Run, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text("def factory():\n    raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    ran = mc_opt("--from-torch", "leaving:factory", "-o", out)
    assert ran.code == 4 and "sys.exit(0)" in ran.error and not out.exists()
