"""Training data: every kind of source, its order, its parts, its split, and what is refused."""

from __future__ import annotations

import functools
import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from mc_opt import ir
from mc_opt.passes._train_data import Batch, Source, join, open_source, split

NET = """<ir_version: 10, opset_import: ["": 21]>
net (float[n, 2] x) => (float[n, 3] y) { y = Gemm (x, w) }"""
TWO = """<ir_version: 10, opset_import: ["": 21]>
net (float[1, 3, 2] x, int64 k) => (float[1, 3, 2] y) { f = Cast <to = 1> (k) y = Add (x, f) }"""
TEXT = """<ir_version: 10, opset_import: ["": 21]>
net (int64[n, s] ids) => (int64[n, s] y) { y = Identity (ids) }"""
RECURRENT = """<ir_version: 10, opset_import: ["": 21]>
net (float[n, 2] x, float[1, n, 4] h) => (float[n, 2] y, float[1, n, 4] hn) { y = Relu (x) hn = Relu (h) }"""


@functools.cache
def model(text: str = NET) -> onnx_ir.Model:
    if "Gemm" in text:
        text = text.replace("{", "<float[2, 3] w = {1, 2, 3, 4, 5, 6}> {")
    return onnx_ir.from_proto(onnx.parser.parse_model(text))


def numbered(n: int, label: bool = True) -> dict[str, np.ndarray]:
    """`n` samples whose first entry is their number."""
    x = np.stack([np.arange(n), np.zeros(n)], 1).astype(np.float32)
    return {"x": x} | ({"label": np.arange(n) % 3} if label else {})


def source(given: Any, text: str = NET, **options: Any) -> Source:
    return open_source(given, model(text), **({"batchable": True} | options))


def walk(data: Source, **options: Any) -> list[tuple[Batch, ...]]:
    return list(data.batches(**({"batch_size": 4, "seed": 0, "epoch": 0} | options)))


def ids(batches: list[tuple[Batch, ...]]) -> list[list[int]]:
    return [[int(v) for part in parts for v in part.inputs["x"][:, 0]] for parts in batches]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ir.DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- order ---------------------------------------------------------------------------------------

SIZES = {"n": st.integers(1, 30), "size": st.integers(1, 8), "seed": st.integers(0, 9)}


@hypothesis.given(**SIZES, epoch=st.integers(0, 3), skip=st.integers(0, 4))
@hypothesis.settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_sample_once(n: int, size: int, seed: int, epoch: int, skip: int) -> None:
    data = source(numbered(n))
    options = {"batch_size": size, "seed": seed, "epoch": epoch}
    batches = ids(walk(data, **options))
    assert len(batches) == data.count(size)
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == (n if n < size else n - n % size)
    assert ids(walk(data, **options)) == batches
    assert ids(walk(data, **options, skip=skip)) == batches[skip:]
    in_order = ids(walk(data, **options, shuffle=False))
    assert [i for batch in in_order for i in batch] == list(range(n))
    assert len(in_order) == data.count(size, shuffle=False) == math.ceil(n / size)


@hypothesis.given(n=st.integers(3, 30), each=st.integers(1, 4), ranks=st.integers(2, 3), shuffle=st.booleans())
@hypothesis.settings(max_examples=30, deadline=None)
def test_processes_share_every_batch(n: int, each: int, ranks: int, shuffle: bool) -> None:
    data = source(numbered(n))
    whole = ids(walk(data, batch_size=each * ranks, shuffle=shuffle))
    parts = [ids(walk(data, batch_size=each * ranks, shuffle=shuffle, rank=r, ranks=ranks)) for r in range(ranks)]
    assert [flat(batch) for batch in zip(*parts, strict=True)] == whole
    if n >= each * ranks and shuffle:
        assert {len(batch) for part in parts for batch in part} == {each}


def test_epochs_and_seeds_differ() -> None:
    data = source(numbered(30))
    orders = [ids(walk(data, seed=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@hypothesis.given(n=st.integers(2, 30), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
@hypothesis.settings(max_examples=30, deadline=None)
def test_a_split_is_disjoint_and_whole(n: int, share: float, seed: int) -> None:
    data = source(numbered(n))
    train, held = split(data, share, seed)
    mine, theirs = (flat(ids(walk(s, shuffle=False))) for s in (train, held))
    assert sorted(mine + theirs) == list(range(n))
    assert (len(mine), len(theirs)) == (train.size, held.size)
    assert held.size == min(max(round(n * share), 1), n - 1)
    assert ids(walk(split(data, share, seed)[1], shuffle=False)) == ids(walk(held, shuffle=False))
    assert len({data.fingerprint, train.fingerprint, held.fingerprint}) == 3 or n == 2


# --- batches -------------------------------------------------------------------------------------


def test_samples_are_stacked_with_their_labels() -> None:
    ((batch,),) = walk(source(numbered(4)), shuffle=False)
    assert (batch.size, batch.inputs["x"].shape, batch.inputs["x"].dtype) == (4, (4, 2), torch.float32)
    assert batch.label is not None
    assert (batch.label.tolist(), batch.label.dtype) == ([0, 1, 2, 0], torch.int64)
    assert [single.inputs["x"].shape for single in batch.singles()] == [(1, 2)] * 4
    assert torch.equal(join([batch.rows(0, 1), batch.rows(1, 4)]).inputs["x"], batch.inputs["x"])
    assert batch.rows(0, 4) is batch


def test_a_model_that_is_not_batchable_gets_its_samples_one_by_one() -> None:
    (parts,) = walk(source(numbered(4), batchable=False), shuffle=False)
    assert [(p.size, p.inputs["x"].shape) for p in parts] == [(1, (1, 2))] * 4


def test_a_first_axis_of_one_is_stacked_and_equal_scalars_are_shared() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    (parts,) = walk(source({"x": x, "k": np.array([7, 7, 8, 7])}, TWO), shuffle=False)
    assert [(p.size, tuple(p.inputs["x"].shape), int(p.inputs["k"])) for p in parts] == [
        (3, (3, 3, 2), 7),
        (1, (1, 3, 2), 8),
    ]
    assert torch.equal(torch.cat([s.inputs["x"] for s in parts[0].singles()]), parts[0].inputs["x"])
    assert torch.equal(join(list(parts[0].singles())).inputs["x"], parts[0].inputs["x"])


def test_samples_of_different_lengths_fall_into_parts() -> None:
    rows = [ir.Sample({"ids": np.full((1, length), i)}) for i, length in enumerate((3, 5, 3, 5, 5))]
    for row in (rows.__getitem__, None):
        data = source(ir.Data(lambda: iter(rows), 5, origin="rows", row=row), TEXT)
        (parts, last) = walk(data, shuffle=False)
        assert [(p.size, tuple(p.inputs["ids"].shape)) for p in (*parts, *last)] == [
            (2, (2, 3)),
            (2, (2, 5)),
            (1, (1, 5)),
        ]


def test_what_is_several_to_the_model_runs_alone() -> None:
    (parts,) = walk(source({"x": np.zeros((3, 5, 2), np.float32)}), shuffle=False)
    assert [(p.size, tuple(p.inputs["x"].shape)) for p in parts] == [(1, (5, 2))] * 3


def test_states_start_every_sample_at_zero() -> None:
    data = source(numbered(3, label=False), RECURRENT, states={"hn": "h"})
    ((batch,),) = walk(data, shuffle=False)
    assert batch.inputs["h"].shape == (1, 3, 4)
    assert [s.inputs["h"].shape for s in batch.singles()] == [(1, 1, 4)] * 3
    assert join(list(batch.singles())).inputs["h"].shape == (1, 3, 4)
    own = ir.seeded_data(model(RECURRENT), 3, states={"hn": "h"})
    assert "h" in walk(source(own, RECURRENT))[0][0].inputs


def test_float_labels_are_kept_and_padding_stays() -> None:
    floats = {"x": numbered(2)["x"], "label": np.array([[1.5, 0, 1], [2, 0, 1]])}
    ((batch,),) = walk(source(floats), shuffle=False)
    assert batch.label is not None
    assert (batch.label.dtype, batch.label.shape) == (torch.float32, (2, 3))
    ((batch,),) = walk(source({"x": numbered(2)["x"], "label": np.array([[1, -1], [2, -1]], np.int8)}), shuffle=False)
    assert batch.label is not None
    assert batch.label.tolist() == [[1, -1], [2, -1]]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_are_read_in_any_order(tmp_path: Path, save: Any, order: Any) -> None:
    content = numbered(9)
    for name, part in (("b", slice(5, 9)), ("a", slice(0, 5))):
        save(tmp_path / f"{name}.npz", **{k: np.asarray(v[part], order=order) for k, v in content.items()})
    data = source(tmp_path)
    assert ids(walk(data)) == ids(walk(source(content)))
    assert (data.size, data.labelled, data.origin) == (9, True, str(tmp_path))


def test_a_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    marks = []
    for name, content in (("a", numbered(5)), ("b", numbered(5)), ("c", numbered(6)), ("d", numbered(5, label=False))):
        np.savez(tmp_path / f"{name}.npz", **content)
        marks.append(source(tmp_path / f"{name}.npz").fingerprint)
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3
    assert source(numbered(5)).fingerprint == source(numbered(5)).fingerprint != source(numbered(6)).fingerprint


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_never_is_in_memory_whole(tmp_path: Path, save: Any) -> None:
    size = 16 << 20
    save(tmp_path / "big.npz", x=np.zeros((64, size // 256), np.float32))
    wide = model(NET.replace("Gemm (x, w)", "Relu (x)").replace("[n, 2]", "[n, m]").replace("[n, 3]", "[n, m]"))
    data = open_source(tmp_path / "big.npz", wide, batchable=True)
    tracemalloc.start()
    seen = sum(int(p.inputs["x"].shape[0]) for parts in data.batches(batch_size=2, seed=0, epoch=0) for p in parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 64
    assert peak < size / 4


def test_a_packed_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal((30000, 2)).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[100000:100100] = bytes(100)
    path.write_bytes(content)
    assert "cannot be read to its end" in refusal(lambda: walk(source(path)))


# --- loaders and factories -----------------------------------------------------------------------


def tensors(n: int = 9) -> TensorDataset:
    return TensorDataset(*(torch.from_numpy(a) for a in numbered(n).values()))


def test_a_loader_keeps_its_batches_and_repeats_them() -> None:
    data = source(DataLoader(tensors(), batch_size=2, shuffle=True))
    assert (data.size, data.labelled, data.count(64)) == (9, True, 5)
    before = torch.get_rng_state()
    first = ids(walk(data))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(b) for b in first] == [2, 2, 2, 2, 1]
    torch.rand(1)
    assert ids(walk(data)) == first != ids(walk(data, epoch=1))
    assert ids(walk(data, skip=2)) == first[2:]
    dropping = source(DataLoader(tensors(), batch_size=2, drop_last=True))
    halves = [ids(walk(dropping, rank=r, ranks=2)) for r in (0, 1)]
    assert halves == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
    assert dropping.size == 8


def test_a_loader_with_a_generator_repeats_its_order() -> None:
    data = source(DataLoader(tensors(), batch_size=2, shuffle=True, generator=torch.Generator()))
    assert ids(walk(data)) == ids(walk(data)) != ids(walk(data, epoch=1))


def test_a_loader_is_split_by_its_samples() -> None:
    train, held = split(source(DataLoader(tensors(), batch_size=2, shuffle=True)), 0.3, 0)
    assert (train.size, held.size) == (6, 3)
    for epoch in range(3):
        mine, theirs = (flat(ids(walk(s, epoch=epoch))) for s in (train, held))
        assert sorted(mine + theirs) == list(range(9))
    assert train.fingerprint != held.fingerprint


class Shuffled(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        for i in torch.randperm(8).tolist():
            yield {"x": torch.tensor([float(i), 0]), "label": i % 3}


def test_a_sampler_that_does_not_know_its_size_is_walked() -> None:
    class Odd(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(1, 9, 2))

    data = source(DataLoader(tensors(), batch_size=3, sampler=Odd()))
    assert (data.size, data.count(1), flat(ids(walk(data)))) == (4, 2, [1, 3, 5, 7])


def test_batches_without_a_data_set_are_split_by_their_number() -> None:
    rows = numbered(6)
    batches = [{name: a[i : i + 2] for name, a in rows.items()} for i in (0, 2, 4)]
    for given, whole in ((batches, 6), (DataLoader(Shuffled(), batch_size=2), 8)):
        train, held = split(source(given), 0.3, 0)
        for epoch in range(2):
            mine, theirs = (flat(ids(walk(s, epoch=epoch))) for s in (train, held))
            assert sorted(mine + theirs) == list(range(whole))
        assert (train.count(1), held.count(1), train.size + held.size) == (len(mine) // 2, 1, whole)


def test_factories_make_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "makes_data.py").write_text(
        "import numpy as np\n"
        "X = np.arange(8, dtype=np.float32).reshape(4, 2)\n"
        "def arrays(): return {'x': X}\n"
        "def batches():\n    yield (X[:2],)\n    yield [X[2:], np.array([0, 1])][:1]\n"
        "def broken(): raise ValueError('no disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("arrays", "batches"):
        data = source(f"makes_data:{name}")
        assert sorted(flat(ids(walk(data, batch_size=2)))) == [0, 2, 4, 6]
        assert walk(data) and walk(data)
    with pytest.raises(ir.DataError, match=r"--train 'makes_data:broken': the factory failed: ValueError: no disk"):
        source("makes_data:broken")
    with pytest.raises(ir.OptionError, match=r"--train 'makes_data:none': module 'makes_data' has no 'none'"):
        source("makes_data:none")
    assert source(lambda: ir.seeded_data(model(), 5)).size == 5
    assert source(lambda: iter([numbered(2), numbered(3)])).size == 5


# --- refusals ------------------------------------------------------------------------------------

X = numbered(4)["x"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": X.astype(float)}, "dict: array 'x' is float64[4,2], expected float32 for FLOAT[n,2]"),
        ({"x": X[:0]}, "dict: first axes count x 0, expected one number of samples from 1"),
        ({"x": X, "z": X}, "dict: array 'z' is no input of the model, expected x FLOAT[n,2]"),
        ({"x": [[1.0, 2.0]]}, "dict: 'x' is list, expected a tensor or an array of numbers"),
        (
            {"x": X, "label": np.array(["a"] * 4)},
            "sample 0: label is <U1[], expected whole numbers (classes)",
        ),
        ({"x": X, "label": np.array([1, np.nan, 2, 3])}, "sample 1: label is float64[] with 1 NaN or infinite"),
        (
            {"x": X, "label": np.array([1.0, 0, 2, 1])},
            "dict: label is float64[] of whole numbers, expected integers for the classes of y f32[n,3]; convert it",
        ),
        ([], "list: gave no batch, expected one at least"),
        (iter([(X,)]), "list_iterator: can be walked once"),
        ([(X, X[:, 0], X)], "list: batch 0: has 3 entries, expected 1 (x) or, with the label, 2"),
        ([3], "list: batch 0: is int, expected a dict by input name or a tuple"),
        ([(X[:, :1],)], "list: batch 0: array 'x' is float32[4,1], expected [samples,n,2]"),
        ([(X,), (X, np.arange(4))], "list: batch 1: has a label, batches before it have none"),
        ([(X, np.full(4, np.inf))], "list: batch 0: label is float64[4] with 4 NaN or infinite"),
        (3, "int: is int, expected an .npz file, a folder of them"),
        (ir.Data(lambda: iter(()), 0), "ir.Data: has 0 samples, expected 1"),
        (ir.Data(lambda: iter([ir.Sample({"x": X[:1]})]), 1, True), "ir.Data: sample 0: has no label"),
        (ir.Data(lambda: iter([ir.Sample({"x": X[:1, :1]})]), 1), "ir.Data: sample 0: array 'x' is float32[1,1,1]"),
    ],
)
def test_data_that_does_not_fit(given: Any, message: str) -> None:
    assert message in refusal(lambda: source(given))


def test_a_loader_that_fails_or_has_its_own_order() -> None:
    def fail(rows: list[Any]) -> Any:
        raise OSError("disk gone")

    assert "DataLoader: batch 0 failed: OSError: disk gone; repair it" in refusal(
        lambda: source(DataLoader(tensors(), collate_fn=fail))
    )
    weighted = DataLoader(tensors(), sampler=WeightedRandomSampler([1.0] * 9, 9))
    assert "ordered by WeightedRandomSampler" in refusal(lambda: split(source(weighted), 0.3, 0))
    shared = torch.utils.data.DistributedSampler(tensors(), num_replicas=2, rank=0)
    assert "DistributedSampler gives each process" in refusal(lambda: source(DataLoader(tensors(), sampler=shared)))


def test_what_cannot_be_shared_or_split() -> None:
    data = source(numbered(4))
    assert "batch_size=3: 2 processes cannot share it" in refusal(lambda: walk(data, batch_size=3, ranks=2))
    assert "4 samples for 5 processes" in refusal(lambda: walk(data, batch_size=5, ranks=5))
    assert "batch 0 has 1 samples for 2 processes" in refusal(lambda: walk(source([(X[:1],)]), ranks=2))
    assert "1 sample cannot be split" in refusal(lambda: split(source({"x": X[:1]}), 0.1, 0))
    assert "1 batch cannot be split" in refusal(lambda: split(source([(X,)]), 0.1, 0))
    assert "holdout=1: expected a share" in refusal(lambda: split(data, 1, 0))
