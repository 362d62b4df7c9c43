"""The parent's side of measuring tiles: a child measures, each entry is kept at once, a child that dies is replaced."""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir

from mc_opt import ir
from mc_opt.ir import OptionError
from mc_opt.targets import _machine, _process
from mc_opt.targets._base import Progress
from mc_opt.targets._machine import Machine
from mc_opt.targets._tile_table import Entry, Measured, TileTable

_CHILD = "from mc_opt.targets import _measure; _measure.serve()"
# Seconds without a word from the child, which speaks before each candidate: a compiler that hangs.
_PATIENCE = 120.0
_ELSEWHERE = "tune on a machine of that kind, and give its table by --tune-table"


def check_here(machine: Machine) -> None:
    """Refuse to measure for a processor that is not this one.

    Raises:
        OptionError: naming the target, and what to do.
    """
    wanted = _machine.ARCHITECTURES[machine.kind]
    what = f"{machine.kind}{{cpu={machine.cpu}}}"
    if platform.machine() != wanted:
        raise OptionError(f"{what}: --tune measures on this machine, which is {platform.machine()}; {_ELSEWHERE}")
    if missing := _machine.missing(machine.features):
        raise OptionError(f"{what}: --tune measures on this processor, which lacks {', '.join(missing)}; {_ELSEWHERE}")


def tune(
    model: onnx_ir.Model,
    machine: Machine,
    table: TileTable,
    *,
    keep: Callable[[TileTable], None],
    progress: Progress,
) -> TileTable:
    """Measure the candidates of every shape of a model that a table has no entry for; returns the table with them.

    Args:
        model: the model.
        machine: this machine.
        table: what is known.
        keep: told of the table after every entry, so that nothing is lost.
        progress: told of every shape.

    Raises:
        OptionError: the machine is another.
        TargetError: the model cannot be built.
        LimitError: memory or disk is full.
        BuildError: the child failed, and not while it tried a candidate.
    """
    check_here(machine)
    course = _Course(table, machine, keep, progress)
    with tempfile.TemporaryDirectory(prefix="mc-opt-tune-") as place:
        path = Path(place) / "model.onnx"
        ir.save_model(model, path, reload="structure")
        while not course.run(path, Path(place) / "request.json"):
            pass
    return course.table


class _Course:
    """What is known so far, over as many children as it takes."""

    def __init__(
        self, table: TileTable, machine: Machine, keep: Callable[[TileTable], None], progress: Progress
    ) -> None:
        self.table = table
        self._machine, self._keep, self._progress = machine, keep, progress
        self._offered: dict[str, list[str]] = {}
        self._broken: dict[str, dict[str, str]] = {}
        self._tried: tuple[str, str] | None = None

    def run(self, model: Path, request: Path) -> bool:
        """Let a child measure what is left; False when it died of a candidate, which the next one leaves out."""
        asked = {
            "model": str(model),
            "machine": dataclasses.asdict(self._machine),
            "known": sorted(self.table.section(self._machine).shapes),
            "broken": self._broken,
        }
        ir.write_text(request, json.dumps(asked))
        self._tried = None
        try:
            _process.converse(_CHILD, str(request), self._hear, patience=_PATIENCE)
        except TimeoutError as error:
            self._give_up(_process.BuildError(f"measuring tiles: the process was {error}"))
            return False
        except _process.BuildError as error:
            self._give_up(error)
            return False
        return True

    def _hear(self, message: dict[str, Any]) -> bool:
        match message:
            case {"progress": [done, total, what]}:
                self._progress(done, total, what)
            case {"offered": offered}:
                self._offered = offered
            case {"trying": [shape, tile]}:
                self._tried = (shape, tile)
            case {"shape": shape, "entry": entry}:
                self._tried = None
                self._put(shape, Entry(entry["chosen"], tuple(Measured(**c) for c in entry["candidates"])))
            case _:
                return False
        return True

    def _put(self, shape: str, entry: Entry) -> None:
        self.table = self.table.with_entry(self._machine, shape, entry)
        self._keep(self.table)

    def _give_up(self, error: _process.BuildError) -> None:
        """Leave out the candidate that a child died of, the whole shape when it was none alone; else raise."""
        if self._tried is None:
            raise error
        shape, tile = self._tried
        if tile:
            self._broken.setdefault(shape, {})[tile] = str(error)
            return
        rule = self._offered[shape][0]
        self._put(shape, Entry(rule, (Measured(rule, failed=str(error)),)))
