"""Batches of training samples: stacked where their shapes are equal, and cut apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir
import torch

from mc_opt import ir


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of equal shapes that run together.

    Attributes:
        inputs: tensors by input name, recurrent states (zeros) among them; their first axis counts samples but
            for what `axes` says. A batch of one sample that cannot be stacked holds it as it is.
        label: [size, ...], int64 or float32; None without labels.
        size: the number of samples.
        axes: the axis of an input that counts samples, where it is not the first; None for a scalar, which the
            samples share.
    """

    inputs: Mapping[str, torch.Tensor]
    label: torch.Tensor | None
    size: int
    axes: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, None if self.label is None else self.label.to(device), self.size, self.axes)

    def rows(self, start: int, stop: int) -> Batch:
        """The samples from `start` to before `stop`."""
        if start <= 0 and stop >= self.size:
            return self
        cut = slice(start, stop)
        inputs = {name: self._rows(name, tensor, cut) for name, tensor in self.inputs.items()}
        return Batch(inputs, None if self.label is None else self.label[cut], len(range(self.size)[cut]), self.axes)

    def _rows(self, name: str, tensor: torch.Tensor, cut: slice) -> torch.Tensor:
        axis = self.axes.get(name, 0)
        return tensor if axis is None else tensor[(slice(None),) * axis + (cut,)]

    def singles(self) -> Iterator[Batch]:
        """Batches of one sample each."""
        for i in range(self.size):
            yield self.rows(i, i + 1)


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several whose samples have equal shapes: the inverse of cutting it by `rows`."""
    first = batches[0]
    inputs = {}
    for name, tensor in first.inputs.items():
        axis = first.axes.get(name, 0)
        inputs[name] = tensor if axis is None else torch.cat([b.inputs[name] for b in batches], axis)
    labels = [b.label for b in batches if b.label is not None]
    return Batch(inputs, torch.cat(labels) if labels else None, sum(b.size for b in batches), first.axes)


@dataclasses.dataclass(frozen=True)
class Stacker:
    """How samples of a model become batches.

    Attributes:
        model: the model.
        states: recurrent states, output name to input name, which start every sample at zero.
        batchable: whether samples may run together.
        axes: the axis that counts samples, by input; None when samples run one by one.
    """

    model: onnx_ir.Model
    states: Mapping[str, str]
    batchable: bool
    axes: Mapping[str, int | None] | None

    @classmethod
    def of(cls, model: onnx_ir.Model, states: Mapping[str, str], *, batchable: bool) -> Stacker:
        """The stacker of a model; one that is not batchable gets batches of one sample each."""
        return cls(model, states, batchable, ir.batch_axes(model, states) if batchable else None)

    def parts(self, samples: Iterable[ir.Sample]) -> tuple[Batch, ...]:
        """The samples, those of equal shapes and scalars together, in the order in which each shape comes first."""
        groups: dict[object, list[ir.Sample]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault(self._key(sample, number), []).append(sample)
        return tuple(self._stacked(group) for group in groups.values())

    def _inputs(self) -> list[onnx_ir.Value]:
        return [v for v in self.model.graph.inputs if v.name not in self.states.values()]

    def _key(self, sample: ir.Sample, number: int) -> object:
        """Equal for samples that go together."""
        if self.axes is None:
            return number
        shapes: list[object] = [None if sample.label is None else sample.label.shape]
        for value in self._inputs():
            array = sample.inputs[str(value.name)]
            if self.axes[str(value.name)] is None:
                shapes.append(array.tobytes())
            elif array.shape[:1] != (1,):  # the sample is several to the model
                return number
            else:
                shapes.append(array.shape)
        return tuple(shapes)

    def _stacked(self, samples: Sequence[ir.Sample]) -> Batch:
        axes = self.axes or {}
        inputs: dict[str, torch.Tensor] = {}
        for value in self._inputs():
            name = str(value.name)
            arrays = [sample.inputs[name] for sample in samples]
            together = np.array(arrays[0]) if axes.get(name, 0) is None or len(arrays) == 1 else np.concatenate(arrays)
            assert value.dtype is not None  # the data was checked against the model
            inputs[name] = ir.from_array(together, ir.torch_type(value.dtype))
        states = dict(self._zeros(inputs, len(samples)))
        label = torch.from_numpy(np.stack([_plain(s.label) for s in samples])) if samples[0].label is not None else None
        counted = {name: axis for name, axis in axes.items() if axis != 0}
        return Batch(inputs | states, label, len(samples), counted)

    def _zeros(self, inputs: Mapping[str, torch.Tensor], size: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The states that every sample starts with; an open dimension takes its number from the inputs, or else 1."""
        if not self.states:
            return
        numbers: dict[str, int] = {}
        for value in self._inputs():
            for dim, number in zip(value.shape or (), inputs[str(value.name)].shape, strict=False):
                if not isinstance(dim, int) and dim.value:
                    numbers[dim.value] = number
        for value in self.model.graph.inputs:
            if value.name not in self.states.values():
                continue
            if value.shape is None or value.dtype is None:
                raise ir.DataError(f"--state: input {value.name!r} has no shape; fix it with --shape {value.name}=...")
            shape = [d if isinstance(d, int) else numbers.get(str(d.value), 1) for d in value.shape]
            axis = (self.axes or {}).get(str(value.name))
            if axis is not None and size > 1:
                shape[axis] = size
            yield str(value.name), torch.zeros(shape, dtype=ir.torch_type(value.dtype))


def _plain(label: np.ndarray | None) -> np.ndarray:
    """A label as torch's losses want it: int64, or float32."""
    assert label is not None
    return np.asarray(label, np.float32 if label.dtype.kind == "f" else np.int64)
