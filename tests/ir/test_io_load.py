"""Reading models: what comes in right, what is refused and in which words, and lifting from old opsets."""

from __future__ import annotations

import errno
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir
import pytest

from mc_opt import ir

LINEAR = """<ir_version: 8, opset_import: ["": 17]>
small (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
  h = MatMul (x, w)
  y = Relu (h)
}"""
# Everything that opset 13 moved from attributes to inputs, in the graph and in a body.
OLD = """<ir_version: 3, opset_import: ["": 9, "com.microsoft": 1]>
old (float[2, 4] x, bool c, float[4] b) => (float[2, 4] y, float[2, 4] z) <float[4] b = {1, 2, 3, 4}> {
  h = Add (x, b)
  t = If (c) <
    then_branch = yes () => (float[1, 2, 4] t1) { t1 = Unsqueeze <axes = [0]> (h) },
    else_branch = no () => (float[1, 2, 4] t2) {
      b2 = Constant <value = float[4] {5, 6, 7, 8}> ()
      e = Mul (h, b2)
      t2 = Unsqueeze <axes = [0]> (e)
    }>
  s = Squeeze <axes = [0]> (t)
  y = Softmax <axis = 1> (s)
  z = ReduceSum <axes = [0], keepdims = 0> (t)
}"""


def write(folder: Path, text: str = LINEAR, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(ir.IRError) as caught:
        ir.load_model(path, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_a_model_is_lifted_typed_and_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    model = ir.load_model(path)
    assert model.opset_imports[""] == 21
    assert model.ir_version == 10
    assert [(n.name, n.op_type) for n in model.graph] == [("h", "MatMul"), ("y", "Relu")]
    assert [str(d) for d in model.graph.node("h").outputs[0].shape] == ["n", "4"]
    source = model.meta["mc_opt.source"]
    assert source == ir.Source(str(path), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), 17, 8)


def test_weights_are_read_only(tmp_path: Path) -> None:
    array = ir.load_model(write(tmp_path)).graph.initializers["w"].const_value.numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_an_old_model_keeps_names_texts_and_numbers(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(OLD)
    proto.doc_string, proto.graph.doc_string = "a model", "a graph"
    proto.metadata_props.add(key="author", value="me")
    proto.graph.node[0].name, proto.graph.node[0].doc_string = "adds", "a node"
    proto.graph.node[0].metadata_props.add(key="layer", value="0")
    proto.graph.node[1].attribute[1].g.node[1].metadata_props.add(key="layer", value="1")
    proto.graph.input[0].doc_string = "an input"
    path = tmp_path / "old.onnx"
    path.write_bytes(proto.SerializeToString())
    model = ir.load_model(path)
    assert model.opset_imports == {"": 21, "com.microsoft": 1}
    assert [v.name for v in model.graph.inputs] == ["x", "c"]
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert (model.doc_string, model.graph.doc_string, model.graph.name) == ("a model", "a graph", "old")
    assert model.metadata_props == {"author": "me"}
    add = model.graph.node("adds")
    assert (add.doc_string, add.metadata_props) == ("a node", {"layer": "0"})
    assert model.graph.inputs[0].doc_string == "an input"
    body = next(n for n in model.graph if n.op_type == "If").attributes["else_branch"].as_graph()
    assert body.node("e").metadata_props == {"layer": "1"}
    # What the converter adds is called after what it is for.
    assert {"t1.lifted", "t2.lifted"} <= {o.name for n in model.graph.all_nodes() for o in n.outputs}
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    for flag in (True, False):
        inputs = {"x": x, "c": np.array(flag)}
        before, after = ir.Session(path).run(inputs), ir.Session(model).run(inputs)
        for name, expected in before.items():
            np.testing.assert_array_equal(after[name], expected)


@pytest.mark.parametrize(
    "opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, onnx.defs.onnx_opset_version()]
)
def test_every_opset_comes_in(tmp_path: Path, opset: int) -> None:
    model = ir.load_model(write(tmp_path, LINEAR.replace("17", str(opset))))
    assert model.opset_imports[""] == max(opset, 21)
    ir.verify(model)


def test_functions_of_an_old_model_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[3] x) => (float[3] y) { y = local.twice (x) }
    <domain: "local", opset_import: ["": 13]> twice (a) => (b) { b = Add (a, a) }"""
    model = ir.load_model(write(tmp_path, text))
    assert not model.functions
    assert [(n.op_type, n.outputs[0].name) for n in model.graph] == [("Add", "y")]


def test_functions_of_a_new_model_stay(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 22, "local": 1]>
    g (float[3] x) => (float[3] y) { y = local.twice (x) }
    <domain: "local", opset_import: ["": 22]> twice (a) => (b) { b = Add (a, a) }"""
    model = ir.load_model(write(tmp_path, text))
    assert model.opset_imports[""] == 22
    assert len(model.functions) == 1
    assert [str(d) for d in model.graph.outputs[0].shape] == ["3"]


def test_our_functions_are_made_anew(tmp_path: Path) -> None:
    """A file of another release of mc-opt, whose bodies were written differently, is the same model."""
    text = """<ir_version: 10, opset_import: ["": 21, "mc_opt": 1]> g (float[1,2] x) => (float[1,4] y) {
        w = Constant <value = float[2,4] {1, 2, 3, 4, 5, 6, 7, 8}> ()
        y = MatMul (x, w)
    }"""
    model = onnx_ir.from_onnx_text(text)
    lookup = ir.node(
        "Lookup",
        [ir.pack_codes(np.zeros((2, 4), np.uint8), 1), np.array([1, 2], np.float32)],
        {"bits": 1, "shape": (2, 4), "axes": (0,), "group_size": 0},
        name="decode",
        output="w",
    )
    for index, name in enumerate(("codes", "book")):
        data = lookup.inputs[index]
        assert data is not None and data.const_value is not None
        lookup.replace_input_with(index, ir.initializer(model.graph, name, data.const_value.numpy()))
    model.graph.insert_before(model.graph[0], lookup)
    model.graph[2].replace_input_with(1, lookup.outputs[0])
    model.graph.remove(model.graph[1], safe=True)
    model.graph[1].outputs[0].dtype = onnx_ir.DataType.FLOAT
    ir.add_functions(model)
    ir.verify(model)
    proto = onnx_ir.to_proto(model)
    (function,) = proto.functions
    function.doc_string = "another release"
    function.overload = proto.graph.node[0].overload = "another name"
    onnx.save(proto, tmp_path / "other.onnx")
    loaded = ir.load_model(tmp_path / "other.onnx")
    ir.verify(loaded)
    assert list(loaded.functions) == list(model.functions)
    function.name = proto.graph.node[0].op_type = "Unheard"
    onnx.save(proto, tmp_path / "other.onnx")
    assert "mc_opt.Unheard" in refusal(tmp_path / "other.onnx")


def test_weights_do_not_stay_constant_nodes_and_numbers_do(tmp_path: Path) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[16] x) => (float[16] y, float[3] z) {{
      big = Constant <value = float[16] {{{",".join(["1"] * 16)}}}> ()
      bias = Constant <value = float[1] {{1}}> ()
      a = Add (x, big)
      y = Add (a, bias)
      small = Constant <value = int64[1] {{3}}> ()
      z = Expand (one, small)
      one = Constant <value = float {{1}}> ()
    }}"""
    model = ir.load_model(write(tmp_path, text))
    assert list(model.graph.initializers) == ["big", "bias"]
    assert {n.name for n in model.graph if n.op_type == "Constant"} == {"one", "small"}
    ir.verify(model)


def test_negative_dimensions_are_unknown(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = ir.load_model(tmp_path / "m.onnx")
    assert not isinstance(model.graph.inputs[0].shape[0], int)


def test_duplicate_node_names_get_a_name_of_their_own(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    for node in proto.graph.node:
        node.name = "same"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert [n.name for n in ir.load_model(tmp_path / "m.onnx").graph] == ["same", "same.1"]


def test_a_value_that_is_two_outputs_gets_two_names(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    proto.graph.output.append(proto.graph.output[0])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = ir.load_model(tmp_path / "m.onnx")
    ir.verify(model)
    assert [v.name for v in model.graph.outputs] == ["y", "y.1"]
    assert model.graph.outputs[1].shape == model.graph.outputs[0].shape


def test_an_unsorted_graph_is_sorted(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    proto.graph.node.reverse()
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert [n.op_type for n in ir.load_model(tmp_path / "m.onnx").graph] == ["MatMul", "Relu"]


def test_sparse_weights_become_dense(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    del proto.graph.initializer[:]
    values = onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.array([0, 5], np.int64))
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    expected = np.zeros((4, 4), np.float32)
    expected[0, 0], expected[1, 1] = 1, 2
    weight = ir.load_model(tmp_path / "m.onnx").graph.initializers["w"]
    np.testing.assert_array_equal(weight.const_value.numpy(), expected)


@pytest.mark.parametrize("dtype", [onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4, onnx_ir.DataType.BFLOAT16])
def test_odd_types_come_in_from_both_places(tmp_path: Path, dtype: onnx_ir.DataType) -> None:
    array = np.array([1, 2, 3, 4, 5], dtype.numpy())
    tensor = onnx_ir.Tensor(array, dtype, name="w")
    value = onnx_ir.Value(name="w", const_value=tensor, type=onnx_ir.TensorType(dtype), shape=tensor.shape)
    node = onnx_ir.Node("", "Cast", [value], [onnx_ir.AttrInt64("to", 1)])
    node.outputs[0].name = "y"
    graph = onnx_ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 21})
    for location in (None, "w.data"):
        path = tmp_path / f"{location}.onnx"
        onnx_ir.save(onnx_ir.Model(graph, ir_version=10), path, external_data=location, size_threshold_bytes=0)
        loaded = ir.load_model(path).graph.initializers["w"].const_value
        np.testing.assert_array_equal(loaded.numpy(), array)
        assert loaded.dtype == dtype


def test_a_graph_without_outputs_is_refused(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    del proto.graph.output[:]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.IRError, match="its graph has no output"):
        ir.load_model(tmp_path / "m.onnx")


# Refusals


def test_files_that_are_no_models(tmp_path: Path) -> None:
    def content(data: bytes) -> Path:
        (tmp_path / "bad.onnx").write_bytes(data)
        return tmp_path / "bad.onnx"

    whole = write(tmp_path).read_bytes()
    assert "no such file" in refusal(tmp_path / "absent.onnx")
    assert "is a folder" in refusal(tmp_path)
    assert "is empty" in refusal(content(b""))
    assert "is a text file that begins 'hello" in refusal(content(b"hello, world\n" * 30))
    assert "cut short" in refusal(content(whole[: len(whole) // 2]))
    assert "cut short" in refusal(content(bytes(range(256))))
    assert "pickle" in refusal(content(b"\x80\x02}q\x00."))
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    assert "mc_opt.capture" in refusal(tmp_path / "net.pt")
    assert "holds no ONNX graph" in refusal(content(onnx.OperatorSetIdProto(version=3).SerializeToString()))
    assert "holds no ONNX graph" in refusal(content(onnx.ModelProto(ir_version=8).SerializeToString()))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write(tmp_path)
    monkeypatch.setattr("mc_opt.ir.io.read.open", refuse, raising=False)
    assert "cannot be read (Permission denied)" in refusal(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"": 17', '"": 6', "opset 6, expected 7 to"),
        ('"": 17', '"": 99', "opset 99, the installed onnx"),
        ("ir_version: 8", "ir_version: 99", "IR version 99"),
        ("ir_version: 8", "ir_version: 2", "IR version 2"),
        ("Relu (h)", "Relu (q)", "node 'y' (Relu) reads 'q', which nothing produces"),
        ("y = Relu (h)", "z = Relu (h)", "output 'y' is produced by no node"),
        ("y = Relu (h)", "h = Relu (h)\n y = Relu (h)", "value 'h' is defined twice"),
        ("MatMul (x, w)", "MatMul (y, w)", "the graph is cyclic: "),
    ],
)
def test_models_that_do_not_work(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in refusal(write(tmp_path, LINEAR.replace(old, new)))


def test_a_cycle_is_named(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, LINEAR.replace("MatMul (x, w)", "MatMul (y, w)")))
    assert "h -> y -> h" in text or "y -> h -> y" in text


def test_a_weight_of_the_wrong_length(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    proto.graph.initializer[0].CopyFrom(onnx.TensorProto(name="w", data_type=1, dims=[4, 4], raw_data=bytes(60)))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert "60 bytes of data, expected 64 for FLOAT[4,4]" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize(("number", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_weights_that_are_not_finite(tmp_path: Path, number: float, word: str) -> None:
    proto = onnx.parser.parse_model(LINEAR)
    array = np.ones((4, 4), np.float32)
    array[1, 1:3] = number
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert f"weight 'w' holds 2 {word} of 16 elements" in refusal(path)
    ir.load_model(path, check="structure")


def test_an_infinite_mask_is_no_weight(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(LINEAR.replace("MatMul", "Add"))
    array = np.full((4, 4), -np.inf, np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    ir.load_model(tmp_path / "m.onnx")


def test_a_real_graph_of_opset_9(tmp_path: Path) -> None:
    """SqueezeNet as onnx itself ships it: IR 3, weights listed as inputs and made by ConstantOfShape."""
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx"
    model = ir.load_model(path)
    assert len(model.graph.inputs) == 1
    drift = ir.compare(ir.Session(path), ir.Session(model), ir.seeded_data(model, 1))
    assert drift.outputs[0].max_abs == 0


# Public models, opset 11 to 18

PUBLIC = [
    ("silero-vad", "silero_vad/data/silero_vad.onnx", 16),
    ("silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx", 15),
    ("silero-vad", "silero_vad/data/silero_vad_op18_ifless.onnx", 18),
    ("magika", "magika/models/standard_v3_3/model.onnx", 15),
    ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", 12),
    ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", 12),
    ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", 11),
]


@pytest.mark.models
@pytest.mark.parametrize(("package", "file", "opset"), PUBLIC, ids=[p[1].rsplit("/", 1)[1] for p in PUBLIC])
def test_public_models_keep_their_numbers(
    public: Callable[[str], Path], tmp_path: Path, package: str, file: str, opset: int
) -> None:
    path = public(package) / package / file
    model = ir.load_model(path)
    assert model.meta["mc_opt.source"].opset == opset
    ir.verify(model)
    before = {v.name for v in onnx_ir.load(path).graph.initializers.values()}
    assert before <= set(model.graph.initializers)
    saved = ir.save_model(model, tmp_path)
    data = ir.seeded_data(model, 2)
    drift = ir.compare(ir.Session(path), ir.Session(saved.paths[0]), data)
    for output in drift.outputs:
        # The converter adds nodes, so that ONNX Runtime fuses others: a few units in the last place.
        assert output.max_abs <= 1e-6 * max(1.0, output.spread)
