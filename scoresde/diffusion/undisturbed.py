"""Runs of a denoiser that neither depend on the state it was left in, nor change it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


@contextlib.contextmanager
def in_eval(modules: Sequence[nn.Module]) -> Iterator[None]:
    """`modules` in eval mode, each given back in the mode that it had, also where an exception leaves the block.

    Args:
        modules: `list(module.modules())`, made once for many blocks: walking through a module costs as much as a small
            network. Modules in eval mode are not touched.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def undisturbed(fn: Function) -> Function:
    """A function of a module and more, run with that in eval mode and outside of `torch.inference_mode`.

    Dropout would make the field random, and batch norm the samples of a batch depend on each other; in inference mode
    there are no derivatives. Whether gradients are kept is left to the function.
    """

    @functools.wraps(fn)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        left = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with in_eval(list(module.modules())), left:
            return fn(module, *args, **kwargs)

    return cast(Function, run)
