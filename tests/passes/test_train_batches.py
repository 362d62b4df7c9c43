"""Which models a training runs batch by batch, and which sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mc_opt import passes
from tests._harness import model

TOKENS = """
tokens (int64[N,S] ids) => (float[N,S,4] y)
<float[7,4] words, float[3,4] places, float[4,4] w, int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}>
{
  e = Gather (words, ids)
  s = Shape <start: int = 1> (ids)
  length = Squeeze (s)
  order = Range (zero, length, one)
  p = Gather (places, order)
  b = Unsqueeze (p, axis)
  h = Add (e, b)
  y = MatMul (h, w)
}
"""
# y is about the batch, not about its samples.
CENTRED = """
centred (float[N,4] x) => (float[N,4] y)
<float[4,4] w, int64[1] axes = {0}>
{
  h = MatMul (x, w)
  m = ReduceMean (h, axes)
  y = Sub (h, m)
}
"""


def notes_of(text: str, spec: str, data: Path, **options: str) -> list[str]:
    training = passes.Training(data=data, epochs=1, batch_size=4, parameters=("all",), **options)  # type: ignore[arg-type]
    result = passes.run(model(text), passes.Pipeline.parse(spec), passes.Context(training=training), check="structure")
    return [note for _, note in result.report.passes[0].notes]


def test_a_value_that_no_sample_changes_does_not_part_a_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.random.default_rng(0).integers(0, 7, (16, 3)))
    notes = notes_of(TOKENS, "fine-tune", tmp_path / "ids.npz", loss="output,layers{values=b}")
    assert not any("one after another" in note for note in notes)


def test_values_of_the_batch_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32))
    notes = notes_of(CENTRED, "fine-tune", tmp_path / "x.npz", loss="output,layers{values=h}")
    assert any("one after another" in note for note in notes)
