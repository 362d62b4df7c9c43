"""Checkpoints of a training: one safetensors file, put in place at once, from which the same run goes on later."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir
import safetensors
import safetensors.torch
import torch

import mc_opt
from mc_opt import ir
from mc_opt.passes._training import Epoch, Training

_VERSION = 1
_FREE = ("checkpoint", "checkpoint_every", "data", "held_out", "loss", "device", "threads")
"""Options that a run may change between a checkpoint and its continuation; data and loss are told apart by content."""


@dataclass
class Position:
    """How far a training is: everything beside the tensors.

    Attributes:
        epoch: the epoch that runs, from 0 on.
        batch: batches of it that are done.
        step: optimizer steps in all.
        sums: of the running epoch: samples, the loss and its terms, each times its samples.
        start: the figures before the first step.
        epochs: the curve so far.
        best: the epoch of the best figure, from 1 on; 0 is the start.
        finished: whether the training has ended.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    start: Epoch | None = None
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    finished: bool = False

    def text(self) -> str:
        """As JSON; floats come back to the bit."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position that `text` gave."""
        given = json.loads(text)
        given["epochs"] = [Epoch(**epoch) for epoch in given["epochs"]]
        given["start"] = Epoch(**given["start"]) if given["start"] else None
        return cls(**given)


def fingerprint(
    model: onnx_ir.Model, passes: tuple[str, ...], training: Training, *, loss: str, data: str, seed: int
) -> str:
    """What makes two trainings the same: the prepared model with its numbers, the passes, options, loss, data, seed."""
    told = {f.name: str(getattr(training, f.name)) for f in dataclasses.fields(training) if f.name not in _FREE}
    head = [mc_opt.__version__, str(_VERSION), *passes, json.dumps(told), loss, data, str(seed), ir.to_text(model)]
    digest = hashlib.sha256("\n".join(head).encode())
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                digest.update(str(name).encode())
                digest.update(value.const_value.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training in a folder: its name is the training's fingerprint, so no other run takes it."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"training-{self.key[:16]}.safetensors"

    def save(
        self,
        position: Position,
        state: Mapping[str, torch.Tensor],
        best: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: Mapping[str, Any],
    ) -> None:
        """Put a new state in the place of the last one, all or nothing.

        Raises:
            LimitError: the disk is full.
            FolderError: the folder cannot be written.
        """
        tensors = {f"state.{k}": v for k, v in state.items()} | {f"best.{k}": v for k, v in best.items()}
        kept = optimizer.state_dict()["state"]
        for index, values in kept.items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        tensors["rng"] = torch.get_rng_state()
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        metadata = {"position": position.text(), "key": self.key, "scaler": json.dumps(dict(scaler))}
        ir.write_bytes(self.path, safetensors.torch.save(plain, metadata))

    def load(self, optimizer: torch.optim.Optimizer) -> Loaded | None:
        """The state that was saved last, with the optimizer's put in place; None when there is none.

        Raises:
            DataError: the file is damaged or of another training.
        """
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(str(self.path), "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        except (OSError, safetensors.SafetensorError) as error:
            raise ir.DataError(f"{self.path}: is no checkpoint ({error}); remove it to train anew") from error
        if metadata.get("key") != self.key:
            raise ir.DataError(f"{self.path}: is the checkpoint of another training; remove it to train anew")
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng"])
        state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
        best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        return Loaded(Position.parse(metadata["position"]), state, best, json.loads(metadata["scaler"]))


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held: the position, the moved tensors, those of the best epoch, the gradient scaler."""

    position: Position
    state: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    scaler: dict[str, Any]
