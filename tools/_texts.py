"""Texts of the command line that click does not read by itself: pairs of names, and byte counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """`a=b` texts as a dict.

    Raises:
        UsageError: for a text without `=`, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise click.UsageError(f"{option} {text!r}: expected two names, as in {option} state_out=state_in")
        if key in found:
            raise click.UsageError(f"{option}: {key!r} is given twice")
        found[key] = value
    return found


def byte_count(text: str) -> int:
    """`4GiB`, `500MB` or a plain number as bytes.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None or (count := int(float(match[1]) * _UNITS[match[2] or ""])) <= 0:
        raise click.UsageError(f"--memory-limit {text!r}: expected a size, as in 4GiB or 500MB")
    return count
