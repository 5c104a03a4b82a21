"""The law of counter-based noise: every number normal, every sign even, and none of them with a thought of another.

Seeds are fixed, so a test passes or fails for good; its level says how often it would fail a perfect generator if they
were drawn anew.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from scoresde import Rng
from scoresde.noise.philox import Streams, normals, signs

LEVEL = 1e-6  # of one p-value
PAIRS = list(itertools.combinations(range(4), 2))
SIGMAS = 5.5  # of one mean over 10^4 … 10^7 numbers, normal by then: beyond it lies 4e-8


@pytest.fixture(scope="module")
def noise() -> Tensor:
    """Normals (8 seeds, 16 draws, 64 rows, 260 elements), seeds, draws and rows side by side, float64."""
    out = []
    for seed in range(8):
        rng = Rng(seed)
        out.append(torch.stack([rng.normal((64, 260), dtype=torch.float64) for _ in range(16)]))
    return torch.stack(out)


def test_moments(noise: Tensor) -> None:
    n = noise.numel()
    odd_factorial = [math.prod(range(1, 2 * k, 2)) for k in range(7)]  # (2k − 1)!! = E z^2k
    for k in range(1, 7):
        expected = 0 if k % 2 else odd_factorial[k // 2]
        stderr = math.sqrt((odd_factorial[k] - expected**2) / n)
        assert abs(float((noise**k).mean()) - expected) < SIGMAS * stderr, k


@pytest.mark.parametrize("edge", [3.0, 4.0, 4.8])
def test_tails(noise: Tensor, edge: float) -> None:
    for beyond in (noise > edge, noise < -edge):
        count = int(beyond.sum())
        assert scipy.stats.binomtest(count, noise.numel(), scipy.stats.norm.sf(edge)).pvalue > LEVEL


def p_values(z: np.ndarray) -> np.ndarray:
    """p of a Kolmogorov–Smirnov test of each row."""
    return np.array([scipy.stats.kstest(row, "norm").pvalue for row in z])


def test_p_values_over_many_seeds_are_uniform() -> None:
    z = Rng(seeds=list(range(500))).normal((500, 2000), dtype=torch.float64).numpy()
    assert scipy.stats.kstest(p_values(z), "uniform").pvalue > LEVEL


@pytest.mark.parametrize("axis", range(4), ids=["seeds", "draws", "rows", "elements"])
def test_p_values_along_every_axis_are_uniform(axis: int) -> None:
    """300 series in which one thing changes: the seed, the draw, the row or the element."""
    series, n = 300, 1000
    k, i = (part.flatten() for part in np.indices((series, n), np.uint64))
    few = np.arange(1, series + 1, dtype=np.uint64)
    z = {
        0: lambda: normals(Streams(i, k, 5, 1), 1),
        1: lambda: normals(Streams(k, i, 5, 1), 1),
        2: lambda: normals(Streams(few, few, 3, n), 7)[:, 0],
        3: lambda: normals(Streams(few, few, 3, 1), n),
    }[axis]()
    p = p_values(z.double().reshape(series, n).numpy())
    assert scipy.stats.kstest(p, "uniform").pvalue > LEVEL


def test_the_norm_of_a_sample_is_chi_square(noise: Tensor) -> None:
    """So elements of a sample do not lean on one another in any common way."""
    squares = noise.square().sum(-1).flatten().numpy()
    assert scipy.stats.kstest(squares, scipy.stats.chi2(noise.shape[-1]).cdf).pvalue > LEVEL
    sums = noise.sum(-1).flatten().numpy() / math.sqrt(noise.shape[-1])
    assert scipy.stats.kstest(sums, "norm").pvalue > LEVEL


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean of a b over its standard error, for a and b of mean 0, variance 1 and no common information.

    Products of one series with itself, shifted, are uncorrelated with each other: the error is 1/√n for them too.
    """
    return float((a * b).mean()) * math.sqrt(a.numel())


@pytest.mark.parametrize("axis", range(4), ids=["seeds", "draws", "rows", "elements"])
def test_neighbours_are_not_correlated(noise: Tensor, axis: int) -> None:
    """Neither z nor |z|, at any of the distances that a block, a pair or a warp of 32 could stand out at."""
    size = (noise.abs() - math.sqrt(2 / math.pi)) / math.sqrt(1 - 2 / math.pi)
    square = (noise.square() - 1) / math.sqrt(2)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 63, 64, 128, 256):
        if lag >= noise.shape[axis]:
            break
        for values in (noise, size, square):
            near, far = (values.narrow(axis, begin, noise.shape[axis] - lag) for begin in (0, lag))
            assert abs(correlation(near, far)) < SIGMAS, lag


@pytest.mark.parametrize("axes", PAIRS, ids=lambda pair: f"{pair[0]}{pair[1]}")
def test_no_two_counters_stand_for_each_other(noise: Tensor, axes: tuple[int, int]) -> None:
    """Seed i of draw j is not seed j of draw i, and so on."""
    square = noise.narrow(axes[0], 0, 8).narrow(axes[1], 0, 8).movedim(axes, (0, 1))
    i, j = torch.triu_indices(8, 8, 1)
    assert abs(correlation(square[i, j], square[j, i])) < SIGMAS


@pytest.mark.parametrize("part", range(3), ids=["seed", "draw", "row"])
def test_every_bit_of_a_counter_matters(part: int) -> None:
    """One bit of a seed, a draw or a row changed: noise that has nothing to do with the former."""
    width, n = (64, 64, 32)[part], 4096
    numbers = [6, *(6 ^ 1 << bit for bit in range(width))]
    where = [[6] * (width + 1) for _ in range(3)]
    where[part] = numbers
    rows = zip(*(np.array(each, np.uint64)[:, None] for each in where[:2]), where[2], strict=True)
    z = torch.cat([normals(Streams(seed, draw, row, 1), n) for seed, draw, row in rows]).double()
    products = (z @ z.mT).numpy() / math.sqrt(n)
    np.fill_diagonal(products, 0)
    assert abs(products).max() < 6.0  # of 2080 pairs


@pytest.mark.parametrize("lanes", PAIRS, ids=lambda pair: f"{pair[0]}{pair[1]}")
def test_the_four_normals_of_two_words_are_independent(noise: Tensor, lanes: tuple[int, int]) -> None:
    """Box–Muller makes two of one radius: χ² over 16 × 16 equally likely cells."""
    a, b = ((16 * torch.special.ndtr(noise[..., lane::4])).long().clamp(max=15).flatten() for lane in lanes)
    cells = torch.bincount(16 * a + b, minlength=256)
    assert scipy.stats.chisquare(cells.numpy()).pvalue > LEVEL


def test_radius_and_angle_are_independent_and_uniform(noise: Tensor) -> None:
    x, y = (noise.unflatten(-1, (-1, 2, 2))[..., lane, :].flatten() for lane in range(2))
    radius, angle = (-0.5 * (x.square() + y.square())).exp(), torch.atan2(y, x) / (2 * math.pi) + 0.5
    for uniform in (radius, angle):
        assert scipy.stats.kstest(uniform.numpy(), "uniform").pvalue > LEVEL
    cells = 16 * (16 * radius).long().clamp(max=15) + (16 * angle).long().clamp(max=15)
    assert scipy.stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > LEVEL


@pytest.mark.parametrize("axis", range(4), ids=["seeds", "draws", "rows", "blocks"])
def test_signs_are_even_and_independent_bit_by_bit(axis: int) -> None:
    """Each of the 256 bits of a block, and each two of them, over 16384 blocks in which one thing changes."""
    n = 2**14
    i, k = np.arange(n, dtype=np.uint64), np.full(n, 3, np.uint64)
    s = {
        0: lambda: signs(Streams(i, k, 3, 1), 256),
        1: lambda: signs(Streams(k, i, 3, 1), 256),
        2: lambda: signs(Streams(k[:1], k[:1], 0, n), 3 * 256)[:, :256],
        3: lambda: signs(Streams(k[:1], k[:1], 0, 1), 256 * n).reshape(n, 256),
    }[axis]()
    sums, products = s.sum(0).numpy(), (s.mT @ s).numpy()  # integers below 2^24: exact
    np.fill_diagonal(products, 0)
    # Hoeffding: a sum of n signs is beyond t √n with a probability of at most 2 exp(−t²/2)
    count = 256 + 256 * 255 // 2
    bound = math.sqrt(2 * n * math.log(2 * count / LEVEL))
    assert abs(sums).max() < bound and abs(products).max() < bound
    # and from one block to the next
    after = (s[1:].mT @ s[:-1]).numpy()
    assert abs(after).max() < math.sqrt(2 * n * math.log(2 * 256**2 / LEVEL))
