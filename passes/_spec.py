"""Which passes to run: the text `a,b{x=1}` and the TOML recipe."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from mc_opt import ir
from mc_opt.passes._base import Check, Overrides, Pass
from mc_opt.passes._find import find_pass, pass_names
from mc_opt.passes._training import Training

_TOP_LEVEL = ("check", "pass", "seed", "targets", "train", "tune", "tune_table")


class RecipeError(Exception):
    """A recipe file cannot be read or asks for something unknown; the text names the file and the line."""


@dataclass(frozen=True)
class Step:
    """One entry of a pipeline: a pass, and options that replace its own for layers that match a glob."""

    rewrite: Pass
    overrides: Overrides = ()

    def bound(self) -> Pass:
        """The pass as it runs: its `at(layer)` knows the overrides."""
        return self.rewrite.with_overrides(self.overrides)

    def text(self) -> str | None:
        """The short form `name{option=value}`; None when it cannot hold this step."""
        unfit = any(set(value) & set("{}") or len(value.split()) > 1 for value in self.rewrite.options().values())
        return None if self.overrides or unfit else str(self.rewrite)

    def toml(self) -> str:
        """The step as a `[[pass]]` table."""
        lines = ["[[pass]]", f"name = {json.dumps(self.rewrite.name)}"]
        typed = {f.name: getattr(self.rewrite, f.name) for f in fields(self.rewrite)}
        for key, text in self.rewrite.options().items():
            lines.append(f"{_toml_key(key)} = {_toml(typed.get(key, text))}")
        for glob, options in self.overrides:
            lines.append(f"[pass.layer.{json.dumps(glob, ensure_ascii=False)}]")
            lines += [f"{_toml_key(key)} = {_toml(value)}" for key, value in options.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Pipeline:
    """The passes of a run, in order."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the short form: entries separated by commas, options by spaces, as in `a,b{x=1 y=p,q}`.

        Raises:
            OptionError: for malformed text, an unknown pass or option, or a value that does not fit. Text that
                a shell has expanded or split ends with a hint to quote it.
        """
        try:
            return cls(tuple(Step(_make(spec)) for spec in ir.parse_specs(text)))
        except ir.OptionError as error:
            hint = quoting_hint([text])
            if hint is None or "quote" in str(error):
                raise
            raise ir.OptionError(f"{error}; {hint}") from error

    @classmethod
    def of(cls, *passes: Pass) -> Pipeline:
        """A pipeline of pass objects."""
        return cls(tuple(Step(p) for p in passes))

    @classmethod
    def from_toml(cls, path: Path | str) -> Pipeline:
        """The passes of a recipe file; `Recipe.read` gives its other settings too."""
        return Recipe.read(path).pipeline

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, in order."""
        return tuple(step.rewrite for step in self.steps)

    def __str__(self) -> str:
        """The short form, or a TOML recipe where the short form cannot hold it; both can be read back."""
        texts = [step.text() for step in self.steps]
        if any(text is None for text in texts):
            return "\n".join(step.toml() for step in self.steps)
        return ",".join(text for text in texts if text is not None)


@dataclass(frozen=True)
class Recipe:
    """A recipe file: passes, and settings that the command line may override (None: not given).

    Example:
        seed = 1                          # optional, as are check, targets, tune and tune_table
        check = "full"                    # or "structure"
        targets = ["onnx", "x86{cpu=x86-64-v3}"]
        tune = "quick"                    # measure the tiles of kernels
        tune_table = "tiles.json"         # and keep them here; alone: take them from here

        [train]                           # optional: how trainable passes are trained, the options of `Training`
        data = "train.npz"
        epochs = 5

        [[pass]]                          # passes run in the order of the file
        name = "denseshift"
        bits = 4
        skip = ["first", "last"]

        [pass.layer."encoder.*"]          # belongs to the [[pass]] above it; of two that match, the later wins
        bits = 3
    """

    pipeline: Pipeline = field(default_factory=Pipeline)
    seed: int | None = None
    check: Check | None = None
    targets: tuple[str, ...] | None = None
    training: Training | None = None
    tune: str | None = None
    tune_table: str | None = None

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: when the file cannot be read, is no TOML, or asks for something unknown.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise RecipeError(f"{path}: the recipe cannot be read: {reason}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, origin: str = "recipe") -> Recipe:
        """Read the text of a recipe; `origin` names it in errors."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{origin}: not valid TOML: {error}") from error
        where = _Where(origin, text)
        for key in tables:
            if key not in _TOP_LEVEL:
                raise where.error(ir.unknown("key", key, _TOP_LEVEL), key)
        entries = tables.get("pass", [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise where.error("'pass' is not a list of tables; write each pass as a table [[pass]]", "pass")
        steps = tuple(_step(entry, where, index) for index, entry in enumerate(entries))
        return cls(
            Pipeline(steps),
            _seed(tables, where),
            _check(tables, where),
            _targets(tables, where),
            _training(tables, where),
            _text(tables, "tune", where),
            _text(tables, "tune_table", where),
        )

    def __str__(self) -> str:
        """The text of a recipe file, which `parse` reads back."""
        given = {
            "seed": self.seed,
            "check": self.check,
            "targets": self.targets,
            "tune": self.tune,
            "tune_table": self.tune_table,
        }
        parts = ["".join(f"{key} = {_toml(value)}\n" for key, value in given.items() if value is not None)]
        if self.training is not None:
            default = Training()
            typed = {f.name: getattr(self.training, f.name) for f in fields(Training)}
            rows = [f"{k} = {_toml(v)}\n" for k, v in typed.items() if v != getattr(default, k)]
            parts.append("".join(("[train]\n", *rows)))
        parts += [step.toml() for step in self.pipeline.steps]
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class _Where:
    """Finds the line of a key, because tomllib tells lines for syntax errors only."""

    origin: str
    text: str

    def error(self, problem: str, key: str, index: int | None = None, *, table: str = "[[pass]]") -> RecipeError:
        line = self._line(key, index, table)
        return RecipeError(f"{self.origin}{f', line {line}' if line else ''}: {problem}")

    def _line(self, key: str, index: int | None, table: str) -> int | None:
        """The line of a key; with an index, of the first in the table of that number with this header."""
        lines = self.text.splitlines()
        start = 0
        if index is not None:
            headers = [i for i, line in enumerate(lines) if "".join(line.split()).startswith(table)]
            start = headers[index] if index < len(headers) else 0
        word = re.compile(rf"""\s*(\[\[?[^\]]*)?["']?{re.escape(key)}["']?\s*[=\].]""")
        found = next((i for i in range(start, len(lines)) if word.match(lines[i])), None)
        return found + 1 if found is not None else start + 1 if index is not None else None


def _seed(tables: Mapping[str, Any], where: _Where) -> int | None:
    seed = tables.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise where.error(f"seed is {seed!r}, expected a whole number from 0 on", "seed")
    return seed


def _check(tables: Mapping[str, Any], where: _Where) -> Check | None:
    check = tables.get("check")
    if check is None:
        return None
    level = next((c for c in get_args(Check) if c == check), None)
    if level is None:
        raise where.error(f"check is {check!r}, expected one of {', '.join(get_args(Check))}", "check")
    chosen: Check = level
    return chosen


def _targets(tables: Mapping[str, Any], where: _Where) -> tuple[str, ...] | None:
    targets = tables.get("targets")
    if targets is None:
        return None
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise where.error(f'targets is {targets!r}, expected a list of texts, as in ["onnx", "x86"]', "targets")
    return tuple(targets)


def _text(tables: Mapping[str, Any], key: str, where: _Where) -> str | None:
    text = tables.get(key)
    if text is not None and not (isinstance(text, str) and text):
        raise where.error(f"{key} is {text!r}, expected a text", key)
    return text


def _training(tables: Mapping[str, Any], where: _Where) -> Training | None:
    table = tables.get("train")
    if table is None:
        return None
    if not isinstance(table, dict):
        raise where.error("'train' is no table; write it as [train]", "train")
    texts = _texts(table, "train", where, 0, table="[train]")
    try:
        return Training().with_options(texts)
    except ir.OptionError as error:
        raise where.error(str(error), _culprit(str(error), list(texts), "train"), 0, table="[train]") from error


def _step(entry: Mapping[str, Any], where: _Where, index: int) -> Step:
    name = entry.get("name")
    if not isinstance(name, str):
        raise where.error(f'pass {index + 1} has no name; add name = "..." to the table', "[[pass]]", index)
    layers = entry.get("layer", {})
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise where.error(f'{name}: write layer options as a table [pass.layer."glob"]', "layer", index)
    own = _texts({k: v for k, v in entry.items() if k not in ("name", "layer")}, name, where, index)
    try:
        rewrite = _make(ir.Spec(name, own))
    except ir.OptionError as error:
        raise where.error(str(error), _culprit(str(error), list(own)), index) from error
    overrides = []
    for glob, options in layers.items():
        texts = _texts(options, name, where, index)
        for key in ("layers", "skip"):
            if key in texts:
                raise where.error(f"{name}: {key} chooses layers and cannot differ by layer", glob, index)
        try:
            special = _make(ir.Spec(name, own | texts))
        except ir.OptionError as error:
            raise where.error(f"layer {glob!r}: {error}", glob, index) from error
        overrides.append((glob, {key: getattr(special, key) for key in texts}))
    return Step(rewrite, tuple(overrides))


def _culprit(message: str, keys: Sequence[str], default: str = "name") -> str:
    """The key that a message is about: the one it names first."""
    places = {key: re.search(rf"(?<!\w){re.escape(key)}(?!\w)", message) for key in keys}
    named = [(place.start(), key) for key, place in places.items() if place]
    return min(named, default=(0, default))[1]


def _texts(
    options: Mapping[str, Any], name: str, where: _Where, index: int, *, table: str = "[[pass]]"
) -> dict[str, str]:
    """TOML values as the text that an option takes, so that both forms are checked by the same code."""
    texts = {}
    for key, value in options.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items):
            raise where.error(
                f"{name}: {key} is {value!r}, expected a text, a number, true, false or a list",
                key,
                index,
                table=table,
            )
        if isinstance(value, list) and any("," in item for item in items if isinstance(item, str)):
            raise where.error(f"{name}: {key}: an entry of a list cannot hold a comma", key, index, table=table)
        texts[key] = ",".join(str(item).lower() if isinstance(item, bool) else str(item) for item in items)
    return texts


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml(value: Any) -> str:
    match value:
        case None:
            return '""'
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case int() | float():
            return repr(value)
        case _:
            return json.dumps(str(value), ensure_ascii=False)


def _make(spec: ir.Spec) -> Pass:
    return find_pass(spec.name).from_options(spec.options)


def quoting_hint(words: Sequence[str]) -> str | None:
    """A hint to quote when a list of passes or targets reached us expanded or split by the shell; else None.

    Unquoted, `a{x=1 y=2}` arrives as `a{x=1` and `y=2}`, and `a{skip=p,q}` as `askip=p` and `aq`. `words`: the
    text, and the unexpected arguments beside it.
    """
    halves = any(word.count("{") != word.count("}") for word in words)
    merged = any("=" in re.sub(r"\{[^}]*\}", "", word) for word in words)
    entries = [entry for word in words for entry in re.sub(r"\{[^}]*\}", "", word).split(",")]
    names = pass_names()
    longer = any(entry.startswith(name) and entry not in names for entry in entries for name in names)
    if not (halves or merged or longer):
        return None
    return "if the shell took the braces apart, quote the list, as in --passes 'denseshift{bits=4 skip=first,last}'"
