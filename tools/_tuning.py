"""The table of tiles of a run: where it is, what is kept of it while tiles are measured, and what it did."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from mc_opt import ir, passes, targets
from mc_opt.targets import TileTable

if TYPE_CHECKING:
    from mc_opt.tools.driver import Progress, Request

FILE = "tune-table.json"
"""The table that an artefact was built with, in its output folder."""

QUICK = "quick"


class Tuning:
    """The table of a run, and whether it grows.

    Attributes:
        table: what is known by now.
    """

    def __init__(self, table: TileTable, place: Path | None, *, named: bool) -> None:
        """`place` is the file that takes what is measured, the caller's own if `named`; None to measure nothing."""
        self.table = table
        self._place, self._named = place, named
        self._was_there = place is not None and place.exists()
        self._measured = False

    def tiles(self, target: targets.Target, model: onnx_ir.Model, progress: Progress) -> dict[str, str]:
        """The tile of each shape for a target, those that are missing measured first if the run asks for it."""
        if self._place is not None:
            self._keep(self.table)  # a place that cannot be written shows before anything is measured
            self.table = target.tune(model, self.table, keep=self._keep, progress=progress)
        return target.section(self.table).tiles()

    def report(self, target: targets.Target, tiles: Mapping[str, str]) -> passes.TuningReport:
        """What the table did for an artefact, whose kernels took these tiles."""
        section = target.section(self.table)
        known = {shape: section.shapes[shape] for shape in tiles if shape in section.shapes}
        used = {shape: entry for shape, entry in known.items() if entry.chosen == tiles[shape]}
        tuned = tuple(
            passes.TunedKernel(shape, entry.chosen, entry.rule, entry.ratio)
            for shape, entry in sorted(used.items())
            if entry.chosen != entry.rule
        )
        return passes.TuningReport(
            processor=section.processor if used else "",
            measured=len(used),
            tuned=tuned,
            failed=sum(entry.failed for entry in used.values()),
            by_rule=tuple(sorted(set(tiles) - set(used))),
            unused=tuple(f"{other}: {len(other.shapes)} shapes" for other in self.table.others(section)),
        )

    def interrupted(self) -> str:
        """What an interruption says; empty when nothing was measured."""
        if not self._measured:
            return ""
        return f"the tiles measured so far are in {self._place}, and the same command goes on with them"

    def finish(self, *, failed: bool) -> None:
        """Remove the file beside the output, which holds the table itself by now; after a failure, one without news."""
        useless = not self._measured and not self._was_there if failed else not self._named
        if self._place is not None and useless:
            self._place.unlink(missing_ok=True)

    def _keep(self, table: TileTable) -> None:
        assert self._place is not None
        self._measured = self._measured or table is not self.table
        ir.write_text(self._place, table.text())


@contextlib.contextmanager
def tuning(request: Request) -> Iterator[Tuning | None]:
    """The table that a request names or measures; None where it does neither.

    Without a name what is measured stands in `<out>.tuning.json` until the output is written, which holds the table
    then: `--tune quick` into the same folder goes on from either.

    Raises:
        OptionError: there is nothing that tiles are for, or nothing that can be measured here.
        IRError: the table cannot be read.
    """
    if request.tune is None and request.tune_table is None:
        yield None
        return
    check(request)
    named = None if request.tune_table is None else Path(request.tune_table)
    writes = request.out is not None and request.writes and not request.dry_run
    measures = request.tune is not None and writes
    if named is not None:
        empty = request.tune is not None and not named.exists()
        state = Tuning(TileTable() if empty else TileTable.read(named), named if measures else None, named=True)
    else:
        assert request.out is not None or not measures
        places = [] if request.out is None else [_beside(Path(request.out)), Path(request.out) / FILE]
        found = next((TileTable.read(p) for p in places if p.exists()), TileTable())
        state = Tuning(found, places[0] if measures else None, named=False)
    try:
        yield state
    except KeyboardInterrupt as error:
        state.finish(failed=True)
        if not (told := state.interrupted()):
            raise
        raise KeyboardInterrupt(told) from error
    except BaseException:
        state.finish(failed=True)
        raise
    state.finish(failed=False)


def check(request: Request) -> None:
    """Refuse a request that has nothing to tune, or that cannot be tuned here.

    Raises:
        OptionError: naming the option and the target.
    """
    option = "--tune-table" if request.tune is None else f"--tune {request.tune}"
    if request.tune not in (None, QUICK):
        raise ir.OptionError(f"--tune {request.tune!r}: expected {QUICK}")
    built = [target for target in request.targets if target.makes_artefact]
    if not built:
        raise ir.OptionError(f"{option} is for kernels, and no target builds any; add --target x86")
    for target in built:
        if request.tune is not None:
            target.check_tuning()
        target.section(TileTable())


def _beside(out: Path) -> Path:
    whole = Path(os.path.abspath(out))
    return whole.with_name(f"{whole.name}.tuning.json")
