"""Prompts of language models: what goes in together, and that the artefact then goes on as ONNX Runtime does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mc_opt
from mc_opt import ir
from mc_opt.targets import _prompt
from tests._harness import model
from tests._language_model import tiny_llama

ROOM = 80


@pytest.mark.parametrize(
    ("count", "chunk", "room", "taken"),
    [
        (0, 32, 100, []),
        (3, 32, 100, [1, 1, 1]),  # filled up they would take longer
        (8, 32, 100, [8]),
        (70, 32, 100, [32, 32, *[1] * 6]),
        (12, 32, 31, [1] * 12),  # no room for what is filled up
        (40, 32, 63, [32, *[1] * 8]),
    ],
)
def test_pieces(count: int, chunk: int, room: int, taken: list[int]) -> None:
    assert list(_prompt.pieces(count, chunk, room)) == taken


@given(st.integers(0, 200), st.integers(1, 64), st.integers(0, 100))
def test_pieces_fit(count: int, chunk: int, more: int) -> None:
    done = 0
    for taken in _prompt.pieces(count, chunk, count + more):
        assert taken == 1 or (taken <= chunk and done + chunk <= count + more)
        done += taken
    assert done == count


@pytest.mark.parametrize("ids", ["int64[1, 1]", "int64[n, 1]", "int64[t]"])
def test_models_without_prompts(ids: str) -> None:
    made = model(f"""<ir_version: 10, opset_import: ["": 21]>
    g ({ids} input_ids, int64[1] position, float[1, 2, 9, 4] past) => (int64[1] y, float[1, 2, 9, 4] present)
    {{ y = Identity(position) present = Identity(past) }}""")
    made.metadata_props["mc_opt.states"] = '{"present": "past"}'
    assert _prompt.chunk_of(made) == 0
    shape = made.graph.inputs[0].shape
    assert shape is not None
    made.graph.inputs[0].shape = type(shape)([1, "t"])
    assert _prompt.chunk_of(made) == 9
    del made.metadata_props["mc_opt.states"]
    assert _prompt.chunk_of(made) == 0


@pytest.mark.tvm
@pytest.mark.zig
@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.ci
def test_an_artefact_reads_prompts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = mc_opt.capture_causal_lm(tiny_llama(max_position_embeddings=ROOM), max_length=ROOM)
    mc_opt.build(made, "x86", tmp_path / "out")
    small, _ = mc_opt.compress(made, "denseshift{bits=4 group_size=32 skip=}", check="structure")
    mc_opt.build(small, "x86", tmp_path / "small")
    rng = np.random.default_rng(0)
    for source, folder in ((made, tmp_path / "out"), (small, tmp_path / "small")):
        artefact = mc_opt.load(folder)
        assert (artefact.manifest.prompt, artefact.inputs[0].shape) == (32, (1, 1))
        stream, states = artefact.stream(), ir.states_of(source)
        session = ir.Session(source)
        ours = ir.Stream(session, states, in_place=ir.written_in_place(source, states))
        position = 0
        for count in (40, 1, 9, 20, 3, 7):  # the last ones have no room for a chunk
            inputs = {"input_ids": rng.integers(0, 256, (1, count)), "position": np.array([position])}
            wanted, got = (s.run(inputs)["logits"] for s in (ours, stream))
            assert np.abs(wanted - got).max() < 1e-4 * np.ptp(wanted)
            position += count
        assert position == ROOM
        with pytest.raises(ir.DataError, match="1 tokens from position 80 on, expected to end within the 80 positions"):
            stream.run({"input_ids": np.array([[1]]), "position": np.array([ROOM])})
        with pytest.raises(ir.DataError, match="is float64, expected int64"):
            stream.run({"input_ids": np.ones((1, 4)), "position": np.array([0])})
    # Both functions read the same weights; of the last layer, what reads prompts has keys and values without queries.
    mc_opt.build(_prompt.step_of(made), "x86", tmp_path / "out-one")
    for name, source in (("small", small), ("small-one", _prompt.step_of(small))):
        mc_opt.build(source, "x86{activations=int8}", tmp_path / f"{name}-int8", check="structure")
    for name, most, more in (("out", 1.01, ""), ("small", 1.1, "-int8")):
        one, both = (tmp_path / f"{name}{part}{more}/x86/constants.bin" for part in ("-one", ""))
        assert one.stat().st_size <= both.stat().st_size <= most * one.stat().st_size
    assert mc_opt.load(tmp_path / "out-one").manifest.prompt == 0
