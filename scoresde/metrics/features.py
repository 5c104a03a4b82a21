"""Features of samples by a network, in batches, in eval mode, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def network_features(
    network: nn.Module, x: Tensor, batch_size: int, track: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
) -> Tensor:
    """(n, F) float64 on the CPU; the network runs where its parameters are, and is left in the mode it was in. `track`
    passes the batches on, and may show how far they are.

    Raises:
        ValueError: it does not return finite values (B, F).
    """
    modes = {module: module.training for module in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), x.device)
    network.eval()
    try:
        found = torch.cat([network(batch.to(device)).double().cpu() for batch in track(x.split(batch_size))])
    finally:
        for module, training in modes.items():
            module.training = training
    finite = bool(found.isfinite().all())
    if found.ndim != 2 or not finite:
        raise ValueError(
            f"{type(network).__name__} returned features of shape {tuple(found.shape)}"
            f"{'' if finite else ' with NaN or infinite values'}; expected finite (n, F)."
        )
    return found
