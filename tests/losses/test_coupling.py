"""Pairings of noise with data: exact, a permutation, and what it does to the flow where that is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import EVENT_SHAPES
from scipy.stats import kstest
from torch import Tensor

from scoresde import DenoisingLoss, RectifiedFlow, Rng, ScoreFunction
from scoresde.losses.coupling import Independent, OptimalTransport

SPREAD = torch.tensor([0.2, 3.0], dtype=torch.float64)  # standard deviations of the 2-D data


def cost(x0: Tensor, eps: Tensor) -> float:
    return float((x0 - eps).double().square().sum())


def gaussian(n: int, seed: int) -> Tensor:
    return SPREAD * Rng(seed).normal((n, 2), dtype=torch.float64)


@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_pairing_is_the_cheapest_of_all(event: tuple[int, ...], n: int) -> None:
    """Against every permutation, and against the independent pairing from the same noise."""
    for seed in range(5):
        x0 = Rng(seed).normal((n, *event))
        same, eps = OptimalTransport()(x0, Rng(seed + 100))
        free = Independent()(x0, Rng(seed + 100))[1]
        least = min(cost(x0, free[list(order)]) for order in itertools.permutations(range(n)))
        assert same is x0 and eps.dtype == x0.dtype
        assert cost(x0, eps) == pytest.approx(least, rel=1e-6)  # float32 products may prefer one of two near ties
        assert cost(x0, eps) <= cost(x0, free) * (1 + 1e-6)


def test_it_is_a_permutation_of_the_same_noise() -> None:
    """So the noise of a batch is N(0, I) as it was drawn, and both couplings leave the stream at the same place."""
    x0, rng, other = gaussian(50, 0), Rng(1), Rng(1)
    _, eps = OptimalTransport()(x0, rng)
    _, free = Independent()(x0, other)
    assert sorted(map(tuple, eps.tolist())) == sorted(map(tuple, free.tolist()))
    assert torch.equal(rng.normal((3,)), other.normal((3,)))


def test_one_place_of_the_batch_sees_standard_normal_noise() -> None:
    """Averaged over batches of exchangeable data, the ε of sample 0 is N(0, 1): Kolmogorov–Smirnov at level 1e-4.

    And it is correlated with its datum, which independent noise is not: the standard error is 1/√1500.
    """
    pairs = []
    for seed in range(1500):
        x0, eps = OptimalTransport()(gaussian(8, seed), Rng(10_000 + seed))
        pairs.append(torch.stack([x0[0] / SPREAD, eps[0]]))
    data, noise = torch.stack(pairs).unbind(1)
    for axis in range(2):
        assert kstest(noise[:, axis].numpy(), "norm").pvalue > 1e-4
        assert kstest(data[:, axis].numpy(), "norm").pvalue > 1e-4
    assert float((data * noise)[:, 1].mean()) > 0.5 > 10 / math.sqrt(1500)


@pytest.mark.parametrize("n", [16, 18])
def test_groups_are_paired_apart(n: int) -> None:
    """Group by group the same as a call of its own; a last group may be smaller."""
    x0 = gaussian(n, 0)
    _, eps = OptimalTransport(group=4)(x0, Rng(1))
    free = Rng(1).normal_like(x0)
    for part in torch.arange(n).split(4):
        inside = [cost(x0[part], free[part][list(order)]) for order in itertools.permutations(range(len(part)))]
        assert cost(x0[part], eps[part]) == pytest.approx(min(inside), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_divided_batch_has_the_same_pairs(world: int) -> None:
    """Groups that divide every process's share; pairing whole shares gives others."""
    x0, coupling = gaussian(32, 0), OptimalTransport(group=8)
    _, whole = coupling(x0, Rng(1))
    parts = [coupling(x0.chunk(world)[r], Rng(1).share(r, world))[1] for r in range(world)]
    assert torch.equal(torch.cat(parts), whole)
    shares = [OptimalTransport()(x0.chunk(world)[r], Rng(1).share(r, world))[1] for r in range(world)]
    assert not torch.equal(torch.cat(shares), whole) or world == 4  # 4 shares of 8 are the groups


def excess(n: int) -> float:
    """Mean ‖x_0 − diag(s) ε‖² over 4,096 pairs in batches of n: how far from the Gaussians' exact map, diag(s) ε."""
    errors = []
    for seed in range(4096 // n):
        x0, eps = OptimalTransport()(gaussian(n, seed), Rng(5000 + seed))
        errors.append((x0 - SPREAD * eps).square().sum(1))
    return float(torch.cat(errors).mean())


def test_pairs_approach_the_exact_map() -> None:
    """Gaussians: 2Σs² for independent pairs (batches of one), and less and less in larger batches.

    In 2-D the squared distance of empirical measures falls about as log(n)/n (Ajtai et al. 1984): sixteen times the
    batch is worth a factor of 8 to 16 where the logarithm is small; 5 is asked for, and a pairing that did nothing
    would leave it at 1.
    """
    single, small, large = excess(1), excess(16), excess(256)
    # 4,096 draws of a variable of relative standard deviation 1.4
    assert single == pytest.approx(2 * float((SPREAD**2).sum()), rel=5 * 1.4 / 64)
    assert small < single / 5 and large < small / 5


def residual(group: int | None, t: float) -> float:
    """E‖ε − E[ε|x_t]‖²/D along one time, by the best linear ε̂ per axis: what is left for the paths to cross."""
    sde = RectifiedFlow()
    x0 = gaussian(4096, 7)
    coupling = Independent() if group is None else OptimalTransport(group)
    x0, eps = coupling(x0, Rng(8))
    x_t = sde.perturb(x0, torch.full((4096,), t, dtype=torch.float64), eps)
    slope = (x_t * eps).sum(0) / x_t.square().sum(0)
    return float((eps - slope * x_t).square().mean())


@pytest.mark.parametrize("t", [0.3, 0.6])
def test_the_flow_becomes_straight(t: float) -> None:
    r"""Independent Gaussians: α²s²/(α²s² + σ²), what makes their flow curved. Exact coupling: 0, and straight paths.

    A path is straight where the velocity ε − x_0 is known from x_t, that is where this residual vanishes.
    """
    alpha, sigma = 1 - t, t
    closed = (alpha**2 * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)).mean()
    free = residual(None, t)
    assert free == pytest.approx(float(closed), rel=0.05)  # 8192 squares: 1.6 % standard error
    values = [residual(group, t) for group in (4, 32, 256)]
    assert free > values[0] > values[1] > values[2] and values[2] < 0.15 * free


def test_the_loss_of_the_straight_flow_vanishes_with_it() -> None:
    """Through `DenoisingLoss`: the ε̂ of the exact map, x_t/((1 − t)s + t), is charged what the pairs lack of it."""
    sde = RectifiedFlow(t_min=0.3, t_max=0.7)

    def score(x: Tensor, t: Tensor) -> Tensor:
        scales = sde.at(t, x)
        return -x / (scales.alpha * SPREAD + scales.sigma) / scales.sigma

    straight = ScoreFunction(score, sde)
    losses = {
        group: float(
            DenoisingLoss(straight, coupling=Independent() if group == 1 else OptimalTransport(group))(
                gaussian(2048, 3), rng=Rng(4)
            ).mean()
        )
        for group in (1, 16, 256)
    }
    assert losses[256] < losses[16] / 3 < losses[1] / 9


def test_data_that_is_not_finite_makes_a_loss_that_is_not() -> None:
    """Not an exception: the trainer leaves such a step out and counts it."""
    x0 = gaussian(8, 0)
    x0[3, 1] = math.nan
    x0, eps = OptimalTransport()(x0, Rng(0))
    assert bool(eps.isfinite().all()) and bool(x0[3].isnan().any())


@pytest.mark.parametrize("group", [0, 1, -3, 2.0, True], ids=str)
def test_groups_out_of_range_are_named(group: object) -> None:
    with pytest.raises(ValueError, match=r"group is a number of samples.*got"):
        OptimalTransport(group)  # type: ignore[arg-type]


def test_it_needs_one_stream() -> None:
    with pytest.raises(ValueError, match="whole batch"):
        OptimalTransport()(gaussian(2, 0), Rng(seeds=[0, 1]))
