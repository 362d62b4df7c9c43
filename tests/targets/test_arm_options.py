"""The target `arm` without a build: its options, and what its loader asks of a processor."""

from __future__ import annotations

import dataclasses
import platform
import re

import pytest

from mc_opt import ir, targets
from mc_opt.targets import _machine, _manifest, _vm


def test_options_are_checked() -> None:
    for text, word in (
        ("arm{form=static threads=2}", "threads=2"),
        ("arm{prefix=net}", "prefix=net"),
        ("arm{cpu=native}", "cpu"),
        ("arm{threads=0}", "threads=0"),
    ):
        with pytest.raises(ir.OptionError, match=word):
            targets.parse_target(text)
    made = targets.parse_target("arm{cpu=cortex-a53}")
    assert targets.parse_target(str(made)) == made
    assert made.resolved() == "arm{cpu=cortex-a53 features=+neon threads=1 form=vm}"
    static = targets.parse_target("arm{form=static prefix=net}")
    assert static.resolved() == "arm{cpu=cortex-a72 features=+neon threads=1 form=static prefix=net}"


# AT_HWCAP of a Raspberry Pi 4: fp, asimd, evtstrm, crc32, cpuid.
PI = {16: 1 << 0 | 1 << 1 | 1 << 2 | 1 << 7 | 1 << 11, 26: 0}


@pytest.mark.parametrize(
    ("cpu", "reason"),
    [
        ("cortex-a53", None),
        ("cortex-a72", None),
        ("cortex-a76", r"lacks dotprod, fullfp16, lse, rcpc, rdm; build with arm\{cpu=cortex-a53\}"),
    ],
)
def test_an_arm_processor_is_asked_for_its_features(
    monkeypatch: pytest.MonkeyPatch, cpu: str, reason: str | None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(_machine, "_auxiliary_vector", lambda: PI)
    machine = _machine.named(cpu)
    manifest = _manifest.Manifest(
        **{field.name: "" for field in dataclasses.fields(_manifest.Manifest)}  # type: ignore[arg-type]
        | {"kind": "arm", "form": "vm", "cpu": cpu, "features": machine.features}
    )
    said = _vm.unfit(manifest)
    assert said is None if reason is None else said is not None and re.search(reason, said)
    with pytest.raises(ValueError, match="this machine is aarch64, no x86-64; name one"):
        _machine.native()
