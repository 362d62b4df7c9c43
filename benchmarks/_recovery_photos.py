"""Crops of the photos that scikit-image and scikit-learn ship, split by photo, for benchmarks/recovery.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SIDE = 224
SMALLEST = 0.5  # of a crop's side, as a share of the photo's shorter one; half of that in training
TILTED = 0.15  # the same of crops that are seen askew
# By the names of skimage.data and sklearn.datasets; `cat` is `chelsea` there, so it stands here once.
FILES = {
    "astronaut": "astronaut.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "horse": "horse.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "rocket": "rocket.jpg",
}
NAMES = tuple(sorted((*FILES, "china", "flower")))
HELD_OUT = NAMES[::3]  # decided before any was looked at
TRAINING = tuple(name for name in NAMES if name not in HELD_OUT)
JUDGING = TRAINING[1::4]  # of the training photos those that choose hyper-parameters

Photos = Mapping[str, np.ndarray]


def load_photos(names: Sequence[str] = NAMES) -> Photos:
    """The photos, [height, width, 3] uint8, read from the installed packages: nothing is downloaded.

    Raises:
        FileNotFoundError: scikit-image is missing, or ships a photo no more.
    """
    from sklearn.datasets import load_sample_image

    found = {}
    for name in names:
        if name in FILES:
            found[name] = np.asarray(Image.open(_folder() / FILES[name]).convert("RGB"))
        else:
            found[name] = np.asarray(load_sample_image(f"{name}.jpg"))
    return found


def _folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("scikit-image is not installed; pip install 'mc-opt[benchmarks]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def crop(photo: np.ndarray, rng: np.random.Generator, smallest: float = SMALLEST) -> np.ndarray:
    """A square of random size and place, perhaps mirrored, as EfficientNet-lite takes it: float32 [3, 224, 224]."""
    height, width = photo.shape[:2]
    side = round(rng.uniform(smallest, 1.0) * min(height, width))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    square = Image.fromarray(photo[top : top + side, left : left + side])
    return _normalised(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), rng)


def tilted(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop of any size above `TILTED`, half of the time turned by any angle, seen askew: float32 [3, 224, 224]."""
    height, width = photo.shape[:2]
    side = min(height, width) * np.exp(rng.uniform(np.log(TILTED), 0))
    centre = [rng.uniform(side / 2, length - side / 2) for length in (width, height)]
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else 0.0
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, 0.5], [0.5, -0.5]]) + rng.uniform(-0.15, 0.15, (4, 2))
    corners = np.clip(corners @ turn * side + centre, 0, [width - 1, height - 1])
    quadrilateral = tuple(float(number) for number in corners.ravel())
    square = Image.fromarray(photo).transform(
        (SIDE, SIDE), Image.Transform.QUAD, quadrilateral, Image.Resampling.BICUBIC
    )
    return _normalised(square, rng)


def _normalised(square: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Perhaps mirrored, as EfficientNet-lite takes it: float32 [3, 224, 224]."""
    pixels = np.asarray(square, np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(((pixels - 127) / 128).transpose(2, 0, 1))


def varied(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop turned by quarters, its colours exchanged, their contrast and brightness changed: [3, 224, 224]."""
    turned = np.rot90(pixels, int(rng.integers(4)), (1, 2))[rng.permutation(3)]
    contrast, brightness = rng.uniform(0.5, 1.5, (3, 1, 1)), rng.uniform(-0.3, 0.3, (3, 1, 1))
    return np.clip(turned * contrast + brightness, -1, 1).astype(np.float32)


def retextured(pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop whose spectrum has a share of another's amplitudes, and its own phases: [3, 224, 224]."""
    spectrum, share = np.fft.rfft2(pixels), rng.random()
    amplitudes = (1 - share) * np.abs(spectrum) + share * np.abs(np.fft.rfft2(other))
    mixed = np.fft.irfft2(amplitudes * np.exp(1j * np.angle(spectrum)), s=pixels.shape[1:])
    return np.clip(mixed, -1, 1).astype(np.float32)


def mosaic(parts: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """One picture of the corners of four, which meet at a random point: [3, 224, 224]."""
    row, column = (int(at) for at in rng.integers(SIDE // 4, SIDE * 3 // 4, 2))
    made = parts[0].copy()
    made[:, :row, column:] = parts[1][:, :row, column:]
    made[:, row:, :column] = parts[2][:, row:, :column]
    made[:, row:, column:] = parts[3][:, row:, column:]
    return made


@dataclass(frozen=True)
class Crops(Dataset[dict[str, np.ndarray]]):
    """`size` crops, photo after photo in turn; the same number gives the same crop.

    Attributes:
        photos: what is cropped.
        size: how many crops there are.
        seed: of all that is random.
        training: makes a few photos go further, for without labels any picture teaches (Asano and Saeed, arXiv
            2112.00725, distil by one photo): smaller crops too, half of them `tilted`, most of them `varied`; a third
            is mixed with a crop of any photo by a weight drawn evenly from [0, 1] (mixup, as in Beyer et al., arXiv
            2106.05237), and a third is put together of four; a third of all is `retextured` (Xu et al., arXiv
            2105.14391, mix amplitudes so that a network does not lean on the textures of its training data).
    """

    photos: Photos
    size: int
    seed: int
    training: bool = False

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        names = list(self.photos)
        photo = self.photos[names[index % len(names)]]
        if not self.training:
            return {"inputs": crop(photo, rng)}
        pixels = self._drawn(photo, rng)
        kind = rng.random()
        if kind < 1 / 3:
            share = np.float32(rng.random())
            pixels = share * pixels + (1 - share) * self._any(rng)
        elif kind < 2 / 3:
            parts = [pixels, *(self._any(rng) for _ in range(3))]
            pixels = mosaic(parts, rng)
        if rng.random() < 1 / 3:
            pixels = retextured(pixels, self._any(rng), rng)
        return {"inputs": pixels}

    def _any(self, rng: np.random.Generator) -> np.ndarray:
        return self._drawn(self.photos[list(self.photos)[int(rng.integers(len(self.photos)))]], rng)

    @staticmethod
    def _drawn(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        pixels = tilted(photo, rng) if rng.random() < 0.5 else crop(photo, rng, SMALLEST / 2)
        return varied(pixels, rng) if rng.random() < 0.6 else pixels
