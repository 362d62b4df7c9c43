"""Test tiers and tools: a missing tool skips with its reason, or fails under --require-tools."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# One thread everywhere: the machine may be shared, and sums come out the same on every run.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of the tests that import it without mc-opt


# The same draws on every machine and no deadline, as it may be busy; `--hypothesis-profile=explore` draws anew.
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


def _module(name: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(name) else f"python package {name} is not installed"


def _program(*names: str) -> Callable[[], str | None]:
    return lambda: None if any(shutil.which(n) for n in names) else f"program {' or '.join(names)} is not installed"


def _gpu() -> str | None:
    return None if Path("/dev/nvidiactl").exists() else "no NVIDIA GPU in this machine"


def _qemu() -> str | None:
    from tests import _qemu

    return _qemu.missing()


# Marker -> what it needs; the answer is None, or why the tool is missing.
TOOLS: dict[str, Callable[[], str | None]] = {
    "tvm": _module("tvm"),
    "torch": _module("torch"),
    "zig": _module("ziglang"),
    "qemu": _qemu,
    "browser": _program("chromium", "chromium-browser", "google-chrome"),
    "gpu": _gpu,
}
# `make check` leaves tests with one of these out; `ci` brings some of them back into `make test`.
LEFT_OUT = {"models", "qemu", "browser", "slow", "gpu"}
# Skips that say one of these are skips for a missing tool, however they were raised.
MISSING = ("missing tool:", "could not import")


@functools.cache
def _missing(marker: str) -> str | None:
    return TOOLS[marker]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-tools",
        action="store_true",
        help="a test that skips because a tool is missing fails instead (all but `gpu`)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = {marker.name for marker in item.iter_markers()}
        if "ci" in marks and not marks & LEFT_OUT:
            raise pytest.UsageError(f"{item.nodeid}: `ci` alone keeps it in `make check`; mark it slow as well")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        reason = _missing(marker.name) if marker.name in TOOLS else None
        if reason:
            pytest.skip(f"missing tool: {marker.name}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    skipped = report.skipped and isinstance(report.longrepr, tuple)  # type: ignore[attr-defined]
    if skipped and item.config.getoption("--require-tools") and item.get_closest_marker("gpu") is None:
        reason = str(report.longrepr[2])  # type: ignore[attr-defined]
        if any(word in reason for word in MISSING):
            report.outcome = "failed"  # type: ignore[attr-defined]
            report.longrepr = f"{item.nodeid} skipped, and --require-tools is on: {reason}"  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="session")
def public() -> Callable[..., Path]:
    """`public("magika")`: the folder above the fetched and checked packages; skips when one cannot be had."""
    from tests.models._fetch import FetchError, fetch_public

    def folder(*names: str) -> Path:
        try:
            return fetch_public(*names)
        except FetchError as error:
            pytest.skip(f"missing tool: models: {error}")

    return folder
