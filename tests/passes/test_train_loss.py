"""Training losses: each against a closed form or torch's own, and what they decide from a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mc_opt import ir
from mc_opt.ir.run import interp
from mc_opt.passes._train_loss import BoundLoss, Loss
from tests import _harness
from tests.passes.train_models import ATTENTION, CONVS, FRAMES, LANGUAGE, LOG_SOFTMAX, LOGITS, SOFTMAX, TANH


def bound(text: str, source: str, label: object = None) -> BoundLoss:
    model = _harness.model(source)
    return Loss.parse(text).bind(model, model, None if label is None else np.asarray(label))


def value(
    loss: BoundLoss,
    student: Tensor | Mapping[str, Tensor],
    reference: Tensor | Mapping[str, Tensor] | None = None,
    label: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The total, after its gradient was seen to be finite and not 0."""
    ours = {"y": student} if isinstance(student, Tensor) else student
    theirs = {"y": reference} if isinstance(reference, Tensor) else reference
    ours = {name: x.detach().clone().requires_grad_() for name, x in ours.items()}
    total = loss.total(loss(ours, theirs, label, inputs or {}))
    assert total.dtype == torch.float32 and total.isfinite()
    total.backward()
    gradients = [x.grad for x in ours.values() if x.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    return total.detach()


def close(a: Tensor, b: Tensor | float) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float32), rtol=1e-5, atol=1e-6)  # fp32 sums


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


# ---- text


@pytest.mark.parametrize(
    "text",
    [
        "output",
        "output,layers{weight=0.5 values=*scores*,h},labels{kind=ctc layout=tnc blank=4}",
        "output{kind=kl temperature=4.0 outputs=a*,b mask=none},output{kind=mse}",
        "labels{kind=next-token input=ids}",
    ],
)
def test_text_and_back(text: str) -> None:
    assert str(Loss.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("outputs", "unknown term 'outputs'; did you mean 'output'"),
        ("layers{wight=1}", "unknown option 'wight'"),
        ("output{kind=l1}", "choose one of auto, kl, mse, relative"),
        ("output{temperature=0}", "temperature=0.0: expected a number above 0"),
        ("output{weight=-1}", "weight=-1.0: expected a number from 0 on"),
        ("", "the loss is empty"),
        ("function{file=loss.py:f}", "allow it by --allow-scripts"),
    ],
)
def test_text_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ir.OptionError, match=reason):
        Loss.parse(text)


def test_what_a_loss_needs() -> None:
    assert Loss.parse("output").needs_reference and not Loss.parse("output").needs_labels
    assert Loss.parse("labels").needs_labels and not Loss.parse("labels").needs_reference
    assert not Loss.parse("labels{kind=next-token}").needs_labels


# ---- output


def test_logits_are_compared_by_kl_with_temperature() -> None:
    s, r = pair(6, 3)
    expected = 9 * F.kl_div(F.log_softmax(s / 3, 1), F.softmax(r / 3, 1), reduction="batchmean")
    close(value(bound("output{temperature=3}", LOGITS), s, r), expected)
    # What stands behind a softmax is the same, whether it is taken in the graph or not.
    close(value(bound("output{temperature=3}", SOFTMAX), s.softmax(1), r.softmax(1)), expected)
    close(value(bound("output{temperature=3}", LOG_SOFTMAX), s.log_softmax(1), r.log_softmax(1)), expected)


def test_kl_is_not_negative_and_0_where_equal() -> None:
    loss = bound("output", LOGITS)
    for seed in range(20):
        s, r = 10 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed))
        assert loss({"y": s}, {"y": r}, None, {})["output"] >= 0
    close(loss({"y": s}, {"y": s}, None, {})["output"], 0)


def test_plain_values_are_compared_by_mse() -> None:
    s, r = pair(6, 3)
    close(value(bound("output", TANH), s, r), F.mse_loss(s, r))
    close(value(bound("output{kind=mse}", LOGITS), s, r), F.mse_loss(s, r))
    relative = ((s - r).square().mean(1) / r.square().mean(1)).mean()
    close(value(bound("output{kind=relative}", TANH), s, r), relative)


def test_zeros_and_certainty_give_finite_losses() -> None:
    zeros = torch.zeros(2, 3)
    for text in ("output", "output{kind=relative}"):
        value(bound(text, TANH), zeros, zeros)
    certain = F.one_hot(torch.tensor([0, 2]), 3).float()
    value(bound("output", SOFTMAX), certain, certain.flip(1))
    value(bound("output", LOGITS), 1e30 * certain, -1e30 * certain)


def test_padded_tokens_do_not_count() -> None:
    s, r = pair(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    inputs = {"ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": mask}
    rows = F.kl_div(s.log_softmax(2), r.softmax(2), reduction="none").sum(2)
    close(value(bound("output", LANGUAGE), s, r, inputs=inputs), (rows[0, :3].mean() + rows[1, 0]) / 2)
    close(value(bound("output{mask=none}", LANGUAGE), s, r, inputs=inputs), rows.mean())


def test_halves_of_a_batch_add_up_to_the_whole() -> None:
    s, r = pair(6, 3)
    for text in ("output", "output{kind=relative}"):
        loss = bound(text, LOGITS)
        halves = [value(loss, s[i : i + 3], r[i : i + 3]) for i in (0, 3)]
        close(value(loss, s, r), sum(halves) / 2)


def test_weights_and_terms_of_one_name() -> None:
    s, r = pair(6, 3)
    loss = bound("output{weight=2},output{weight=0.5 kind=mse}", LOGITS)
    values = loss({"y": s}, {"y": r}, None, {})
    assert list(values) == ["output", "output.2"]
    close(loss.total(values), 2 * values["output"] + 0.5 * F.mse_loss(s, r))


def test_autocast_does_not_reach_the_loss() -> None:
    s, r = pair(6, 3)
    loss = bound("output", LOGITS)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss({"y": s.bfloat16()}, {"y": r}, None, {})["output"]
    close(found, value(loss, s.bfloat16().float(), r))


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ir.OptionError, match=r"output: unknown output 'z' \(known: y\)"):
        bound("output{outputs=z}", LOGITS)
    other = _harness.model(LOGITS.replace("3] ", "2] "))
    with pytest.raises(ir.DataError, match=r"output 'y': .*\[N,2\], expected .*\[N,3\]"):
        Loss.parse("output").bind(other, _harness.model(LOGITS), None)
    s, r = pair(2, 3)
    with pytest.raises(ir.DataError, match=r"y: shape \[1, 3\], expected \[2, 3\]"):
        bound("output", LOGITS)({"y": s[:1]}, {"y": r}, None, {})


# ---- layers


def states(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"e": (2, 3, 4), "n": (2, 3, 4), "h": (2, 3, 4), "scores": (2, 3, 3), "y": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_layers_are_relative_errors_and_0_where_equal() -> None:
    s, r = states(0), states(1)
    loss = bound("layers", ATTENTION)
    errors = [((s[k] - r[k]).square().mean((1, 2)) / r[k].square().mean((1, 2))).mean() for k in loss.taps]
    close(value(loss, s, r), sum(errors) / 4)
    close(loss(r, r, None, {})["layers"], 0)
    close(value(bound("layers{values=n}", ATTENTION), s, r), errors[list(loss.taps).index("n")])


@pytest.mark.parametrize("lowest", [-1e9, float("-inf"), torch.finfo(torch.float32).min, -1e4])
def test_masked_scores_do_not_count(lowest: float) -> None:
    s, r = states(0), states(1)
    expected = (
        (s["scores"] - r["scores"])[..., :2].square().mean((1, 2)) / r["scores"][..., :2].square().mean((1, 2))
    ).mean()
    for x in (s, r):
        x["scores"][..., 2] = lowest
    close(value(bound("layers{values=scores}", ATTENTION), s, r), expected)
    kl = F.kl_div(s["scores"][..., :2].log_softmax(2), r["scores"][..., :2].softmax(2), reduction="none")
    close(value(bound("layers{values=scores kind=kl}", ATTENTION), s, r), kl.sum(2).mean())


def test_layers_that_no_value_matches() -> None:
    with pytest.raises(ir.OptionError, match=r"layers: unknown value of both models 'hh'.*known: .*scores"):
        bound("layers{values=hh}", ATTENTION)
    with pytest.raises(ir.OptionError, match="share none of the values that are compared by default"):
        bound("layers", FRAMES)


@pytest.mark.parametrize("spec", ["sekron{ratio=0.5}", "denseshift"])
def test_values_are_matched_after_passes(spec: str) -> None:
    reference = _harness.model(CONVS)
    model, rewrites = _harness.apply(spec, reference)
    assert rewrites
    loss = Loss.parse("output,layers").bind(model, reference, None)
    assert loss.taps == ("n2", "n3")
    assert Loss.parse("layers{values=c*}").taps(model, reference) == ("c1", "c2", "c3")


# ---- labels


def test_classes_are_compared_by_cross_entropy() -> None:
    s, _ = pair(5, 3)
    label = torch.tensor([0, 2, 1, 1, 0])
    expected = F.cross_entropy(s, label)
    close(value(bound("labels", LOGITS, 1), s, label=label), expected)
    close(value(bound("labels", SOFTMAX, 1), s.softmax(1), label=label), expected)
    close(value(bound("labels", LOG_SOFTMAX, [1]), s.log_softmax(1), label=label[:, None]), expected)


def test_a_class_a_position_and_padding() -> None:
    s, _ = pair(2, 4, 5)
    label = torch.tensor([[0, 1, 2, -1], [4, 3, 2, 1]])
    each = F.cross_entropy(s.movedim(2, 1), label, ignore_index=-1, reduction="none")
    close(value(bound("labels", FRAMES, [0, 1, 2, 3]), s, label=label), (each[0, :3].mean() + each[1].mean()) / 2)


def test_numbers_are_compared_by_mse() -> None:
    s, label = pair(5, 3)
    close(value(bound("labels", TANH, [0.5, 1, 2]), s, label=label), F.mse_loss(s, label))


@pytest.mark.parametrize("layout", ["ntc", "tnc"])
def test_ctc(layout: str) -> None:
    s, _ = pair(3, 8, 5)
    label = torch.tensor([[1, 2, 3], [4, -1, -1], [2, 2, -1]])
    lengths = torch.tensor([3, 1, 2])
    expected = F.ctc_loss(s.log_softmax(2).transpose(0, 1), label.clamp(min=0), torch.full((3,), 8), lengths)
    x = s if layout == "ntc" else s.transpose(0, 1)
    close(value(bound(f"labels{{kind=ctc layout={layout}}}", FRAMES, [1, 2, 3]), x, label=label), expected)


def test_next_token_is_the_input_shifted_by_one() -> None:
    s, _ = pair(2, 4, 7)
    ids = torch.tensor([[1, 2, 3, 0], [6, 5, 4, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rows = [[-s[n, t].log_softmax(0)[ids[n, t + 1]] for t in range(3) if mask[n, t + 1]] for n in range(2)]
    expected = sum(sum(row) / len(row) for row in rows) / 2
    loss = bound("labels{kind=next-token}", LANGUAGE)
    close(value(loss, s, inputs={"ids": ids, "attention_mask": mask}), expected)


CLASSES = "m (float[N,3] x) => (int64[N,1] y) { y = ArgMax <axis: int = 1> (x) }"


@pytest.mark.parametrize(
    ("text", "source", "label", "reason"),
    [
        ("labels", LOGITS, None, "the data has none; add an array 'label'"),
        ("labels{kind=cross-entropy}", LOGITS, 0.5, "type float64, expected whole numbers"),
        ("labels{kind=ctc}", LOGITS, [1], "kind=ctc needs an output of rank 3"),
        ("labels{output=z}", LOGITS, 1, "unknown output 'z'"),
        ("output", CLASSES, None, "no output of floating point"),
        ("labels{kind=next-token}", FRAMES, None, "finds no single input of tokens among none"),
        ("labels{kind=next-token input=id}", LANGUAGE, None, "unknown input of whole numbers 'id'; did you mean 'ids'"),
    ],
)
def test_labels_that_do_not_fit(text: str, source: str, label: object, reason: str) -> None:
    with pytest.raises((ir.DataError, ir.OptionError), match=reason):
        bound(text, source, label)


def test_a_batch_of_labels_that_does_not_fit() -> None:
    s, _ = pair(2, 3)
    loss = bound("labels", LOGITS, 1)
    for label, reason in (([0, 3], "label: 3, expected a class below 3"), ([0, 1, 2], r"shape \[3\], expected \[2\]")):
        with pytest.raises(ir.DataError, match=reason):
            loss({"y": s}, None, torch.tensor(label), {})


# ---- functions


def l1(student: Mapping[str, Tensor], reference: Mapping[str, Tensor], label: Tensor | None) -> Tensor:
    return (student["y"] - reference["y"]).abs().mean()


def test_a_function_that_is_handed_over() -> None:
    s, r = pair(5, 3)
    model = _harness.model(LOGITS)
    loss = Loss.of(l1)
    assert str(loss) == "function l1"
    close(value(loss.bind(model, model, None), s, r), F.l1_loss(s, r))


def test_a_changed_file_is_another_loss(tmp_path: Path) -> None:
    path, prints = tmp_path / "loss.py", set()
    for factor in (1, 2):
        path.write_text(f"def mine(s, r, label): return {factor} * (s['y'] - r['y']).abs().mean()")
        prints.add(Loss.parse(f"output,function{{file={path}:mine}}", allow_scripts=True).fingerprint)
    assert len(prints) == 2


def test_a_function_of_a_file(tmp_path: Path) -> None:
    path = _harness.script(tmp_path, "def f(student, reference, label):\n    return student['y'].square().mean()\n")
    model = _harness.model(LOGITS)
    s, r = pair(5, 3)

    def term(name: str) -> BoundLoss:
        return Loss.of(f"function{{file={path}:{name} weight=2}}", allow_scripts=True).bind(model, model, None)

    close(value(term("f"), s, r), 2 * s.square().mean())
    with pytest.raises(ir.OptionError, match=r"unknown function 'g'.*known: f"):
        term("g")
    path.write_text("def f(student, reference, label):\n    return student['z']\n")
    with pytest.raises(ir.DataError, match=r"fix.py:2: KeyError: 'z'"):
        value(term("f"), s, r)
    path.write_text("def f(:\n")
    with pytest.raises(ir.OptionError, match=r"fix.py:1: SyntaxError"):
        term("f")


# ---- figures


def test_figures() -> None:
    s, r = pair(6, 3)
    label = torch.tensor([0, 2, 1, 1, 0, -1])
    for source, sample, metric in (
        (LOGITS, 1, "accuracy"),
        (LOGITS, None, "agreement"),
        (LOGITS, [1, 2], "agreement"),
        (TANH, None, "sqnr_db"),
        (TANH, [0.5, 1, 2], "sqnr_db"),
    ):
        loss = bound("output", source, sample)
        assert loss.metric == metric
        parts = [loss.figure({"y": s[a:b]}, {"y": r[a:b]}, label[a:b], {}) for a, b in ((0, 2), (2, 6))]
        expected = {
            "accuracy": (s.argmax(1) == label)[:5].float().mean(),
            "agreement": (s.argmax(1) == r.argmax(1)).float().mean(),
            "sqnr_db": 10 * (r.square().sum() / (s - r).square().sum()).log10(),
        }[metric]
        assert loss.score(parts[0] + parts[1]) == pytest.approx(float(expected), rel=1e-5)  # fp32 sums
        assert np.isfinite(loss.score(loss.figure({"y": r}, {"y": r}, label, {})))


def test_a_training_by_all_terms_lowers_them() -> None:
    reference = _harness.model(CONVS)
    model = reference.clone()
    rng = np.random.default_rng(0)
    for name in ("w1", "w2", "w3"):
        array = reference.graph.initializers[name].const_value.numpy()
        noisy = array + 0.3 * rng.standard_normal(array.shape).astype(np.float32)
        model.graph.initializers[name].const_value = onnx_ir.tensor(noisy, name=name)
    loss = Loss.parse("output,labels{weight=0.1}").bind(model, reference, np.array(1))
    student, teacher = interp.interpret(model), interp.interpret(reference)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    x, label = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    totals = []
    for _ in range(20):
        values = loss({"y": student(x)[0]}, {"y": teacher(x)[0].detach()}, label, {"x": x})
        total = loss.total(values)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.5 * totals[0]
