"""The child's side of a build: lower, fuse, schedule, compile, link. Only this process has TVM's compiler loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import tvm
from tvm import relax, tirx

import mc_opt
from mc_opt import ir
from mc_opt.targets import _bound, _cuda, _device, _machine, _manifest, _prompt, _zig
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims, intrinsics, lower
from mc_opt.targets.kernels import _join, _schedule, _threads

_STEPS = 4
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Reporter:
    """Sends progress and the answer to the parent, one JSON object a line, and keeps the time of each step."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", buffering=1)
        self.seconds: dict[str, float] = {}

    def progress(self, done: int, total: int, what: str) -> None:
        """Say how far the build is."""
        self.send({"progress": [done, total, what]})

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        self._pipe.write(json.dumps(message) + "\n")

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce a step and take its time."""
        self.progress(len(self.seconds), _STEPS, what)
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start


def serve() -> None:
    """Entry of the child process: descriptor and request are its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means, and ends this process
    reporter = Reporter(int(sys.argv[1]))
    request = json.loads(sys.argv[2])
    machine = Machine(**{**request["machine"], "features": tuple(request["machine"]["features"])})
    try:
        answer = _build(request, machine, reporter)
    except Exception as error:
        answer = described(error)
    reporter.send(answer)


def described(error: Exception) -> dict[str, Any]:
    """What the parent is told of an error: its kind, one line, and the traceback of a mistake of ours or of TVM's."""
    match error:
        case MemoryError():
            kind, text = "LimitError", "the build ran out of memory; build on a machine with more"
        case OSError() if error.errno in _DISK_FULL:
            kind, text = "LimitError", f"the build: {error.strerror}; free some space, or write to another disk"
        case ir.IRError():
            kind, text = type(error).__name__, str(error)
        case _:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            kind, text = "", f"{type(error).__name__}: {said[-1]}" if said else type(error).__name__
    return {"kind": kind, "error": text, "traceback": "".join(traceback.format_exception(error))}


def _build(request: Mapping[str, Any], machine: Machine, reporter: Reporter) -> dict[str, Any]:
    tiles = json.loads(Path(request["tiles"]).read_text(encoding="utf-8"))
    folder, form = Path(request["folder"]), request["form"]
    intrinsics.register()
    model = ir.load_model(request["model"], check="structure")
    reader = None
    if request["prompt"]:
        model, reader = _prompt.step_of(model), _prompt.reader_of(model, request["prompt"])
    target = target_of(machine)
    with reporter.step("lower"):
        # A static artefact's inputs are constant, and a GPU writes no rows one after the other.
        states = ir.states_of(model) if form == "vm" and machine.kind != "cuda" else {}
        lowered = lower.lower(
            model, machine, lambda _done, _total, _what: None, states=states, tiles=tiles, prompt=reader
        )
        inputs, outputs = ([str(v.name) for v in ports] for ports in (model.graph.inputs, model.graph.outputs))
        del model, reader
    with target:
        with reporter.step("fuse and schedule"):
            module = fuse(lowered.module)
            main = next(f for v, f in module.functions.items() if v.name_hint == "main")
            types = [([_extent(d) for d in t.shape], str(t.dtype)) for t in main.ret_ty.fields]
            module, joined = (module, []) if machine.kind == "cuda" else _join.join(module, machine)
            module, notes = schedule(module, machine, target)
        if form == "static":
            _write_static(module, machine, folder, prefix=request["prefix"], names=(inputs, outputs), reporter=reporter)
        elif machine.kind == "cuda":
            _write_device(module, target, folder, arch=machine.cpu, code=cast(_cuda.Code, form), reporter=reporter)
        else:
            _write_vm(module, target, folder, reporter, has_states=bool(states))
    return {
        "outputs": [[n, shape, dtype] for n, (shape, dtype) in zip(outputs, types, strict=True)],
        "kernels": sorted([*lowered.kernels, *joined]),
        "fallbacks": sorted([*lowered.fallbacks, *notes]),
        "limits": lowered.limits,
        "tiles": lowered.choices.tiles,
        "seconds": reporter.seconds,
    }


def _extent(d: Any) -> int | str:
    """An extent as the manifest has it: a number, or the text of an open one."""
    size = dims.dim(d)
    return size if isinstance(size, int) else dims.text(size)


def target_of(machine: Machine) -> tvm.target.Target:
    """TVM's target for a machine."""
    return _device.cuda_target(machine) if machine.kind == "cuda" else llvm_target(machine)


def schedule(module: tvm.IRModule, machine: Machine, target: tvm.target.Target) -> tuple[tvm.IRModule, list[str]]:
    """Schedule every kernel of a fused module, inside the target's scope; returns the notes too."""
    return _threads.bind(module, target) if machine.kind == "cuda" else _schedule.schedule(module, machine)


def llvm_target(machine: Machine) -> tvm.target.Target:
    """The LLVM target of a machine."""
    attributes = [f"+{feature}" for feature in machine.features]
    if machine.lanes == 16:
        attributes.append("-prefer-256-bit")  # LLVM's default halves our vectors on older AVX-512 processors
    if machine.kind == "arm":
        attributes += _machine.UNUSED_ON_ARM
    return tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": f"{_machine.ARCHITECTURES[machine.kind]}-linux-gnu",
            "mcpu": machine.cpu,
            "mattr": attributes,
            "num-cores": machine.threads,
        }
    )


def fuse(module: tvm.IRModule) -> tvm.IRModule:
    """Fuse elementwise work into its producers; the result's main is a straight list of call_tir."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.DeadCodeElimination(),
            transform.AnnotateTIROpPattern(),
            tvm.transform.module_pass(lambda module, _: _schedule.correct_patterns(module), opt_level=0),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
        ]
    )(module)


def _pipeline(*last: tvm.transform.Pass) -> tvm.transform.Pass:
    """The rest of the way to the virtual machine; no folding of constants, which would decode packed weights."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            # The results of one kernel, once more in a tuple, would take as long as a small kernel.
            transform.CanonicalizeBindings(),
            transform.DeadCodeElimination(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            *last,
            transform.AttachGlobalSymbol(),
        ]
    )


def _write_vm(
    module: tvm.IRModule, target: tvm.target.Target, folder: Path, reporter: Reporter, *, has_states: bool
) -> None:
    constants = _bound.Constants()
    with reporter.step("compile"):
        code = tvm.transform.module_pass(lambda lowered, _: _with_code(lowered), opt_level=0)
        pipeline = _pipeline(_bound.bind(constants, has_states=has_states), code)
        # Loaders check inputs of fixed sizes, and all else follows: the asserts would be half of the library.
        main = next(f for v, f in module.functions.items() if v.name_hint == "main")
        is_fixed = dims.is_static([dims.dim(d) for p in main.params for d in p.ty.shape])
        with tvm.transform.PassContext(config={"tirx.disable_assert": is_fixed}):
            executable = tvm.compile(module, target=target, relax_pipeline=pipeline, tir_pipeline=intrinsics.PIPELINE)
    with reporter.step("link"):
        work = folder / "objects"
        work.mkdir()
        executable.export_library(str(folder / "model.so"), fcompile=_linker(), workspace_dir=str(work))
        shutil.rmtree(work)
        constants.write(folder / _manifest.CONSTANTS)


def _with_code(module: tvm.IRModule) -> tvm.IRModule:
    """A lowered module with a kernel that does nothing, where it has none: without machine code TVM has C to link."""
    if any(isinstance(f, tirx.PrimFunc) for f in module.functions.values()):
        return module
    name = "nothing"
    module = module.clone()
    module[tvm.ir.GlobalVar(name)] = tirx.PrimFunc([], tirx.Evaluate(0)).with_attr("global_symbol", name)
    return module


def _write_device(
    module: tvm.IRModule,
    target: tvm.target.Target,
    folder: Path,
    *,
    arch: str,
    code: _cuda.Code,
    reporter: Reporter,
) -> None:
    with reporter.step("compile"):
        _device.register()
        names: set[str] = set()

        def keep(lowered: tvm.IRModule, _context: Any) -> tvm.IRModule:
            # Some kernels became views on the way.
            names.update(v.name_hint for v, f in lowered.functions.items() if isinstance(f, tirx.PrimFunc))
            return lowered

        last = tvm.transform.module_pass(keep, opt_level=0, name="Kept")
        executable = tvm.compile(module, target=target, relax_pipeline=_pipeline(last))
        device = _device.device_module(executable, names & {v.name_hint for v in module.functions})
    with reporter.step("link"):
        _device.link(executable, device, folder / "model.so", arch=arch, code=code)


def _write_static(
    module: tvm.IRModule,
    machine: Machine,
    folder: Path,
    *,
    prefix: str,
    names: tuple[list[str], list[str]],
    reporter: Reporter,
) -> None:
    from mc_opt.targets import _c  # only this form needs the C compiler that it looks for
    from mc_opt.targets._c_source import Identity

    versions = f"mc-opt {mc_opt.__version__}, TVM {tvm.__version__}"
    identity = Identity(prefix, machine.kind, machine.cpu, machine.features, versions)
    _c.print_c(module, llvm_target(machine), folder, names=names, identity=identity, step=reporter.step)


def _linker() -> Callable[..., None]:
    """Links objects with the linker of the `ziglang` package: no compiler on the system is needed."""

    def link(output: str, objects: Sequence[str], **_options: Any) -> None:
        words = ("-shared", "--build-id=none", "--strip-all", "-o", output, *objects)
        _zig.run("ld.lld", *words, cache=Path(output).parent / "objects" / "cache")

    return link
