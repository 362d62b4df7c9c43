"""Where training samples come from: files, factories, arrays and loaders, all behind one `Source`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir
from torch.utils.data import DataLoader

from mc_opt import ir
from mc_opt.passes._held_out import divide
from mc_opt.passes._train_batch import Batch, Stacker, join
from mc_opt.passes._train_label_check import LabelCheck, Largest
from mc_opt.passes._train_stream import Stream, as_array, hold_loader, shares

__all__ = ["Batch", "Source", "join", "open_source", "split"]

_KINDS = "an .npz file, a folder of them, package.module:factory, a factory, arrays by name or a torch DataLoader"
_GIVE = "give held-out data of its own (held_out)"


class Source(Protocol):
    """Samples to train on, in batches."""

    @property
    def size(self) -> int:
        """Samples of an epoch."""

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""

    @property
    def largest(self) -> Largest | None:
        """The largest class of the labels that were looked at when the source was opened."""

    @property
    def origin(self) -> str:
        """Where they come from, for people."""

    @property
    def fingerprint(self) -> str:
        """What tells these samples from others, for a checkpoint to know its data."""

    def count(self, batch_size: int, *, shuffle: bool = True) -> int:
        """Batches of an epoch."""

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
        """The batches of an epoch, each as parts of equal shapes; the same for the same seed and epoch.

        Args:
            batch_size: samples of a batch over all processes; a stream of batches keeps its own.
            seed: of the order.
            epoch: of the order.
            skip: batches to leave out at the front.
            rank: which of the processes this is; it gets one of equal consecutive parts of every batch.
            ranks: how many processes there are.
            shuffle: for training, without a last batch that is not full unless it is the only one; otherwise every
                sample in its order, where a process may get no sample of the last batch.

        Raises:
            DataError: the batch cannot be cut into equal parts, or a sample does not fit the model.
        """

    def split(self, share: float, seed: int) -> tuple[Source, Source]:
        """What is trained on, and about `share` of all, held out."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of `ir.Data`, by their number in any order; those that can only be walked come in their own order.

    Attributes:
        data: the samples.
        stack: how they become batches.
        chosen: the numbers of the samples that are the source's, rising.
        largest: the largest class of all labels of the data.
    """

    data: ir.Data
    stack: Stacker
    chosen: np.ndarray
    largest: Largest | None = None

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return len(self.chosen)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return self.data.labelled

    @property
    def origin(self) -> str:
        """Where they come from."""
        return self.data.origin

    @property
    def fingerprint(self) -> str:
        """Of the data's own fingerprint, or else its first sample, and of which samples are chosen."""
        known = self.data.fingerprint
        if not known:
            first = next(self.data.walk())
            known = " ".join(f"{name} {a.shape} {a.tobytes().hex()}" for name, a in sorted(first.inputs.items()))
        digest = hashlib.sha256(f"{known} {self.data.size} {self.data.labelled}".encode())
        digest.update(self.chosen.tobytes())
        return digest.hexdigest()

    def count(self, batch_size: int, *, shuffle: bool = True) -> int:
        """Batches of an epoch."""
        return max(1, self.size // batch_size) if shuffle else -(-self.size // batch_size)

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
        """The batches of an epoch; see `Source`."""
        self._hold_parts(batch_size, ranks, shuffle=shuffle)
        order = self.chosen
        if shuffle and self.data.row is not None:
            order = np.random.default_rng((seed, epoch)).permutation(order)
        starts = range(skip * batch_size, self.count(batch_size, shuffle=shuffle) * batch_size, batch_size)
        batches = (order[start : start + batch_size] for start in starts)
        own = [batch[shares(len(batch), rank, ranks)] for batch in batches]
        read = self._read(list(itertools.chain.from_iterable(part.tolist() for part in own)))
        for part in own:
            yield self.stack.parts(itertools.islice(read, len(part)))

    def _hold_parts(self, batch_size: int, ranks: int, *, shuffle: bool) -> None:
        if batch_size % ranks:
            raise ir.DataError(
                f"batch_size={batch_size}: {ranks} processes cannot share it equally; give a multiple of {ranks}"
            )
        if shuffle and self.size < ranks:
            raise ir.DataError(
                f"{self.origin}: {self.size} samples for {ranks} processes, expected one each at least; "
                "give more samples or start fewer processes"
            )

    def _read(self, numbers: list[int]) -> Iterator[ir.Sample]:
        """Samples by their numbers, which rise where the data can only be walked."""
        if self.data.row is not None:
            yield from map(self.data.row, numbers)
            return
        wanted = iter(numbers)
        number = next(wanted, None)
        for place, sample in enumerate(self.data.walk()):
            if number is None:
                return
            if place == number:
                yield sample
                number = next(wanted, None)

    def split(self, share: float, seed: int) -> tuple[Samples, Samples]:
        """What is trained on, and `share` of the samples, chosen at random.

        Raises:
            DataError: there is one sample.
        """
        if self.size < 2:
            raise ir.DataError(f"{self.origin}: 1 sample cannot be split, expected 2 at least; {_GIVE}")
        train, rest = divide(self.chosen, share, seed)
        return dataclasses.replace(self, chosen=train), dataclasses.replace(self, chosen=rest)


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """What is trained on, and about `share` of the source, held out: disjoint, the same for the same seed.

    Raises:
        DataError: the source cannot be split.
    """
    if not 0 < share < 1:
        raise ir.DataError(f"holdout={share}: expected a share between 0 and 1; {_GIVE}")
    return source.split(share, seed)


def open_source(
    given: Any, model: onnx_ir.Model, *, states: Mapping[str, str] | None = None, batchable: bool
) -> Source:
    """Open training data and check it against the model.

    Args:
        given: an `.npz` file or a folder of them, as `ir.load_data` reads them; `package.module:factory`, or a factory
            itself, which makes one of what follows; `ir.Data`; arrays or tensors by input name, and `label`, whose
            first axis counts samples; a torch DataLoader or another iterable of batches that can be walked again.
            A batch is a dict by input name, with `label` if there is one, or a tuple of the inputs in the model's
            order and the label; its first axis counts samples. Loaders batch and shuffle by themselves: the run's
            batch size does not apply.
        model: the model.
        states: recurrent states, output name to input name: they start at zero for every sample. `ir.Data` brings its
            own.
        batchable: whether samples are stacked; otherwise every sample is a batch of its own.

    Raises:
        DataError: the data does not fit the model: names, types, shapes, labels, or no sample at all.
        OptionError: there is no such factory.
        IRError: the factory fails.
    """
    states = states or {}
    ir.check_states(model, states)
    stack = Stacker.of(model, states, batchable=batchable)
    if isinstance(given, str) and _is_factory(given):
        factory = ir.find_factory(given, "--train")
        return _made(_called(factory), stack, given, again=factory)
    if isinstance(given, str | Path):
        data = ir.load_data(given, model, states)
        return Samples(data, stack, np.arange(data.size), _check_labels(data, model))
    if callable(given) and not isinstance(given, Iterable):
        origin = getattr(given, "__qualname__", type(given).__name__)

        def call() -> Any:
            return ir.call_factory(given, origin)

        return _made(_called(call), stack, origin, again=call)
    return _made(given, stack, type(given).__name__)


def _called(factory: Callable[[], Any]) -> Any:
    """What a factory makes; that it fails is a fault of the data, not of the pass that is trained."""
    try:
        return factory()
    except ir.IRError as error:
        raise ir.DataError(str(error)) from error


def _is_factory(text: str) -> bool:
    return ":" in text and not text.endswith(".npz") and not Path(text).exists()


def _made(made: Any, stack: Stacker, origin: str, *, again: Callable[[], Any] | None = None) -> Source:
    """The source of an object, or of what a factory made; a generator is made again for every epoch."""
    if isinstance(made, ir.Data):
        if made.states:
            stack = Stacker.of(stack.model, made.states, batchable=stack.batchable)
        return Samples(made, stack, np.arange(made.size), _check_samples(made, stack))
    if isinstance(made, Mapping):
        data = _of_arrays(made, stack, origin)
        return Samples(data, stack, np.arange(data.size), _check_labels(data, stack.model))
    if isinstance(made, DataLoader):
        hold_loader(made, origin)
        return Stream.opened(lambda: made, stack, origin, loader=made)
    if isinstance(made, Iterator):
        if again is None:
            raise ir.DataError(
                f"{origin}: can be walked once, expected something to walk every epoch; give the function that makes it"
            )
        return Stream.opened(again, stack, origin)
    if isinstance(made, Iterable) and not isinstance(made, str | bytes | Path):
        return Stream.opened(lambda: made, stack, origin)
    raise ir.DataError(f"{origin}: is {type(made).__name__}, expected {_KINDS}; give one of them")


def _of_arrays(given: Mapping[Any, Any], stack: Stacker, origin: str) -> ir.Data:
    """Arrays by name as data."""
    arrays = {str(name): as_array(value, f"{origin}: {str(name)!r}") for name, value in given.items()}
    headers = {name: ir.Header(a.shape, a.dtype) for name, a in arrays.items()}
    ir.check_arrays(origin, headers, stack.model, stack.states)

    def row(index: int) -> ir.Sample:
        return ir.as_sample({name: array[index] for name, array in arrays.items()}, stack.model, stack.states)

    size = len(next(iter(arrays.values())))
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {headers[name]}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data if arrays[name].size else b"")
    data = ir.Data(
        lambda: map(row, range(size)),
        size,
        labelled=row(0).label is not None,
        states=stack.states,
        origin=origin,
        row=row,
        fingerprint=digest.hexdigest(),
    )
    return data


def _check_labels(data: ir.Data, model: onnx_ir.Model) -> Largest | None:
    """Refuse labels that are no finite numbers, or floats where they are classes; the largest class."""
    if not data.labelled or data.row is None:
        return None
    check = LabelCheck(model)
    for number in range(data.size):
        label = data.row(number).label
        assert label is not None  # data with labels has one a sample
        check.see(f"{data.origin}: sample {number}", label, batched=False)
    check.hold_classes(data.origin)
    return check.largest


def _check_samples(data: ir.Data, stack: Stacker) -> Largest | None:
    """Hold every sample of data from elsewhere to the model; the largest class of its labels."""
    check, place, origin = LabelCheck(stack.model), 0, data.origin or "ir.Data"
    for place, sample in enumerate(data.walk(), 1):
        where = f"{origin}: sample {place - 1}"
        plain = {name: a for name, a in sample.inputs.items() if name not in stack.states.values()}
        headers = {name: ir.Header((1, *a.shape), a.dtype) for name, a in plain.items()}
        ir.check_arrays(where, headers, stack.model, stack.states)
        if (sample.label is not None) != data.labelled:
            has = "a" if sample.label is not None else "no"
            raise ir.DataError(
                f"{where}: has {has} label, expected labelled={data.labelled} to hold for all; repair it"
            )
        if sample.label is not None:
            check.see(where, np.asarray(sample.label), batched=False)
    if place != data.size or not place:
        raise ir.DataError(f"{origin}: has {place} samples, expected {max(data.size, 1)} as it says; repair its walk")
    check.hold_classes(origin)
    return check.largest
