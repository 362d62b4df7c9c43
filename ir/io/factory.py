"""Factories that users name as `package.module:factory`: imported from the current folder, and called."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mc_opt.ir.errors import IRError, OptionError

INSTALL = "torch is not installed, capturing needs it; pip install 'mc-opt[torch]'"


def find_factory(text: str, option: str) -> Callable[[], Any]:
    """What `package.module:factory` names; the current folder is on the import path while it is imported and runs.

    Args:
        text: the module and the name in it.
        option: what the user gave it to, for errors.

    Raises:
        OptionError: there is no such factory.
        IRError: its module cannot be imported, or (from the call) the factory fails.
    """
    where = f"{option} {text!r}"
    path, colon, name = text.partition(":")
    if not (path and colon and name):
        raise OptionError(f"{where}: expected package.module:factory, as in nets.small:make")
    try:
        with _on_path(os.getcwd()):
            factory = getattr(importlib.import_module(path), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise IRError(INSTALL) from error
        raise OptionError(f"{where}: {error}; run it from the folder that holds the module") from error
    except AttributeError as error:
        raise OptionError(f"{where}: module {path!r} has no {name!r}; check the name") from error
    except Exception as error:
        raise IRError(f"{where}: importing {path!r} failed: {first_line(error)}; repair it") from error
    return lambda: call_factory(factory, where)


def call_factory(factory: Callable[[], Any], where: str) -> Any:
    """What a factory makes.

    Raises:
        IRError: it fails.
    """
    try:
        with _on_path(os.getcwd()):
            return factory()
    except Exception as error:
        raise IRError(f"{where}: the factory failed: {first_line(error)}; repair it") from error


@contextlib.contextmanager
def _on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
