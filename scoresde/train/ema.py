"""Averages of weights along training, in float32, counted in images."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checks import positive
from ..runs.posthoc import exponent
from .buffers import Buffers
from .slices import local


class Average(abc.ABC):
    """Copies of a module ("shadows") that follow its weights, `shadow += (1 − d)(weights − shadow)`, each with its d.

    Counted in images, a length means the same for every batch size. The state is the shadows' own: nothing else has to
    be saved to continue.

    Args:
        module: what is averaged; its buffers are copied, not averaged.
        names: of the shadows.

    Attributes:
        shadows: name -> averaged copy, in float32 and eval mode. The first, `module`, is the one that is evaluated.
        sigma_rel: lengths of the shadows as shares of training; empty where lengths are counted in images.
    """

    sigma_rel: tuple[float, ...] = ()

    def __init__(self, module: nn.Module, names: Sequence[str] = ("ema",)):
        self.shadows: dict[str, nn.Module] = {
            name: copy.deepcopy(module).float().eval().requires_grad_(False) for name in names
        }
        self.relist()

    def relist(self) -> None:
        """Lists the tensors of the shadows, once for all steps, because walking through a module costs as much as
        averaging it. Call it after they have been replaced (by FSDP).
        """
        self._own = [(dict(m.named_parameters()), dict(m.named_buffers())) for m in self.shadows.values()]
        self._source: nn.Module | None = None
        self._first: Tensor | None = None

    def _take(self, module: nn.Module) -> None:
        weights, buffers = dict(module.named_parameters()), Buffers(module)
        _refuse_other(self._own[0][0], weights, "parameters")
        _refuse_other(self._own[0][1], buffers.now(), "buffers")
        self._theirs, self._source, self._first = (weights, buffers), module, next(module.parameters(), None)

    @property
    def module(self) -> nn.Module:
        """The first shadow."""
        return next(iter(self.shadows.values()))

    @abc.abstractmethod
    def decays(self, images: int, batch: int) -> list[float]:
        """The decay d of each shadow, for a step of `batch` images that ends at `images` images."""

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, batch: int, keep: Tensor) -> None:
        """One step towards `module`; nothing moves where `keep` (a bool scalar, on the device) is false.

        On a GPU nothing waits for `keep`. The tensors of `module` are listed once; after some were replaced (not
        copied into), call `relist`.

        Raises:
            ValueError: other parameters or buffers than the shadows have: names, order or shapes.
        """
        if module is not self._source or next(module.parameters()) is not self._first:
            self._take(module)
        weights, buffers = self._theirs[0], self._theirs[1].now()
        new = [local(p) if p.dtype == torch.float32 else local(p).float() for p in weights.values()]
        for (mine, kept), decay in zip(self._own, self.decays(images, batch), strict=True):
            pull([local(p) for p in mine.values()], new, 1 - decay, keep)
            for name, buffer in kept.items():
                buffer.copy_(torch.where(keep, buffers[name], buffer))


class EMA(Average):
    r"""The exponential average: d = 2^{−images/half_life}.

    The half-life grows with training, `min(half_life, ramp · images seen)`, so early averages are not held back by the
    random start (Karras et al. 2024, EDM2, sec. 3; `ema_rampup_ratio` of Karras et al. 2020, StyleGAN2-ADA).

    Args:
        module: see `Average`.
        half_life: in images, > 0.
        ramp: share of the images seen that bounds the half-life, > 0; None for no bound.

    Raises:
        ValueError: a half-life or ramp that is not positive.
    """

    def __init__(self, module: nn.Module, *, half_life: float = 20_000, ramp: float | None = 0.05):
        self.half_life = positive(half_life, "half_life", "a number of images")
        self.ramp = None if ramp is None else positive(ramp, "ramp", "null or a share of the images seen")
        super().__init__(module)

    def decays(self, images: int, batch: int) -> list[float]:
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        return [0.5 ** (batch / half_life)]


class PowerEMA(Average):
    r"""Averages whose length is a share of training, however long that gets (Karras et al. 2024, EDM2, sec. 3, app. C).

    After t images the weights of τ images count (γ+1) τ^γ / t^{γ+1}: nothing is left of the random start, and there is
    no ramp. A step of b images that leaves θ_t changes the average to (1 − b/t)^{γ+1} of itself and 1 − (1 − b/t)^{γ+1}
    of θ_t, exactly, because θ is constant in between. With snapshots of two lengths any other can be made
    afterwards: `scoresde.runs.posthoc`.

    A step that is skipped leaves θ as it was, and the averages too: they miss its pull, not more.

    Args:
        module: see `Average`.
        sigma_rel: standard deviation of the profile over t, each in (0, 1/√12]; the weights are on average from 5 % of
            training ago for 0.05 and 11 % for 0.1. The first is evaluated; the shadows are "ema", "ema-0.1", ….

    Raises:
        ValueError: no length, the same twice, or one outside its range.
    """

    def __init__(self, module: nn.Module, *, sigma_rel: Sequence[float] = (0.05, 0.1)):
        self.sigma_rel = tuple(float(sigma) for sigma in sigma_rel)
        if not self.sigma_rel or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel is a list of one or more different lengths; got {list(sigma_rel)}.")
        self.gammas = tuple(exponent(sigma) for sigma in self.sigma_rel)
        super().__init__(module, ["ema", *(f"ema-{sigma:g}" for sigma in self.sigma_rel[1:])])

    def decays(self, images: int, batch: int) -> list[float]:
        return [max(0.0, 1 - batch / images) ** (gamma + 1) for gamma in self.gammas]


def pull(shadow: list[Tensor], weights: list[Tensor], share: float, keep: Tensor) -> None:
    """shadow += share · (weights − shadow), in place, where `keep` is true."""
    if keep.device.type == "cpu":  # a CPU tensor is read at no cost, and one pass is then enough
        if keep:
            torch._foreach_lerp_(shadow, weights, share)
        return
    step = torch._foreach_sub(weights, shadow)
    torch._foreach_mul_(step, share * keep.to(torch.float32))
    torch._foreach_add_(shadow, step)


def _refuse_other(average: Mapping[str, Tensor], module: Mapping[str, Tensor], what: str) -> None:
    mine, theirs = ([f"{name} {tuple(value.shape)}" for name, value in part.items()] for part in (average, module))
    if mine != theirs:
        odd = [f"the average's {name}" for name in mine if name not in theirs]
        odd += [f"the module's {name}" for name in theirs if name not in mine]
        raise ValueError(
            f"The average has {len(mine)} {what} and the module {len(theirs)}, not the same ones in the same order: "
            f"{', '.join(odd[:4])}. Average the module that it was made from."
        )
