"""A pass for tests that takes options of any name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mc_opt.passes import Pass


@dataclass(frozen=True)
class Free(Pass):
    """Takes options of any name."""

    given: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Take what is given."""
        return cls(given=tuple(options.items()))

    def options(self) -> dict[str, str]:
        """Give it back."""
        return dict(self.given)
