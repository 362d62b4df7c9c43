"""How a name finds its pass: our files, and entry points of other packages."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from dataclasses import dataclass

import pytest

from mc_opt import ir, passes
from mc_opt.passes import Pass, _find


def _offer(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str]) -> None:
    listed = [importlib.metadata.EntryPoint(name, value, _find.GROUP) for name, value in entries]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: listed)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, kind: object) -> None:
    module = types.ModuleType(name)
    module.Foreign = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


def test_a_foreign_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclass(frozen=True)(type("Foreign", (Pass,), {"__module__": "other.my_pass"}))
    _module(monkeypatch, "other", object())
    _module(monkeypatch, "other.my_pass", kind)
    _offer(monkeypatch, ("my-pass", "other.my_pass:Foreign"))
    assert passes.find_pass("my-pass") is kind
    assert "my-pass" in passes.pass_names()
    assert passes.find_pass("my-pass")().name == "my-pass"


def test_a_clash_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, ("x", "one.x:X"), ("x", "two.x:X"))
    with pytest.raises(ir.OptionError, match=r"'x' is both one\.x:X .* and two\.x:X"):
        passes.find_pass("x")


def test_our_names_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    own = passes.pass_names()[0]
    _offer(monkeypatch, (own, "other.x:X"))
    with pytest.raises(ir.OptionError, match=r"both ours and other\.x:X"):
        passes.find_pass(own)


def test_what_is_no_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, "other", int)
    _offer(monkeypatch, ("x", "other:Foreign"), ("y", "not_there:Y"))
    with pytest.raises(ir.OptionError, match="no subclass"):
        passes.find_pass("x")
    with pytest.raises(ir.OptionError, match="cannot be imported"):
        passes.find_pass("y")


def test_every_file_of_the_room_is_a_pass() -> None:
    for name in passes.pass_names():
        assert passes.name_of(passes.find_pass(name)) == name


def test_options_are_listed_with_their_defaults_own_ones_first() -> None:
    from tests.passes.toy import Toy

    assert passes.options_of(Toy) == {
        "bits": "4",
        "ratio": "0.5",
        "mode": "fast",
        "deep": "false",
        "script": "",
        "limit": "",
        "layers": "*",
        "skip": "",
    }
