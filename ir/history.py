"""What passes did to a model, kept in it: which pass and rule touched each node and value, and what they renamed.

A node that a pass made says so itself; a node that is gone cannot. So the model's metadata hold one list, in the
order of the passes, which `diff` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir

from mc_opt.ir.errors import IRError

HISTORY = "mc_opt.history"
_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Who made a change: a pass, and its rule (empty when the pass did not say)."""

    made_by: str
    rule: str

    def __str__(self) -> str:
        return f"{self.made_by}: {self.rule}" if self.rule else self.made_by


@dataclass(frozen=True)
class Touched:
    """What one rule of a pass touched: names of nodes and of values, and names that it replaced by others."""

    by: Origin
    nodes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    renamed_nodes: Mapping[str, str] = field(default_factory=dict)
    renamed_values: Mapping[str, str] = field(default_factory=dict)


def read_history(model: onnx_ir.Model) -> tuple[Touched, ...]:
    """What the model says of itself; nothing when it was made elsewhere.

    Raises:
        IRError: the metadata are not what mc-opt writes.
    """
    text = model.metadata_props.get(HISTORY)
    if not text:
        return ()
    try:
        data = json.loads(text)
        if data["version"] != _VERSION:
            raise IRError(f"{HISTORY} has version {data['version']}, this mc-opt knows {_VERSION}; take a newer one")
        return tuple(
            Touched(
                Origin(str(e["pass"]), str(e["rule"])),
                tuple(map(str, e.get("nodes", ()))),
                tuple(map(str, e.get("values", ()))),
                dict(e.get("renamed_nodes", {})),
                dict(e.get("renamed_values", {})),
            )
            for e in data["touched"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IRError(
            f"{HISTORY} in the model's metadata is damaged ({error!r}); remove it, and write the model again"
        ) from error


def add_history(model: onnx_ir.Model, touched: Iterable[Touched]) -> None:
    """Write more to what the model says of itself; nothing for nothing."""
    entries = [*read_history(model), *touched]
    if not entries:
        return
    data = {"version": _VERSION, "touched": [_plain(entry) for entry in entries]}
    model.metadata_props[HISTORY] = json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _plain(entry: Touched) -> dict[str, object]:
    full: dict[str, object] = {
        "nodes": list(entry.nodes),
        "values": list(entry.values),
        "renamed_nodes": dict(entry.renamed_nodes),
        "renamed_values": dict(entry.renamed_values),
    }
    return {"pass": entry.by.made_by, "rule": entry.by.rule} | {key: value for key, value in full.items() if value}


def since(before: tuple[Touched, ...], after: tuple[Touched, ...]) -> tuple[Touched, ...]:
    """What happened after `before`, when that is how `after` begins; else all of `after`."""
    return after[len(before) :] if after[: len(before)] == before else after


def origins(history: Iterable[Touched], *, nodes: Iterable[str] = (), values: Iterable[str] = ()) -> tuple[Origin, ...]:
    """Who touched a thing of these names, each once, in order; names are followed where they were replaced."""
    own_nodes, own_values = set(nodes), set(values)
    found: dict[Origin, None] = {}
    for entry in history:
        if not (own_nodes.isdisjoint(entry.nodes) and own_values.isdisjoint(entry.values)):
            found[entry.by] = None
        own_nodes |= {entry.renamed_nodes[n] for n in own_nodes if n in entry.renamed_nodes}
        own_values |= {entry.renamed_values[n] for n in own_values if n in entry.renamed_values}
    return tuple(found)
