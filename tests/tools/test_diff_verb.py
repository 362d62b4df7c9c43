"""`mc-opt diff` as people and scripts see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from rich.console import Console

from mc_opt import ir
from mc_opt.tools import _diff_text
from tests.tools.conftest import Ran

Run: TypeAlias = Callable[..., Ran]


@pytest.fixture
def packed(mc_opt: Run, mlp: Path, out: Path) -> Path:
    assert mc_opt(mlp, "--passes", "denseshift", "--check", "structure", "-o", out).code == 0
    return out


GOLDEN = """\
                 A       B  changes
nodes            5       6  1 added
parameters    1664    1664
stored      6.7 kB  3.3 kB  constants: 3 added, 1 changed

By pass
pass        rule         did
denseshift  4-bit shift  1 node added, 3 weights added, 1 weight changed

fc2
  + mc_opt.Lookup denseshift/fc2  denseshift: 4-bit shift
  ~ weight f32[32,32] fc2  denseshift: 4-bit shift
      stored: f32[32,32] #e3a1 -> made by mc_opt.Lookup
  + 3 weights denseshift.4bit, fc2.codes, fc2.scale  denseshift: 4-bit shift

By layer
layer        parameters A     B  stored A       B    B/A
fc2                  1024  1024    4.1 kB   704 B  0.172
2 unchanged           640   640    2.6 kB  2.6 kB
"""
"""512 bytes of codes, 32 scales of 4 bytes, and a codebook of 16 numbers that one layer uses: 704 bytes."""


def test_the_text_is_aligned_and_plain_in_a_pipe(mc_opt: Run, mlp: Path, packed: Path) -> None:
    ran = mc_opt("diff", mlp, packed)
    assert ran.code == 0 and not ran.err and "\x1b" not in ran.out
    first, second, *lines = ran.out.splitlines()
    assert (first, second) == (f"--- {mlp}", f"+++ {packed}")
    weight = ir.digest(ir.load_model(mlp).graph.initializers["fc2"].const_value)  # type: ignore[arg-type]
    assert "\n".join(lines) + "\n" == GOLDEN.replace("#e3a1", f"#{weight}")


def test_all_gives_every_weight_and_layer_a_line(mc_opt: Run, mlp: Path, packed: Path) -> None:
    out = mc_opt("diff", mlp, packed, "--all").out
    assert "  + weight f32[32,1] fc2.scale  denseshift: 4-bit shift\n" in out
    assert [line.split()[0] for line in out[out.index("By layer") :].splitlines()[2:]] == [
        "fc1",
        "fc2",
        "fc3",
    ]


def test_exit_code_on_request(mc_opt: Run, mlp: Path, packed: Path) -> None:
    assert mc_opt("diff", mlp, packed, "--exit-code").code == 5
    ran = mc_opt("diff", packed, packed / "model.onnx", "--exit-code")
    assert ran.code == 0 and ran.out.splitlines()[-1] == "no difference"
    assert "5 they differ and --exit-code was given" in " ".join(mc_opt("diff", "--help").out.split())
    assert mc_opt("diff", mlp, packed / "nothing.onnx").code == 4


def test_json_has_a_version_and_the_same_text_each_time(mc_opt: Run, mlp: Path, packed: Path) -> None:
    text = mc_opt("diff", mlp, packed, "--json").out
    assert text == mc_opt("diff", mlp, packed, "--json").out
    data = json.loads(text)
    assert data["schema_version"] == 1 and data["equal"] is False and data["drift"] is None
    assert list(data) == ["schema_version", "equal", "before", "after", "changes", "renames", "layers", "drift"]
    assert data["changes"][0] == {
        "what": "node",
        "kind": "added",
        "name": "denseshift/fc2",
        "title": "mc_opt.Lookup",
        "layer": "fc2",
        "details": [],
        "by": [{"pass": "denseshift", "rule": "4-bit shift"}],
    }


def test_data_tells_where_drift_begins(mc_opt: Run, mlp: Path, packed: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32))
    out = mc_opt("diff", mlp, packed, "--data", tmp_path / "x.npz").out
    rows = out[out.index("Drift of 5 values") :].splitlines()
    assert rows[0] == "Drift of 5 values that both have: the first 2 by less than 1e-05 of their range"
    assert [row.split()[0] for row in rows[2:]] == ["c", "d", "y"]
    assert [row.endswith("<- drift begins here") for row in rows[2:]] == [True, False, False]
    same = mc_opt("diff", mlp, mlp, "--data", tmp_path / "x.npz").out
    assert "Drift of 5 values that both have: none by more than 1e-05 of its range" in same
    drift = json.loads(mc_opt("diff", mlp, packed, "--data", tmp_path / "x.npz", "--json").out)["drift"]
    assert [d["name"] for d in drift] == ["a", "b", "c", "d", "y"] and drift[2]["sqnr_db"] > 0


def test_a_terminal_gets_colours(
    mlp: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_diff_text, "_Stdout", lambda **kw: Console(**kw, force_terminal=True, color_system="standard"))
    found = ir.diff(ir.load_model(mlp), ir.load_model(packed / "model.onnx"))
    capsys.readouterr()
    _diff_text.print_diff(found, "a", "b", whole=False, renames=False)
    assert "\x1b[32m+ mc_opt.Lookup denseshift/fc2\x1b[0m" in capsys.readouterr().out
