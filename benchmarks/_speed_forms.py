"""The contenders of benchmarks/speed.py: how each form of a model is made, kept in a folder, and opened to run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mc_opt
from benchmarks._speed_decode import Bound, Step
from mc_opt import ir

if TYPE_CHECKING:  # a process whose memory is measured imports no more than it needs
    from benchmarks._speed_models import Timed
    from tests.models.inputs import Arrays

ROOT = Path(__file__).resolve().parents[1]
FLOAT, INTEGER, TORCH = "ONNX Runtime fp32", "ONNX Runtime quantised", "torch"
DENSE, COMPRESSED, SERIAL = "mc-opt dense", "mc-opt compressed", "mc-opt dense, 1 thread"
ROUNDED = "mc-opt compressed int8"
EXACT = "fold-constants,fold-batch-norm"
PACKAGES = ("onnxruntime", "torch", "apache-tvm", "numpy", "onnx")
# What graphs, artefacts and measured cells depend on.
_NETWORKS = tuple(f"benchmarks/{name}.py" for name in ("resnet18", "resnet50", "mobilenet_v2"))
_FORMS = tuple(f"benchmarks/_speed_{name}.py" for name in ("models", "forms", "decode"))
SOURCES = ("ir", "mc_opt", "tests/models", *_FORMS, *_NETWORKS)
ARTEFACTS = (*SOURCES, "targets", "passes")
_MEASURING = ("cell", "gemv", "kernels", "machine", "memory", "ports")
CELLS = (*ARTEFACTS, "tools/_timing.py", *(f"benchmarks/_speed_{name}.py" for name in _MEASURING))

Run = Callable[[], Any]


@dataclass(frozen=True)
class Request:
    """What a cell is asked.

    Attributes:
        model: name of the model.
        weights: how the compressed form's weights are compressed.
        threads: of every contender.
        rounds: of the interleaved run.
        processor_time: whether the clock is the processor's time (one thread only) and not the wall's.
        beside: whether processes' memory and the kernels are measured too.
        root: folder of the public models.
        cache: folder of what is kept between runs.
    """

    model: str
    weights: str
    threads: int
    rounds: int
    processor_time: bool
    beside: bool
    root: str
    cache: str

    @property
    def folder(self) -> Path:
        """Of the model's files."""
        return Path(self.cache) / self.model

    def recipe(self, form: str) -> str:
        """The passes that make a form of ours."""
        return f"{EXACT},{self.weights}" if form in (COMPRESSED, ROUNDED) else EXACT

    def text(self) -> str:
        """The argument of the process that measures it."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Opened:
    """A contender that is loaded.

    Attributes:
        run: one call on the sample that is timed; returns its outputs.
        detail: which form it is, where there are several.
    """

    run: Run
    detail: str = ""

    def outputs(self) -> list[np.ndarray]:
        """The outputs as arrays, in the model's order."""
        found = self.run()
        if isinstance(found, Mapping):
            found = found.values()
        elif not isinstance(found, list | tuple):
            found = [found]
        return [np.asarray(value) for value in found]


def fingerprint(places: Sequence[str]) -> str:
    """Of the code in these files and folders, and of the packages that take part."""
    digest = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    digest.update(json.dumps(versions()).encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of the packages that take part."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


# --- making -------------------------------------------------------------------------------------


def make_sources(model: Timed, root: Path, folder: Path) -> dict[str, str]:
    """Write source.onnx, its states and samples and the quantised forms; returns why one could not be made."""
    source = model.graph(root)
    states = ir.states_of(source)
    if ir.written_in_place(source, states) != set(states.values()):
        raise ValueError(f"{model.name}: a state has no node that may write it in place")
    (folder / "states.json").write_text(json.dumps(states))
    mc_opt.save_model(source, folder / "source.onnx")
    del source
    names = [
        given.name for given in _session(folder / "source.onnx", 1).get_inputs() if given.name not in states.values()
    ]
    samples = [{name: sample[name] for name in names} for sample in model.samples(root)]
    np.savez(folder / "samples.npz", **{f"{k}/{name}": v for k, s in enumerate(samples) for name, v in s.items()})
    reasons: dict[str, str] = {}
    bare = _bare(folder / "source.onnx", folder / "bare.onnx")
    forms = {"dynamic int8": _dynamic, "MatMulNBits 4 bits": _few_bits}
    if model.layers == "convolutions":
        forms = {"static int8": _static} | forms
    for name, make in forms.items():
        try:
            make(bare, folder / f"{name}.onnx", samples)
            _onnx(folder / f"{name}.onnx", states, 1)(samples[0])
        except Exception as error:  # whatever another package raises on a model that it does not take
            (folder / f"{name}.onnx").unlink(missing_ok=True)
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    bare.unlink()
    return reasons


def make_artefact(request: Request, form: str, threads: int) -> None:
    """Build the artefact of a form into the model's folder, as <form>-<threads>."""
    folder = request.folder
    model, _ = mc_opt.compress(mc_opt.load_model(folder / "source.onnx"), request.recipe(form), check="structure")
    options = f"threads={threads}{' activations=int8' if form == ROUNDED else ''}"
    mc_opt.build(model, f"x86{{{options}}}", artefact_folder(folder, form, threads), check="structure")


def artefact_folder(folder: Path, form: str, threads: int) -> Path:
    """Where an artefact stands."""
    return folder / f"{form.split(',')[0].removeprefix('mc-opt ')}-{threads}"


def states_of(folder: Path) -> dict[str, str]:
    """The states that `make_sources` found, output name to input name."""
    found: dict[str, str] = json.loads((folder / "states.json").read_text())
    return found


def samples_of(folder: Path) -> list[Arrays]:
    """The samples that `make_sources` kept."""
    found: dict[int, Arrays] = {}
    with np.load(folder / "samples.npz") as arrays:
        for key in arrays.files:
            index, name = key.split("/", 1)
            found.setdefault(int(index), {})[name] = arrays[key]
    return [found[index] for index in sorted(found)]


class _Samples:
    """The samples as ONNX Runtime's calibration reads them."""

    def __init__(self, samples: Iterable[Arrays]) -> None:
        self._rest = iter(samples)

    def get_next(self) -> Arrays | None:
        """The next one; None at the end."""
        return next(self._rest, None)


def _bare(source: Path, out: Path) -> Path:
    """Write the model as ONNX Runtime's quantisers take it.

    Without inner types, as they change some and trip over the old ones; a Gemm has its weight for itself, as they
    transpose it and forget who else reads it.
    """
    import onnx

    proto = onnx.load_model(source)
    graph = proto.graph
    del graph.value_info[:]
    uses = Counter(name for node in graph.node for name in node.input)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gemm" and uses[node.input[1]] > 1 and node.input[1] in weights:
            own = graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{node.input[1]}.gemm"
    onnx.save_model(proto, out)
    return out


def _static(source: Path, out: Path, samples: Sequence[Arrays]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader = type("Reader", (_Samples, CalibrationDataReader), {})(samples)
    ready = out.with_suffix(".ready.onnx")
    quant_pre_process(source, ready, skip_symbolic_shape=True)
    quantize_static(
        ready,
        out,
        reader,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()


def _dynamic(source: Path, out: Path, _: Sequence[Arrays]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Convolutions are left: ConvInteger has no fast kernel.
    kinds = ["MatMul", "Gemm", "LSTM", "Attention", "Gather", "EmbedLayerNormalization"]
    quantize_dynamic(source, out, op_types_to_quantize=kinds, per_channel=True, weight_type=QuantType.QInt8)


def _few_bits(source: Path, out: Path, _: Sequence[Arrays]) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    proto = ONNXModel(onnx.load_model(source))
    proto.replace_gemm_with_matmul()  # it knows no Gemm
    quantizer = MatMulNBitsQuantizer(proto.model, bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        raise ValueError("no MatMul with a constant weight")
    onnx.save_model(quantizer.model.model, out)


# --- opening ------------------------------------------------------------------------------------


def open_form(form: str, request: Request) -> Opened:
    """Load one contender of a cell; the quantised one is that which `chosen-<threads>` names."""
    folder, threads = request.folder, request.threads
    match form:
        case "ONNX Runtime fp32":
            return open_kept(folder, "source", threads)
        case "ONNX Runtime quantised":
            return open_kept(folder, (folder / f"chosen-{threads}").read_text(), threads)
        case "torch":
            return _opened(folder, *_torch(request))
        case "mc-opt dense" | "mc-opt compressed" | "mc-opt compressed int8" | "mc-opt dense, 1 thread":
            artefact = mc_opt.load(artefact_folder(folder, form, 1 if form == SERIAL else threads))
            step = artefact.stream().run if states_of(folder) else artefact.run
            return _opened(folder, step, request.weights if form in (COMPRESSED, ROUNDED) else "")
        case _:
            peer = _model_of(request).peers[form]
            return _opened(folder, peer(Path(request.root), threads))


def _opened(folder: Path, step: Step, detail: str = "") -> Opened:
    """A step on the sample that is timed: of a model that keeps states the last, after the others."""
    samples = samples_of(folder)
    if not states_of(folder):
        return Opened(lambda: step(samples[0]), detail)
    for sample in samples[:-1]:
        step(sample)
    return Opened(lambda: step(samples[-1]), detail)


def open_onnx(path: Path, sample: Arrays, threads: int) -> Opened:
    """A model without states in ONNX Runtime, with its defaults but for the number of threads."""
    session = _session(path, threads)
    return Opened(lambda: session.run(None, sample))


def open_kept(folder: Path, name: str, threads: int) -> Opened:
    """A form of a model in ONNX Runtime, with its defaults but for the number of threads."""
    step = _onnx(folder / f"{name}.onnx", states_of(folder), threads)
    return _opened(folder, step, "" if name == "source" else name)


def _onnx(path: Path, states: Mapping[str, str], threads: int) -> Step:
    session = _session(path, threads)
    return Bound(session, states) if states else lambda sample: session.run(None, sample)


def candidates(folder: Path) -> list[str]:
    """The quantised forms that could be made."""
    names = ("static int8", "dynamic int8", "MatMulNBits 4 bits")
    return [name for name in names if (folder / f"{name}.onnx").is_file()]


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _torch(request: Request) -> tuple[Step, str]:
    import torch

    torch.set_num_threads(request.threads)
    model = _model_of(request)
    if model.module is not None:
        module, detail = model.module(Path(request.root)), "eager"
    else:
        module, detail = mc_opt.to_torch(mc_opt.load_model(request.folder / "source.onnx")), "eager, from the graph"

    def step(sample: Arrays) -> Any:
        with torch.inference_mode():
            return module(*(torch.from_numpy(array) for array in sample.values()))

    return step, detail


def _model_of(request: Request) -> Timed:
    from benchmarks._speed_models import MODELS

    return next(m for m in MODELS if m.name == request.model)
