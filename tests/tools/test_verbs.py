"""The verbs: what they print, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from mc_opt import ir, passes
from mc_opt.tools import _console, _texts, _train_options, cli
from tests.tools.conftest import Ran

Run = Callable[..., Ran]


def test_the_verbs_are_the_files(mc_opt: Run) -> None:
    assert cli.verb_names() == ("bench", "compile", "diff", "doctor", "explain", "inspect", "passes", "run", "targets")
    ran = mc_opt("--help")
    assert ran.code == 0
    for word in ("MODEL --passes", "--recipe", "--allow-scripts", "--version", "inspect", "doctor"):
        assert word in ran.out
    common, training = ran.out.split("\nTraining:\n")
    assert "--train " not in common and "--fresh" in training and "--dry-run" in common
    assert training.split("\nVerbs:\n")[0] in mc_opt("compile", "--help").out


def test_every_option_of_a_training_is_on_the_command_line() -> None:
    fields = {field.name for field in dataclasses.fields(passes.Training)}
    assert {row.field for row in _train_options.ROWS} == fields and len(_train_options.ROWS) == len(fields)


@pytest.mark.parametrize("verb", cli.verb_names())
def test_every_verb_has_help_and_json(mc_opt: Run, verb: str) -> None:
    ran = mc_opt(verb, "--help")
    assert ran.code == 0 and "--json" in ran.out and "--traceback" in ran.out


def test_help_of_compile_ends_with_the_exit_codes(mc_opt: Run) -> None:
    assert "130 interrupted" in mc_opt("compile", "--help").out


def test_version(mc_opt: Run) -> None:
    import mc_opt as package

    assert mc_opt("--version").out == f"mc-opt {package.__version__}\n"


def test_compile_is_the_verb_when_none_is_named(mc_opt: Run, mlp: Path, out: Path) -> None:
    ran = mc_opt(mlp, "--passes", "denseshift", "-o", out)
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in out.iterdir()) == ["model.onnx", "report.json", "timings.json"]
    assert "denseshift" in ran.out and "weights" in ran.out
    assert "warning: no data was given" in ran.err
    assert "\x1b" not in ran.out + ran.err  # no colour off a terminal


def test_labels_give_accuracy(mc_opt: Run, mlp: Path, out: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    outputs = ir.Session(mlp)
    label = np.array([int(outputs.run({"x": row[None]})["y"].argmax()) for row in x])
    label[0] = (label[0] + 1) % 4
    np.savez(tmp_path / "x.npz", x=x, label=label)
    ran = mc_opt(mlp, "--passes", "denseshift", "--data", tmp_path / "x.npz", "-o", out)
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    drift = report["passes"][0]["drift"]["reference"]
    assert drift["accuracy_reference"] == 0.875
    assert f"accuracy 87.50% -> {drift['accuracy_other']:.2%} on 8 labelled samples" in ran.out


def test_compile_json_holds_report_and_timings(mc_opt: Run, mlp: Path, out: Path) -> None:
    ran = mc_opt("--passes", "denseshift", mlp, "-o", out, "--json")
    data = json.loads(ran.out)
    assert data["out"] == str(out)
    assert data["report"] == json.loads((out / "report.json").read_text())
    assert [row["name"] for row in data["timings"]["passes"]] == ["denseshift"]


def test_dry_run_writes_nothing_and_lists_layers(mc_opt: Run, mlp: Path) -> None:
    before = sorted(mlp.parent.parent.rglob("*"))
    ran = mc_opt(mlp, "--passes", "denseshift", "--dry-run")
    assert ran.code == 0, ran.err
    assert "fc2" in ran.out and "left alone because" in ran.out and "fc1" in ran.out
    assert sorted(mlp.parent.parent.rglob("*")) == before


def test_dump_and_stop_after(mc_opt: Run, mlp: Path, out: Path) -> None:
    ran = mc_opt(mlp, "--passes", "fold-constants,denseshift", "--dump", "--stop-after", "fold-constants", "-o", out)
    assert ran.code == 0, ran.err
    assert [p.suffix for p in sorted((out / "ir").iterdir())] == [".txt"] * len(list((out / "ir").iterdir()))
    assert [p["name"] for p in json.loads((out / "report.json").read_text())["passes"]] == ["fold-constants"]


def test_a_recipe_with_options_of_one_layer(mc_opt: Run, mlp: Path, out: Path) -> None:
    recipe = mlp.parent / "recipe.toml"
    recipe.write_text(
        'seed = 3\ncheck = "structure"\n[[pass]]\nname = "denseshift"\nskip = []\n[pass.layer.fc2]\nbits = 3\n'
    )
    ran = mc_opt(mlp, "--recipe", recipe, "-o", out, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)["report"]
    assert report["seed"] == 3 and report["unchecked"]
    bits = {layer["layer"]: layer["bits"] for layer in report["layers"]}
    assert set(bits) == {"fc1", "fc2", "fc3"} and bits["fc2"] < bits["fc1"]


def test_from_torch(mc_opt: Run, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    (tmp_path / "my_models.py").write_text(
        "from torch import nn, zeros\ndef tiny():\n    return nn.Sequential(nn.Linear(4, 3)).eval(), (zeros(1, 4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    ran = mc_opt("--from-torch", "my_models:tiny", "--check", "structure", "-o", out)
    sys.modules.pop("my_models", None)
    assert ran.code == 0, ran.err
    assert "0.weight" in mc_opt("inspect", out / "model.onnx").out


def test_from_torch_that_cannot_be_found(mc_opt: Run, out: Path) -> None:
    ran = mc_opt("--from-torch", "no_such_module:factory", "-o", out)
    assert ran.code == 2 and "no_such_module" in ran.error


def test_inspect(mc_opt: Run, mlp: Path) -> None:
    ran = mc_opt("inspect", mlp)
    assert ran.code == 0, ran.err
    for text in ("opset 21", "MatMul", "fc2", "1664 parameters", "6.7 kB"):
        assert text in ran.out
    facts = json.loads(mc_opt("inspect", mlp, "--json").out)
    assert facts["ops"] == {"MatMul": 3, "Relu": 2}
    assert facts["inputs"] == [{"name": "x", "type": "FLOAT", "shape": [1, 16], "text": facts["inputs"][0]["text"]}]
    assert facts["parameters"] == 16 * 32 + 32 * 32 + 32 * 4
    assert [row["layer"] for row in facts["largest"]] == ["fc2", "fc1", "fc3"]


def test_inspect_shows_our_ops(mc_opt: Run, mlp: Path, out: Path) -> None:
    assert mc_opt(mlp, "--passes", "denseshift", "-o", out).code == 0
    facts = json.loads(mc_opt("inspect", out / "model.onnx", "--json").out)
    assert facts["ours"] == {"Lookup": 1}
    (row,) = [row for row in facts["largest"] if row["decoded_by"] == "Lookup"]
    assert row["layer"] == "fc2" and row["elements"] == 1024 and 4 <= row["bits"] < 6
    assert facts["parameters"] == 16 * 32 + 32 * 32 + 32 * 4


def test_explain(mc_opt: Run, mlp: Path) -> None:
    ran = mc_opt("explain", mlp, "fc1")
    assert ran.code == 0, ran.err
    assert "MatMul" in ran.out and "denseshift" in ran.out and "declined" in ran.out
    found = json.loads(mc_opt("explain", mlp, "fc1", "--passes", "denseshift{skip=}", "--json").out)
    assert [f["outcome"] for f in found["findings"]] == ["rewritten"]


def test_explain_an_unknown_layer(mc_opt: Run, mlp: Path) -> None:
    ran = mc_opt("explain", mlp, "fc11")
    assert ran.code == 2 and "did you mean 'fc1'" in ran.error


def test_run_a_model_on_data(mc_opt: Run, mlp: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.normal(size=(5, 16)).astype(np.float32), label=np.arange(5) % 4)
    ran = mc_opt("run", mlp, "--data", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert ran.code == 0, ran.err
    assert "5 samples" in ran.out and "label" in ran.out
    assert np.load(tmp_path / "y.npz")["y"].shape == (5, 4)


def test_run_refuses_a_state_that_is_not_there(mc_opt: Run, mlp: Path) -> None:
    ran = mc_opt("run", mlp, "--state", "h=x")
    assert ran.code == 4 and "no output 'h'" in ran.error


def test_run_begins_a_sequence_anew_with_every_file(mc_opt: Run, tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[2] x, float[2] s) => (float[2] y) { y = Add (x, s) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "sum.onnx")
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        np.savez(tmp_path / "data" / f"{name}.npz", x=np.ones((2, 2), np.float32))
    ran = mc_opt(
        "run", tmp_path / "sum.onnx", "--data", tmp_path / "data", "--state", "y=s", "-o", tmp_path / "out.npz"
    )
    assert ran.code == 0, ran.err
    assert np.load(tmp_path / "out.npz")["y"][:, 0].tolist() == [1, 2, 1, 2]


def test_run_without_data_says_so(mc_opt: Run, mlp: Path) -> None:
    ran = mc_opt("run", mlp, "--json")
    assert json.loads(ran.out)["samples"] == 1 and "random" in ran.err


def test_run_a_folder_without_artefact(mc_opt: Run, mlp: Path, out: Path) -> None:
    assert mc_opt(mlp, "-o", out).code == 0
    assert "ONNX Runtime" in mc_opt("run", out).out
    ran = mc_opt("run", out, "--target", "x86")
    assert ran.code == 2 and "x86" in ran.error


@pytest.mark.tvm
@pytest.mark.slow
@pytest.mark.ci
def test_run_an_artefact(mc_opt: Run, mlp: Path, out: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32))
    assert mc_opt(mlp, "--passes", "denseshift", "--target", "x86", "-o", out).code == 0
    for target in ("x86", "onnx"):
        ran = mc_opt("run", out, "--target", target, "--data", tmp_path / "x.npz", "-o", tmp_path / f"{target}.npz")
        assert ran.code == 0, ran.err
    a, b = (np.load(tmp_path / f"{t}.npz")["y"] for t in ("x86", "onnx"))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.ptp(b))


def test_passes_come_from_their_files(mc_opt: Run) -> None:
    ran = mc_opt("passes")
    assert ran.code == 0, ran.err
    assert "denseshift" in ran.out and "fold-batch-norm" in ran.out
    one = mc_opt("passes", "denseshift").out
    assert "bits" in one and "group_size" in one and "4" in one
    (entry,) = json.loads(mc_opt("passes", "denseshift", "--json").out)
    assert entry["options"][0]["name"] == "bits"


def test_targets_come_from_their_files(mc_opt: Run) -> None:
    ran = mc_opt("targets")
    assert ran.code == 0, ran.err
    assert all(name in ran.out for name in ("onnx", "x86", "arm"))
    assert "threads" in mc_opt("targets", "x86").out and "cortex-a53" in mc_opt("targets", "arm").out


def test_doctor(mc_opt: Run) -> None:
    ran = mc_opt("doctor")
    assert ran.code == 0, ran.err
    assert "onnxruntime" in ran.out and "CPU features" in ran.out and "running ARM artefacts" in ran.out
    facts = json.loads(mc_opt("doctor", "--json").out)
    parts = {row["part"] for row in facts["packages"]}
    assert parts == {"core", "torch", "train", "tvm", "cuda"} or parts == {
        "core",
        "torch",
        "tvm",
        "cuda",
    }  # as installed


def test_doctor_names_the_command_for_what_is_missing(mc_opt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "apache-tvm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.15" if name == "apache-tvm-ffi" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    ran = mc_opt("doctor")
    assert "pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'" in ran.out


def test_doctor_knows_what_training_needs(mc_opt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    train = ['mc-opt[torch] ; extra == "train"', 'click>=8 ; extra == "train"', 'no-such-package>=1 ; extra == "train"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["click>=8.1", *train])
    ran = mc_opt("doctor")
    assert "train (training what passes made): " in ran.out and "-m pip install 'no-such-package>=1'" in ran.out


def test_passes_says_which_are_trained(mc_opt: Run) -> None:
    listed = {
        line.split()[0]: line.split()[3] for line in mc_opt("passes").out.splitlines()[1:] if len(line.split()) > 4
    }
    assert (listed["denseshift"], listed["fine-tune"], listed["fold-batch-norm"]) == ("yes", "yes", "no")
    assert "Trained where the run has --train." in mc_opt("passes", "denseshift").out
    assert "Trained where" not in mc_opt("passes", "prune").out
    assert {e["name"]: e["trained"] for e in json.loads(mc_opt("passes", "--json").out)}["s3"] is True


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1024", 1024), ("1.5 g", 1_500_000_000)]
)
def test_byte_counts(text: str, count: int) -> None:
    assert _texts.byte_count(text) == count


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (999_949, "999.9 kB"), (22e6, "22.0 MB"), (2.5e9, "2.50 GB")])
def test_sizes_for_people(count: float, text: str) -> None:
    assert _console.size_text(count) == text
