"""Labels of training samples: what they may be, beside what the model gives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir

from mc_opt import ir


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest class of all labels that were seen, and where it is."""

    where: str
    value: int


@dataclasses.dataclass
class LabelCheck:
    """Looks at labels as they come, one sample's or one batch's at a time; labels are finite numbers, -1 among them.

    Attributes:
        model: the model whose outputs the labels belong to.
        largest: of whole numbers; None before the first.
    """

    model: onnx_ir.Model
    largest: Largest | None = None
    _whole: ir.Header | None = None
    _is_broken: bool = False

    def see(self, where: str, label: np.ndarray, *, batched: bool) -> None:
        """Look at the label of one sample, or at those of a batch along its first axis.

        Raises:
            DataError: they are no numbers, or not finite.
        """
        header = ir.Header(label.shape, label.dtype)
        if label.dtype.kind not in "biuf":
            raise ir.DataError(f"{where}: label is {header}, expected whole numbers (classes) or floats; convert it")
        if label.dtype.kind != "f":
            most = int(label.max()) if label.size else -1
            if self.largest is None or most > self.largest.value:
                self.largest = Largest(where, most)
            return
        bad = int(label.size - np.isfinite(label).sum())
        if bad:
            raise ir.DataError(
                f"{where}: label is {header} with {bad} NaN or infinite, expected finite numbers; drop those samples"
            )
        self._is_broken = self._is_broken or bool((label != np.rint(label)).any())
        self._whole = ir.Header(label.shape[1:] if batched else label.shape, label.dtype)

    def hold_classes(self, where: str) -> None:
        """Refuse labels that all were whole numbers in floats, and that no output could be compared with as they are.

        Raises:
            DataError: naming the output whose classes they seem to be.
        """
        if self._whole is None or self._is_broken:
            return
        outputs = self.model.graph.outputs
        if any(_may_equal(value, self._whole.shape) for value in outputs):
            return
        raise ir.DataError(
            f"{where}: label is {self._whole} of whole numbers, expected integers for the classes of "
            f"{outputs[0].name} {ir.type_text(outputs[0])}; convert it with astype('int64')"
        )


def _may_equal(output: onnx_ir.Value, label: tuple[int, ...]) -> bool:
    """Whether an output has, a sample, as many numbers as the label; True when that is open."""
    if output.shape is None:
        return True
    dims = output.shape.dims
    counted = dims[1:] if dims and (not isinstance(dims[0], int) or dims[0] == 1) else dims
    numbers = [d for d in counted if isinstance(d, int)]
    return len(numbers) < len(counted) or math.prod(numbers) == math.prod(label)
