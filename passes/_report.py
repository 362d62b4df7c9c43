"""What a run tells about itself: frozen records that become `report.json`, the same bytes for the same run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mc_opt.passes._training import TrainingReport

SCHEMA_VERSION = 1
"""Version of the fields of `report.json` (docs/report.md); grows when a field changes its meaning or goes."""

_DIGITS = 6


@dataclass(frozen=True)
class File:
    """A file, by its path in its folder."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """The model as it came in: `name` is the file's name without folders; empty for a model in memory."""

    name: str = ""
    sha256: str = ""
    bytes: int = 0
    opset: int = 0
    external: tuple[File, ...] = ()


@dataclass(frozen=True)
class Size:
    """What a model stores.

    Attributes:
        parameters: elements of floating-point weights; a packed weight counts as the elements it decodes to.
        weight_bytes: bytes of all stored constants: codes, codebooks, scales, biases, shapes; a shared one once.
        nodes: nodes of the graph and of the graphs inside it.
    """

    parameters: int
    weight_bytes: int
    nodes: int


@dataclass(frozen=True)
class LayerReport:
    """What one pass did to the stored weight of one layer.

    Attributes:
        layer: the layer's name.
        rewritten_by: the pass.
        rule: the rule of the pass.
        elements: elements of the weight.
        bytes_before: what the weight took before the pass, everything that it is computed from counted.
        bytes_after: what it takes after it; a tensor shared with a layer further up counts there.
        bits: stored bits an element after the pass.
        position: the place of the pass in `Report.passes`, from 0 on.
    """

    layer: str
    rewritten_by: str
    rule: str
    elements: int
    bytes_before: int
    bytes_after: int
    bits: float
    position: int = 0


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        text: the pass with its options.
        exact: whether it promises to keep the numbers.
        rewrites: how many rewrites it made.
        notes: (layer, remark); the layer is empty for a remark on the whole model.
        skips: layer to the reason why it was left alone.
        columns: what the instruments measured.
        drift: the difference of the outputs against the model before the pass (`previous`) and against the
            original (`reference`); empty when it was not measured.
        verdict: how an exact pass kept its promise, output by output; None for other passes.
        training: how it was trained, with its curve; None where it was not.
    """

    name: str
    text: str
    exact: bool
    rewrites: int
    notes: tuple[tuple[str, str], ...] = ()
    skips: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    drift: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None
    training: TrainingReport | None = None


@dataclass(frozen=True)
class TunedKernel:
    """A shape whose kernels took another tile than the rule's.

    Attributes:
        shape: what the table calls it.
        tile: what it took.
        rule: what the rule would have given.
        ratio: the measured time over that of the rule's tile.
    """

    shape: str
    tile: str
    rule: str
    ratio: float | None


@dataclass(frozen=True)
class TuningReport:
    """What a table of measured tiles did for an artefact.

    Attributes:
        processor: where it was measured.
        measured: shapes of the model's kernels that it has.
        tuned: those of them that took another tile than the rule's.
        failed: candidates that failed while they were measured.
        by_rule: shapes that it does not have: their tiles are the rule's.
        unused: what it holds for other machines and other versions.
    """

    processor: str
    measured: int
    tuned: tuple[TunedKernel, ...] = ()
    failed: int = 0
    by_rule: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetReport:
    """A target that was built.

    Attributes:
        name: the target.
        resolved: its text with everything that the build looked up.
        kernels: special kernels, one line each.
        fallbacks: nodes that run in a general form, and why.
        drift: the difference of its outputs against those of the ONNX file beside it; empty when it was not measured.
        tuning: what a table of tiles did; None where there was none.
    """

    name: str
    resolved: str
    kernels: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    drift: Mapping[str, Any] = field(default_factory=dict)
    tuning: TuningReport | None = None


@dataclass(frozen=True)
class Unchecked:
    """A check that was not done, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What went in, what each pass did, what came out, and what was checked; no times, no places.

    Attributes:
        training: the options of the training that differ from their defaults, as text; empty where nothing trained.
    """

    schema_version: int = SCHEMA_VERSION
    mc_opt: str = ""
    source: Source = field(default_factory=Source)
    recipe: str = ""
    seed: int = 0
    training: Mapping[str, str] = field(default_factory=dict)
    before: Size = field(default_factory=lambda: Size(0, 0, 0))
    after: Size = field(default_factory=lambda: Size(0, 0, 0))
    passes: tuple[PassReport, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    warnings: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    targets: tuple[TargetReport, ...] = ()
    outputs: tuple[File, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, texts and numbers; floats have 6 digits, NaN and infinity become None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def text(self) -> str:
        """The text of `report.json`."""
        return json_text(self.to_json())


def json_text(data: Mapping[str, Any]) -> str:
    """JSON as our files hold it: indented, in the order of the data, with a line end."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    match data:
        case bool() | int() | str() | None:
            return data
        case float():
            return float(f"{data:.{_DIGITS}g}") if math.isfinite(data) else None
        case Mapping():
            return {str(key): _plain(value) for key, value in data.items()}
        case list() | tuple():
            return [_plain(item) for item in data]
    if hasattr(data, "item"):  # a numpy scalar
        return _plain(data.item())
    raise TypeError(f"a report cannot hold {type(data).__name__} ({data!r})")
