"""The interpreter: names, storage, If, functions, stored and training forms, weights back, public models."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir
import pytest

from mc_opt import ir
from mc_opt.ir.run.drift import DriftMeter
from mc_opt.ir.run.ort import Session, run_data
from tests.models.catalogue import MODELS, PublicModel

torch = pytest.importorskip("torch")

from mc_opt.ir.run.interp import interpret  # noqa: E402 - needs torch
from mc_opt.ir.run.module import names, run_module, state_to_model  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def parse(text: str, **weights: np.ndarray) -> onnx_ir.Model:
    model = onnx_ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21, "own": 1]> {text}'))
    for name, array in weights.items():
        ir.initializer(model.graph, name, array)
        stray = next(v for n in model.graph.all_nodes() for v in n.inputs if v is not None and v.name == name)
        onnx_ir.convenience.replace_all_uses_with(stray, model.graph.initializers[name])
    return model


def f(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def check(model: onnx_ir.Model, **inputs: np.ndarray) -> torch.fx.GraphModule:
    """The interpreted model after it agreed with ONNX Runtime: fp32 sums of a few terms, 1e-6."""
    module = interpret(model)
    expected = Session(model, optimise=False).run(inputs)
    actual = run_module(module, inputs)
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name].detach().numpy(), array, rtol=1e-6, atol=1e-6)
    return module


AFFINE = """
    g (float[2,3] x) => (float[2,4] y) <float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4] b = {0,1,2,3}>
    { m = MatMul(x, w)  y = Add(m, b) }
"""


def test_parameters_are_keyed_by_initialiser_name() -> None:
    module = check(parse(AFFINE), x=f(2, 3))
    known = names(module)
    assert sorted(known.tensors[name] for name, _ in module.named_parameters()) == ["b", "w"]
    assert known.inputs == {"x": "x"}
    assert known.outputs == ("y",)
    assert {node.meta["onnx"] for node in module.graph.nodes if node.op == "call_function"} == {"m", "y"}


def test_names_survive_a_copy_and_a_state_dict() -> None:
    module = interpret(parse(AFFINE))
    assert names(copy.deepcopy(module)) == names(module)
    assert set(module.state_dict()) == set(names(module).tensors)


def test_awkward_names_become_identifiers() -> None:
    model = parse(AFFINE)
    model.graph.inputs[0].name = "self"
    model.graph.outputs[0].name = "class/1:0"
    model.graph.initializers["w"].name = "layer.0/weight"
    module = interpret(model)
    assert names(module).inputs["self"] != "self"
    result = run_module(module, {"self": f(2, 3)})
    assert list(result) == ["class/1:0"]
    assert "layer.0/weight" in names(module).tensors.values()
    torch.testing.assert_close(module(torch.from_numpy(f(2, 3)))[0], result["class/1:0"])


def test_a_shared_weight_is_stored_once() -> None:
    model = parse("g (float[3,3] x) => (float[3,3] y) { m = MatMul(x, w)  y = MatMul(m, w) }", w=f(3, 3))
    module = check(model, x=f(3, 3))
    assert len(list(module.parameters())) == 1


def test_whole_numbers_and_settings_are_buffers() -> None:
    text = """
        g (float[2,3] x) => (float[2,3] y)
        <float lo = {-0.5}, float hi = {0.5}, float two = {2}, int64[2] shape = {2, 3}>
        { c = Clip(x, lo, hi)  p = Pow(c, two)  y = Reshape(p, shape) }
    """
    module = check(parse(text), x=f(2, 3))
    assert not list(module.parameters())
    assert sorted(names(module).tensors.values()) == ["hi", "lo", "shape", "two"]


def test_numbers_of_a_formula_and_masks_are_buffers() -> None:
    text = """
        g (float[2,3] x) => (float[2,3] y) <float eps = {0.1}, float[1] gain = {2}>
        { a = Add(x, eps)  s = Mul(a, gain)  y = Add(s, mask) }
    """
    model = parse(text, mask=np.array([[0, -np.inf, 0]], np.float32))
    module = check(model, x=f(2, 3))
    assert [names(module).tensors[name] for name, _ in module.named_parameters()] == ["gain"]
    assert ir.learned(model) == ("gain",)


def test_an_input_is_checked_by_name() -> None:
    module = interpret(parse(AFFINE))
    with pytest.raises(ir.DataError, match="input 'x': missing; expected x"):
        run_module(module, {})
    with pytest.raises(ir.DataError, match="input 'z': unknown; expected x"):
        run_module(module, {"x": f(2, 3), "z": f(1)})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            "y = TfIdfVectorizer (x)",
            r"y: TfIdfVectorizer has no torch meaning; it would live in ir/run/standard/text.py",
        ),
        ("y = SequenceAt (x, x)", r"ir/run/standard/sequence.py"),
        ("y = own.Thing (x)", r"y: own.Thing has no torch meaning; it would live in ir/run/standard/own.py"),
        ("y, i = MaxPool <kernel_shape = [1]> (x)  z = Identity(i)", r"only the first output has a torch meaning"),
        ("y = Relu <slope = 1.0> (x)", r"attribute slope is unknown for Relu"),
        ("y = Softmax <dim = 1> (x)", r"Softmax does not fit its torch meaning"),
    ],
)
def test_an_op_that_it_lacks_is_named(node: str, message: str) -> None:
    with pytest.raises(ir.IRError, match=message):
        interpret(parse(f"g (float[2,3] x) => (float y) {{ {node} }}"))


CHOICE = """
    g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> {
        d = Mul(x, w)
        y = If (c) <
            then_branch = a () => (float[2,2] t) <float[2,2] v = {5,6,7,8}> {
                n = Not(c)
                t = If (n) <
                    then_branch = b () => (float[2,2] p) { p = Neg(d) },
                    else_branch = e () => (float[2,2] q) { r = MatMul(d, v)  q = Add(r, w) }
                >
            },
            else_branch = z () => (float[2,2] s) { s = Identity(x) }
        >
    }
"""


@pytest.mark.parametrize("condition", [True, False])
def test_a_branch_is_picked_at_run_time(condition: bool) -> None:
    module = check(parse(CHOICE), x=f(2, 2), c=np.array(condition))
    # Weights of branches belong to the root, once.
    assert sorted(names(module).tensors.values()) == ["v", "w"]
    run_module(module, {"x": torch.ones(2, 2, requires_grad=True), "c": np.array(condition)})["y"].sum().backward()


def test_gradients_reach_the_weights_of_a_branch() -> None:
    text = CHOICE.replace("Not(c)", "Identity(c)").replace("Neg(d)", "MatMul(d, v)")
    module = check(parse(text), x=f(2, 2), c=np.array(True))
    run_module(module, {"x": f(2, 2), "c": np.array(True)})["y"].sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in module.parameters())


def test_a_constant_condition_leaves_one_branch() -> None:
    model = parse(CHOICE.replace(", bool c)", ")").replace("<float[2,2] w", "<bool c = {0}, float[2,2] w"))
    module = check(model, x=f(2, 2))
    assert not [node for node in module.graph.nodes if node.op == "call_module"]
    assert names(module).tensors == {"w": "w"}


def test_a_function_is_inlined_with_the_attributes_of_each_call() -> None:
    text = """
        <ir_version: 10, opset_import: ["": 21, "own": 1]>
        g (float[2,3] x) => (float[2,3] y) { a = own.Leak <slope: float = 0.25> (x)  y = own.Leak (a) }
        <domain: "own", opset_import: ["": 21]>
        Leak <slope: float = 0.5> (x) => (y) {
            k = Constant <value_float: float = @slope> ()
            n = Mul (x, k)
            p = LeakyRelu <alpha: float = @slope> (x)
            y = Add (n, p)
        }
    """
    module = check(onnx_ir.from_proto(onnx.parser.parse_model(text)), x=f(2, 3))
    assert not list(module.parameters())


def quantised(op_type: str) -> onnx_ir.Model:
    """y = x·w with w of [8, 4] made by a Lookup or a FakeLookup of 4 bits."""
    model = parse("g (float[2,8] x) => (float[2,4] y) { y = MatMul(x, w) }", w=f(8, 4))
    site = next(iter(ir.weight_sites(model)))
    assert isinstance(site, ir.WeightSite)
    codebook = np.linspace(-2, 2, 16, dtype=np.float32)
    if op_type == "Lookup":
        codes = ir.pack_codes(np.arange(32, dtype=np.uint8) % 16, 4)
        made = ir.node(
            "Lookup", [codes, codebook, f(4, 1)], {"bits": 4, "shape": (8, 4), "axes": (1,), "group_size": 0}
        )
    else:
        made = ir.node("FakeLookup", [f(8, 4), codebook, np.full((4, 1), 0.5, np.float32)], {"axes": (1,)})
    ir.replace_weight(site, made, by=("test", op_type))
    ir.add_functions(model)
    return model


def test_stored_forms_are_frozen() -> None:
    module = check(quantised("Lookup"), x=f(2, 8))
    assert not list(module.parameters())
    assert sorted(names(module).tensors.values()) == ["w.codebook", "w.codes", "w.scale"]


def test_training_forms_are_trained() -> None:
    module = check(quantised("FakeLookup"), x=f(2, 8))
    assert len(list(module.parameters())) == len(names(module).tensors) == 3


def test_weights_come_back_by_name() -> None:
    model = parse(AFFINE)
    module = interpret(model)
    assert state_to_model(module, model) == 0
    kept = model.graph.initializers["b"].const_value
    with torch.no_grad():
        dict(module.named_parameters())["w"].add_(1)
    changed = model.clone()
    assert state_to_model(module, changed) == 1
    expected = np.arange(2, 14, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(changed.graph.initializers["w"].const_value.numpy(), expected)
    assert changed.graph.initializers["b"].const_value is kept
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), expected - 1)
    check(changed, x=f(2, 3))
    with pytest.raises(ir.IRError, match="w: the module has this tensor, the model has no such initialiser"):
        state_to_model(module, parse("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"))


@pytest.mark.parametrize("kind", [onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.DOUBLE])
def test_every_float_type_comes_back(kind: onnx_ir.DataType) -> None:
    model = parse(AFFINE)
    for value in model.graph.initializers.values():
        value.const_value = onnx_ir.Tensor(value.const_value.numpy().astype(kind.numpy()), dtype=kind, name=value.name)
    module = interpret(model)
    assert state_to_model(module, model) == 0
    with torch.no_grad():
        dict(module.named_parameters())["b"].mul_(2)
    assert state_to_model(module, model) == 1
    tensor = model.graph.initializers["b"].const_value
    assert tensor.dtype == kind
    assert tensor.numpy().astype(float).tolist() == [0, 2, 4, 6]


TRAINED = """
    g (float[2,1,6,6] image, int64[5,2] ids) => (float[2,3] y)
    <int64[2] plane = {2, 3}, int64[1] first = {0}> {
        c = Conv (image, conv)
        p = ReduceMean <keepdims = 0> (c, plane)
        e = Gather (table, ids)
        h, hn, cn = LSTM <hidden_size = 4> (e, W, R, B)
        q = Squeeze (hn, first)
        s = Add (p, q)
        y = MatMul (s, fc)
    }
"""


def trained_model() -> onnx_ir.Model:
    model = parse(TRAINED, conv=f(4, 1, 3, 3), table=f(10, 6), W=f(1, 16, 6), R=f(1, 16, 4), B=f(1, 32), fc=f(4, 3))
    codebook = np.linspace(-1, 1, 16, dtype=np.float32)
    for site in list(ir.weight_sites(model)):
        assert isinstance(site, ir.WeightSite)
        w = site.tensor.numpy()
        rows = ir.canonical(w, site.axes)
        scale = np.abs(rows).max(1, keepdims=True)
        fake = ir.node("FakeLookup", [w, codebook, scale], {"axes": site.axes, "group_size": 0})
        ir.replace_weight(site, fake, by=("test", "fake"))
    ir.add_functions(model)
    return model


def test_ten_steps_of_training_through_fake_lookups() -> None:
    model = trained_model()
    module = interpret(model)
    seen: dict[str, torch.Tensor] = {}
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    assert sorted(node.meta["onnx"] for node in calls) == ["R", "W", "conv", "fc", "table"]
    for node in calls:
        module.get_submodule(node.target).register_forward_hook(
            lambda _, __, output, name=node.meta["onnx"]: seen.__setitem__(name, output)
        )
    known = names(module).tensors
    parameters = {known[name]: parameter for name, parameter in module.named_parameters()}
    latent, codebooks, scales = (
        {node.meta["onnx"]: parameters[node.args[k].meta["onnx"]] for node in calls} for k in range(3)
    )
    optimiser = torch.optim.SGD([p for n, p in parameters.items() if "codebook" not in n], lr=0.15)
    image, ids = torch.from_numpy(f(2, 1, 6, 6)), torch.arange(10).reshape(5, 2)
    target = torch.from_numpy(f(2, 3, seed=5))
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = ((module(image, ids)[0] - target) ** 2).mean()
        loss.backward()
        for name, parameter in latent.items():
            assert torch.isfinite(parameter.grad).all(), name
            assert (parameter.grad != 0).any(), name
            # On the codebook: every row divided by its scale is an entry, up to the rounding of that division.
            rows = ir.canonical(seen[name].detach().numpy(), tuple(axes_of(model, name)))
            units = rows / scales[name].detach().numpy()
            assert np.abs(units[..., None] - codebooks[name].detach().numpy()).min(-1).max() < 1e-6, name
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    # The trained weights go back under their names, and ONNX Runtime agrees with the module.
    assert state_to_model(module, model) >= 5
    check(model, image=image.numpy(), ids=ids.numpy())


def axes_of(model: onnx_ir.Model, name: str) -> tuple[int, ...]:
    made = next(node for node in model.graph if node.outputs[0].name == name)
    return tuple(made.attributes["axes"].as_ints())


STEPS = 40

SMALL = ("ppocr-cls", "silero-16k-op15")
MODEL_CASES = [
    pytest.param(m, id=m.name, marks=[pytest.mark.models, *([pytest.mark.ci] if m.name in SMALL else [])])
    for m in MODELS
]


@pytest.mark.parametrize("entry", MODEL_CASES)
def test_public_models_equal_onnx_runtime(entry: PublicModel, public) -> None:  # type: ignore[no-untyped-def]
    source = entry.source(public())
    model = source if isinstance(source, onnx_ir.Model) else ir.load_model(source)
    module = interpret(model)
    session, plain = Session(model), Session(model, optimise=False)
    drift, noise = DriftMeter(), DriftMeter()
    steps = 0
    for sequence in entry.sequences(public()):
        carried: dict[str, torch.Tensor] = {}
        runs = zip(
            sequence, run_data(plain, sequence, entry.states), run_data(session, sequence, entry.states), strict=True
        )
        for sample, expected, optimised in runs:
            with torch.no_grad():
                actual = run_module(module, carried | sample)
            carried = {target: actual[source] for source, target in entry.states.items()}
            drift.add(expected, {name: tensor.numpy() for name, tensor in actual.items()})
            noise.add(expected, optimised)
            steps += 1
        if steps >= (STEPS if entry.states else 8):
            break
    for output in drift.result().outputs:
        # Another library's kernels through up to a hundred layers: as far as two targets may be apart.
        tolerance = max(1e-4 * output.spread, 3 * noise.result().output(output.name).max_abs)
        assert output.max_abs <= tolerance, output
        assert output.unmatched == 0
    result = run_module(module, carried | sample)
    sum((y.double() ** 2).sum() for y in result.values() if y.is_floating_point()).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
