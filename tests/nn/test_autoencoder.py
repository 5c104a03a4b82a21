"""The autoencoder's densities against torch's own, and its objective against the closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scoresde import VPSDE, AutoencoderLoss, Rng, VariationalAutoencoder
from scoresde.nn import Autoencoder
from scoresde.nn.autoencoder import log_mass

LEVELS = 16


def stirred(network: Autoencoder, by: float = 0.3) -> Autoencoder:
    """Weights away from their start, where some are 0."""
    rng = Rng(2)
    with torch.no_grad():
        for p in network.parameters():
            p += by * rng.normal(p.shape, dtype=p.dtype)
    return network


@pytest.mark.parametrize("shape", [(2, 8), (1, 8, 4), (2, 4, 4, 8)])
@pytest.mark.parametrize("levels", [None, LEVELS])
def test_latents_and_back_in_one_to_three_dimensions(shape: tuple[int, ...], levels: int | None) -> None:
    network = stirred(Autoencoder(shape, latent=3, width=8, multipliers=(1, 2), levels=levels))
    x = network.centred(2 * Rng(0).uniform((5, *shape), dtype=torch.float32) - 1)
    mean, std = network.encode(x)
    assert mean.shape == std.shape == (5, 3, *(size // 4 for size in shape[1:])) == (5, *network.latent_shape)
    assert network.decode(mean).shape == x.shape and network.log_prob(x, mean).shape == (5,)
    assert bool((std > 0).all()) and torch.equal(network.centred(x), x)
    if levels is not None:
        assert float(network.decode(50 * mean).detach().abs().max()) <= 1 - 1 / levels + 1e-6


def test_probabilities_of_integers_sum_to_one() -> None:
    """Over all 4⁴ pictures of four pixels and four levels, whatever the head says, in float64."""
    network = stirred(Autoencoder((1, 2, 2), latent=1, width=8, multipliers=(1,), levels=4).double(), 1.0)
    z = 3 * Rng(1).normal((6, 1, 1, 1), dtype=torch.float64)
    pictures = torch.cartesian_prod(*[torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64)] * 4)
    total = [network.log_prob(pictures.reshape(-1, 1, 2, 2), one.expand(256, 1, 1, 1)).logsumexp(0) for one in z]
    assert torch.allclose(torch.stack(total), torch.zeros(6, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("scale", [-7.0, -3.0, 0.0, 4.0])
def test_the_mass_of_bins_sums_to_one_and_keeps_its_digits(scale: float) -> None:
    """Against S(b) − S(a) by differences where these have digits; in the tails, against the slope: of narrow bins the
    mass is width · density to width²/24, and log of the density of a logistic law is −u − 2 log(1 + e^{−u})."""
    mean, log_scale = (
        torch.tensor([[-0.93], [0.1], [3.0]], dtype=torch.float64),
        torch.tensor(scale, dtype=torch.float64),
    )
    bins = torch.arange(256, dtype=torch.float64)[None]
    mass = log_mass(bins, mean[None], log_scale.expand(1, 3, 1), 256, (-1.0, 1.0))[0]
    assert torch.allclose(mass.logsumexp(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    edges = (-1 + torch.arange(257, dtype=torch.float64) / 128 - mean) / math.exp(scale)
    edges[:, 0], edges[:, -1] = -math.inf, math.inf
    plain = edges.sigmoid().diff(dim=1)
    good = (plain > 1e-6) & (edges[:, 1:] < 10)
    assert good.any() and torch.allclose(mass[good].exp(), plain[good], rtol=1e-7)
    assert bool(mass.isfinite().all())
    if scale == 0.0:
        middle = (-1 + (torch.arange(1, 255, dtype=torch.float64) + 0.5) / 128 - mean).abs()
        density = -middle - 2 * torch.log1p((-middle).exp()) - math.log(128)
        assert torch.allclose(mass[:, 1:-1], density, atol=1e-5)


def test_floats_have_a_gaussian_of_learned_scale() -> None:
    network = stirred(Autoencoder((2, 4), latent=1, width=8, multipliers=(1,)).double())
    z = Rng(1).normal((3, 1, 2), dtype=torch.float64)
    x = Rng(2).normal((3, 2, 4), dtype=torch.float64)
    mean, log_scale = network._head(z).unbind(1)
    assert torch.equal(network.decode(z), mean) and float(log_scale.std()) > 0
    assert torch.allclose(network.log_prob(x, z), Normal(mean, log_scale.exp()).log_prob(x).sum((1, 2)))


def test_the_objective_is_the_reconstruction_and_beta_times_the_divergence() -> None:
    network = stirred(Autoencoder((1, 4, 4), latent=2, width=8, multipliers=(1,), levels=LEVELS))
    model, x = VariationalAutoencoder(network, VPSDE()), 2 * Rng(0).uniform((7, 1, 4, 4), dtype=torch.float32) - 1
    centres = network.centred(x)
    q = Normal(*network.encode(centres))
    kl = kl_divergence(q, Normal(torch.zeros(()), torch.ones(()))).sum((1, 2, 3))
    z = q.mean + q.stddev * Rng(3).normal_like(q.mean)
    log_p = network.log_prob(centres, z)

    def far(given: Tensor, made: Tensor) -> Tensor:
        return (given - made).square().flatten(1).sum(1)

    terms = AutoencoderLoss(model, beta=0.3).terms(x, rng=Rng(3))
    assert torch.allclose(terms.objective, (0.3 * kl - log_p) / 16, rtol=1e-5)
    assert torch.allclose(terms.loss, (kl - log_p) / 16, rtol=1e-5)
    more = AutoencoderLoss(model, beta=0.3, further=far, weight=0.5).terms(x, rng=Rng(3)).objective - terms.objective
    assert torch.allclose(more, 0.5 * far(centres, network.decode(z)), rtol=1e-4, atol=1e-5)
    measured = AutoencoderLoss(model).measured(x, rng=Rng(3))
    assert torch.allclose(measured["loss"], ((kl - log_p) / (16 * math.log(2))).double(), rtol=1e-5)
    assert torch.allclose(measured["kl"], (kl / (16 * math.log(2))).double(), rtol=1e-5)
    # dequantised as it may be, an integer is encoded as the centre of its bin
    within = centres + (Rng(4).uniform(x.shape, dtype=torch.float32) - 0.5) * 1.9 / LEVELS
    assert torch.equal(network.centred(within), centres)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"event_shape": (1, 28, 30), "multipliers": (1, 2)}, "multiples of 4"),
        ({"event_shape": (5,)}, r"takes samples \(C, L\)"),
        ({"event_shape": (1, 8, 8), "latent": 0}, "latent"),
        ({"event_shape": (1, 8, 8), "multipliers": ()}, "a multiplier or more"),
    ],
)
def test_what_cannot_be_built_is_told(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Autoencoder(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta"):
        AutoencoderLoss(VariationalAutoencoder(Autoencoder((1, 4)), VPSDE()), beta=0)
