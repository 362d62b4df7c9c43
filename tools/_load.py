"""`mc_opt.load`, apart from the rest of the public API: who runs an artefact imports nothing that builds one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mc_opt import targets

if TYPE_CHECKING:
    from mc_opt.targets import Artefact


def load(out: str | os.PathLike[str], target: str | None = None, *, threads: int | None = None) -> Artefact:
    """The built artefact of an output folder, ready to run.

    Loading it executes the native code in the folder: load only what you built or trust.

    Args:
        out: the output folder.
        target: which target; the one that this machine runs if None.
        threads: how many run what was built for several (`x86{threads=2}`); as many as it was built for if None.
    """
    return targets.load_artefact(Path(out), target, threads=threads)
