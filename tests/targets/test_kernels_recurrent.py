"""LSTM, GRU and RNN with packed weights: looked up at each step, or decoded once for all of them."""

from __future__ import annotations

import numpy as np
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
WAYS = ["looked up", "halves", "dense"]
LINEAR = ", linear_before_reset=1"


def powers(book):
    """The codebook in signed powers of two."""
    return np.copysign(2 ** np.rint(np.log2(np.maximum(np.abs(book), 1e-3))), book).astype(np.float32)


def layer(op, form, *, is_even=False, is_short=False, pack=packed, weights="wr", **sizes):
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
        book = steps(form["bits"]) if is_even else held[f"{name}_book"]
        held[f"{name}_book"] = (powers(book) if is_short else book) * np.float32(0.2)
        if f"{name}_offset" in held:
            held[f"{name}_offset"] *= 0.05
    return text.replace("{", f"{{ {' '.join(nodes)}", 1), held


def read_as(monkeypatch, way):
    """Let cells read codes in one way, whatever time is predicted."""
    monkeypatch.setattr(_cells_time, "fastest", lambda *_, **__: way)


def kernels(cpu, *given):
    return lowered_model(model(*given), machine(cpu)).kernels


def test_a_step_looks_codes_up():
    given = layer("LSTM", {"bits": 4}, steps=2, batch=1, inputs=21, hidden=45)
    assert "LSTM: 4 bits, looked up at each step" in kernels("native", *given)
    check(*given)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("cpu", "op", "direction", "extra", "form"),
    [
        ("native", "LSTM", "bidirectional", "", {"bits": 4}),
        ("x86-64-v3", "LSTM", "reverse", "", {"bits": 4}),
        ("native", "GRU", "reverse", LINEAR, {"bits": 3, **GROUPED}),
        ("x86-64-v3", "GRU", "bidirectional", "", {"bits": 2}),
        ("native", "RNN", "reverse", "", {"bits": 8}),
    ],
)
def test_rows_look_codes_up_together(cpu, op, direction, extra, form, monkeypatch):
    read_as(monkeypatch, "looked up")
    how = {"steps": 3, "batch": 7, "inputs": 21, "hidden": 23, "direction": direction, "extra": extra}
    check(*layer(op, form, initial=True, **how), cpu=cpu)


def test_time_decides_what_is_decoded_and_the_report_says_so():
    def weights_of(op, hidden, **sizes):
        return kernels("x86-64-v4", *layer(op, {"bits": 4}, hidden=hidden, batch=1, inputs=64, **sizes))

    assert "LSTM: 4 bits, looked up at each step" in weights_of("LSTM", 128, steps=1)
    assert "LSTM: 4 bits, looked up at each step" in weights_of("LSTM", 512, steps=300)  # beyond the caches
    found = weights_of("GRU", 96, steps=300)
    assert "GRU: 4 bits, decoded once for 300 steps" in found
    assert "GRU: 4 bits, decoded once for 300 steps, two weights in a word" in weights_of(
        "GRU", 96, steps=300, is_short=True
    )
    # The product of all steps decodes a panel at a time, and no kernel decodes the input's weight.
    assert sum(kernel.startswith("decode: ") for kernel in found) == 1
    assert "lookup product: 4 bits, 300x64 x 288" in found


def test_a_sum_of_codes_is_decoded_before_the_steps_and_the_report_says_why():
    given = layer("LSTM", {"bits": 3}, pack=two_terms, steps=1, batch=1)
    lowered = lowered_model(model(*given), machine())
    assert any("the recurrent weight 'r' is decoded at each call: it is a sum of codes" in f for f in lowered.fallbacks)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("cpu", "op", "extra", "bits", "hidden"),
    [
        ("native", "LSTM", "", 4, 45),
        ("x86-64-v3", "LSTM", "", 4, 45),
        ("native", "GRU", LINEAR, 2, 32),
        ("x86-64-v3", "GRU", "", 5, 18),
    ],
)
def test_short_entries_are_decoded_two_to_a_word(cpu, op, extra, bits, hidden, monkeypatch):
    read_as(monkeypatch, "halves")
    given = layer(op, {"bits": bits}, is_short=True, steps=5, batch=2, inputs=9, hidden=hidden, extra=extra)
    assert any("two weights in a word" in kernel for kernel in kernels(cpu, *given))
    check(*given, cpu=cpu)


@pytest.mark.slow
@pytest.mark.ci
def test_sums_of_codes():
    check(*layer("LSTM", {"bits": 3}, pack=two_terms, steps=1, batch=1), quiet=False)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("form", [FORMS[k] for k in (0, 1, 2, 4, 5, 7, 8, 11, 13)], ids=str)
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_every_form_of_codes(form, cpu, monkeypatch):
    read_as(monkeypatch, "looked up")
    check(*layer("LSTM", form, steps=2, batch=1, inputs=33, hidden=37), cpu=cpu)
    if form["bits"] == 8:
        check(*layer("LSTM", form, is_even=True, steps=2, batch=1, inputs=33, hidden=37), cpu=cpu)


@pytest.mark.slow
@pytest.mark.ci
def test_codebooks_of_their_own_are_decoded_before_the_steps():
    check(*layer("GRU", FORMS[9], steps=2, batch=1, inputs=33, hidden=37), quiet=False)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("way", WAYS)
def test_sizes_that_the_run_tells(way, monkeypatch):
    read_as(monkeypatch, way)
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
    is_short=st.booleans(),
    which=st.sampled_from(["wr", "w", "r"]),
    way=st.sampled_from(WAYS),
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
    is_short,
    which,
    way,
    threads,
    monkeypatch,
):
    form = {"bits": bits, "offset": offset, "group": group, "scale": "groups" if group else "rows"}
    sizes = {"steps": steps_, "batch": batch, "inputs": inputs, "hidden": hidden}
    extra = LINEAR if linear and op == "GRU" else ""
    codes = {"is_even": is_even, "is_short": is_short, "weights": which}
    made = layer(op, form, **codes, direction=direction, initial=initial, extra=extra, **sizes)
    with monkeypatch.context() as patch:
        read_as(patch, way)
        patch.setattr(_split, "_WORTH", 0)
        patch.setattr(recurrent, "_SHORTEST_STEP", 0)
        check(*made, cpu=cpu, threads=threads, quiet=False)
