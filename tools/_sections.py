"""Help in sections: options that stand under a heading of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

_COMMON = "Options"


class Option(click.Option):
    """An option that help lists under a heading."""

    def __init__(self, *args: Any, heading: str = _COMMON, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """A command whose help lists its options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then those with headings."""
        write(self.get_params(ctx), ctx, formatter)


def write(params: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Every option once, the common ones first, then heading by heading."""
    sections: dict[str, dict[str, str]] = {_COMMON: {}}
    for param in params:
        if isinstance(param, click.Option) and (row := param.get_help_record(ctx)):
            sections.setdefault(getattr(param, "heading", _COMMON), {})[row[0]] = row[1]
    for heading, rows in sections.items():
        with formatter.section(heading):
            formatter.write_dl(list(rows.items()))
