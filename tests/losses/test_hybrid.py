"""The loss of a learned variance beside torch's own Gaussians, and where its gradient goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from scoresde import DDPM, VPSDE, DenoisingLoss, Eps, HybridLoss, Preconditioned, Rng, Split
from scoresde.losses import DiscreteTimes

STEPS, DIMS = 8, 3


class Heads(nn.Module):
    """ε̂ = a x and v = b, one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.v = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.cat([self.mean * x, self.v.expand_as(x)], 1)


def loss_of(weight: float = 1e-3) -> HybridLoss:
    return HybridLoss(Split(Heads(), DDPM(steps=STEPS, beta_end=0.5), Eps(), scale_input=False), weight=weight).double()


def test_it_is_the_simple_loss_and_the_divergence_of_the_drawn_step() -> None:
    loss, x0 = loss_of(), Rng(0).normal((400, DIMS), dtype=torch.float64)
    sde, network = loss.denoiser.sde, loss.denoiser.network
    measured = loss.measured(x0, rng=Rng(1))
    simple = DenoisingLoss(loss.denoiser, DiscreteTimes(STEPS)).terms(x0, rng=Rng(1))
    torch.testing.assert_close(measured["loss"], simple.loss + 1e-3 * measured["vlb"])
    # the same draws again, and both Gaussians of each step by the posterior of Ho et al. (2020), eq. 6 and 7
    rng = Rng(1)
    t, _ = loss.times.sample(sde, len(x0), rng, x0.device)
    x_t = sde.perturb(x0, t, rng.noise(x0))
    beta = torch.linspace(1e-4, 0.5, STEPS, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    k = (t * STEPS).round().long() - 1
    now, before, b = (v[:, None] for v in (alpha_bar[k], alpha_bar[(k - 1).clamp(min=0)], beta[k]))
    guess = (x_t - (1 - now).sqrt() * network.mean * x_t) / now.sqrt()
    means = [(before.sqrt() * b * x + (1 - b).sqrt() * (1 - before) * x_t) / (1 - now) for x in (x0, guess)]
    least, share = (1 - before) / (1 - now) * b, (network.v + 1) / 2
    log_var = share * b.log() + (1 - share) * least.log()
    kl = kl_divergence(Normal(means[0], least.sqrt()), Normal(means[1], (0.5 * log_var).exp())).mean(1)
    expected = STEPS / math.log(2) * kl.where(k > 0, torch.zeros_like(kl))  # before the first step there is none
    torch.testing.assert_close(measured["vlb"], expected, rtol=1e-6, atol=1e-9)
    assert bool((k == 0).any()) and torch.equal(loss.terms(x0, rng=Rng(1)).objective, measured["loss"])


def test_the_bound_trains_the_variance_alone() -> None:
    """The mean has the gradient of the simple loss, whatever the weight; the variance has that of the bound."""
    x0, found = Rng(0).normal((64, DIMS), dtype=torch.float64), {}
    for weight in (1e-3, 2e-3):
        loss = loss_of(weight)
        loss(x0, rng=Rng(1)).mean().backward()
        found[weight] = [parameter.grad for parameter in (loss.denoiser.network.mean, loss.denoiser.network.v)]
    simple = DenoisingLoss(loss.denoiser, DiscreteTimes(STEPS))
    loss.zero_grad()
    simple(x0, rng=Rng(1)).mean().backward()
    assert torch.equal(found[1e-3][0], loss.denoiser.network.mean.grad) and torch.equal(*(f[0] for f in found.values()))
    torch.testing.assert_close(2 * found[1e-3][1], found[2e-3][1])
    assert found[1e-3][1].abs() > 1e-6


def test_what_it_cannot_train_is_refused() -> None:
    one = Preconditioned(lambda x, c: x, DDPM(), Eps())
    with pytest.raises(ValueError, match=r"denoiser=split with network\.outputs=2"):
        HybridLoss(one)
    with pytest.raises(ValueError, match="has continuous time: take sde=ddpm, or say how many steps="):
        HybridLoss(Split(Heads(), VPSDE(), Eps()))
    assert HybridLoss(Split(Heads(), VPSDE(), Eps()), steps=50).steps == 50
    with pytest.raises(ValueError, match="weight"):
        HybridLoss(Split(Heads(), DDPM(), Eps()), weight=0.0)
