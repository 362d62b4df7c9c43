"""The target `arm`: artefacts of both forms run under qemu, and what their machine code consists of."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from mc_opt import ir, targets
from mc_opt.targets import _machine, _manifest, _vm
from tests import _qemu
from tests.targets.test_static import MODELS, build, compressed


def equal(model: object, folder: Path, *, cpu: str | None = None, samples: int = 2) -> None:
    """The artefact gives what ONNX Runtime gives, for several inputs: fp32 sums in another order."""
    inputs = [s.inputs for s in ir.seeded_data(model, samples, 3)]  # type: ignore[arg-type]
    session = ir.Session(model)  # type: ignore[arg-type]
    for given, outputs in zip(inputs, _qemu.run_arm(folder, inputs, cpu=cpu), strict=True):
        expected = session.run(given)
        assert list(outputs) == list(expected)
        for name, wanted in expected.items():
            assert outputs[name].dtype == wanted.dtype
            np.testing.assert_allclose(outputs[name], wanted, rtol=0, atol=1e-4 * np.ptp(wanted), err_msg=name)


@pytest.mark.slow
@pytest.mark.tvm
@pytest.mark.zig
@pytest.mark.qemu
@pytest.mark.ci
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["vm", "static"])
def test_an_artefact_equals_the_model(name: str, form: str, tmp_path: Path) -> None:
    model = compressed(name)
    folder = build(model, tmp_path / "arm", f"arm{{form={form}}}")
    equal(model, folder)


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


PI = {"Features": "fp asimd evtstrm crc32 cpuid", "CPU part": "0xd08"}


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
    monkeypatch.setattr(_machine, "_cpuinfo", lambda key: PI.get(key, ""))
    machine = _machine.named(cpu)
    manifest = _manifest.Manifest(
        **{field.name: "" for field in dataclasses.fields(_manifest.Manifest)}  # type: ignore[arg-type]
        | {"kind": "arm", "form": "vm", "cpu": cpu, "features": machine.features}
    )
    said = _vm.unfit(manifest)
    assert said is None if reason is None else said is not None and re.search(reason, said)
    with pytest.raises(ValueError, match="this machine is aarch64, no x86-64; name one"):
        _machine.native()
