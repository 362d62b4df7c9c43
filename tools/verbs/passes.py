"""`mc-opt passes`: the passes, their options and what they do, from their own fields and docstrings."""

from __future__ import annotations

import click

from mc_opt.tools import _command, _console


@click.command(cls=_command.Command)
@click.argument("names", nargs=-1)
@_console.common_options
def command(names: tuple[str, ...], as_json: bool) -> None:
    """List the passes, or describe those named."""
    from mc_opt import passes
    from mc_opt.tools import _describe

    entries = [_describe.entry(name, passes.find_pass(name)) for name in names or passes.pass_names()]
    if not (names or as_json):
        entries.sort(key=lambda e: (e["family"], e["name"]))
    _describe.print_entries(
        entries,
        long=bool(names),
        as_json=as_json,
        columns=("pass", "family", "exact", "trained", "what it does"),
        row=lambda e: (
            e["name"],
            e["family"],
            *("yes" if e[key] else "no" for key in ("exact", "trained")),
            e["summary"],
        ),
        hint="What is trained is so where --train PATH gives samples.\n"
        "Options of one: mc-opt passes NAME. In a list: --passes 'a,b{option=value other=value}'",
    )
