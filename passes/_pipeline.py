"""The run: each pass on a clone of its own, verified, judged and recorded; a pure function of its arguments."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

import mc_opt
from mc_opt import ir
from mc_opt.passes._base import Check, Context, Log, Pass, PassError
from mc_opt.passes._held_out import held_out_samples
from mc_opt.passes._hold import hold
from mc_opt.passes._instrument import Bytes, Dump, Instrument, Timing
from mc_opt.passes._judge import Judge
from mc_opt.passes._provenance import record
from mc_opt.passes._report import File, LayerReport, PassReport, Report, Source, Unchecked
from mc_opt.passes._size import changed_layers, run_bytes, sites, size_of
from mc_opt.passes._spec import Pipeline, RecipeError, Step
from mc_opt.passes._trainable import TrainablePass, hold_converted, train

_COPIES = 3
"""A model judged in ONNX Runtime is in memory about so many times: serialised, loaded, and packed for its kernels."""
_RUNS = 8
"""The values of a run are: drawn in double precision, put out by two models, compared in double precision."""


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        model: the new model; shares the weights it kept with the one that went in.
        report: everything that is the same for the same run.
        seconds: (pass, seconds), in order.
    """

    model: onnx_ir.Model
    report: Report
    seconds: tuple[tuple[str, float], ...] = ()


def run(
    model: onnx_ir.Model,
    pipeline: Pipeline,
    ctx: Context,
    *,
    check: Check | None = None,
    stop_after: str | None = None,
    dump: Path | None = None,
    instruments: Sequence[Instrument] = (),
) -> Result:
    """Run the passes in order; `model` is not touched.

    Args:
        model: what goes in, at opset 21 or newer, as `load_model` and `capture` make it.
        pipeline: the passes.
        ctx: what passes may know and use.
        check: `full` runs every new model in ONNX Runtime, `structure` reads no weights; `ctx.check` if None.
        stop_after: the name of the last pass to run.
        dump: a folder for the model as text after each pass.
        instruments: more observers; their columns go into the report.

    Raises:
        PassError: a pass failed, or what it made is wrong; its `last_good` is the model before that pass.
        IRError: the model that went in is wrong.
        DataError: the data does not fit the model.
    """
    steps = _until(pipeline.steps, stop_after)
    fixed = _fixed_inputs(model, steps)
    ctx = dataclasses.replace(ctx, check=check or ctx.check, reference=ctx.reference or model, fixed=fixed)
    ir.verify(model, level=ctx.check)
    timing = Timing()
    state = _Run(ctx, _clone(model), [timing, Bytes(), *([Dump(dump)] if dump else []), *instruments])
    if steps:
        state.open_judge(model, fixed)
    joint = ctx.training is not None and ctx.training.joint
    for number, group in enumerate(groups := _groups(steps, joint=joint)):
        ctx.progress(number, len(groups), ", ".join(step.rewrite.name for step in group))
        if len(group) > 1:
            state.take_together(group)
        else:
            state.take(group[0])
    if dump and not steps:
        Dump(dump).write("input", model)
    return Result(state.model, state.report(model, Pipeline(steps)), tuple(timing.seconds))


def dry_run(model: onnx_ir.Model, pipeline: Pipeline, ctx: Context) -> Report:
    """What a run would match and store, pass by pass; nothing is run in ONNX Runtime and nothing is written.

    The passes do their work on clones, so that the layers and bytes are those of the real run.
    """
    return run(model, pipeline, ctx, check="structure").report


def _until(steps: tuple[Step, ...], stop_after: str | None) -> tuple[Step, ...]:
    if stop_after is None:
        return steps
    names = [step.rewrite.name for step in steps]
    if stop_after not in names:
        raise ir.OptionError(f"stop after: {ir.unknown('pass', stop_after, names)}")
    return steps[: names.index(stop_after) + 1]


def _groups(steps: tuple[Step, ...], *, joint: bool) -> list[tuple[Step, ...]]:
    """Steps one by one; with `joint`, trainable passes that follow one another are one group."""
    groups: list[tuple[Step, ...]] = []
    for step in steps:
        trains = joint and isinstance(step.rewrite, TrainablePass)
        if trains and groups and isinstance(groups[-1][-1].rewrite, TrainablePass):
            groups[-1] = (*groups[-1], step)
        else:
            groups.append((step,))
    return groups


def _fixed_inputs(model: onnx_ir.Model, steps: tuple[Step, ...]) -> dict[str, np.ndarray]:
    fixed: dict[str, np.ndarray] = {}
    for step in steps:
        fixed |= step.rewrite.fixes(model)
    return fixed


@dataclass(frozen=True)
class _Prepared:
    """What a trainable pass prepared for the training that it shares with others.

    Attributes:
        step: the pass.
        log: what it says.
        rewrites: how many layers it took.
        shown: what the passes before it store: what sizes are told against.
        model: with the forms of it and of those after it, trained.
        after: what is stored after it, forms of later passes not counted; None when it is the last.
    """

    step: TrainablePass
    log: Log
    rewrites: int
    shown: onnx_ir.Model
    model: onnx_ir.Model | None = None
    after: onnx_ir.Model | None = None

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Store the forms; the number of layers that the pass took."""
        if self.rewrites:
            self.step.convert(model, ctx)
            hold_converted(model, self.step)
        return self.rewrites


@dataclass
class _Run:
    """The state of one run between two passes."""

    ctx: Context
    model: onnx_ir.Model
    instruments: list[Instrument]
    judge: Judge | None = None
    names: dict[str, str] = field(default_factory=dict)
    passes: list[PassReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checks.append("structure: names, types, topological order, our ops; before and after every pass")
        if self.ctx.check == "full":
            self.checks.append("onnx.checker, before and after every pass")
        else:
            self.unchecked.append(Unchecked("onnx.checker", "--check structure"))
            self.unchecked.append(Unchecked("weights are finite numbers", "--check structure"))

    def open_judge(self, original: onnx_ir.Model, fixed: Mapping[str, np.ndarray]) -> None:
        """Prepare the check of numbers, or record why there is none."""
        what = "run in ONNX Runtime, drift, numbers of exact passes"
        if self.ctx.check == "structure":
            self.unchecked.append(Unchecked(what, "--check structure"))
            return
        size = size_of(original)
        need = _COPIES * max(size.weight_bytes, 4 * size.parameters)  # ONNX Runtime decodes packed weights
        need += _RUNS * run_bytes(original)
        if need > self.ctx.memory_limit:
            self._no_judge(what, f"needs about {_gib(need)}, the memory limit is {_gib(self.ctx.memory_limit)}")
            return
        data, kind = self.ctx.data, "real"
        if data is None:
            data = held_out_samples(self.ctx.training, original, seed=self.ctx.seed, states=self.ctx.states)
            kind = "held-out"
        try:
            self.judge = Judge(original, dataclasses.replace(self.ctx, data=data), fixed)
        except ir.DataError as error:
            if data is not None:
                raise
            self._no_judge(what, f"random inputs do not fit the model ({error}); give real ones by --data")
            return
        except ir.IRError as error:
            self._no_judge(what, f"the model that came in does not run: {error}")
            return
        self.checks.append(f"{what}, on {self.judge.samples} {kind if data is not None else 'seeded random'} samples")
        if data is None:
            self.warnings.append(
                "no data was given: drift is measured on seeded random inputs and says little about accuracy"
            )

    def _no_judge(self, what: str, reason: str) -> None:
        self.unchecked.append(Unchecked(what, reason))
        self.warnings.append(f"{what}: not checked: {reason}")

    def take_together(self, steps: Sequence[Step]) -> None:
        """Prepare all of several trainable passes, train once, and convert one after the other."""
        before, started = tuple(p.name for p in self.passes), time.perf_counter()
        model, shown = _clone(self.model), self.model
        prepared: list[_Prepared] = []
        for step in steps:
            bound, log = step.bound(), Log()
            assert isinstance(bound, TrainablePass)
            rewrites = _rewrite(bound, bound.prepare, model, _own(self.ctx, bound.name, log), before)
            ir.add_functions(model)
            prepared.append(_Prepared(bound, log, rewrites, shown))
            shown = self._converted(model, prepared)
        trained = [one for one in prepared if one.rewrites]
        if trained:
            names = "+".join(one.step.name for one in trained)
            ctx, passes = _own(self.ctx, names, trained[-1].log), [one.step for one in trained]
            _rewrite(passes[0], lambda model, ctx: train(model, passes, ctx), model, ctx, before)
        spent = time.perf_counter() - started
        for number, (step, one) in enumerate(zip(steps, prepared, strict=True)):
            after = prepared[number + 1].shown if number + 1 < len(prepared) else None
            self.take(step, dataclasses.replace(one, model=model, after=after))
            model = self.model if one.rewrites else model
        for instrument in self.instruments:
            if isinstance(instrument, Timing):
                instrument.add(spent)

    def _converted(self, model: onnx_ir.Model, prepared: Sequence[_Prepared]) -> onnx_ir.Model:
        """What the passes so far would store: forms that others wait in take more than the layer ever will."""
        shown = _clone(model)
        for one in prepared:
            one.convert(shown, dataclasses.replace(self.ctx, log=Log()))
        ir.add_functions(shown)
        return shown

    def take(self, step: Step, prepared: _Prepared | None = None) -> None:
        """Run one pass, or convert what it has prepared; on failure the model stays what it was."""
        before = tuple(p.name for p in self.passes)
        bound = step.bound()
        log = prepared.log if prepared else Log()
        new = _clone(prepared.model if prepared and prepared.model else self.model)
        shown = prepared.shown if prepared else self.model
        try:
            for instrument in reversed(self.instruments):  # the clock is the first: it starts last and stops first
                instrument.before(bound, self.model)
            action = prepared.convert if prepared else bound.run
            rewrites = _rewrite(bound, action, new, _own(self.ctx, bound.name, log), before)
            if rewrites:
                hold(bound, self.model, new, before, self.ctx.check)
                record(self.model, new, made_by=bound.name, log=log)
            else:
                new = self.model
            columns: dict[str, Any] = {}
            for instrument in self.instruments:
                columns |= instrument.after(bound, shown, (prepared and rewrites and prepared.after) or new)
            judged = self.judge.after(bound, new, before) if self.judge is not None and rewrites else {}
        except PassError as error:
            error.last_good = self.model
            raise
        self._add_layers(step, rewrites, shown, (prepared and prepared.after) or new)
        self._record(step, rewrites, log, columns, judged, new)

    def _add_layers(self, step: Step, rewrites: int, old: onnx_ir.Model, new: onnx_ir.Model) -> None:
        self.names |= {site.layer: str(site.value.name) for site in sites(old)}
        if rewrites:
            position = len(self.passes)
            self.layers += changed_layers(self.names, old, new, rewritten_by=step.rewrite.name, position=position)

    def _record(
        self,
        step: Step,
        rewrites: int,
        log: Log,
        columns: dict[str, Any],
        judged: dict[str, Any],
        new: onnx_ir.Model,
    ) -> None:
        name = step.rewrite.name
        if not rewrites:
            self.warnings.append(_nothing(name, log.skips))
        self.warnings += [f"{name}: {text}" for text in log.warnings]
        if judged.get("broken"):
            self.warnings.append(
                f"{name}: {judged['broken']} output elements became NaN or infinite, or stopped being so"
            )
        self.passes.append(
            PassReport(
                name=name,
                text=str(Pipeline((step,))),
                exact=step.rewrite.exact,
                rewrites=rewrites,
                notes=tuple(log.notes),
                skips=dict(log.skips),
                columns=columns,
                drift=judged.get("drift", {}),
                verdict=judged.get("verdict"),
                training=log.training,
            )
        )
        self.model = new

    def report(self, original: onnx_ir.Model, pipeline: Pipeline) -> Report:
        """The report of the whole run; the driver adds what it wrote."""
        return Report(
            mc_opt=mc_opt.__version__,
            source=_source(original),
            recipe=str(pipeline),
            seed=self.ctx.seed,
            training=self.ctx.training.told() if self.ctx.training is not None else {},
            before=size_of(original),
            after=size_of(self.model),
            passes=tuple(self.passes),
            layers=tuple(self.layers),
            warnings=tuple(self.warnings),
            checks=tuple(self.checks),
            unchecked=tuple(self.unchecked),
        )


def _own(ctx: Context, name: str, log: Log) -> Context:
    """The context of one pass: a log of its own, and progress that names the pass."""
    told = ctx.on_progress
    if told is None:
        return dataclasses.replace(ctx, log=log)
    return dataclasses.replace(ctx, log=log, on_progress=lambda done, total, what: told(done, total, f"{name}: {what}"))


def _rewrite(
    step: Pass,
    action: Callable[[onnx_ir.Model, Context], int],
    model: onnx_ir.Model,
    ctx: Context,
    before: tuple[str, ...],
) -> int:
    try:
        return action(model, ctx)
    except (ir.OptionError, ir.LimitError, ir.DataError, RecipeError):
        raise  # the user's or the machine's matter, not a fault of the pass
    except PassError as error:
        raise PassError(error.pass_name, error.node, error.problem, before) from error
    except MemoryError as error:
        raise ir.LimitError(f"{step.name}: out of memory; free some, or take a machine with more") from error
    except ir.IRError as error:
        raise PassError(step.name, "", str(error), before) from error
    except Exception as error:
        raise PassError(step.name, "", f"{type(error).__name__}: {error}", before) from error


def _clone(model: onnx_ir.Model) -> onnx_ir.Model:
    copy = model.clone()
    copy.meta.update(model.meta)  # clone() leaves it out; it says where the model came from
    return copy


def _source(model: onnx_ir.Model) -> Source:
    facts = model.meta.get("mc_opt.source")
    if facts is None:
        return Source(opset=model.opset_imports.get("", 0))
    external = tuple(File(location, digest, size) for location, size, digest in facts.external)
    return Source(Path(facts.path).name, facts.sha256, facts.bytes, facts.opset or 0, external)


def _nothing(name: str, skips: Mapping[str, str]) -> str:
    if not skips:
        return f"{name} rewrote nothing: nothing in the model matches"
    layer, reason = next(iter(skips.items()))
    more = f" (and {len(skips) - 1} more)" if len(skips) > 1 else ""
    return f"{name} rewrote nothing: {layer}: {reason}{more}"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
