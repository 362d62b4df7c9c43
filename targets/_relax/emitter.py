"""The state of one lowering: which Relax expression, layout or constant stands for each ONNX value.

A handler takes the emitter and a node, asks for its inputs in the layout it wants and sets its outputs:

    def relu(e: Emitter, node: onnx_ir.Node) -> None:
        x = e.plain(node.inputs[0])
        y = e.te(lambda a: te.compute(a.shape, lambda *i: tirx.max(a(*i), 0.0)), x, name="relu")
        e.set(node.outputs[0], y)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.ir import IRError
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims, folding
from mc_opt.targets._relax.dims import Dim, Shape
from mc_opt.targets._relax.moves import Moves
from mc_opt.targets.kernels._choice import Choices

Layout = Literal["plain", "nhwc"]
Handler = Callable[["Emitter", onnx_ir.Node], None]


@dataclasses.dataclass(frozen=True)
class LookupWeight:
    """A weight in packed form, as `mc_opt.Lookup` holds it; see the op for the meaning of the fields.

    Attributes:
        codes: packed codes, uint8 [bytes], of the canonical matrix [R, K] in row-major order.
        codebook: [n], or [R|1, G|1, n].
        scale: [1, 1], [R, 1] or [R, G]; None stands for 1.
        offset: shaped like a scale; None stands for 0.
        shape: the shape of the decoded weight.
        axes: its row axes.
        group_size: columns that share a scale; 0 for a whole row.
        bits: the width of a code.
    """

    codes: np.ndarray
    codebook: np.ndarray
    scale: np.ndarray | None
    offset: np.ndarray | None
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    group_size: int
    bits: int


@dataclasses.dataclass
class _Held:
    """What is known of one value; at least one of `array`, `sizes`, `plain`, `nhwc` and `make` is there."""

    shape: Shape
    array: np.ndarray | None = None
    sizes: np.ndarray | None = None
    kind: str | None = None  # the element type of `sizes`
    plain: relax.Expr | None = None
    nhwc: relax.Expr | None = None
    make: Callable[[], relax.Expr] | None = None


def to_nhwc(rank: int) -> tuple[int, ...]:
    """The permutation from ONNX's own layout to channels last: (0, 2, .., rank-1, 1)."""
    return (0, *range(2, rank), 1)


def to_plain(rank: int) -> tuple[int, ...]:
    """The permutation from channels last back to ONNX's own layout: (0, rank-1, 1, .., rank-2)."""
    return (0, rank - 1, *range(1, rank - 1))


def transposed(x: te.Tensor, perm: Sequence[int]) -> te.Tensor:
    """Returns x transposed by `perm`, as numpy does it."""
    inverse = [perm.index(axis) for axis in range(len(perm))]
    return te.compute([x.shape[axis] for axis in perm], lambda *i: x(*[i[k] for k in inverse]), name="transpose")


class Emitter:
    """Builds the Relax function of one model, node by node."""

    def __init__(self, model: onnx_ir.Model, machine: Machine, bb: relax.BlockBuilder | None = None) -> None:
        self.bb, self.machine, self.model = bb or relax.BlockBuilder(), machine, model
        self.kernels, self.fallbacks, self.emitted = list[str](), list[str](), list[str]()
        self.names: dict[str, tirx.Var] = {}  # the open dimensions of the inputs
        self.moves = Moves()
        self.limits: dict[str, int] = {}  # the largest sizes that the model takes
        self.states: Mapping[str, str] = {}  # outputs that may be written in place of inputs
        self.choices = Choices()  # of tiles
        self.shares = False  # whether another function of the module has the same weights
        self.ahead: dict[onnx_ir.Value, tuple[str, ...]] = {}  # outputs of later nodes that a handler set: its kernels
        self._held: dict[onnx_ir.Value, _Held] = {}
        self._weights: dict[int, tuple[np.ndarray, relax.Expr]] = {}

    def dimension(self, name: str) -> tirx.Var:
        """The variable of an open dimension of the inputs."""
        return self.names.setdefault(name, tirx.Var(name, "int64"))

    # what a handler asks

    def constant(self, value: onnx_ir.Value | None) -> np.ndarray | None:
        """The value's data if it is known while building: an initialiser, a folded node, a static shape."""
        held = self._find(value)
        return None if held is None else held.array

    def sizes(self, value: onnx_ir.Value | None) -> np.ndarray | None:
        """Integers that are known but for the open dimensions, as in a computed shape: an array of extents."""
        held = self._find(value)
        if held is None or held.array is None:
            return None if held is None else held.sizes
        return held.array.astype(object) if held.array.dtype.kind in "iu" else None

    def shape(self, value: onnx_ir.Value) -> Shape:
        """The value's shape in ONNX's own layout."""
        return self._get(value).shape

    def dtype(self, value: onnx_ir.Value) -> str:
        """The value's element type, in numpy's words."""
        held = self._get(value)
        if held.array is not None:
            return str(held.array.dtype)
        if held.kind is not None:
            return held.kind
        expr = held.nhwc if held.nhwc is not None else held.plain
        if expr is not None:
            return str(expr.ty.dtype)
        if value.dtype is None:
            raise IRError(f"{value.name}: the value has no type; run shape inference first")
        return str(np.dtype(value.dtype.numpy()))

    def layout(self, value: onnx_ir.Value) -> Layout:
        """How the value is held now; a constant counts as plain."""
        held = self._get(value)
        return "nhwc" if held.nhwc is not None and held.plain is None and held.array is None else "plain"

    def plain(self, value: onnx_ir.Value) -> relax.Expr:
        """The value in ONNX's own layout; emits a constant, a decode or a transpose when none was made yet."""
        held = self._get(value)
        if held.plain is None:
            held.plain = self._make_plain(held)
        return held.plain

    def nhwc(self, value: onnx_ir.Value) -> relax.Expr:
        """The value channels last ([N, H, W, C], [N, L, C]); emits a transpose when it is not held so."""
        held = self._get(value)
        if held.nhwc is not None:
            return held.nhwc
        perm = to_nhwc(len(held.shape))
        if held.array is not None:
            held.nhwc = self.weight(np.ascontiguousarray(held.array.transpose(perm)))
        else:
            held.nhwc = self._transpose(self.plain(value), perm)
        return held.nhwc

    def lookup(self, value: onnx_ir.Value | None) -> LookupWeight | None:
        """The packed weight behind a value that `mc_opt.Lookup` makes from constants; None for any other value."""
        node = None if value is None else value.producer()
        if node is None or node.domain != "mc_opt" or node.op_type != "Lookup":
            return None
        arrays = [None if v is None else self._small(v) for v in node.inputs]
        if any(a is None and v is not None for a, v in zip(arrays, node.inputs, strict=True)):
            return None
        codes, codebook, scale, offset = (*arrays, None, None)[:4]
        assert codes is not None and codebook is not None  # the op requires them
        return LookupWeight(
            codes=codes,
            codebook=codebook,
            scale=scale,
            offset=offset,
            shape=tuple(self.attribute(node, "shape", ())),
            axes=tuple(self.attribute(node, "axes", ())),
            group_size=int(self.attribute(node, "group_size", 0)),
            bits=int(self.attribute(node, "bits", 0)),
        )

    def attribute(self, node: onnx_ir.Node, name: str, default: Any) -> Any:
        """The value of a node's attribute (str, int, float, tuple or numpy array), or the default."""
        attribute = node.attributes.get(name)
        if attribute is None:
            return default
        match attribute.type:
            case onnx_ir.AttributeType.TENSOR:
                return attribute.as_tensor().numpy()
            case onnx_ir.AttributeType.INTS:
                return tuple(attribute.as_ints())
            case onnx_ir.AttributeType.FLOATS:
                return tuple(attribute.as_floats())
            case onnx_ir.AttributeType.STRINGS:
                return tuple(attribute.as_strings())
            case _:
                return attribute.value

    # what a handler makes

    def te(self, fn: Callable[..., Any], *args: relax.Expr, name: str) -> relax.Var:
        """Emit the kernel that the tensor expression `fn(*args)` describes."""
        return self.kernel(fn, *args, name=name)

    def moved(self, fn: Callable[..., Any], *args: relax.Expr, name: str) -> relax.Var:
        """Emit a kernel that pads, transposes or decodes: each element from a few of its inputs'."""
        return self.moves.add(self.te(fn, *args, name=name), fn, args)

    def tuple_te(self, fn: Callable[..., Sequence[Any]], *args: relax.Expr, name: str) -> list[relax.Var]:
        """Emit one kernel with several outputs."""
        result = self.kernel(fn, *args, name=name)
        return [self.bb.emit(relax.TupleGetItem(result, k)) for k in range(len(result.ty.fields))]

    def kernel(
        self, fn: Callable[..., Any], *args: relax.Expr, name: str, attributes: dict[str, int] | None = None
    ) -> relax.Var:
        """Emit the kernel of a tensor expression, with attributes of its PrimFunc."""
        self.emitted.append(name)
        if not self.names:
            return self.bb.emit_te(fn, *args, primfunc_name_hint=name, primfunc_attrs=attributes)
        # emit_te would give the arguments dimensions of their own, which are not those that `fn` holds.
        tensors = [te.placeholder(tuple(a.ty.shape), str(a.ty.dtype), name=f"p{k}") for k, a in enumerate(args)]
        made = fn(*tensors)
        results = [made] if isinstance(made, te.Tensor) else list(made)
        free = _free(te.create_prim_func([*tensors, *results], "int64"), self.names)
        function = te.create_prim_func([*tensors, *free, *results], "int64").without_attr("global_symbol")
        if attributes:
            function = function.with_attrs(attributes)
        types = [relax.TensorType(dims.sizes(r), str(r.dtype)) for r in results]
        variable = self.bb.add_func(function, name)
        return self.bb.emit(relax.call_tir(variable, [*args, *free], types[0] if len(types) == 1 else types))

    def call(
        self,
        prim_func: Any,
        args: Sequence[relax.Expr],
        outputs: Sequence[tuple[Sequence[Dim], str]],
        *,
        name: str,
    ) -> list[relax.Var]:
        """Emit a call of a ready PrimFunc (inputs first, then outputs); returns one variable an output."""
        self.emitted.append(name)
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outputs]
        made = relax.call_tir(self.bb.add_func(prim_func, name), list(args), types[0] if len(types) == 1 else types)
        result = self.bb.emit(made)
        return [result] if len(types) == 1 else [self.bb.emit(relax.TupleGetItem(result, k)) for k in range(len(types))]

    def weight(self, array: np.ndarray) -> relax.Expr:
        """A constant of the artefact; the same array object becomes one constant."""
        known = self._weights.get(id(array))
        if known is None:  # the array is kept too, so that its id stays its own
            known = self._weights[id(array)] = (array, relax.const(np.asarray(array, order="C"), str(array.dtype)))
        return known[1]

    def set(self, value: onnx_ir.Value, expr: relax.Expr, layout: Layout = "plain") -> None:
        """State what computes a value, and in which layout."""
        shape = tuple(dims.sizes(expr))
        if layout == "plain":
            self._held[value] = _Held(shape, plain=expr)
        else:
            self._held[value] = _Held(tuple(shape[k] for k in to_plain(len(shape))), nhwc=expr)

    def set_ahead(self, value: onnx_ir.Value, expr: relax.Expr) -> None:
        """State what computes the output of a node that is still to come; nobody emits that node then."""
        self.set(value, expr)
        self.ahead[value] = tuple(self.emitted)

    def is_set(self, value: onnx_ir.Value) -> bool:
        """Whether it is known what computes a value."""
        return self._find(value) is not None

    def set_constant(self, value: onnx_ir.Value, array: np.ndarray) -> None:
        """State that a value is known while building."""
        self._held[value] = _Held(tuple(array.shape), array=array)

    def set_sizes(self, value: onnx_ir.Value, extents: np.ndarray, kind: str = "int64") -> None:
        """State that a value holds extents: integers, and expressions of the open dimensions."""
        flat = [dims.simple(d) for d in extents.reshape(-1)]
        if dims.is_static(flat):
            self.set_constant(value, np.array(flat, kind).reshape(extents.shape))
            return
        held = np.empty(len(flat), object)
        held[:] = flat
        self._held[value] = _Held(tuple(extents.shape), sizes=held.reshape(extents.shape), kind=kind)

    def alias(self, value: onnx_ir.Value, source: onnx_ir.Value) -> None:
        """State that a value is another one; conversions of either serve both."""
        self._held[value] = self._get(source)

    def set_lazy(self, value: onnx_ir.Value, shape: Sequence[Dim], make: Callable[[], relax.Expr]) -> None:
        """State how to compute a value, plain, once somebody asks for it; a decode that no one reads is not made."""
        self._held[value] = _Held(tuple(shape), make=make)

    def note_kernel(self, text: str) -> None:
        """Record for the report that a special kernel took a node."""
        self.kernels.append(text)

    def note_fallback(self, text: str) -> None:
        """Record for the report that a node runs in a general, slower form, and why."""
        self.fallbacks.append(text)

    # inside

    def _find(self, value: onnx_ir.Value | None) -> _Held | None:
        if value is None:
            return None
        held = self._held.get(value)
        if held is None and value.const_value is not None and value.producer() is None:
            array = value.const_value.numpy()
            held = self._held[value] = _Held(tuple(array.shape), array=array)
        return held

    def _get(self, value: onnx_ir.Value) -> _Held:
        held = self._find(value)
        if held is None:
            raise IRError(f"{value.name}: nothing computes this value before it is used")
        return held

    def _make_plain(self, held: _Held) -> relax.Expr:
        if held.array is not None:
            return self.weight(held.array)
        if held.make is not None:
            return held.make()
        if held.sizes is not None:
            return self.te(functools.partial(dims.written, held.sizes, str(held.kind)), name="sizes")
        assert held.nhwc is not None
        return self._transpose(held.nhwc, to_plain(len(held.shape)))

    def _transpose(self, expr: relax.Expr, perm: Sequence[int]) -> relax.Expr:
        shape = dims.sizes(expr)
        moved = [axis for axis in perm if not dims.same(shape[axis], 1)]
        if moved == sorted(moved):  # only axes of length 1 move: the bytes stay where they are
            return self.reshape(expr, [shape[axis] for axis in perm])
        return self.moved(functools.partial(transposed, perm=perm), expr, name="transpose")

    def reshape(self, expr: relax.Expr, shape: Sequence[Dim]) -> relax.Expr:
        """The same elements under another shape."""
        old = dims.sizes(expr)
        if dims.same_shape(old, shape):
            return expr
        assert dims.same(dims.product(old), dims.product(shape)), (old, shape)
        return self.moved(functools.partial(reshaped, shape=shape), expr, name="reshape")

    def _small(self, value: onnx_ir.Value) -> np.ndarray | None:
        """A constant, or what the dialect's ops make of constants (the scales of a second-level Lookup)."""
        array = self.constant(value)
        node = value.producer()
        if array is not None or node is None or node.domain != "mc_opt":
            return array
        inputs = [None if v is None else self._small(v) for v in node.inputs]
        if any(a is None and v is not None for a, v in zip(inputs, node.inputs, strict=True)):
            return None
        array = folding.evaluate(node, inputs, self.model)[0]
        self._decoded(value, array)
        return array

    def _decoded(self, value: onnx_ir.Value, array: np.ndarray) -> None:
        held = self._held.get(value)
        if held is None:
            self.set_constant(value, array)
        else:
            held.array = array


def reshaped(x: te.Tensor, shape: Sequence[Dim]) -> te.Tensor:
    """Returns x [..] under another shape, in row-major order."""
    old = dims.sizes(x)
    if 0 in old or not old:
        return te.compute(tuple(shape), lambda *_: x(*[0] * len(old)), name="reshape")
    # Open axes that stay are no part of the arithmetic: dividing by them at run time is slow.
    kept = 0
    while not dims.is_static(old) and kept < min(len(old), len(shape)) and dims.same(old[kept], shape[kept]):
        kept += 1

    def element(*i: Any) -> Any:
        flat: Any = 0
        for k, extent in zip(i[kept:], shape[kept:], strict=True):
            flat = flat * extent + k
        index: list[Any] = []
        for extent in reversed(old[kept:]):
            index.append(flat % extent if len(index) < len(old) - kept - 1 else flat)
            flat = flat // extent
        return x(*i[:kept], *reversed(index))

    return te.compute(tuple(shape), element, name="reshape")


def _free(function: Any, names: Mapping[str, tirx.Var]) -> list[tirx.Var]:
    """The dimensions that a kernel uses and cannot read off a buffer's shape: they become arguments, by name."""
    extents = [d for p in function.params for d in p.ty.shape]
    bound = [d for d in extents if isinstance(d, tirx.Var)]
    used = [v for part in (function.body, *extents) for v in tirx.analysis.undefined_vars(part)]
    return [v for _, v in sorted(names.items()) if v in used and v not in bound]
