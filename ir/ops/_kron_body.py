"""The bodies of Kronecker chains: one convolution or product a stage, and what brings the axes into its order.

Between stages the tensor's channel axis is a list of dimensions, slowest first: the input channels c_1 .. c_k that
are still to be summed, the live rank indices, the output channels f_(k+1) .. f_S made so far. A stage sees it as
[batch, channels, rest]: what stands before its own channels goes to the batch, what stands behind them is a depth
axis of a kernel without taps, so that neither moves. Dimensions of extent 1 are no dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body, dtype_of, static_shape, where
from mc_opt.ir.ops._kron import Chain, Stage

Axes = list[list[str]]
"""The tensor's axes, spatial ones left out: the dimensions in each, slowest first."""


@dataclass(frozen=True)
class Skeleton:
    """All of a node that decides which nodes its body has: which extents are above 1, never the extents.

    Attributes:
        spatial: the number of spatial axes.
        ranks: the number of rank axes.
        outputs: whether F_k > 1, a factor each.
        inputs: whether C_k > 1.
        taps: whether the kernel of factor k has more than one tap.
        stages: the stages as they run.
        bias: whether there is a bias.
        grouped: whether the dense convolution has groups.
        windows: the attributes of each stage's convolution, a factor each: whole lists where stages share what the
            node says, None where the stage takes the node's own.
        groups: the rank groups of each stage's convolution, a factor each.
        reverse: factor 1 runs first.
    """

    spatial: int
    ranks: int
    outputs: tuple[bool, ...]
    inputs: tuple[bool, ...]
    taps: tuple[bool, ...]
    carried: tuple[tuple[int, ...], ...]
    stages: tuple[Stage, ...]
    bias: bool
    grouped: bool = False
    windows: tuple[dict[str, tuple[int, ...]] | None, ...] = ()
    groups: tuple[int, ...] = ()
    reverse: bool = False

    @property
    def key(self) -> str:
        """The overload: axes, then a letter for each extent above 1 and the ranks carried, a factor each."""
        parts = []
        for k, ranks in enumerate(self.carried):
            flags = zip("fck", (self.outputs[k], self.inputs[k], self.taps[k]), strict=True)
            parts.append("".join(letter for letter, given in flags if given) + "".join(map(str, ranks)))
        text = f"n{self.spatial}m{self.ranks}.{'-'.join(parts)}"
        for k, window in enumerate(self.windows):
            if window:
                lists = (f"{name[0]}{'_'.join(map(str, values))}" for name, values in window.items())
                text += f".w{k + 1}{''.join(lists)}"
            elif window is None:
                text += f".w{k + 1}"
        text += "".join(f".r{k + 1}_{g}" for k, g in enumerate(self.groups) if g > 1)
        marks = ((self.grouped, "g"), (self.reverse, "r"), (self.bias, "b"))
        return text + "".join(f".{letter}" for given, letter in marks if given)


def skeleton(chain: Chain, *, bias: bool, reverse: bool = False) -> Skeleton:
    """The skeleton of a linear layer; a convolution adds its geometry."""
    numbers = range(1, len(chain.shapes) + 1)
    return Skeleton(
        spatial=chain.spatial,
        ranks=chain.ranks,
        outputs=tuple(chain.outputs(k) > 1 for k in numbers),
        inputs=tuple(chain.inputs(k) > 1 for k in numbers),
        taps=tuple(any(t > 1 for t in chain.kernel(k)) for k in numbers),
        carried=tuple(chain.carried(k) for k in numbers),
        stages=chain.stages(reverse=reverse),
        bias=bias,
        reverse=reverse,
    )


def row_axes(frame: Skeleton, factor: int) -> tuple[int, ...]:
    """The axes of a factor that number the output channels of its stage: the ranks that it hands on, and F_k."""
    stage = next(s for s in frame.stages if s.factor == factor)
    return (*sorted((*stage.grouped, *stage.made)), frame.ranks)


class Writer:
    """Writes the body of one skeleton."""

    def __init__(self, op: Body, frame: Skeleton) -> None:
        self.op = op
        self.frame = frame
        count = len(frame.outputs)
        channels = [f"c{k + 1}" for k in range(count) if frame.inputs[k]]
        self.axes: Axes = [["n"], [*(["g"] if frame.grouped else []), *channels]]
        self.known: dict[str, onnx_ir.Value] = {}

    def convolution(self) -> onnx_ir.Value:
        """Stages as convolutions."""
        y, frame = self.op.input("x"), self.frame
        for stage in frame.stages:
            channels, before, after = self.place(stage)
            # A kernel without taps takes what stands behind its channels as one more spatial axis, where it stays. With
            # taps a transposition costs ONNX Runtime less than the columns that it makes of three spatial axes.
            deep = bool(after) and not frame.taps[stage.factor - 1] and frame.spatial < 3
            want = [before, channels, after] if deep else [before + after, channels]
            y = self.arrange(y, want)
            weight = self.weight(stage, channels, deep=deep)
            last = stage is frame.stages[-1]
            plain = last and not after
            bias = [self.op.input("bias")] if plain and frame.bias else []
            y = self.op.Conv(y, weight, *bias, **self.window(stage))
            self.axes = [*([before] if deep else [before + after]), self.made(stage), *([after] if deep else [])]
        y = self.arrange(y, [["n"], [f"f{k + 1}" for k, given in enumerate(frame.outputs) if given]])
        if frame.bias and after:
            axes = self.op.constant(list(range(1, frame.spatial + 1)))
            y = self.op.Add(y, self.op.Unsqueeze(self.op.input("bias"), axes))
        return y

    def product(self) -> onnx_ir.Value:
        """Stages as matrix products, rows being all that leads the last axis of x."""
        x, frame = self.op.input("x"), self.frame
        y, viewed = x, False
        for stage in frame.stages:
            channels, before, after = self.place(stage)
            groups = [d for d in channels if d in {f"r{r}" for r in stage.grouped}]
            summed = [d for d in channels if d not in groups]
            left = bool(after or groups)
            want = [before, *([groups] if groups else []), summed, *([after] if left else [])]
            viewed = viewed or want != self.axes
            y = self.arrange(y, want)
            weight = self.matrix(stage, channels, left=left)
            y = self.op.MatMul(weight, y) if left else self.op.MatMul(y, weight)
            made = [d for d in self.made(stage) if d not in groups]
            self.axes = [before, *([groups] if groups else []), made, *([after] if left else [])]
        if viewed:
            y = self.op.Reshape(y, self.shape([self.op.Shape(x, end=-1), -1]))
        return self.op.Add(y, self.op.input("bias")) if frame.bias else y

    def place(self, stage: Stage) -> tuple[list[str], list[str], list[str]]:
        """The dimensions of a stage's channels, those that stand before them, those behind."""
        own = {f"c{stage.factor}", *(f"r{r}" for r in (*stage.grouped, *stage.summed))}
        if stage is self.frame.stages[-1]:
            own.add("g")
        order = [d for axis in self.axes for d in axis]
        mine = [d for d in order if d in own]
        groups = ["g"] + [f"r{r}" for r in stage.grouped]
        channels = [d for d in mine if d in groups] + [d for d in mine if d not in groups]
        # What a stage makes never stands behind outputs that are slower than its own.
        first = min([*(order.index(d) for d in mine), self._boundary(order)])
        before = [d for d in order[:first] if d not in own]
        return channels, before, [d for d in order[first:] if d not in own]

    def _boundary(self, order: list[str]) -> int:
        """Where a stage's outputs may begin: before the faster ones that are there; in reverse, behind the slower."""
        outputs = [i for i, d in enumerate(order) if d[0] == "f"]
        if self.frame.reverse:
            return max(outputs, default=0) + 1
        return min(outputs, default=len(order))

    def made(self, stage: Stage) -> list[str]:
        """The dimensions of a stage's output channels."""
        ranks = [f"r{r}" for r in (*stage.grouped, *stage.made)]
        outputs = [f"f{stage.factor}"] if self.frame.outputs[stage.factor - 1] else []
        return outputs + ranks if self.frame.reverse else ranks + outputs

    def arrange(self, y: onnx_ir.Value, want: Axes) -> onnx_ir.Value:
        """The tensor under the axes `want`: a view if the order of dimensions stays, else transposed."""
        have, self.axes = self.axes, want
        if have == want:
            return y
        order, wanted = [d for axis in have for d in axis], [d for axis in want for d in axis]
        assert sorted(order) == sorted(wanted), (have, want)
        if order != wanted:
            single = [[d] for d in order]
            if have != single or not self.frame.spatial:  # the rows of a linear layer may be several axes
                y = self.reshape(y, have, single)
            perm = [order.index(d) for d in wanted]
            places = range(len(order), len(order) + self.frame.spatial)
            y = self.op.Transpose(y, perm=[*perm, *places])
            have = [[d] for d in wanted]
        return y if have == want else self.reshape(y, have, want)

    def reshape(self, y: onnx_ir.Value, have: Axes, want: Axes) -> onnx_ir.Value:
        """View y under the axes `want`."""
        entries: list[onnx_ir.Value | int | list[str]] = [-1, *want[1:]]
        if self.frame.spatial and want[0] == have[0] == ["n"]:
            entries[0] = 0
            longest = max(range(1, len(want)), key=lambda i: len(want[i]))
            entries[longest] = -1
        sizes = [self.size(e) if isinstance(e, list) else e for e in entries]
        if self.frame.spatial:
            sizes.append(self.op.Shape(y, start=-self.frame.spatial))
        return self.op.Reshape(y, self.shape(sizes))

    def shape(self, entries: Sequence[onnx_ir.Value | int]) -> onnx_ir.Value:
        """A shape of numbers and 1-D tensors."""
        parts: list[onnx_ir.Value | list[int]] = []
        for entry in entries:
            if not isinstance(entry, int):
                parts.append(entry)
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(entry)
            else:
                parts.append([entry])
        values = [self._numbers(p) if isinstance(p, list) else p for p in parts]
        return values[0] if len(values) == 1 else self.op.Concat(*values, axis=0)

    def _numbers(self, numbers: list[int]) -> onnx_ir.Value:
        name = str(numbers)
        if name not in self.known:
            self.known[name] = self.op.constant(numbers)
        return self.known[name]

    def size(self, dimensions: Sequence[str]) -> onnx_ir.Value | int:
        """The extent of merged dimensions, as a tensor of one element."""
        total: onnx_ir.Value | None = None
        for d in dimensions:
            if d not in self.known:
                self.known[d] = self._extent(d)
            total = self.known[d] if total is None else self.op.Mul(total, self.known[d])
        return 1 if total is None else total

    def _extent(self, dimension: str) -> onnx_ir.Value:
        if dimension == "g":
            return self.op.Unsqueeze(self.op.scalar("group"), self.op.constant([0]))
        factor, axis = self._home(dimension)
        return self.op.Shape(self.op.input(f"factor{factor}"), start=axis, end=axis + 1)

    def _home(self, dimension: str) -> tuple[int, int]:
        """The factor and the axis that have a dimension's extent."""
        number = int(dimension[1:])
        if dimension[0] == "r":
            return next(k + 1 for k, ranks in enumerate(self.frame.carried) if number in ranks), number
        return number, self.frame.ranks + (dimension[0] == "c")

    def weight(self, stage: Stage, channels: Sequence[str], *, deep: bool) -> onnx_ir.Value:
        """The factor as a convolution's weight: [made, channels of a group, 1 of a depth axis, *kernel]."""
        factor = self.op.input(f"factor{stage.factor}")
        outer = self.made(stage)
        groups = {"g", *(f"r{r}" for r in stage.grouped)}
        inner = [d for d in channels if d not in groups]
        m, n = self.frame.ranks, self.frame.spatial
        if m == 0 and not deep:
            return factor
        factor = self._ordered(factor, stage, outer, inner)
        first = 0 if not self._merged(outer) else -1
        second: onnx_ir.Value | int = -1 if first == 0 else self.size(inner)
        taps = self.frame.taps[stage.factor - 1]
        kernel = [self.op.Shape(factor, start=-n)] if taps else [1] * n
        return self.op.Reshape(factor, self.shape([first, second, *([1] if deep else []), *kernel]))

    def matrix(self, stage: Stage, channels: Sequence[str], *, left: bool) -> onnx_ir.Value:
        """The factor as a matrix: [groups, made, channels] to stand on the left, [channels, made] on the right."""
        factor = self.op.input(f"factor{stage.factor}")
        ranks = [f"r{r}" for r in stage.grouped]
        outer = [d for d in self.made(stage) if d not in ranks]
        inner = [d for d in channels if d not in ranks]
        first, second = (outer, inner) if left else (inner, outer)
        if self.frame.ranks == 0:
            return factor if left else self.op.Transpose(factor, perm=[1, 0])
        factor = self._ordered(factor, stage, [*ranks, *first], second)
        shape = [*(self.size([r]) for r in ranks), self.size(first), -1]
        return self.op.Reshape(factor, self.shape(shape))

    def _merged(self, dimensions: Sequence[str]) -> bool:
        return any(d[0] == "r" for d in dimensions)

    def _ordered(
        self, factor: onnx_ir.Value, stage: Stage, outer: Sequence[str], inner: Sequence[str]
    ) -> onnx_ir.Value:
        """The factor's axes transposed to outer, inner, kernel; axes of extent 1 go where they are in nobody's way."""
        m, n = self.frame.ranks, self.frame.spatial
        names = [f"r{r}" for r in range(m)] + [f"f{stage.factor}", f"c{stage.factor}"]
        leading = [names.index(d) for d in outer]
        if f"f{stage.factor}" not in outer and f"f{stage.factor}" not in inner and not self._merged(outer):
            leading = [m, *leading]
        trailing = [names.index(d) for d in inner]
        rest = [i for i in range(m + 2) if i not in leading and i not in trailing]
        perm = [*leading, *trailing, *rest, *range(m + 2, m + 2 + n)]
        return factor if perm == sorted(perm) else self.op.Transpose(factor, perm=perm)

    def window(self, stage: Stage) -> dict[str, object]:
        """The attributes of a stage's convolution."""
        kinds = onnx_ir.AttributeType
        given = self.frame.windows[stage.factor - 1]
        found: dict[str, object] = dict(given or {})
        if given is None:
            found = {name: onnx_ir.RefAttr(name, name, kinds.INTS) for name in ("strides", "dilations", "pads")}
        if stage is self.frame.stages[-1] and self.frame.grouped:
            found["group"] = onnx_ir.RefAttr("group", "group", kinds.INT)
        elif self.frame.groups[stage.factor - 1] > 1:
            found["group"] = self.frame.groups[stage.factor - 1]
        return found


def check_factors(node: onnx_ir.Node) -> None:
    """Check that there are at least two factors, all of the type of x and of one rank.

    Raises:
        IRError: otherwise.
    """
    x, *factors = node.inputs[0], *node.inputs[2:]
    if len(factors) < 2:
        raise IRError(f"{where(node)} has {len(factors)} factors, expected at least 2; leave the layer dense")
    for k, value in enumerate(factors):
        if dtype_of(node, value) != dtype_of(node, x):
            raise IRError(
                f"{where(node)}: factor {k + 1} is {dtype_of(node, value)}, expected {dtype_of(node, x)}, the type of x"
            )
        if len(static_shape(node, value)) != len(static_shape(node, factors[0])):
            raise IRError(
                f"{where(node)}: factor {k + 1} is {list(static_shape(node, value))}, expected the rank of factor 1, "
                f"{list(static_shape(node, factors[0]))}; give every factor the same rank axes, 1 where it carries none"
            )


def check_chain(node: onnx_ir.Node, chain: Chain) -> None:
    """Check the rank axes.

    Raises:
        IRError: for the first that is wrong.
    """
    if chain.ranks < 0:
        raise IRError(
            f"{where(node)}: factor 1 is {list(chain.shapes[0])}, expected [ranks.., outputs, inputs, kernel..] with "
            "a kernel axis for each spatial axis of x"
        )
    if min(min(shape) for shape in chain.shapes) < 1:
        raise IRError(f"{where(node)}: a factor is empty; leave the layer dense")
    for axis in range(chain.ranks):
        held = [shape[axis] for shape in chain.shapes]
        if set(held) - {1, max(held)}:
            raise IRError(f"{where(node)}: rank axis {axis} is {held} in the factors, expected 1 or one number")
        if max(held) > 1 and held.count(max(held)) == 1:
            raise IRError(
                f"{where(node)}: rank axis {axis} is {held} in the factors, expected at least two that carry it; "
                "sum the one factor over it"
            )


def check_bias(node: onnx_ir.Node, outputs: int) -> None:
    """Check a bias.

    Raises:
        IRError: when it is not [outputs] of the type of x.
    """
    bias = node.inputs[1]
    if bias is None:
        return
    if static_shape(node, bias) != (outputs,) or dtype_of(node, bias) != dtype_of(node, node.inputs[0]):
        raise IRError(
            f"{where(node)}: bias is {dtype_of(node, bias)}{list(static_shape(node, bias))}, expected "
            f"{dtype_of(node, node.inputs[0])}[{outputs}]; correct the pass"
        )
