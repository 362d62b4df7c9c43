"""The target `x86`: 64-bit x86 processors with AVX2 or AVX-512, as a TVM module or as a static library."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from mc_opt.targets import _machine
from mc_opt.targets._base import Price
from mc_opt.targets._machine import Activations, Machine
from mc_opt.targets._processor import ProcessorTarget


@dataclasses.dataclass(frozen=True)
class X86(ProcessorTarget):
    """Native code for 64-bit x86.

    cpu is the processor to build for: native (this one), a level of the x86-64 ABI, or a family by LLVM's name; later
    ones run what was built for an earlier one. threads is the number of threads that large kernels are split for; with
    2 or more, whoever loads the artefact may choose another number.
    form=vm makes model.so for TVM's runtime, form=static makes libmodel.a and model.h, which need no runtime and run in
    the caller's thread. prefix starts their names, so that two static models fit in one program. activations=int8
    rounds what is multiplied with packed weights to 8 bits, each row by its own scale: faster, with an error of its own
    that the report shows; many rows at a time in the tiles of AMX where the processor has them.
    """

    name: ClassVar[str] = "x86"
    # Nanoseconds a unit on one core: benchmarks/price.py on an Intel Xeon (sapphirerapids, AVX-512). A fused
    # multiply-add is one product and one sum, half of its 0.0108 each; it is taken off shift's and lookup's loops;
    # call is an estimate, traffic is fitted to the layers of benchmarks/kron_speed.py, dense and factored.
    price: ClassVar[Price] = Price(
        mul=0.0054,
        add=0.0054,
        shift=0.019,
        xnor=0.0008,
        lookup=0.031,
        bytes=0.05,
        lanes=16,
        call=400,
        traffic=0.05,
        cache=1 << 20,
    )

    cpu: Literal[
        "native",
        "x86-64-v3",
        "x86-64-v4",
        "haswell",
        "alderlake",
        "skylake-avx512",
        "cascadelake",
        "icelake-server",
        "sapphirerapids",
        "znver3",
        "znver4",
    ] = "native"
    threads: int = 1
    form: Literal["vm", "static"] = "vm"
    prefix: str = "model"
    activations: Activations = "float32"

    @property
    def exact(self) -> bool:
        """Whether activations stay as they are."""
        return self.activations == "float32"

    def machine(self) -> Machine:
        """The processor to build for, `native` looked up."""
        if self.cpu == "native":
            machine = _machine.native(threads=self.threads)
        else:
            machine = _machine.named(self.cpu, threads=self.threads)
        return dataclasses.replace(machine, activations=self.activations)
