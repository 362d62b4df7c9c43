from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from tvm import s_tir, te

from mc_opt.targets import TargetError
from mc_opt.targets._build import llvm_target
from mc_opt.targets.kernels import _math, _split, recurrent
from tests._harness import sampled
from tests.targets._kernels import build, check, lowered_model, machine, model, normal, running

pytestmark = pytest.mark.tvm


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("Softmax<axis=-1>", (3, 70)),
        ("Softmax<axis=1>", (2, 7, 33)),
        ("Softmax<axis=0>", (5, 3)),
        ("LogSoftmax<axis=-1>", (3, 21)),
        ("LogSoftmax<axis=1>", (2, 7, 17)),
    ],
)
def test_softmax(op, shape):
    dims = ",".join(map(str, shape))
    check(f"g (float[{dims}] x) => (float[{dims}] y) {{ y = {op}(x) }}")


@pytest.mark.parametrize(
    ("op", "shape", "parameters"),
    [
        ("LayerNormalization<axis=-1>", (6, 70), {"s": (70,), "b": (70,)}),
        ("LayerNormalization<axis=1, epsilon=0.001>", (3, 5, 7), {"s": (5, 7)}),
        ("InstanceNormalization", (2, 5, 7, 9), {"s": (5,), "b": (5,)}),
        ("GroupNormalization<num_groups=3>", (2, 6, 7, 9), {"s": (6,), "b": (6,)}),
    ],
)
def test_normalisation(op, shape, parameters):
    dims = ",".join(map(str, shape))
    text = f"g (float[{dims}] x) => (float[{dims}] y) {{ y = {op}(x, {', '.join(parameters)}) }}"
    check(text, {name: normal(*size, seed=k) for k, (name, size) in enumerate(parameters.items())})


def _spelled_out(
    *, power="2", normalised="d = Sqrt(v) r = Reciprocal(d) n = Mul(x, r)", scaled="s, n", more="", square="Pow(x, two)"
):
    """Rows of a + b by their root mean squares, as PyTorch exports a module."""
    return f"""g (float[2,1,70] a, float[2,1,70] b) => (float[2,1,70] y, float[2,1,70] z) <float[2,1,70] x> {{
        x = Add(a, b)
        two = Constant<value_float={power}.0>()
        one = Constant<value_float=1.0>()
        less = Constant<value_float=-0.5>()
        p = {square}
        axes = Constant<value_ints=[-1]>()
        m = ReduceMean<keepdims=1>(p, axes)
        e = Constant<value_float=0.00001>()
        v = Add(m, e)
        {normalised}
        y = Mul({scaled})
        {more or "z = Add(x, a)"} }}"""


# The scale comes after the sum.
LATE = (
    _spelled_out(scaled="late, n")
    .replace("[2,1,70] x>", "[2,1,70] x, float[70] late>")
    .replace("y =", f"late = Constant<value_floats={[0.5] * 70}>() y =")
)


@pytest.mark.parametrize(
    ("text", "op"),
    [
        (_spelled_out(), "SkipSimplifiedLayerNormalization"),
        (_spelled_out(scaled="n, s").replace("Add(a, b)", "Sub(a, b)"), "RMSNormalization"),
        (_spelled_out(square="Mul(x, x)"), "SkipSimplifiedLayerNormalization"),
        (_spelled_out(normalised="d = Sqrt(v) n = Div(x, d)"), "SkipSimplifiedLayerNormalization"),
        (_spelled_out(normalised="d = Sqrt(v) r = Div(one, d) n = Mul(r, x)"), "SkipSimplifiedLayerNormalization"),
        (_spelled_out(normalised="r = Pow(v, less) n = Mul(x, r)"), "SkipSimplifiedLayerNormalization"),
        (_spelled_out(normalised="d = Sqrt(v) r = Div(two, d) n = Mul(r, x)"), ""),
        (_spelled_out(power="4"), ""),
        (LATE, "RMSNormalization"),
        (_spelled_out(more="z = Mul(n, a)"), ""),
    ],
)
def test_root_mean_squares_that_a_model_spells_out_are_one_kernel(text, op):
    weights = {"s": normal(70)}
    check(text, weights)
    found = [
        line for line in lowered_model(model(text, weights), machine()).kernels if "norm" in line.partition(":")[0]
    ]
    assert [line.partition(" by ")[0] for line in found] == ([op] if op else [])


def _centred(*, square="Pow(d, two)", taken="x", scaled="Mul(r, s)", more="z = Add(x, b)"):
    """Rows of x less their means, by their deviations, as exporters wrote them before there was an op for it."""
    return f"""g (float[2,3,70] x, float[2,3,70] b) => (float[2,3,70] y, float[2,3,70] z)
        <float[2,3,70] d, float two = {{2.0}}, float e = {{0.00001}}, int64[1] axes = {{-1}}> {{
        m = ReduceMean<keepdims=1>({taken}, axes)
        d = Sub(x, m)
        p = {square}
        v = ReduceMean<keepdims=1>(p, axes)
        a = Add(v, e)
        q = Sqrt(a)
        r = Div(d, q)
        t = {scaled}
        y = Add(t, c)
        {more} }}"""


@pytest.mark.parametrize(
    ("text", "op"),
    [
        (_centred(), "LayerNormalization"),
        (_centred(square="Mul(d, d)", scaled="Mul(s, r)"), "LayerNormalization"),
        (_centred(more="z = Add(t, b)"), "LayerNormalization"),
        (_centred(taken="b"), "RMSNormalization"),
        (_centred(more="z = Add(d, b)"), "RMSNormalization"),
    ],
)
def test_layer_normalisations_that_a_model_spells_out_are_one_kernel(text, op):
    weights = {"s": normal(70), "c": normal(70, seed=1)}
    check(text, weights)
    found = [line for line in lowered_model(model(text, weights), machine()).kernels if "Norm" in line]
    assert [line.partition(" by ")[0] for line in found] == [op]


REDUCTIONS = ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"]
EXTREMES = [
    f"{op}<axis=-1, keepdims={keeps}, select_last_index={last}>"
    for op, keeps, last in [("ArgMax", 0, 0), ("ArgMax", 1, 1), ("ArgMin", 0, 1), ("ArgMin", 1, 0)]
]


def _reduced(shape, axes, cpu):
    """Every reduction of some axes, and where the extremes along the last one are."""
    dims = ",".join(map(str, shape))
    kept = ",".join(str(d) for k, d in enumerate(shape) if k not in axes)
    lines = [f"y{k} = {op}<keepdims=0>(x, axes)" for k, op in enumerate(REDUCTIONS)]
    outs = [f"float[{kept}] y{k}" for k in range(len(REDUCTIONS))]
    lines += [f"z{k} = {op}(x)" for k, op in enumerate(EXTREMES)]
    for k, op in enumerate(EXTREMES):
        last = [1] if "keepdims=1" in op else []
        outs.append(f"int64[{','.join(map(str, [*shape[:-1], *last]))}] z{k}")
    text = f"g (float[{dims}] x) => ({', '.join(outs)}) {{ {' '.join(lines)} }}"
    check(text, {"axes": np.array(axes)}, cpu=cpu)


@pytest.mark.parametrize("cpu", sampled(["native", "x86-64-v3"], ["native"]))
@pytest.mark.parametrize("shape", [(3, 37), (2, 5, 7, 11)])
def test_reductions_of_rows(shape, cpu):
    _reduced(shape, tuple(range(1 if len(shape) == 2 else 2, len(shape))), cpu)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    count=st.integers(1, 3),
    is_leading=st.booleans(),
    cpu=st.sampled_from(["native", "x86-64-v3"]),
)
def test_reductions_of_any_shape(shape, count, is_leading, cpu):
    count = min(count, len(shape))
    axes = range(count) if is_leading else range(len(shape) - count, len(shape))
    _reduced(shape, tuple(axes), cpu)


@pytest.mark.parametrize(("values", "places"), [([5, 1, 5, 0] * 5, [0, 18]), ([np.nan] * 20, [0, 0])])
def test_first_and_last_of_equals(values, places):
    text = """g (float[1,20] x) => (int64[1] y, int64[1] z)
        { y = ArgMax<axis=-1, keepdims=0>(x) z = ArgMax<axis=-1, keepdims=0, select_last_index=1>(x) }"""
    loaded, _, notes = build(model(text), machine())
    results = loaded["main"](tvm.runtime.tensor(np.array([values], np.float32)))
    assert [int(r.numpy()[0]) for r in results] == places
    assert notes == []


@pytest.mark.parametrize("channels", [24, 100, 16])
def test_mean_of_positions_where_channels_stand_last(channels):
    text = f"""g (float[1,3,9,10] x) => (float[1,{channels},1,1] y)
        {{ c = Conv(x, w) y = GlobalAveragePool(c) }}"""
    check(text, {"w": normal(channels, 3, 1, 1)})


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent_layer(op, *, steps=4, batch=2, inputs=7, hidden=13, direction="forward", extra="", initial=False):
    d, gates = (2 if direction == "bidirectional" else 1), GATES[op]
    states = ["h0", "c0"][: 2 if op == "LSTM" else 1] if initial else []
    given = [f"float[{steps},{batch},{inputs}] x", *[f"float[{d},{batch},{hidden}] {s}" for s in states]]
    outs = ["y", "yh", "yc"][: 3 if op == "LSTM" else 2]
    results = [f"float[{steps},{d},{batch},{hidden}] y", *[f"float[{d},{batch},{hidden}] {o}" for o in outs[1:]]]
    arguments = ["x", "w", "r", "b", *([""] if initial else []), *states]
    attributes = f'hidden_size={hidden}, direction="{direction}"{extra}'
    text = f"""g ({", ".join(given)}) => ({", ".join(results)})
        {{ {", ".join(outs)} = {op}<{attributes}>({", ".join(arguments)}) }}"""
    weights = {"w": (d, gates * hidden, inputs), "r": (d, gates * hidden, hidden), "b": (d, 2 * gates * hidden)}
    return text, {name: normal(*size, seed=k) for k, (name, size) in enumerate(weights.items())}


@pytest.mark.parametrize("direction", sampled(["forward", "reverse", "bidirectional"], ["forward", "reverse"]))
@pytest.mark.parametrize("op", GATES)
def test_recurrent_directions(op, direction):
    check(*recurrent_layer(op, direction=direction))


@pytest.mark.parametrize("op", GATES)
def test_recurrent_initial_state_and_clip(op):
    check(*recurrent_layer(op, batch=3, hidden=16, initial=True, extra=", clip=0.3"))


def test_gru_resets_after_the_product():
    check(*recurrent_layer("GRU", direction="bidirectional", extra=", linear_before_reset=1"))


@pytest.mark.parametrize(("op", "extra"), [*[(op, "") for op in GATES], ("GRU", ", linear_before_reset=1")])
def test_threads_share_the_hidden_units_of_a_step(op, extra, monkeypatch):
    monkeypatch.setattr(_split, "_WORTH", 0)
    monkeypatch.setattr(recurrent, "_SHORTEST_STEP", 0)
    check(*recurrent_layer(op, steps=9, hidden=45, direction="reverse", initial=True, extra=extra), threads=2)


def test_other_activations():
    check(*recurrent_layer("LSTM", extra=', activations=["Sigmoid", "Relu", "Tanh"]'))


@pytest.mark.parametrize(("op", "hidden"), [("LSTM", 13), ("GRU", 16)])
def test_weights_that_other_kernels_make(op, hidden):
    text, weights = recurrent_layer(op, hidden=hidden, direction="bidirectional")
    shapes = {name: ",".join(map(str, weights[name].shape)) for name in "wr"}
    # As the terms of a sum of codes: what the recurrent kernel reads is no constant.
    text = text.replace(" x)", f" x, float[{shapes['w']}] w, float[{shapes['r']}] r)", 1)
    check(text, {"b": weights["b"]})


@pytest.mark.parametrize(
    ("extra", "reason"),
    [(', activations=["Elu"]', "activation 'Elu'; expected one of"), (", layout=1", "layout=1")],
)
def test_recurrent_refusals_name_the_reason(extra, reason):
    with pytest.raises(TargetError, match=reason):
        build(model(*recurrent_layer("RNN", extra=extra)), machine())


REFERENCES = {
    "exp": np.exp,
    "exp_not_positive": lambda x: np.where(x < -87, 0.0, np.exp(x)),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "erf": special.erf,
    "log": np.log,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_elementary_functions(name):
    x = np.concatenate([np.linspace(-100, 100, 4096), np.linspace(-6, 6, 4096), np.logspace(-30, 2, 1024)])
    x = np.pad(x, (0, -len(x) % 16)).astype(np.float32)
    x[-4:] = np.inf, -np.inf, np.nan, 0.0
    if name == "exp_not_positive":
        x = -np.abs(x)
    a = te.placeholder(x.shape, name="a")
    b = te.compute(x.shape, lambda i: getattr(_math, f"{name}_definition")(a[i]), name="b")
    state = s_tir.Schedule(te.create_prim_func([a, b]))
    _, lane = state.split(state.get_loops(state.get_sblock("b"))[0], [None, 16])
    state.vectorize(lane)
    got = tvm.runtime.tensor(np.zeros_like(x))
    tvm.compile(state.mod, target=llvm_target(machine()))["main"](tvm.runtime.tensor(x), got)
    with np.errstate(all="ignore"):
        wanted = REFERENCES[name](x.astype(np.float64))
        wanted32 = wanted.astype(np.float32)
    y = got.numpy()
    finite = np.isfinite(wanted32)
    assert np.array_equal(y[~finite], wanted32[~finite], equal_nan=True)
    # A few units in the last place; erf is a quotient of polynomials and loses two more bits near ±4.
    assert np.all(np.abs(y[finite] - wanted[finite]) <= 4e-7 * np.maximum(np.abs(wanted[finite]), 1e-30))


@pytest.mark.parametrize("added", ["y", "mean"])
def test_a_row_is_added_behind_a_layer_normalisation_whose_statistics_are_used(added):
    x, y, mean = "float[4,70] x", "float[4,70] z", "float[4,1] mean"
    body = f"y, mean = LayerNormalization(x, s) z = Add({added}, c)"
    outputs = f"{y}, {mean}" if added == "y" else y
    check(f"g ({x}) => ({outputs}) {{ {body} }}", {"s": normal(70), "c": normal(70, seed=1)})


def ran(text, *inputs):
    """What kernels make of inputs."""
    with running(model(text), machine()) as (run, _):
        return run(list(inputs))


@pytest.mark.ci
@pytest.mark.slow
def test_extremes_of_infinite_numbers():
    x = normal(3, 4, 40)
    x[0], x[1, 1], x[1, :, 7] = -np.inf, -np.inf, np.inf
    nodes = """last = Constant<value_ints=[2]>() middle = Constant<value_ints=[1]>() n = Neg(x)
        y0 = ReduceMax<keepdims=0>(x, last) y1 = ReduceMax<keepdims=0>(x, middle) y2 = ReduceMin<keepdims=0>(n, last)
        y3 = ReduceMin<keepdims=0>(n, middle) y4 = ReduceLogSumExp<keepdims=0>(x, last)
        y5 = MaxPool<kernel_shape=[3], pads=[1,1]>(x) y6 = GlobalMaxPool(x)
        y7 = ArgMax<axis=2, keepdims=0, select_last_index=1>(x)"""
    kinds = ["float[a,b]"] * 5 + ["float[a,b,c]"] * 2 + ["int64[a,b]"]
    outputs = ", ".join(f"{kind} y{k}" for k, kind in enumerate(kinds))
    around = np.pad(x, ((0, 0), (0, 0), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(around, 3, axis=2)
    # ONNX Runtime begins some of them with the lowest finite number.
    wanted = [
        x.max(2),
        x.max(1),
        -x.max(2),
        -x.max(1),
        special.logsumexp(x, 2),
        windows.max(3),
        x.max(2, keepdims=True),
    ]
    wanted.append(39 - x[:, :, ::-1].argmax(2))
    for got, array in zip(ran(f"g (float[3,4,40] x) => ({outputs}) {{ {nodes} }}", x), wanted, strict=True):
        np.testing.assert_allclose(got, array, rtol=1e-6)


def test_logarithms_beside_large_numbers_and_clip_of_what_is_no_number():
    # Of 1e4 float32 knows steps of 0.001, and the logarithm of the sum is 3.
    x, z = 1e4 + normal(2, 20, 33), np.array([np.nan, -3, 0.5, 3], np.float32)
    nodes = """low = Constant<value_float=-1.0>() high = Constant<value_float=1.0>() last = LogSoftmax<axis=2>(x)
        middle = LogSoftmax<axis=1>(x) y = Clip(z, low, high)"""
    outputs = "float[2,20,33] last, float[2,20,33] middle, float[4] y"
    last, middle, y = ran(f"g (float[2,20,33] x, float[4] z) => ({outputs}) {{ {nodes} }}", x, z)
    np.testing.assert_allclose(last, special.log_softmax(x, 2), rtol=1e-5)
    np.testing.assert_allclose(middle, special.log_softmax(x, 1), rtol=1e-5)
    np.testing.assert_array_equal(y, np.clip(z, -1, 1))
