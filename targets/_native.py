"""What the targets that make machine code share: their options' ranges, the build in its process, the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

import mc_opt
from mc_opt import ir
from mc_opt.targets import _c_source, _installed, _manifest, _process, _prompt
from mc_opt.targets._base import Built, Progress
from mc_opt.targets._machine import Machine
from mc_opt.targets._manifest import Port
from mc_opt.targets._open import open_shapes
from mc_opt.targets._refusal import check, check_nodes
from mc_opt.targets._runner import runner

if TYPE_CHECKING:
    from mc_opt.targets._vm import Artefact


def check_options(*, threads: int, form: str, prefix: str) -> None:
    """Check the ranges of the options.

    Raises:
        ValueError: naming the option, what it is and what was expected.
    """
    if not 1 <= threads <= 256:
        raise ValueError(f"threads={threads}: expected 1 to 256")
    if form == "static" and threads != 1:
        raise ValueError(f"threads={threads}: form=static runs in the caller's thread; leave threads=1")
    if not _c_source.is_prefix(prefix):
        raise ValueError(f"prefix={prefix}: expected a name in C: letters, digits and _, a letter first")
    if form == "vm" and prefix != "model":
        raise ValueError(f"prefix={prefix}: names the files of form=static; form=vm has none")


def resolved(machine: Machine, *, form: str, prefix: str) -> str:
    """The target with everything spelled out that was found out at build time."""
    if machine.kind == "cuda":
        return f"cuda{{arch={machine.cpu} code={form}}}"
    features = ",".join(f"+{f}" for f in machine.features)
    named = "" if form == "vm" else f" prefix={prefix}"
    rounded = "" if machine.activations == "float32" else f" activations={machine.activations}"
    options = f"cpu={machine.cpu} features={features} threads={machine.threads} form={form}{rounded}{named}"
    return f"{machine.kind}{{{options}}}"


def compile_model(
    model: onnx_ir.Model,
    folder: Path,
    machine: Machine,
    *,
    form: str,
    prefix: str,
    progress: Progress,
    tiles: Mapping[str, str] | None = None,
) -> Built:
    """Build the artefact into `folder`, which exists and is empty.

    Raises:
        TargetError: the model cannot be built; the text names the input or node and what to do.
    """
    check(model, machine.kind, form=form)
    _installed.check_compiler()
    check_nodes(model, machine.kind)
    chunk = _prompt.chunk_of(model) if form == "vm" and machine.kind != "cuda" else 0
    answer = _process.build(
        model, folder, machine, form=form, prefix=prefix, progress=progress, tiles=tiles, prompt=chunk
    )
    inputs = _inputs(_prompt.step_of(model) if chunk else model)
    outputs = tuple(Port(n, tuple(shape), dtype) for n, shape, dtype in answer["outputs"])
    if form != "static":
        (folder / "runner.cc").write_text(runner(inputs, outputs, machine), encoding="utf-8")
    files = {p.name: _manifest.sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
    manifest = _manifest.Manifest(
        schema_version=_manifest.SCHEMA_VERSION,
        mc_opt=mc_opt.__version__,
        tvm=_installed.tvm_version(),
        target=resolved(machine, form=form, prefix=prefix),
        kind=machine.kind,
        form=form,
        cpu=machine.cpu,
        features=machine.features,
        threads=machine.threads,
        inputs=inputs,
        outputs=outputs,
        kernels=tuple(answer["kernels"]),
        fallbacks=tuple(answer["fallbacks"]),
        files=files,
        limits=answer["limits"],
        states=ir.states_of(model),
        prompt=chunk,
    )
    (folder / _manifest.NAME).write_text(manifest.text(), encoding="utf-8")
    return Built(
        folder=folder,
        files=files,
        resolved=manifest.target,
        kernels=manifest.kernels,
        fallbacks=manifest.fallbacks,
        seconds=answer["seconds"],
        tiles=answer["tiles"],
    )


def load(folder: Path) -> Artefact | None:
    """The artefact in `folder`; None where this machine does not run it."""
    from mc_opt.targets import _vm  # which needs TVM's runtime; builds do not

    return None if _vm.unfit(_manifest.read(folder)) is not None else _vm.load_artefact(folder)


def _inputs(model: onnx_ir.Model) -> tuple[Port, ...]:
    ports = []
    for value, shape in zip(model.graph.inputs, open_shapes(model), strict=True):
        assert value.name is not None and value.dtype is not None  # check() saw to it
        ports.append(Port(value.name, shape, str(np.dtype(value.dtype.numpy()))))
    return tuple(ports)
