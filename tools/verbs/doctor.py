"""`mc-opt doctor`: what is installed, what this machine has, what is missing and the command that brings it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from mc_opt import targets
from mc_opt.tools import _command, _console

CORE = "core"
EXTRAS = ("torch", "train", "tvm", "cuda")
PURPOSE = {
    CORE: "ONNX in, passes, ONNX out",
    "torch": "capture of PyTorch models, the interpreter",
    "train": "training what passes made",
    "tvm": "artefacts for x86, ARM and CUDA",
    "cuda": "compiling CUDA kernels without nvcc, and running them on a GPU",
}
# The features that decide what an x86 artefact is built for, in the names of /proc/cpuinfo.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_vbmi",
    "avx_vnni",
    "amx_tile",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
# Program (or its names) -> what needs it, and how Debian brings it.
PROGRAMS = {
    "qemu-aarch64|qemu-aarch64-static": (
        "running ARM artefacts without a board (tests)",
        "apt-get install qemu-user libstdc++6-arm64-cross",
    ),
    "npm": ("one public test model", "apt-get install npm"),
}


@click.command(cls=_command.Command)
@_console.common_options
def command(as_json: bool) -> None:
    """Show what is installed, what is missing, and the command that installs it."""
    facts = examine()
    if as_json:
        _console.print_json(facts)
        return
    machine = facts["machine"]
    click.echo(f"mc-opt {facts['mc_opt']}, Python {facts['python']} ({sys.executable})")
    click.echo(f"{machine['system']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory']} of memory")
    click.echo(f"CPU features: {' '.join(machine['features']) or 'none of those that matter here'}")
    rows = [
        (r["package"], r["part"], r["installed"], r["needed"] or None, r["problem"] or "ok") for r in facts["packages"]
    ]
    _console.print_table(("package", "part", "installed", "needed", ""), rows, title="Packages")
    tools = [(t["name"], t["found"], t["purpose"]) for t in facts["tools"]]
    _console.print_table(("tool", "found", "for"), tools, title="Tools")
    click.echo()
    for line in facts["advice"] or ["nothing is missing"]:
        click.echo(line)


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints; heavy packages are looked up, not imported."""
    packages = _packages()
    return {
        "mc_opt": importlib.metadata.version("mc-opt"),
        "python": platform.python_version(),
        "machine": _machine(),
        "packages": packages,
        "tools": [tool for tool, _ in _tools()],
        "advice": [*_advice(packages), *(advice for tool, advice in _tools() if tool["found"] is None and advice)],
    }


def _packages() -> list[dict[str, Any]]:
    rows = []
    for requirement in importlib.metadata.requires("mc-opt") or []:
        match = re.match(r"([A-Za-z0-9_.-]+)(\[[^\]]*\])?([^;]*)(?:;.*extra == [\"'](\w+)[\"'])?", requirement)
        assert match is not None
        name, needed, part = match[1], match[3].strip(" ()"), match[4] or CORE
        if name == "mc-opt" or part not in (CORE, *EXTRAS):
            continue
        try:
            installed: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        rows.append(
            {
                "package": name,
                "part": part,
                "installed": installed,
                "needed": needed,
                "problem": _problem(installed, needed),
            }
        )
    return rows


def _problem(installed: str | None, needed: str) -> str:
    if installed is None:
        return "missing"
    for clause in filter(None, needed.split(",")):
        match = re.match(r"(>=|==|<=|!=|<|>|~=)\s*(\S+)", clause.strip())
        if match is not None and not _holds(installed, match[1], match[2]):
            return f"{clause.strip()} is needed"
    return ""


def _holds(installed: str, relation: str, wanted: str) -> bool:
    """Whether a version fits; numbers are compared part by part, which is enough for the versions we name."""
    have, want = (_numbers(text) for text in (installed, wanted))
    match relation:
        case "==":
            return installed.partition("+")[0] == wanted
        case "!=":
            return installed.partition("+")[0] != wanted
        case "<":
            return have < want
        case "<=":
            return have <= want
        case ">":
            return have > want
        case _:
            return have >= want


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _tools() -> list[tuple[dict[str, Any], str]]:
    """Each tool as (what is printed, what to do when it is missing)."""
    rows: list[tuple[dict[str, Any], str]] = []
    for names, (purpose, debian) in PROGRAMS.items():
        name, *others = names.split("|")
        found = next((path for n in (name, *others) if (path := shutil.which(n))), None)
        rows.append(({"name": name, "found": found, "purpose": purpose}, f"{name} ({purpose}): {debian}"))
    for tool in targets.cuda_tools():
        rows.append(({"name": tool.name, "found": tool.found, "purpose": tool.purpose}, tool.advice))
    return rows


def _advice(packages: list[dict[str, Any]]) -> list[str]:
    """One pip command for each part that has a problem, pinned as it is needed."""
    lines = []
    for part in (CORE, *EXTRAS):
        wrong = [row for row in packages if row["part"] == part and row["problem"]]
        if wrong:
            quoted = " ".join(f"'{row['package']}{row['needed']}'" for row in wrong)
            lines.append(f"{part} ({PURPOSE[part]}): {sys.executable} -m pip install {quoted}")
    return lines


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
        found = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
        model = name[1] if name else model
        flags = set(found[1].split()) if found else flags
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory": _console.size_text(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }
