"""`mc-opt targets`: where a model can run, with the options of each target."""

from __future__ import annotations

import click

from mc_opt.tools import _command, _console


@click.command(cls=_command.Command)
@click.argument("names", nargs=-1)
@_console.common_options
def command(names: tuple[str, ...], as_json: bool) -> None:
    """List the targets, or describe those named."""
    from mc_opt import targets
    from mc_opt.tools import _describe

    entries = [_describe.entry(name, targets.find_target(name)) for name in names or targets.target_names()]
    _describe.print_entries(
        entries,
        long=bool(names),
        as_json=as_json,
        columns=("target", "what it is"),
        row=lambda e: (e["name"], e["summary"]),
        hint="Options of one: mc-opt targets NAME. In a list: --target 'onnx,x86{option=value}'",
    )
