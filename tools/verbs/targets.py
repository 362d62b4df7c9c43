"""`mc-opt targets`: where a model can run, with the options of each target."""

from __future__ import annotations

import click

from mc_opt.tools import _console


@click.command()
@click.argument("names", nargs=-1)
@_console.common_options
def command(names: tuple[str, ...], as_json: bool) -> None:
    """List the targets, or describe those named."""
    from mc_opt import targets
    from mc_opt.tools import _describe

    entries = [_describe.entry(name, targets.find_target(name)) for name in names or targets.target_names()]
    if as_json:
        _console.print_json(entries)
    elif names:
        for entry in entries:
            _describe.print_entry(entry)
    else:
        _console.print_table(("target", "what it is"), [(e["name"], e["summary"]) for e in entries])
        click.echo("\nOptions of one: mc-opt targets NAME. In a list: --target 'onnx,x86{option=value}'")
