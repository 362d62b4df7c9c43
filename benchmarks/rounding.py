"""How far a packed recurrent model may drift by rounding alone: the artefact and ONNX Runtime beside double precision.

    python -m benchmarks.rounding
    python -m benchmarks.rounding --passes 'denseshift{terms=2}'
    python -m benchmarks.rounding --volume -30 -25 -20

Resemblyzer's three LSTM layers over 1.6 s windows of speech at the volume it was trained with: a conversation, a window
every half second, and the beginnings of every second telephone prompt.
All three compute the same packed network, so that what differs is rounding.
"""

from __future__ import annotations

import argparse
import tempfile
import wave
from pathlib import Path

import numpy as np

import mc_opt
from mc_opt import ir
from tests.models._fetch import fetch_public
from tests.models.catalogue import resemblyzer
from tests.models.inputs import RATE, at_volume, mel_frames, speech

WINDOW, HOP = int(1.6 * RATE), RATE // 2
PROMPTS = "asterisk-core-sounds-en-wav"
BOUND = 1e-4


def windows(root: Path, dbfs: float) -> list[np.ndarray]:
    """Mel spectrograms [1, 160, 40] of windows that have this volume each."""
    sound = speech(root)
    parts = [sound[start : start + WINDOW] for start in range(0, len(sound) - WINDOW, HOP)]
    return [mel_frames(at_volume(part, dbfs))[None, :160] for part in parts + prompts(root)]


def prompts(root: Path) -> list[np.ndarray]:
    """The first 1.6 s of every second prompt that is so long, from 8 to 16 kHz."""
    found = []
    for path in sorted((root / PROMPTS).rglob("*.wav")):
        with wave.open(str(path)) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        twice = np.interp(np.arange(0, len(sound), 0.5), np.arange(len(sound)), sound).astype(np.float32)
        if len(twice) >= WINDOW:
            found.append(twice[:WINDOW])
    return found[::2]


def main() -> None:
    """Print the largest differences, and how many windows pass the bound of an artefact."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="denseshift")
    parser.add_argument("--volume", nargs="*", type=float, default=[-30], help="dBFS of the windows, several in turn")
    options = parser.parse_args()
    passes = options.passes
    root = fetch_public("resemblyzer", "pyannote-audio", PROMPTS)
    original = resemblyzer(root)
    packed, _ = mc_opt.compress(original, passes, check="structure")
    judge, before = ir.Session(packed), ir.Session(original)
    double = ir.interpret(packed).double()
    found, embeddings = [], []
    with tempfile.TemporaryDirectory() as folder:
        mc_opt.build(packed, "x86", folder)
        artefact = mc_opt.load(folder)
        for mel in (m for dbfs in options.volume for m in windows(root, dbfs)):
            (a,), (b,) = artefact.run({"m": mel}).values(), judge.run({"m": mel}).values()
            with torch.no_grad():
                c = double(torch.from_numpy(mel).double())[0].numpy()
            embeddings.append(next(iter(before.run({"m": mel}).values())))
            found.append([float(np.abs(x - y).max()) for x, y in ((a, b), (a, c), (b, c))])
    bound = BOUND * float(np.ptp(np.concatenate(embeddings)))
    largest = np.array(found).max(axis=0)
    print(f"{passes}: {len(found)} windows; the bound of an artefact is {bound:.1e}")
    for name, value, column in zip(
        ("artefact - ONNX Runtime", "artefact - double", "ONNX Runtime - double"),
        largest,
        zip(*found, strict=True),
        strict=True,
    ):
        print(f"  {name:24} at most {value:.1e}; above the bound {sum(v > bound for v in column)}")


if __name__ == "__main__":
    main()
