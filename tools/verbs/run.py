"""`mc-opt run`: run an artefact or an ONNX model on data and keep the outputs."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_opt.tools import _command, _console, _texts

if TYPE_CHECKING:
    import numpy as np


@click.command(cls=_command.Command)
@click.argument("model", metavar="DIR|MODEL", type=click.Path(path_type=Path))
@click.option(
    "--data", "data_path", type=click.Path(path_type=Path), help="An .npz file or a folder of them: one array an input."
)
@click.option(
    "--target", default=None, help="Which artefact of DIR to run, or `onnx`; default: what this machine runs."
)
@click.option(
    "--state", "states", multiple=True, metavar="OUT=IN", help="Carry output OUT into input IN of the next sample."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of random inputs, when there is no --data.")
@click.option("--generate", "text", metavar="TEXT", help="Continue TEXT with a causal language model, to stdout.")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Of --generate: at most N tokens; default 64.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="T",
    help="Of --generate: draw from softmax(logits / T); default 0, which takes the likeliest.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of ONNX Runtime (default 1), or of an artefact built for several."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz, first axis = samples."
)
@_console.common_options
def command(
    model: Path,
    data_path: Path | None,
    target: str | None,
    states: tuple[str, ...],
    seed: int,
    text: str | None,
    tokens: int | None,
    temperature: float | None,
    threads: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the artefact in DIR, or an ONNX model in ONNX Runtime; running an artefact executes native code."""
    if text is not None:
        _check_alone({"--data": data_path, "--state": states, "--threads": threads, "--output": output})
        _generate(model, target, text, tokens or 64, temperature=temperature or 0.0, seed=seed, as_json=as_json)
        return
    if tokens is not None or temperature is not None:
        raise click.UsageError("--tokens and --temperature belong to --generate; give it a text")
    import numpy as np

    from mc_opt import ir

    carried = _texts.pairs(states, "--state")
    onnx_file = model / "model.onnx" if model.is_dir() else model
    artefacts = sorted(p.parent.name for p in model.glob("*/manifest.json")) if model.is_dir() else []
    if target not in (None, "onnx", *artefacts):
        raise ir.OptionError(f"{model}: {ir.unknown('artefact', target or '', [*artefacts, 'onnx'])}")
    by_runtime = target == "onnx" or not artefacts
    # Of the file beside an artefact only the interface is asked.
    source = ir.load_model(onnx_file, check="structure") if by_runtime else ir.read_model(onnx_file, hashes=False)
    ir.check_states(source, carried)
    if data_path is None:
        data = ir.seeded_data(source, 1, seed, states=carried)
        click.echo("warning: no --data: one seeded random sample; its numbers mean little", err=True)
    else:
        data = ir.load_data(data_path, source, states=carried)
    if by_runtime:
        name, run = "ONNX Runtime", ir.Session(onnx_file, threads=threads or 1).run
    else:
        name, run = _artefact(model, target, threads)
    columns: dict[str, list[Any]] = {}
    right: list[bool | None] = []
    state: dict[str, np.ndarray] = {}
    started = time.perf_counter()
    for sample in data:
        outputs = run({**state, **sample.inputs})  # a sample that has a state itself begins a new sequence
        state = {into: outputs[out] for out, into in carried.items()}
        for key, value in outputs.items():
            columns.setdefault(key, []).append(np.asarray(value))
        right.append(ir.is_right(outputs, sample.label))
    seconds = time.perf_counter() - started
    if output is not None:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {key: _joined(values) for key, values in columns.items()}
        np.savez(buffer, **arrays)  # noqa: TID251 - into memory; the file is written atomically below
        ir.write_bytes(output, buffer.getvalue())
    count = len(right)
    summary: dict[str, Any] = {
        "run_by": name,
        "samples": count,
        "ms_per_sample": 1000 * seconds / max(count, 1),
        "outputs": [_summary(key, values) for key, values in columns.items()],
        "accuracy": ir.accuracy(right),
    }
    if as_json:
        _console.print_json(summary)
        return
    click.echo(f"{name}: {count} sample{'' if count == 1 else 's'}, {summary['ms_per_sample']:.3g} ms each")
    rows = [(o["name"], o["shape"], o["min"], o["max"], o["mean"], o["nonfinite"]) for o in summary["outputs"]]
    _console.print_table(("output", "shape", "min", "max", "mean", "NaN or infinite"), rows)
    if summary["accuracy"] is not None:
        click.echo(f"largest output equals the label: {summary['accuracy']:.2%}")


def _check_alone(given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise click.UsageError(f"{option} and --generate were both given; --generate makes its own inputs")


def _generate(
    model: Path, target: str | None, text: str, tokens: int, *, temperature: float, seed: int, as_json: bool
) -> None:
    """Continue a text: it streams to stdout, the speed goes to stderr."""
    from mc_opt.tools import _generate

    def show(piece: str) -> None:
        if not as_json:
            click.echo(piece, nl=False)

    generator = _generate.load_generator(model, target)
    choice = _generate.Choice(temperature, seed)
    made = _generate.generate(generator, text, count=tokens, choice=choice, show=show)
    speed = made.tokens_per_second
    if as_json:
        _console.print_json({"run_by": generator.name, **dataclasses.asdict(made), "tokens_per_second": speed})
        return
    click.echo()
    rate = "" if speed is None else f", then {speed:.1f} tokens/s"
    click.echo(
        f"{generator.name}: {made.prompt_tokens} tokens read in {made.first:.2f} s, {len(made.tokens)} made{rate}",
        err=True,
    )


def _artefact(model: Path, target: str | None, threads: int | None) -> tuple[str, Any]:
    """What runs a sample by an artefact of a folder, and its name."""
    from mc_opt import targets

    artefact = targets.load_artefact(model, target, threads=threads)
    if threads not in (None, artefact.threads):
        click.echo("warning: --threads: the artefact was built for one thread, and runs on one", err=True)
    return f"artefact {target or 'of ' + str(model)}", artefact.run


def _joined(values: list[Any]) -> Any:
    """Samples along a new first axis, or along a first axis of 1, as --data takes them."""
    import numpy as np

    if values[0].ndim and len({(1, *v.shape[1:]) for v in values} | {v.shape for v in values}) == 1:
        return np.concatenate(values)
    if len({v.shape for v in values}) > 1:
        from mc_opt import ir

        raise ir.DataError("the outputs of the samples differ in shape and fit in no array; run them one at a time")
    return np.stack(values)


def _summary(name: str, values: list[Any]) -> dict[str, Any]:
    import numpy as np

    row: dict[str, Any] = {
        "name": name,
        "shape": "x".join(map(str, values[0].shape)) or "scalar",
        "type": str(values[0].dtype),
    }
    numbers = np.concatenate([v.reshape(-1) for v in values])
    if numbers.dtype.kind not in "fiub" or not numbers.size:
        return row | {"min": None, "max": None, "mean": None, "nonfinite": 0}
    finite = numbers[np.isfinite(numbers)].astype(np.float64)
    bad = int(numbers.size - finite.size)
    if not finite.size:
        return row | {"min": None, "max": None, "mean": None, "nonfinite": bad}
    return row | {
        "min": float(finite.min()),
        "max": float(finite.max()),
        "mean": float(finite.mean()),
        "nonfinite": bad,
    }
