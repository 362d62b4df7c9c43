"""How a name finds its pass: files of this room, and entry points of other packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import MISSING, fields
from typing import Any

from mc_opt import ir
from mc_opt.passes._base import Pass, name_of

GROUP = "mc_opt.passes"
"""The entry-point group by which other packages add passes."""


def pass_names() -> tuple[str, ...]:
    """The names of all passes, sorted: files of this room and entry points of the group `mc_opt.passes`."""
    return tuple(sorted({*_files(), *_entry_points()}))


def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        OptionError: for an unknown name, or when another package's pass has the name of ours.
    """
    entry = _entry_points().get(name)
    if entry is not None:
        return _load(entry)
    if name not in _files():
        raise ir.OptionError(ir.unknown("pass", name, pass_names()))
    module = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Pass) and kind.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} defines {len(found)} passes, a file holds one"
    return found[0]


def _files() -> set[str]:
    package = importlib.import_module(str(__package__))
    return {m.name.replace("_", "-") for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    entries: dict[str, importlib.metadata.EntryPoint] = {}
    own = _files()
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in own:
            raise ir.OptionError(f"pass {entry.name!r} is both ours and {_origin(entry)}; remove that package")
        other = entries.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ir.OptionError(
                f"pass {entry.name!r} is both {_origin(other)} and {_origin(entry)}; remove one of the packages"
            )
    return entries


def _load(entry: importlib.metadata.EntryPoint) -> type[Pass]:
    try:
        kind = entry.load()
    except (ImportError, AttributeError) as error:
        raise ir.OptionError(f"pass {entry.name!r}: {_origin(entry)} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise ir.OptionError(f"pass {entry.name!r}: {_origin(entry)} is no subclass of mc_opt.passes.Pass")
    if name_of(kind) != entry.name:
        raise ir.OptionError(
            f"pass {entry.name!r}: {_origin(entry)} lives in a file of another name; call the entry {name_of(kind)!r}"
        )
    return kind


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.value} of {entry.dist.name if entry.dist else 'an unknown package'}"


def options_of(kind: type[Pass]) -> dict[str, str]:
    """The options of a pass class with their defaults as text; an option without a default has "..."."""
    texts = {f.name: "..." if f.default is MISSING else _default(f.default) for f in fields(kind)}
    shared = {key: texts.pop(key) for key in ("layers", "skip")}
    return texts | shared


def _default(value: Any) -> str:
    match value:
        case tuple():
            return ",".join(str(v) for v in value)
        case bool():
            return str(value).lower()
        case None:
            return ""
        case _:
            return str(value)
