"""Train the demo's CNN on scikit-learn's handwritten digits and write digits.onnx and digits-heldout.npz.

1,797 real images of 8×8 pixels, 16 grey levels; a quarter is held out, stratified by label, and never
trained on. The network has five Conv + BatchNorm blocks, one of them depthwise. Run it with `make train`;
the files it writes are in the repository, so `make demo` does not need to.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import mc_opt

HERE = Path(__file__).resolve().parent
SEED = 0
EPOCHS = 80


def block(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Conv, BatchNorm, ReLU; the Conv has no bias, BatchNorm brings one."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


class Network(nn.Module):
    """8×8 → 8×8 → 4×4 → 4×4 (depthwise, pointwise) → 2×2 → logits of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(1, 24)
        self.down = block(24, 32, stride=2)
        self.depthwise = block(32, 32, groups=32)
        self.pointwise = block(32, 64, kernel=1)
        self.wide = block(64, 48, stride=2)
        self.head = nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits f32[n, 10] of images f32[n, 1, 8, 8]."""
        x = self.pointwise(self.depthwise(self.down(self.stem(image))))
        return self.head(self.wide(x).mean((2, 3)))


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images as f32[n, 1, 8, 8] in 0..1 and labels as i64[n]: train x, held-out x, train y, held-out y."""
    digits = load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    return tuple(train_test_split(images, labels, test_size=0.25, random_state=SEED, stratify=labels))


def samples() -> dict[str, np.ndarray]:
    """The digits that are not held out, as `mc-opt --train examples.digits.train:samples` takes them."""
    train, _, label, _ = split()
    return {"image": train, "label": label}


def shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each batch moved by at most one pixel: the augmentation that small digits need."""
    dy, dx = (int(v) for v in torch.randint(-1, 2, (2,), generator=generator))
    return torch.roll(nn.functional.pad(x, (1, 1, 1, 1)), (dy, dx), dims=(2, 3))[:, :, 1:-1, 1:-1]


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Adam with a one-cycle learning rate; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    batch = 64
    steps = EPOCHS * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(batch)[: len(x) // batch]:
            loss = nn.functional.cross_entropy(model(shifted(x[rows], generator)), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main() -> None:
    """Train, capture with BatchNorm kept, and write both files."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    started = time.monotonic()
    train_x, test_x, train_y, test_y = split()
    model = Network()
    fit(model, torch.from_numpy(train_x), torch.from_numpy(train_y))
    with torch.no_grad():
        accuracy = (model(torch.from_numpy(test_x)).argmax(1).numpy() == test_y).mean()
    parameters = sum(p.numel() for p in model.parameters())
    captured = mc_opt.capture(model, (torch.from_numpy(test_x[:1]),))
    captured.graph.outputs[0].name = "logits"
    mc_opt.save_model(captured, HERE / "digits.onnx")
    np.savez_compressed(HERE / "digits-heldout.npz", image=test_x, label=test_y)
    print(
        f"{parameters} parameters, {accuracy:.2%} of {len(test_y)} held-out digits, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
