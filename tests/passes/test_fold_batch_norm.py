"""fold-batch-norm: every place where it is exact, held to ONNX Runtime; and the true reason where it is not."""
# ruff: noqa: E501  (a table of models)

from __future__ import annotations

import numpy as np
import pytest

from mc_opt import passes
from mc_opt.passes import _affine
from tests._harness import apply, check, largest_difference, model, skipped

BN = "scale, bias, mean, var"


def declare(channels: int, *more: str) -> str:
    parameters = [f"float[{channels}] {name}" for name in ("scale", "bias", "mean", "var")]
    return f"<{', '.join([*more, *parameters])}>"


def conv(body: str, *weights: str, channels: int = 6, x: str = "float[2,4,8,8]", y: str = "float[2,6,N,M]") -> str:
    return f"g ({x} x) => ({y} y) {declare(channels, *weights)} {{ {body} }}"


# What stands before, and the op that must be left of it.
FOLDED = {
    "conv": (conv(f"c = Conv (x, w) y = BatchNormalization (c, {BN})", "float[6,4,3,3] w"), "Conv"),
    "conv-bias": (conv(f"c = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (x, w, b)"
                       f" y = BatchNormalization (c, {BN})", "float[6,4,3,3] w", "float[6] b"), "Conv"),
    "conv-groups": (conv(f"c = Conv <group: int = 2, dilations: ints = [2,2]> (x, w)"
                         f" y = BatchNormalization (c, {BN})", "float[6,2,3,3] w"), "Conv"),
    "conv-transpose": (conv(f"c = ConvTranspose <group: int = 2, strides: ints = [2,2]> (x, w)"
                            f" y = BatchNormalization (c, {BN})", "float[4,3,3,3] w"), "ConvTranspose"),
    "conv-1d": (conv(f"c = Conv (x, w) y = BatchNormalization (c, {BN})", "float[6,4,3] w",
                     x="float[2,4,9]", y="float[2,6,N]"), "Conv"),
    "conv-add": (conv(f"c = Conv (x, w) a = Add (c, k) y = BatchNormalization (a, {BN})",
                      "float[6,4,3,3] w", "float[1,6,1,1] k"), "Conv"),
    "conv-mul": (conv(f"c = Conv (x, w, b) a = Mul (k, c) y = BatchNormalization (a, {BN})",
                      "float[6,4,3,3] w", "float[6] b", "float[6,1,1] k"), "Conv"),
    "conv-div-sub": (conv(f"c = Conv (x, w) a = Div (c, k) s = Sub (j, a) y = BatchNormalization (s, {BN})",
                          "float[6,4,3,3] w", "float[6,1,1] k", "float[1,6,1,1] j"), "Conv"),
    "conv-pool": (conv(f"c = Conv (x, w) a = AveragePool <kernel_shape: ints = [2,2]> (c)"
                       f" y = BatchNormalization (a, {BN})", "float[6,4,3,3] w"), "Conv AveragePool"),
    "conv-global-pool": (conv(f"c = Conv (x, w) a = GlobalAveragePool (c) y = BatchNormalization (a, {BN})",
                              "float[6,4,3,3] w"), "Conv GlobalAveragePool"),
    "conv-concat": (conv(f"c = Conv (x, w) d = Conv (x, v) a = Concat <axis: int = 1> (c, d)"
                         f" y = BatchNormalization (a, {BN})", "float[2,4,3,3] w", "float[4,4,3,3] v"), "Conv Conv Concat"),
    "residual": (conv(f"c = Conv (x, w) d = Conv (x, v) a = Add (c, d) y = BatchNormalization (a, {BN})",
                      "float[6,4,3,3] w", "float[6,4,3,3] v"), "Conv Conv Add"),
    "gemm": (f"g (float[3,8] x) => (float[3,6] y) {declare(6, 'float[6,8] w', 'float[6] c')} {{"
             f" h = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (x, w, c)"
             f" y = BatchNormalization (h, {BN}) }}", "Gemm"),
    "matmul": (f"g (float[3,8] x) => (float[3,6] y) {declare(6, 'float[8,6] w')} {{"
               f" h = MatMul (x, w) y = BatchNormalization (h, {BN}) }}", "MatMul Add"),
    "matmul-add": (f"g (float[3,8] x) => (float[3,6] y) {declare(6, 'float[8,6] w', 'float[6] b')} {{"
                   f" h = MatMul (x, w) a = Add (h, b) y = BatchNormalization (a, {BN}) }}", "MatMul Add"),
    "matmul-left": (f"g (float[2,8,5] x) => (float[2,6,5] y) {declare(6, 'float[6,8] w')} {{"
                    f" h = MatMul (w, x) y = BatchNormalization (h, {BN}) }}", "MatMul Add"),
    "matmul-transpose": (f"g (float[2,5,8] x) => (float[2,6,5] y) {declare(6, 'float[8,6] w', 'float[6] b')} {{"
                         f" h = MatMul (x, w) a = Add (h, b) t = Transpose <perm: ints = [0,2,1]> (a)"
                         f" y = BatchNormalization (t, {BN}) }}", "MatMul Add Transpose"),
    # after the BatchNormalization
    "to-conv": (conv(f"n = BatchNormalization (x, {BN}) y = Conv (n, w)", "float[6,4,3,3] w", channels=4), "Conv"),
    "to-conv-groups": (conv(f"n = BatchNormalization (x, {BN}) y = Conv <group: int = 2> (n, w, b)",
                            "float[6,2,3,3] w", "float[6] b", channels=4), "Conv"),
    "to-two-convs": (conv(f"n = BatchNormalization (x, {BN}) c = Conv (n, w) d = Conv (n, w) y = Add (c, d)",
                          "float[6,4,3,3] w", channels=4), "Conv Conv Add"),
    "to-same-pointwise": (conv(f'n = BatchNormalization (x, {BN}) y = Conv <auto_pad: string = "SAME_UPPER"> (n, w)',
                               "float[6,4,1,1] w", channels=4), "Conv"),
    "to-gemm": (f"g (float[3,8] x) => (float[3,6] y) {declare(8, 'float[8,6] w', 'float[6] c')} {{"
                f" n = BatchNormalization (x, {BN}) y = Gemm <alpha: float = 0.5, beta: float = 2.0> (n, w, c) }}", "Gemm"),
    "to-matmul": (f"g (float[3,8] x) => (float[3,6] y) {declare(8, 'float[8,6] w')} {{"
                  f" n = BatchNormalization (x, {BN}) y = MatMul (n, w) }}", "MatMul Add"),
    "to-matmul-add": (f"g (float[3,8] x) => (float[3,6] y) {declare(8, 'float[8,6] w', 'float[6] b')} {{"
                      f" n = BatchNormalization (x, {BN}) h = MatMul (n, w) y = Add (h, b) }}", "MatMul Add"),
    "to-matmul-left": (f"g (float[2,8,5] x) => (float[2,6,5] y) {declare(8, 'float[6,8] w')} {{"
                       f" n = BatchNormalization (x, {BN}) y = MatMul (w, n) }}", "MatMul Add"),
    "to-batched-matmul": (f"g (float[2,8] x) => (float[3,2,6] y) {declare(8, 'float[3,8,6] w')} {{"
                          f" n = BatchNormalization (x, {BN}) y = MatMul (n, w) }}", "MatMul Add"),
    "to-flatten-gemm": (f"g (float[3,2,4,4] x) => (float[3,6] y) {declare(2, 'float[32,6] w')} {{"
                        f" n = BatchNormalization (x, {BN}) f = Flatten (n) y = Gemm (f, w) }}", "Flatten Gemm"),
    "to-reflect-pad": (conv(f'n = BatchNormalization (x, {BN}) p = Pad <mode: string = "reflect"> (n, pads) y = Conv (p, w)',
                            "float[6,4,3,3] w", "int64[8] pads = {0,0,1,1,0,0,1,1}", channels=4), "Pad Conv"),
    "to-mul-add-conv": (conv(f"n = BatchNormalization (x, {BN}) m = Mul (n, k) a = Add (j, m) y = Conv (a, w)",
                             "float[6,4,3,3] w", "float[4,1,1] k", "float[1,4,1,1] j", channels=4), "Conv"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_folds_where_it_is_exact(name: str) -> None:
    before, left = FOLDED[name]
    source = model(before)
    result = check("fold-batch-norm", before)  # the run holds it to the promise of an exact pass
    assert [n.op_type for n in result.graph] == left.split()
    assert not {"scale", "bias", "mean", "var"} & set(result.graph.initializers)
    x = np.random.default_rng(0).standard_normal([int(str(d)) for d in source.graph.inputs[0].shape or ()])
    assert largest_difference(source, result, {"x": x.astype(np.float32)}) < 1e-4


def test_reads_as_two_texts() -> None:
    result = check(
        "fold-batch-norm",
        conv(f"c = Conv (x, w) r = BatchNormalization (c, {BN}) y = Relu (r)", "float[6,4,3,3] w"),
        "r = Conv(x, w, w.bias)\ny = Relu(r)",
    )
    node = result.graph[0]
    assert node.metadata_props["mc_opt.pass"] == "fold-batch-norm"


def test_a_tied_weight_is_copied() -> None:
    result = check(
        "fold-batch-norm",
        conv(f"c = Conv (x, w) n = BatchNormalization (c, {BN}) d = Conv (x, w) y = Add (n, d)", "float[6,4,3,3] w"),
        "n = Conv(x, w.folded, w.bias)\nd = Conv(x, w)\ny = Add(n, d)",
    )
    assert {"w", "w.folded"} <= set(result.graph.initializers)


def test_zero_padding_takes_the_shift_as_a_map() -> None:
    for attributes in (
        "pads: ints = [1,1,1,1]",
        "pads: ints = [2,0,1,1], strides: ints = [2,1], dilations: ints = [1,2]",
        'auto_pad: string = "SAME_LOWER", strides: ints = [2,2]',
        "pads: ints = [1,1,1,1], group: int = 2",
    ):
        channels = 2 if "group" in attributes else 4
        before = conv(
            f"n = BatchNormalization (x, {BN}) y = Conv <{attributes}> (n, w)", f"float[6,{channels},3,3] w", channels=4
        )
        assert "pads with zeros" in skipped("fold-batch-norm", before)["scale"]
        check("fold-batch-norm{border=true}", before, None)
        result, _ = apply("fold-batch-norm{border=true}", model(before))
        assert [n.op_type for n in result.graph] == ["Conv", "Add"]


def test_without_a_shift_padding_does_not_matter() -> None:
    check(
        "fold-batch-norm",
        conv(
            f"n = BatchNormalization (x, {BN}) y = Conv <pads: ints = [1,1,1,1]> (n, w)", "float[6,4,3,3] w", channels=4
        ),
        "y = Conv(x, w) {pads=[1, 1, 1, 1]}",
        weights={"bias": np.zeros(4), "mean": np.zeros(4)},
    )


def test_dead_channels_fold_too() -> None:
    check(
        "fold-batch-norm",
        conv(f"c = Conv (x, w) y = BatchNormalization (c, {BN})", "float[6,4,3,3] w"),
        "y = Conv(x, w, w.bias)",
        weights={"scale": np.array([0, 1, 0, 1, 1, 1.0]), "var": np.array([1, 1e-12, 0, 1, 1, 1])},
    )


DECLINED = {
    "relu": (conv(f"c = Conv (x, w) r = Relu (c) y = BatchNormalization (r, {BN})", "float[6,4,3,3] w"),
             "its input comes from Relu 'r': a shift cannot pass through it; its result is an output of the model"),
    "input": (conv(f"n = BatchNormalization (x, {BN}) y = Relu (n)", channels=4, y="float[2,4,8,8]"),
              "its input 'x' is no result of a layer; its result goes to Relu 'y': a shift cannot pass through it"),
    "two-uses": (conv(f"c = Conv (x, w) n = BatchNormalization (c, {BN}) y = Add (n, c)", "float[6,4,3,3] w"),
                 "'c' before it has 2 uses (Add 'y', BatchNormalization 'n'); its result goes to Add 'y', "
                 "which has another input"),
    "concat": (conv(f"c = Conv (x, w) r = Relu (c) a = Concat <axis: int = 1> (r, x2) y = BatchNormalization (a, {BN})",
                    "float[4,4,3,3] w", "float[2,2,6,6] x2"),
               "Concat 'a' before it takes the scale only with all its inputs: its input comes from Relu 'r': "
               "a shift cannot pass through it; its result is an output of the model"),
    "max-pool": (conv(f"c = Conv (x, w) m = MaxPool <kernel_shape: ints = [2,2]> (c) y = BatchNormalization (m, {BN})",
                      "float[6,4,3,3] w"),
                 "its input comes from MaxPool 'm': a scale that is not positive changes the maximum; "
                 "its result is an output of the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declines_with_the_true_reason(name: str) -> None:
    before, reason = DECLINED[name]
    assert skipped("fold-batch-norm", before) == {"scale": reason}


def test_declines_training_mode() -> None:
    before = """g (float[2,4,8,8] x) => (float[2,4,8,8] y) <float[4] s, float[4] b, float[4] m, float[4] var> {
        y, rm, rv = BatchNormalization <training_mode: int = 1> (x, s, b, m, var)
    }"""
    assert "training_mode=1" in next(iter(skipped("fold-batch-norm", before).values()))


def test_declines_a_decoded_weight() -> None:
    packed, _ = apply("denseshift{skip=}", model(FOLDED["conv"][0]))
    context = passes.Context()
    assert passes.find_pass("fold-batch-norm")().run(packed, context) == 0
    assert "decoded by Lookup; fold before that pass" in context.log.skips["scale"]


def test_globs_choose_layers() -> None:
    assert "skip=sc* names it" in skipped("fold-batch-norm{skip=sc*}", FOLDED["conv"][0])["scale"]


def test_a_worked_example() -> None:
    affine = _affine.normalization(*(np.array([v]) for v in (2.0, 0.5, 1.0, 3.0)), epsilon=1.0)
    assert (affine.s[0], affine.t[0]) == (1.0, -0.5)


def test_reshapes_carry_channels_where_one_axis_can() -> None:
    channels = _affine.Affine(np.arange(1.0, 4), np.zeros(3), 1)
    flat = _affine.reshaped(channels, (None, 3, 2, 2), (None, 12))
    assert flat is not None and flat.axis == 1 and flat.s.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    split = _affine.reshaped(channels, (None, 3, 4), (None, 1, 3, 2, 2))
    assert split is not None and split.axis == 2
    back = _affine.reshaped(channels, (None, 3, 1, 1), (None, 3))
    assert back is not None and back.axis == 1
    assert _affine.reshaped(channels, (2, 3, 4), (6, 4)) is None, "channels and batch in one axis"
    assert _affine.reshaped(_affine.Affine(np.ones(6), np.ones(6), 1), (2, 6, 1), (2, 2, 3, 1)) is None
