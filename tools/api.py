"""The functions of the public API: what `import mc_opt` offers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir

from mc_opt import ir, passes, targets
from mc_opt.passes import Pass, Pipeline, Report
from mc_opt.targets import Target
from mc_opt.tools.driver import MODEL, Request, compile_model


def capture(
    module: Any,
    example: Any = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx_ir.Model:
    """A model from a torch module, an fx GraphModule or an ExportedProgram (needs torch; BatchNorm is kept).

    Args:
        module: what to capture.
        example: inputs to trace with: a tensor, a tuple or a dict by name; nothing for an ExportedProgram.
        dynamic_shapes: open dimensions, as `torch.export.export` takes them.
        input_names: names of the model's inputs; those of `forward`'s parameters otherwise.
        output_names: names of the model's outputs.
    """
    return ir.capture(
        module, example, dynamic_shapes=dynamic_shapes, input_names=input_names, output_names=output_names
    )


def capture_causal_lm(model: Any, *, max_length: int = ir.MAX_LENGTH) -> onnx_ir.Model:
    """A causal language model of transformers, one step over a cache of fixed length (needs torch and transformers).

    Args:
        model: a `...ForCausalLM`, a folder that `save_pretrained` wrote, or a GGUF file.
        max_length: the positions that the cache has room for.

    Raises:
        IRError: the model cannot be captured, or what was captured computes something else.
    """
    if isinstance(model, str | os.PathLike):
        return ir.from_transformers(Path(model), max_length=max_length)
    return ir.capture_causal_lm(model, max_length=max_length)


def load_model(
    path: str | os.PathLike[str], *, shapes: Mapping[str, tuple[int | str, ...]] | None = None
) -> onnx_ir.Model:
    """Read an ONNX file, checked and lifted to opset 21 or newer; `shapes` fixes symbolic dimensions."""
    return ir.load_model(Path(path), shapes=shapes)


def save_model(model: onnx_ir.Model, path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write a model, atomically and read back; return the files written, the model first.

    Args:
        model: the model.
        path: a file that ends in `.onnx`, or a folder for `model.onnx`. Weights of 64 MiB or more lie beside it.
    """
    return ir.save_model(model, Path(path)).paths


def compress(
    model: onnx_ir.Model | str | os.PathLike[str],
    recipe: str | Pipeline | Sequence[Pass],
    *,
    target: str | Target | None = None,
    data: ir.Data | str | os.PathLike[str] | None = None,
    shapes: Mapping[str, tuple[int | str, ...]] | None = None,
    states: Mapping[str, str] | None = None,
    check: passes.Check = "full",
    seed: int = 0,
    memory_limit: int = passes.MEMORY_LIMIT,
    allow_scripts: bool = False,
    training: passes.Training | None = None,
) -> tuple[onnx_ir.Model, Report]:
    """Run passes over a model; the model that is given stays as it is.

    Args:
        model: a model or the path of an ONNX file.
        recipe: `"fold-batch-norm,denseshift{bits=3}"`, a Pipeline, or pass objects.
        target: where the model will run, for passes that ask.
        data: real inputs for the checks and for passes that need some.
        shapes: input name to shape; fixes symbolic dimensions (a name in place of a number leaves one open).
        states: recurrent states that the data carries, output name to input name.
        check: `"full"` runs the models in ONNX Runtime, `"structure"` reads no weights.
        seed: of every random choice.
        memory_limit: bytes above which checks that load all weights are skipped.
        allow_scripts: whether a pass may run a Python file that the recipe names.
        training: data, loss and length of training for passes that are trained; without it they are converted at once.

    Returns:
        The new model and the report.

    Raises:
        OptionError: an unknown pass or option.
        IRError: the model or the data is wrong.
        PassError: a pass failed, or an exact pass moved the numbers.
    """
    request = Request(
        model=_model(model),
        pipeline=_pipeline(recipe),
        targets=tuple(t for t in (_target(target),) if t is not None),
        shapes=shapes or {},
        states=states or {},
        data=Path(data) if isinstance(data, str | os.PathLike) else data,
        check=check,
        seed=seed,
        memory_limit=memory_limit,
        allow_scripts=allow_scripts,
        training=training,
    )
    outcome = compile_model(request)
    return outcome.model, outcome.report


def build(
    model: onnx_ir.Model | str | os.PathLike[str],
    target: str | Target | Sequence[str | Target],
    out: str | os.PathLike[str],
    *,
    shapes: Mapping[str, tuple[int | str, ...]] | None = None,
    check: passes.Check = "full",
    tune: Literal["quick"] | None = None,
    tune_table: str | os.PathLike[str] | None = None,
) -> Report:
    """Build a model for one or more targets into the folder `out`, beside its ONNX file and its report.

    Args:
        model: a model or the path of an ONNX file.
        target: `"x86"`, `"x86{cpu=x86-64-v3}"`, a Target, or several.
        out: the folder; an earlier output there is replaced.
        shapes: input name to shape; fixes symbolic dimensions, of which kernels take the batch and sequences.
        check: as in `compress`.
        tune: `"quick"` measures up to 8 tilings of each kernel's shape on this machine, and builds with the fastest.
        tune_table: the file of measured tiles, read to the same bytes; with `tune` it takes what is measured. A build
            writes the table that it used into its folder.
    """
    several = [target] if isinstance(target, str | Target) else target
    chosen = [made for item in several for made in (targets.parse_targets(item) if isinstance(item, str) else [item])]
    request = Request(
        model=_model(model),
        targets=tuple(chosen),
        out=Path(out),
        shapes=shapes or {},
        check=check,
        tune=tune,
        tune_table=None if tune_table is None else Path(tune_table),
    )
    return compile_model(request).report


def diff(
    a: onnx_ir.Model | str | os.PathLike[str],
    b: onnx_ir.Model | str | os.PathLike[str],
    *,
    data: ir.Data | str | os.PathLike[str] | None = None,
    states: Mapping[str, str] | None = None,
) -> ir.Diff:
    """What changed from one model to another: nodes, weights and layers, with the pass and rule behind each change.

    Args:
        a: a model, an ONNX file, or an output folder.
        b: the other one.
        data: real inputs; with them, how far apart each value is that both models have.
        states: recurrent states that the data carries, output name to input name.
    """
    first, second = (_found(x) for x in (a, b))
    found = ir.diff(first, second)
    if data is None:
        return found
    if isinstance(data, str | os.PathLike):
        data = ir.load_data(Path(data), first, states=states or {})
    return dataclasses.replace(found, drift=ir.value_drift(first, second, data, states=states))


def _found(model: onnx_ir.Model | str | os.PathLike[str]) -> onnx_ir.Model:
    if isinstance(model, onnx_ir.Model):
        return model
    path = Path(model)
    return ir.load_model(path / MODEL if path.is_dir() else path, check="structure")


def to_torch(model: onnx_ir.Model, *, training: bool = False) -> Any:
    """The model as a `torch.fx.GraphModule` of the same meaning, differentiable (needs torch).

    Args:
        model: what to translate, also as `prepare` returns it.
        training: whether BatchNormalizations take the statistics of the batch while the module is in training mode.

    Raises:
        IRError: an op has no torch meaning yet; the text names the file where it would live.
    """
    return ir.interpret(model, training=training)


def weights_from_torch(model: onnx_ir.Model, module: Any) -> onnx_ir.Model:
    """A copy of `model` with the weights that `module`, which `to_torch` made of it, holds by now; matched by name.

    Raises:
        IRError: a tensor of the module has no place in the model, or another shape.
    """
    new = _copy(model)
    ir.state_to_model(module, new)
    return new


def prepare(
    model: onnx_ir.Model | str | os.PathLike[str],
    recipe: str | Pipeline | Sequence[Pass],
    *,
    data: ir.Data | None = None,
    seed: int = 0,
) -> onnx_ir.Model:
    """A copy of a model with the training forms of trainable passes, for a training loop of your own.

    Args:
        model: a model or the path of an ONNX file.
        recipe: passes that are trained, as in `"denseshift{bits=3}"`; others run before, by `compress`.
        data: real inputs, for passes that look at some.
        seed: of every random choice.

    Raises:
        OptionError: an unknown pass or option, or a pass that is not trained.
    """
    given = model if isinstance(model, onnx_ir.Model) else load_model(model)
    new = _copy(given)
    ctx = passes.Context(reference=given, data=data, seed=seed, training=passes.Training())
    for step in _trainable(recipe):
        step.prepare(new, ctx)
        ir.add_functions(new)
    return new


def convert(
    model: onnx_ir.Model, recipe: str | Pipeline | Sequence[Pass], *, data: ir.Data | None = None
) -> onnx_ir.Model:
    """A copy of a model that `prepare` made, with its training forms stored as the recipe's passes store them.

    Args:
        model: with the weights that training gave (`weights_from_torch`).
        recipe: the one that `prepare` had.
        data: real inputs, for passes that look at some.

    Raises:
        IRError: what came out is no valid model.
        OptionError: as for `prepare`.
    """
    new = _copy(model)
    ctx = passes.Context(reference=model, data=data, training=passes.Training())
    for step in _trainable(recipe):
        step.convert(new, ctx)
        ir.add_functions(new)
    ir.verify(new)
    return new


def _trainable(recipe: str | Pipeline | Sequence[Pass]) -> list[passes.TrainablePass]:
    bound = [step.bound() for step in _pipeline(recipe).steps]
    for step in bound:
        if not isinstance(step, passes.TrainablePass):
            raise ir.OptionError(f"{step.name} is not trained; run it before, by compress")
    return [step for step in bound if isinstance(step, passes.TrainablePass)]


def _copy(model: onnx_ir.Model) -> onnx_ir.Model:
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def _model(model: onnx_ir.Model | str | os.PathLike[str]) -> onnx_ir.Model | Path:
    return Path(model) if isinstance(model, str | os.PathLike) else model


def _pipeline(recipe: str | Pipeline | Sequence[Pass]) -> Pipeline:
    match recipe:
        case str():
            return Pipeline.parse(recipe)
        case Pipeline():
            return recipe
        case _:
            return Pipeline.of(*recipe)


def _target(target: str | Target | None) -> Target | None:
    return targets.parse_target(target) if isinstance(target, str) else target
