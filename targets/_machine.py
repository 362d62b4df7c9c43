"""What a processor offers to generated code: its LLVM name, features, vector width, registers and caches."""

from __future__ import annotations

import dataclasses
import os
import platform
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

# LLVM feature names by the flag that /proc/cpuinfo shows. Only features that generated code can contain:
# they are what an artefact asks of the machine that loads it.
_FEATURES = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
}
# For ARM: which word of the auxiliary vector that Linux gives a program (AT_HWCAP, AT_HWCAP2), and the bit.
HWCAP: dict[str, tuple[int, int]] = {
    **{"neon": (16, 1), "lse": (16, 8), "fullfp16": (16, 10), "rdm": (16, 12), "jsconv": (16, 13)},
    **{"complxnum": (16, 14), "rcpc": (16, 15), "dotprod": (16, 20), "i8mm": (26, 13), "bf16": (26, 14)},
}
_V3 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_CASCADE_LAKE = (*_V4, "avx512vnni")
_ICE_LAKE = (
    *_CASCADE_LAKE,
    *("avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq", "gfni", "vaes", "vpclmulqdq"),
)
_SAPPHIRE_RAPIDS = (*_ICE_LAKE, "avx512bf16", "avx512fp16", "avxvnni")
_ALDER_LAKE = (*_V3, "avxvnni", "gfni", "vaes", "vpclmulqdq")
_ZEN4 = (*_ICE_LAKE, "avx512bf16")

_LEVELS = {"x86-64-v3": _V3, "x86-64-v4": _V4}
# Newest first: the first whose features the machine has is the name that LLVM tunes for.
_NAMES = {
    "GenuineIntel": {
        "sapphirerapids": _SAPPHIRE_RAPIDS,
        "icelake-server": _ICE_LAKE,
        "cascadelake": _CASCADE_LAKE,
        "skylake-avx512": _V4,
        "alderlake": _ALDER_LAKE,
        "haswell": _V3,
    },
    "AuthenticAMD": {"znver4": _ZEN4, "znver3": _V3},
}
# What an operating system grants to a process that asks; kernels do so as they run, and do without where it refuses.
_REQUESTED = {"sapphirerapids": ("amx-int8", "amx-tile")}
_X86 = _LEVELS | {cpu: features for names in _NAMES.values() for cpu, features in names.items()}

_A76 = ("neon", "fullfp16", "dotprod", "rdm", "lse", "rcpc")
_V1 = (*_A76, "complxnum", "jsconv", "i8mm", "bf16")
# 64-bit ARM processors: features, and the smallest caches that their licensees may build (data, second level).
_ARM: dict[str, tuple[Sequence[str], int, int]] = {
    "cortex-a53": (("neon",), 8 << 10, 128 << 10),
    "cortex-a72": (("neon",), 32 << 10, 512 << 10),
    "cortex-a76": (_A76, 64 << 10, 128 << 10),
    "neoverse-n1": (_A76, 64 << 10, 256 << 10),
    "neoverse-n2": (_V1, 64 << 10, 512 << 10),
    "neoverse-v1": (_V1, 64 << 10, 512 << 10),
}
# LLVM gives these to some of the processors above: a licensee may leave the first two out (Raspberry Pi 4 has neither),
# and kernels are written for vectors of one length.
UNUSED_ON_ARM = ("-aes", "-sha2", "-sve")
# The architecture of kernels for a GPU that run on the processor, with loops in the place of threads: for tests.
HOST = "host"
# What platform.machine() says where a target's code runs.
ARCHITECTURES = {"x86": "x86_64", "arm": "aarch64"}


Activations = Literal["float32", "int8"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A processor as the kernels see it.

    Attributes:
        kind: the target whose code it runs.
        cpu: the name that LLVM knows.
        features: LLVM's feature names, sorted; an artefact runs where all of them are present.
        lanes: float32 values in one vector register.
        registers: architectural vector registers.
        l1: bytes of first-level data cache a core.
        l2: bytes of second-level cache a core.
        threads: threads that kernels are split for; 1 leaves every loop serial.
        activations: in what products with packed weights take their inputs: as they are, or rounded a row at a time.
    """

    kind: Literal["x86", "arm", "cuda"]
    cpu: str
    features: tuple[str, ...]
    lanes: int
    registers: int
    l1: int
    l2: int
    threads: int
    activations: Activations = "float32"

    @property
    def requested(self) -> tuple[str, ...]:
        """LLVM's names of features that processors of this family may have: kernels ask for them as they run."""
        return _REQUESTED.get(self.cpu, ())


def x86_names() -> tuple[str, ...]:
    """The processors that an x86 build may name: the levels of the x86-64 ABI, and what LLVM calls some families."""
    return tuple(_X86)


def named(cpu: str, *, threads: int = 1) -> Machine:
    """The machine of one x86 (`x86_names()`) or ARM processor, with the caches such have at least."""
    if cpu in _ARM:
        features, l1, l2 = _ARM[cpu]
        return Machine("arm", cpu, tuple(sorted(features)), lanes=4, registers=32, l1=l1, l2=l2, threads=threads)
    return _machine(cpu, _X86[cpu], threads)


def cuda(arch: str) -> Machine:
    """A GPU: its threads are scalar, and `l1` is the memory that a block of them shares."""
    return Machine("cuda", arch, (), lanes=1, registers=1, l1=48 << 10, l2=4 << 20, threads=1)


def native(*, threads: int = 1) -> Machine:
    """The machine of the processor that runs this program.

    Raises:
        ValueError: when it is no x86-64 processor with AVX2 and FMA.
    """
    if platform.machine() != ARCHITECTURES["x86"]:
        raise ValueError(f"cpu=native: this machine is {platform.machine()}, no x86-64; name one, as in cpu=x86-64-v3")
    flags = present()
    names = _NAMES.get(_cpuinfo("vendor_id"), {}) | dict(reversed(_LEVELS.items()))
    for cpu, features in names.items():
        if flags.issuperset(features):
            return _machine(cpu, features, threads)
    absent = ", ".join(f for f in _V3 if f not in flags)
    raise ValueError(f"cpu=native: this processor ({platform.machine()}) lacks {absent}; an x86 build needs x86-64-v3")


def present() -> frozenset[str]:
    """LLVM's names of the features that this processor has."""
    if platform.machine() == ARCHITECTURES["arm"]:
        words = _auxiliary_vector()
        return frozenset(name for name, (word, bit) in HWCAP.items() if words.get(word, 0) >> bit & 1)
    flags = set(_cpuinfo("flags").split())
    return frozenset(name for name, flag in _FEATURES.items() if flag in flags)


def missing(features: Iterable[str]) -> tuple[str, ...]:
    """The features of a list that this processor lacks, in the list's order."""
    here = present()
    return tuple(f for f in features if f not in here)


def processor() -> str:
    """The processor's own name, for people: "Intel(R) Xeon(R) Processor"."""
    return _cpuinfo("model name") or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(cpu: str, features: Sequence[str], threads: int) -> Machine:
    wide = "avx512f" in features
    # The smallest caches sold with the level: a tile that fits here fits everywhere. A table by family was tried: with
    # Sapphire Rapids' 48 KiB and 2 MiB on such a one, 26 of 346 kernels of two ResNets, MobileNetV2, PP-OCR and
    # EfficientNet-lite0 come out otherwise; of those that take 5 µs or more none is 2 % faster when warm, and 3x3
    # convolutions of 512 channels are 5 % slower without their blocks.
    return Machine(
        kind="x86",
        cpu=cpu,
        features=tuple(sorted(features)),
        lanes=16 if wide else 8,
        registers=32 if wide else 16,
        l1=32 << 10,
        l2=(1 << 20) if wide else (256 << 10),
        threads=threads,
    )


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: no features are known, and native() says so
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _auxiliary_vector() -> dict[int, int]:
    """What Linux tells a process when it starts it; right under qemu too, whose cpuinfo is the host's."""
    try:
        data = Path("/proc/self/auxv").read_bytes()
    except OSError:  # not Linux
        return {}
    return dict(struct.iter_unpack("=QQ", data))
