"""Measuring tiles: each entry is kept at once, a candidate that fails or ends its process is left out."""

from __future__ import annotations

import dataclasses
import platform

import numpy as np
import pytest

from mc_opt import ir, targets
from mc_opt.targets import TileTable, _machine, _process, _tune
from mc_opt.targets._tile_table import Entry, Measured
from tests._harness import model
from tests.targets.test_process import SEND

CONV = """g (float[1,8,9,9] x) => (float[1,48,9,9] y) <float[48,8,3,3] w>
{ c = Conv<pads=[1,1,1,1]>(x, w)  y = Relu(c) }"""
SHAPE = "conv 1x11x11x8 -> 1x9x9x48, kernel 3x3, float32"
RULE = {"chosen": "a1", "candidates": [{"tile": "a1", "microseconds": 2.0, "ratio": 1.0}]}


def measure(monkeypatch: pytest.MonkeyPatch, child: str, table: TileTable | None = None, keep=lambda _: None):
    """Tune with a child that is the code `child`; `send` in it answers the parent, `asked` is the request."""
    start = "asked = json.load(open(sys.argv[2]))\nsend(offered={'a': ['a1', 'a2'], 'b': ['b1', 'b2']})\n"
    monkeypatch.setattr(_tune, "_CHILD", SEND + start + child)
    machine = _machine.native()
    made = _tune.tune(model(CONV), machine, table or TileTable(), keep=keep, progress=lambda *_: None)
    return made.section(machine).shapes


def test_entries_are_kept_one_by_one_and_known_ones_are_not_asked_for(monkeypatch: pytest.MonkeyPatch):
    kept = []
    child = f"send(shape='a', entry={RULE!r}); send(shape='b', entry={RULE!r}); send(done=True, known=asked['known'])"
    made = measure(monkeypatch, child, keep=lambda table: kept.append(list(table.sections[0].shapes)))
    assert kept == [["a"], ["a", "b"]]
    entry = Entry("a1", (Measured("a1", 2.0, 1.0),))
    assert made == {"a": entry, "b": entry}
    known = TileTable().with_entry(_machine.native(), "b", entry)
    child = f"assert asked['known'] == ['b'], asked\nsend(shape='a', entry={RULE!r}); send(done=True)"
    assert measure(monkeypatch, child, known) == made


def test_an_interruption_loses_nothing_that_was_measured(monkeypatch: pytest.MonkeyPatch):
    kept = []

    def interrupt(table: TileTable) -> None:
        kept.append(table)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(monkeypatch, f"send(shape='a', entry={RULE!r})\nimport time; time.sleep(60)", keep=interrupt)
    assert list(kept[-1].sections[0].shapes) == ["a"]


def test_a_candidate_that_ends_its_process_is_left_out_by_the_next(monkeypatch: pytest.MonkeyPatch):
    child = """
if not asked['broken']:
    send(trying=['a', 'a2'])
    os.abort()
entry = {'chosen': 'a1', 'candidates': [{'tile': 'a2', 'failed': asked['broken']['a']['a2']}, {'tile': 'a1'}]}
send(shape='a', entry=entry)
send(done=True)
"""
    assert (
        measure(monkeypatch, child)["a"].candidates[0].failed
        == "the build's process ended with code -6: it said nothing"
    )


def test_a_shape_whose_race_ends_the_process_is_given_up(monkeypatch: pytest.MonkeyPatch):
    child = "if 'a' in asked['known']: send(done=True); raise SystemExit\nsend(trying=['a', '']); os.abort()"
    made = measure(monkeypatch, child)
    assert made["a"].chosen == "a1"
    assert made["a"].failed == 1


def test_a_candidate_that_hangs_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_tune, "_PATIENCE", 0.5)
    child = "if 'a' in asked['known']: send(done=True); raise SystemExit\nsend(trying=['a', ''])\nwhile True: pass"
    assert "silent for 0.5 seconds" in measure(monkeypatch, child)["a"].candidates[0].failed


@pytest.mark.parametrize(
    ("child", "kind", "says"),
    [
        ("send(kind='TargetError', error='no kernel', traceback='')", targets.TargetError, "no kernel"),
        ("os.abort()", _process.BuildError, "code -6"),
        ("send(trying=['a', 'a2']); os.kill(os.getpid(), 9)", ir.LimitError, "out of memory"),
    ],
)
def test_what_is_no_fault_of_a_candidate_is_raised(monkeypatch: pytest.MonkeyPatch, child: str, kind, says: str):
    with pytest.raises(kind, match=says):
        measure(monkeypatch, child)


def test_only_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ir.OptionError, match=r"arm\{cpu=cortex-a72\}: --tune measures on this machine, which is x86_64"
    ):
        targets.parse_target("arm").check_tuning()
    with pytest.raises(ir.OptionError, match="cuda: --tune measures kernels of x86 and arm"):
        targets.parse_target("cuda").check_tuning()
    newer = dataclasses.replace(_machine.native(), features=("avx", "amx-toast"))
    with pytest.raises(ir.OptionError, match="which lacks amx-toast; tune on a machine of that kind"):
        _tune.check_here(newer)
    targets.parse_target("x86").check_tuning()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(_machine, "missing", lambda _: ())
    targets.parse_target("arm").check_tuning()


@pytest.mark.tvm
@pytest.mark.slow
@pytest.mark.ci
def test_candidates_that_fail_crash_or_differ_are_counted_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch):
    planted = """
import json, os, sys
from mc_opt.targets import _candidates, _measure
asked, compiled, calls = json.load(open(sys.argv[2])), _candidates.compiled, []
def planted(function, machine):
    calls.append(1)
    made, notes = compiled(function, machine)
    if len(calls) == 2:
        raise RuntimeError("planted failure")
    if len(calls) == 3 and not asked["broken"]:
        os.abort()
    return (lambda *_: None) if len(calls) == 3 else made, notes
_candidates.compiled = planted
_measure.serve()
"""
    monkeypatch.setattr(_tune, "_CHILD", planted)
    progress = []
    machine = _machine.native()
    made = _tune.tune(
        model(CONV), machine, TileTable(), keep=lambda _: None, progress=lambda *step: progress.append(step)
    )
    ((shape, entry),) = made.section(machine).shapes.items()
    assert shape == SHAPE
    # The second process leaves out what ended the first.
    rule, raised, died, differs, *others = entry.candidates
    assert "planted failure" in raised.failed
    assert died.failed.endswith("ended with code -6: it said nothing")
    assert "another result than the rule's tile" in differs.failed
    assert all(c.microseconds > 0 and not c.failed for c in (rule, *others))
    assert progress[-1] == (0, 1, f"measure tiles: {SHAPE}")


@pytest.mark.tvm
@pytest.mark.slow
@pytest.mark.ci
def test_kernels_for_two_threads_are_measured_by_two(monkeypatch: pytest.MonkeyPatch):
    planted = """
from mc_opt.targets import _candidates, _measure
from mc_opt.targets._measure import tvm
def planted(*_):
    raise RuntimeError(f"{tvm.get_global_func('runtime.NumThreads')()} threads")
_candidates.kernels = planted
_measure.serve()
"""
    if _machine.cores() < 2:
        pytest.skip("missing: a second processor")
    monkeypatch.setattr(_tune, "_CHILD", planted)
    machine = _machine.native(threads=2)
    with pytest.raises(_process.BuildError, match="RuntimeError: 2 threads"):
        _tune.tune(model(CONV), machine, TileTable(), keep=lambda _: None, progress=lambda *_: None)


@pytest.mark.tvm
@pytest.mark.slow
@pytest.mark.ci
def test_packed_weights_are_measured_as_their_kernels_decode_them():
    from mc_opt import passes

    source = model(CONV)
    compressed = passes.run(source, passes.Pipeline.parse("denseshift{bits=4}"), passes.Context()).model
    machine = _machine.native()
    made = _tune.tune(compressed, machine, TileTable(), keep=lambda _: None, progress=lambda *_: None)
    ((shape, entry),) = made.section(machine).shapes.items()
    assert shape == SHAPE
    assert entry.failed == 0
    assert all(c.microseconds > 0 for c in entry.candidates)
    assert np.isclose(entry.candidates[0].ratio, 1)
