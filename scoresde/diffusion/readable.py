"""Objects that are shown as the call that made them."""

from __future__ import annotations

import functools
import inspect
import textwrap
from typing import Any

_WIDEST = 200  # of a single argument: a table of a thousand numbers is cut


class Readable:
    """`VPSDE(beta_min=0.1, beta_max=20.0)`: the arguments that may be given by position and are not None, and others
    that were given.
    """

    _made_by: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            return
        init: Any = cls.__init__

        @functools.wraps(init)
        def remembering(self: Readable, *args: Any, **kwargs: Any) -> None:
            vars(self).setdefault("_made_by", (args, kwargs))  # not those of a base class, which come later
            init(self, *args, **kwargs)

        cls.__init__ = remembering  # type: ignore[assignment, method-assign]

    def __repr__(self) -> str:
        args, kwargs = self._made_by
        bound = inspect.signature(type(self)).bind(*args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        arguments = bound.signature.parameters
        shown = [
            f"{name}={textwrap.shorten(repr(value), _WIDEST, placeholder=' …')}"
            for name, value in bound.arguments.items()
            if name in given or (value is not None and arguments[name].kind is not inspect.Parameter.KEYWORD_ONLY)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
