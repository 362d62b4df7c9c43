"""The inner loops of an artefact's kernels and what the processor's ports allow them, by llvm-mca where it is there."""

from __future__ import annotations

import bisect
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SYMBOL = re.compile(r"^(?P<address>[0-9a-f]+) (?P<size>[0-9a-f]+) T __tvm_ffi_(?P<name>\S+)$", re.MULTILINE)
_LINE = re.compile(r"^\s*(?P<address>[0-9a-f]+):\s+(?P<text>\S.*)$")
_JUMP = re.compile(r"^j[a-z]+\s+(?P<target>[0-9a-f]+)\b")
_CALL = re.compile(r"^(?:call|jmp)\s+(?P<target>[0-9a-f]+)\b")
_FMA = re.compile(r"^vfn?m(?:add|sub)\d+(?P<kind>[ps][sd])\b.*%(?P<register>[xyz]mm)\d+\S*$")
_LOOPS = 6  # those with the most multiply-adds a turn; others are tails
_LANES = {"xmm": 4, "ymm": 8, "zmm": 16}
_THROUGHPUT = re.compile(r"Block RThroughput:\s*([\d.]+)")
_PRESSURE = re.compile(r"Resource pressure per iteration:\n.*\n(.*)")


@dataclass(frozen=True)
class Loop:
    """One turn of a loop: floating-point operations of its fused multiply-adds, and cycles that its ports need."""

    flops: int
    cycles: float


def main_loops(library: Path, cpu: str) -> dict[str, Loop]:
    """Of each kernel the innermost loop that multiplies and adds fastest; nothing where the tools are not installed.

    Which of its loops (whole tiles, tails) a kernel spends its time in is not known; a limit is that of the fastest.
    """
    if not all(shutil.which(tool) for tool in ("objdump", "nm", "llvm-mca")):
        return {}
    commands = (["objdump", "-d", "--no-show-raw-insn", "-j", ".text"], ["nm", "-D", "-S", "--defined-only"])
    code, symbols = (
        subprocess.run([*command, str(library)], check=True, capture_output=True, text=True).stdout
        for command in commands
    )
    found: dict[str, Loop] = {}
    for name, lines in functions(code, symbols):
        loops = sorted({tuple(loop) for loop in innermost(lines)}, key=lambda loop: (-flops(loop), loop))
        turns = [Loop(flops(loop), _cycles(loop, cpu)) for loop in loops[:_LOOPS] if flops(loop)]
        if turns := [turn for turn in turns if turn.cycles]:
            found[name] = max(turns, key=lambda turn: turn.flops / turn.cycles)
    return found


def functions(code: str, symbols: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name, and address and instruction of each line, of every kernel in what objdump and nm print.

    A kernel's symbol is that of a function that checks its arguments; it calls one without a symbol, which computes.
    """
    found = (_LINE.match(line) for line in code.splitlines())
    lines = [(int(line["address"], 16), line["text"].split("#")[0].strip()) for line in found if line is not None]
    addresses = [address for address, _ in lines]

    def between(start: int, end: int) -> list[tuple[int, str]]:
        return lines[bisect.bisect_left(addresses, start) : bisect.bisect_left(addresses, end)]

    kernels: dict[str, list[tuple[int, str]]] = {}
    called: dict[str, set[int]] = {}
    for symbol in _SYMBOL.finditer(symbols):
        start, size = int(symbol["address"], 16), int(symbol["size"], 16)
        own = kernels[symbol["name"]] = between(start, start + size)
        calls = (_CALL.match(text) for _, text in own)
        targets = {int(call["target"], 16) for call in calls if call is not None}
        called[symbol["name"]] = {target for target in targets if not start <= target < start + size}
    starts = sorted({target for targets in called.values() for target in targets} | {addresses[-1] + 1})
    for name, own in kernels.items():
        bodies = [between(start, starts[bisect.bisect_right(starts, start)]) for start in sorted(called[name])]
        yield name, [line for part in (own, *bodies) for line in part]


def innermost(lines: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The instructions of each loop that holds no other: from a jump's target, backwards, to the jump."""
    index = {address: k for k, (address, _) in enumerate(lines)}
    spans = []
    for k, (address, text) in enumerate(lines):
        jump = _JUMP.match(text)
        target = int(jump["target"], 16) if jump is not None else address + 1
        if target <= address and target in index:
            spans.append((index[target], k))
    for first, last in spans:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield [text for _, text in lines[first:last] if not text.startswith("j")]


def flops(loop: Sequence[str]) -> int:
    """Of one turn: two for each lane of a fused multiply-add."""
    total = 0
    for text in loop:
        if (fma := _FMA.match(text)) is None:
            continue
        lanes = 1 if fma["kind"][0] == "s" else _LANES[fma["register"]]
        total += 2 * (lanes if fma["kind"][1] == "s" else max(lanes // 2, 1))
    return total


def _cycles(loop: Sequence[str], cpu: str) -> float:
    """Cycles a turn by the ports alone; 0 when llvm-mca does not know the processor or an instruction."""
    text = "\n".join(re.sub(r"\s*<[^>]*>", "", line) for line in loop)
    command = ["llvm-mca", "-mtriple=x86_64", f"-mcpu={cpu}", "-iterations=100"]
    return needed(subprocess.run(command, input=text, capture_output=True, text=True).stdout)


def needed(report: str) -> float:
    """Cycles that the ports need for a block by a report of llvm-mca; 0 where it has none.

    Its "Block RThroughput" takes one kind of instructions at a time: 512-bit permutations have port 5, shifts port 0,
    multiply-adds both, and together they take as long as the busiest port works for all of them.
    """
    throughput, pressure = _THROUGHPUT.search(report), _PRESSURE.search(report)
    if throughput is None:
        return 0.0
    ports = [float(word) for word in pressure[1].split() if word != "-"] if pressure is not None else []
    return max([float(throughput[1]), *ports])
