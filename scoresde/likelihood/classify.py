r"""A diffusion model as a classifier: log p(x | y) of every class, and Bayes' rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.conditions import Cond, expand
from ..diffusion.denoiser import Denoiser
from ..noise.rng import Rng
from .codec import RawCodec
from .divergence import Divergence
from .ode import LogLikelihood, log_likelihood
from .solver import Solver


@dataclass(frozen=True)
class Classification:
    """The result of `classify`.

    Attributes:
        log_posterior: (B, K) nats, log p(y | x).
        stderr: (B, K) nats, of log_posterior: what numerics leave open, with the divergence errors of two classes
            taken as independent. Common probes make them smaller than that, as they err alike.
        log_prob: (B, K) nats, log p(x | y).
        evaluations: network calls, of all classes together.
    """

    log_posterior: Tensor
    stderr: Tensor
    log_prob: Tensor
    evaluations: int

    @property
    def label(self) -> Tensor:
        """(B,), the class of highest posterior: its place among those asked."""
        return self.log_posterior.argmax(1)


def classify(
    denoiser: Denoiser,
    x0: Tensor,
    classes: int | Sequence[Cond],
    solver: Solver,
    *,
    priors: Tensor | None = None,
    divergence: Divergence | None = None,
    rng: Rng | None = None,
    scaling: RawCodec | None = None,
    t_min: float | None = None,
) -> Classification:
    r"""p(y | x) = p(x | y) p(y) / Σ p(x | y') p(y'), with log p(x | y) = `log_likelihood(…, cond=y)` (Li et al. 2023,
    Zimmermann et al. 2021, who compare bounds or densities of the same kind).

    All classes see the same probes and the same dequantisation noise, so what their densities have in common errs alike
    and cancels.
    Its bias is that of the model: densities of images are decided by detail that has no class, and are seldom as good
    at classes as a classifier.

    Args:
        denoiser: of p(x | y): conditional, guided by a classifier, or anything that takes `cond`.
        x0: data (B, *event), as for `log_likelihood`.
        classes: K ≥ 2 for the labels 0 … K − 1, or the K conditions, each one entry: leave out a class that the model
            never saw (`Dataset.seen_classes`), for it is asked like any other.
        priors: p(y), (K,), positive; normalised here. Default: all equal.
        solver, divergence, scaling, t_min: as in `log_likelihood`.
        rng: source of noise and probes, the same for every class.

    Raises:
        ValueError: fewer than 2 classes, or priors that are not.
        SolverError: a solve that failed.
    """
    conds = _conditions(classes)
    priors = _priors(priors, len(conds))
    rng = Rng(0) if rng is None else rng
    start = rng.state_dict()
    each = []
    for cond in conds:
        rng.load_state_dict(start)  # common random numbers
        each.append(
            log_likelihood(
                denoiser,
                x0,
                solver,
                divergence=divergence,
                cond=expand(cond, x0),
                rng=rng,
                scaling=scaling,
                t_min=t_min,
            )
        )
    return _posterior(each, priors)


def _conditions(classes: int | Sequence[Cond]) -> list[Cond]:
    conds: list[Cond] = []
    if isinstance(classes, Sequence):
        conds += classes
    else:
        conds += torch.arange(whole(classes, "classes", 0), device="cpu").split(1)
    if len(conds) < 2:
        raise ValueError(f"There are at least 2 classes to choose from; got {len(conds)}.")
    return conds


def _priors(priors: Tensor | None, count: int) -> Tensor:
    """p(y) (count,), all equal by default; refuses priors that are not positive."""
    if priors is None:
        priors = torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")
    if priors.shape != (count,) or not bool((priors > 0).all()):
        raise ValueError(f"priors are {count} positive numbers, one per class; got {priors.tolist()}.")
    return priors


def _posterior(each: Sequence[LogLikelihood], priors: Tensor) -> Classification:
    """Bayes' rule on the densities of every class, with the error it passes on."""
    log_prob = torch.stack([r.log_prob.detach() for r in each], 1)
    log_prior = (priors / priors.sum()).log().to(log_prob)
    log_posterior = (log_prob + log_prior).log_softmax(1)
    # ∂ log p(k|x)/∂ log p(x|j) = δ_kj − p(j|x)
    slopes = torch.eye(len(each), dtype=log_prob.dtype, device=log_prob.device) - log_posterior.exp()[:, None]
    stderr = (slopes**2 @ torch.stack([r.stderr for r in each], 1).to(log_prob)[..., None] ** 2)[..., 0].sqrt()
    return Classification(log_posterior, stderr, log_prob, sum(r.evaluations for r in each))
