"""Pickles read as data, by a small machine that calls nothing.

A pickle is a program for a stack machine whose instructions import and call whatever they name. Here the instructions
that make numbers, text and containers are carried out, and of names the reader gives an exact list, each with what it
stands for as data. Any other name, instruction or kind of key is refused, before anything of it is looked up.
"""

from __future__ import annotations

import os
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_MOST = 1_000_000  # instructions; published checkpoints take up to some hundred thousand
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
_VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)


class ForeignFileError(ValueError):
    """A file of another project that cannot be read: names it, and says what was expected and what was found."""


def expected(value: Any, kind: type) -> Any:
    """`value`, if it is of a kind of data.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}, found a {type(value).__name__}")
    return value


class Machine:
    """Carries out one pickle after another in a file.

    Args:
        names: what each name that may occur, "module name", makes of its arguments; None for one that is not called.
        stored: what a reference to a storage stands for; None where there may be none.
        size: of the file, in bytes: what calls copy may not be more.
    """

    def __init__(
        self,
        names: Mapping[str, Callable[..., Any] | None],
        size: int,
        stored: Callable[[Any], Any] | None = None,
    ):
        self._names, self._room, self._stored = names, size, stored
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], Any]] = {
            "MARK": lambda value: self._marks.append(len(self._stack)),
            "TUPLE": lambda value: self._stack.append(tuple(self._marked())),
            "TUPLE1": lambda value: self._stack.append(tuple(self._last(1))),
            "TUPLE2": lambda value: self._stack.append(tuple(self._last(2))),
            "TUPLE3": lambda value: self._stack.append(tuple(self._last(3))),
            "SETITEMS": lambda value: self._set_items(self._marked()),
            "SETITEM": lambda value: self._set_items(self._last(2)),
            "APPENDS": lambda value: self._append(self._marked()),
            "APPEND": lambda value: self._append(self._last(1)),
            "ADDITEMS": lambda value: add_items(self._marked(), self._stack[-1]),
            "GLOBAL": self._name,
            "STACK_GLOBAL": lambda value: self._name(" ".join(expected(part, str) for part in self._last(2))),
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "BUILD": self._build,
            "BINPERSID": self._refer,
            "MEMOIZE": lambda value: self._memo.update({len(self._memo): self._stack[-1]}),
            "BINPUT": lambda value: self._memo.update({value: self._stack[-1]}),
            "LONG_BINPUT": lambda value: self._memo.update({value: self._stack[-1]}),
            "BINGET": lambda value: self._stack.append(self._memo[value]),
            "LONG_BINGET": lambda value: self._stack.append(self._memo[value]),
        }

    def run(self, file: BinaryIO) -> Any:
        """What the pickle makes; the file is then behind it.

        Raises:
            ValueError, TypeError, LookupError: it is damaged, or asks for what is not known.
        """
        for part in (self._stack, self._marks):
            part.clear()
        self._memo.clear()
        for count, (opcode, value, place) in enumerate(pickletools.genops(_Bounded(file))):  # type: ignore[arg-type]
            name = opcode.name
            if count > _MOST:
                raise ValueError(f"more than {_MOST:,} instructions")
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(value)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in self._steps:
                self._steps[name](value)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"instruction {name} at byte {place} is none of a checkpoint's")
        raise ValueError("it has no end")

    def _marked(self) -> list[Any]:
        """What lies above the last mark, taken off."""
        return self._last(len(self._stack) - self._marks.pop())

    def _last(self, count: int) -> list[Any]:
        if not 0 <= count <= len(self._stack):
            raise ValueError("an instruction takes more than there is")
        at = len(self._stack) - count
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = expected(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):  # others may take for ever to hash
                raise ValueError(f"expected text and whole numbers as keys, found a {type(key).__name__}")
            if key in target:
                raise ValueError(f"it gives {key!s:.80} twice")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        expected(self._stack[-1], list).extend(items)

    def _name(self, said: str) -> None:
        if said not in self._names:
            raise ValueError(f"it names {said.replace(' ', '.', 1)!r:.120}, which no checkpoint of this kind needs")
        self._stack.append(said)  # as text, which is all that it ever is

    def _call(self, value: Any) -> None:
        name, args = self._last(2)
        known = self._names.get(name) if isinstance(name, str) else None
        if known is None:
            raise ValueError(f"it calls a {type(name).__name__} {name!s:.80}, which is no function")
        self._spend(*expected(args, tuple))
        self._stack.append(known(*args))

    def _build(self, value: Any) -> None:
        target, state = self._last(2)
        if not isinstance(target, (tuple, OrderedDict)):  # whose state says nothing that is needed
            self._spend(state)
            expected(target, dict).update(expected(state or {}, dict))
        self._stack.append(target)

    def _spend(self, *copied: Any) -> None:
        self._room -= sum(len(value) for value in copied if isinstance(value, (bytes, str, list, dict)))
        if self._room < 0:
            raise ValueError("it copies more than it holds")

    def _refer(self, value: Any) -> None:
        if self._stored is None:
            raise ValueError("it refers to a storage outside, of which there is none")
        self._stack.append(self._stored(self._stack.pop()))


def add_items(items: list[Any], target: Any) -> Any:
    """The set `target` with more in it."""
    if not all(isinstance(item, (str, int)) for item in items):
        raise ValueError("expected text and whole numbers in a set")
    expected(target, set).update(items)
    return target


class _Bounded:
    """A file of which no more is asked for than is left: an instruction may claim any length."""

    def __init__(self, file: BinaryIO):
        self._file, here = file, file.tell()
        self._size = file.seek(0, os.SEEK_END)
        file.seek(here)
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        if count > self._size - self.tell():
            raise ValueError(f"it ends early: {count:,} bytes were announced, {self._size - self.tell():,} are left")
        return self._file.read(count)
