"""Networks with two outputs: the mean of a reverse step and its variance, beside torch's own Gaussians."""

from __future__ import annotations

import pytest
import torch
from oracles import all_sdes, ddpm_alpha_bar
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils import _pytree as pytree

from scoresde import DDPM, VPSDE, ClassifierFree, Eps, Preconditioned, Rng, Split, TableSDE
from scoresde.diffusion.split import step_divergence, step_variances
from scoresde.nn import DiT, UNet


def two_heads(x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
    v = torch.tanh(3 * x.roll(1, -1))
    return torch.cat([torch.tanh(x), v if cond is None else v * cond.reshape(-1, 1, 1)], 1)


@pytest.mark.parametrize("stride", [1, 40])
def test_the_variances_of_a_table_are_ddpms_on_respaced_tables_too(stride: int) -> None:
    alpha_bar = ddpm_alpha_bar()
    t = torch.arange(1000, stride, -stride, dtype=torch.float64) / 1000
    now = alpha_bar[(t * 1000).round().long() - 1]
    before = alpha_bar[(t * 1000).round().long() - 1 - stride]
    beta = 1 - now / before
    least, wider = step_variances(TableSDE(alpha_bar), t, t - stride / 1000)
    torch.testing.assert_close(least.exp(), (1 - before) / (1 - now) * beta, rtol=1e-9, atol=0)
    torch.testing.assert_close((least + wider).exp(), beta, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sde", all_sdes().values(), ids=all_sdes().keys())
def test_the_divergence_is_that_of_the_two_gaussians(sde) -> None:
    """q(x_s | x_t, x_0) by Bayes' rule from the transition and the marginal; the model's has x̂_0 for x_0."""
    x0, guess = (torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    eps, share = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = sde.time(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))
    s = sde.time(torch.tensor([-0.5, 0.6, 5.0], dtype=torch.float64))
    (a, std), (alpha, sigma), (alpha_t, sigma_t) = (
        [v.reshape(3, 1, 1) for v in pair] for pair in (sde.transition(s, t), sde.marginal(s), sde.marginal(t))
    )
    x_t = alpha_t * x0 + sigma_t * eps
    var = 1 / (a**2 / std**2 + 1 / sigma**2)
    posterior, modelled = (var * (a / std**2 * x_t + alpha / sigma**2 * x) for x in (x0, guess))
    log_var = share * (std**2).log() + (1 - share) * var.log()
    expected = kl_divergence(Normal(posterior, var.sqrt()), Normal(modelled, (0.5 * log_var).exp()))
    squared = (alpha_t / sigma_t * (x0 - guess)) ** 2
    torch.testing.assert_close(step_divergence(sde, t, s, squared, share), expected, rtol=1e-7, atol=1e-10)
    assert not step_divergence(sde, t, t, squared, share).any()


def test_the_first_output_is_the_mean_and_the_second_the_share() -> None:
    x, t = Rng(0).normal((2, 3, 4)), torch.tensor(0.5)
    p = Split(two_heads, VPSDE(), Eps(), scale_input=False)(x, t)
    torch.testing.assert_close(p.eps, torch.tanh(x))
    torch.testing.assert_close(p.share, 0.5 * (1 + torch.tanh(3 * x.roll(1, -1))))
    values, spec = pytree.tree_flatten(p)
    again = pytree.tree_unflatten(values, spec)
    assert again.share is p.share and again.scales.sde is p.scales.sde
    assert torch.equal(p.shift(x).share, p.share)


def test_guidance_keeps_the_share_of_the_condition() -> None:
    x, cond = Rng(0).normal((2, 3, 4)), {"vector": torch.tensor([[0.2], [0.7]])}
    network = lambda x, c, cond=None: two_heads(x, c, None if cond is None else cond["vector"])  # noqa: E731
    denoiser = Split(network, VPSDE(), Eps())
    t = torch.tensor(0.3)
    null = {"vector": torch.zeros(1, 1)}
    for guided in (ClassifierFree(denoiser, 2.0), ClassifierFree(denoiser, 2.0, null=null, rescale=0.5)):
        assert torch.equal(guided(x, t, cond).share, denoiser(x, t, cond).share) and guided.heads == 2


@pytest.mark.parametrize(
    "network",
    [
        UNet((2, 8, 8), width=8, multipliers=[1, 2], blocks=1, outputs=2),
        DiT((2, 8, 8), width=8, depth=1, heads=2, outputs=2),
    ],
    ids=["unet", "dit"],
)
def test_networks_of_two_outputs_start_half_way(network) -> None:
    x, t = Rng(0).normal((3, 2, 8, 8)), torch.tensor(0.5)
    p = Split(network, DDPM(), Eps())(x, t)
    assert torch.equal(p.share, torch.full_like(x, 0.5)) and torch.equal(p.eps, torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"\(3, 4, 8, 8\).*expected \(3, 2, 8, 8\).*denoiser=split"):
        Preconditioned(network, DDPM(), Eps())(x, t)


def test_one_output_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*expected \(2, 6, 4\).*network.outputs=2"):
        Split(lambda x, c: x, VPSDE(), Eps())(torch.zeros(2, 3, 4), torch.tensor(0.5))
