"""Options as text: a frozen dataclass to and from `name{field=value other=a,b}`, as mlir-opt writes it."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from mc_opt.ir.errors import OptionError

T = TypeVar("T")

_LISTED = 30  # names of passes, options and targets are fewer; layers and inputs may be thousands


@dataclasses.dataclass(frozen=True)
class Spec:
    """One entry of a list of passes or targets: a name and its options, still as text."""

    name: str
    options: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}{{{' '.join(f'{k}={v}' for k, v in self.options.items())}}}"


def parse_specs(text: str) -> list[Spec]:
    """Read `a,b{x=1 y=p,q},c`: commas separate entries, spaces separate options.

    Raises:
        OptionError: for an unbalanced brace, an option without `=`, an option given twice, or an
            empty entry.
    """
    return [_parse_spec(part, text) for part in _split(text)]


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for i, char in enumerate(text):
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:i]
            start = i + 1
        if depth not in (0, 1):
            raise OptionError(f"{text!r}: unbalanced brace at column {i + 1}; write name{{option=value}}")
    if depth:
        raise OptionError(f"{text!r}: a brace is not closed; quote the whole text, as in 'name{{option=value}}'")
    if text.strip():
        yield text[start:]


def _parse_spec(part: str, text: str) -> Spec:
    part = part.strip()
    name, brace, rest = part.partition("{")
    name = name.strip()
    if not name:
        raise OptionError(f"{text!r}: an entry is empty; separate entries by single commas")
    if not brace:
        return Spec(name)
    if not rest.endswith("}"):
        after = rest.rpartition("}")[2]
        raise OptionError(f"{part!r}: {after!r} follows the closing brace; separate entries by commas")
    options: dict[str, str] = {}
    for word in rest[:-1].split():
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise OptionError(
                f"{part!r}: {word!r} is not option=value; options are separated by spaces, and a value holds none"
            )
        if key in options:
            raise OptionError(f"{part!r}: option {key!r} is given twice")
        options[key] = value
    return Spec(name, options)


def fields_of(cls: type) -> dict[str, type]:
    """The options of a dataclass: field name to type."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def make(cls: type[T], spec: Spec) -> T:
    """An instance of the dataclass `cls` from the text options of `spec`.

    Raises:
        OptionError: for an unknown option (the known ones are listed, the nearest is suggested) or a
            value that its field's type cannot hold.
    """
    known = fields_of(cls)
    values = {}
    for key, text in spec.options.items():
        if key not in known:
            raise OptionError(f"{spec.name}: {unknown('option', key, known)}")
        values[key] = _value(spec.name, key, known[key], text)
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass checks its own ranges in __post_init__
        raise OptionError(f"{spec.name}: {error}") from error
    except TypeError as error:
        raise OptionError(f"{spec.name}: {_missing(cls, values) or error}") from error


def _missing(cls: type, values: dict[str, Any]) -> str | None:
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    return f"needs {', '.join(f'{name}=' for name in required)}" if required else None


def _value(owner: str, key: str, kind: Any, text: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if not text:
            return None
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_value(owner, key, item, part) for part in text.split(",") if part)
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(c): c for c in typing.get_args(kind)}
        if text not in choices:
            raise OptionError(f"{owner}: {key}={text!r}: choose one of {', '.join(choices)}")
        return choices[text]
    if typing.get_origin(kind) is dict:
        raise OptionError(f"{owner}: {key} cannot be given as text")
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise OptionError(f"{owner}: {key}={text!r}: write true or false")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        raise OptionError(f"{owner}: {key}={text!r} is not {_article(kind)}") from error


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")


def to_spec(name: str, instance: Any) -> Spec:
    """The text form of a dataclass instance: the fields that differ from their defaults, in order."""
    options = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            options[field.name] = _text(value)
    return Spec(name, options)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_text(v) for v in value)
    return str(value)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: what is known, and the nearest."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names[:_LISTED])}{more})"
