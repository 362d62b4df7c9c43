"""The contenders of benchmarks/speed.py: how each form of a model is made, kept in a folder, and opened to run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mc_opt

if TYPE_CHECKING:  # a process whose memory is measured imports no more than it needs
    from benchmarks._speed_models import Timed
    from tests.models.inputs import Arrays

ROOT = Path(__file__).resolve().parents[1]
FLOAT, INTEGER, TORCH = "ONNX Runtime fp32", "ONNX Runtime quantised", "torch"
DENSE, COMPRESSED, SERIAL = "mc-opt dense", "mc-opt compressed", "mc-opt dense, 1 thread"
EXACT = "fold-constants,fold-batch-norm"
RECIPES = {DENSE: EXACT, COMPRESSED: f"{EXACT},denseshift{{bits=4 skip=}}", SERIAL: EXACT}
PACKAGES = ("onnxruntime", "torch", "apache-tvm", "numpy", "onnx")
# What graphs, artefacts and measured cells depend on.
_NETWORKS = tuple(f"benchmarks/{name}.py" for name in ("resnet18", "resnet50", "mobilenet_v2"))
SOURCES = ("ir", "mc_opt", "tests/models", "benchmarks/_speed_models.py", "benchmarks/_speed_forms.py", *_NETWORKS)
ARTEFACTS = (*SOURCES, "targets", "passes")
_MEASURING = ("cell", "gemv", "kernels", "machine", "memory", "ports")
CELLS = (*ARTEFACTS, "tools/_timing.py", *(f"benchmarks/_speed_{name}.py" for name in _MEASURING))

Run = Callable[[], Any]


@dataclass(frozen=True)
class Request:
    """What a cell is asked.

    Attributes:
        model: name of the model.
        threads: of every contender.
        rounds: of the interleaved run.
        processor_time: whether the clock is the processor's time (one thread only) and not the wall's.
        beside: whether processes' memory and the kernels are measured too.
        root: folder of the public models.
        cache: folder of what is kept between runs.
    """

    model: str
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

    def text(self) -> str:
        """The argument of the process that measures it."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Opened:
    """A contender that is loaded.

    Attributes:
        run: one call on the first sample; returns its outputs.
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
    """Write source.onnx, samples.npz and the quantised forms into `folder`; returns why one could not be made."""
    mc_opt.save_model(model.graph(root), folder / "source.onnx")
    names = [given.name for given in _session(folder / "source.onnx", 1).get_inputs()]
    samples = [{name: sample[name] for name in names} for sample in model.samples(root)]
    np.savez(folder / "samples.npz", **{f"{k}/{name}": v for k, s in enumerate(samples) for name, v in s.items()})
    reasons: dict[str, str] = {}
    bare = _without_types(folder / "source.onnx", folder / "bare.onnx")
    forms = {"dynamic int8": _dynamic, "MatMulNBits 4 bits": _few_bits}
    if model.layers == "convolutions":
        forms = {"static int8": _static} | forms
    for name, make in forms.items():
        try:
            make(bare, folder / f"{name}.onnx", samples)
            _session(folder / f"{name}.onnx", 1).run(None, samples[0])
        except Exception as error:  # whatever another package raises on a model that it does not take
            (folder / f"{name}.onnx").unlink(missing_ok=True)
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    bare.unlink()
    return reasons


def make_artefact(folder: Path, form: str, threads: int) -> None:
    """Build the artefact of a form into `folder`/<form>-<threads>."""
    model, _ = mc_opt.compress(mc_opt.load_model(folder / "source.onnx"), RECIPES[form], check="structure")
    mc_opt.build(model, f"x86{{threads={threads}}}", artefact_folder(folder, form, threads), check="structure")


def artefact_folder(folder: Path, form: str, threads: int) -> Path:
    """Where an artefact stands."""
    return folder / f"{form.split(',')[0].removeprefix('mc-opt ')}-{threads}"


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


def _without_types(source: Path, out: Path) -> Path:
    """Write the model without its inner types: ONNX Runtime's quantisers change some, and trip over the old ones."""
    import onnx

    proto = onnx.load_model(source)
    del proto.graph.value_info[:]
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

    proto = onnx.load_model(source)
    quantizer = MatMulNBitsQuantizer(proto, bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        raise ValueError("no MatMul with a constant weight")
    onnx.save_model(quantizer.model.model, out)


# --- opening ------------------------------------------------------------------------------------


def open_form(form: str, request: Request) -> Opened:
    """Load one contender of a cell; the quantised one is that which `chosen-<threads>` names."""
    folder, threads = request.folder, request.threads
    sample = samples_of(folder)[0]
    if form == TORCH:
        return _open_torch(request, sample)
    if form == FLOAT:
        return open_onnx(folder / "source.onnx", sample, threads)
    if form == INTEGER:
        chosen = (folder / f"chosen-{threads}").read_text()
        return Opened(open_onnx(folder / f"{chosen}.onnx", sample, threads).run, chosen)
    artefact = mc_opt.load(artefact_folder(folder, form, 1 if form == SERIAL else threads))
    return Opened(lambda: artefact.run(sample), RECIPES[form].rpartition(",")[2] if form == COMPRESSED else "")


def open_onnx(path: Path, sample: Arrays, threads: int) -> Opened:
    """A model in ONNX Runtime, with its defaults but for the number of threads."""
    session = _session(path, threads)
    return Opened(lambda: session.run(None, sample))


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


def _open_torch(request: Request, sample: Arrays) -> Opened:
    import torch

    from benchmarks._speed_models import MODELS

    torch.set_num_threads(request.threads)
    model = next(m for m in MODELS if m.name == request.model)
    if model.module is not None:
        module, detail = model.module(Path(request.root)), "eager"
    else:
        module, detail = mc_opt.to_torch(mc_opt.load_model(request.folder / "source.onnx")), "eager, from the graph"
    tensors = [torch.from_numpy(array) for array in sample.values()]

    def run() -> Any:
        with torch.inference_mode():
            return module(*tensors)

    return Opened(run, detail)
