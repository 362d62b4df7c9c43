"""LSTM, GRU and RNN with packed weights: looked up at each step, or decoded once for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_opt.targets.kernels import _cells_time, _split, recurrent
from tests.targets._kernels import check, lowered_model, machine, model
from tests.targets.test_kernels_gemm import FORMS, packed
from tests.targets.test_kernels_lookup import steps, two_terms
from tests.targets.test_kernels_rows import recurrent_layer
from tests.targets.test_kernels_sliding_properties import SETTINGS

pytestmark = pytest.mark.tvm

PROCESSORS = ["native", "x86-64-v3"]
GROUPED = {"group": 16, "scale": "groups"}
LINEAR = ", linear_before_reset=1"


def layer(op, form, *, is_even=False, pack=packed, weights="wr", **sizes):
    """A recurrent layer, `weights` of which are packed in a form."""
    text, held = recurrent_layer(op, **sizes)
    nodes = []
    for name in weights:
        node, arrays = pack(held.pop(name).shape, (0, 1), **form)
        for part in ("codes", "others", "book", "scale", "offset"):
            node = node.replace(f"({part}", f"({name}_{part}").replace(f", {part}", f", {name}_{part}")
        for part in "uvw":
            node = node.replace(f"{part} =", f"{part}_{name} =").replace(f"({part}, v)", f"({part}_{name}, v_{name})")
        nodes.append(node.replace(f"w_{name} =", f"{name} ="))
        held |= {f"{name}_{part}": array for part, array in arrays.items()}
        # Small weights: large ones amplify rounding from step to step, whatever kernel they run in.
        held[f"{name}_book"] = (steps(form["bits"]) if is_even else held[f"{name}_book"]) * 0.2
        if f"{name}_offset" in held:
            held[f"{name}_offset"] *= 0.05
    return text.replace("{", f"{{ {' '.join(nodes)}", 1), held


def looked_up(monkeypatch, *, always):
    monkeypatch.setattr(_cells_time, "looks_up", lambda *_: always)


def kernels(cpu, *given):
    return lowered_model(model(*given), machine(cpu)).kernels


def test_a_step_looks_codes_up():
    given = layer("LSTM", {"bits": 4}, steps=2, batch=1, inputs=21, hidden=45)
    assert "LSTM: 4 bits, looked up at each step" in kernels("native", *given)
    check(*given)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("op", "extra", "form"),
    [
        ("LSTM", "", {"bits": 4}),
        ("GRU", LINEAR, {"bits": 3, **GROUPED}),
        ("GRU", "", {"bits": 2}),
        ("RNN", "", {"bits": 8}),
    ],
)
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_rows_of_both_directions_look_codes_up(op, extra, form, cpu, monkeypatch):
    looked_up(monkeypatch, always=True)
    how = {"steps": 3, "batch": 9, "inputs": 21, "hidden": 45, "direction": "bidirectional", "extra": extra}
    check(*layer(op, form, initial=True, **how), cpu=cpu)


def test_time_decides_what_is_decoded_and_the_report_says_so():
    def weights_of(op, hidden, **sizes):
        return kernels("native", *layer(op, {"bits": 4}, hidden=hidden, batch=1, inputs=64, **sizes))

    assert "LSTM: 4 bits, looked up at each step" in weights_of("LSTM", 128, steps=1)
    assert "LSTM: 4 bits, looked up at each step" in weights_of("LSTM", 512, steps=300)  # beyond the caches
    found = weights_of("GRU", 32, steps=300)
    assert "GRU: 4 bits, decoded once for 300 steps" in found
    # The product of all steps decodes a panel at a time, and no kernel decodes the input's weight.
    assert sum(kernel.startswith("decode: ") for kernel in found) == 1
    assert "lookup product: 4 bits, 300x64 x 96" in found


def test_a_sum_of_codes_is_decoded_before_the_steps_and_the_report_says_why():
    given = layer("LSTM", {"bits": 3}, pack=two_terms, steps=1, batch=1)
    lowered = lowered_model(model(*given), machine())
    assert any("the recurrent weight 'r' is decoded at each call: it is a sum of codes" in f for f in lowered.fallbacks)


@pytest.mark.slow
@pytest.mark.ci
def test_sums_of_codes():
    check(*layer("LSTM", {"bits": 3}, pack=two_terms, steps=1, batch=1), quiet=False)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("form", [FORMS[k] for k in (0, 1, 2, 4, 5, 7, 8, 11, 13)], ids=str)
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_every_form_of_codes(form, cpu, monkeypatch):
    looked_up(monkeypatch, always=True)
    check(*layer("LSTM", form, steps=2, batch=1, inputs=33, hidden=37), cpu=cpu)
    if form["bits"] == 8:
        check(*layer("LSTM", form, is_even=True, steps=2, batch=1, inputs=33, hidden=37), cpu=cpu)


@pytest.mark.slow
@pytest.mark.ci
def test_codebooks_of_their_own_are_decoded_before_the_steps():
    check(*layer("GRU", FORMS[9], steps=2, batch=1, inputs=33, hidden=37), quiet=False)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("always", [True, False])
def test_sizes_that_the_run_tells(always, monkeypatch):
    looked_up(monkeypatch, always=always)
    text, weights = layer("LSTM", {"bits": 4}, steps="T", batch="N", inputs=16, hidden=24)
    check(text, weights, sizes=[{"T": 1, "N": 1}, {"T": 5, "N": 3}])


@pytest.mark.slow
@given(
    op=st.sampled_from(["LSTM", "GRU", "RNN"]),
    linear=st.booleans(),
    steps_=st.integers(1, 5),
    batch=st.integers(1, 20),
    inputs=st.integers(1, 40),
    hidden=st.integers(1, 70),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    initial=st.booleans(),
    bits=st.integers(1, 8),
    group=st.sampled_from([0, 0, 8, 33, 64]),
    offset=st.booleans(),
    is_even=st.booleans(),
    which=st.sampled_from(["wr", "w", "r"]),
    always=st.booleans(),
    threads=st.integers(1, 3),
)
@pytest.mark.parametrize("cpu", PROCESSORS)
@SETTINGS
def test_packed_cells_of_any_size(
    cpu,
    op,
    linear,
    steps_,
    batch,
    inputs,
    hidden,
    direction,
    initial,
    bits,
    group,
    offset,
    is_even,
    which,
    always,
    threads,
    monkeypatch,
):
    form = {"bits": bits, "offset": offset, "group": group, "scale": "groups" if group else "rows"}
    sizes = {"steps": steps_, "batch": batch, "inputs": inputs, "hidden": hidden}
    extra = LINEAR if linear and op == "GRU" else ""
    made = layer(op, form, is_even=is_even, weights=which, direction=direction, initial=initial, extra=extra, **sizes)
    with monkeypatch.context() as patch:
        looked_up(patch, always=always)
        patch.setattr(_split, "_WORTH", 0)
        patch.setattr(recurrent, "_SHORTEST_STEP", 0)
        check(*made, cpu=cpu, threads=threads, quiet=False)
