"""Tables of measured tiles: written for people, read back to the same text, and never used for another machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mc_opt import ir
from mc_opt.targets import TileTable, _machine
from mc_opt.targets._tile_table import Entry, Measured, Section

V3, V4 = _machine.named("x86-64-v3"), _machine.named("x86-64-v4")
ENTRY = Entry(
    "1x14x32",
    (Measured("2x7x32", 12.35, 1.0), Measured("1x14x32", 11.0, 0.9), Measured("9x9x9", failed='says "no"')),
)
BY_RULE = Entry("1x1x16", (Measured("1x1x16", 3.0, 1.0),))

TEXT = """{"schema_version": 1, "machines": [
{"mc_opt": "1", "tvm": "2", "target": "x86", "cpu": "toaster", "features": "avx,fma", "threads": 1,\
 "activations": "float32", "processor": "Toaster 3000",
 "shapes": {
  "conv a": {"chosen": "1x14x32", "candidates": [
   {"tile": "2x7x32", "microseconds": 12.35, "ratio": 1.0},
   {"tile": "1x14x32", "microseconds": 11.0, "ratio": 0.9},
   {"tile": "9x9x9", "failed": "says \\"no\\""}]},
  "conv b": {"chosen": "1x1x16", "candidates": [
   {"tile": "1x1x16", "microseconds": 3.0, "ratio": 1.0}]}}}]}
"""


def test_the_text_of_a_table(tmp_path: Path):
    shapes = {"conv b": BY_RULE, "conv a": ENTRY}
    section = Section("1", "2", "x86", "toaster", ("avx", "fma"), 1, "float32", "Toaster 3000", shapes)
    assert TileTable((section,)).text() == TEXT
    path = tmp_path / "t.json"
    path.write_text(TEXT)
    assert TileTable.read(path).text() == TEXT


def test_the_order_of_measuring_leaves_no_trace():
    there = TileTable().with_entry(V3, "b", BY_RULE).with_entry(V4, "a", ENTRY).with_entry(V3, "a", ENTRY)
    back = TileTable().with_entry(V4, "a", ENTRY).with_entry(V3, "a", ENTRY).with_entry(V3, "b", BY_RULE)
    assert there.text() == back.text()
    assert json.loads(there.text())["machines"][0]["processor"] == _machine.processor()


def test_a_table_in_memory_is_the_one_in_its_file(tmp_path: Path):
    entry = Entry("a", (Measured("a", 12.345678, 1 / 3), Measured("b", failed="so")))
    table = TileTable().with_entry(V3, "a", entry)
    (tmp_path / "t.json").write_text(table.text())
    assert TileTable.read(tmp_path / "t.json") == table
    assert table.sections[0].shapes["a"].candidates[0] == Measured("a", 12.35, 0.3333)


def test_entries_count_for_their_machine_and_version_alone(monkeypatch: pytest.MonkeyPatch):
    table = TileTable().with_entry(V3, "a", ENTRY)
    assert table.section(V3).tiles() == {"a": "1x14x32"}
    on_two = dataclasses.replace(V3, threads=2)
    int8 = dataclasses.replace(V3, activations="int8")
    for machine in (V4, on_two, int8):
        assert table.section(machine).tiles() == {}
        assert table.others(table.section(machine)) == (table.section(V3),)
    assert table.others(table.section(V3)) == ()
    monkeypatch.setattr("mc_opt.__version__", "99")
    assert table.section(V3).tiles() == {}
    assert table.others(table.section(V3)) == table.sections


def test_a_machine_elsewhere_of_the_same_kind_uses_it(monkeypatch: pytest.MonkeyPatch):
    table = TileTable().with_entry(V3, "a", ENTRY)
    monkeypatch.setattr(_machine, "processor", lambda: "another")
    assert table.section(V3).tiles() == {"a": "1x14x32"}


def test_what_a_section_is_called():
    assert str(Section("1", "2", "x86", "toaster", (), 2, "int8")) == (
        "x86{cpu=toaster threads=2 activations=int8}, mc-opt 1, TVM 2"
    )


def test_what_an_entry_tells():
    assert (ENTRY.rule, ENTRY.ratio, ENTRY.failed) == ("2x7x32", 0.9, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no table of tiles"),
        ("[]", "is no table of tiles"),
        ('{"schema_version": 7}', "has schema version 7, this mc-opt reads 1"),
        ('{"schema_version": 1}', "machines"),
        (TEXT.replace('"chosen": "1x14x32"', '"chosen": "5x5x5"'), "'5x5x5' is chosen and is none of its candidates"),
        (TEXT.replace("12.35", '"fast"'), "a time is 'fast'"),
        (TEXT.replace('"threads": 1', '"threads": "x"'), "threads is 'x'"),
        (TEXT.replace('"cpu": "toaster", ', ""), "cpu"),
        (TEXT.replace('"shapes": {', '"shapes": {"x": 3, '), "is no table of tiles"),
        (TEXT.replace('"microseconds": 3.0', '"minutes": 3.0'), "minutes"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, text: str, says: str):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ir.IRError, match=says) as caught:
        TileTable.read(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ir.IRError, match="No such file"):
        TileTable.read(tmp_path / "none.json")
    with pytest.raises(ir.IRError, match="Is a directory"):
        TileTable.read(tmp_path)
