"""A network on top of a mixture: the mixture itself while the network says nothing, whatever SDE and reading."""

from __future__ import annotations

import pytest
import torch
from oracles import all_sdes

from scoresde import EDM, EDMSDE, Budget, Corrected, Eps, Exact, GaussianMixtureDenoiser, Rng, V, log_likelihood
from scoresde.diffusion.corrected import fit_mixture
from scoresde.nn import MLP

pytest.importorskip("sklearn")
MEANS = torch.tensor([[0.6, -0.3, 0.3], [-1.4, 0.7, -0.7]])  # of mean 0, as model data are
COVS = torch.tensor([[[1.0, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.1]], [[0.2, 0, 0], [0, 0.3, 0.1], [0, 0.1, 2.0]]])
WEIGHTS = torch.tensor([0.7, 0.3])


def oracle(sde) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(MEANS, COVS, WEIGHTS, sde)


def corrected(sde, parameterization) -> Corrected:
    """With the very mixture of the oracle in the first two of its three places."""
    denoiser = Corrected(MLP((3,), width=8, depth=1), sde, parameterization, event_shape=(3,), components=3)
    exact = oracle(sde)
    for name in ("means", "variances", "basis", "log_weights"):
        getattr(denoiser, name)[:2] = getattr(exact, name).float()
    denoiser.log_weights[2] = -torch.inf
    return denoiser.eval()


@pytest.mark.parametrize("reading", [EDM(1.0), Eps(), V()], ids=str)
@pytest.mark.parametrize("sde", all_sdes().values(), ids=all_sdes().keys())
def test_a_network_that_says_nothing_leaves_the_mixture(sde, reading) -> None:
    """Against the closed form in float64. Round-off of r/v is that of x, 6e-8 |x|, in units of the deviation √v of the
    narrowest direction, and v ≥ 0.1 α² here."""
    denoiser, exact = corrected(sde, reading), oracle(sde)
    for t in torch.linspace(sde.t_min, sde.t_max, 7)[:-1]:
        x = sde.perturb(exact.sample(64, rng=Rng(0)), t, Rng(1).normal((64, 3)))
        with torch.no_grad():
            found, sought = denoiser(x, t), exact(x, t)
        torch.testing.assert_close(found.x0, sought.x0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.eps, sought.eps, rtol=1e-4, atol=1e-4)


def test_the_network_is_read_as_the_parameterization_says() -> None:
    """x_t = α x̂_0 + σ ε̂ stays, and the correction of F is that of `Parameterization.prediction`."""
    denoiser = corrected(EDMSDE(), EDM(1.0))
    torch.nn.init.normal_(denoiser.network.outlet.weight)
    x, t = Rng(0).normal((5, 3)), torch.full((5,), 0.7)
    scales = denoiser.sde.at(t, x)
    with torch.no_grad():
        found, start = denoiser(x, t), denoiser.mixture(x, scales.alpha, scales.sigma)
        output = denoiser.output(x, scales, None)
    read, zero = (denoiser.parameterization.prediction(F, x, scales) for F in (output, 0 * output))
    torch.testing.assert_close(scales.alpha * found.x0 + scales.sigma * found.eps, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.x0 - start[0], read.x0 - zero.x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.eps - start[1], read.eps - zero.eps, rtol=1e-5, atol=1e-5)


def test_likelihood_is_that_of_the_mixture() -> None:
    """By the library's own solve, at σ = 0.001: the blurred density differs from that of the data by less than
    ½ σ² tr |∇∇ log p| ≈ 1e-5, the prior at σ = 80 by ½ D/80² ≈ 2e-4, and 60 calls by less than 0.01."""
    denoiser = corrected(EDMSDE(sigma_min=0.001), EDM(1.0))
    x = oracle(denoiser.sde).sample(32, rng=Rng(3))
    found = log_likelihood(denoiser, x, Budget(60), divergence=Exact()).log_prob
    torch.testing.assert_close(found, oracle(denoiser.sde).log_prob(x), rtol=0, atol=0.02)


def test_the_mixture_is_found_and_few_samples_shrink_it() -> None:
    sde = EDMSDE()
    x, other = oracle(sde).sample(3000, rng=Rng(0)), oracle(sde).sample(1000, rng=Rng(1))
    denoiser = Corrected(MLP((3,), width=8, depth=1), sde, EDM(1.0), event_shape=(3,), components=4)
    said = denoiser.prepare(x, other)
    assert said.startswith("The network corrects a mixture of ")
    fresh = oracle(sde).sample(1000, rng=Rng(2))
    covs = denoiser.basis @ denoiser.variances.diag_embed() @ denoiser.basis.mT
    fitted = GaussianMixtureDenoiser(denoiser.means, covs, denoiser.log_weights.exp().clamp(min=1e-30), sde)
    # a fit of p parameters to n samples loses p/2n nats: 39/6000 for four components
    gap = oracle(sde).log_prob(fresh) - fitted.log_prob(fresh)
    assert float(gap.mean()) < 0.0065 + 3 * float(gap.std()) / 1000**0.5
    weights, means, covs = fit_mixture(x[:20], other, 1)
    assert weights.shape == (1,) and means.shape == (1, 3) and covs.shape == (1, 3, 3)


def test_pictures_have_no_mixture() -> None:
    with pytest.raises(ValueError, match=r"A mixture is of vectors, samples \(D,\); these have the shape \(1, 8, 8\)"):
        Corrected(MLP((1, 8, 8), width=8, depth=1), EDMSDE(), EDM(1.0), event_shape=(1, 8, 8))
