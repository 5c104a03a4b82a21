"""What is done in batches of samples, each with a stream of its own, so that the batch size changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..likelihood.ode import LogLikelihood
from ..noise.rng import Rng


def streams_of(rng: Rng | None, n: int) -> Rng:
    """One stream for each of n samples."""
    rng = Rng(0) if rng is None else rng
    if not rng.per_sample:
        return Rng(seeds=rng.integers(2**63 - 1, (n,)).tolist())
    if len(rng) != n:
        raise ValueError(f"Rng(seeds=[…]) has one seed for each sample; got {len(rng)} for {n}.")
    return rng


def joined(parts: Sequence[LogLikelihood]) -> LogLikelihood:
    """The results of batches as that of all, on the CPU; the network calls are those of all batches."""

    def of(get: Callable[[LogLikelihood], Tensor]) -> Tensor:
        return torch.cat([get(part).cpu() for part in parts])

    return LogLikelihood(
        of(lambda r: r.log_prob),
        of(lambda r: r.stderr),
        of(lambda r: r.latent),
        sum(part.evaluations for part in parts),
        of(lambda r: r.divergence_error),
        of(lambda r: r.solver_error),
        parts[0].name,
        parts[0].dims,
    )
