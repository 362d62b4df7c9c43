"""Shapes of a model: inferred without its weights, fixed by the user, and advice on what to fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import onnx
import onnx.shape_inference
import onnx_ir

from mc_opt.ir.errors import IRError, OptionError
from mc_opt.ir.history import Origin, Touched, add_history
from mc_opt.ir.io.states import STATES
from mc_opt.ir.io.weightless import graphs, walk, weightless
from mc_opt.ir.op import find_op, is_ours

# A dimension is a number or a name; as the x between dimensions is one, no name has it.
_DIM = r"(\d+|[A-Za-wyz_][A-Za-wyz0-9_]*)"
_SHAPE = re.compile(rf"(?P<name>.+)=(?P<dims>scalar|{_DIM}(x{_DIM})*)")
# A shape as `--shape` gives it: numbers, and names of what stays open.
Dims = tuple[int | str, ...]
# What exporters write for "not known": two of them need not be equal.
_ANONYMOUS = {None, "", "?", "-1", "None"}
# Height, width, length of a sequence, samples of a signal.
_SIZES = ((224, 224, 64, 576), (48, 192, 64, 512), (32, 320, 128, 1024), (640, 640, 256, 16000))
_STEP = (1, 1, 1, 1)
_BATCH = re.compile(r"b|n|bs|.*batch.*", re.IGNORECASE)
_SPACE = re.compile(r"h|w|.*(height|width).*", re.IGNORECASE)


def parse_shape(text: str) -> tuple[str, Dims]:
    """Read `x=1x3x224x224` as `("x", (1, 3, 224, 224))`; `x=scalar` is a shape without dimensions.

    A name in place of a number leaves a dimension open under that name: `x=Nx3x224x224`.

    Raises:
        OptionError: the text is not of that form.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"--shape {text!r}: expected input=dimensions, as in x=1x3x224x224 (x=scalar for none)")
    dims = match["dims"]
    return match["name"], () if dims == "scalar" else tuple(int(d) if d.isdigit() else d for d in dims.split("x"))


def format_shape(name: str, dims: Dims) -> str:
    """The inverse of `parse_shape`."""
    return f"{name}={'x'.join(map(str, dims)) if dims else 'scalar'}"


def fix_shapes(model: onnx_ir.Model, shapes: Mapping[str, Dims]) -> None:
    """Give inputs the shapes of `shapes`; a dimension of the same name gets its number, or new name, everywhere.

    Every shape that was inferred before is forgotten and inferred again.

    Raises:
        IRError: an unknown input, a rank or a number that the model contradicts, or one name with two numbers.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    ends = (*model.graph.inputs, *model.graph.outputs)
    before = [str(value.shape) for value in ends]
    numbers: dict[str, int | str] = {}
    for name, dims in shapes.items():
        if name not in inputs:
            raise IRError(f"--shape {format_shape(name, dims)}: unknown input {name!r}; the inputs are: {_list(model)}")
        _check(inputs[name], name, dims, numbers)
    for name, dims in shapes.items():
        inputs[name].shape = onnx_ir.Shape(dims)
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = _substitute(value.shape, numbers)
    declared = {id(v): _substitute(v.shape, numbers) for v in model.graph.outputs if v.shape is not None}
    weights = {id(v) for graph in graphs(model) for v in (*graph.inputs, *graph.initializers.values())}
    for value in _values(model):
        if id(value) not in weights:
            value.shape = None
    infer_shapes(model)
    for value in model.graph.outputs:
        if value.shape is None:
            value.shape = declared.get(id(value))
    fixed = [str(value.name) for value, was in zip(ends, before, strict=True) if str(value.shape) != was]
    if fixed:
        rule = " ".join(format_shape(name, dims) for name, dims in shapes.items())
        add_history(model, [Touched(Origin("--shape", rule), (), tuple(fixed))])


def _check(value: onnx_ir.Value, name: str, dims: Dims, numbers: dict[str, int | str]) -> None:
    text = f"--shape {format_shape(name, dims)}"
    lowest = min((d for d in dims if isinstance(d, int)), default=1)
    if lowest < 1:
        raise IRError(f"{text}: a dimension is {lowest}, expected 1 or more")
    if value.shape is None:
        return
    if len(dims) != len(value.shape):
        raise IRError(f"{text}: {len(dims)} dimensions, but the input is {describe(value)}; give {len(value.shape)}")
    for axis, (number, old) in enumerate(zip(dims, value.shape, strict=True)):
        if isinstance(old, int):
            if old != number:
                raise IRError(f"{text}: dimension {axis} is {number}, but the input is {describe(value)}; give {old}")
        elif old.value not in _ANONYMOUS and numbers.setdefault(str(old.value), number) != number:
            raise IRError(
                f"{text}: dimension {old.value!r} is {number} here and {numbers[str(old.value)]} elsewhere; "
                "give one number to both"
            )


def _substitute(shape: onnx_ir.Shape, numbers: Mapping[str, int | str]) -> onnx_ir.Shape:
    return onnx_ir.Shape(
        [d if isinstance(d, int) else numbers.get(str(d.value), d) for d in shape],
        denotations=[shape.get_denotation(i) for i in range(len(shape))],
    )


def infer_shapes(model: onnx_ir.Model) -> None:
    """Infer types and shapes of every value, in bodies too, and write them into the model; weights stay unread.

    What is known stays where inference knows less. An op without inference (of another domain) leaves its
    outputs as they were.
    """
    proto = onnx.shape_inference.infer_shapes(_bare(model), data_prop=True)
    inferred = dict(walk(onnx_ir.from_proto(proto).graph))
    for path, graph in walk(model.graph):
        known = {v.name: v for v in _graph_values(inferred[path])}
        for value in _graph_values(graph):
            if (twin := known.get(value.name)) is not None:
                _take(value, twin)


def _bare(model: onnx_ir.Model) -> onnx.ModelProto:
    """What onnx infers shapes from: no weights, and stubs for the weights that our ops decode, which get their types.

    onnx would follow the codes through the bodies of these ops, an object for each element of a vector: gigabytes.
    """
    decoded: dict[str, onnx_ir.Value] = {}
    for node in model.graph:
        values = [v for v in node.inputs if v is not None]
        if is_ours(node) and all(v.const_value is not None or v.name in decoded for v in values):
            decoded |= _decoded(node)
    bare, _ = weightless(model)
    kept = [node for node in bare.graph.node if not set(node.output) <= decoded.keys()]
    del bare.graph.node[:]
    bare.graph.node.extend(kept)
    for name, value in decoded.items():
        assert value.dtype is not None and value.shape is not None
        stub = onnx_ir.ExternalTensor(name, 0, None, value.dtype, shape=value.shape, name=name)
        bare.graph.initializer.append(onnx_ir.serde.serialize_tensor(stub))
    return bare


def _decoded(node: onnx_ir.Node) -> dict[str, onnx_ir.Value]:
    """The outputs of one of our nodes by name, with the types that its op gives them; none if it cannot."""
    try:
        types = find_op(node.op_type).types(node)
    except IRError:
        return {}
    for value, (dtype, shape) in zip(node.outputs, types, strict=True):
        _take(value, onnx_ir.Value(type=onnx_ir.TensorType(dtype), shape=shape))
    return {str(value.name): value for value in node.outputs if is_static(value)}


def _take(value: onnx_ir.Value, inferred: onnx_ir.Value) -> None:
    if inferred.type is not None:
        value.type = inferred.type
    if inferred.shape is None:
        return
    if value.shape is None or len(value.shape) != len(inferred.shape):
        value.shape = inferred.shape
        return
    merged = [new if isinstance(new, int) or old.value is None else old for old, new in _pairs(value, inferred)]
    if merged != list(value.shape):
        value.shape = onnx_ir.Shape(merged)


def _pairs(a: onnx_ir.Value, b: onnx_ir.Value) -> Iterator[tuple[onnx_ir.SymbolicDim, int | onnx_ir.SymbolicDim]]:
    assert a.shape is not None and b.shape is not None
    for old, new in zip(a.shape, b.shape, strict=True):
        yield (onnx_ir.SymbolicDim(None), old) if isinstance(old, int) else (old, new)


def _graph_values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    """What a graph computes: inputs and weights are given."""
    for node in graph:
        yield from (o for o in node.outputs if o.name)


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    for graph in graphs(model):
        yield from _graph_values(graph)


def shape_advice(model: onnx_ir.Model) -> str | None:
    """The `--shape` options that make every input static, to paste; None when all are static.

    The numbers are examples, see `example_shapes`; the caller should say so.
    """
    shapes = example_shapes(model)
    return " ".join(f"--shape {_quote(format_shape(name, dims))}" for name, dims in shapes.items()) or None


def example_shapes(model: onnx_ir.Model) -> dict[str, tuple[int, ...]]:
    """Static shapes for the inputs that lack them: a guess that shape inference accepts, or else just a guess."""
    # A cache may have room for no more than a step at a time.
    tried = (_STEP, *_SIZES) if STATES in model.metadata_props else _SIZES
    candidates = [_example(model, *sizes) for sizes in tried]
    return next((c for c in candidates if c and _fits(model, c)), candidates[0])


def varied_shapes(model: onnx_ir.Model) -> list[dict[str, tuple[int, ...]]]:
    """`example_shapes`, and the same with other batches and with shorter sequences of tokens or features.

    The batch is the first axis of an input, a sequence the second one of a matrix of integers or of rank 3; of a
    model with several inputs only dimensions that have a name change, alike in all of them.
    """
    base = example_shapes(model)
    numbers = dict(_open_numbers(model, base))
    variants = [base]
    for batch, part in ((2, 9), (3, 2)) if numbers else ():
        new = {key: batch if is_batch else 1 + number // part for key, (number, is_batch) in numbers.items()}
        shapes = {
            str(v.name): tuple(new.get(_key(v, axis), n) for axis, n in enumerate(base[str(v.name)]))
            for v in model.graph.inputs
            if v.name in base
        }
        variants.append(shapes)
    return variants


def _open_numbers(model: onnx_ir.Model, base: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, bool]]]:
    """The open dimensions that may vary: their key, their example, and whether they are a batch."""
    for value in model.graph.inputs:
        if value.shape is None or value.name not in base:
            continue
        rank, is_integer = len(value.shape), value.dtype is not None and value.dtype.is_integer()
        for axis, d in enumerate(value.shape):
            is_batch = axis == 0 and rank > 1
            is_sequence = axis == 1 and ((rank == 2 and is_integer) or rank == 3)
            is_alike = len(model.graph.inputs) == 1 or not _key(value, axis).startswith("axis ")
            if not isinstance(d, int) and is_alike and (is_batch or is_sequence):
                yield _key(value, axis), (base[str(value.name)][axis], is_batch)


def _key(value: onnx_ir.Value, axis: int) -> str:
    """The name of an open dimension; `axis` for one without."""
    assert value.shape is not None
    d = value.shape[axis]
    if isinstance(d, int):
        return ""
    return f"axis {axis}" if d.value in _ANONYMOUS else str(d.value)


def _example(model: onnx_ir.Model, height: int, width: int, length: int, signal: int) -> dict[str, tuple[int, ...]]:
    numbers: dict[str, int] = {}
    example = {}
    for value in model.graph.inputs:
        if is_static(value) or value.shape is None:
            continue
        # A float matrix with an open second axis is a signal, an integer one a text.
        is_float = value.dtype is not None and value.dtype.is_floating_point()
        last = signal if is_float and len(value.shape) <= 2 else length
        dims = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            name = "" if dim.value in _ANONYMOUS else str(dim.value)
            number = _guess(name, axis, value.shape, (height, width, last))
            dims.append(numbers.setdefault(name, number) if name else number)
        example[value.name or ""] = tuple(dims)
    return example


def _guess(name: str, axis: int, shape: onnx_ir.Shape, sizes: tuple[int, int, int]) -> int:
    height, width, length = sizes
    rank = len(shape)
    # Layers × batch × units: the state of a recurrent net.
    state = rank == 3 and axis == 1 and isinstance(shape[0], int) and isinstance(shape[2], int)
    if (axis == 0 and rank > 1) or state or _BATCH.fullmatch(name):
        return 1
    if _SPACE.fullmatch(name) or (rank == 4 and axis >= 2):
        return width if axis == rank - 1 else height
    if rank == 4 and axis == 1:
        return 3
    return length


def _fits(model: onnx_ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    trial = model.clone()
    fix_shapes(trial, shapes)
    try:
        onnx.shape_inference.infer_shapes(_bare(trial), strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True


def is_static(value: onnx_ir.Value) -> bool:
    """Whether every dimension of the value is a number."""
    return value.shape is not None and all(isinstance(d, int) for d in value.shape)


def _quote(text: str) -> str:
    return text if re.fullmatch(r"[\w.=/:+-]+", text) else f"'{text}'"


def describe(value: onnx_ir.Value) -> str:
    """Type and shape of a value, as in `FLOAT[batch,3,224,224]`."""
    dims = [] if value.shape is None else [str(d) if isinstance(d, int) else str(d.value or "?") for d in value.shape]
    return f"{value.dtype.name if value.dtype else 'untyped'}[{','.join(dims)}]"


def _list(model: onnx_ir.Model) -> str:
    return ", ".join(f"{v.name} {describe(v)}" for v in model.graph.inputs) or "none"
