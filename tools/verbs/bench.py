"""`mc-opt bench`: how long models and artefacts take beside each other, with the spread of the measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_opt.tools import _command, _console, _texts

if TYPE_CHECKING:
    import numpy as np

    from mc_opt.tools._contenders import Contender

_SAMPLES = 8


@click.command(cls=_command.Command)
@click.argument("paths", metavar="MODEL|DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help=f"Real inputs; the first {_SAMPLES} samples are used.")
@click.option("--state", "states", multiple=True, metavar="OUT=IN", help="Recurrent state: IN starts at zero.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of random inputs, when there is no --data.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of ONNX Runtime, and of artefacts built for several; those built for one have one.",
)
@click.option(
    "--runs", type=click.IntRange(min=5), default=40, show_default=True, help="Rounds, each through all twice."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=60, show_default=True, help="Begin no round after so long."
)
@_console.common_options
def command(
    paths: tuple[Path, ...],
    data: Path | None,
    states: tuple[str, ...],
    seed: int,
    threads: int,
    runs: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Time models in ONNX Runtime and the artefacts of output folders, beside the first that is named.

    Everything runs in turn, A B C C B A a round, in batches of 20 ms and more. A ratio is the median over the rounds
    with the interval that holds it in 95 % of resamples; running an artefact executes native code.
    """
    from mc_opt import ir
    from mc_opt.tools import _contenders, _timing
    from mc_opt.tools.driver import MODEL

    paths = tuple(dict.fromkeys(paths))
    carried = _texts.pairs(states, "--state")
    models = [ir.load_model(path / MODEL if path.is_dir() else path, check="structure") for path in paths]
    ir.check_states(models[0], carried)
    samples = _contenders.samples_for(models, data, states=carried, seed=seed, count=_SAMPLES)
    with _console.Progress() as progress:
        progress(0, 0, "load")
        found, notes = _contenders.contenders(paths, threads=threads)
        drifts = _drifts(found, samples)
        runnable = {contender.name: contender.fed(samples) for contender in found}
        series = _timing.interleave(runnable, rounds=runs, seconds=seconds, progress=progress)
    reference = series[found[0].name]
    rows: list[dict[str, Any]] = []
    for contender in found:
        own = series[contender.name]
        low, high = own.quartiles
        beside = _timing.ratio(own, reference)
        rows.append(
            {
                "name": contender.name,
                "ms": own.median,
                "quartiles": [low, high],
                "rounds": len(own.milliseconds),
                "calls": 2 * own.calls * len(own.milliseconds),
                "ratio": beside.value,
                "interval": [beside.low, beside.high],
                "verdict": "the reference" if own is reference else beside.verdict,
                "difference": drifts[contender.name],
            }
        )
    if as_json:
        _console.print_json({"schema_version": 1, "threads": threads, "rows": rows, "notes": notes})
        return
    _print(rows, notes)


def _drifts(found: list[Contender], samples: list[dict[str, np.ndarray]]) -> dict[str, float | None]:
    """The largest difference over range from the first contender, so that no speed is told of another function."""
    from mc_opt import ir

    wanted = [found[0].run(found[0].takes(sample)) for sample in samples]
    drifts: dict[str, float | None] = {}
    for contender in found:
        meter = ir.DriftMeter()
        for sample, expected in zip(samples, wanted, strict=True):
            meter.add(expected, contender.run(contender.takes(sample)))
        drifts[contender.name] = meter.result().relative
    return drifts


def _print(rows: list[dict[str, Any]], notes: list[str]) -> None:
    table = [
        (
            row["name"],
            f"{row['ms']:.3f}",
            f"[{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}]",
            f"{row['ratio']:.3f}",
            f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]",
            row["verdict"],
            None if row["difference"] is None else f"{row['difference']:.1e}",
        )
        for row in rows
    ]
    columns = ("what", "ms", "quartiles", "ratio", "95 %", "", "max/range")
    _console.print_table(columns, table)
    click.echo(f"\n{rows[0]['rounds']} rounds; max/range is the largest difference of an output from the first's")
    for note in notes:
        click.echo(note, err=True)
