"""The class of every verb's command: help in sections, and an option that has one value is given once."""

from __future__ import annotations

from collections import Counter
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse a second value for an option that has one: click takes the last and says nothing.

        Raises:
            UsageError: naming the option.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, times in Counter(order).items():
            if times > 1 and isinstance(param, click.Option) and not (param.multiple or param.is_flag or param.count):
                advice = ", as a list with commas" if param.metavar == "LIST" else ""
                raise click.UsageError(f"{param.opts[-1]} is given {times} times; give it once{advice}")
        return super().parse_args(ctx, args)


def write(params: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Every option once, the common ones first, then heading by heading."""
    sections: dict[str, dict[str, str]] = {_COMMON: {}}
    for param in params:
        if isinstance(param, click.Option) and (row := param.get_help_record(ctx)):
            sections.setdefault(getattr(param, "heading", _COMMON), {})[row[0]] = row[1]
    for heading, rows in sections.items():
        with formatter.section(heading):
            formatter.write_dl(list(rows.items()))
