"""How a run trains: the options of every training, and the record of one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mc_opt import ir

Optimizer = Literal["adamw", "adam", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
BatchNorm = Literal["batch", "frozen"]
Device = Literal["auto", "cpu", "cuda"]

_CHOICES = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "precision": Precision,
    "batch_norm": BatchNorm,
    "device": Device,
}
_WHOLE = {"epochs": 1, "batch_size": 1, "accumulate": 1, "recalibrate": 0, "patience": 0, "threads": 0}
"""Whole numbers, and the least of each."""
_NUMBERS = ("lr", "weight_decay", "clip", "checkpoint_every")
"""Numbers from 0 on."""
_PLACES = ("data", "held_out")
_UNTOLD = ("checkpoint", "checkpoint_every")
"""What a report leaves out: what is trained does not depend on it."""


@dataclass(frozen=True)
class Training:
    """What to train on and how.

    Attributes:
        data: an `.npz` file, a folder of them, `package.module:factory`, a factory, or a torch DataLoader.
        held_out: samples of the same kinds that are never trained on; None splits `holdout` off `data`.
        holdout: the share of `data` that is held out when there is no `held_out`.
        epochs: passes over the data, for each trained pass (or for all together, with `joint`).
        batch_size: samples of one step, over all processes.
        accumulate: parts that a batch is cut into, to save memory; the gradient is that of the whole batch, but for
            BatchNormalization, which takes the statistics of each part.
        optimizer: adamw, adam, or sgd (momentum 0.9).
        lr: the highest learning rate.
        weight_decay: of the optimizer.
        schedule: how the learning rate falls to 0 after the warm-up.
        warmup: the share of all steps in which it rises from 0.
        clip: the largest norm of the gradient; 0 leaves it.
        precision: of the forward pass; weights and optimizer stay fp32.
        loss: terms as in `output,layers{weight=0.5},labels`, or a function (outputs, targets, label) -> tensor.
        batch_norm: whether BatchNormalization trains on the statistics of the batch, or keeps its own.
        freeze_statistics: the share of the steps, at the end, in which BatchNormalization keeps the running statistics
            that it has, so that weights settle on what will be stored. Signs of activations need it: those near 0 turn
            from batch to batch, later statistics of the batch hide that, and running ones do not.
        recalibrate: batches over which its statistics are taken again at the end; 0 leaves them.
        parameters: `forms` trains what the passes made; `all`, or globs of names, others too.
        joint: prepare all trainable passes, train once, convert all; otherwise each is trained when its turn comes.
        patience: epochs without a better figure on the held-out samples after which training stops, at the best one;
            0 never does. The figure is the loss where labels of sequences or numbers, or a function, are the aim.
        device: cpu or cuda; auto takes a GPU that is there.
        checkpoint: a folder; None keeps none. A run that finds its own checkpoint there goes on from it.
        checkpoint_every: seconds between checkpoints; the end of an epoch always makes one.
        threads: of torch on a CPU; 0 leaves them. The same bytes come from the same number.
    """

    data: Any = None
    held_out: Any = None
    holdout: float = 0.1
    epochs: int = 5
    batch_size: int = 32
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    precision: Precision = "fp32"
    loss: str | Callable[..., Any] = "output"
    batch_norm: BatchNorm = "batch"
    freeze_statistics: float = 0.0
    recalibrate: int = 0
    parameters: tuple[str, ...] = ("forms",)
    joint: bool = False
    patience: int = 0
    device: Device = "cpu"
    checkpoint: Path | None = None
    checkpoint_every: float = 60.0
    threads: int = 0

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(kind))}")
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value}: expected a whole number from {least} on")
        for name in _NUMBERS:
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 on")
        if not _is_number(self.holdout) or not 0 <= self.holdout < 1:
            raise ValueError(f"holdout={self.holdout}: expected a share from 0 on and below 1")
        for name in ("warmup", "freeze_statistics"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")
        if self.loss == "":
            raise ValueError("loss is empty: name a term, as in output or labels")
        if not isinstance(self.parameters, tuple) or not self.parameters:
            raise ValueError(f"parameters={self.parameters!r}: expected a tuple of forms, all or globs of names")

    def with_options(self, texts: Mapping[str, str]) -> Training:
        """This training with options as text, as a recipe and the command line give them.

        Raises:
            OptionError: for an unknown option or a value that does not fit.
        """
        others = {name: text for name, text in texts.items() if name not in _PLACES}
        read = ir.make(Training, ir.Spec("training", others))
        given: dict[str, Any] = {**texts, **{name: getattr(read, name) for name in others}}
        return dataclasses.replace(self, **given)

    def told(self) -> dict[str, str]:
        """The options that differ from their defaults, for a report: data by its name alone, no checkpoints."""
        plain = dataclasses.replace(self, data=None, held_out=None)
        texts = ir.to_spec("training", plain).options
        places = {name: _name(getattr(self, name)) for name in _PLACES if getattr(self, name) is not None}
        if not isinstance(self.loss, str):
            texts["loss"] = _name(self.loss)
        return places | {name: text for name, text in texts.items() if name not in _UNTOLD}


@dataclass(frozen=True)
class Epoch:
    """One epoch: the mean loss and its terms, and the same on held-out samples, with a figure to judge by.

    Attributes:
        loss: the mean over the epoch's steps.
        terms: the parts of the loss by name, before their weights.
        held_out: the loss on held-out samples; None when there are none.
        metric: accuracy where there are labels of classes, else the agreement of the largest output with the
            original's where the outputs are scores, else the SQNR in dB; None without held-out samples.
        lr: the learning rate at the end.
    """

    loss: float
    terms: dict[str, float] = field(default_factory=dict)
    held_out: float | None = None
    metric: float | None = None
    lr: float = 0.0


@dataclass(frozen=True)
class TrainingReport:
    """What a training did: how many samples it saw, what it trained, and its curve, epoch by epoch.

    Attributes:
        passes: the passes that were trained together.
        samples: of an epoch.
        held_out: samples that were held out.
        steps: of the optimizer.
        parameters: how many numbers were trained.
        metric: what `Epoch.metric` is: accuracy, agreement or sqnr_db.
        start: the figures before the first step (its `loss` is that of the held-out samples).
        epochs: the curve.
        best: the epoch whose parameters were kept, from 1 on; 0 keeps the start.
        batches: of an epoch.
    """

    passes: tuple[str, ...]
    samples: int
    held_out: int
    steps: int
    parameters: int
    metric: str = ""
    start: Epoch | None = None
    epochs: tuple[Epoch, ...] = ()
    best: int = 0
    batches: int = 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(given: object) -> str:
    """What an object is called: a file by its name without folders."""
    match given:
        case Path():
            return given.name
        case str():
            return given if ":" in given else Path(given).name
    return str(getattr(given, "__qualname__", type(given).__name__))
