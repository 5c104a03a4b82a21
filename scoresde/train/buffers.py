"""The buffers of a module, which a forward pass changes or replaces: running statistics, counters, singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .slices import local


class Buffers:
    """Where the buffers of a module are: listed once for all steps, by place, as a pass may put another tensor there.

    Args:
        module: whose buffers they are.
    """

    def __init__(self, module: nn.Module):
        names = dict(module.named_buffers())
        self._places = {
            name: (owner._buffers, key)
            for path, owner in module.named_modules()
            for key in owner._buffers
            if (name := f"{path}.{key}" if path else key) in names
        }
        self._kept: dict[str, Tensor] = {}

    def now(self) -> dict[str, Tensor]:
        """The buffers by name."""
        return {name: local(place[key]) for name, (place, key) in self._places.items() if place[key] is not None}  # type: ignore[arg-type]

    def keep(self) -> None:
        """Copies all of them: before a step that may turn out not to be finite."""
        now = self.now()
        if [(v.shape, v.dtype) for v in now.values()] != [(v.shape, v.dtype) for v in self._kept.values()]:
            self._kept = {name: value.clone() for name, value in now.items()}
        elif now:
            torch._foreach_copy_(list(self._kept.values()), list(now.values()))

    @torch.no_grad()
    def restore(self, unless: Tensor) -> None:
        """Puts the copies back where `unless`, a bool scalar on the device, is false. Nothing waits for it on a GPU."""
        on_cpu = unless.device.type == "cpu"
        if on_cpu and unless:
            return
        now = self.now()
        for name, before in self._kept.items():
            value = now.get(name)
            if value is not None and (value.shape, value.dtype) == (before.shape, before.dtype):
                value.copy_(before if on_cpu else torch.where(unless, value, before))
            elif not unless:  # it was replaced by one that these numbers do not fit into
                place, key = self._places[name]
                place[key] = before.clone()
