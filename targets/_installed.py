"""Whether the packages that building and running need are here, said before anything imports them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from mc_opt.targets._base import TargetError


def tvm_version() -> str:
    """The version of TVM.

    Raises:
        TargetError: it is not installed; the text says how to get it.
    """
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        raise TargetError("TVM is not installed, artefacts need it; pip install 'mc-opt[tvm]'") from None


def check_compiler() -> None:
    """Refuse a build where TVM or the linker is missing.

    Raises:
        TargetError: naming the package and how to get it.
    """
    tvm_version()
    if importlib.util.find_spec("ziglang") is None:
        raise TargetError("the package ziglang is not installed, artefacts are linked by it; pip install 'mc-opt[tvm]'")
