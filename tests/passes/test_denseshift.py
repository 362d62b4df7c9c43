"""denseshift: the codebook, the search for scales, sums of two codes, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_opt import ir, passes
from mc_opt.passes import _shift
from tests._harness import apply, check, model, skipped

LINEAR = "g (float[N,8] x) => (float[N,12] y) <float[8,12] w> { y = MatMul (x, w) }"
THREE = """g (float[2,8] x) => (float[2,8] y) <float[8,32] a, float[32,32] b, float[32,8] c> {
    h = MatMul (x, a)
    i = MatMul (h, b)
    y = MatMul (i, c)
}"""


def test_packs_a_linear_layer() -> None:
    check(
        "denseshift{skip=}",
        LINEAR,
        """
        w = mc_opt.Lookup(w.codes, denseshift.4bit, w.scale) {axes=[1], bits=4, shape=[8, 12]}
        y = MatMul(x, w)""",
    )


def test_two_terms_are_a_sum_of_two_lookups() -> None:
    check(
        "denseshift{bits=2 terms=2 skip=}",
        "g (float[2,64] x) => (float[2,12] y) <float[64,12] w> { y = MatMul (x, w) }",
        """
        w.1 = mc_opt.Lookup(w.1.codes, denseshift.2bit, w.1.scale) {axes=[1], bits=2, shape=[64, 12]}
        w.2 = mc_opt.Lookup(w.2.codes, denseshift.2bit, w.2.scale) {axes=[1], bits=2, shape=[64, 12]}
        w = Add(w.1, w.2)
        y = MatMul(x, w)""",
    )


def test_first_and_last_are_kept_and_the_rest_is_taken() -> None:
    check("denseshift", THREE, "h = MatMul(x, a)\nb = mc_opt.Lookup(b.codes, denseshift.4bit, b.scale) "
          "{axes=[1], bits=4, shape=[32, 32]}\ni = MatMul(h, b)\ny = MatMul(i, c)")  # fmt: skip
    assert set(skipped("denseshift", THREE)) == {"a", "c"}
    assert skipped("denseshift{skip=}", THREE) == {}


def test_first_and_last_stay_first_and_last_in_a_second_run() -> None:
    once, _ = apply("denseshift{skip= layers=a}", model(THREE))
    twice, rewrites = apply("denseshift", once)
    assert rewrites == 1, "a is decoded by now, and still the first layer: b is not"
    assert twice.graph.initializers["c"] is not None


def test_all_kinds_of_layers_and_row_axes() -> None:
    result = check(
        "denseshift{skip=}",
        """g (float[2,4,9,9] x, int64[3] ids, float[5,1,8] s) => (float[2,6,7,7] y, float[3,8] e, float[5,2,1,16] h)
        <float[6,4,3,3] conv, float[64,8] table, float[2,64,8] wi, float[2,64,16] wr> {
            y = Conv (x, conv)
            e = Gather (table, ids)
            h = LSTM <hidden_size: int = 16, direction: string = "bidirectional"> (s, wi, wr)
        }""",
    )
    axes = {n.outputs[0].name: list(n.attributes["axes"].as_ints()) for n in result.graph if n.op_type == "Lookup"}
    assert axes == {"conv": [0], "table": [0], "wi": [0, 1], "wr": [0, 1]}
    books = {n.inputs[1] for n in result.graph if n.op_type == "Lookup"}
    assert len(books) == 1, "one codebook for all layers"


def test_a_tied_weight_is_stored_once() -> None:
    result = check(
        "denseshift{skip=}",
        """g (float[2,16] x) => (float[2,16] y) <float[16,16] w> {
            h = MatMul (x, w)
            y = MatMul (h, w)
        }""",
    )
    assert [n.op_type for n in result.graph] == ["Lookup", "MatMul", "MatMul"]


def test_half_weights_stay_half() -> None:
    result = check(
        "denseshift{skip=}",
        """g (float16[2,64] x) => (float16[2,32] y) <float16[64,32] w> { y = MatMul (x, w) }""",
        "w = mc_opt.Lookup(w.codes, denseshift.4bit.float16, w.scale) {axes=[1], bits=4, shape=[64, 32]}"
        "\ny = MatMul(x, w)",
    )
    assert result.graph.initializers["w.scale"].dtype is not None
    assert result.graph.initializers["w.scale"].dtype.name == "FLOAT16"


def test_overrides_reach_a_layer() -> None:
    recipe = passes.Pipeline((passes.Step(passes.find_pass("denseshift")(skip=()), (("b", {"bits": 2}),)),))
    result = passes.run(model(THREE), recipe, passes.Context()).model
    bits = {n.outputs[0].name: n.attributes["bits"].as_int() for n in result.graph if n.op_type == "Lookup"}
    assert bits == {"a": 4, "b": 2, "c": 4}


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_cells_keep_the_sums_of_their_rows(op: str, gates: int) -> None:
    text = f"""g (float[5,1,40] s) => (float[5,1,1,32] y) <float[1,{gates * 32},40] w, float[1,{gates * 32},32] r> {{
        y = {op} <hidden_size: int = 32> (s, w, r)
    }}"""
    # A few large weights; most of the others are far below the smallest level, and positive.
    w = np.random.default_rng(0).normal(0.02, 0.01, (gates * 32, 40)).astype(np.float32)
    w[:, 20:24] *= 1000
    weights = {"w": w, "r": w[:, :32]}
    for rounding, balance in (("nearest", 0.1), ("log2", 0.0)):
        packed, _ = apply(f"denseshift{{rounding={rounding}}}", model(text, {k: v[None] for k, v in weights.items()}))
        for name, weight in weights.items():
            (fitted,) = _shift.fit(weight, 4, group_size=0, terms=1, rounding=rounding, balance=balance)
            stored = {k: packed.graph.initializers[f"{name}.{k}"].const_value for k in ("codes", "scale")}
            np.testing.assert_array_equal(stored["codes"].numpy(), ir.pack_codes(fitted.codes, 4))
            np.testing.assert_array_equal(stored["scale"].numpy().ravel(), fitted.scales.ravel())


def test_declines_what_would_not_get_smaller() -> None:
    column = "g (float[2,1] x) => (float[2,64] y) <float[1,64] w> { y = MatMul (x, w) }"
    assert skipped("denseshift{skip=}", column) == {
        "w": "bits=4: 64 x 1 weights would take 288 bytes with their scales, they take 256"
    }
    tiny = "g (float[2,4] x) => (float[2,2] y) <float[4,2] w> { y = MatMul (x, w) }"
    assert skipped("denseshift{skip=}", tiny) == {"w": "the codes would save 20 bytes, their codebook takes 64"}


def test_declines_weights_that_are_not_finite() -> None:
    w = np.ones((8, 12))
    w[3, 4] = np.nan
    assert "NaN" in skipped("denseshift{skip=}", LINEAR, {"w": w})["w"]


def test_says_which_option_is_wrong() -> None:
    for text, word in (
        ("bits=5", "2, 3, 4"),
        ("terms=3", "1, 2"),
        ("group_size=-1", "0 makes a row"),
        ("rounding=up", "log2"),
    ):
        with pytest.raises(ir.OptionError, match=word):
            passes.Pipeline.parse(f"denseshift{{{text}}}")


# ---- the codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codebook_has_no_zero_and_every_code_its_own_value(bits: int) -> None:
    book = _shift.shift_codebook(bits)
    assert len(set(book.tolist())) == 2**bits and 0 not in book
    assert sorted(book[book > 0]) == [2.0**k for k in range(2 ** (bits - 1))]
    half = 2 ** (bits - 1)
    np.testing.assert_array_equal(book[half:], -book[:half])  # the upper bit of a code is the sign


def test_a_worked_example_of_both_roundings() -> None:
    w = np.array([[0.9, -0.31, 0.05, -0.12, 0, 0.47]], np.float32)
    for rounding in ("nearest", "log2"):
        codes = _shift._nearest(w, np.array([0.1], np.float32), 3, rounding)
        np.testing.assert_allclose(_shift.shift_codebook(3)[codes] * 0.1, [[0.8, -0.4, 0.1, -0.1, 0.1, 0.4]], rtol=1e-6)
    between = np.array([[0.145]], np.float32)
    assert _shift._nearest(between, np.array([0.1], np.float32), 3, "log2") == 1  # 1.45 > √2
    assert _shift._nearest(between, np.array([0.1], np.float32), 3, "nearest") == 0  # 1.45 < 1.5


def error(w: np.ndarray, bits: int, **options: object) -> np.ndarray:
    given = {"group_size": 0, "terms": 1, "rounding": "nearest"} | options
    fitted = _shift.fit(w, bits, **given)  # type: ignore[arg-type]
    rest = w.astype(np.float64) - _shift.decode(fitted, bits, group_size=int(str(given["group_size"])))
    return np.square(rest).sum(axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_best_scale(bits: int) -> None:
    w = np.random.default_rng(0).standard_normal((12, 150)).astype(np.float32)
    book = np.sort(_shift.shift_codebook(bits))
    best = np.full(len(w), np.inf)
    for factor in np.geomspace(1 / 16, 1.5, 1500):  # every scale of a fine grid, by brute force
        levels = np.abs(w).max(axis=1, keepdims=True) / book[-1] * factor * book
        nearest = np.abs(w[:, :, None] - levels[:, None, :]).min(axis=2)
        best = np.minimum(best, np.square(nearest).sum(axis=1))
    # The grid of the search is coarser, and its refinement may end in a neighbouring minimum.
    assert (error(w, bits) <= 1.01 * best).all()
    assert error(w, bits).sum() <= 1.001 * best.sum()


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([0, 1, 3, 8, 64]),
    power=st.sampled_from([-40, -3, 0, 20]),
    seed=st.integers(0, 2**31),
)
def test_a_sum_is_never_worse_than_one_code_nor_that_than_nothing(
    rows: int, cols: int, bits: int, group: int, power: int, seed: int
) -> None:
    w = np.float32(10.0) ** power * np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    one, two = error(w, bits, group_size=group), error(w, bits, group_size=group, terms=2)
    assert (two <= one * (1 + 1e-5) + 1e-80).all()
    # Up to the precision of a scale: below 1e-38 an fp32 number has few bits.
    assert (one <= np.square(w, dtype=np.float64).sum(axis=1) * 1.001 + 1e-76).all()


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([0, 1, 3, 8]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 2**31),
)
def test_balance_lowers_what_it_says(rows: int, cols: int, bits: int, group: int, dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, cols)) * np.exp(rng.normal(0, 3, cols))).astype(dtype)

    def objective(weight: float) -> float:
        fitted = _shift.fit(w, bits, group_size=group, terms=1, rounding="nearest", balance=weight)
        rest = w.astype(np.float64) - _shift.decode(fitted, bits, group_size=group)
        groups = np.add.reduceat(rest, range(0, cols, group or cols), axis=1)
        return float(np.square(rest).sum() + 0.5 * np.square(groups).sum())

    # The scales are rounded to the weight's type, of which half has 11 bits.
    slack = 1e-2 if dtype is np.float16 else 1e-5
    assert objective(0.5) <= objective(0) * (1 + slack) + slack * 1e-3 * float(np.square(w, dtype=np.float64).sum())


def test_balance_changes_the_signs_of_small_weights() -> None:
    w = np.array([[8, 0.01, 0.02, 0.01, 0.02, -4, 0.02, 0.01, 0.01, 0.02]], np.float32)
    plain, balanced = (
        _shift.decode(_shift.fit(w, 3, group_size=0, terms=1, rounding="nearest", balance=b), 3, group_size=0)
        for b in (0.0, 0.1)
    )
    assert (plain[0, [1, 2, 3, 4, 6, 7, 8, 9]] > 0.9).all(), "eight weights of almost 0 are a sum of almost 8"
    assert plain.sum() - w.sum() > 5
    assert abs(balanced.sum() - w.sum()) < 1
    np.testing.assert_allclose(np.abs(balanced), np.abs(plain), rtol=0.2)


@pytest.mark.parametrize("balance", [0.0, 0.1])
def test_rows_without_a_scale(balance: float) -> None:
    w = np.zeros((4, 9), np.float32)
    w[1], w[2], w[3, 4] = 3, 1e-45, -2
    fitted = _shift.fit(w, 4, group_size=0, terms=1, rounding="nearest", balance=balance)
    decoded = _shift.decode(fitted, 4, group_size=0)
    assert fitted[0].scales[0] == 0 and not decoded[0].any(), "a row of zeros has scale 0: no code is zero"
    np.testing.assert_array_equal(decoded[1], w[1])
    assert np.isfinite(decoded).all()
    assert decoded[3, 4] == pytest.approx(-2, rel=1e-3)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(1).standard_normal((50, 30)).astype(np.float32)
    whole = _shift.fit(w, 3, group_size=7, terms=2, rounding="nearest")
    monkeypatch.setattr(_shift, "_BLOCK", 400)
    parts = _shift.fit(w, 3, group_size=7, terms=2, rounding="nearest")
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scales, b.scales)
