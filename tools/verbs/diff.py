"""`mc-opt diff`: what changed from one model to another, layer by layer, and which pass and rule changed it."""

from __future__ import annotations

from pathlib import Path

import click

from mc_opt.tools import _command, _console, _failure, _texts


@click.command(
    cls=_command.Command,
    epilog=f"Exit codes: 0 done, {_failure.CHECK} they differ and --exit-code was given; others as for mc-opt itself.",
)
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Real inputs: tells how far apart each value is.")
@click.option(
    "--state", "states", multiple=True, metavar="OUT=IN", help="Carry output OUT into input IN of the next sample."
)
@click.option("--all", "whole", is_flag=True, help="Every node and weight on a line of its own; unchanged layers too.")
@click.option("--renames", is_flag=True, help="List nodes and values that have another name, which is no change.")
@click.option(
    "--exit-code", is_flag=True, help=f"Exit with {_failure.CHECK} when something changed, with 0 when nothing did."
)
@_console.common_options
def command(
    first: Path,
    second: Path,
    data: Path | None,
    states: tuple[str, ...],
    whole: bool,
    renames: bool,
    exit_code: bool,
    as_json: bool,
) -> int:
    """Show what changed from A to B: ONNX files, or output folders."""
    carried = _texts.pairs(states, "--state")
    import mc_opt
    from mc_opt.tools import _diff_text

    found = mc_opt.diff(first, second, data=data, states=carried)
    if as_json:
        _console.print_json(found.to_json())
    else:
        _diff_text.print_diff(found, str(first), str(second), whole=whole, renames=renames)
    return _failure.CHECK if exit_code and not found.equal else _failure.OK
