"""Symbols of 64-bit little-endian ELF object files: list them, and make all but a few invisible to other objects."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np

_HEADER = np.dtype(
    [
        ("ident", "S16"),
        *(("type", "<u2"), ("machine", "<u2"), ("version", "<u4"), ("entry", "<u8"), ("phoff", "<u8")),
        *(("shoff", "<u8"), ("flags", "<u4"), ("ehsize", "<u2"), ("phentsize", "<u2"), ("phnum", "<u2")),
        *(("shentsize", "<u2"), ("shnum", "<u2"), ("shstrndx", "<u2")),
    ]
)
_SECTION = np.dtype(
    [
        *(("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("addr", "<u8"), ("offset", "<u8")),
        *(("size", "<u8"), ("link", "<u4"), ("info", "<u4"), ("addralign", "<u8"), ("entsize", "<u8")),
    ]
)
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
_RELA = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_SYMTAB, _RELA_TYPE, _GROUP, _EXTENDED = 2, 4, 17, 18
_LOCAL = 0
_UNDEFINED = 0


class Object:
    """An ELF object file, mapped: a change is in the file at once, and weights stay on the disk."""

    def __init__(self, path: Path) -> None:
        """Map the file."""
        self._bytes = np.memmap(path, np.uint8, mode="r+")
        header = self._view(0, _HEADER, 1)[0]
        assert header["ident"].startswith(b"\x7fELF\x02\x01") and header["shnum"], f"{path}: not a 64-bit ELF object"
        self._sections = self._view(int(header["shoff"]), _SECTION, int(header["shnum"]))
        (self._table,) = [k for k, s in enumerate(self._sections) if s["type"] == _SYMTAB]
        self._symbols = self._content(self._table, _SYMBOL)
        strings = self._content(int(self._sections[self._table]["link"]), np.dtype("u1")).tobytes()
        self._names = [strings[s["name"] : strings.index(b"\0", s["name"])].decode() for s in self._symbols]

    def defined(self) -> frozenset[str]:
        """Names of the symbols that this object offers to others."""
        return frozenset(n for n, s in self._global() if s["shndx"] != _UNDEFINED)

    def undefined(self) -> frozenset[str]:
        """Names of the symbols that others must provide."""
        return frozenset(n for n, s in self._global() if s["shndx"] == _UNDEFINED)

    def localise(self, keep: Set[str]) -> None:
        """Make every symbol that the object defines local, but those in `keep`: two models fit in one program."""
        local = np.array([s["info"] >> 4 == _LOCAL for s in self._symbols])
        hide = np.array(
            [s["shndx"] != _UNDEFINED and n not in keep for n, s in zip(self._names, self._symbols, strict=True)]
        )
        self._symbols["info"][hide] &= 15
        self._symbols["other"][hide & ~local] = 0
        # Locals stand first in a symbol table, and whoever refers to a symbol does it by its number.
        order = np.argsort(~(local | hide), kind="stable")
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        self._symbols[:] = self._symbols[order].copy()
        self._names = [self._names[k] for k in order]
        self._sections["info"][self._table] = int((local | hide).sum())
        self._renumber(order, number)

    def _renumber(self, order: np.ndarray, number: np.ndarray) -> None:
        for k, section in enumerate(self._sections):
            if section["link"] != self._table:
                continue
            if section["type"] == _RELA_TYPE:
                rows = self._content(k, _RELA)
                rows["symbol"] = number[rows["symbol"]]
            elif section["type"] == _GROUP:
                self._sections["info"][k] = number[section["info"]]
            elif section["type"] == _EXTENDED:
                rows = self._content(k, np.dtype("<u4"))
                rows[:] = rows[order].copy()

    def _global(self) -> list[tuple[str, Any]]:
        return [(n, s) for n, s in zip(self._names, self._symbols, strict=True) if s["info"] >> 4 != _LOCAL]

    def _content(self, section: int, dtype: np.dtype[Any]) -> Any:
        row = self._sections[section]
        return self._view(int(row["offset"]), dtype, int(row["size"]) // dtype.itemsize)

    def _view(self, offset: int, dtype: np.dtype[Any], count: int) -> Any:
        # A structured view of unaligned bytes: np.frombuffer would drop the writable mapping.
        return self._bytes[offset : offset + count * dtype.itemsize].view(dtype)
