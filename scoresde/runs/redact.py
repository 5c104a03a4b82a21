"""Keeps secrets out of what a run writes down: configurations, command lines and messages.

A secret is recognised by its name (`api_key`, `token`, `password` …), by its place in a URL
(https://user:secret@host), or by being the value of an environment variable with such a name. It is replaced by
`REDACTED` wherever a run keeps a record.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

HIDDEN = "REDACTED"  # a plain word in YAML, JSON, URLs and command lines
# The end of a name: these anywhere, whatever stands before them (PGPASSWORD, dbPassword) …
_ANYWHERE = (
    r"(?:(?:api|access|secret|private|auth|account|encryption|signing|ssh|master|client|consumer|shared|storage|license)"
    r"[_-]?keys?|(?:access|auth|api|bearer|refresh|session|security)[_-]?tokens?|secrets?|passw(?:or)?ds?|passphrase"
    r"|credentials?|authorization|(?:db|user|smtp|ftp|mail|proxy|redis|login|admin|root)[_-]?pass)"
)
# … and these as a word of their own (accessToken, X-Amz-Signature); `key` alone may be the name of an array.
_WORDS = r"(?:token|pwd|signature|sig|cookie|jwt|passcode|auth)"
_NAMES = rf"(?:{_ANYWHERE}|{_WORDS})(?:[_-]?\d+)?"
_SECRET = re.compile(rf"(?:{_ANYWHERE}|(?:^|[^A-Za-z0-9]){_WORDS})(?:[_-]?\d+)?$", re.IGNORECASE)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_VARIABLE = re.compile(rf"^(?!(?:OLD)?PWD$)(?:.*{_ANYWHERE}|(?:.*_)?(?:{_NAMES}|key|pass))$", re.IGNORECASE)
# name=value of a command line or query, name: value of YAML and JSON; quotes keep spaces
_ASSIGNED = re.compile(
    rf"({_NAMES}[\"']?\s?[=:]\s?)"
    r"(\"[^\"]*\"|'[^']*'|\[[^\]]*\]|(?:(?:Bearer|Basic|Token|Digest) )?[^\s&\"'}]+)",
    re.IGNORECASE,
)
# in a sweep Hydra writes https\://user\:secret@host
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}\\?://)(?!git@)[^\s/\"'?#]+@")
# Values that say themselves what they are: of headers, of known services, JSON Web Tokens, keys in PEM.
_VALUES = re.compile(
    r"\b(?:Bearer|Basic) (?=\S+[A-Z0-9=])[\w.~+/=-]{8,}|\b[spr]k_(?:live|test)_\w+|\bsk-[\w-]{16,}|\bgh[pousr]_\w{20,}"
    r"|\bgithub_pat_\w+|\bhf_[A-Za-z0-9]{20,}|\bglpat-[\w-]{16,}|\bxox[abeprs]-[\w-]+|\bA[KS]IA[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{35}|\beyJ[\w-]+\.[\w-]+\.[\w-]+|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END[A-Z ]*-----)?"
)
_SHORTEST = 8  # characters of a variable's value: `1` or `yes` would be found everywhere
# What a terminal that knows ASCII alone is shown.
_PLAIN = {"…": "...", "–": "-", "─": "-", "±": "+-", "×": "x", "·": "*", "→": "->", "≤": "<=", "≥": ">="}


def redacted(tree: Any, name: str = "") -> Any:
    """A copy of mappings, lists and scalars without secrets.

    Args:
        tree: a configuration or record.
        name: the key it stands under; every value under the name of a secret is hidden.
    """
    if isinstance(tree, Mapping):
        return {key: redacted(value, name if _is_secret(name) else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [redacted(value, name) for value in tree]
    if _is_secret(name) and tree is not None and not isinstance(tree, bool):
        return HIDDEN
    return redacted_text(tree) if isinstance(tree, str) else tree


def _is_secret(name: str) -> bool:
    return _SECRET.search(_HUMP.sub("_", name)) is not None


def redacted_text(text: str) -> str:
    """`text`, a message or a command line, without secrets."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    return _VALUES.sub(HIDDEN, _ASSIGNED.sub(_hide, text))


def guard(hide: Callable[[str], str] = redacted_text) -> Stream:
    """Makes everything that this process prints from now on pass through `hide`, and what it logs be without secrets.

    A terminal that is gone or cannot show a character costs nothing but what it would have shown. Returns the standard
    output.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a file of results would take the number
        pass
    os.close(descriptor)
    codecs.register_error("scoresde", _shown)
    logging.setLogRecordFactory(_Record)
    output = Stream(sys.stdout, hide)
    sys.stdout, sys.stderr = output, Stream(sys.stderr, hide)  # type: ignore[assignment]
    return output


def _shown(error: Any) -> tuple[str, int]:
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # for as long as the process is there


class Stream:
    """A text stream that hides secrets in each text written to it; `print` and tracebacks write whole lines.

    Attributes:
        lost: whether it could not be written, and nothing has been since; a reader who has left (`| head`) is no loss.
    """

    def __init__(self, stream: Any, hide: Callable[[str], str] = redacted_text):
        self._hide = hide
        self._stream, self.lost = _nowhere() if stream is None else stream, False

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        shown = self._hide(text).encode(encoding, "scoresde").decode(encoding)
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:  # a ValueError if it is closed
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for what is still in its buffer
            self._stream, self.lost = _nowhere(), not isinstance(error, BrokenPipeError)
            if self.lost:
                with contextlib.suppress(OSError):
                    os.write(2, f"warning: what is printed is lost from here on ({error})\n".encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Record(logging.LogRecord):
    """A log record without secrets in its message and in the traceback that is printed with it."""

    def getMessage(self) -> str:
        return redacted_text(super().getMessage())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, redacted_text(value) if name == "exc_text" and value else value)


def _hide(match: re.Match[str]) -> str:
    before = match.string[max(match.start() - 100, 0) : match.start()]  # by hand, for a pattern would try every place
    name = re.split(r"[^\w.@+-]", before)[-1] + re.split(r"[\"'\s=:]", match[1], maxsplit=1)[0]
    quote = match[2][0] if match[2][0] in "\"'" else ""
    return f"{match[1]}{quote}{HIDDEN}{quote}" if _is_secret(name) else match[0]


def _values() -> list[str]:
    """Values of environment variables that hold secrets, the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)
