"""The run of a pipeline: purity, verification, checks of numbers, reports; and everything that must be refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir, passes
from mc_opt.passes import Context, Pass, PassError, Pipeline, Step
from tests.passes import toy
from tests.passes.toy import Toy

W1 = ", ".join(str(i % 7 - 3) for i in range(32))
W2 = ", ".join(str(i % 5 - 2) for i in range(24))
MODEL = f"""
<ir_version: 10, opset_import: ["": 21]>
g (float[2,4] x) => (float[2,3] y)
<float[4,8] w1 = {{{W1}}}, float[8,3] w2 = {{{W2}}}>
{{
  h = MatMul (x, w1)
  r = Relu (h)
  y = MatMul (r, w2)
}}
"""


@pytest.fixture
def model() -> onnx_ir.Model:
    made = onnx_ir.from_proto(onnx.parser.parse_model(MODEL))
    for number, node in enumerate(made.graph):
        node.name = f"n{number}"
        for value in node.outputs:
            value.dtype = onnx_ir.DataType.FLOAT
    h, r, _ = (node.outputs[0] for node in made.graph)
    h.shape = r.shape = onnx_ir.Shape([2, 8])
    return made


def _run(model: onnx_ir.Model, *made: Pass, **options: Any) -> passes.Result:
    return passes.run(model, Pipeline.of(*made), options.pop("ctx", Context()), **options)


def test_an_empty_pipeline_gives_the_model_back(model: onnx_ir.Model) -> None:
    result = _run(model)
    assert result.model is not model
    assert ir.to_text(result.model) == ir.to_text(model)
    assert result.report.before == result.report.after == passes.Size(56, 224, 3)
    assert result.report.passes == ()


def test_a_pass_edits_a_clone_and_the_report_tells(model: onnx_ir.Model) -> None:
    before = ir.to_text(model)
    result = _run(model, Toy(ratio=0.5, skip=("w2",)))
    assert ir.to_text(model) == before
    np.testing.assert_array_equal(
        result.model.graph.initializers["w1"].const_value.numpy(),
        model.graph.initializers["w1"].const_value.numpy() / 2,
    )
    assert result.model.graph.initializers["w2"].const_value is model.graph.initializers["w2"].const_value
    (row,) = result.report.passes
    assert (row.name, row.text, row.rewrites) == ("toy", "toy{skip=w2}", 1)
    assert row.skips == {"w2": "skip=w2 names it"}
    assert row.notes == (("w1", "times 0.5"),)
    assert row.columns["weight_bytes_after"] == 224
    assert row.drift["previous"]["outputs"][0]["sqnr_db"] == pytest.approx(6.02, abs=0.01)  # half the signal is lost
    (layer,) = result.report.layers
    assert (layer.layer, layer.rewritten_by, layer.elements) == ("w1", "toy", 32)
    assert (layer.bytes_before, layer.bytes_after, layer.bits) == (128, 128, 32.0)
    assert [name for name, _ in result.seconds] == ["toy"]


def test_overrides_reach_the_pass(model: onnx_ir.Model) -> None:
    pipeline = Pipeline((Step(Toy(), (("w2", {"ratio": 2.0}),)),))
    result = passes.run(model, pipeline, Context())
    assert result.report.passes[0].notes == (("w1", "times 0.5"), ("w2", "times 2.0"))
    assert '[pass.layer."w2"]' in result.report.recipe


def test_a_pass_that_rewrites_nothing_warns_and_changes_nothing(model: onnx_ir.Model) -> None:
    result = _run(model, Toy(layers=("other",)))
    assert ir.to_text(result.model) == ir.to_text(model)
    assert "toy rewrote nothing: w1: layers=other does not name it (and 1 more)" in result.report.warnings
    assert result.report.passes[0].drift == {}


def test_drift_is_told_against_the_last_model_and_the_original(model: onnx_ir.Model) -> None:
    result = _run(model, Toy(ratio=0.5), Toy(ratio=2.0))
    back = result.report.passes[1].drift
    assert back["reference"]["outputs"][0]["max_abs"] == 0
    assert back["previous"]["outputs"][0]["max_abs"] > 0


def test_random_data_warns_and_real_data_does_not(model: onnx_ir.Model) -> None:
    assert any("seeded random" in w for w in _run(model, Toy()).report.warnings)
    data = ir.seeded_data(model, 3, 7)
    report = _run(model, Toy(), ctx=Context(data=data)).report
    assert not report.warnings
    assert any("3 real samples" in c for c in report.checks)


def test_the_same_run_gives_the_same_bytes(model: onnx_ir.Model) -> None:
    texts = {_run(model, Toy(), Toy(layers=("w2",))).report.text() for _ in range(2)}
    assert len(texts) == 1


def test_structure_checks_name_what_was_not_checked(model: onnx_ir.Model) -> None:
    report = _run(model, Toy(), check="structure").report
    assert report.passes[0].drift == {}
    assert {u.check for u in report.unchecked} == {
        "onnx.checker",
        "weights are finite numbers",
        "run in ONNX Runtime, drift, numbers of exact passes",
    }


def test_above_the_memory_limit_numbers_are_not_checked_and_the_report_says_so(model: onnx_ir.Model) -> None:
    report = _run(model, Toy(), ctx=Context(memory_limit=100)).report
    assert report.passes[0].drift == {}
    assert "memory limit" in report.unchecked[0].reason
    assert any("memory limit" in w for w in report.warnings)


def test_inputs_beyond_the_memory_limit_are_not_drawn(model: onnx_ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)):
        assert value.shape is not None
        value.shape = onnx_ir.Shape([99999999, *value.shape[1:]])
    report = _run(model, Toy()).report
    assert report.unchecked[0].reason.startswith("needs about")


def test_a_dry_run_tells_layers_and_bytes(model: onnx_ir.Model) -> None:
    report = passes.dry_run(model, Pipeline.of(Toy(layers=("w1",))), Context())
    assert [(row.layer, row.bytes_after) for row in report.layers] == [("w1", 128)]


def test_stop_after(model: onnx_ir.Model) -> None:
    result = _run(model, Toy(), toy.but(name="second"), stop_after="toy")
    assert [p.name for p in result.report.passes] == ["toy"]
    with pytest.raises(ir.OptionError, match="unknown pass 'toi'; did you mean 'toy'"):
        _run(model, Toy(), stop_after="toi")


def test_dump_writes_the_model_after_each_pass(model: onnx_ir.Model, tmp_path: Path) -> None:
    result = _run(model, Toy(), Toy(), dump=tmp_path / "ir")
    assert sorted(p.name for p in (tmp_path / "ir").iterdir()) == ["000_input.txt", "001_toy.txt", "002_toy.txt"]
    assert (tmp_path / "ir/002_toy.txt").read_text() == ir.to_text(result.model)


def test_an_instrument_adds_columns(model: onnx_ir.Model) -> None:
    class Count:
        def before(self, step: Pass, model: onnx_ir.Model) -> None:
            self.name = step.name

        def after(self, step: Pass, old: onnx_ir.Model, new: onnx_ir.Model) -> Mapping[str, Any]:
            return {"same": old is new, "name": self.name}

    columns = _run(model, Toy(), instruments=[Count()]).report.passes[0].columns
    assert (columns["same"], columns["name"]) == (False, "toy")


class TestRefused:
    """What a pass must not do."""

    def test_an_exception_names_the_pass_and_keeps_the_last_good_model(self, model: onnx_ir.Model) -> None:
        def harm(model: onnx_ir.Model) -> None:
            raise KeyError("fc")

        with pytest.raises(PassError, match=r"toy: KeyError: 'fc' \(after toy\)") as caught:
            _run(model, Toy(ratio=3.0), toy.but(harm))
        good = caught.value.last_good
        assert good is not None
        assert good.graph.initializers["w1"].const_value.numpy()[0, 0] == -9
        assert caught.value.before == ("toy",)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_a_pass_may_raise_the_error_itself(self, model: onnx_ir.Model) -> None:
        def harm(model: onnx_ir.Model) -> None:
            raise PassError("toy", "n1", "Relu is in the way")

        with pytest.raises(PassError, match=r"toy: n1: Relu is in the way \(after toy\)"):
            _run(model, Toy(), toy.but(harm))

    @pytest.mark.parametrize("error", [ir.OptionError("no script"), ir.LimitError("disk"), ir.DataError("data")])
    def test_the_users_and_the_machines_matters_stay_what_they_are(
        self, model: onnx_ir.Model, error: Exception
    ) -> None:
        def harm(model: onnx_ir.Model) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            _run(model, toy.but(harm))
        assert caught.value is error

    def test_a_wrong_graph(self, model: onnx_ir.Model) -> None:
        def harm(model: onnx_ir.Model) -> None:
            nodes = list(model.graph)
            nodes[1].outputs[0].name = "h"

        with pytest.raises(PassError, match=r"toy: made a wrong model: .*h"):
            _run(model, toy.but(harm))

    def test_other_outputs(self, model: onnx_ir.Model) -> None:
        def harm(model: onnx_ir.Model) -> None:
            model.graph.outputs[0].name = "z"

        with pytest.raises(PassError, match="changed the outputs"):
            _run(model, toy.but(harm))

    def test_an_exact_pass_that_moves_the_numbers(self, model: onnx_ir.Model) -> None:
        def harm(model: onnx_ir.Model) -> None:
            value = model.graph.initializers["w1"]
            value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.01, name="w1")

        with pytest.raises(PassError, match=r"output y: the pass promises the same numbers, but .*tolerance"):
            _run(model, toy.but(harm, exact=True))

    def test_an_exact_pass_that_keeps_them(self, model: onnx_ir.Model) -> None:
        def harmless(model: onnx_ir.Model) -> None:
            value = model.graph.initializers["w1"]
            value.const_value = onnx_ir.tensor(value.const_value.numpy() * np.float32(1 + 1e-7), name="w1")

        verdict = _run(model, toy.but(harmless, exact=True)).report.passes[0].verdict
        assert verdict is not None
        assert verdict["ok"]

    def test_a_wrong_model_is_refused_before_the_first_pass(self, model: onnx_ir.Model) -> None:
        list(model.graph)[1].outputs[0].name = "h"
        with pytest.raises(ir.IRError):
            _run(model, Toy())

    def test_data_that_does_not_fit(self, model: onnx_ir.Model) -> None:
        other = onnx_ir.from_proto(onnx.parser.parse_model(MODEL.replace("float[2,4] x", "float[3,4] x")))
        with pytest.raises(ir.DataError, match="x"):
            _run(model, Toy(), ctx=Context(data=ir.seeded_data(other, 2, 0)))


class TestOurOps:
    """Ops of ours may not get lost on the way."""

    def _packed(self, model: onnx_ir.Model) -> onnx_ir.Model:
        """The model with w1 stored as a 4-bit Lookup."""
        (site,) = [s for s in ir.weight_sites(model) if isinstance(s, ir.WeightSite) and s.layer == "w1"]
        rows = site.value.const_value.numpy().T
        book = np.unique(rows).astype(np.float32)
        codes = ir.pack_codes(np.searchsorted(book, rows).astype(np.uint8).reshape(-1), 4)
        decode = ir.node(
            "Lookup",
            [_constant(codes), _constant(book)],
            {"bits": 4, "shape": [4, 8], "axes": [1], "group_size": 0},
        )
        ir.replace_weight(site, decode, by=("test", "pack"))
        ir.add_functions(model)
        return model

    def test_packing_is_counted_to_the_byte(self, model: onnx_ir.Model) -> None:
        result = _run(model, toy.but(self._packed))
        (row,) = result.report.layers
        assert (row.bytes_before, row.bytes_after) == (128, 16 + 7 * 4)
        assert row.rule == "pack"
        assert result.report.after.parameters == 32 + 24  # the codebook is a part of the weight, not a weight
        assert result.report.passes[0].drift["previous"]["outputs"][0]["max_abs"] == 0

    @pytest.mark.parametrize("terms", [1, 2])
    def test_a_packed_weight_counts_as_what_it_decodes_to(self, model: onnx_ir.Model, terms: int) -> None:
        result = _run(model, Pipeline.parse(f"denseshift{{terms={terms} bits=2 skip=}}").steps[0].rewrite)
        assert result.report.passes[0].rewrites
        assert result.report.after.parameters == result.report.before.parameters

    def test_folding_a_decode_is_an_error(self, model: onnx_ir.Model) -> None:
        def fold(model: onnx_ir.Model) -> None:
            node = next(n for n in model.graph if n.op_type == "Lookup")
            old = node.outputs[0]
            dense = ir.initializer(model.graph, "dense", np.zeros((4, 8), np.float32))
            old.replace_all_uses_with(dense)
            model.graph.remove(node, safe=True)
            old.name = None
            dense.name = "w1"

        packed = self._packed(model)
        with pytest.raises(PassError, match="an op of mc_opt was lost"):
            _run(packed, toy.but(fold))
        assert _run(packed, toy.but(fold, allows_losing_our_ops=True)).report.passes[0].rewrites == 1

    def test_a_decode_folded_into_what_follows_is_an_error(self, model: onnx_ir.Model) -> None:
        def fold(model: onnx_ir.Model) -> None:
            product, decode = model.graph[1], model.graph[0]
            other = ir.initializer(model.graph, "w1.dense", np.zeros((4, 8), np.float32))
            product.replace_input_with(1, other)
            model.graph.remove(decode, safe=True)

        with pytest.raises(PassError, match="an op of mc_opt was lost"):
            _run(self._packed(model), toy.but(fold))


def _constant(array: np.ndarray) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(array)
    return onnx_ir.Value(type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(array.shape), const_value=tensor)
