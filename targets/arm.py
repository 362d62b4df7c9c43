"""The target `arm`: 64-bit ARM processors with NEON under Linux, as a TVM module or as a static library."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from mc_opt.targets import _machine
from mc_opt.targets._base import Price
from mc_opt.targets._machine import Machine
from mc_opt.targets._processor import ProcessorTarget


@dataclasses.dataclass(frozen=True)
class Arm(ProcessorTarget):
    """Native code for 64-bit ARM under Linux, built on any machine.

    cpu is the processor to build for; later ones run what was built for cortex-a53 and cortex-a72. threads is the
    number of threads that large kernels are split for; with 2 or more, whoever loads the artefact may choose another
    number. form=vm makes model.so for TVM's runtime, form=static makes libmodel.a and model.h, which need no runtime
    and run in the caller's thread. prefix starts their names, so that two static models fit in one program.
    """

    name: ClassVar[str] = "arm"
    # Nanoseconds a unit on one core, derived and not measured: the loops of benchmarks/price.py on a Cortex-A72 at
    # 1.5 GHz, their micro-operations as LLVM's AArch64SchedA57.td counts them (two vector pipes; a 128-bit fmla takes
    # both once, tbl 3 slots, trn 1); bytes from 5.5 GB/s, STREAM's copy on a Raspberry Pi 4;
    # call and traffic are x86's, four times as slow.
    price: ClassVar[Price] = Price(
        mul=0.083,
        add=0.083,
        shift=0.33,
        xnor=0.016,
        lookup=0.45,
        bytes=0.18,
        lanes=4,
        call=1600,
        traffic=0.2,
        cache=512 << 10,
    )

    cpu: Literal["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-n2", "neoverse-v1"] = "cortex-a72"
    threads: int = 1
    form: Literal["vm", "static"] = "vm"
    prefix: str = "model"

    def machine(self) -> Machine:
        """The processor to build for."""
        return _machine.named(self.cpu, threads=self.threads)
