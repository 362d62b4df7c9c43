"""The pass that CONTRIBUTING.md teaches works as it stands there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from mc_opt.tools import cli

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text of the example's test; the pass stands where the room looks for passes."""
    a_pass, its_test = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "three_levels.py").write_text(a_pass, encoding="utf-8")
    room = importlib.import_module("mc_opt.passes")
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mc_opt.passes.three_levels", raising=False)
    return str(its_test)


def test_the_example_and_its_test(example: str, tmp_path: Path) -> None:
    path = tmp_path / "test_three_levels.py"
    path.write_text(example, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("test_three_levels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_") and inspect.isfunction(value)]
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.mark.usefixtures("example")
def test_the_command_line_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["passes", "three-levels"]) == 0
    printed = capsys.readouterr().out
    assert "share" in printed and "0.7" in printed and "arXiv 1605.04711" in printed
