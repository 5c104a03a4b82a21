r"""The draws of `torch.ops.scoresde`: normals, signs and bits at an address, by NumPy where there is no kernel.

They are torch ops so that `torch.compile` leaves them whole, and so that a GPU can have kernels for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import philox
from .address import Noise

ADDRESS = "Tensor seeds, Tensor draws, SymInt draw, SymInt row"


def normal(shape: Sequence[int], dtype: torch.dtype, noise: Noise) -> Tensor:
    """Standard normals of `shape`, on the device of `noise`."""
    return torch.ops.scoresde.normal(shape, dtype, *noise)


def normal_like(x: Tensor, noise: Noise) -> Tensor:
    """Standard normals of the shape of x; float32 for half types, which are rounded once, at the end of a sum."""
    return normal(x.shape, torch.promote_types(x.dtype, torch.float32), noise)


def rademacher(shape: Sequence[int], dtype: torch.dtype, noise: Noise) -> Tensor:
    """Signs −1 and +1 of `shape`, on the device of `noise`."""
    return torch.ops.scoresde.rademacher(shape, dtype, *noise)


def bits(shape: Sequence[int], noise: Noise) -> Tensor:
    """64 random bits for each entry of `shape`, int64, on the device of `noise`; always made on the CPU."""
    return torch.ops.scoresde.bits(shape, *noise)


def numpy_normal(shape: Sequence[int], dtype: torch.dtype, *address: Any) -> Tensor:
    return _made(philox.normals, shape, *address).to(dtype)


def numpy_rademacher(shape: Sequence[int], dtype: torch.dtype, *address: Any) -> Tensor:
    return _made(philox.signs, shape, *address).to(dtype)


def _numpy_bits(shape: Sequence[int], *address: Any) -> Tensor:
    return _made(philox.bits, shape, *address)


def _made(make: philox.Maker, shape: Sequence[int], seeds: Tensor, draws: Tensor, draw: int, row: int) -> Tensor:
    rows, size = (shape[0], shape[1:].numel()) if len(shape := torch.Size(shape)) else (1, 1)
    where = philox.streams(seeds.cpu(), row, (draws + draw).cpu(), rows)
    return make(where, size).reshape(shape).to(seeds.device)


def _fake(shape: Sequence[int], dtype: torch.dtype, seeds: Tensor, *_: Any) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=seeds.device)


def _fake_bits(shape: Sequence[int], seeds: Tensor, *_: Any) -> Tensor:
    return _fake(shape, torch.int64, seeds)


LIBRARY: torch.library.Library = torch.library.Library("scoresde", "DEF")

for _schema, _make, _shape in (
    (f"normal(SymInt[] shape, ScalarType dtype, {ADDRESS}) -> Tensor", numpy_normal, _fake),
    (f"rademacher(SymInt[] shape, ScalarType dtype, {ADDRESS}) -> Tensor", numpy_rademacher, _fake),
    (f"bits(SymInt[] shape, {ADDRESS}) -> Tensor", _numpy_bits, _fake_bits),
):
    _name = LIBRARY.define(_schema)
    LIBRARY.impl(_name, _make, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scoresde::{_name}", _shape, lib=LIBRARY)
