"""From a file to an output folder: everything appears, or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest

from mc_opt import ir, passes, targets
from mc_opt.passes import PassError, Pipeline
from mc_opt.tools import driver
from mc_opt.tools.driver import Request, compile_model
from tests.passes import toy
from tests.passes.toy import Toy

W1 = ", ".join(str(i % 7 - 3) for i in range(32))
MODEL = f"""
<ir_version: 10, opset_import: ["": 21]>
g (float[N,4] x) => (float[N,8] y)
<float[4,8] w1 = {{{W1}}}>
{{
  h = MatMul (x, w1)
  y = Relu (h)
}}
"""


@dataclass(frozen=True)
class Fake(targets.Target):
    """A target that writes one file."""

    name: ClassVar[str] = "fake"
    harm: ClassVar[Callable[[], None] | None] = None

    def resolved(self) -> str:
        return "fake{cpu=toaster}"

    def compile(
        self,
        model: onnx_ir.Model,
        folder: Path,
        progress: targets.Progress,
        *,
        tiles: Mapping[str, str] | None = None,
    ) -> targets.Built:
        progress(0, 1, "toasting")
        if self.harm is not None:
            type(self).harm()
        (folder / "model.so").write_bytes(b"toast")
        (folder / "manifest.json").write_text("{}\n")
        digest = hashlib.sha256(b"toast").hexdigest()
        return targets.Built(folder, {"model.so": digest}, self.resolved(), ("gemm",), ("Relu r: slow",), {"all": 0.5})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "net.onnx"
    file.write_bytes(onnx.parser.parse_model(MODEL).SerializeToString())
    return file


def _request(path: Path, **fields: object) -> Request:
    return dataclasses.replace(Request(model=path, pipeline=Pipeline.of(Toy()), out=path.parent / "out"), **fields)


def test_a_run_writes_model_report_and_timings(path: Path) -> None:
    outcome = compile_model(_request(path, targets=(Fake(),)))
    out = path.parent / "out"
    assert outcome.out == out
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == ["fake/manifest.json", "fake/model.so", "model.onnx", "report.json", "timings.json"]
    report = json.loads((out / "report.json").read_text())
    assert report["schema_version"] == passes.SCHEMA_VERSION
    assert report["source"] == {
        "name": "net.onnx",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "opset": 21,
        "external": [],
    }
    assert report["recipe"] == "toy"
    assert [o["path"] for o in report["outputs"]] == ["fake/manifest.json", "fake/model.so", "model.onnx"]
    for output in report["outputs"]:
        assert output["sha256"] == hashlib.sha256((out / output["path"]).read_bytes()).hexdigest()
    made = {"name": "fake", "resolved": "fake{cpu=toaster}", "kernels": ["gemm"], "fallbacks": ["Relu r: slow"]}
    assert report["targets"] == [made | {"drift": {}, "tuning": None}]
    assert "saved file gives the same outputs in ONNX Runtime" in report["checks"]
    timings = json.loads((out / "timings.json").read_text())
    assert set(timings["stages"]) >= {"load", "passes", "save", "build fake"}
    assert timings["builds"] == {"fake": {"all": 0.5}}
    assert str(path.parent) not in (out / "report.json").read_text()


def test_two_runs_give_the_same_bytes_but_for_the_times(path: Path) -> None:
    for name in ("a", "b"):
        compile_model(_request(path, out=path.parent / name, dump=True))
    for file in sorted(p for p in (path.parent / "a").rglob("*") if p.is_file() and p.name != "timings.json"):
        other = path.parent / "b" / file.relative_to(path.parent / "a")
        assert file.read_bytes() == other.read_bytes()
    assert sorted(p.name for p in (path.parent / "a/ir").iterdir()) == ["000_input.txt", "001_toy.txt"]


def test_shapes_are_fixed_before_the_first_pass(path: Path) -> None:
    outcome = compile_model(_request(path, shapes={"x": (3, 4)}, out=None))
    assert outcome.model.graph.outputs[0].shape == onnx_ir.Shape([3, 8])


def test_a_model_in_memory_is_left_as_it_is(path: Path) -> None:
    model = ir.load_model(path)
    before = ir.to_text(model)
    outcome = compile_model(_request(path, model=model, shapes={"x": (3, 4)}, out=None))
    assert ir.to_text(model) == before
    assert outcome.out is None


def test_a_dry_run_writes_nothing(path: Path) -> None:
    outcome = compile_model(_request(path, dry_run=True, targets=(Fake(),)))
    assert [row.layer for row in outcome.report.layers] == ["w1"]
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_progress_tells_the_stages(path: Path) -> None:
    seen: list[str] = []
    compile_model(_request(path, targets=(Fake(),)), lambda done, total, what: seen.append(what))
    assert [s for s in seen if s in ("load", "passes", "toy", "save", "build fake", "toasting")] == [
        "load",
        "passes",
        "toy",
        "save",
        "build fake",
        "toasting",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), targets.TargetError("no"), MemoryError()])
def test_nothing_is_left_behind(path: Path, error: BaseException) -> None:
    def harm() -> None:
        raise error

    broken = type("Fake", (Fake,), {"harm": staticmethod(harm)})()
    with pytest.raises(type(error)):
        compile_model(_request(path, targets=(broken,)))
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_an_earlier_output_survives_a_failure(path: Path) -> None:
    compile_model(_request(path))
    before = (path.parent / "out/report.json").read_bytes()

    def harm(model: onnx_ir.Model) -> None:
        raise KeyError("x")

    with pytest.raises(PassError):
        compile_model(_request(path, pipeline=Pipeline.of(toy.but(harm))))
    assert (path.parent / "out/report.json").read_bytes() == before


def test_real_data_is_read(path: Path) -> None:
    np.savez(path.parent / "data.npz", x=np.ones((5, 4), np.float32))
    report = compile_model(_request(path, data=path.parent / "data.npz")).report
    assert any("real samples" in c for c in report.checks)
    assert report.warnings == ()


def test_mistakes_are_told(path: Path) -> None:
    with pytest.raises(ir.OptionError, match="given twice"):
        compile_model(_request(path, targets=(Fake(), Fake())))
    with pytest.raises(ir.OptionError, match="no model was named"):
        compile_model(_request(path, model=None))


def test_structure_runs_nothing_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("ONNX Runtime was asked")

    monkeypatch.setattr(ir.Session, "__init__", refuse)
    report = compile_model(_request(path, check="structure")).report
    assert report.unchecked


def test_the_saved_file_is_held_to_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.load_model(path)
    other = model.clone()
    other.graph.initializers["w1"].const_value = onnx_ir.tensor(np.ones((4, 8), np.float32), name="w1")
    ir.save_model(other, path.parent / "other.onnx")
    with pytest.raises(PassError, match=r"save: model\.onnx: the saved file differs"):
        driver._check_saved(model, path.parent / "other.onnx", {"x": np.ones((2, 4), np.float32)})


@dataclass(frozen=True)
class Wrong(Fake):
    """A target whose artefacts are off by a share of the range."""

    share: float = 0.0
    rounds: bool = False

    @property
    def exact(self) -> bool:
        return not self.rounds

    def load(self, folder: Path) -> Wrong:  # it has what of an Artefact is used
        assert (folder / "model.so").is_file()
        return self

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        weight = np.array([i % 7 - 3 for i in range(32)], np.float32).reshape(4, 8)
        right = np.maximum(inputs["x"] @ weight, 0)
        wrong = right.copy()
        wrong.flat[right.argmax()] += self.share * np.ptp(right)
        return {"y": wrong}


@pytest.mark.parametrize(
    ("share", "rounds", "warns"), [(0.0, False, False), (0.01, False, True), (0.01, True, False), (np.nan, False, True)]
)
def test_an_artefact_is_held_to_the_file_beside_it(path: Path, share: float, rounds: bool, warns: bool) -> None:
    outcome = compile_model(_request(path, targets=(Wrong(share, rounds),), pipeline=Pipeline()))
    (output,) = outcome.report.targets[0].drift["outputs"]
    if np.isnan(share):
        assert output["unmatched"]
    else:
        assert output["relative"] == pytest.approx(share, abs=1e-6, rel=0.9 if share else 0)
    found = [w for w in outcome.report.warnings if w.startswith("fake: differs from model.onnx by more than rounding")]
    assert bool(found) == warns


def test_an_artefact_is_not_run_without_full_checks(path: Path) -> None:
    outcome = compile_model(_request(path, targets=(Wrong(1.0),), check="structure"))
    assert not outcome.report.targets[0].drift
