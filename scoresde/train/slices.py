"""Tensors of which each process holds a slice (FSDP2's DTensor), and how they come from and go to whole ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a tensor; all of it where it is not sliced."""
    return tensor.to_local() if _sliced(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sliced. Every process calls it."""
    return tensor.full_tensor() if _sliced(tensor) else tensor  # type: ignore[attr-defined]


def sliced_like(whole: Tensor, template: Tensor) -> Tensor:
    """`whole` in the slices of `template`; unchanged where that is not sliced."""
    if not _sliced(template):
        return whole
    from torch.distributed.tensor import distribute_tensor

    device_mesh, placements = template.device_mesh, template.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(template.device), device_mesh, placements)


def load(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a module that may be sliced. Raises RuntimeError where they differ."""
    own = module.state_dict()
    module.load_state_dict({k: sliced_like(v, own[k]) if k in own else v for k, v in saved.items()})


def _sliced(tensor: Tensor) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
