"""Bounds on integers beside floats, and what has no bins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scoresde import VPSDE, Budget, Exact, GaussianMixtureDenoiser, Rng, elbo, log_likelihood, ode_bound
from scoresde.codecs import Chain, Patches, Scaling, Standardise

MEANS = torch.tensor([[-0.5, 0.2], [0.3, -0.4]], dtype=torch.float64)
STDS = torch.tensor([[0.1, 0.2], [0.15, 0.12]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.6, 0.4], dtype=torch.float64)
CODEC = Standardise((3.0, 50.0), (2.0, 16.0), integers=(1,))  # bins of 1/16
POINTS = 48


def truth(raw: Tensor) -> Tensor:
    """log of the density of the float times the probability of the integer (B,), in closed form."""
    x, volume = (raw[:, :1].double() - 3) / 2, -math.log(2)
    edges = torch.stack([(raw[:, 1:].double() + k - 50) / 16 for k in (0, 1)])
    below, above = torch.special.ndtr((edges - MEANS[:, 1]) / STDS[:, 1])
    log_p = -0.5 * ((x - MEANS[:, 0]) / STDS[:, 0]) ** 2 - STDS[:, 0].log() - 0.5 * math.log(2 * math.pi)
    return (log_p + (above - below).log() + WEIGHTS.log()).logsumexp(1) + volume


def test_bounds_of_a_table_are_below_the_truth_and_tight() -> None:
    """As in tests/likelihood/test_integers.py: the flow's bound loses less than 0.01 bits/dim in the mean of 16
    weighted draws. The variational one, of centres, asks a model of uniform values where a value is, and is
    low."""
    denoiser = GaussianMixtureDenoiser(MEANS, STDS**2, WEIGHTS, VPSDE())
    raw = CODEC.decode(denoiser.sample(POINTS, rng=Rng(0), dtype=torch.float64))
    bound = ode_bound(denoiser, raw, Budget(40), scaling=CODEC, samples=16, divergence=Exact(), t_min=1e-5, rng=Rng(1))
    gap, error = truth(raw) - bound.log_prob, float(bound.stderr.square().mean().sqrt()) / math.sqrt(POINTS)
    assert bool((gap > -4 * bound.stderr - 1e-3).all())
    assert -4 * error - 1e-3 < float(gap.mean()) < 0.01 * 2 * math.log(2) + 4 * error
    assert torch.equal(bound.bits_per_dim, -bound.log_prob / (2 * math.log(2)))
    below = elbo(denoiser, raw, samples=8, scaling=CODEC, t_min=1e-5, rng=Rng(2))
    assert bool((below.log_prob < truth(raw) + 4 * below.stderr).all())


def test_the_decoder_of_a_table_is_a_distribution() -> None:
    """Known frequencies of points: a float and an integer that are always the same, whose exact denoiser leaves the
    integer certain, log P = 0, and the float a density N(0, ς²) at its place, of mean log −½ log 2πe ς²."""
    raw = torch.tensor([[3.0, 50.0]])
    point = CODEC.encode(raw).double()
    denoiser = GaussianMixtureDenoiser(point, 0.0, torch.ones(1), VPSDE())
    bound = elbo(denoiser, raw.expand(64, 2), samples=400, scaling=CODEC, t_min=1e-5, rng=Rng(0))
    ratio = float((-0.5 * VPSDE().log_snr(torch.tensor(1e-5, dtype=torch.float64))).exp())
    expected = -math.log(2) - 0.5 * math.log(2 * math.pi * math.e * ratio**2)
    error = float(bound.log_prob.std()) / 8
    assert abs(float(bound.reconstruction.value.mean()) + expected) < 4 * float(bound.reconstruction.value.std()) / 8
    assert float(bound.log_prob.mean()) <= expected + 4 * error


def test_patches_change_no_likelihood_and_no_bound() -> None:
    """Of a law that is the same in every dimension, so that only the places differ: to float64's rounding of sums."""
    plain, cut = Scaling(levels=32), Chain((Scaling(levels=32), Patches(2)))
    raw = Rng(0).integers(32, (3, 1, 4, 4)).byte()
    for codec, shape in ((plain, (1, 4, 4)), (cut, (4, 2, 2))):
        denoiser = GaussianMixtureDenoiser(torch.zeros(1, *shape), 0.3, torch.ones(1), VPSDE())
        low, high = codec.bins(raw, open_ends=True)
        assert low.shape == high.shape == (3, *shape)
        found = ode_bound(denoiser, raw, Budget(20), scaling=codec, samples=64, divergence=Exact(), rng=Rng(1))
        first = found if codec is plain else first  # noqa: F821
    assert bool(((found.log_prob - first.log_prob).abs() < 4 * torch.hypot(found.stderr, first.stderr)).all())


@dataclass(frozen=True)
class Turned(Patches):
    """Mixes dimensions: a bin in raw data is no product of intervals."""

    def carry(self, edges):
        return None


def test_bins_that_are_no_intervals_are_refused_in_words() -> None:
    codec = Chain((Scaling(levels=8), Turned(2)))
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2, 2), 0.3, torch.ones(1), VPSDE())
    raw = Rng(0).integers(8, (2, 1, 4)).byte()
    for bound in (lambda: elbo(denoiser, raw, samples=2, scaling=codec),
                  lambda: ode_bound(denoiser, raw, Budget(8), scaling=codec)):  # fmt: skip
        with pytest.raises(ValueError, match="no intervals of single dimensions under Chain"):
            bound()
    assert bool(log_likelihood(denoiser, raw, Budget(8), scaling=codec).log_prob.isfinite().all())
