"""manifest.json: what an artefact is, what it asks of a machine, and the digests of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mc_opt.ir import IRError

SCHEMA_VERSION = 3
NAME = "manifest.json"
_OPTIONAL = ("limits", "states", "prompt")
# What the compiled main is given once, of artefacts for processors.
CONSTANTS = "constants.bin"
_DTYPES = {
    "bool",
    "float16",
    "float32",
    "float64",
    *(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)),
}


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output: its name, shape and numpy type; an open dimension stands there by its name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that a loader must know before it loads native code."""

    schema_version: int
    mc_opt: str
    tvm: str
    target: str
    kind: str
    form: str
    cpu: str
    features: tuple[str, ...]
    threads: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kernels: tuple[str, ...]
    fallbacks: tuple[str, ...]
    files: dict[str, str]
    # The largest sizes of open dimensions, where the model has any.
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    # Outputs that a caller feeds back, to the inputs that take them; those are written in place and are the outputs.
    states: dict[str, str] = dataclasses.field(default_factory=dict)
    # Tokens that the function `prompt` of a language model takes at once; 0 where there is none.
    prompt: int = 0

    def text(self) -> str:
        """The file's text."""
        data = dataclasses.asdict(self)
        for name in _OPTIONAL:
            if not data[name]:
                del data[name]
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def names_of(shapes: Sequence[Sequence[int | str]]) -> tuple[str, ...]:
    """The open dimensions of some shapes, in order of their first appearance."""
    return tuple(dict.fromkeys(d for shape in shapes for d in shape if isinstance(d, str)))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> Manifest:
    """The manifest of an artefact's folder.

    Raises:
        IRError: there is none, it cannot be read, or another version of mc-opt wrote it.
    """
    path = folder / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
    except FileNotFoundError:
        raise IRError(f"{folder}: no {NAME}; expected a folder that mc-opt built for a target") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IRError(f"{path}: cannot be read as a manifest ({error}); build the artefact again") from None
    if version != SCHEMA_VERSION:
        raise IRError(f"{path}: has schema version {version}, this mc-opt reads {SCHEMA_VERSION}; build it again")
    try:
        return _parse(data)
    except (KeyError, TypeError, ValueError) as error:
        raise IRError(f"{path}: an entry is missing or wrong ({error}); build the artefact again") from None


def _parse(data: dict[str, Any]) -> Manifest:
    def ports(key: str) -> tuple[Port, ...]:
        return tuple(Port(p["name"], tuple(p["shape"]), p["dtype"]) for p in data[key])

    fields = {f.name: data[f.name] for f in dataclasses.fields(Manifest) if f.name in data or f.name not in _OPTIONAL}
    for key in ("features", "kernels", "fallbacks"):
        fields[key] = tuple(fields[key])
    manifest = Manifest(**{**fields, "inputs": ports("inputs"), "outputs": ports("outputs")})
    for entry, is_right in _entries(manifest):
        if not is_right:
            raise ValueError(f"{entry}: {getattr(manifest, entry)!r}")
    return manifest


def _entries(manifest: Manifest) -> Iterator[tuple[str, bool]]:
    """Whether each entry has its type: a file that somebody edited ends in one line, not in the midst of a run."""
    for name in ("mc_opt", "tvm", "target", "kind", "form", "cpu"):
        yield name, isinstance(getattr(manifest, name), str)
    for name in ("features", "kernels", "fallbacks"):
        yield name, all(isinstance(text, str) for text in getattr(manifest, name))
    for name in ("files", "states"):
        table = getattr(manifest, name)
        yield name, isinstance(table, dict) and all(isinstance(text, str) for text in table.values())
    yield "limits", isinstance(manifest.limits, dict) and all(_is_whole(n, 1) for n in manifest.limits.values())
    yield "threads", _is_whole(manifest.threads, 1)
    yield "prompt", _is_whole(manifest.prompt, 0)
    for name in ("inputs", "outputs"):
        yield name, all(_is_port(port) for port in getattr(manifest, name))


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_port(port: Port) -> bool:
    has_shape = all(isinstance(d, str) or _is_whole(d, 0) for d in port.shape)
    return isinstance(port.name, str) and has_shape and port.dtype in _DTYPES
