"""Bits/dim of runs with a table, by the three-term bound of DDPM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from ..checks import whole
from ..codecs import Codec
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import UniformGrid
from ..diffusion.sde import SDE
from ..likelihood.bounds import vlb
from ..likelihood.terms import Bound
from ..sampling.steps import Ancestral
from .likelihood import Elbo


class Vlb(Elbo):
    """By the three-term bound of the steps of a table (`vlb`), which the ancestral sampler takes one by one.

    Args:
        terms: steps drawn for each point, at least 2 for a standard error, an unbiased estimate of the sum; None for
            every step once.
        steps: of the chain, evenly over the table: another is another model. None for one from each entry to the next.
        variance: of the steps, as in `Ancestral`: None for the learned one, or else the posterior's.
        batch_size, bound: as in `Elbo`.

    Raises:
        ValueError: numbers out of range, another bound; later, an SDE of continuous time.
    """

    estimator, how = "bpd/vlb", "by the variational bound of the steps of its table"

    def __init__(
        self,
        *,
        terms: int | None = 64,
        steps: int | None = None,
        variance: float | None = None,
        batch_size: int = 64,
        bound: Literal["dequantised", "centres"] = "dequantised",
    ):
        super().__init__(samples=1 if terms is None else terms, batch_size=batch_size, bound=bound)
        self.terms, self.variance = terms, Ancestral(variance).variance
        self.steps = None if steps is None else whole(steps, "steps")

    @property
    def accuracy(self) -> Mapping[str, float]:
        return {} if self.terms is None else {"terms": self.terms}

    @property
    def settings(self) -> dict[str, Any]:
        given = {"terms": self.terms, "steps": self.steps, "variance": self.variance}
        return given | {"bound": f"vlb, {self.bound}"}

    def named(self, codec: Codec) -> str:
        if codec.bound:
            raise ValueError("likelihood=vlb is not of latents, whose bound goes by likelihood=elbo or the ODE.")
        return super().named(codec)

    def chain(self, sde: SDE) -> int:
        """The number of steps."""
        if sde.entries is None:
            raise ValueError(
                f"likelihood=vlb bounds the steps of a table, and {sde} has continuous time: take likelihood=elbo, its "
                "limit of infinitely many steps, or train with sde=ddpm or sde=table."
            )
        return sde.entries - 1 if self.steps is None else self.steps

    def calls_on(self, sde: SDE) -> int:
        steps = self.chain(sde)
        return steps if self.terms is None else min(self.terms, steps)

    def bound_of(self, denoiser: Denoiser, x: Tensor, **how: Any) -> Bound:
        sde = denoiser.sde
        chain: dict[str, Any] = {"steps": self.chain(sde), "grid": UniformGrid(), "variance": self.variance}
        return vlb(denoiser, x, terms=self.calls_on(sde), **chain, **how)
