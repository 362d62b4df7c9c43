"""Capturing torch modules: names, BatchNorm, recurrent weights, and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def make_net() -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
            self.norm = torch.nn.BatchNorm2d(4)
            self.rnn = torch.nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.gru = torch.nn.GRU(10, 6, batch_first=True)
            self.fc = torch.nn.Linear(6, 7)
            self.embed = torch.nn.Embedding(10, 7)
            self.head = torch.nn.Linear(7, 10)
            self.head.weight = self.embed.weight

        def forward(self, image: Any, ids: Any) -> Any:
            h = self.norm(self.conv(image)).relu().mean(3).transpose(1, 2)
            h, _ = self.gru(self.rnn(h)[0])
            return self.head(self.fc(h) + self.embed(ids))

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():  # statistics that do something
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture(scope="module")
def captured() -> Iterator[tuple[Any, tuple[Any, ...], np.ndarray, onnx_ir.Model]]:
    net, example = make_net(), (torch.randn(2, 3, 8, 8), torch.arange(12).reshape(2, 6) % 10)
    expected = net(*example).detach().numpy()
    yield net, example, expected, ir.capture(net, example)


def test_numbers_and_interface(
    captured: tuple[Any, tuple[Any, ...], np.ndarray, onnx_ir.Model], tmp_path: Path
) -> None:
    _, example, expected, model = captured
    ir.verify(model)
    assert model.opset_imports[""] == 21
    assert [v.name for v in model.graph.inputs] == ["image", "ids"]
    path = ir.save_model(model, tmp_path).paths[0]
    (output,) = ir.Session(path).run({"image": example[0].numpy(), "ids": example[1].numpy()}).values()
    np.testing.assert_allclose(output, expected, atol=1e-5)  # float sums in another order


def test_weights_have_torch_names(captured: tuple[Any, tuple[Any, ...], np.ndarray, onnx_ir.Model]) -> None:
    net, _, _, model = captured
    weights = model.graph.initializers
    names = {name for name in weights if not name.startswith("val_")}
    assert names == {
        *(f"norm.{p}" for p in ("weight", "bias", "running_mean", "running_var")),
        *(f"{m}.{w}" for m in ("rnn.l0", "rnn.l1", "gru") for w in "WRB"),
        "conv.weight",
        "fc.weight",
        "fc.bias",
        "head.weight",
        "head.bias",
    }
    assert all(v.shape.numpy() == () or max(v.shape.numpy()) < 9 for n, v in weights.items() if n not in names)
    assert weights["rnn.l1.W"].metadata_props == {
        "mc_opt.torch": "rnn.weight_ih_l1,rnn.weight_ih_l1_reverse",
        "mc_opt.torch.gates": "torch i,f,g,o; onnx i,o,f,c",
    }
    assert weights["gru.B"].metadata_props["mc_opt.torch"] == "gru.bias_ih_l0,gru.bias_hh_l0"
    np.testing.assert_array_equal(weights["fc.weight"].const_value.numpy(), net.fc.weight.detach().numpy().T)
    # Tied weights stay one tensor.
    assert {n.op_type for n, _ in weights["head.weight"].uses()} == {"Gather", "Transpose"}


def test_the_graph_is_what_the_module_says(captured: tuple[Any, tuple[Any, ...], np.ndarray, onnx_ir.Model]) -> None:
    model = captured[3]
    nodes = list(model.graph)
    assert [n.op_type for n in nodes[:3]] == ["Conv", "BatchNormalization", "Relu"]
    assert len(nodes[0].inputs) == 2 or nodes[0].inputs[2] is None  # no bias
    assert nodes[0].metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'conv', 'conv2d']"
    assert not any("stack_trace" in key for n in nodes for key in n.metadata_props)


def test_weights_are_copies(captured: tuple[Any, tuple[Any, ...], np.ndarray, onnx_ir.Model]) -> None:
    net, _, _, model = captured
    before = model.graph.initializers["conv.weight"].const_value.numpy().copy()
    with torch.no_grad():
        net.conv.weight.zero_()
    np.testing.assert_array_equal(model.graph.initializers["conv.weight"].const_value.numpy(), before)


def small() -> Any:
    return torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())


@pytest.mark.slow
@pytest.mark.ci
def test_fx_and_exported_programs_and_open_dimensions() -> None:
    net, x = small().eval(), torch.randn(2, 2, 8)
    expected = ["Conv", "BatchNormalization", "Relu"]
    batch = {0: torch.export.Dim("batch")}
    model = ir.capture(net, x, dynamic_shapes=(batch,), input_names=["wave"], output_names=["out"])
    assert [n.op_type for n in model.graph] == expected
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "2", "8"]
    assert ([v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]) == (["wave"], ["out"])
    for other in (torch.fx.symbolic_trace(net), torch.export.export(net, (x,))):
        model = ir.capture(other, (x,))
        assert [n.op_type for n in model.graph] == expected
        assert {"0.weight", "0.bias", "1.running_var"} <= set(model.graph.initializers)


@pytest.mark.slow
@pytest.mark.ci
def test_a_tensor_returned_twice_is_two_outputs(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            y = x + 1
            return y, y, x

    x = torch.randn(2, 3)
    model = ir.capture(Twice().eval(), x, output_names=["a", "b", "c"])
    assert ([v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]) == (["x"], ["a", "b", "c"])
    model = ir.capture(Twice().eval(), x)
    ir.verify(model)
    results = ir.Session(ir.save_model(model, tmp_path).paths[0]).run({"x": x.numpy()})
    assert len(results) == 3
    for actual, expected in zip(results.values(), (x + 1, x + 1, x), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


def refusal(*arguments: Any) -> str:
    with pytest.raises(ir.IRError) as caught:
        ir.capture(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_modules_in_train_mode_are_refused() -> None:
    x = torch.randn(2, 2, 8)
    assert "is in train mode" in refusal(small(), x)
    part = small().eval()
    part[1].train()
    assert "'1' is in train mode" in refusal(part, x)
    dropout = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.Dropout(0.5))
    assert "train mode" in refusal(torch.export.export(dropout, (x,)))


def test_modules_that_cannot_be_traced(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    assert "Branch: cannot be captured: " in refusal(Branch().eval(), torch.randn(3))
    assert capfd.readouterr().out == ""
    assert "expected a torch.nn.Module" in refusal(3, torch.randn(3))
    assert "no example inputs" in refusal(small().eval())


@pytest.mark.slow
@pytest.mark.ci
def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_for_capture.py").write_text(
        "import torch\n"
        "def relu(): return torch.nn.ReLU().eval(), torch.zeros(2)\n"
        "def program(): return torch.export.export(torch.nn.ReLU().eval(), (torch.zeros(2),))\n"
        "def open(): return torch.nn.ReLU().eval(), torch.zeros(2, 3), ({0: torch.export.Dim('batch')},)\n"
        "def wrong(): return 3\n"
        "def broken(): raise ValueError('no weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    for name in ("relu", "program"):
        assert [n.op_type for n in ir.from_torch(f"nets_for_capture:{name}").graph] == ["Relu"]
    assert [str(d) for d in ir.from_torch("nets_for_capture:open").graph.inputs[0].shape or ()] == ["batch", "3"]
    for text, message in (
        ("nets_for_capture", "expected package.module:factory"),
        ("nets_for_nobody:make", "No module named 'nets_for_nobody'"),
        ("nets_for_capture:none", "has no 'none'"),
    ):
        with pytest.raises(ir.OptionError, match=message):
            ir.from_torch(text)
    for name, message in (("wrong", "returned int, expected"), ("broken", "ValueError: no weights")):
        with pytest.raises(ir.IRError, match=message):
            ir.from_torch(f"nets_for_capture:{name}")
    assert sys.path == path


def test_without_torch_the_message_says_how_to_get_it() -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom mc_opt import ir\nir.capture(1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'mc-opt[torch]'" in done.stderr
