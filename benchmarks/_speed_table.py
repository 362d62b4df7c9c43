"""What benchmarks/speed.py says of its cells: ratios with intervals, verdicts, and the text of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks._speed_forms import COMPRESSED, DENSE, FLOAT, INTEGER, ROUNDED, SERIAL, TORCH
from benchmarks._speed_machine import Limits
from mc_opt.tools import _timing
from mc_opt.tools._timing import Ratio, Series

Cell = Mapping[str, Any]

HALF_WIDTH = 0.05
"""Of a ratio: with a wider interval nothing is decided."""
MUST_MODEL, MUST_MEAN, AIM_MEAN, MUST_GAIN = 1.3, 1.05, 0.85, 0.85
_SHOWN = 6
_ALL = {FLOAT, INTEGER, TORCH, DENSE, COMPRESSED, ROUNDED, SERIAL}
_RESAMPLES = 2000


# --- statistics ---------------------------------------------------------------------------------


def series(cell: Cell, name: str) -> Series | None:
    """The times of a contender; None when it is missing."""
    entry = cell["contenders"].get(name)
    return None if entry is None else Series(name, tuple(entry["ms"]), 0)


def ratio(cell: Cell, name: str, reference: str = FLOAT) -> Ratio | None:
    """A contender's time over another's; None when one is missing."""
    own, other = series(cell, name), series(cell, reference)
    return None if own is None or other is None else _timing.ratio(own, other)


def geometric_mean(pairs: Sequence[tuple[Series, Series]], *, seed: int = 0) -> Ratio:
    """Of the median ratios of several models, with the interval of resampling each model's rounds by itself."""
    rng = np.random.default_rng(seed)
    values, drawn = [], []
    for own, other in pairs:
        ratios = np.asarray(own.milliseconds) / np.asarray(other.milliseconds)
        values.append(np.log(np.median(ratios)))
        drawn.append(np.log(np.median(rng.choice(ratios, (_RESAMPLES, ratios.size)), axis=1)))
    low, high = np.percentile(np.exp(np.mean(drawn, axis=0)), (2.5, 97.5))
    return Ratio(float(np.exp(np.mean(values))), float(low), float(high))


def verdict(found: Ratio, bar: float, *, at_least: bool = False) -> str:
    """`met` or `missed`, or `not decided` when the interval is too wide to say either."""
    if (found.high - found.low) / 2 > HALF_WIDTH * found.value:
        return "not decided"
    return "met" if (found.value >= bar if at_least else found.value <= bar) else "missed"


def gain(cell: Cell) -> Ratio | None:
    """How many times faster the dense artefact is on the cell's threads than on one, over the machine's own gain."""
    found = ratio(cell, SERIAL, DENSE)
    own = Limits.from_json(cell["machine"]).gain(cell["threads"])
    return None if found is None else Ratio(found.value / own, found.low / own, found.high / own)


# --- text ---------------------------------------------------------------------------------------


def counted(threads: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def ratio_text(found: Ratio | None) -> str:
    """`1.15 [1.14, 1.16]`."""
    return "—" if found is None else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def summary(cells: Sequence[Cell], shares: Mapping[str, tuple[float, float]]) -> list[str]:
    """The figures that the issue asks for, a line each."""
    lines = []
    serial = [cell for cell in cells if cell["threads"] == 1]
    for name in (DENSE, COMPRESSED):
        pairs = [(s, r) for c in serial if (s := series(c, name)) is not None and (r := series(c, FLOAT)) is not None]
        if not pairs:
            continue
        mean = geometric_mean(pairs)
        bars = f"; at most {MUST_MEAN:.2f}: {verdict(mean, MUST_MEAN)}; aim {AIM_MEAN:.2f}: {verdict(mean, AIM_MEAN)}"
        lines.append(
            f"- {name}, 1 thread, geometric mean of {len(pairs)} models: {ratio_text(mean)}"
            f"{bars if name == DENSE else ''}"
        )
        ratios = {c["model"]: found for c in serial if (found := ratio(c, name)) is not None}
        worst = max(ratios, key=lambda model: ratios[model].value)
        limit = f"; at most {MUST_MODEL}: {verdict(ratios[worst], MUST_MODEL)}" if name == DENSE else ""
        lines.append(f"- {name}, 1 thread, worst model: {worst} {ratio_text(ratios[worst])}{limit}")
    lines += [line for cell in cells if cell["threads"] > 1 for line in _gain_lines(cell)]
    lines += [_share_line(cell, *shares[cell["model"]]) for cell in cells if cell["model"] in shares]
    return lines + [line for cell in cells for line in _peer_lines(cell)]


def _share_line(cell: Cell, time: float, memory: float) -> str:
    """The compressed artefact's time and peak memory beside ONNX Runtime's in fp32, and the most that they may be."""
    found, (own, other) = ratio(cell, COMPRESSED), (cell["contenders"].get(n, {}) for n in (COMPRESSED, FLOAT))
    text = f"- {cell['model']}, {counted(cell['threads'])}: {COMPRESSED} takes {ratio_text(found)} of {FLOAT}'s time"
    if found is not None:
        text += f"; at most {time:.2f}: {verdict(found, time)}"
    if "memory" in own and "memory" in other:
        share = own["memory"]["peak"] / other["memory"]["peak"]
        text += f"; {share:.2f} of its peak memory, at most {memory:.2f}: {'met' if share <= memory else 'missed'}"
    return text


def _peer_lines(cell: Cell) -> list[str]:
    """How much faster the compressed artefacts are than what only this model is held to."""
    found = {
        (own, name): ratio(cell, name, own)
        for name in cell["contenders"]
        for own in (COMPRESSED, ROUNDED)
        if name not in _ALL
    }
    return [
        f"- {cell['model']}, {counted(cell['threads'])}: {own} is {ratio_text(times)} times as fast as {name}"
        for (own, name), times in found.items()
        if times is not None
    ]


def _gain_lines(cell: Cell) -> list[str]:
    found = gain(cell)
    if found is None:
        return []
    own = Limits.from_json(cell["machine"]).gain(cell["threads"])
    faster = ratio(cell, SERIAL, DENSE)
    assert faster is not None
    return [
        f"- {cell['model']}, {cell['threads']} threads: {faster.value:.2f} times faster than 1 thread,"
        f" {ratio_text(found)} of the machine's own {own:.2f}; at least {MUST_GAIN}:"
        f" {verdict(found, MUST_GAIN, at_least=True)}"
    ]


def ratio_table(cells: Sequence[Cell], aims: Mapping[str, float | None]) -> list[str]:
    """One row a model: times over ONNX Runtime's."""
    rows = []
    for cell in cells:
        reference, dense, aim = series(cell, FLOAT), ratio(cell, DENSE), aims.get(cell["model"])
        assert reference is not None  # a cell without it is refused where it is measured
        detail = cell["contenders"].get(INTEGER, {}).get("detail", "")
        judged = "—"
        if dense is not None:
            judged = f"{MUST_MODEL} {verdict(dense, MUST_MODEL)}"
            judged += f", {aim} {verdict(dense, aim)}" if aim is not None else ""
        quantised = ratio_text(ratio(cell, INTEGER)) + (f" {detail}" if detail else "")
        rest = [ratio_text(ratio(cell, name)) for name in (TORCH, DENSE, COMPRESSED)]
        rows.append([cell["model"], _timing.spread_text(reference), quantised, *rest, judged])
    return table(("model", FLOAT, INTEGER, TORCH, DENSE, COMPRESSED, "at most, aim"), rows)


def detail_table(cells: Sequence[Cell]) -> list[str]:
    """One row a contender: its time, how far its outputs are from fp32's, and the memory of its process."""
    rows = []
    for cell in cells:
        for name, entry in cell["contenders"].items():
            own = series(cell, name)
            assert own is not None
            memory = entry.get("memory")
            peak = [f"{memory['peak']:.0f}", f"{memory['imported']:.0f}"] if memory else ["—", "—"]
            label = f"{name}: {entry['detail']}" if entry["detail"] else name
            spread = _timing.spread_text(own)
            rows.append([cell["model"], str(cell["threads"]), label, spread, f"{entry['difference']:.1e}", *peak])
    return table(("model", "threads", "contender", "time", "difference / range", "peak MB", "imports MB"), rows)


def reason_lines(cells: Sequence[Cell]) -> list[str]:
    """Why a contender is missing."""
    return [
        f"- {cell['model']}, {counted(cell['threads'])}: {name}: {reason}"
        for cell in cells
        for name, reason in cell["reasons"].items()
    ]


def kernel_lines(cell: Cell) -> list[str]:
    """The kernels of a cell's artefacts that take most of the time, and how near their limits they are."""
    lines = []
    for form, found in cell["kernels"].items():
        judged = [k for k in found["kernels"] if "share" in k]
        total = sum(k["ms"] for k in found["kernels"])
        weighted = sum(k["share"] * k["ms"] for k in judged) / sum(k["ms"] for k in judged)
        others = total - sum(k["ms"] for k in judged)
        lines += [
            f"**{cell['model']}, {form}**: {found['ms']:.2f} ms a run; kernels {total:.2f} ms at {weighted:.0%} of"
            f" their limits; {others:.2f} ms of these in the virtual machine's own calls.",
            "",
        ]
        rows = []
        for kernel in judged[:_SHOWN]:
            seconds = kernel["ms"] / 1e3 / kernel["calls"]
            rows.append(
                [
                    kernel["name"],
                    str(kernel["calls"]),
                    f"{kernel['ms']:.3f}",
                    f"{kernel['flops'] / seconds / 1e9:.0f}",
                    f"{(kernel['constants'] + kernel['activations']) / seconds / 1e9:.1f}",
                    f"{kernel['share']:.0%} of {kernel['bound']}",
                ]
            )
        lines += [*table(("kernel", "calls", "ms", "GFLOP/s", "GB/s", "share of its limit"), rows), ""]
    return lines


def document(
    cells: Sequence[Cell],
    *,
    aims: Mapping[str, float | None],
    shares: Mapping[str, tuple[float, float]],
    intro: Sequence[str],
) -> str:
    """The whole text.

    Args:
        cells: what was measured.
        aims: of the dense artefact's time, by model.
        shares: the most that the compressed artefact may take of ONNX Runtime's time and memory, by model.
        intro: lines below the title.
    """
    lines = ["# Speed beside ONNX Runtime", "", *intro, "", "## Summary", "", *summary(cells, shares), ""]
    for threads in sorted({cell["threads"] for cell in cells}):
        own = [cell for cell in cells if cell["threads"] == threads]
        lines += [f"## {counted(threads)}", "", *ratio_table(own, aims), ""]
    lines += ["## Every contender", "", *detail_table(cells), ""]
    if reasons := reason_lines(cells):
        lines += ["Missing:", "", *reasons, ""]
    kernels = [line for cell in cells for line in kernel_lines(cell)]
    if kernels:
        lines += ["## Kernels, 1 thread", "", *kernels]
    return "\n".join(lines).rstrip() + "\n"
