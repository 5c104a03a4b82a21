"""Whether noise, and the ops that use it, run by CUDA kernels: what the user asked for, and what is possible.

Nothing imports the kernels. The first question about a tensor on a GPU loads them by their name, and they then register
themselves as the CUDA implementation of the ops. The environment variable SCORESDE_KERNELS sets the mode, and `use`
overrides it:

- "auto": the kernel if possible, else the reference; on a GPU, one warning says why.
- "off": the reference.
- "require": the kernel, or a RuntimeError that says why not, so a benchmark cannot measure the reference by mistake.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import warnings
from collections.abc import Iterator

import torch

MODES = ("auto", "off", "require")
BACKEND = "scoresde.kernels.backend"

_lock = threading.RLock()
_mode: str | None = None
_decided: dict[tuple[torch.device, torch.dtype], bool] = {}
_reasons: dict[tuple[torch.device, torch.dtype], str | None] = {}
_warned: set[str] = set()


class KernelWarning(UserWarning):
    """The library works, but without its kernels, or more slowly than it could."""


def use(mode: str | None) -> None:
    """Sets the mode of this process over that of the environment. What could not be loaded before is tried again.

    Args:
        mode: "auto", "off" or "require"; None leaves the mode to the environment again.

    Raises:
        ValueError: for any other mode.
    """
    global _mode, _decided, _reasons
    if mode is not None:
        _check(mode, "kernels.use")
    _mode, _decided, _reasons = mode, {}, {}


@contextlib.contextmanager
def using(mode: str) -> Iterator[None]:
    """Sets the mode within a `with` block: `with using("off"): …` runs the reference, for comparison."""
    before = _mode
    use(mode)
    try:
        yield
    finally:
        use(before)


def mode() -> str:
    """The mode set by `use`, else by SCORESDE_KERNELS, else "auto".

    Raises:
        ValueError: the variable holds another word.
    """
    if _mode is not None:
        return _mode
    found = os.environ.get("SCORESDE_KERNELS") or "auto"
    _check(found, "SCORESDE_KERNELS")
    return found


def enabled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this device and dtype go through the kernels. Every op asks: 0.15 µs once it is decided.

    Compiled code keeps the answer from its compilation, and is compiled again after `use` with another mode.

    Raises:
        RuntimeError: the mode is "require", and the tensors cannot have kernels.
        ValueError: SCORESDE_KERNELS does not hold a mode.
    """
    if torch.compiler.is_compiling():
        return _decide(device, dtype, _mode)  # which makes compiled code depend on the mode
    found = _decided.get((device, dtype))
    return _decide(device, dtype) if found is None else found


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why tensors of this device and dtype cannot have kernels; None if they can.

    The first question about a device and dtype compiles and loads its kernels (about 0.2 s, less when they are in the
    cache). The answer is kept until the next call of `use`.
    """
    if device.type != "cuda":
        return f"they run on CUDA devices, not on {device.type}"
    with _lock:
        reasons = _reasons
        if (device, dtype) not in reasons:
            reasons[device, dtype] = _look(device, dtype)
        return reasons[device, dtype]


def _check(mode: str, where: str) -> None:
    if mode not in MODES:
        raise ValueError(f'{where} is {mode!r}; it takes "auto" (the kernel where it can be had), "off" or "require"')


def _decide(device: torch.device, dtype: torch.dtype, _: str | None = None) -> bool:
    decided = _decided  # before the mode: if another thread changes that now, this answer is forgotten with the rest
    asked = mode()
    reason = None if asked == "off" else why_not(device, dtype)
    if reason is not None and asked == "require":
        raise RuntimeError(
            f"the kernels are required (SCORESDE_KERNELS or kernels.use), and {dtype} on {device} cannot have them: "
            f'{reason}. Give tensors that can, or the mode "auto".'
        )
    if reason is not None and device.type == "cuda" and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"scoresde runs without its CUDA kernels, on torch alone: {reason}. "
            "SCORESDE_KERNELS=off is silent, =require refuses; `python -m scoresde.kernels` shows more.",
            KernelWarning,
            stacklevel=2,
        )
    decided[device, dtype] = asked != "off" and reason is None
    return decided[device, dtype]


# Tracing calls it and takes the answer as a constant, in place of tracing into it. The mark is that of
# torch.compiler.assume_constant_result, which would import the compiler (1.3 s) for those who do not compile, too.
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _look(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        backend = importlib.import_module(BACKEND)
    except ImportError as error:
        return f"they are not installed ({error})"
    return backend.obstacle(device, dtype)
