"""Tables of measured tiles: which tile the kernels of a shape take on a machine, in a file for people and builds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mc_opt
from mc_opt.ir import IRError
from mc_opt.targets import _installed, _machine
from mc_opt.targets._machine import Machine

SCHEMA_VERSION = 1
_DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Measured:
    """What became of one candidate.

    Attributes:
        tile: its name.
        microseconds: the median of a kernel's time; None where it failed.
        ratio: the median of its time over the rule's, side by side.
        failed: why there is no time; empty where there is one.
    """

    tile: str
    microseconds: float | None = None
    ratio: float | None = None
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The tile that a shape takes, and the candidates it was chosen from, the rule's first."""

    chosen: str
    candidates: tuple[Measured, ...]

    @property
    def rule(self) -> str:
        """The tile of the rule."""
        return self.candidates[0].tile

    @property
    def ratio(self) -> float | None:
        """The chosen tile's time over the rule's."""
        return next((c.ratio for c in self.candidates if c.tile == self.chosen), None)

    @property
    def failed(self) -> int:
        """How many candidates failed."""
        return sum(bool(c.failed) for c in self.candidates)


@dataclasses.dataclass(frozen=True)
class Section:
    """What was measured for one target by one version: its entries count for no other.

    Attributes:
        mc_opt: the version of mc-opt, whose kernels they are.
        tvm: the version of TVM, whose compiler makes them.
        target: the kind of processor.
        cpu: the name that LLVM knows.
        features: what code for it may use.
        threads: threads that kernels are split for.
        activations: in what products with packed weights take their inputs.
        processor: where it was measured, for people.
        shapes: the entries by shape.
    """

    mc_opt: str
    tvm: str
    target: str
    cpu: str
    features: tuple[str, ...]
    threads: int
    activations: str
    processor: str = ""
    shapes: Mapping[str, Entry] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, machine: Machine) -> Section:
        """An empty section for a machine, by the versions that are here."""
        return cls(
            mc_opt.__version__,
            _installed.tvm_version(),
            machine.kind,
            machine.cpu,
            machine.features,
            machine.threads,
            machine.activations,
            _machine.processor(),
        )

    def is_for(self, other: Section) -> bool:
        """Whether both are of one machine and one version; where it was measured makes no difference."""
        return self._key() == other._key()

    def tiles(self) -> dict[str, str]:
        """The tile of each shape."""
        return {shape: entry.chosen for shape, entry in self.shapes.items()}

    def _key(self) -> tuple[Any, ...]:
        return (
            self.target,
            self.cpu,
            self.features,
            self.threads,
            self.activations,
            self.mc_opt,
            self.tvm,
        )

    def __str__(self) -> str:
        rounded = "" if self.activations == "float32" else f" activations={self.activations}"
        target = f"{self.target}{{cpu={self.cpu} threads={self.threads}{rounded}}}"
        return f"{target}, mc-opt {self.mc_opt}, TVM {self.tvm}"


@dataclasses.dataclass(frozen=True)
class TileTable:
    """A table of measured tiles; builds with equal tables make equal bytes."""

    sections: tuple[Section, ...] = ()

    @classmethod
    def read(cls, path: Path) -> TileTable:
        """The table of a file.

        Raises:
            IRError: it cannot be read, is no such table, or another version wrote it.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["schema_version"]
            if version == SCHEMA_VERSION:
                return cls(tuple(_section(s) for s in data["machines"]))
        except OSError as error:
            raise IRError(f"{path}: cannot be read ({error.strerror}); name a table that --tune quick wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise IRError(f"{path}: is no table of tiles ({problem}); name another, or delete it") from None
        raise IRError(
            f"{path}: has schema version {version}, this mc-opt reads {SCHEMA_VERSION}; delete it and tune again"
        )

    def section(self, machine: Machine) -> Section:
        """What holds for a machine and the versions that are here; an empty section where there is nothing."""
        wanted = Section.of(machine)
        return next((s for s in self.sections if s.is_for(wanted)), wanted)

    def others(self, section: Section) -> tuple[Section, ...]:
        """The sections of other machines and versions."""
        return tuple(s for s in self.sections if not s.is_for(section))

    def with_entry(self, machine: Machine, shape: str, entry: Entry) -> TileTable:
        """The table with one entry more, or another; its numbers are those that the file will hold."""
        old = self.section(machine)
        entry = dataclasses.replace(entry, candidates=tuple(map(_rounded, entry.candidates)))
        new = dataclasses.replace(old, shapes={**old.shapes, shape: entry})
        return TileTable((*self.others(old), new))

    def text(self) -> str:
        """The file's text: sections and shapes in order, a shape to a paragraph."""
        return "".join(_lines(self.sections))


def _lines(sections: tuple[Section, ...]) -> Iterator[str]:
    """JSON with a candidate a line: a table is read by people, and compared line by line."""
    yield f'{{"schema_version": {SCHEMA_VERSION}, "machines": ['
    for k, section in enumerate(sorted(sections, key=Section._key)):
        head = {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if f.name != "shapes"}
        head["features"] = ",".join(section.features)
        yield f'{"," if k else ""}\n{{{_json(head)[1:-1]},\n "shapes": {{'
        for n, (shape, entry) in enumerate(sorted(section.shapes.items())):
            yield f'{"," if n else ""}\n  {_json(shape)}: {{"chosen": {_json(entry.chosen)}, "candidates": ['
            rows = [_json(_plain(c)) for c in entry.candidates]
            yield ",".join(f"\n   {row}" for row in rows) + "]}"
        yield "}}"
    yield "]}\n"


def _rounded(candidate: Measured) -> Measured:
    numbers = (candidate.microseconds, candidate.ratio)
    microseconds, ratio = (None if v is None else float(f"{v:.{_DIGITS}g}") for v in numbers)
    return dataclasses.replace(candidate, microseconds=microseconds, ratio=ratio)


def _plain(candidate: Measured) -> dict[str, Any]:
    """The fields that say something."""
    return {k: v for k, v in dataclasses.asdict(candidate).items() if v or k == "tile"}


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


def _section(data: Mapping[str, Any]) -> Section:
    fields = {f.name: data[f.name] for f in dataclasses.fields(Section)}
    for name in ("mc_opt", "tvm", "target", "cpu", "activations", "processor"):
        _expect(fields[name], str, name)
    _expect(fields["threads"], int, "threads")
    features = tuple(f for f in fields["features"].split(",") if f)
    shapes = {shape: _entry(entry) for shape, entry in fields["shapes"].items()}
    return Section(**{**fields, "features": features, "shapes": shapes})


def _entry(data: Mapping[str, Any]) -> Entry:
    candidates = tuple(Measured(**c) for c in data["candidates"])
    names = [c.tile for c in candidates]
    if data["chosen"] not in names:
        raise ValueError(f"{data['chosen']!r} is chosen and is none of its candidates {', '.join(map(str, names))}")
    for c in candidates:
        _expect(c.tile, str, "tile")
        _expect(c.failed, str, "failed")
        for number in (c.microseconds, c.ratio):
            _expect(number, int | float | None, "a time")
    return Entry(data["chosen"], candidates)


def _expect(value: Any, kind: Any, name: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}")
