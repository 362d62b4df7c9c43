"""The records of a diff: changes, each with the passes and rules behind it, renames, layers and drift."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mc_opt.ir.history import Origin
from mc_opt.ir.run.drift import OutputDrift
from mc_opt.ir.storage import LayerChange

SCHEMA_VERSION = 1
"""Version of the fields of `Diff.to_json`; grows when a field changes its meaning or goes."""

What = Literal["model", "input", "output", "node", "weight", "function"]
Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class Detail:
    """One thing that is different: what it was and what it is."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """Something that one model has and the other has not, or has otherwise.

    Attributes:
        what: a node, a weight (any stored constant), an input, an output, a function, or the model itself.
        kind: how it changed.
        name: its name; the second model's where both have it.
        title: a node's op, another thing's type.
        layer: the layer that it belongs to; empty when to none.
        details: for `changed`, what is different; else nothing, or what stands in its place.
        by: the passes and rules that made the change, in order; empty when the models do not say.
    """

    what: What
    kind: Kind
    name: str
    title: str
    layer: str = ""
    details: tuple[Detail, ...] = ()
    by: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class Rename:
    """A node or value that has another name and is the same."""

    what: Literal["node", "value"]
    before: str
    after: str


@dataclass(frozen=True)
class Total:
    """What a whole model has."""

    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Diff:
    """The difference of two models.

    Attributes:
        before: the first model's totals.
        after: the second's.
        changes: in the order of the models, first the interface, then nodes, then weights.
        renames: what is the same under another name; no change.
        layers: what each layer stores, before and after, the unchanged ones too.
        drift: how far each value that both models have is apart, in topological order; None when it was not measured.
    """

    before: Total
    after: Total
    changes: tuple[Change, ...] = ()
    renames: tuple[Rename, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    drift: tuple[OutputDrift, ...] | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing changed but names."""
        return not self.changes

    def of(self, what: What, kind: Kind | None = None) -> tuple[Change, ...]:
        """The changes of one sort."""
        return tuple(c for c in self.changes if c.what == what and kind in (None, c.kind))

    def unexplained(self) -> tuple[Change, ...]:
        """The changes of which no pass is known, or a pass but no rule."""
        return tuple(c for c in self.changes if not c.by or any(not o.made_by or not o.rule for o in c.by))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, texts and numbers, in a fixed order."""
        plain: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "equal": self.equal, **dataclasses.asdict(self)}
        for change in plain["changes"]:
            change["by"] = [{"pass": o["made_by"], "rule": o["rule"]} for o in change["by"]]
        return plain
