"""What PyTorch does slowly in bfloat16 and float16 on CPUs, done another way while a training step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_attention, _group_norm = F.scaled_dot_product_attention, F.group_norm


@contextlib.contextmanager
def fast_half(device: torch.device) -> Iterator[None]:
    """Around forward and backward of any network: attention and group norms of halves take faster ways on a CPU.

    Both are looked up in `torch.nn.functional` by name when a network runs, `nn.MultiheadAttention` and compiled
    networks included, and stand replaced there meanwhile. A function that someone else has put there since is left
    alone. A `TorchFunctionMode` would do the same and is no way: it breaks the graphs of `torch.compile`. `backward`
    belongs inside, because checkpointed layers run again there and have to save the same tensors.
    """
    if device.type != "cpu" or F.scaled_dot_product_attention is not _attention or F.group_norm is not _group_norm:
        yield
        return
    F.scaled_dot_product_attention, F.group_norm = attention, group_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.group_norm = _attention, _group_norm


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`scaled_dot_product_attention`, of halves in float32, rounded at the end.

    The fused kernel is the same, so memory stays linear in the number of tokens; forward and backward take 0.1 to 0.5
    of the time in bfloat16 (`docs/training.md`).
    """
    dtype = query.dtype
    if dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in _HALF:
        return _attention(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        return _attention(query.float(), key.float(), value.float(), attn_mask, *args, **kwargs).to(dtype)


def group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`group_norm`, of halves in the `channels_last` layout through the contiguous one: 0.2 to 1 of the time."""
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    if input.dtype not in _HALF or not last or torch.compiler.is_compiling():
        return _group_norm(input, *args, **kwargs)
    return _group_norm(input.contiguous(), *args, **kwargs).contiguous(memory_format=torch.channels_last)
