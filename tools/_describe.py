"""Help of a pass or target, read from its class: the docstring, and the fields as options."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import click

from mc_opt import ir, passes
from mc_opt.tools import _console


def entry(name: str, kind: type) -> dict[str, Any]:
    """What is known of a pass or target: name, texts, and one row an option."""
    text = inspect.cleandoc(kind.__doc__ or "")
    module = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    return {
        "name": name,
        "summary": " ".join(text.partition("\n\n")[0].split()),
        "help": text,
        "method": module,
        "family": getattr(kind, "family", ""),
        "exact": getattr(kind, "exact", None),
        "trained": issubclass(kind, passes.TrainablePass),
        "options": [_option(kind, field) for field in _fields(kind)],
    }


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    """A class's own options first, then those that every one has."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    own = [known[name] for name in vars(kind).get("__annotations__", {}) if name in known]
    return own + [f for f in known.values() if f not in own]


def _option(kind: type, field: dataclasses.Field[Any]) -> dict[str, Any]:
    default: Any = None
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return {
        "name": field.name,
        "type": _type_text(ir.fields_of(kind)[field.name]),
        "default": default,
        "required": required,
    }


def _type_text(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{_type_text(typing.get_args(kind)[0])},..."
    names = {int: "whole number", float: "number", bool: "true|false", str: "text"}
    if kind in names:
        return names[kind]
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    return _type_text(arguments[0]) if arguments else getattr(kind, "__name__", str(kind))


def print_entries(
    entries: Sequence[dict[str, Any]],
    *,
    long: bool,
    as_json: bool,
    columns: Sequence[str],
    row: Callable[[dict[str, Any]], Sequence[str]],
    hint: str,
) -> None:
    """What a verb prints of passes or targets: the long form of each, or a table and a hint; JSON holds all."""
    if as_json:
        _console.print_json(list(entries))
    elif long:
        for entry in entries:
            print_entry(entry)
    else:
        _console.print_table(columns, [row(entry) for entry in entries])
        click.echo(f"\n{hint}")


def print_entry(entry: dict[str, Any]) -> None:
    """The long form of one entry, on stdout."""
    click.echo(f"{entry['name']}\n{'-' * len(entry['name'])}")
    click.echo(entry["help"])
    if entry["trained"]:
        click.echo("\nTrained where the run has --train.")
    if entry["method"]:
        click.echo(f"\n{entry['method']}")
    rows = [(o["name"], o["type"], "(needed)" if o["required"] else _default(o["default"])) for o in entry["options"]]
    _console.print_table(("option", "value", "default"), rows, title="Options")
    click.echo()


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value) or "(none)"
    return "(none)" if value in (None, "") else str(value)
