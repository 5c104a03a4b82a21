"""Keeps secrets out of what a run writes down: configurations, command lines and messages.

A secret is recognised by its name (`api_key`, `token`, `password` …), by its place in a URL
(https://user:secret@host), or by being the value of an environment variable with such a name. It is replaced by
`REDACTED` wherever a run keeps a record.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

HIDDEN = "REDACTED"  # a plain word in YAML, JSON, URLs and command lines
# the end of a name, after a separator; `key` alone may be the name of an array or a column
_NAMES = (
    r"(?:(?:api|access|secret|private|auth|account|encryption|signing|ssh)[_-]?key"
    r"|token|secret|passwd|password|passphrase|pwd|credentials?)"
)
_SECRET = re.compile(rf"(?:^|[^A-Za-z0-9]){_NAMES}$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"^(?!(?:OLD)?PWD$)(?:.*_)?(?:{_NAMES}|key|pass)$", re.IGNORECASE)
# name=value of a command line or query, name: value of YAML and JSON; quotes keep spaces
_ASSIGNED = re.compile(
    rf"((?<![A-Za-z0-9])[\w.@+-]*{_NAMES}[\"']?\s?[=:]\s?)(\"[^\"]*\"|'[^']*'|\[[^\]]*\]|[^\s&\"'}}]+)", re.IGNORECASE
)
# in a sweep Hydra writes https\://user\:secret@host
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*\\?://)(?!git@)[^\s/\"'?#]+@")
_SHORTEST = 8  # characters of a variable's value: `1` or `yes` would be found everywhere


def redacted(tree: Any, name: str = "") -> Any:
    """A copy of mappings, lists and scalars without secrets.

    Args:
        tree: a configuration or record.
        name: the key it stands under; every value under the name of a secret is hidden.
    """
    if isinstance(tree, Mapping):
        return {key: redacted(value, name if _SECRET.search(name) else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [redacted(value, name) for value in tree]
    if _SECRET.search(name) and tree is not None and not isinstance(tree, bool):
        return HIDDEN
    return redacted_text(tree) if isinstance(tree, str) else tree


def redacted_text(text: str) -> str:
    """`text`, a message or a command line, without secrets."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    return _ASSIGNED.sub(_hide, text)


def guard() -> None:
    """Makes everything that this process prints and logs from now on pass through `redacted_text`."""
    logging.setLogRecordFactory(_Record)
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)  # type: ignore[assignment]


class _Stream:
    """A text stream that hides secrets in each text written to it; `print` and tracebacks write whole lines."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted_text(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Record(logging.LogRecord):
    """A log record without secrets in its message and in the traceback that is printed with it."""

    def getMessage(self) -> str:
        return redacted_text(super().getMessage())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, redacted_text(value) if name == "exc_text" and value else value)


def _hide(match: re.Match[str]) -> str:
    name = re.split(r"[\"'\s=:]", match[1], maxsplit=1)[0]
    quote = match[2][0] if match[2][0] in "\"'" else ""
    return f"{match[1]}{quote}{HIDDEN}{quote}" if _SECRET.search(name) else match[0]


def _values() -> list[str]:
    """Values of environment variables that hold secrets, the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)
