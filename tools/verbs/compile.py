"""The default verb, `mc-opt MODEL --passes ...`: compress a model, write the result and build artefacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_opt.tools import _command, _console, _failure, _request, _train_options

if TYPE_CHECKING:
    from mc_opt.passes import PassReport, Report, TrainingReport, TuningReport
    from mc_opt.tools.driver import Outcome


@click.command(epilog=_failure.EXIT_CODES, cls=_command.Command)
@click.argument("words", metavar="MODEL", nargs=-1)
@_request.pass_options
@click.option("--target", metavar="LIST", help="Where it will run, as in 'onnx,x86{cpu=x86-64-v3}'; default onnx.")
@click.option("-o", "--output", "out", metavar="DIR", type=click.Path(path_type=Path), help="The folder to write.")
@_request.model_options
@_request.torch_option
@_request.transformers_options
@click.option("--check", metavar="full|structure", help="How much is checked; default full.")
@click.option("--dry-run", is_flag=True, help="Say which layers would change and their bytes; write nothing.")
@click.option("--dump", is_flag=True, help="Write the model as text after every pass to DIR/ir.")
@click.option("--stop-after", metavar="PASS", help="End after this pass.")
@click.option("--memory-limit", metavar="SIZE", help="Skip checks that need more, as in 4GiB.")
@_request.tune_options
@_train_options.train_options
@_console.common_options
@click.pass_obj
def command(process: int | None, /, words: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compress MODEL by passes, write it to DIR and build artefacts for targets."""
    request = _request.compile_request(words, options, process=process or 0)
    from mc_opt.tools import driver

    if not request.writes:
        driver.compile_model(request)
        return
    with _console.Progress() as progress:
        outcome = driver.compile_model(request, progress)
    if as_json:
        folder = str(outcome.out) if outcome.out else None
        _console.print_json({"out": folder, "report": outcome.report.to_json(), "timings": outcome.timings})
    else:
        _print(outcome, dry_run=request.dry_run)
    for warning in outcome.report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print(outcome: Outcome, *, dry_run: bool) -> None:
    report = outcome.report
    seconds = [f"{row['seconds']:.3f}" for row in outcome.timings["passes"]]
    rows = [
        (p.name, p.rewrites, _bytes(p, "before"), _bytes(p, "after"), *_drift(p), taken)
        for p, taken in zip(report.passes, seconds, strict=True)
    ]
    columns = ("pass", "rewrites", "bytes before", "bytes after", "SQNR dB", "max/spread", "top-1", "seconds")
    _console.print_table(columns, rows)
    if dry_run:
        users = _users(outcome)
        layers = [
            (y.layer, users.get(y.layer), y.rewritten_by, y.elements, y.bytes_before, y.bytes_after, y.bits)
            for y in report.layers
        ]
        headings = ("layer", "used by", "pass", "elements", "bytes before", "bytes after", "bits each")
        _console.print_table(headings, layers, title="Layers that would change")
        skips = [(p.name, layer, reason) for p in report.passes for layer, reason in p.skips.items()]
        _console.print_table(("pass", "layer", "left alone because"), skips, title="Layers left alone")
    before, after = (_console.size_text(size.weight_bytes) for size in (report.before, report.after))
    click.echo(f"\nweights {before} -> {after}, nodes {report.before.nodes} -> {report.after.nodes}")
    if (accuracy := _accuracy(report)) is not None:
        click.echo(accuracy)
    for p in report.passes:
        if p.training is not None:
            click.echo(_planned(p.training) if dry_run else _trained(p.training))
    for target in report.targets:
        click.echo(f"target {target.resolved}")
        if target.drift:
            click.echo(f"  {_apart(target.drift)}")
        for line in target.fallbacks:
            click.echo(f"  general form: {line}")
        if target.tuning is not None:
            _print_tuning(target.tuning)
    for unchecked in report.unchecked:
        click.echo(f"not checked: {unchecked.check}: {unchecked.reason}")
    if outcome.out is not None:
        for file in report.outputs:
            click.echo(f"{outcome.out / file.path}  {_console.size_text(file.bytes)}")


def _print_tuning(tuning: TuningReport) -> None:
    """What a table of tiles did: shape by shape where it chose another than the rule."""
    if not tuning.measured and not tuning.by_rule:
        click.echo("  tiles: no kernel offers any; those with an open size have the rule's (--shape fixes it)")
        return
    parts = [f"{tuning.measured} shapes measured{f' on {tuning.processor}' if tuning.processor else ''}"]
    parts.append(f"{len(tuning.tuned)} faster than the rule's")
    if tuning.by_rule:
        parts.append(f"{len(tuning.by_rule)} not in the table: the rule's")
    if tuning.failed:
        parts.append(f"{tuning.failed} candidates failed")
    click.echo(f"  tiles: {', '.join(parts)}")
    for kernel in tuning.tuned:
        share = "" if kernel.ratio is None else f", {kernel.ratio:.2f} of the time"
        click.echo(f"    {kernel.shape}: {kernel.tile} instead of {kernel.rule}{share}")
    for line in tuning.unused:
        click.echo(f"  not used, of another machine or version: {line}")


def _users(outcome: Outcome) -> dict[str, str]:
    """Layer to the nodes that use its weight."""
    from mc_opt import ir, passes

    view = ir.graph_of(outcome.model)
    users = ir.users(view)
    weights = {ir.layer_of(value): str(value.name) for value, _ in passes.weights(outcome.model)}
    return {layer: ", ".join(ir.label(view, node) for node in users.get(name, ())) for layer, name in weights.items()}


def _accuracy(report: Report) -> str | None:
    """How often the largest entry of the first output is the label, before and after, when the data has labels."""
    drift = next((p.drift["reference"] for p in reversed(report.passes) if p.drift), None)
    if drift is None or drift["accuracy_reference"] is None or drift["accuracy_other"] is None:
        return None
    before, after = (f"{drift[key]:.2%}" for key in ("accuracy_reference", "accuracy_other"))
    return f"accuracy {before} -> {after} on {drift['samples']} labelled samples"


def _trained(training: TrainingReport) -> str:
    """One line of what a training did, from its first epoch to the one that was kept."""
    ends = training.epochs[:: max(len(training.epochs) - 1, 1)]
    losses = " -> ".join(f"{epoch.loss:.4g}" for epoch in ends)
    count = len(training.epochs)
    parts = [f"{count} epoch{'s' if count != 1 else ''}", f"{training.samples} samples", f"loss {losses}"]
    kept = training.epochs[training.best - 1] if training.best else training.start
    figures = [epoch.metric for epoch in (training.start, kept) if epoch is not None and epoch.metric is not None]
    if figures:
        figure = " -> ".join(f"{value:.4g}" for value in figures)
        parts.append(f"{training.metric} on {training.held_out} held-out {figure}")
    if training.best < len(training.epochs):
        parts[-1] += f" (epoch {training.best} was best)" if training.best else " (the start was best)"
    return f"trained {'+'.join(training.passes)}: {', '.join(parts)}"


def _planned(training: TrainingReport) -> str:
    """One line of what a training would do."""
    held_out = f" and {training.held_out} held out" if training.held_out else ""
    return (
        f"would train {'+'.join(training.passes)}: {training.parameters} parameters, {training.samples} samples"
        f"{held_out}, {training.batches} batches an epoch, {training.steps} steps"
    )


def _apart(drift: Mapping[str, Any]) -> str:
    """One line of how far an artefact is from the ONNX file."""
    shares = [output["relative"] for output in drift["outputs"]]
    samples = f"{drift['samples']} sample{'' if drift['samples'] == 1 else 's'}"
    if None in shares:  # an output that is one number throughout
        return f"differs from model.onnx by {max(o['max_abs'] for o in drift['outputs']):.2g} ({samples})"
    return f"differs from model.onnx by {max(shares, default=0.0):.2g} of the range ({samples})"


def _bytes(report: PassReport, when: str) -> str:
    return _console.size_text(report.columns.get(f"weight_bytes_{when}", 0))


def _drift(report: PassReport) -> tuple[float | str | None, float | None, float | None]:
    """The worst output against the original: SQNR in dB, largest difference over spread, top-1 agreement."""
    outputs = report.drift.get("reference", {}).get("outputs", ())
    if not outputs:
        return (None, None, None)
    if all(o["max_abs"] == 0 for o in outputs):
        return ("equal", 0.0, 1.0)
    decibels = [o["sqnr_db"] for o in outputs if o["sqnr_db"] is not None]
    shares = [o["relative"] for o in outputs if o["relative"] is not None]
    agreement = [o["top1"] for o in outputs if o["top1"] is not None]
    return (
        round(min(decibels), 1) if decibels else None,
        max(shares, default=None),
        min(agreement, default=None),
    )
