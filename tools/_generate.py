"""Text from a causal language model: a prompt goes through it, then one token after the other."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mc_opt import ir, targets

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir

_INSTALL = "tokenizers is not installed, reading a text needs it; pip install 'mc-opt[models]'"


class Steps(Protocol):
    """One sequence of a model that keeps its states, in ONNX Runtime or in an artefact."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of the next step."""


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: the likeliest at temperature 0, drawn from softmax(logits / temperature) above."""

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Generator:
    """A causal language model ready to run.

    Attributes:
        name: what runs it.
        steps: its steps, from the beginning of a sequence.
        tokenizer: text to tokens and back.
        room: the positions that its cache has.
        chunk: how many tokens a step takes; None for any number.
        ends: tokens after which a text is complete.
    """

    name: str
    steps: Steps
    tokenizer: Any
    room: int
    chunk: int | None
    ends: tuple[int, ...]

    def tokens(self, prompt: Sequence[int], count: int, choice: Choice) -> Iterator[int]:
        """At most `count` tokens that follow the prompt; fewer where the text ends or the cache is full."""
        import numpy as np

        rng = np.random.default_rng(choice.seed)
        position, logits = 0, np.zeros(0)
        waiting = list(prompt)
        for _ in range(min(count, self.room - len(prompt) + 1)):
            while waiting:
                now, waiting = waiting[: self.chunk], waiting[self.chunk :] if self.chunk else []
                inputs = {"input_ids": np.array([now]), "position": np.array([position])}
                logits = self.steps.run(inputs)["logits"][0]
                position += len(now)
            token = _chosen(logits, choice.temperature, rng)
            if token in self.ends:
                return
            yield token
            waiting = [token]


def _chosen(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    # Gumbel's trick: the largest of logits / temperature + noise is a draw from their softmax.
    return int((logits / temperature + rng.gumbel(size=logits.shape)).argmax())


def load_generator(folder: Path, target: str | None) -> Generator:
    """The model of an output folder, or an ONNX file beside its tokenizer.

    Raises:
        IRError: the model is no causal language model with a cache, or something that it needs is missing.
    """
    onnx_file = folder / "model.onnx" if folder.is_dir() else folder
    model = ir.read_model(onnx_file, hashes=False)  # its interface is all that is asked: no shape is inferred
    states = ir.states_of(model)
    inputs = {str(v.name): v for v in model.graph.inputs}
    if not states or {"input_ids", "position"} - set(inputs):
        raise ir.IRError(
            f"{onnx_file}: is no language model with a cache that --generate could run, expected one that"
            " --from-transformers captured; capture it so"
        )
    tokenizer = _tokenizer(onnx_file.parent / ir.TOKENIZER_FILE)
    name, steps = _steps(folder, onnx_file, model, target)
    length = inputs["input_ids"].shape[1]  # type: ignore[index]  # it was captured with one
    room = int(inputs[next(iter(states.values()))].shape[2])  # type: ignore[index, arg-type]
    chunk = int(length) if isinstance(length, int) else None
    if chunk is not None and chunk != 1:
        raise ir.IRError(
            f"{onnx_file}: takes {chunk} tokens at once, expected one or any number; give --shape input_ids=1x1"
        )
    return Generator(name, steps, tokenizer, room, chunk, ir.end_tokens(model))


def _tokenizer(path: Path) -> Any:
    if not path.is_file():
        raise ir.IRError(f"{path}: missing, the text cannot be read; copy the tokenizer's file there")
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ir.IRError(_INSTALL) from error
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exceptions
        raise ir.IRError(f"{path}: is no tokenizer: {ir.first_line(error)}; save it again") from error


def _steps(folder: Path, onnx_file: Path, model: onnx_ir.Model, target: str | None) -> tuple[str, Steps]:
    """What runs the model, and its name: the artefact of a folder where there is one, or ONNX Runtime."""
    built = folder.is_dir() and any(folder.glob("*/manifest.json"))
    if target == "onnx" or not (built or target):
        states = ir.states_of(model)
        stream = ir.Stream(ir.Session(onnx_file), states, in_place=ir.written_in_place(model, states))
        return "ONNX Runtime", stream
    artefact = targets.load_artefact(folder, target)
    return artefact.manifest.target, artefact.stream()


@dataclass(frozen=True)
class Text:
    """What was generated; `first` seconds went into the prompt, `rest` into the tokens after the first."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    first: float
    rest: float

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of the tokens after the first, which comes out of the prompt."""
        count = len(self.tokens) - 1
        return count / self.rest if count > 0 and self.rest > 0 else None


def generate(generator: Generator, text: str, *, count: int, choice: Choice, show: Any) -> Text:
    """Continue a text by at most `count` tokens.

    Args:
        generator: the model.
        text: the text.
        count: how many tokens at most.
        choice: how a token is chosen.
        show: called with each piece of text as it becomes known.

    Raises:
        DataError: the text has no token, or more than the cache has room for.
    """
    tokenizer = generator.tokenizer
    prompt = tokenizer.encode(text).ids
    if not 1 <= len(prompt) <= generator.room:
        raise ir.DataError(
            f"--generate: the text has {len(prompt)} tokens, expected 1 to {generator.room}, the cache's positions;"
            f" {'give some text' if not prompt else 'shorten it, or capture with a larger --max-length'}"
        )
    before = tokenizer.decode(prompt)
    shown, made = "", list[int]()
    started = first = time.perf_counter()
    for token in generator.tokens(prompt, count, choice):
        if not made:
            first = time.perf_counter()
        made.append(token)
        whole = tokenizer.decode([*prompt, *made])[len(before) :]
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a letter: the other half comes with the next
            show(whole[len(shown) :])
            shown = whole
    ended = time.perf_counter()
    whole = tokenizer.decode([*prompt, *made])[len(before) :]
    show(whole[len(shown) :])
    return Text(len(prompt), tuple(made), whole, first - started if made else ended - started, ended - first)
