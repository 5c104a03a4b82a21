"""A condition that is filled in, and what becomes of conditions when batches are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction


class Conditioned(DenoiserWrapper):
    """A denoiser with its condition filled in: for samplers that have none, or another.

    Args:
        denoiser: of P(x, t, cond).
        cond: what it is asked for, one entry, for all samples (in a CUDA graph: on the device); or a function of the
            sampler's own condition, which is per sample: `lambda cond: {"label": cond["first"]}`.

    Raises:
        ValueError: several entries (solvers ask for some of a batch only, so what differs is given to the sampler); or,
            when called, a second condition beside one that is filled in.
    """

    def __init__(self, denoiser: Denoiser, cond: Cond | Callable[[Cond], Cond]):
        super().__init__(denoiser)
        self.cond = cond if callable(cond) else one_entry(cond)

    def null(self, cond: Cond) -> Cond:
        return None

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        if callable(self.cond):
            return self.denoiser(x, t, self.cond(cond))
        if cond is not None:
            raise ValueError("This denoiser has its condition already; leave cond out.")
        return self.denoiser(x, t, spread(self.cond, x))

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        return self.denoiser.prior_log_prob_given(z, self.cond(cond) if callable(self.cond) else spread(self.cond, z))


def spread(cond: Cond, like: Tensor) -> Cond:
    """A condition with one entry, for all samples of `like` (B, *event); others are returned as they are."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: _spread(value, like) for name, value in cond.items()}
    return _spread(cond, like)


def join(first: Cond, second: Cond) -> Cond:
    """The conditions of two batches, one behind the other.

    Raises:
        ValueError: conditions of different kinds.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping) and set(first) == set(second):
        return {name: torch.cat([first[name], value]) for name, value in second.items()}
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    raise ValueError(
        f"Conditions of one batch are all tensors, or mappings with the same names; got {_kind(first)} and "
        f"{_kind(second)}."
    )


def _kind(cond: Cond) -> str:
    return f"names {sorted(cond)}" if isinstance(cond, Mapping) else "nothing" if cond is None else "a tensor"


def _spread(value: Tensor, like: Tensor) -> Tensor:
    value = (value[None] if value.ndim == 0 else value).to(like.device)
    return value.expand(len(like), *value.shape[1:]) if len(value) == 1 else value


def one_entry(cond: Cond) -> Cond:
    for value in cond.values() if isinstance(cond, Mapping) else [] if cond is None else [cond]:
        if value.ndim and len(value) != 1:
            raise ValueError(
                f"A condition that is kept has one entry, (1, …), for all samples; got shape {tuple(value.shape)}. "
                "What differs from sample to sample is given to the sampler, and picked by a function here."
            )
    return cond
