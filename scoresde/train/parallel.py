"""How the network is spread over processes: not at all, a copy on each (DDP), or a slice of it on each (FSDP2)."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.loss import Loss, Terms
from .ema import Average
from .slices import gathered, load
from .world import World


class Parallel:
    """Runs a loss on this process's share of a batch, so that `.grad` is the gradient of the whole batch.

    It is made after the average and before the optimizer, which takes the parameters that it leaves in the loss. What
    is written here serves one process.
    """

    def __init__(self, loss: Loss):
        self.loss = loss

    def terms(self, *args: Any, **kwargs: Any) -> Terms:
        """`Loss.terms`, with what it takes to get the whole gradient in `backward`."""
        return self.loss.terms(*args, **kwargs)

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward: gradients are exchanged now, or added up here for a later exchange."""
        return contextlib.nullcontext()

    def norms(self, grads: list[Tensor]) -> Tensor:
        """(P,) norms of the whole gradient by parameter, given this process's part of each."""
        return torch.stack(torch._foreach_norm(grads))

    def blame(self) -> Tensor:
        """Whether this process's own part of the last gradient was not finite (a bool scalar); resets it."""
        return torch.ones((), dtype=torch.bool, device="cpu")

    def view(self, average: Loss) -> Loss:
        """The averaged loss, all of it on this process, for measuring. Every process calls it."""
        return average


class Single(Parallel):
    """One process."""


class Replicated(Parallel):
    """A copy of everything on each process, gradients averaged while backward runs (DistributedDataParallel)."""

    def __init__(self, loss: Loss):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        from torch.nn.parallel import DistributedDataParallel

        super().__init__(loss)
        device = next(loss.parameters()).device
        self.wrapped = DistributedDataParallel(
            _Terms(loss), device_ids=None if device.type == "cpu" else [device], gradient_as_bucket_view=True
        )
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

        def hook(state, bucket):  # without types, because DDP refuses those that are text
            # one more read of the gradient, the only place where it is still this process's own
            self._bad |= ~torch.isfinite(bucket.buffer().sum())
            return allreduce_hook(state, bucket)

        self.wrapped.register_comm_hook(None, hook)

    def terms(self, *args: Any, **kwargs: Any) -> Terms:
        return Terms(*self.wrapped(*args, **kwargs))

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if now else self.wrapped.no_sync()

    def blame(self) -> Tensor:
        bad = self._bad.clone()
        self._bad.zero_()
        return bad


class _Terms(nn.Module):
    """DDP calls `forward`."""

    def __init__(self, loss: Loss):
        super().__init__()
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(self.loss.terms(*args, **kwargs))


class Sharded(Parallel):
    """A slice of weights, moments and averages on each process (FSDP2's `fully_shard`), for networks that fill one.

    Each element of a `ModuleList` in the network is gathered on its own while it computes; the rest at once.
    """

    def __init__(self, loss: Loss, ema: Average, world: World):
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(loss)
        self.world, self.whole = world, copy.deepcopy(loss).to("meta")
        device = next(loss.parameters()).device
        mesh = init_device_mesh(device.type, (world.size,))
        for module in (loss, *ema.shadows.values()):
            _shard(module, mesh)
        ema.relist()

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        # fully_shard gave the loss this method
        self.loss.set_requires_gradient_sync(now)  # type: ignore[operator]
        return contextlib.nullcontext()

    def norms(self, grads: list[Tensor]) -> Tensor:
        return self.world.sum(torch.stack(torch._foreach_norm(grads)).square()).sqrt()

    def blame(self) -> Tensor:
        # a slice already holds the parts of all processes: only the loss says which one was not finite
        return torch.zeros((), dtype=torch.bool, device="cpu")

    def view(self, average: Loss) -> Loss:
        device = next(average.parameters()).device
        whole = copy.deepcopy(self.whole).to_empty(device=device).eval().requires_grad_(False)
        load(whole, {name: gathered(value) for name, value in average.state_dict().items()})
        return whole


def spread_over(world: World, loss: Loss, ema: Average, how: str = "ddp") -> Parallel:
    """The `Parallel` for `world` by "ddp" or "fsdp"; one process needs neither."""
    if world.size == 1:
        return Single(loss)
    return Replicated(loss) if how == "ddp" else Sharded(loss, ema, world)


def _shard(loss: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    lists = [module for module in loss.modules() if isinstance(module, nn.ModuleList)]
    for part in [part for parts in reversed(lists) for part in parts]:
        # a list has no forward; its own elements are in this loop too
        if next(part.parameters(), None) is not None and not isinstance(part, nn.ModuleList):
            fully_shard(part, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    register_fsdp_forward_method(loss, "terms")
