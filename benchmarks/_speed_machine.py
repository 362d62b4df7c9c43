"""The limits of this machine, measured by a small C program: fused multiply-adds and reads, by 1 thread and by more."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_opt.targets import _machine

SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Limits:
    """What was measured.

    Attributes:
        processor: its name.
        fma: GFLOP/s of fused multiply-adds by 1 thread, by 2 ...
        read: GB/s by the MiB of the block that a thread reads again and again, each by 1 thread, by 2 ...
    """

    processor: str
    fma: tuple[float, ...]
    read: dict[int, tuple[float, ...]]

    def gain(self, threads: int) -> float:
        """How much faster so many threads multiply than one."""
        return self.fma[threads - 1] / self.fma[0]

    def bandwidth(self, size: float, threads: int = 1) -> float:
        """GB/s of reading a block of `size` bytes again: that of the smallest measured block that is as large."""
        sizes = sorted(self.read)
        fitting = [mebibytes for mebibytes in sizes if size <= mebibytes << 20]
        return self.read[fitting[0] if fitting else sizes[-1]][threads - 1]

    def best(self, other: Limits) -> Limits:
        """The larger of two measurements: what else runs on the machine can only lower them."""
        read = {size: tuple(map(max, rates, other.read[size])) for size, rates in self.read.items()}
        return Limits(self.processor, tuple(map(max, self.fma, other.fma)), read)

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return {"processor": self.processor, "fma": list(self.fma), "read": {str(k): v for k, v in self.read.items()}}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Limits:
        """What `to_json` made."""
        read = {int(size): tuple(rates) for size, rates in data["read"].items()}
        return Limits(data["processor"], tuple(data["fma"]), read)


def measure(threads: int, cache: Path, *, reads: bool = True) -> Limits:
    """Run the program, which is compiled into `cache` when it is not there; without `reads` it takes 0.2 s."""
    words = [str(_program(cache)), str(threads), *(["read"] if reads else [])]
    answer = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return Limits.from_json({"processor": _machine.processor()} | json.loads(answer))


def _program(cache: Path) -> Path:
    # -march=native: another machine's program may not run here.
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(sorted(_machine.present())).encode()).hexdigest()[:16]
    program = cache / f"machine-{key}"
    if not program.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        made = program.with_suffix(".new")
        command = [sys.executable, "-m", "ziglang", "cc", "-O3", "-march=native", "-pthread", str(SOURCE), "-o"]
        subprocess.run([*command, str(made)], check=True, capture_output=True, text=True)
        made.rename(program)
    return program
