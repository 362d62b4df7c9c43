"""What holds for every pass, found by its file name: nothing here names one, beyond the options that it needs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir, passes
from tests._harness import apply, model, same_in_torch, to_bytes
from tests.passes.zoo import SPECS, ZOO

OURS = sorted(p.stem.replace("_", "-") for p in Path(passes.__file__).parent.glob("[a-z]*.py"))
# What these do without training data is a test of their own.
ALONE = [name for name in OURS if not getattr(passes.find_pass(name), "needs_training", False)]


def spec_of(name: str) -> str:
    return SPECS.get(name, name).format(tests=Path(__file__).parent)


def zoo() -> object:
    return model(ZOO)


@pytest.fixture(params=OURS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_file_is_found() -> None:
    assert set(OURS) <= set(passes.pass_names())


def test_the_file_name_is_the_name(name: str) -> None:
    kind = passes.find_pass(name)
    step = passes.Pipeline.parse(spec_of(name)).passes[0]
    assert type(step) is kind and step.name == name
    assert kind.__doc__ and kind.family
    assert importlib.import_module(kind.__module__).__doc__


def test_options_round_trip(name: str) -> None:
    pipeline = passes.Pipeline.parse(spec_of(name))
    assert passes.Pipeline.parse(str(pipeline)) == pipeline
    assert passes.Pipeline.parse(str(pipeline)).passes[0].options() == pipeline.passes[0].options()


@pytest.mark.parametrize("name", ALONE)
def test_runs_verifies_exports_and_keeps_its_promise(name: str) -> None:
    source = model(ZOO)
    before = to_bytes(source)
    pipeline = passes.Pipeline.parse(spec_of(name))
    result = passes.run(source, pipeline, passes.Context(allow_scripts=True))  # exact passes are judged here
    assert to_bytes(source) == before, "a pass edits the clone it was given, never what it shares"
    assert to_bytes(result.model) != before, "the zoo has something for every pass"
    ir.verify(result.model)
    same_in_torch(result.model)
    assert [o.name for o in result.model.graph.outputs] == [o.name for o in source.graph.outputs]


def test_values_that_stay_keep_their_types(name: str) -> None:
    source = model(ZOO)
    changed, _ = apply(spec_of(name), source)
    old = {v.name: v for v in (*source.graph.inputs, *source.graph.outputs)}
    for value in (*changed.graph.inputs, *changed.graph.outputs):
        if value.name in old:
            assert (value.dtype, value.shape) == (old[value.name].dtype, old[value.name].shape)


def test_the_same_seed_gives_the_same_bytes(name: str) -> None:
    source = model(ZOO)
    assert to_bytes(apply(spec_of(name), source)[0]) == to_bytes(apply(spec_of(name), source)[0])


@pytest.mark.parametrize("name", ALONE)
def test_a_second_run_changes_nothing(name: str) -> None:
    kind = passes.find_pass(name)
    if not kind.idempotent:
        line = next(
            x for x in Path(str(sys.modules[kind.__module__].__file__)).read_text().splitlines() if "idempotent" in x
        )
        assert "#" in line, "a pass that is not idempotent says why, beside the flag"
        return
    once, rewrites = apply(spec_of(name), model(ZOO))
    assert rewrites
    twice, again = apply(spec_of(name), once)
    assert again == 0
    assert to_bytes(twice) == to_bytes(once)


def test_made_nodes_say_who_made_them(name: str) -> None:
    source = model(ZOO)
    changed, _ = apply(spec_of(name), source)
    known = {n.name for n in source.graph.all_nodes()}
    for node in changed.graph.all_nodes():
        if node.domain == "mc_opt" and node.name not in known:
            assert node.metadata_props["mc_opt.pass"] == name


def test_weights_are_shared_not_written(name: str) -> None:
    source = model(ZOO)
    arrays = {k: v.const_value.numpy().copy() for k, v in source.graph.initializers.items() if v.const_value}
    apply(spec_of(name), source)
    for key, value in source.graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), arrays[key])


@pytest.mark.slow
def test_the_hash_seed_does_not_matter(name: str) -> None:
    code = (
        "import hashlib; from tests._harness import apply, model, to_bytes; from tests.passes.zoo import ZOO;"
        f"print(hashlib.sha256(to_bytes(apply({spec_of(name)!r}, model(ZOO))[0])).hexdigest())"
    )
    root = str(Path(__file__).parents[2])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
