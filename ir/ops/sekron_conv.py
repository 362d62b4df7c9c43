"""SeKronConv: a convolution whose weight is a sum of Kronecker products, run as one small convolution a factor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where
from mc_opt.ir.ops import _kron as kron
from mc_opt.ir.ops import _kron_body as bodies

Window = dict[str, tuple[int, ...]]


def stage_windows(
    chain: kron.Chain, strides: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...]
) -> tuple[Window | None, ...]:
    """Strides, dilations and pads of each stage's convolution, factor 1 first; None is the node's own, all of it.

    Along an axis, zeros are added where the first stage with taps runs (stages without taps keep zeros zero), the
    stride is taken by the last one, and the dilation of factor k is d·Π_(j>k) K_j. An axis without taps belongs to
    the first stage.
    """
    count = len(chain.shapes)
    owners = [chain.owners(axis) or (count,) for axis in range(chain.spatial)]
    idle = [
        not chain.owners(axis) and strides[axis] == 1 and not pads[axis] and not pads[chain.spatial + axis]
        for axis in range(chain.spatial)
    ]
    homes = {k for ks, skip in zip(owners, idle, strict=True) if not skip for k in ks} or {count}
    if len(homes) == 1:
        return tuple(None if k in homes else {} for k in range(1, count + 1))
    result: list[Window] = []
    for k in range(1, count + 1):
        last, first = [ks[-1] == k for ks in owners], [ks[0] == k for ks in owners]
        spread = [math.prod(chain.kernel(j)[axis] for j in range(k + 1, count + 1)) for axis in range(chain.spatial)]
        lists = {
            "strides": tuple(s if here else 1 for s, here in zip(strides, last, strict=True)),
            "dilations": tuple(
                d * wide if taps > 1 else 1 for d, wide, taps in zip(dilations, spread, chain.kernel(k), strict=True)
            ),
            "pads": tuple(p if here else 0 for p, here in zip(pads, first * 2, strict=True)),
        }
        result.append({name: values for name, values in lists.items() if set(values) != {name != "pads"}})
    return tuple(result)


class SeKronConv(Op):
    """y = Conv(x, W) + bias with W[f, c, t] = Σ_r Π_k A⁽ᵏ⁾[r, f_k, c_k, t_k]; W is never made.

    Factor k of S ≥ 2 is [R_1|1, .., R_m|1, F_k, C_k, K_k1, .., K_kn] with the same m ≥ 0 for all, 1 where it does not
    carry a rank; f = (f_1·F_2 + f_2).. with factor 1 slowest, channels and taps likewise. Each rank is carried by at
    least two factors. strides, dilations, pads and group are those of the dense Conv (C / group = Π C_k, group
    divides F_1). Stages run from factor S to factor 1.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "bias?", "factor*")
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "strides": Attribute(onnx_ir.AttributeType.INTS),
        "dilations": Attribute(onnx_ir.AttributeType.INTS),
        "pads": Attribute(onnx_ir.AttributeType.INTS),
        "group": Attribute(onnx_ir.AttributeType.INT, 1),
    }

    def chain(self, node: onnx_ir.Node) -> kron.Chain:
        """The factors' shapes."""
        x = node.inputs[0]
        if x is None or x.shape is None:
            raise IRError(f"{where(node)}: the rank of input {x.name if x else '?'!r} is unknown; set its shape")
        shapes = tuple(static_shape(node, value) for value in node.inputs[2:])
        return kron.Chain(shapes, len(shapes[0]) - len(x.shape))

    def _lists(self, node: onnx_ir.Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        strides, dilations, pads = (tuple(node.attributes[n].as_ints()) for n in ("strides", "dilations", "pads"))
        return strides, dilations, pads

    def skeleton(self, node: onnx_ir.Node) -> bodies.Skeleton:
        """What decides the body's nodes."""
        chain = self.chain(node)
        return dataclasses.replace(
            bodies.skeleton(chain, bias=node.inputs[1] is not None),
            grouped=node.attributes["group"].as_int() > 1,
            windows=stage_windows(chain, *self._lists(node)),
            groups=tuple(math.prod(chain.rank(r) for r in s.grouped) for s in reversed(chain.stages())),
        )

    def variant(self, node: onnx_ir.Node) -> str:
        """Which extents are above 1 and which ranks a factor carries; the stage that takes strides and pads."""
        return self.skeleton(node).key

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """One Conv a factor; what is not to be summed stands in the batch or in an axis of a kernel without taps."""
        return bodies.Writer(op, self.skeleton(node)).convolution()

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of x, [n, F, positions]; a symbolic size that the window keeps stays itself."""
        chain, (strides, dilations, pads) = self.chain(node), self._lists(node)
        x = node.inputs[0]
        assert x is not None and x.shape is not None  # chain() saw to it
        dims: list[Any] = [x.shape[0], chain.dense()[0]]
        for axis, k in enumerate(chain.dense()[2:]):
            size = x.shape[2 + axis]
            free = pads[axis] + pads[chain.spatial + axis] - dilations[axis] * (k - 1)
            if isinstance(size, int):
                dims.append((size + free - 1) // strides[axis] + 1)
            else:
                dims.append(size if free == 0 and strides[axis] == 1 else onnx_ir.SymbolicDim(None))
        return [(dtype_of(node, x), onnx_ir.Shape(dims))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that the factors fit each other, the input, the bias and the window.

        Raises:
            IRError: for the first that does not.
        """
        super().check(node)
        bodies.check_factors(node)
        chain, group, x = self.chain(node), node.attributes["group"].as_int(), node.inputs[0]
        assert x is not None and x.shape is not None  # chain() saw to it
        if not 1 <= len(x.shape) - 2 <= 3:
            raise IRError(f"{where(node)}: x has rank {len(x.shape)}, expected 3, 4 or 5; leave the Conv dense")
        bodies.check_chain(node, chain)
        outputs, channels = chain.dense()[:2]
        if group < 1 or chain.outputs(1) % group:
            raise IRError(f"{where(node)}: group is {group}, expected a divisor of F_1 = {chain.outputs(1)}")
        if isinstance(x.shape[1], int) and x.shape[1] != channels * group:
            raise IRError(
                f"{where(node)}: x has {x.shape[1]} channels, expected {channels * group}, group times the product of "
                "the factors' inputs; correct the factors"
            )
        bodies.check_bias(node, outputs)
        for name, values in zip(("strides", "dilations", "pads"), self._lists(node), strict=True):
            count, least = (2 * chain.spatial, 0) if name == "pads" else (chain.spatial, 1)
            if len(values) != count or min(values) < least:
                raise IRError(f"{where(node)}: {name} is {list(values)}, expected {count} numbers of at least {least}")

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """Factors are stored as they are trained; the body carries the gradients."""
        return True

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """A factor's rows are what one output channel of its stage sums over."""
        return bodies.row_axes(self.skeleton(node), index - 1) if index > 1 else None

    def work(self, node: onnx_ir.Node) -> Work:
        """The multiplications of every stage where it runs; symbolic sizes count as 1."""
        x, y = node.inputs[0], self.types(node)[0][1]
        assert x is not None and x.shape is not None  # chain() saw to it
        outputs, inputs = (
            math.prod(d if isinstance(d, int) else 1 for d in (shape[0], *shape[2:])) for shape in (y, x.shape)
        )
        return kron.factored_work(
            self.chain(node).shapes,
            self.chain(node).ranks,
            outputs=outputs,
            inputs=inputs,
            group=node.attributes["group"].as_int(),
            itemsize=int(dtype_of(node, x).itemsize),
        )

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Two and three factors of every structure; each kind of window; groups; one to three spatial axes."""
        yield _sample(rng, "gkpd", [(3, 2, 2, 1, 1), (3, 2, 3, 3, 3)], pads=1)
        yield _sample(rng, "gkpd-bias", [(3, 2, 2, 1, 1), (3, 2, 3, 3, 3)], pads=1, bias=True)
        yield _sample(rng, "gkpd-outer", [(3, 2, 2, 3, 3), (3, 2, 3, 1, 1)], pads=1, strides=2)
        yield _sample(rng, "split", [(2, 4, 2, 3, 1), (2, 2, 2, 1, 3)], pads=1, strides=2, dilations=2, size=9)
        yield _sample(rng, "composite", [(2, 4, 2, 2, 3), (2, 2, 2, 2, 1)], pads=2, strides=2, dilations=2, size=11)
        yield _sample(rng, "pointwise", [(2, 4, 2, 1, 1), (2, 2, 4, 1, 1)], strides=2, pads=1)
        yield _sample(rng, "low-rank", [(5, 6, 1, 1, 1), (5, 1, 4, 3, 3)], strides=2, pads=1, bias=True)
        yield _sample(rng, "product", [(4, 2, 1, 1), (2, 3, 3, 3)], ranks=0, bias=True)
        yield _sample(rng, "groups", [(2, 6, 2, 1, 1), (2, 2, 3, 3, 3)], pads=1, group=3)
        yield _sample(rng, "groups-outer", [(2, 4, 1, 3, 3), (2, 2, 3, 1, 1)], strides=2, group=2, bias=True)
        yield _sample(rng, "cp", [(4, 6, 1, 1, 1), (4, 1, 1, 3, 1), (4, 1, 1, 1, 3), (4, 1, 5, 1, 1)], pads=1)
        yield _sample(rng, "tucker", [(1, 3, 6, 1, 1, 1), (4, 3, 1, 1, 3, 3), (4, 1, 1, 5, 1, 1)], ranks=2, pads=1)
        yield _sample(
            rng, "tucker-core-first", [(1, 3, 6, 1, 1, 1), (4, 1, 1, 5, 1, 1), (4, 3, 1, 1, 3, 3)], ranks=2, pads=1
        )
        yield _sample(rng, "tt", [(1, 3, 2, 2, 1, 1), (4, 3, 2, 1, 3, 3), (4, 1, 1, 3, 1, 1)], ranks=2, pads=1)
        yield _sample(rng, "free", [(2, 1, 2, 2, 1, 1), (2, 3, 2, 2, 1, 3), (2, 3, 2, 2, 3, 1)], ranks=2, bias=True)
        yield _sample(
            rng, "free-groups", [(2, 1, 4, 1, 3, 3), (2, 3, 2, 1, 1, 1), (2, 3, 1, 3, 1, 1)], ranks=2, group=2
        )
        yield _sample(rng, "line", [(3, 4, 2, 1), (3, 2, 3, 5)], pads=2)
        yield _sample(rng, "volume", [(2, 2, 2, 1, 1, 1), (2, 2, 3, 3, 3, 3)], pads=1, size=5)
        yield _sample(rng, "half", [(2, 2, 2, 1, 1), (2, 2, 3, 3, 3)], pads=1, dtype=np.float16)


def _sample(
    rng: np.random.Generator,
    name: str,
    shapes: list[tuple[int, ...]],
    *,
    ranks: int = 1,
    strides: int = 1,
    dilations: int = 1,
    pads: int = 0,
    group: int = 1,
    bias: bool = False,
    size: int = 7,
    dtype: type = np.float32,
) -> Example:
    chain = kron.Chain(tuple(shapes), ranks)
    outputs, channels = chain.dense()[:2]
    n = chain.spatial
    # Sizes differ between axes, so that an exchange shows; sums stay near 1.
    x: np.ndarray = rng.standard_normal((2, channels * group, *range(size, size + n))).astype(dtype)
    spread = math.prod(chain.dense()[1:]) * math.prod(chain.rank(r) for r in range(ranks))
    scale = spread ** (-0.5 / len(shapes))
    factors = [(rng.standard_normal(shape) * scale).astype(dtype) for shape in shapes]
    given: np.ndarray | None = rng.standard_normal(outputs).astype(dtype) if bias else None
    attributes = {"strides": (strides,) * n, "dilations": (dilations,) * n, "pads": (pads,) * 2 * n, "group": group}
    return Example(name, (x, given, *factors), attributes)
