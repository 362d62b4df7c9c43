"""What open sizes cost: MiniLM built once for every batch and sequence, beside builds for one size each.

    python -m benchmarks.open_sizes                        batch 1 by 7, 64 and 200 tokens, batch 8 by 64
    python -m benchmarks.open_sizes --size 1x64 --rounds 30

The two artefacts and ONNX Runtime run in turns, one thread each; the memory of the process is told before and after
the open artefact has run a hundred sizes. Needs the public models (`--public`) and transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mc_opt.tools import _timing


def feed_of(batch: int, length: int) -> dict[str, np.ndarray]:
    """Seeded tokens, nothing masked."""
    ids = np.random.default_rng(0).integers(0, 30522, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones((batch, length), np.int64)}


def resident() -> float:
    """Megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def artefact_of(model: Any, folder: Path, shapes: dict[str, tuple[int, ...]]) -> Any:
    """Build and load."""
    import mc_opt

    mc_opt.build(model, "x86", folder, shapes=shapes, check="structure")
    return mc_opt.load(folder)


def main() -> None:
    """Parse the command line and measure."""
    import onnxruntime

    import mc_opt
    from tests.models._fetch import fetch_public
    from tests.models.catalogue import minilm_of_any_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="batch x sequence, as in 1x64; may be repeated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--public", type=Path, help="folder of the public models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = minilm_of_any_size(arguments.public or fetch_public())
        mc_opt.save_model(source, folder / "source")
        every = artefact_of(source, folder / "every", {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(folder / "source" / "model.onnx"), options)
        for text in arguments.size or ["1x7", "1x64", "1x200", "8x64"]:
            batch, length = (int(n) for n in text.split("x"))
            feed = feed_of(batch, length)
            one = artefact_of(source, folder / text, dict.fromkeys(feed, (batch, length)))
            runs = {
                "open": lambda feed=feed: every.run(feed),
                "one size": lambda feed=feed, one=one: one.run(feed),
                "ONNX Runtime": lambda feed=feed: session.run(None, dict(feed)),
            }
            times = _timing.interleave(runs, rounds=arguments.rounds)
            ratios = [_timing.ratio(times["open"], times[name]) for name in ("one size", "ONNX Runtime")]
            words = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios]
            print(f"{text}: open / one size {words[0]}, open / ONNX Runtime {words[1]}")
        before = resident()
        for length in range(1, 101):
            every.run(feed_of(2, length))
        print(f"memory after 100 more sizes: {resident() - before:+.0f} MB of {before:.0f} MB")


if __name__ == "__main__":
    main()
