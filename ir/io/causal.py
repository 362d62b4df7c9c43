"""Capturing causal language models of transformers: one step over a cache of fixed length, whose buffers are states.

The captured model takes `input_ids` [1, length] (a token, or a prompt), the `position` [1] of the first of them, and a
buffer of keys and one of values a layer, `past.<layer>.key` and `past.<layer>.value` [1, heads, max_length, size]. It
gives the `logits` [1, vocabulary] of the last token and the buffers as `present.<layer>.*`, with the new rows written.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError, OptionError
from mc_opt.ir.io.capture import capture
from mc_opt.ir.io.factory import INSTALL, first_line
from mc_opt.ir.io.states import END, STATES, TOKENIZER, states_of

MAX_LENGTH = 1024
"""The positions that a cache has room for, unless told otherwise."""

_ATTENTION = "mc_opt"
_PREFIX = "lm."
_TOLERANCE = 1e-4
_INSTALL = "transformers is not installed, capturing a language model needs it; pip install 'mc-opt[models]'"


def from_transformers(path: str | Path, *, max_length: int = MAX_LENGTH) -> onnx_ir.Model:
    """Capture the causal language model in a folder that `save_pretrained` wrote, or in a GGUF file.

    Nothing is downloaded, no pickle opened and no code of the folder run. The tokenizer comes along in `meta`, for
    whoever saves the model.

    Args:
        path: the folder or file.
        max_length: the positions that the cache has room for.

    Raises:
        OptionError: there is no such folder or file.
        IRError: a package is missing, or the model cannot be loaded or captured.
    """
    path = Path(path)
    if not (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        raise OptionError(f"--from-transformers {str(path)!r}: expected a folder of save_pretrained or a .gguf file")
    try:
        import torch
    except ImportError as error:
        raise IRError(INSTALL) from error
    try:
        import transformers
    except ImportError as error:
        raise IRError(_INSTALL) from error
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights: dict[str, Any] = {}
    if path.is_file():
        _check_gguf(path)
        options["gguf_file"] = path.name
    else:
        weights["use_safetensors"] = True  # no pickle is opened
    folder = path.parent if path.is_file() else path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options, **weights)
    except Exception as error:  # a file that is broken or of an unknown kind fails in many ways
        raise IRError(f"{path}: transformers cannot load it: {first_line(error)}; repair the file") from error
    made.train(False)
    model = capture_causal_lm(made, max_length=max_length)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model.meta[TOKENIZER] = backend.to_str(pretty=False)
    return model


def _check_gguf(path: Path) -> None:
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise IRError(f"{path}: transformers reads GGUF with {missing[0]}, which is missing; pip install {missing[0]}")


def capture_causal_lm(module: Any, *, max_length: int = MAX_LENGTH) -> onnx_ir.Model:
    """Capture a transformers model for causal language modelling (`...ForCausalLM`, in eval mode).

    Any model will do whose attention goes through transformers' attention interface and cache. What was captured runs
    in ONNX Runtime beside the module before it is returned.

    Args:
        module: the model.
        max_length: the positions that the cache has room for.

    Raises:
        IRError: the model cannot be captured, or what was captured computes something else.
    """
    where = type(module).__name__
    config = module.config.get_text_config()
    known = getattr(config, "max_position_embeddings", max_length)
    if not 2 <= max_length <= known:
        raise OptionError(
            f"{where}: max_length {max_length}: expected 2 to {known}, the positions that it was made for"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    model = _captured(module, [1, heads, max_length, size], parts)
    model.metadata_props[STATES] = json.dumps({f"present.{part}": f"past.{part}" for part in parts})
    model.metadata_props[END] = json.dumps(_ends(module))
    _check(module, model, where)
    return model


def _captured(module: Any, shape: Sequence[int], parts: Sequence[str]) -> onnx_ir.Model:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
    before = module.config._attn_implementation
    module.set_attn_implementation(_ATTENTION)
    try:
        # Two tokens: torch takes an example of 1 for a fixed size.
        ids, position = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        past = [torch.zeros(*shape) for _ in parts]
        length = torch.export.Dim("length", min=1, max=shape[2])
        model = capture(
            _step(module),
            (ids, position, past),
            dynamic_shapes=({1: length}, None, [None] * len(past)),
            input_names=["input_ids", "position", *(f"past.{part}" for part in parts)],
            output_names=["logits", *(f"present.{part}" for part in parts)],
        )
    finally:
        module.set_attn_implementation(before)
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(_PREFIX):  # of the module that makes one step of the model
            del model.graph.initializers[name]
            value.name = name.removeprefix(_PREFIX)
            model.graph.register_initializer(value)
    return model


def _step(module: Any) -> Any:
    """A module of one step: (token ids [1, t], position [1], caches) -> logits [1, v] of the last token and caches."""
    import torch

    class Step(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
        def __init__(self) -> None:
            super().__init__()
            self.lm = module

        def forward(self, input_ids: Any, position: Any, past: list[Any]) -> Any:
            positions = position + torch.arange(input_ids.shape[1])
            cache = _Cache(past, positions)
            hidden = self.lm.base_model(
                input_ids=input_ids, position_ids=positions[None], past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            head = self.lm.get_output_embeddings()
            # As Gemm, which takes the matrix as the embedding's Gather does, so that tied ones are one weight.
            operands = [hidden, head.weight] + ([head.bias] if head.bias is not None else [])
            logits = _symbolic("Gemm", operands, hidden, (1, head.weight.shape[0]), {"transB": 1})
            return logits, *cache.present

    return Step().eval()


class _Cache:
    """What stands for transformers' cache while it is traced: buffers of fixed length, rows written by ScatterND."""

    def __init__(self, past: list[Any], positions: Any) -> None:
        self._past, self._positions = past, positions
        self._places: Any = None
        self.present: list[Any] = list(past)

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write the new rows of a layer; the whole buffers, which the attention masks by position."""
        for number, new in ((2 * layer, key), (2 * layer + 1, value)):
            self.present[number] = self._written(self._past[number], new)
        return self.present[2 * layer], self.present[2 * layer + 1]

    def get_seq_length(self, *_: Any) -> int:
        """Positions are given to the model: nothing is counted."""
        return 0

    def _written(self, old: Any, new: Any) -> Any:
        """old: [1, h, m, s], new: [1, h, t, s] -> old with row (0, h, position) from new."""
        import torch

        if self._places is None:  # the same for every layer
            heads, length = new.shape[1], new.shape[2]
            row = self._positions.expand(heads, length)
            head = torch.arange(heads)[:, None].expand(heads, length)
            self._places = torch.stack([torch.zeros_like(head), head, row], -1)[None]
        return _symbolic("ScatterND", [old, self._places, new], old, tuple(old.shape))


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, position_ids: Any, **options: Any
) -> tuple[Any, None]:
    """Attention over the whole buffers, in transformers' interface: query [1, h, t, s] -> [1, t, h, s]."""
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with {name}={options[name]}")
    if mask is not None:
        raise NotImplementedError("attention with a mask of its own")
    natural = query.shape[-1] ** -0.5  # the factor that the op has by itself
    if abs(scaling - natural) > 1e-6 * natural:
        query = query * (scaling / natural)
    shape = (*query.shape[:3], value.shape[-1])
    y = _symbolic("mc_opt::CachedAttention", [query, key, value, position_ids[0]], query, shape)
    return y.transpose(1, 2), None


def _symbolic(op_type: str, inputs: Sequence[Any], like: Any, shape: Sequence[Any], attributes: Any = None) -> Any:
    """A node of the captured graph that torch has no operator for; eagerly it gives zeros."""
    import torch

    return torch.onnx.ops.symbolic(op_type, inputs, attributes or {}, dtype=like.dtype, shape=shape, version=None)


def _ends(module: Any) -> list[int]:
    """The tokens that end a text, as transformers' own `generate` takes them."""
    found = getattr(module.generation_config, "eos_token_id", None)
    found = module.config.eos_token_id if found is None else found
    return [] if found is None else sorted({found} if isinstance(found, int) else set(found))


def _check(module: Any, model: onnx_ir.Model, where: str) -> None:
    """Hold what was captured, a prompt of five tokens and one more, to the module on all six.

    Raises:
        IRError: the logits differ by more than 1e-4 of their range.
    """
    import torch

    from mc_opt.ir.run.ort import Session

    vocabulary = module.get_output_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, 6))
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids)).logits[0, [4, 5]].numpy()
    session, states = Session(model), states_of(model)
    held = {
        str(v.name): np.zeros([int(d) for d in v.shape], np.float32)  # type: ignore[arg-type, union-attr]  # fixed
        for v in model.graph.inputs[2:]
    }
    for row, (start, stop) in zip(wanted, ((0, 5), (5, 6)), strict=True):
        outputs = session.run({"input_ids": ids[:, start:stop], "position": np.array([start]), **held})
        held = {into: outputs[out] for out, into in states.items()}
        off = float(np.abs(outputs["logits"][0] - row).max() / np.ptp(row))
        if off > _TOLERANCE:
            raise IRError(
                f"{where}: captured, its logits are {off:.1e} of their range off, expected {_TOLERANCE:.0e} at most;"
                " this architecture does something that capturing does not know"
            )
