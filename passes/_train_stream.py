"""Training data that comes in batches of its own: a torch DataLoader, or any iterable that can be walked again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, Subset
from torch.utils.data import SequentialSampler as InOrder

from mc_opt import ir
from mc_opt.passes._held_out import divide
from mc_opt.passes._train_batch import Batch, Stacker
from mc_opt.passes._train_label_check import LabelCheck, Largest

_END = object()
_FORMS = "a dict by input name or a tuple of tensors or arrays, the label last"
_GIVE = "give held-out data of its own (held_out)"


def shares(size: int, rank: int, ranks: int) -> slice:
    """The part of `size` samples that a process gets: consecutive, and equal where the number can be divided."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches that the user makes: their size and order stay, so the run's batch size and shuffling do not apply.

    What is random in them is made from the seed and the epoch, so that a walk can be repeated: torch's, numpy's and
    Python's global generators are set for the stream and set back for everybody else. Workers that persist over
    epochs keep generators of their own, which cannot be repeated.

    Attributes:
        made: starts a walk of one epoch.
        stack: how samples become batches.
        labelled: whether every sample has a label.
        origin: where the data comes from, for people.
        steps: batches of an epoch.
        size: samples of an epoch.
        sizes: those of each batch, where all were walked.
        layout: what the batches hold, for the fingerprint.
        chosen: the numbers of the batches that are the stream's; None for all.
        walk_seed: the seed of every epoch, where the order must be one.
        loader: the DataLoader behind the walk.
        largest: the largest class of the labels of the batches that were looked at.
    """

    made: Callable[[], Iterable[Any]]
    stack: Stacker
    labelled: bool
    origin: str
    steps: int
    size: int
    sizes: tuple[int, ...] = ()
    layout: str = ""
    chosen: frozenset[int] | None = None
    walk_seed: int | None = None
    loader: DataLoader[Any] | None = None
    largest: Largest | None = None

    @classmethod
    def opened(
        cls,
        made: Callable[[], Iterable[Any]],
        stack: Stacker,
        origin: str,
        *,
        loader: DataLoader[Any] | None = None,
    ) -> Stream:
        """Look at the first batch of a DataLoader that knows its size, at all batches of anything else.

        Raises:
            DataError: a batch does not fit the model, or there is none.
        """
        bare = cls(made, stack, False, origin, 0, 0, loader=loader)
        known = _known_size(loader)
        labels, sizes, layout, labelled = LabelCheck(stack.model), [], "", False
        for number, raw in enumerate(bare._walk(0, 0)):
            arrays = bare._arrays(raw, number)
            label = arrays.get(ir.LABEL) if bare._has_label(arrays) else None
            if not number:
                labelled, layout = label is not None, _layout(arrays)
            bare._hold_labels(label, labelled=labelled, number=number, check=labels)
            sizes.append(len(next(iter(arrays.values()))))
            if known is not None:
                break
        labels.hold_classes(origin)
        if not sizes:
            raise ir.DataError(f"{origin}: gave no batch, expected one at least; check its size")
        steps, size = known or (len(sizes), sum(sizes))
        found = () if known else tuple(sizes)
        return dataclasses.replace(
            bare, labelled=labelled, steps=steps, size=size, sizes=found, layout=layout, largest=labels.largest
        )

    @property
    def fingerprint(self) -> str:
        """Of types, sizes, and what was split off; the samples themselves are not looked at."""
        chosen = "all" if self.chosen is None else sorted(self.chosen)
        return hashlib.sha256(f"{self.layout} {self.steps} {self.size} {self.walk_seed} {chosen}".encode()).hexdigest()

    def count(self, batch_size: int, *, shuffle: bool = True) -> int:
        """Batches of an epoch."""
        return self.steps

    def batches(
        self,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        skip: int = 0,
        rank: int = 0,
        ranks: int = 1,
        shuffle: bool = True,
    ) -> Iterator[tuple[Batch, ...]]:
        """The batches of an epoch, each cut for the processes; see `Source`."""
        if self.walk_seed is not None:
            seed, epoch = self.walk_seed, 0
        labels, taken = LabelCheck(self.stack.model), 0
        for number, raw in enumerate(self._walk(seed, epoch)):
            if self.chosen is not None and number not in self.chosen:
                continue
            taken += 1
            if taken <= skip:
                continue
            arrays = self._arrays(raw, number)
            label = arrays.get(ir.LABEL) if self._has_label(arrays) else None
            self._hold_labels(label, labelled=self.labelled, number=number, check=labels)
            size = len(next(iter(arrays.values())))
            if size < ranks and shuffle:
                raise ir.DataError(
                    f"{self.origin}: batch {number} has {size} samples for {ranks} processes, expected one each at "
                    "least; make the loader's batches larger or drop its last one"
                )
            part = shares(size, rank, ranks)
            rows = ({name: array[i] for name, array in arrays.items()} for i in range(size)[part])
            yield self.stack.parts(ir.as_sample(row, self.stack.model, self.stack.states) for row in rows)

    def split(self, share: float, seed: int) -> tuple[Stream, Stream]:
        """Train and held out: samples of a loader's data set where it has one, else whole batches.

        Whole batches are told by their number, so what is random is then the same in all epochs.

        Raises:
            DataError: the order of the samples is not to be known, or there is one batch.
        """
        if self.loader is not None and not isinstance(self.loader.dataset, IterableDataset):
            return self._split_set(self.loader, share, seed)
        if self.steps < 2:
            raise ir.DataError(f"{self.origin}: 1 batch cannot be split, expected 2 at least; {_GIVE}")
        train, rest = divide(np.arange(self.steps), share, seed)
        return self._chosen(train.tolist(), seed), self._chosen(rest.tolist(), seed)

    def _chosen(self, numbers: list[int], seed: int) -> Stream:
        sizes = [self.sizes[i] for i in numbers]
        return dataclasses.replace(self, chosen=frozenset(numbers), steps=len(numbers), size=sum(sizes), walk_seed=seed)

    def _split_set(self, loader: DataLoader[Any], share: float, seed: int) -> tuple[Stream, Stream]:
        sampler = loader.sampler
        plain = isinstance(sampler, InOrder) or (isinstance(sampler, RandomSampler) and not sampler.replacement)
        if not plain or type(loader.batch_sampler) not in (BatchSampler, type(None)):
            kind = type(sampler if not plain else loader.batch_sampler).__name__
            raise ir.DataError(
                f"{self.origin}: its samples are ordered by {kind}, expected the loader's own shuffling, which leaves "
                f"no sample both trained and held out; {_GIVE}"
            )
        size = len(loader.dataset)
        if size < 2:
            raise ir.DataError(f"{self.origin}: 1 sample cannot be split, expected 2 at least; {_GIVE}")
        train, rest = divide(np.arange(size), share, seed)
        layout = f"{self.layout} {hashlib.sha256(rest.tobytes()).hexdigest()}"
        return self._over(_subset(loader, train), layout), self._over(_subset(loader, rest, training=False), layout)

    def _over(self, loader: DataLoader[Any], layout: str) -> Stream:
        opened = Stream.opened(lambda: loader, self.stack, self.origin, loader=loader)
        return dataclasses.replace(opened, layout=layout)

    def _walk(self, seed: int, epoch: int) -> Iterator[Any]:
        """One epoch of raw batches, with what is random in them made from the seed and the epoch."""
        chance = _Chance(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        if self.loader is not None:
            _seed_loader(self.loader, chance.seed, epoch)
        with self._repairable("cannot be walked"), chance:
            walk = iter(self.made())
        number = 0
        while True:
            with self._repairable(f"batch {number} failed"), chance:
                raw = next(walk, _END)
            if raw is _END:
                return
            yield raw
            number += 1

    @contextlib.contextmanager
    def _repairable(self, what: str) -> Iterator[None]:
        try:
            yield
        except (MemoryError, ir.IRError):
            raise
        except Exception as error:
            raise ir.DataError(f"{self.origin}: {what}: {ir.first_line(error)}; repair it") from error

    def _arrays(self, raw: Any, number: int) -> dict[str, np.ndarray]:
        """A raw batch as arrays by name, checked against the model."""
        where = f"{self.origin}: batch {number}"
        named = self._named(raw, where)
        arrays = {name: as_array(value, f"{where}: {name!r}") for name, value in named.items()}
        headers = {name: ir.Header(a.shape, a.dtype) for name, a in arrays.items()}
        ir.check_arrays(where, headers, self.stack.model, self.stack.states)
        return arrays

    def _named(self, raw: Any, where: str) -> dict[str, Any]:
        if isinstance(raw, Mapping):
            return {str(name): value for name, value in raw.items()}
        values = [raw] if isinstance(raw, torch.Tensor | np.ndarray) else raw
        if not isinstance(values, tuple | list):
            raise ir.DataError(f"{where}: is {type(raw).__name__}, expected {_FORMS}; change what the loader gives")
        names = [str(v.name) for v in self.stack.model.graph.inputs if v.name not in self.stack.states.values()]
        if len(values) not in (len(names), len(names) + 1):
            raise ir.DataError(
                f"{where}: has {len(values)} entries, expected {len(names)} ({', '.join(names)}) or, with the label, "
                f"{len(names) + 1}; change what the loader gives"
            )
        return dict(zip([*names, ir.LABEL], values, strict=False))

    def _has_label(self, arrays: Mapping[str, np.ndarray]) -> bool:
        return ir.LABEL in arrays and ir.LABEL not in {v.name for v in self.stack.model.graph.inputs}

    def _hold_labels(self, label: np.ndarray | None, *, labelled: bool, number: int, check: LabelCheck) -> None:
        where = f"{self.origin}: batch {number}"
        if (label is not None) != labelled:
            has, other = ("has a", "have none") if label is not None else ("has no", "have one")
            raise ir.DataError(f"{where}: {has} label, batches before it {other}; give all or none")
        if label is not None:
            check.see(where, label, batched=True)


def as_array(value: Any, where: str) -> np.ndarray:
    """An array of a tensor or array.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, torch.Tensor):
        return ir.to_array(value)
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        kind = "an array of Python objects" if isinstance(value, np.ndarray) else type(value).__name__
        raise ir.DataError(f"{where} is {kind}, expected a tensor or an array of numbers; convert it")
    return value


def hold_loader(loader: DataLoader[Any], origin: str) -> None:
    """Refuse a loader that gives each process samples of its own: the run cuts every batch.

    Raises:
        DataError: naming the sampler.
    """
    if isinstance(loader.sampler, DistributedSampler) and loader.sampler.num_replicas > 1:
        raise ir.DataError(
            f"{origin}: its DistributedSampler gives each process its own batches, expected whole ones, which are cut "
            "here; make the loader without it"
        )


def _known_size(loader: DataLoader[Any] | None) -> tuple[int, int] | None:
    """Batches and samples of an epoch, where the loader knows both."""
    if loader is None or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None  # with a batch sampler of the user's the batch size is None too
    if not hasattr(loader.sampler, "__len__") or not len(loader):
        return None
    steps = len(loader)
    return steps, steps * loader.batch_size if loader.drop_last else len(loader.sampler)


def _seed_loader(loader: DataLoader[Any], seed: int, epoch: int) -> None:
    for owner in (loader, loader.sampler, loader.batch_sampler, loader.dataset):
        own = getattr(owner, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(seed)
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


def _subset(loader: DataLoader[Any], rows: np.ndarray, *, training: bool = True) -> DataLoader[Any]:
    """A loader like another over some rows of its data set; for held-out samples all of them, in their order."""
    return DataLoader(
        Subset(loader.dataset, rows.tolist()),
        batch_size=loader.batch_size,
        shuffle=training and isinstance(loader.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=training and loader.drop_last and len(rows) >= (loader.batch_size or 1),
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _layout(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.dtype} {array.ndim}" for name, array in arrays.items())


class _Chance:
    """Global random generators that belong to a stream while it is entered, and to everybody else outside."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        torch_state = torch.Generator().manual_seed(seed).get_state()
        self._own = (torch_state, np.random.RandomState(seed).get_state(), random.Random(seed).getstate())

    def __enter__(self) -> None:
        self._others = self._swap(self._own)

    def __exit__(self, *error: object) -> None:
        self._own = self._swap(self._others)

    @staticmethod
    def _swap(states: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        return before
