"""s3: the codebook with one zero, the search for scales, the loss that keeps weights from 0, and random starts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_opt import ir, passes
from mc_opt.passes import _sparse_shift
from tests._harness import check, model, skipped

LINEAR = "g (float[N,24] x) => (float[N,12] y) <float[24,12] w> { y = MatMul (x, w) }"


def test_packs_a_linear_layer() -> None:
    result = check(
        "s3{skip=}",
        LINEAR,
        """
        w = mc_opt.Lookup(w.codes, s3.3bit, w.scale) {axes=[1], bits=3, shape=[24, 12]}
        y = MatMul(x, w)""",
    )
    book = result.graph.initializers["s3.3bit"].const_value
    assert book is not None
    assert book.numpy().tolist() == [0, 1, 2, 4, -1, -2, -4]


def test_first_and_last_are_kept() -> None:
    assert "skip=first" in skipped("s3", LINEAR)["w"]
    tiny = "g (float[2,4] x) => (float[2,2] y) <float[4,2] w> { y = MatMul (x, w) }"
    assert skipped("s3{skip=}", tiny) == {"w": "the codes would save 21 bytes, their codebook takes 28"}


def test_half_weights_stay_half() -> None:
    check(
        "s3{skip= bits=4}",
        "g (float16[2,64] x) => (float16[2,32] y) <float16[64,32] w> { y = MatMul (x, w) }",
        "w = mc_opt.Lookup(w.codes, s3.4bit.float16, w.scale) {axes=[1], bits=4, shape=[64, 32]}\ny = MatMul(x, w)",
    )


def test_says_which_option_is_wrong() -> None:
    for text, word in (("bits=5", "2, 3, 4"), ("group_size=-1", "0 makes a row"), ("alpha=-1", "choose 0 or more"),
                       ("spread=0", "above 0"), ("init=zero", "dense")):  # fmt: skip
        with pytest.raises(ir.OptionError, match=word):
            passes.Pipeline.parse(f"s3{{{text}}}")


# ---- the codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codebook_has_one_zero_at_code_0(bits: int) -> None:
    book = _sparse_shift.codebook(bits)
    assert len(set(book.tolist())) == len(book) == 2**bits - 1
    assert book[0] == 0 and not np.signbit(book[0]) and (book[1:] != 0).all()
    assert sorted(book[book > 0]) == [2.0**k for k in range(2 ** (bits - 1) - 1)]
    w = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    w[0, :3] = 0, -0.0, -1e-9
    fitted = _sparse_shift.fit(w, bits, group_size=0)
    assert fitted.codes.max() < len(book) and not fitted.codes[0, :3].any()
    decoded = _sparse_shift.decode(fitted, bits, group_size=0)
    assert (np.sign(decoded) * np.sign(w) >= 0).all()


def error(w: np.ndarray, bits: int, group_size: int = 0) -> np.ndarray:
    fitted = _sparse_shift.fit(w, bits, group_size=group_size)
    rest = w.astype(np.float64) - _sparse_shift.decode(fitted, bits, group_size=group_size)
    return np.square(rest).sum(axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_best_scale(bits: int) -> None:
    w = np.random.default_rng(0).standard_normal((12, 150)).astype(np.float32)
    book = np.sort(_sparse_shift.codebook(bits))
    best = np.full(len(w), np.inf)
    for factor in np.geomspace(1 / 16, 1.5, 1500):  # every scale of a fine grid, by brute force
        levels = np.abs(w).max(axis=1, keepdims=True) / book[-1] * factor * book
        nearest = np.abs(w[:, :, None] - levels[:, None, :]).min(axis=2)
        best = np.minimum(best, np.square(nearest).sum(axis=1))
    assert (error(w, bits) <= 1.005 * best).all()


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([0, 1, 3, 8, 64]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    power=st.sampled_from([-3, 0, 3]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_nearest_of_scales_of_every_range(
    rows: int, cols: int, bits: int, group: int, dtype: type, power: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = (10.0**power * rng.standard_normal((rows, cols))).astype(dtype)
    w[0] = 0
    fitted = _sparse_shift.fit(w, bits, group_size=group)
    decoded = _sparse_shift.decode(fitted, bits, group_size=group).astype(np.float64)
    scale = np.repeat(fitted.scales.astype(np.float64), group or cols, axis=1)[:, :cols]
    levels = scale[:, :, None] * _sparse_shift.codebook(bits).astype(np.float64)
    least = np.abs(w.astype(np.float64)[:, :, None] - levels).min(axis=2)
    # Where two levels are as near up to rounding, either is right.
    np.testing.assert_allclose(np.abs(w - decoded), least, rtol=1e-5, atol=1e-6 * 10.0**power)
    assert not decoded[0].any() and (np.square(w - decoded).sum() <= np.square(w.astype(np.float64)).sum() * 1.001)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(1).standard_normal((50, 30)).astype(np.float32)
    whole = _sparse_shift.fit(w, 3, group_size=7)
    monkeypatch.setattr(_sparse_shift, "_BLOCK", 4000)
    parts = _sparse_shift.fit(w, 3, group_size=7)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scales, parts.scales)


# ---- the training


def prepared(spec: str) -> tuple[passes.TrainablePass, dict[str, np.ndarray], object]:
    made = model(LINEAR)
    step = passes.Pipeline.parse(spec).passes[0]
    assert isinstance(step, passes.TrainablePass)
    step.prepare(made, passes.Context(training=passes.Training()))
    ir.add_functions(made)
    found = {k: v.const_value.numpy() for k, v in made.graph.initializers.items() if v.const_value is not None}
    return step, found, made


@pytest.mark.torch
def test_the_loss_drives_values_below_0_up_at_the_rate_alpha() -> None:
    torch = pytest.importorskip("torch")
    step, found, made = prepared("s3{skip= alpha=0.125}")
    penalty = step.penalty(made)  # type: ignore[arg-type]
    assert penalty is not None
    value = torch.tensor(found["w.value"], requires_grad=True)
    penalty({"w.value": value}, 0.5).backward()
    np.testing.assert_array_equal(value.grad, np.where(found["w.value"] < 0, -0.125, 0))
    assert prepared("s3{skip= alpha=0}")[0].penalty(made) is None  # type: ignore[arg-type]


def test_dense_starts_with_every_weight_alive_and_no_shift() -> None:
    step, found, made = prepared("s3{skip= init=dense}")
    assert (found["w.value"] > 0).all() and (found["w.step1"] < 0).all() and (found["w.step2"] < 0).all()
    assert 0.3 < (found["w.sign"] > 0).mean() < 0.7
    step.convert(made, passes.Context())  # type: ignore[arg-type]
    codes = made.graph.initializers["w.codes"].const_value  # type: ignore[attr-defined]
    assert set(ir.unpack_codes(codes.numpy(), 3, 24 * 12).tolist()) == {1, 4}, "1 and -1"


def test_normal_has_the_variance_of_the_paper_and_keeps_the_power() -> None:
    step, found, made = prepared("s3{skip= init=normal}")
    for what in ("sign", "value", "step1", "step2"):
        assert found[f"w.{what}"].var() == pytest.approx(2 / 12, rel=0.25)  # of 288 samples
    step.convert(made, passes.Context())  # type: ignore[arg-type]
    book, codes, scale = (
        made.graph.initializers[n].const_value.numpy()  # type: ignore[attr-defined]
        for n in ("s3.3bit", "w.codes", "w.scale")
    )
    w = ir.decode(codes, book, scale, bits=3, shape=(24, 12), axes=(1,))
    before = model(LINEAR).graph.initializers["w"].const_value
    assert before is not None
    np.testing.assert_allclose(np.square(w).sum(axis=0), np.square(before.numpy()).sum(axis=0), rtol=1e-5)


def test_without_a_training_the_float_weights_decide() -> None:
    texts = [ir.to_text(check(f"s3{{skip= init={init}}}", LINEAR)) for init in ("float", "dense", "normal")]
    assert texts[0] == texts[1] == texts[2]
