import math
from functools import cache

import pytest
import torch
from scipy.stats import chi2

from scoresde.data import Checkerboard, EightGaussians, Moons, Pinwheel, SwissRoll, toy_dataset
from scoresde.noise.rng import Rng

TOYS = [EightGaussians, Checkerboard, Moons, Pinwheel, SwissRoll]
COARSE = 16  # coarse cells per side


@cache
def grid(kind):
    """(midpoints (G, G, 2), density (G, G), cell area).

    Midpoint sums converge geometrically for smooth densities: the error is e^{−2π² (s/h)²} for structures of width s
    and cells of width h = 8.8/256 = 0.034 where s ≥ 0.1. Half of that for the pinwheel, whose blades are sheared in
    their tail to s ≥ 0.02, which leaves 1e-12. The checkerboard's jumps lie on cell borders, where the sum is exact.
    """
    toy = kind()
    half = toy.half_width if kind is Checkerboard else 4.4
    cells = COARSE * (32 if kind is Pinwheel else 16)
    h = 2 * half / cells
    axis = -half + h * (torch.arange(cells, dtype=torch.float64) + 0.5)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    return points, toy.log_prob(points.reshape(-1, 2)).reshape(points.shape[:2]).exp(), h * h


@pytest.mark.parametrize("kind", TOYS)
def test_density_integrates_to_one_with_mean_zero_and_unit_variance(kind):
    points, density, area = grid(kind)
    # the box cuts off 10 standard deviations of noise (pinwheel: radius 4.4 is 7.5 radial ones): below 1e-10
    assert float(density.sum() * area) == pytest.approx(1, abs=1e-9)
    mean = (density[..., None] * points).sum((0, 1)) * area
    variance = (density[..., None] * points**2).sum((0, 1)) * area
    assert mean.abs().max() < 1e-8
    # midpoints miss h²/12 ≤ 2.5e-5 of the variance within a flat cell
    assert float(variance.mean()) == pytest.approx(1, abs=3e-5)


@pytest.mark.parametrize("kind", TOYS)
def test_samples_follow_the_density(kind):
    toy, n = kind(), 20_000
    x = toy.sample(n, rng=Rng(5))
    assert x.shape == (n, 2) and x.dtype == torch.float32
    points, density, area = grid(kind)
    log_prob = toy.log_prob(x)
    inside = density > 0
    entropy = -float((density[inside] * density[inside].log()).sum() * area)
    stderr = float(log_prob.std()) / math.sqrt(n)
    assert abs(float(-log_prob.mean()) - entropy) < 4 * stderr + 1e-6
    # chi-square over coarse cells; those that expect fewer than 5 samples are taken together
    expected = n * area * density.unflatten(1, (COARSE, -1)).unflatten(0, (COARSE, -1)).sum((1, 3)).flatten()
    half = -float(points[0, 0, 0]) + math.sqrt(area) / 2
    index = ((x.double() + half) / (2 * half) * COARSE).floor().long().clamp(0, COARSE - 1)
    found = (index[:, 0] * COARSE + index[:, 1]).bincount(minlength=COARSE**2).double()
    rare = expected < 5
    pool = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (expected, found)]
    pool = [part[pool[0] > 1e-6] for part in pool]
    statistic = float(((pool[1] - pool[0]) ** 2 / pool[0]).sum())
    assert chi2.sf(statistic, len(pool[0]) - 1) > 1e-3
    assert float(found[expected == 0].sum()) == 0


def test_curve_quadrature_agrees_with_brute_force():
    # the same integral by a trapezoid rule with steps h ≤ 2e-5 along the curve; seen from a distance d ≤ 4, an end of
    # the curve contributes e^{−d s/std²}, for which the rule is off by (h d/std²)²/12 ≤ 6e-6
    t = torch.linspace(0, math.pi, 1_000_001, dtype=torch.float64)
    weights = torch.full_like(t, 1 / (len(t) - 1))
    weights[[0, -1]] /= 2
    moons, swiss = Moons(std=0.1), SwissRoll(std=0.1)
    curves = torch.cat(
        [torch.stack([t.cos(), t.sin()], 1), torch.stack([1 - t.cos(), 0.5 - t.sin()], 1)]
    ) - torch.tensor([0.5, 0.25])
    # E x² + E y² over both moons, minus the squared mean: 3/4 + (1/2 + 1/16 − 1/π) for scale 1
    scale = math.sqrt(2 * (1 - 0.1**2) / (0.75 + 0.5625 - 1 / math.pi))
    centres, both = scale * curves, torch.cat([weights, weights]) / 2
    for toy, points, w in ((moons, centres, both), (swiss, *_spiral(t / math.pi, weights))):
        x = torch.cat([toy.sample(5, rng=Rng(0)), torch.tensor([[3.0, 3.0], [0.0, 0.0], [-4.0, 1.0]])]).double()
        for row, log_prob in zip(x, toy.log_prob(x), strict=True):
            brute = (w.log() - ((row - points) ** 2).sum(1) / (2 * 0.1**2)).logsumexp(0) - math.log(
                2 * math.pi * 0.1**2
            )
            assert float(log_prob) == pytest.approx(float(brute), abs=6e-6)


def _spiral(unit, weights):
    t = math.pi * (1.5 + 3 * unit)
    points = torch.stack([t * t.cos(), t * t.sin()], 1)
    points = points - torch.tensor([2.0, 2 / (3 * math.pi)], dtype=torch.float64)  # ∫ t cos t = 6π, ∫ t sin t = 2
    second = (4.5**3 - 1.5**3) * math.pi**2 / 9  # E t²
    scale = math.sqrt(2 * (1 - 0.1**2) / (second - 4 - (2 / (3 * math.pi)) ** 2))
    return scale * points, weights


def test_the_pinwheel_turn_keeps_areas():
    toy = Pinwheel()
    z = Rng(0).normal((50, 2), dtype=torch.float64) + 1
    jacobian = torch.func.vmap(torch.func.jacrev(lambda value: toy._turn(value, torch.tensor(2.0), 1)))(z)
    assert (torch.linalg.det(jacobian) - 1).abs().max() < 1e-12


def test_checkerboard_samples_never_fall_on_a_light_cell():
    toy = Checkerboard(cells=6)
    assert toy.log_prob(toy.sample(200_000, rng=Rng(0))).sub(-math.log(6)).abs().max() < 1e-12
    assert toy.log_prob(torch.tensor([[9.0, 0.0]])).isneginf().all()


@pytest.mark.parametrize("kind", TOYS)
def test_per_sample_seeds_make_a_sample_independent_of_the_batch(kind):
    batch = kind().sample(4, rng=Rng(seeds=[3, 1, 4, 5]))
    assert torch.equal(batch[2:3], kind().sample(1, rng=Rng(seeds=[4])))


@pytest.mark.parametrize("kind", TOYS)
def test_a_toy_dataset_lives_in_model_coordinates(kind):
    data = toy_dataset(kind(), train=30, test=20, seed=1)
    assert data.event_shape == (2,) and (len(data.train), len(data.test)) == (30, 20)
    raw = data.train.raw
    assert torch.equal(data.encode(raw, Rng(0)), raw) and not data.codec.log_volume(raw, raw).any()
    assert torch.equal(torch.cat([data.train.raw, data.test.raw]), kind().sample(50, rng=Rng(1)))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: EightGaussians(std=0), "std"),
        (lambda: Moons(std=1), "std"),
        (lambda: SwissRoll(std=-1), "std"),
        (lambda: Checkerboard(cells=3), "even"),
        (lambda: Pinwheel(arms=0), "arms"),
        (lambda: toy_dataset(Moons(), train=0), "train is a whole number of at least 1; got 0"),
        (lambda: Moons().log_prob(torch.zeros(3)), r"\(3,\)"),
    ],
)
def test_values_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
