"""A diff for people: by layer, with the pass and rule behind each change; coloured on a terminal, plain in a pipe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mc_opt.tools._console import size_text

if TYPE_CHECKING:
    from mc_opt.ir import Change, Diff, LayerChange, OutputDrift, Stored

_SIGNS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow")}
_WIDE = 1 << 12
_SHARE = 1e-5  # of a value's range: sums in another order differ by less
_ROWS = 30


class _Stdout(Console):
    """Leaves a reader that closed the pipe to the command line; rich's own ends the program with 1."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the BrokenPipeError


def print_diff(found: Diff, first: str, second: str, *, whole: bool, renames: bool) -> None:
    """Print a diff on stdout; `whole` without summing up, `renames` with what has another name."""
    console = _Stdout(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDE  # a pipe has no width: nothing is cut
    console.print(Text.assemble(("--- ", "red"), first, "\n", ("+++ ", "green"), second))
    if found.equal:
        console.print("no difference" + (f" but {len(found.renames)} names" if found.renames else ""))
    else:
        _print_totals(console, found)
        _print_makers(console, found.changes)
        _print_changes(console, found.changes, whole=whole)
        _print_layers(console, found.layers, whole=whole)
    if renames:
        rows = [(r.what, r.before, r.after) for r in found.renames]
        _print_table(console, ("renamed", "was", "is"), rows, title=f"{len(rows)} renames, which are no changes")
    elif found.renames and not found.equal:
        console.print(f"\n{len(found.renames)} nodes and values have another name only: --renames lists them")
    if found.drift is not None:
        _print_drift(console, found.drift, whole=whole)


def _print_totals(console: Console, found: Diff) -> None:
    def counts(what: str) -> str:
        number: Counter[str] = Counter(c.kind for c in found.changes if c.what == what)
        return ", ".join(f"{number[kind]} {kind}" for kind in _SIGNS if number[kind]) or "the same"

    before, after = found.before, found.after
    rows = [
        ("nodes", str(before.nodes), str(after.nodes), counts("node")),
        ("parameters", str(before.parameters), str(after.parameters), ""),
        ("stored", size_text(before.bytes), size_text(after.bytes), f"constants: {counts('weight')}"),
    ]
    _print_table(console, ("", "A", "B", "changes"), rows, right=(1, 2))
    for change in found.changes:
        if change.what not in ("node", "weight"):
            console.print(_line(change))


def _print_makers(console: Console, changes: Sequence[Change]) -> None:
    """How much each pass and rule did."""
    counted: Counter[tuple[str, ...]] = Counter(
        (origin.made_by, origin.rule, c.what, c.kind) for c in changes for origin in c.by
    )
    makers = dict.fromkeys((made_by, rule) for made_by, rule, _, _ in counted)
    rows = []
    for made_by, rule in makers:
        did = [
            f"{_count(counted[made_by, rule, what, kind], what)} {kind}"
            for what in ("node", "weight", "input", "output", "function", "model")
            for kind in _SIGNS
            if counted[made_by, rule, what, kind]
        ]
        rows.append((made_by, rule or "(not told)", ", ".join(did)))
    unknown = sum(1 for c in changes if not c.by)
    if unknown and rows:
        rows.append(("(unknown)", "", _count(unknown, "change")))
    _print_table(console, ("pass", "rule", "did"), rows, title="By pass")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _print_changes(console: Console, changes: Sequence[Change], *, whole: bool) -> None:
    groups: dict[str, list[Change]] = {}
    for change in changes:
        if change.what in ("node", "weight"):
            groups.setdefault(_module(change.layer), []).append(change)
    for group, members in groups.items():
        nodes = [c for c in members if whole or c.what == "node"]
        rest = [c for c in members if not whole and c.what == "weight"]
        if not group and not whole and len(nodes) > _ROWS:
            rest, nodes = [*nodes, *rest], []  # the shape arithmetic of a long model
        console.print(Text.assemble("\n", (group or "(no layer)", "bold")))
        for change in nodes:
            console.print(_line(change))
        for line in _summed(rest):
            console.print(line)


def _module(layer: str) -> str:
    """The module of a layer: stem.norm for stem.norm.weight; the layer itself when its name has no parts."""
    return layer.rpartition(".")[0] or layer


def _line(change: Change) -> Text:
    sign, colour = _SIGNS[change.kind]
    what = "" if change.what == "node" else f"{change.what} "
    line = Text.assemble("  ", (f"{sign} {what}{change.title} {change.name}", colour))
    if change.by:
        line.append("  " + ", ".join(map(str, change.by)), "dim")
    for detail in change.details:
        if change.what == "node" and detail.what.startswith("weight "):
            continue  # the weight has a line of its own
        if detail.what != "inputs" or len(detail.before) + len(detail.after) < _ROWS * 4:
            line.append(f"\n      {detail.what}: {detail.before} -> {detail.after}")
        else:
            line.append(f"\n      {detail.what}")
    return line


def _summed(changes: Iterable[Change]) -> list[Text]:
    """One line for changes of one sort, made by one rule."""
    sorts: dict[tuple[str, str, str], list[Change]] = {}
    for change in changes:
        title = change.title if change.what == "node" else change.what
        sorts.setdefault((change.kind, title, ", ".join(map(str, change.by))), []).append(change)
    lines = []
    for (kind, title, by), members in sorts.items():
        sign, colour = _SIGNS[kind]
        if len(members) == 1:
            lines.append(_line(members[0]))
            continue
        names = ", ".join(c.name for c in members[:4]) + (f" and {len(members) - 4} more" if len(members) > 4 else "")
        lines.append(Text.assemble("  ", (f"{sign} {len(members)} {title}s", colour), f" {names}", (f"  {by}", "dim")))
    return lines


def _print_layers(console: Console, layers: Sequence[LayerChange], *, whole: bool) -> None:
    shown = layers if whole else _by_module(layers)
    rows = [_layer_row(c.layer, c.before, c.after) for c in shown if whole or c.changed]
    same = [c.after for c in shown if not c.changed and c.after]
    if same and not whole:
        parameters, stored = sum(s.parameters for s in same), sum(s.bytes for s in same)
        rows.append(
            (f"{len(same)} unchanged", str(parameters), str(parameters), size_text(stored), size_text(stored), "")
        )
    columns = ("layer", "parameters A", "B", "stored A", "B", "B/A")
    _print_table(console, columns, rows, title="By layer", right=range(1, 6))


def _by_module(layers: Sequence[LayerChange]) -> list[LayerChange]:
    """The layers of one module in one row: weight and bias, the four parameters of a normalisation."""
    modules: dict[str, LayerChange] = {}
    for layer in layers:
        name = _module(layer.layer)
        seen = modules.get(name)
        if seen is None:
            modules[name] = dataclasses.replace(layer, layer=name)
            continue
        before, after = (
            x if y is None else y if x is None else x + y
            for x, y in ((seen.before, layer.before), (seen.after, layer.after))
        )
        modules[name] = dataclasses.replace(seen, before=before, after=after)
    return list(modules.values())


def _layer_row(layer: str, before: Stored | None, after: Stored | None) -> tuple[str, ...]:
    def cells(stored: Stored | None) -> tuple[str, str]:
        return ("-", "-") if stored is None else (str(stored.parameters), size_text(stored.bytes))

    a, b = cells(before), cells(after)
    share = f"{after.bytes / before.bytes:.3f}" if before and after and before.bytes else ""
    return layer, a[0], b[0], a[1], b[1], share


def _print_drift(console: Console, drift: Sequence[OutputDrift], *, whole: bool) -> None:
    """Every value's drift; without `whole` those before the first that differs are summed up."""
    apart = [i for i, d in enumerate(drift) if d.unmatched or d.relative is None or d.relative > _SHARE]
    start = 0 if whole or not apart else apart[0]
    rows = [
        (
            d.name,
            "-" if d.sqnr_db is None else f"{d.sqnr_db:.1f}",
            f"{d.max_abs:.3g}",
            f"{d.spread:.3g}",
            "-" if d.relative is None else f"{d.relative:.2e}",
            "<- drift begins here" if apart and i == apart[0] else "",
        )
        for i, d in enumerate(drift)
        if whole or (apart and i >= start)
    ]
    title = f"Drift of {len(drift)} values that both have"
    if not apart:
        console.print(f"\n{title}: none by more than {_SHARE:g} of its range")
    elif start:
        console.print(f"\n{title}: the first {start} by less than {_SHARE:g} of their range")
        title = ""
    _print_table(
        console, ("value", "SQNR dB", "max |a-b|", "range", "max/range", ""), rows, title=title, right=range(1, 5)
    )


def _print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    right: Iterable[int] = (),
) -> None:
    if not rows:
        return
    if title:
        console.print(f"\n{title}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    with console.capture() as text:
        console.print(table)
    # Spaces behind the last column are of no use in a pipe.
    console.out("\n".join(line.rstrip() for line in text.get().splitlines()), highlight=False)
