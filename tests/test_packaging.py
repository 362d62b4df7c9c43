"""What is shipped and checked is what is there: the wheel, and the rooms as the type checker sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_house import CODE, ROOMS, ROOT


@pytest.mark.slow
@pytest.mark.ci
def test_the_wheel_holds_every_file_of_the_rooms(tmp_path: Path) -> None:
    """A sub-package that pyproject.toml does not list would be missing."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for folder in CODE:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        held = {n for n in packed.namelist() if n.startswith("mc_opt/")}
    wanted = {
        p.relative_to(source).as_posix()
        for f in CODE
        for p in (source / f).rglob("*")
        if p.is_file() and "egg-info" not in str(p)
    }
    wanted = {w for w in wanted if not w.startswith("build/")}
    assert held == {w if w.startswith("mc_opt/") else f"mc_opt/{w}" for w in wanted}


@pytest.mark.slow
@pytest.mark.ci
def test_the_type_checker_sees_the_rooms(tmp_path: Path) -> None:
    """Run on the editable install mypy checks nothing; through the link it finds a planted error."""
    room = tmp_path / "repository" / "ir"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('"""A room."""\n')
    shutil.copy(ROOT / "ir" / "errors.py", room)
    (room / "options.py").write_text((ROOT / "ir" / "options.py").read_text() + "\nplanted: int = to_spec('a', None)\n")
    (tmp_path / ".typing").mkdir()
    (tmp_path / ".typing" / "mc_opt").symlink_to(tmp_path / "repository")
    environment = {**os.environ, "MYPYPATH": str(tmp_path / ".typing")}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run([*command, "-p", "mc_opt.ir"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'Incompatible types in assignment (expression has type "Spec", variable has type "int")' in done.stdout
    makefile = (ROOT / "Makefile").read_text()
    assert "MYPYPATH=.typing" in makefile and all(f"-p mc_opt.{room}" in makefile for room in (*ROOMS, "mc_opt"))
