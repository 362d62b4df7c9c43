"""One run from a file to an output folder: load, compress, save, build, report; all of it appears, or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir

from mc_opt import ir, passes, targets
from mc_opt.passes import Context, PassError, Pipeline, Report, Store
from mc_opt.tools import _artefact_check
from mc_opt.tools._checkpoint import checkpoints
from mc_opt.tools._tuning import FILE, Tuning, tuning

MODEL = "model.onnx"
REPORT = "report.json"
TIMINGS = "timings.json"
DUMP = "ir"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Request:
    """What to compile and how.

    Attributes:
        model: an ONNX file, or a model in memory; None with `from_torch`.
        from_torch: `package.module:factory`; the factory returns (module, example) or an ExportedProgram.
        from_transformers: a folder or GGUF file with a causal language model.
        max_length: the positions of that model's cache.
        pipeline: the passes.
        targets: what to build beside the ONNX file, at most one of a name.
        out: the output folder; None compresses and writes nothing.
        shapes: input name to shape; fixes symbolic dimensions at load, before the first pass.
        data: real inputs: a stream, an npz file or a folder of them.
        states: recurrent states, output name to input name.
        check: `full` or `structure`.
        seed: of every random choice.
        memory_limit: bytes above which checks that load all weights are skipped.
        allow_scripts: whether passes may run Python files.
        stop_after: the last pass to run.
        dump: whether to write the model as text after each pass, into `ir/` of the output folder.
        training: how trainable passes are trained; None converts them at once.
        tune: `quick` measures the tiles that kernels of this machine take; None leaves them to rules and the table.
        tune_table: the file of measured tiles; with `tune` it takes what is measured.
        fresh: whether a training forgets the checkpoints of an interrupted one.
        writes: whether this process writes; of several processes that train together the first does.
        dry_run: only find out which layers match and what they would take; nothing is written.
    """

    model: Path | str | onnx_ir.Model | None = None
    from_torch: str = ""
    from_transformers: str = ""
    max_length: int = ir.MAX_LENGTH
    pipeline: Pipeline = field(default_factory=Pipeline)
    targets: tuple[targets.Target, ...] = ()
    out: Path | str | None = None
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    data: ir.Data | Path | str | None = None
    states: Mapping[str, str] = field(default_factory=dict)
    check: passes.Check = "full"
    seed: int = 0
    memory_limit: int = passes.MEMORY_LIMIT
    allow_scripts: bool = False
    stop_after: str | None = None
    dump: bool = False
    training: passes.Training | None = None
    tune: str | None = None
    tune_table: Path | str | None = None
    fresh: bool = False
    writes: bool = True
    dry_run: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run made: the model, its report, the seconds of each stage, and the folder if one was written."""

    model: onnx_ir.Model
    report: Report
    timings: Mapping[str, Any]
    out: Path | None = None


class _Stages:
    """Seconds of each stage of a run."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block, and tell that it begins."""
        self.tell(0, 0, name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def tell(self, done: int, total: int, what: str) -> None:
        """Pass a step on to whoever watches; total 0 when it is not known."""
        if self._progress is not None:
            self._progress(done, total, what)


def compile_model(request: Request, progress: Progress | None = None) -> Outcome:
    """Do everything that a request asks for.

    Raises:
        OptionError: a wrong name, option or folder.
        IRError: the model or the data does not fit (TargetError: a target cannot build it).
        PassError: a pass failed, or a check did.
        LimitError: memory or disk is full.
    """
    _check_targets(request.targets)
    training = request.training
    if training is None:
        return _compiled(request, progress)
    _check_trained(request.pipeline)
    if request.dry_run:
        return _compiled(
            dataclasses.replace(request, training=dataclasses.replace(training, checkpoint=None)), progress
        )
    out = None if request.out is None else Path(request.out)
    with checkpoints(training, out, fresh=request.fresh, writes=request.writes) as kept:
        return _compiled(dataclasses.replace(request, training=kept), progress)


def _compiled(request: Request, progress: Progress | None) -> Outcome:
    """The run itself, once it is known where a training keeps its checkpoints."""
    stages = _Stages(progress)
    with tuning(request) as tuned:
        if request.out is None or request.dry_run or not request.writes:
            return _compress(*_loaded(request, stages), stages, Store(), dump=None)
        return _written(request, Path(request.out), stages, tuned)


def _written(request: Request, out: Path, stages: _Stages, tuned: Tuning | None) -> Outcome:
    with ir.staged_folder(out) as folder:
        # Big tensors live on the disk of the output folder: the system's temporary folder may be memory.
        request, reference = _loaded(request, stages)
        outcome = _compress(request, reference, stages, Store(folder), dump=folder / DUMP if request.dump else None)
        outcome = _write(request, outcome, folder, stages, tuned)
    return dataclasses.replace(outcome, out=out)


def load(request: Request) -> onnx_ir.Model:
    """The model of a request, with its shapes fixed."""
    return _shaped(_read(request), request.shapes)


def _read(request: Request) -> onnx_ir.Model:
    match request.model:
        case onnx_ir.Model():
            return request.model
        case None if request.from_torch:
            return ir.from_torch(request.from_torch)
        case None if request.from_transformers:
            return ir.from_transformers(request.from_transformers, max_length=request.max_length)
        case None:
            raise ir.OptionError("no model was named; give an ONNX file, or --from-torch package.module:factory")
        case path:
            model = ir.load_model(path, check=request.check)
            if (tokenizer := ir.tokenizer_beside(Path(path), model)) is not None:
                model.meta[ir.TOKENIZER] = tokenizer
            return model


def _shaped(model: onnx_ir.Model, shapes: Mapping[str, tuple[int | str, ...]]) -> onnx_ir.Model:
    """The model itself, or a copy with its inputs fixed; what is known of its file goes along."""
    if not shapes:
        return model
    shaped = model.clone()
    shaped.meta.update(model.meta)
    ir.fix_shapes(shaped, shapes)
    return shaped


def _check_targets(chosen: tuple[targets.Target, ...]) -> None:
    names = [target.name for target in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ir.OptionError(f"target {name!r} is given twice; each goes into a folder of its name, give it once")


def _check_trained(pipeline: Pipeline) -> None:
    """Refuse training data that no pass would use."""
    names = [step.name for step in pipeline.passes]
    if any(isinstance(step, passes.TrainablePass) for step in pipeline.passes):
        return
    known = [name for name in passes.pass_names() if issubclass(passes.find_pass(name), passes.TrainablePass)]
    what = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not trained" if names else "no pass is given"
    raise ir.OptionError(f"there is training data and {what}; add one that is: {', '.join(known)}")


def _loaded(request: Request, stages: _Stages) -> tuple[Request, onnx_ir.Model]:
    """The request with the model and the data read, and the model as it came, its shapes not fixed."""
    with stages.stage("load"):
        reference = _read(request)
        model = _shaped(reference, request.shapes)
        data = request.data
        states = request.states or ir.states_of(model)
        ir.check_states(model, states)
        if isinstance(data, str | os.PathLike):
            data = ir.load_data(data, model, states=states)
    return dataclasses.replace(request, model=model, data=data, states=states), reference


def _compress(request: Request, reference: onnx_ir.Model, stages: _Stages, store: Store, dump: Path | None) -> Outcome:
    model, data = request.model, request.data
    assert isinstance(model, onnx_ir.Model)
    assert not isinstance(data, str | os.PathLike)
    for target in request.targets:
        target.check(model)
    ctx = Context(
        target=next((t for t in request.targets if t.makes_artefact), None),
        data=data,
        states=request.states,
        reference=reference,
        seed=request.seed,
        memory_limit=request.memory_limit,
        allow_scripts=request.allow_scripts,
        check="structure" if request.dry_run or not request.writes else request.check,
        store=store,
        training=request.training,
        dry_run=request.dry_run,
        on_progress=stages.tell,
    )
    with stages.stage("passes"):
        result = passes.run(model, request.pipeline, ctx, stop_after=request.stop_after, dump=dump)
    for target in request.targets:
        target.check_nodes(result.model)
    timings = {
        "schema_version": passes.SCHEMA_VERSION,
        "stages": stages.seconds,
        "passes": [{"name": name, "seconds": seconds} for name, seconds in result.seconds],
    }
    return Outcome(result.model, result.report, timings)


def _write(request: Request, outcome: Outcome, folder: Path, stages: _Stages, tuned: Tuning | None) -> Outcome:
    report = outcome.report
    with stages.stage("save"):
        saved = ir.save_model(outcome.model, folder / MODEL, reload=request.check)
    known = {path.name: digest for path, digest in zip(saved.paths, saved.sha256, strict=True)}
    assert isinstance(request.model, onnx_ir.Model)
    if (tokenizer := request.model.meta.get(ir.TOKENIZER)) is not None:
        ir.write_text(folder / ir.TOKENIZER_FILE, tokenizer)
    checks = [f"saved file reloaded ({request.check})"]
    samples: list[_artefact_check.Inputs] = []
    if request.check == "full" and not report.unchecked:
        with stages.stage("check"):
            samples = _artefact_check.first_samples(request, outcome.model, _data(request))
            _check_saved(outcome.model, folder / MODEL, samples[0])
        checks.append("saved file gives the same outputs in ONNX Runtime")
    built = []
    warnings = []
    builds: dict[str, Mapping[str, float]] = {}
    for target in request.targets:
        if not target.makes_artefact:
            built.append(passes.TargetReport(target.name, target.resolved()))
            continue
        tiles = None
        if tuned is not None:
            with stages.stage(f"tune {target.name}"):
                tiles = tuned.tiles(target, outcome.model, stages.tell)
        with stages.stage(f"build {target.name}"):
            place = folder / target.name
            place.mkdir()
            made = target.compile(outcome.model, place, stages.tell, tiles=tiles)
        known |= {f"{target.name}/{name}": digest for name, digest in made.files.items()}
        drift = None
        if samples:
            with stages.stage(f"check {target.name}"):
                drift, problem = _check_artefact(target, place, folder / MODEL, samples)
            if problem:
                warnings.append(problem)
        figures = {} if drift is None else drift.to_json()
        told = None if tuned is None else tuned.report(target, made.tiles)
        built.append(passes.TargetReport(target.name, made.resolved, made.kernels, made.fallbacks, figures, told))
        builds[target.name] = made.seconds
    if tuned is not None:
        ir.write_text(folder / FILE, tuned.table.text())
    report = dataclasses.replace(
        report,
        checks=(*report.checks, *checks),
        warnings=(*report.warnings, *warnings),
        targets=tuple(built),
        outputs=tuple(_outputs(folder, known)),
    )
    timings = {**outcome.timings, "stages": stages.seconds, "builds": builds}
    ir.write_text(folder / REPORT, report.text())
    ir.write_text(folder / TIMINGS, passes.json_text(timings))
    return Outcome(outcome.model, report, timings)


def _data(request: Request) -> ir.Data | None:
    """Real samples, the training's own where the request has no others."""
    if isinstance(request.data, ir.Data):
        return request.data
    assert isinstance(request.model, onnx_ir.Model)
    return passes.held_out_samples(request.training, request.model, seed=request.seed, states=request.states)


def _check_artefact(
    target: targets.Target, place: Path, path: Path, samples: Sequence[_artefact_check.Inputs]
) -> tuple[ir.Drift | None, str | None]:
    """How far an artefact is from the ONNX file beside it, where this machine runs it; and what is wrong with that."""
    artefact = target.load(place)
    if artefact is None:
        return None, None
    drift = _artefact_check.drift_of(artefact, path, samples)
    problem = _artefact_check.complaint(drift, path, samples) if target.exact else None
    return drift, None if problem is None else f"{target.name}: differs from {MODEL} by more than rounding: {problem}"


def _check_saved(model: onnx_ir.Model, path: Path, sample: _artefact_check.Inputs) -> None:
    """Run the file once and hold it to the model in memory: the same graph must give the same bytes."""
    drift = ir.compare(model, path, [sample])
    if not drift.equal:
        raise PassError(
            "save", MODEL, f"the saved file differs from the model in memory: max |a-b| {drift.max_abs:.3g}"
        )


def _outputs(folder: Path, known: Mapping[str, str]) -> Iterator[passes.File]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        yield passes.File(name, known.get(name) or _sha256(path), path.stat().st_size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
