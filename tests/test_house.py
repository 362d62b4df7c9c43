"""The rules of docs/architecture.md and CONTRIBUTING.md that a machine can hold."""

from __future__ import annotations

import ast
import functools
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("ir", "targets", "passes", "tools")
CODE = (*ROOMS, "mc_opt")
OUTSIDE = ("tests", "examples", "benchmarks")

# Files that may be longer than 400 lines: tables of ops.
TABLES: frozenset[str] = frozenset()

# Package -> where it may be imported at module level, and where inside functions too.
OWNERS = {
    "tvm": (
        (
            "targets/_relax/",
            "targets/kernels/",
            "targets/_bound.py",
            "targets/_direct.py",
            "targets/_build.py",
            "targets/_candidates.py",
            "targets/_device.py",
            "targets/_measure.py",
            "targets/_c.py",
        ),
        ("targets/",),
    ),
    "torch": (
        (
            "ir/run/interp.py",
            "ir/run/standard/",
            "ir/io/capture.py",
            "ir/ops/_fake_",
            "passes/_train_",
            "passes/_train.py",
        ),
        ("ir/run/", "ir/io/", "ir/ops/", "ir/op.py", "passes/", "tools/driver.py", "tools/api.py"),
    ),
    "networkx": (("ir/views.py",), ("ir/views.py",)),
}
# What writes or renames files, and where it stands. Everything else writes through ir/io/atomic.py.
WRITERS = {
    "ir/io/atomic.py": "the one place",
    "targets/_bound.py": "writes into a folder that atomic staged",
    "targets/_cuda.py": "writes what nvcc reads into a temporary folder",
    "targets/_device.py": "writes into a folder that atomic staged",
    "ir/io/save.py": "streams weights into a folder that atomic staged",
    "targets/_native.py": "writes into a folder that atomic staged",
}
# Where environment variables are read or set.
ENVIRONMENT = {
    "tools/cli.py": "the one place",
    "ir/run/ort.py": "turns the telemetry of ONNX Runtime off, which reads nothing else",
}
FORBIDDEN_NAMES = ("utils", "helpers", "common", "manager", "handler", "data2", "misc")


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def imports(path: Path, *, top_level: bool = False) -> tuple[tuple[int, str], ...]:
    """Every imported module of a file as (line, dotted name); `from a import b` counts as `a.b`."""
    found: list[tuple[int, str]] = []
    for node in _top_level(tree(path)) if top_level else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    return tuple(found)


def _top_level(module: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, nothing under TYPE_CHECKING."""
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)


def dotted(node: ast.AST) -> str:
    """`os.path.join` for such an expression, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            yield node.lineno, dotted(node.func) or attribute, node


# --- rooms ---------------------------------------------------------------------------------------


def test_a_room_imports_only_to_its_left_and_only_through_the_front_door() -> None:
    wrong = []
    for room in ROOMS:
        for path in files(room):
            for line, name in imports(path):
                parts = name.split(".")
                if parts[0] != "mc_opt" or len(parts) < 2 or parts[1] not in ROOMS:
                    continue
                other = parts[1]
                if ROOMS.index(other) > ROOMS.index(room):
                    wrong.append(f"{name_of(path)}:{line}: {room} imports {other}, which is to its right")
                # mc_opt.<room>.<name>: one name that the room's __init__ exports; a module name goes around it
                elif other != room and (len(parts) > 3 or (len(parts) == 3 and not _exported(other, parts[2]))):
                    wrong.append(f"{name_of(path)}:{line}: {name} goes around the __init__ of {other}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def _exports(room: str) -> frozenset[str]:
    names: set[str] = set()
    for node in tree(ROOT / room / "__init__.py").body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            names |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
    return frozenset(names)


def _exported(room: str, name: str) -> bool:
    return name in _exports(room)


def test_rooms_do_not_use_the_facade() -> None:
    wrong = []
    for path in files("ir", "targets", "passes"):
        for node in ast.walk(tree(path)):
            used = dotted(node) if isinstance(node, ast.Attribute) else ""
            if re.fullmatch(r"mc_opt\.\w+", used) and used.removeprefix("mc_opt.") not in (*ROOMS, "__version__"):
                wrong.append(f"{name_of(path)}:{node.lineno}: {used}")  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)


def test_no_bare_room_imports() -> None:
    """`import ir` from the repository's root makes a second copy of the room."""
    wrong = [
        f"{name_of(path)}:{line}: {name}"
        for path in files(*CODE, *OUTSIDE)
        for line, name in imports(path)
        if name.split(".")[0] in ROOMS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_main_blocks_in_rooms() -> None:
    wrong = [
        name_of(p)
        for p in files(*CODE)
        if "__main__" in (ast.unparse(n.test) for n in tree(p).body if isinstance(n, ast.If))
    ]
    wrong += [name_of(p) for p in files(*CODE) if p.name == "__main__.py"]
    wrong += [
        f"{name_of(p)}:{n.lineno}"
        for p in files(*CODE)
        for n in tree(p).body
        if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_small() -> None:
    long = {name_of(p): n for p in files(*CODE) if (n := len(p.read_text().splitlines())) > 400}
    assert not {k: v for k, v in long.items() if k not in TABLES}, "split them, or name a table of ops in TABLES"
    assert set(TABLES) <= set(long), "a table in TABLES is short again"


def test_files_have_docstrings_and_good_names() -> None:
    wrong = [f"{name_of(p)}: no module docstring" for p in files(*CODE) if not ast.get_docstring(tree(p))]
    wrong += [f"{name_of(p)}: say what it holds" for p in files(*CODE) if p.stem.strip("_") in FORBIDDEN_NAMES]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_stay_with_their_owners() -> None:
    wrong = []
    for package, (at_top, anywhere) in OWNERS.items():
        for path in files(*CODE):
            name = name_of(path)
            if not name.startswith(at_top) and package in {n.split(".")[0] for _, n in imports(path, top_level=True)}:
                wrong.append(f"{name}: imports {package} at module level")
            if not name.startswith((*at_top, *anywhere)) and package in {n.split(".")[0] for _, n in imports(path)}:
                wrong.append(f"{name}: uses {package}, which belongs to {', '.join(anywhere)}")
    assert not wrong, "\n".join(wrong)


def test_files_are_written_through_atomic() -> None:
    wrong = [
        f"{name_of(p)}:{line}: {what}" for p in files(*CODE) if name_of(p) not in WRITERS for line, what in _writes(p)
    ]
    assert not wrong, "\n".join(wrong)


def _writes(path: Path) -> Iterator[tuple[int, str]]:
    moves = {
        "os.rename",
        "os.replace",
        "shutil.move",
        "onnx.save",
        "onnx.save_model",
        "onnx_ir.save",
        "np.save",
        "torch.save",
    }
    for line, called, call in calls(path):
        modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        writing = [
            m for m in modes if isinstance(m, str) and re.fullmatch(r"[rwaxbt+]{1,4}", m) and re.search(r"[wax+]", m)
        ]
        if called in moves or (called.split(".")[-1] == "open" and writing):
            yield line, called
        # `ir.write_text(path, text)` and `write_text(path, text)` are ours; `path.write_text(text)` is not
        ours = called.split(".")[0] in ("ir", "atomic") or isinstance(call.func, ast.Name)
        if called.split(".")[-1] in ("write_text", "write_bytes") and not ours:
            yield line, called


def test_environment_variables_are_read_in_one_place() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in files(*CODE)
        if name_of(path) not in ENVIRONMENT
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv", "os.putenv")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_prints_outside_tools() -> None:
    wrong = [
        f"{name_of(p)}:{line}"
        for p in files("ir", "targets", "passes", "mc_opt")
        for line, name, _ in calls(p)
        if name == "print"
    ]
    assert not wrong, "\n".join(wrong)


# --- lazy ----------------------------------------------------------------------------------------

PROBE = """
import sys
before = set(sys.modules)
{code}
stdlib = set(sys.stdlib_module_names)
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(",".join(sorted(name for name in new if name not in stdlib and not name.startswith(("__editable__", "_")))))
"""


QUIET = """
import contextlib, io
from mc_opt.tools import cli
with contextlib.redirect_stdout(io.StringIO()): cli.run({arguments})
"""


def loaded(code: str) -> set[str]:
    """The packages beside the standard library that `code` imports in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True)
    return set(filter(None, done.stdout.strip().splitlines()[-1].split(",") if done.stdout.strip() else []))


def test_importing_the_package_and_its_rooms_loads_nothing_heavy() -> None:
    assert loaded("import mc_opt, mc_opt.ir, mc_opt.targets, mc_opt.passes, mc_opt.tools") == {"mc_opt"}


def test_help_imports_click_and_the_standard_library_alone() -> None:
    assert loaded(QUIET.format(arguments=["--help"])) == {"mc_opt", "click"}


def test_a_rewrite_without_targets_needs_neither_torch_nor_tvm(tmp_path: Path) -> None:
    model = ROOT / "examples" / "digits" / "digits.onnx"
    arguments = [str(model), "--passes", "fold-batch-norm,denseshift", "-o", str(tmp_path / "out")]
    assert not loaded(QUIET.format(arguments=arguments)) & {"torch", "tvm"}
    assert (tmp_path / "out" / "model.onnx").exists()


def test_help_is_fast() -> None:
    command = Path(sysconfig.get_path("scripts")) / "mc-opt"
    if not command.exists():
        pytest.skip("mc-opt is not installed in this environment")
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    # The limit is 0.2 s. Processor time, which is all that --help takes on a free machine: this one may be busy.
    assert min(times) <= 0.2, f"--help took {statistics.median(times):.2f} s (median)"


def test_imports_are_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [r for rs in project["optional-dependencies"].values() for r in rs]
    names = {re.split(r"[\[<>=!~; ]", r)[0].lower().replace("-", "_") for r in declared}
    modules = {
        "apache_tvm": "tvm",
        "scikit_learn": "sklearn",
        "onnx_graphsurgeon": "onnx_graphsurgeon",
    }
    # protobuf comes with onnx, whose files it reads
    known = {modules.get(n, n) for n in names} | {"mc_opt", "google"} | set(sys.stdlib_module_names)
    wrong = {f"{name_of(p)}: {n}" for p in files(*CODE) for _, n in imports(p) if n.split(".")[0] not in known}
    assert not wrong, "\n".join(sorted(wrong))


# --- documents -----------------------------------------------------------------------------------


def test_documents_quote_lists_with_braces() -> None:
    """Unquoted, a shell takes `a{x=1 y=2}` apart."""
    wrong = []
    texts = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *files(*CODE, "examples", "benchmarks"),
        ROOT / "Makefile",
    ]
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for given in re.finditer(r"--(?:passes|target)[ =](\S+)", line):
                if "{" in given[1] and given[1][0] not in "'\"":
                    wrong.append(f"{name_of(path)}:{number}: {given[0]}")
    assert not wrong, "\n".join(wrong)


def test_every_error_code_is_documented() -> None:
    from mc_opt.tools import _failure

    readme = (ROOT / "README.md").read_text()
    for code in (*range(7), 130):
        assert re.search(rf"\b{code}\b", _failure.EXIT_CODES), code
        assert re.search(rf"^\| {code} \|", readme, re.MULTILINE), f"README.md does not explain exit code {code}"
