"""The report as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mc_opt import passes
from mc_opt.passes import LayerReport, PassReport, Report, Unchecked


def test_a_report_is_plain_json_with_a_version() -> None:
    report = Report(
        mc_opt="1",
        passes=(PassReport("toy", "toy{bits=3}", exact=False, rewrites=2, skips={"fc": "small"}),),
        layers=(LayerReport("fc", "toy", "pack", 8, 32, 4, 4.0),),
        unchecked=(Unchecked("drift", "--check structure"),),
    )
    data = json.loads(report.text())
    assert data["schema_version"] == passes.SCHEMA_VERSION
    assert data["passes"][0]["skips"] == {"fc": "small"}
    assert data["layers"][0]["bits"] == 4.0
    assert data["unchecked"] == [{"check": "drift", "reason": "--check structure"}]
    assert report.text().endswith("}\n")


def test_numbers_are_short_and_finite() -> None:
    columns = {"a": 1 / 3, "b": float("inf"), "c": float("nan"), "d": np.float32(0.1), "e": np.int64(3), "f": True}
    report = Report(passes=(PassReport("toy", "toy", exact=False, rewrites=0, columns=columns),))
    assert json.loads(report.text())["passes"][0]["columns"] == {
        "a": 0.333333,
        "b": None,
        "c": None,
        "d": 0.1,
        "e": 3,
        "f": True,
    }


def test_what_json_cannot_hold_is_refused() -> None:
    report = Report(passes=(PassReport("toy", "toy", exact=False, rewrites=0, columns={"a": {1, 2}}),))
    with pytest.raises(TypeError, match="a report cannot hold set"):
        report.text()
