"""`--tune quick` and `--tune-table`: where the table is, what is kept of it, and what the report says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import onnx
import onnx.parser
import onnx_ir
import pytest

from mc_opt import build, ir, passes, targets
from mc_opt.targets import Section, TileTable
from mc_opt.targets._tile_table import Entry, Measured
from mc_opt.tools import driver
from tests._harness import model
from tests.tools.conftest import Ran, proto

Run = Callable[..., Ran]

CONVOLUTIONS = """g (float[1,8,9,9] x) => (float[1,48,9,9] y) <float[48,8,3,3] w, float[48,1,3,3] d>
{ c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  y = Conv<group=48, pads=[1,1,1,1]>(r, d) }"""
FASTER = Entry("t2", (Measured("t1", 2.0, 1.0), Measured("t2", 1.0, 0.5), Measured("t3", failed="it crashed")))
SAME = Entry("t1", (Measured("t1", 2.0, 1.0), Measured("t2", 2.0, 1.0)))
SECTION = Section("1", "2", "fake", "toaster", (), 1, "float32", "Toaster 3000")
OTHER = dataclasses.replace(SECTION, cpu="kettle", shapes={"old": SAME})


@dataclasses.dataclass(frozen=True)
class Fake(targets.Target):
    """A target with two shapes, `a` and `b`; `harm` strikes after the first is measured."""

    name: ClassVar[str] = "fake"
    harm: ClassVar[Callable[[], None] | None] = None

    def check_tuning(self) -> None:
        return

    def section(self, table: TileTable) -> Section:
        return next((s for s in table.sections if s.is_for(SECTION)), SECTION)

    def tune(
        self,
        model: onnx_ir.Model,
        table: TileTable,
        *,
        keep: Callable[[TileTable], None],
        progress: targets.Progress,
    ) -> TileTable:
        for shape, entry in (("a", FASTER), ("b", SAME)):
            section = self.section(table)
            if shape in section.shapes:
                continue
            if self.harm is not None and section.shapes:
                type(self).harm()
            new = dataclasses.replace(section, shapes={**section.shapes, shape: entry})
            table = TileTable((*table.others(section), new))
            keep(table)
        return table

    def compile(
        self,
        model: onnx_ir.Model,
        folder: Path,
        progress: targets.Progress,
        *,
        tiles: Mapping[str, str] | None = None,
    ) -> targets.Built:
        taken = {"a": "t1", "b": "t1", "c": "t1"} | {k: v for k, v in (tiles or {}).items() if k in "abc"}
        (folder / "model.so").write_text(repr(sorted(taken.items())))
        digest = hashlib.sha256((folder / "model.so").read_bytes()).hexdigest()
        return targets.Built(folder, {"model.so": digest}, "fake{}", tiles=taken)


def request(tmp_path: Path, **fields: object) -> driver.Request:
    mlp = onnx_ir.from_proto(proto())
    ir.infer_shapes(mlp)
    base = driver.Request(model=mlp, targets=(Fake(),), out=tmp_path / "out")
    return dataclasses.replace(base, **fields)


def compiled(tmp_path: Path, **fields: object) -> passes.TuningReport | None:
    return driver.compile_model(request(tmp_path, **fields)).report.targets[0].tuning


def bytes_of(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name != "timings.json")
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}


def test_what_was_measured_is_in_the_folder_and_gives_the_same_bytes(tmp_path: Path):
    assert compiled(tmp_path / "plain") is None
    tuned = compiled(tmp_path, tune="quick")
    assert tuned == passes.TuningReport(
        processor="Toaster 3000",
        measured=2,
        tuned=(passes.TunedKernel("a", "t2", "t1", 0.5),),
        failed=1,
        by_rule=("c",),
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]  # nothing is left beside it
    again = compiled(tmp_path / "again", tune_table=tmp_path / "out" / "tune-table.json")
    assert again == tuned
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again" / "out")
    assert bytes_of(tmp_path / "out")["fake/model.so"] != bytes_of(tmp_path / "plain" / "out")["fake/model.so"]


def test_a_folder_is_built_again_with_its_own_table(tmp_path: Path):
    compiled(tmp_path, tune="quick")
    first = bytes_of(tmp_path / "out")
    compiled(tmp_path, tune_table=tmp_path / "out" / "tune-table.json")
    assert bytes_of(tmp_path / "out") == first


def test_without_the_option_a_table_in_the_folder_changes_nothing(tmp_path: Path):
    compiled(tmp_path, tune="quick")
    assert compiled(tmp_path) is None
    assert "tune-table.json" not in bytes_of(tmp_path / "out")


def test_entries_of_another_machine_stay_and_are_told(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(TileTable((OTHER,)).text())
    told = compiled(tmp_path, tune_table=path)
    unused = "fake{cpu=kettle threads=1}, mc-opt 1, TVM 2: 1 shapes"
    assert told == passes.TuningReport(processor="", measured=0, by_rule=("a", "b", "c"), unused=(unused,))
    told = compiled(tmp_path, tune="quick", tune_table=path)
    assert told is not None
    assert (told.measured, told.unused) == (2, (unused,))
    kept = TileTable.read(path)
    assert OTHER in kept.sections
    assert len(kept.sections) == 2
    assert (tmp_path / "out" / "tune-table.json").read_text() == path.read_text()


def test_a_tile_that_is_not_offered_any_more_is_not_counted(tmp_path: Path):
    gone = Entry("t9", (Measured("t1", 2.0, 1.0), Measured("t9", 1.0, 0.5)))
    path = tmp_path / "t.json"
    path.write_text(TileTable((dataclasses.replace(SECTION, shapes={"z": gone, "a": SAME}),)).text())
    told = compiled(tmp_path, tune_table=path)
    assert told is not None
    assert (told.measured, told.tuned, told.by_rule) == (1, (), ("b", "c"))


@pytest.mark.parametrize("named", [True, False])
def test_an_interruption_keeps_what_was_measured_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fake, "harm", interrupt)
    path = tmp_path / "t.json" if named else tmp_path / "out.tuning.json"
    options = {"tune": "quick", "tune_table": path if named else None}
    with pytest.raises(KeyboardInterrupt, match=f"the tiles measured so far are in {path}, and the same command goes"):
        compiled(tmp_path, **options)
    assert list(TileTable.read(path).sections[0].shapes) == ["a"]
    assert not (tmp_path / "out").exists()

    def fail() -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Fake, "harm", None)
    told = compiled(tmp_path, **options)
    assert told is not None
    assert told.measured == 2
    assert path.exists() == named
    monkeypatch.setattr(Fake, "harm", fail)
    compiled(tmp_path, **options)


def test_a_failure_before_anything_was_measured_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise targets.TargetError("no kernel")

    monkeypatch.setattr(Fake, "tune", fail)
    for path in (None, tmp_path / "t.json"):
        with pytest.raises(targets.TargetError):
            compiled(tmp_path, tune="quick", tune_table=path)
        assert list(tmp_path.iterdir()) == []


def test_a_dry_run_measures_nothing(tmp_path: Path):
    driver.compile_model(request(tmp_path, tune="quick", dry_run=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--tune", "quick"], 2, "--tune quick is for kernels, and no target builds any; add --target x86"),
        (["--tune-table", "t.json"], 2, "--tune-table is for kernels, and no target builds any; add --target x86"),
        (["--tune", "slow", "--target", "x86"], 2, "--tune 'slow': expected quick"),
        (["--tune", "quick", "--target", "arm"], 2, "arm{cpu=cortex-a72}: --tune measures on this machine, which is"),
        (["--tune", "quick", "--target", "cuda"], 2, "cuda: --tune measures kernels of x86 and arm; leave it out"),
        (["--tune-table", "t.json", "--target", "cuda"], 2, "cuda: a table of tiles is for kernels of x86 and arm"),
        (["--tune-table", "t.json", "--target", "x86"], 4, "t.json: cannot be read (No such file or directory)"),
    ],
)
def test_refusals_are_one_line(
    mc_opt: Run, mlp: Path, out: Path, options: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(mlp.parent)
    ran = mc_opt(mlp, "-o", out, *options)
    assert ran.code == code
    assert says in ran.error
    assert not out.exists()


def test_a_recipe_says_it_too(tmp_path: Path):
    recipe = passes.Recipe.parse('tune = "quick"\ntune_table = "t.json"\n')
    assert (recipe.tune, recipe.tune_table) == ("quick", "t.json")
    assert passes.Recipe.parse(str(recipe)) == recipe
    with pytest.raises(passes.RecipeError, match="line 1: tune is 3, expected a text"):
        passes.Recipe.parse("tune = 3\n")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.tvm
@pytest.mark.zig
def test_a_user_tunes_builds_again_and_compares(mc_opt: Run, out: Path, tmp_path: Path):
    ir.save_model(model(CONVOLUTIONS), path := tmp_path / "net.onnx")
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'targets = ["x86"]\ntune = "quick"\ntune_table = "{tmp_path / "t.json"}"\n')
    ran = mc_opt(path, "--recipe", recipe, "-o", out, "--json")
    assert ran.code == 0, ran.err
    (target,) = json.loads(ran.out)["report"]["targets"]
    assert (target["tuning"]["measured"], target["tuning"]["by_rule"]) == (2, [])
    assert "tune x86" in json.loads(ran.out)["timings"]["stages"]
    assert "tune-table.json" in [f["path"] for f in json.loads(ran.out)["report"]["outputs"]]
    ran = mc_opt(path, "--target", "x86", "--tune-table", tmp_path / "t.json", "-o", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert "tiles: 2 shapes measured on " in ran.out
    assert bytes_of(out) == bytes_of(tmp_path / "again")
    # A table that says something else makes other kernels, and the report tells of them.
    data = json.loads((tmp_path / "t.json").read_text())
    (section,) = data["machines"]
    for entry in section["shapes"].values():
        entry["chosen"] = next(c["tile"] for c in entry["candidates"] if c["tile"] != entry["chosen"])
    (tmp_path / "t.json").write_text(json.dumps(data))
    report = build(path, "x86", tmp_path / "other", tune_table=tmp_path / "t.json")
    told = report.targets[0].tuning
    assert told is not None
    by_rule = [e for e in section["shapes"].values() if e["chosen"] == e["candidates"][0]["tile"]]
    assert (told.measured, len(told.tuned)) == (2, 2 - len(by_rule))
    assert bytes_of(tmp_path / "other")["x86/model.so"] != bytes_of(out)["x86/model.so"]


@pytest.mark.slow
@pytest.mark.tvm
@pytest.mark.zig
def test_open_sizes_have_nothing_to_measure_and_that_is_said(mc_opt: Run, out: Path, tmp_path: Path):
    text = "g (float[N,3] x) => (float[N,2] y) <float[3,2] w = {1,2,3,4,5,6}> { y = MatMul(x, w) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}'), tmp_path / "open.onnx")
    ran = mc_opt(tmp_path / "open.onnx", "--target", "x86", "--tune", "quick", "-o", out)
    assert ran.code == 0, ran.err
    assert "tiles: no kernel offers any; those with an open size have the rule's (--shape fixes it)" in ran.out
