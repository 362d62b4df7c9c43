"""`mc-opt --train`: from the words to a trained model, stopped and resumed, and every failure as one line."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_opt import ir
from mc_opt.tools import _console
from tests._harness import model as parsed
from tests.passes.test_train import NET, patterns
from tests.tools.conftest import Ran

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

Run = Callable[..., Ran]
FAST = ("--epochs", 3, "--batch-size", 16, "--check", "structure", "--threads", 1, "--lr", 0.01)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A small convolutional network as a file."""
    ir.save_model(parsed(NET), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """64 labelled pictures of stripes."""
    return patterns(tmp_path)


def steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act` with the number of every step of the optimizer that a run tells of."""

    def told(_self: object, done: int, total: int, what: str) -> None:
        if "loss" in what:
            act(done)

    monkeypatch.setattr(_console.Progress, "__call__", told)


def stop_at(step: int) -> Callable[[int], None]:
    return lambda done: signal.raise_signal(signal.SIGINT) if done == step else None


# --- a training -----------------------------------------------------------------------------------


def test_a_training_leaves_a_model_a_curve_and_no_checkpoint(mc_opt: Run, net: Path, data: Path, out: Path) -> None:
    passes = "denseshift{bits=3 skip=}"
    ran = mc_opt(net, "--passes", passes, "--train", data, "--loss", "labels,output", "-o", out, *FAST)
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in out.iterdir()) == ["model.onnx", "report.json", "timings.json"]
    assert not (out.parent / "out.training").exists()
    report = json.loads((out / "report.json").read_text())
    told = report["passes"][0]["training"]
    assert [told[key] for key in ("passes", "samples", "held_out", "batches", "steps")] == [["denseshift"], 58, 6, 3, 9]
    assert len(told["epochs"]) == 3 and told["metric"] == "accuracy"
    assert report["training"] == {
        "data": data.name,
        "epochs": "3",
        "batch_size": "16",
        "lr": "0.01",
        "loss": "labels,output",
        "threads": "1",
    }
    (line,) = [line for line in ran.out.splitlines() if line.startswith("trained denseshift: 3 epochs, 58 samples")]
    first, last = told["epochs"][0], told["epochs"][-1]
    assert f"loss {first['loss']:.4g} -> {last['loss']:.4g}, " in line
    assert line.endswith(f"accuracy on 6 held-out {told['start']['metric']:.4g} -> {last['metric']:.4g}")


def test_a_recipe_trains_and_the_command_line_wins(mc_opt: Run, net: Path, data: Path, out: Path) -> None:
    recipe = net.parent / "recipe.toml"
    recipe.write_text(
        f'[train]\ndata = "{data}"\nepochs = 7\nbatch_size = 16\njoint = true\nthreads = 1\n'
        '[[pass]]\nname = "fine-tune"\n'
    )
    ran = mc_opt("--recipe", recipe, net, "--epochs", 2, "--no-joint", "--check", "structure", "-o", out, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)["report"]
    assert len(report["passes"][0]["training"]["epochs"]) == 2
    assert report["training"] == {"data": data.name, "epochs": "2", "batch_size": "16", "threads": "1"}


def test_passes_that_are_trained_together_are_told_as_one(mc_opt: Run, net: Path, data: Path, out: Path) -> None:
    ran = mc_opt(net, "--passes", "denseshift{bits=3 skip=},fine-tune", "--train", data, "--joint", *FAST, "-o", out)
    assert ran.code == 0, ran.err
    assert ran.out.count("\ntrained ") == 1 and "\ntrained denseshift+fine-tune: 3 epochs, " in ran.out
    timings = json.loads((out / "timings.json").read_text())
    seconds = [row["seconds"] for row in timings["passes"]]
    assert seconds[1] > seconds[0] and sum(seconds) > 0.5 * timings["stages"]["passes"]


def test_a_dry_run_counts_and_trains_nothing(mc_opt: Run, net: Path, data: Path) -> None:
    before = sorted(net.parent.rglob("*"))
    ran = mc_opt(net, "--passes", "fine-tune", "--train", data, "--parameters", "head_w", "--dry-run", *FAST)
    assert ran.code == 0, ran.err
    told = "would train fine-tune: 32 parameters, 58 samples and 6 held out, 3 batches an epoch, 9 steps"
    assert told in ran.out.splitlines()
    assert sorted(net.parent.rglob("*")) == before
    ran = mc_opt(net, "--passes", "fine-tune", "--train", net.parent / "none.npz", "--dry-run")
    assert ran.code == 4 and "none.npz" in ran.error


# --- stopped and resumed --------------------------------------------------------------------------


def test_an_interrupted_training_goes_on_and_ends_with_the_same_bytes(
    mc_opt: Run, net: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (net, "--passes", "denseshift{bits=3 skip=}", "--train", data, *FAST)
    assert mc_opt(*words, "-o", out.parent / "whole").code == 0
    with monkeypatch.context() as patch:
        steps(patch, stop_at(5))
        ran = mc_opt(*words, "-o", out)
    assert ran.code == 130
    kept = out.parent / "out.training"
    assert ran.error == f"mc-opt: interrupted; the training goes on from {kept} when the same command is run again"
    assert not out.exists() and [p.suffix for p in kept.iterdir()] == [".safetensors"]
    ran = mc_opt(*words, "-o", out)
    assert ran.code == 0 and "denseshift: goes on at epoch 2, step 5" in ran.err
    assert not kept.exists()
    for name in ("model.onnx", "report.json"):
        assert (out / name).read_bytes() == (out.parent / "whole" / name).read_bytes()


def test_fresh_forgets_what_was_saved(
    mc_opt: Run, net: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (net, "--passes", "fine-tune", "--train", data, *FAST, "-o", out)
    with monkeypatch.context() as patch:
        steps(patch, stop_at(5))
        assert mc_opt(*words).code == 130
    ran = mc_opt(*words, "--fresh")
    assert ran.code == 0 and "goes on" not in ran.err


def test_a_named_folder_stays_and_a_second_run_takes_what_is_there(
    mc_opt: Run, net: Path, data: Path, out: Path
) -> None:
    kept = out.parent / "kept"
    words = (net, "--passes", "fine-tune", "--train", data, *FAST, "--checkpoint", kept, "-o")
    assert mc_opt(*words, out).code == 0
    assert [p.suffix for p in kept.iterdir()] == [".safetensors"]
    ran = mc_opt(*words, out.parent / "again")
    assert ran.code == 0 and "fine-tune: was trained by the interrupted run" in ran.err
    assert (out / "model.onnx").read_bytes() == (out.parent / "again/model.onnx").read_bytes()


def test_two_runs_on_one_folder_are_refused(
    mc_opt: Run, net: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (net, "--passes", "fine-tune", "--train", data, *FAST, "-o", out)
    seen: list[Ran] = []

    def second(done: int) -> None:
        if done == 2:
            seen.append(mc_opt(*words))

    with monkeypatch.context() as patch:
        steps(patch, second)
        assert mc_opt(*words).code == 0
    assert seen[0].code == 2
    assert "out.training: process " in seen[0].error and "trains there now; wait for it, or name" in seen[0].error


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--epochs", 0), "training: epochs=0: expected a whole number from 1 on"),
        (("--batch-size", "many"), "training: batch_size='many' is not a whole number"),
        (("--holdout", 1), "training: holdout=1.0: expected a share from 0 on and below 1"),
        (("--lr", -1), "training: lr=-1.0: expected a number from 0 on"),
        (("--optimizer", "lion"), "training: optimizer='lion': choose one of adamw, adam, sgd"),
        (("--loss", "outputs"), "loss: unknown term 'outputs'; did you mean 'output'?"),
        (("--parameters", "nothing*"), "parameters=nothing*: matches none of the parameters (conv_w, bn_scale"),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    mc_opt: Run, net: Path, data: Path, out: Path, words: tuple[object, ...], told: str
) -> None:
    ran = mc_opt(net, "--passes", "fine-tune", "--train", data, "-o", out, "--check", "structure", *words)
    assert ran.code == 2 and ran.error.startswith(f"mc-opt: {told}")
    assert sorted(p.name for p in out.parent.iterdir()) == ["net.onnx", "patterns0.npz"]


def test_options_of_a_training_without_one(mc_opt: Run, net: Path, out: Path) -> None:
    ran = mc_opt(net, "--passes", "fine-tune", "--epochs", 3, "-o", out)
    assert (ran.code, ran.error) == (
        2,
        "mc-opt: --epochs is of a training, and there is none; name its data by --train PATH",
    )
    assert mc_opt(net, "--fresh", "-o", out).code == 2
    (net.parent / "r.toml").write_text("[train]\nepochs = 2\n")
    ran = mc_opt(net, "--recipe", net.parent / "r.toml", "-o", out)
    assert ran.code == 2 and "the recipe's table [train] is of a training" in ran.error


def test_data_that_no_pass_is_trained_on(mc_opt: Run, net: Path, data: Path, out: Path) -> None:
    ran = mc_opt(net, "--passes", "prune,fold-constants", "--train", data, "-o", out)
    assert ran.code == 2
    told = "mc-opt: there is training data and prune, fold-constants are not trained; add one that is: "
    assert ran.error.startswith(told) and "denseshift" in ran.error and "fine-tune" in ran.error
    assert "no pass is given; add one" in mc_opt(net, "--train", data, "-o", out).error


def test_a_loss_of_nan_keeps_the_last_good_checkpoint(
    mc_opt: Run, net: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.optim.AdamW.step
    calls: list[int] = []

    def spoil(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        calls.append(1)
        if len(calls) == 5:  # of the second epoch
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    ran = mc_opt(net, "--passes", "fine-tune", "--train", data, *FAST, "--checkpoint-every", 0, "-o", out)
    (kept,) = (out.parent / "out.training").iterdir()
    assert ran.code == 5
    assert ran.error.startswith("mc-opt: fine-tune: step 5: conv_w became NaN or infinite; take a lower learning rate")
    assert ran.error.endswith(f"the last good state is in {kept}")
    monkeypatch.undo()
    ran = mc_opt(net, "--passes", "fine-tune", "--train", data, *FAST, "--checkpoint-every", 0, "-o", out)
    assert ran.code == 0 and "goes on at epoch 2, step 4" in ran.err


def test_out_of_memory_keeps_the_checkpoint(
    mc_opt: Run, net: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(done: int) -> None:
        if done == 5:
            torch.empty(1 << 60)

    steps(monkeypatch, grow)
    ran = mc_opt(net, "--passes", "fine-tune", "--train", data, *FAST, "-o", out)
    assert ran.code == 6
    assert ran.error == (
        "mc-opt: training: out of memory at batch size 16; take a smaller one, or cut it up by accumulate"
    )
    assert [p.suffix for p in (out.parent / "out.training").iterdir()] == [".safetensors"]


def test_unfit_data_and_missing_labels(mc_opt: Run, net: Path, data: Path, out: Path) -> None:
    with np.load(data) as file:
        np.savez(data.with_name("bare.npz"), x=file["x"])
        np.savez(data.with_name("wrong.npz"), x=file["x"][:, :, :5])
        np.savez(data.with_name("other.npz"), picture=file["x"])
    problems = {"bare": "needs labels and the data has none", "wrong": "wrong.npz: array 'x'", "other": "other.npz"}
    for name, told in problems.items():
        given = data.with_name(f"{name}.npz")
        ran = mc_opt(net, "--passes", "fine-tune", "--train", given, "--loss", "labels", *FAST, "-o", out)
        assert ran.code == 4 and told in ran.error
    ran = mc_opt(net, "--passes", "fine-tune", "--train", "no_such_module:factory", *FAST, "-o", out)
    assert ran.code == 2 and "no_such_module" in ran.error
    assert not out.exists() and not (out.parent / "out.training").exists()


def test_an_op_without_torch_meaning(mc_opt: Run, tmp_path: Path, out: Path) -> None:
    text = "net (float[N,2,2] x) => (float[N] y) <float[2,2] w> { a = MatMul (x, w)  y = Det (a) }"
    ir.save_model(parsed(text), tmp_path / "det.onnx")
    np.savez(tmp_path / "det.npz", x=np.zeros((4, 2, 2), np.float32))
    ran = mc_opt(tmp_path / "det.onnx", "--passes", "fine-tune", "--train", tmp_path / "det.npz", *FAST, "-o", out)
    assert ran.code == 4 and "Det has no torch meaning; it would live in ir/run/standard" in ran.error


def test_what_training_needs_is_not_installed(
    mc_opt: Run, net: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "mc_opt.passes._train", raising=False)
    monkeypatch.delattr("mc_opt.passes._train", raising=False)
    ran = mc_opt(net, "--passes", "fine-tune", "--train", data, *FAST, "-o", out)
    assert (ran.code, ran.error) == (2, "mc-opt: training needs accelerate: pip install 'mc-opt[train]'")
    assert not (out.parent / "out.training").exists()
