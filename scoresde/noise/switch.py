"""Whether noise, and the ops that use it, run by CUDA kernels: what the user asked for, and what is possible.

The kernels are a folder of their own, which nothing imports: the first question about a tensor on a GPU loads it by its
name, and it registers itself with the ops then. There are three modes, of the environment variable SCORESDE_KERNELS or
of `use`, which wins:

- "auto": the kernel where it can be had, else the reference; on a GPU one warning says why.
- "off": the reference.
- "require": the kernel, or a RuntimeError that says why not. So a figure measured so is the kernel's.
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
    """The library works, but not by its kernels, or not as fast as it could."""


def use(mode: str | None) -> None:
    """Sets the mode of this process, whatever the environment says, and looks again for what could not be had before.

    Args:
        mode: "auto", "off" or "require"; None gives it back to the environment.

    Raises:
        ValueError: it is none of them.
    """
    global _mode, _decided, _reasons
    if mode is not None:
        _check(mode, "kernels.use")
    _mode, _decided, _reasons = mode, {}, {}


@contextlib.contextmanager
def using(mode: str) -> Iterator[None]:
    """`use` for a while: `with using("off"): …` runs the reference, to compare with."""
    before = _mode
    use(mode)
    try:
        yield
    finally:
        use(before)


def mode() -> str:
    """The mode: of `use`, else of SCORESDE_KERNELS, else "auto".

    Raises:
        ValueError: the variable holds none of the three.
    """
    if _mode is not None:
        return _mode
    found = os.environ.get("SCORESDE_KERNELS") or "auto"
    _check(found, "SCORESDE_KERNELS")
    return found


def enabled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this device and type go through the kernel. Asked at every op: 0.15 µs once it is decided.

    Compiled code keeps the answer of when it was compiled, and is compiled anew after `use` with another mode.

    Raises:
        RuntimeError: the mode is "require" and they cannot.
        ValueError: SCORESDE_KERNELS holds no mode.
    """
    if torch.compiler.is_compiling():
        return _decide(device, dtype, _mode)  # which makes compiled code depend on the mode
    found = _decided.get((device, dtype))
    return _decide(device, dtype) if found is None else found


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """What stands between tensors of this device and type and the kernel; None where nothing does.

    The first question about a device and type compiles and loads the kernels for them (about 0.2 s, less when they are
    in the cache); the answer is kept until `use` is called.
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
