"""The errors of the IR room: the graph, the file or the data is wrong."""

from __future__ import annotations


class IRError(Exception):
    """The graph or its file is wrong; the text says where, what was expected and what to do."""


class DataError(IRError):
    """Input data that does not fit the model: a missing name, another shape or another type."""


class UnsupportedError(IRError):
    """The model holds something that is right and that we cannot do: an op that torch has no meaning of."""


class LimitError(IRError):
    """A limit of the machine was reached: memory or disk."""


class OptionError(Exception):
    """A pass or target text that cannot be read, or names something unknown (a mistake of usage)."""
