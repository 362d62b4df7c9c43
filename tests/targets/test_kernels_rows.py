from __future__ import annotations

import numpy as np
import pytest
import tvm
from scipy import special
from tvm import s_tir, te

from mc_opt.targets import TargetError
from mc_opt.targets._build import llvm_target
from mc_opt.targets.kernels import _math
from tests.targets._kernels import build, check, machine, model, normal

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


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _recurrent(op, *, steps=4, batch=2, inputs=7, hidden=13, direction="forward", extra="", initial=False):
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


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_recurrent_directions(op, direction):
    check(*_recurrent(op, direction=direction))


@pytest.mark.parametrize("op", GATES)
def test_recurrent_initial_state_and_clip(op):
    check(*_recurrent(op, batch=3, hidden=16, initial=True, extra=", clip=0.3"))


def test_gru_resets_after_the_product():
    check(*_recurrent("GRU", direction="bidirectional", extra=", linear_before_reset=1"))


def test_other_activations():
    check(*_recurrent("LSTM", extra=', activations=["Sigmoid", "Relu", "Tanh"]'))


@pytest.mark.parametrize(("op", "hidden"), [("LSTM", 13), ("GRU", 16)])
def test_weights_that_other_kernels_make(op, hidden):
    text, weights = _recurrent(op, hidden=hidden, direction="bidirectional")
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
        build(model(*_recurrent("RNN", extra=extra)), machine())


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
