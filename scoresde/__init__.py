"""scoresde: continuous-time score-based SDEs for PyTorch.

A diffusion model is a forward SDE (`sde`), an estimate of where its paths began (`denoiser`), and a way back
(`sampling`); `likelihood` measures it, `loss` trains it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *  # noqa: F403
    from .public import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names come when the first is asked for: `scoresde-runs` needs none of them, and need not wait for torch."""
    if name == "__all__" or not name.startswith("_"):
        from importlib import import_module

        public = import_module(f"{__name__}.public")
        globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
