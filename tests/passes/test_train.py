"""The training loop: it learns, goes on to the same bytes, trains what it is told to, and fails in one line."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir, passes
from mc_opt.passes import _train
from tests._harness import model, to_bytes

NET = """
net (float[N,1,6,6] x) => (float[N,4] y)
<float[8,1,3,3] conv_w, float[8] bn_scale, float[8] bn_bias, float[8] bn_mean, float[8] var_bn, float[4,8] head_w>
{
  c = Conv <pads: ints = [1,1,1,1]> (x, conv_w)
  n = BatchNormalization (c, bn_scale, bn_bias, bn_mean, var_bn)
  r = Relu (n)
  p = GlobalAveragePool (r)
  f = Flatten (p)
  y = Gemm <transB: int = 1> (f, head_w)
}
"""
Change = Callable[[int, int, str], None]


def patterns(folder: Path, count: int = 64, seed: int = 0) -> Path:
    """Four kinds of noisy stripes, with labels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, count)
    rows, columns = np.mgrid[0:6, 0:6]
    kinds = np.stack([rows % 2, columns % 2, (rows + columns) % 2, np.zeros((6, 6))]).astype(np.float32)
    x = kinds[label][:, None] + 0.1 * rng.standard_normal((count, 1, 6, 6)).astype(np.float32)
    path = folder / f"patterns{seed}.npz"
    np.savez(path, x=x.astype(np.float32), label=label)
    return path


def trained(
    spec: str, data: Path | Any, text: str = NET, *, progress: Change | None = None, **options: Any
) -> tuple[onnx_ir.Model, passes.Report]:
    options = {"epochs": 2, "batch_size": 16, "loss": "labels", "holdout": 0.25, "parameters": ("all",)} | options
    training = passes.Training(data=data, **options)
    ctx = passes.Context(training=training, on_progress=progress)
    result = passes.run(model(text), passes.Pipeline.parse(spec), ctx, check="structure")
    return result.model, result.report


def report_of(report: passes.Report) -> passes.TrainingReport:
    found = report.passes[-1].training
    assert found is not None
    return found


# --- it learns ------------------------------------------------------------------------------------


def test_labels_are_learned_and_the_report_has_the_curve(tmp_path: Path) -> None:
    _, report = trained("fine-tune", patterns(tmp_path), epochs=40, lr=0.05)
    told = report_of(report)
    assert (told.samples, told.held_out, told.steps, told.metric) == (48, 16, 120, "accuracy")
    assert len(told.epochs) == 40 and told.start is not None and told.best == 40
    assert told.epochs[-1].loss < 0.3 * told.epochs[0].loss
    assert told.epochs[-1].metric is not None and told.epochs[-1].metric > 0.9 > (told.start.metric or 0)
    assert "labels" in told.epochs[0].terms
    assert report.to_json()["passes"][-1]["training"]["epochs"][0]["loss"] > 0


def test_distillation_needs_no_labels(tmp_path: Path) -> None:
    with np.load(patterns(tmp_path)) as file:
        np.savez(tmp_path / "bare.npz", x=file["x"])
    _, report = trained("denseshift{bits=2 skip=}", tmp_path / "bare.npz", loss="output", epochs=8, lr=0.01)
    told = report_of(report)
    assert told.metric == "agreement" and told.start is not None
    assert (told.epochs[-1].held_out or 0) < (told.start.held_out or 0)


def test_statistics_follow_the_batches_or_stay(tmp_path: Path) -> None:
    data, before = patterns(tmp_path), model(NET).graph.initializers["var_bn"].const_value.numpy()
    for how, moves in (("batch", True), ("frozen", False)):
        after = trained("fine-tune", data, batch_norm=how)[0].graph.initializers["var_bn"].const_value.numpy()
        assert np.array_equal(before, after) != moves


def test_statistics_freeze_for_the_last_steps(tmp_path: Path) -> None:
    data = patterns(tmp_path)

    def variance(**options: Any) -> np.ndarray:
        made, _ = trained("fine-tune", data, lr=0.0, **options)
        return np.asarray(made.graph.initializers["var_bn"].const_value.numpy())

    first_epoch = variance(epochs=1)
    assert np.array_equal(variance(epochs=2, freeze_statistics=0.5), first_epoch)
    assert not np.array_equal(variance(epochs=2), first_epoch)
    assert np.array_equal(variance(freeze_statistics=1.0), variance(batch_norm="frozen"))


def test_recalibrated_statistics_are_those_of_the_data(tmp_path: Path) -> None:
    data = patterns(tmp_path)
    after, _ = trained("fine-tune", data, recalibrate=1, batch_size=64, holdout=0.0, lr=0.0)
    with np.load(data) as file:
        c = onnx_ir.convenience.get_const_tensor(after.graph.initializers["conv_w"])
        assert c is not None
        tapped = ir.interpret(after, taps=("c",))
        values = ir.run_module(tapped, {"x": file["x"]})["c"].detach().numpy()
    mean = after.graph.initializers["bn_mean"].const_value.numpy()
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), atol=1e-5)


def test_a_batch_in_parts_has_the_same_gradient(tmp_path: Path) -> None:
    data = patterns(tmp_path)
    whole, parts = (trained("fine-tune", data, accumulate=n, batch_norm="frozen")[0] for n in (1, 4))
    for name, value in whole.graph.initializers.items():
        other = parts.graph.initializers[name].const_value.numpy()
        np.testing.assert_allclose(value.const_value.numpy(), other, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"optimizer": "sgd"}, {"schedule": "linear", "warmup": 0.5}]
)
def test_options_train_too(tmp_path: Path, options: Mapping[str, Any]) -> None:
    told = report_of(trained("fine-tune", patterns(tmp_path), epochs=10, lr=0.02, **options)[1])
    assert told.epochs[-1].loss < told.epochs[0].loss


def test_training_ends_when_nothing_gets_better_and_keeps_the_best(tmp_path: Path) -> None:
    data = patterns(tmp_path)
    after, report = trained("fine-tune", data, epochs=50, lr=0.0, patience=2, batch_norm="frozen")
    told = report_of(report)
    assert len(told.epochs) == 2 and told.best == 0
    assert to_bytes(after) == to_bytes(model(NET))


def test_only_what_is_asked_for_is_trained(tmp_path: Path) -> None:
    data, before = patterns(tmp_path), model(NET)
    after, report = trained("fine-tune", data, parameters=("head*",), batch_norm="frozen")
    moved = {
        name
        for name, value in after.graph.initializers.items()
        if not np.array_equal(value.const_value.numpy(), before.graph.initializers[name].const_value.numpy())
    }
    assert moved == {"head_w"} and report_of(report).parameters == 32
    with pytest.raises(ir.OptionError, match=r"parameters=nothing\*: matches none .*\(conv_w, bn_scale"):
        trained("fine-tune", data, parameters=("nothing*",))


def test_without_data_fine_tune_does_nothing_and_says_so() -> None:
    result = passes.run(model(NET), passes.Pipeline.parse("fine-tune"), passes.Context(), check="structure")
    assert to_bytes(result.model) == to_bytes(model(NET))
    assert "fine-tune: there is no training data; give some by --train" in result.report.warnings


# --- it stops and goes on -------------------------------------------------------------------------


class Stop(Exception):
    """What stands for a crash."""


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_a_training_that_was_killed_ends_with_the_same_bytes(tmp_path: Path, step: int) -> None:
    data = patterns(tmp_path)
    options = {"epochs": 4, "checkpoint": tmp_path / "state", "checkpoint_every": 0.0}
    whole, told = trained("denseshift{skip=}", data, epochs=4)

    def crash(done: int, total: int, what: str) -> None:
        if "epoch" in what and done == step:
            raise Stop

    with pytest.raises(passes.PassError, match="Stop"):
        trained("denseshift{skip=}", data, progress=crash, **options)
    again, report = trained("denseshift{skip=}", data, **options)
    assert to_bytes(again) == to_bytes(whole)
    assert report_of(report) == report_of(told)


def test_an_interrupt_finishes_the_step_and_saves(tmp_path: Path) -> None:
    data, folder = patterns(tmp_path), tmp_path / "state"

    def interrupt(done: int, total: int, what: str) -> None:
        if "epoch" in what and done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained("fine-tune", data, progress=interrupt, checkpoint=folder, checkpoint_every=1e9)
    steps = []
    again, _ = trained("fine-tune", data, checkpoint=folder, progress=lambda done, total, what: steps.append(done))
    assert 5 in steps and 4 not in steps
    assert to_bytes(again) == to_bytes(trained("fine-tune", data)[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_run_does_not_take_the_checkpoint(tmp_path: Path) -> None:
    data, folder = patterns(tmp_path), tmp_path / "state"
    first, _ = trained("fine-tune", data, checkpoint=folder)
    other, _ = trained("fine-tune", data, checkpoint=folder, lr=0.01)
    assert to_bytes(other) == to_bytes(trained("fine-tune", data, lr=0.01)[0]) != to_bytes(first)
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    data, folder = patterns(tmp_path), tmp_path / "state"
    trained("fine-tune", data, checkpoint=folder)
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ir.DataError, match=rf"{path.name}: is no checkpoint .*; remove it to train anew"):
        trained("fine-tune", data, checkpoint=folder)


# --- it fails in one line -------------------------------------------------------------------------


def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path: Path) -> None:
    data, folder = patterns(tmp_path), tmp_path / "state"

    def spoiled(student: Mapping[str, Any], reference: Any, label: Any) -> Any:
        value = student["y"].square().mean()
        return value * (float("nan") if spoiled.calls > 5 else 1.0)  # type: ignore[attr-defined]

    def counted(student: Mapping[str, Any], reference: Any, label: Any) -> Any:
        spoiled.calls = getattr(spoiled, "calls", 0) + 1  # type: ignore[attr-defined]
        return spoiled(student, reference, label)

    text = r"fine-tune: epoch 2, step \d: the loss is nan; take a lower learning rate than 0.001.*last good state is in"
    with pytest.raises(passes.PassError, match=text):
        trained("fine-tune", data, loss=counted, holdout=0.0, checkpoint=folder, epochs=4)
    assert len(list(folder.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried to allocate 8 bytes")])
def test_out_of_memory_names_the_batch_size(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(_train.Student, "penalty", full)
    with pytest.raises(ir.LimitError, match="out of memory at batch size 16; take a smaller one, or cut it up"):
        trained("fine-tune", patterns(tmp_path))


def test_an_op_without_torch_meaning_is_named(tmp_path: Path) -> None:
    text = NET.replace("f = Flatten (p)", "g = Det (x) f = Flatten (p)")
    with pytest.raises(passes.PassError, match="Det has no torch meaning"):
        trained("fine-tune", patterns(tmp_path), text)


def test_unfit_data_is_told_before_the_first_step(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", z=np.zeros((4, 1, 6, 6), np.float32))
    with pytest.raises(ir.DataError, match="z"):
        trained("fine-tune", tmp_path / "other.npz")


def test_data_may_hold_an_input_that_a_pass_has_fixed(tmp_path: Path) -> None:
    text = NET.replace("(float[N,1,6,6] x)", "(float[N,1,6,6] x, float k)").replace(
        "p = GlobalAveragePool (r)", "q = Mul (r, k) p = GlobalAveragePool (q)"
    )
    with np.load(patterns(tmp_path)) as file:
        np.savez(tmp_path / "fixed.npz", k=np.full(len(file["x"]), 2, np.float32), **file)
    _, report = trained("specialize{k=2},fine-tune", tmp_path / "fixed.npz", text, loss="labels,output")
    assert report_of(report).steps == 6


# --- what it trains -------------------------------------------------------------------------------

RECURRENT = """
cells (float[5,N,4] x) => (float[N,3] y)
<float[1,{rows},4] w, float[1,{rows},6] r, float[6,3] head_w, int64[1] axis = {{0}}>
{{
  s, h{more} = {op} <hidden_size: int = 6> (x, w, r)
  last = Squeeze (h, axis)
  y = MatMul (last, head_w)
}}
"""
ATTENTION = """
attend (int64[N,5] ids) => (float[N,5,3] y)
<float[11,8] table, float[8,8] q_w, float[8,8] k_w, float[8,8] v_w, float[8] norm, float[8,3] head_w>
{
  e = Gather (table, ids)
  n = LayerNormalization (e, norm)
  q = MatMul (n, q_w)
  k = MatMul (n, k_w)
  v = MatMul (n, v_w)
  kt = Transpose <perm: ints = [0,2,1]> (k)
  scores = MatMul (q, kt)
  a = Softmax (scores)
  z = MatMul (a, v)
  y = MatMul (z, head_w)
}
"""


@pytest.mark.parametrize(("op", "gates", "more"), [("LSTM", 4, ", cell"), ("GRU", 3, "")])
@pytest.mark.slow
@pytest.mark.ci
def test_recurrent_cells_train(tmp_path: Path, op: str, gates: int, more: str) -> None:
    text = RECURRENT.format(op=op, rows=gates * 6, more=more)
    data = {"x": np.random.default_rng(0).standard_normal((32, 5, 1, 4)).astype(np.float32)}
    options = {"loss": "output", "epochs": 30, "lr": 0.01, "batch_size": 8, "holdout": 0.0}
    after, report = trained("denseshift{bits=3 skip=}", data, text, **options)
    told = report_of(report)
    assert told.epochs[-1].loss < 0.7 * told.epochs[0].loss
    assert "w" in {v.name for node in after.graph for v in node.outputs}


def test_attention_and_embeddings_train(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ids.npz", ids=rng.integers(0, 11, (64, 5)))
    spec = "denseshift{bits=3 skip=}"
    after, report = trained(spec, tmp_path / "ids.npz", ATTENTION, loss="output,layers", epochs=20, lr=0.01)
    told = report_of(report)
    assert told.epochs[-1].loss < 0.7 * told.epochs[0].loss
    assert {"output", "layers"} <= set(told.epochs[0].terms)
    assert "table" in {v.name for node in after.graph for v in node.outputs}


@pytest.mark.parametrize("spec", ["fine-tune", "denseshift{bits=3 skip=}"])
def test_half_precision_is_trained_in_fp32(spec: str) -> None:
    text = "half (float16[N,32] x) => (float16[N,16] y) <float16[32,16] w> { y = MatMul (x, w) }"
    data = {"x": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float16)}
    after, report = trained(spec, data, text, loss="output", weight_decay=0.1)
    told = report_of(report)
    assert np.isfinite([epoch.held_out for epoch in told.epochs]).all()
    y = ir.Session(after).run(data)["y"]
    assert y.dtype == np.float16 and np.isfinite(y).all()


def test_passes_train_one_by_one_or_together(tmp_path: Path) -> None:
    text = NET.replace("conv_w,", "conv_w, float[64,8,3,3] wide_w, float[64,64,3,3] second_w,").replace("4,8]", "4,64]")
    convs = "e = Conv <pads: ints = [1,1,1,1]> (r, wide_w) d = Conv <pads: ints = [1,1,1,1]> (e, second_w)"
    text = text.replace("p = GlobalAveragePool (r)", f"{convs} p = GlobalAveragePool (d)")
    spec, data = "kron{ratio=0.2 layers=second*},denseshift{bits=4 skip=}", patterns(tmp_path)
    for joint, trainings in ((False, [True, True]), (True, [False, True])):
        after, report = trained(spec, data, text, joint=joint, loss="output")
        assert [p.rewrites > 0 for p in report.passes] == [True, True]
        assert [p.training is not None for p in report.passes] == trainings
        sizes = [p.columns[f"weight_bytes_{when}"] for p in report.passes for when in ("before", "after")]
        assert report.before.weight_bytes == sizes[0] > sizes[1] == sizes[2] > sizes[3] == report.after.weight_bytes
        assert not [layer for layer in report.layers if layer.bytes_after > layer.bytes_before]  # others are trained
        assert not [n for n in after.graph if n.domain == "mc_opt" and ir.find_op(n.op_type).training_form]
    assert report_of(report).passes == ("kron", "denseshift")


def test_samples_that_influence_each_other_run_alone(tmp_path: Path) -> None:
    text = """
    alone (float[1,3] x) => (float[1,2] y) <float[6,2] w, int64[2] flat = {1,-1}>
    { d = Concat <axis: int = 1> (x, x) f = Reshape (d, flat) y = MatMul (f, w) }
    """
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32))
    _, report = trained("denseshift{bits=2 skip=}", tmp_path / "x.npz", text, loss="output", epochs=10, lr=0.01)
    told = report_of(report)
    assert told.start is not None and (told.epochs[-1].held_out or 0) < (told.start.held_out or 0)
    assert any("one after another" in note for _, note in report.passes[0].notes)


def test_inputs_of_fixed_sizes_beside_a_scalar_run_alone(tmp_path: Path) -> None:
    text = """
    fixed (float[1,3] x, float k, float[2,3] h) => (float[2,2] y) <float[3,2] w>
    { a = Add (x, h) s = Mul (a, k) y = MatMul (s, w) }
    """
    rng = np.random.default_rng(0)
    data = {"x": rng.random((8, 3)), "k": rng.random(8), "h": rng.random((8, 2, 3))}
    _, report = trained("fine-tune", {k: v.astype(np.float32) for k, v in data.items()}, text, loss="output")
    assert any("one after another" in note for _, note in report.passes[0].notes)


def test_options_of_a_training_are_all_told() -> None:
    told = passes.Training.__doc__ or ""
    for option in dataclasses.fields(passes.Training):
        assert f"{option.name}:" in told
