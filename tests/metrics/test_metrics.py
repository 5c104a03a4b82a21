import math

import pytest
import torch
from torch import nn

from scoresde.codecs import Scaling
from scoresde.metrics import Frechet, c2st, energy_distance, frechet_distance, mmd, sliced_w2
from scoresde.noise.rng import Rng


def gaussian(n, dims, rng, mean=0.0, std=1.0):
    return mean + std * rng.normal((n, dims), dtype=torch.float64)


def mean_and_stderr(values):
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def with_moments(n, mean, cov, rng):
    """Samples whose own mean and unbiased covariance are exactly those given."""
    x = gaussian(n, len(mean), rng)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def random_cov(dims, rng):
    root = rng.normal((dims, dims), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(dims, dtype=torch.float64)


# Sliced Wasserstein -------------------------------------------------------------------------------------------------


def test_sliced_w2_in_one_dimension_is_scipys_optimal_transport():
    from scipy.optimize import linear_sum_assignment

    x, y = gaussian(12, 1, Rng(0)), gaussian(12, 1, Rng(1), 0.5, 2.0)
    cost = torch.cdist(x, y).numpy() ** 2
    best = cost[linear_sum_assignment(cost)].mean()
    assert sliced_w2(x, y, projections=3, rng=Rng(2)) == pytest.approx(math.sqrt(best), abs=1e-12)
    # unequal sizes: 12 against 8 points is 24 against 24, each point repeated
    z = y[:8]
    expected = sliced_w2(x.repeat_interleave(2, 0), z.repeat_interleave(3, 0), rng=Rng(2))
    assert sliced_w2(x, z, rng=Rng(2)) == pytest.approx(expected, abs=1e-12)


def test_sliced_w2_of_a_shift_is_its_length_over_sqrt_dims():
    dims, projections = 20, 4096
    x, shift = gaussian(50, dims, Rng(0)), gaussian(1, dims, Rng(1))
    # each projection gives (θ·δ)², with mean |δ|²/D and relative standard deviation √(2 (D − 1)/(D + 2)) < √2
    expected = float(shift.norm()) ** 2 / dims
    found = sliced_w2(x, x + shift, projections=projections, rng=Rng(2)) ** 2
    assert abs(found - expected) < 4 * expected * math.sqrt(2 / projections)


def test_sliced_w2_of_isotropic_gaussians_is_the_difference_of_their_stds():
    n, dims = 20_000, 5
    x, y = gaussian(n, dims, Rng(0)), gaussian(n, dims, Rng(1), std=1.7)
    found = sliced_w2(x, y, projections=64, rng=Rng(2))
    # std of n points is off by σ/√(2n) each; the floor of W₂² of n points, about (1 + 1.7²) ln ln n/n, adds in squares
    tolerance = 4 * math.sqrt((1 + 1.7**2) / (2 * n)) + (1 + 1.7**2) * math.log(math.log(n)) / n / (2 * 0.7)
    assert abs(found - 0.7) < tolerance


def test_sliced_w2_is_symmetric_zero_on_equal_samples_and_keeps_the_shape_of_events_out():
    x, y = gaussian(40, 12, Rng(0)), gaussian(30, 12, Rng(1))
    assert sliced_w2(x, x.flip(0), rng=Rng(0)) == 0
    assert sliced_w2(x, y, rng=Rng(0)) == pytest.approx(sliced_w2(y, x, rng=Rng(0)), abs=1e-12)
    assert sliced_w2(x.view(40, 3, 4), y.view(30, 3, 4), rng=Rng(0)) == sliced_w2(x, y, rng=Rng(0))


# Averages over pairs ------------------------------------------------------------------------------------------------


def gaussian_mmd2(dims, shift, std, bandwidth):
    def mean_kernel(distance, variance):
        total = bandwidth**2 + variance
        return (bandwidth**2 / total) ** (dims / 2) * math.exp(-(distance**2) / (2 * total))

    return mean_kernel(0, 2) + mean_kernel(0, 2 * std**2) - 2 * mean_kernel(shift, 1 + std**2)


@pytest.mark.parametrize("shift, std", [(0.0, 1.0), (0.7, 1.0), (0.3, 1.5)])
def test_mmd_of_gaussians_has_its_closed_form_and_no_bias(shift, std):
    dims, widths = 3, (0.5, 2.0)
    offset = torch.zeros(dims, dtype=torch.float64)
    offset[0] = shift
    values = [
        mmd(gaussian(100, dims, Rng(2 * k)), gaussian(80, dims, Rng(2 * k + 1), offset, std), bandwidths=widths)
        for k in range(100)
    ]
    mean, stderr = mean_and_stderr(values)
    expected = sum(gaussian_mmd2(dims, shift, std, width) for width in widths) / 2
    assert abs(mean - expected) < 4 * stderr
    assert (shift, std) != (0.0, 1.0) or min(values) < 0 < max(values)


def test_mmd_by_the_median_heuristic_uses_the_median_pairwise_distance():
    x, y = gaussian(31, 4, Rng(0)), gaussian(24, 4, Rng(1), 1.0)
    pooled = torch.cat([x, y])
    i, j = torch.triu_indices(len(pooled), len(pooled), 1)
    median = float((pooled[i] - pooled[j]).norm(dim=1).median())
    assert mmd(x, y) == pytest.approx(mmd(x, y, bandwidths=median), rel=1e-9)


@pytest.mark.parametrize("n, m", [(1500, 1100), (5, 3)])
def test_pair_averages_equal_their_definition_also_across_blocks(n, m):
    x, y = gaussian(n, 2, Rng(0), 100.0), gaussian(m, 2, Rng(1), 101.0)

    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1).sqrt()

    def kernel(d):
        return torch.exp(-(d**2) / 2)

    def mean(d, same=False):
        off = ~torch.eye(len(d), dtype=torch.bool) if same else torch.ones(d.shape, dtype=torch.bool)
        return float(d[off].mean())

    xx, yy, xy = distances(x, x), distances(y, y), distances(x, y)
    expected = 2 * mean(xy) - mean(xx, True) - mean(yy, True)
    assert energy_distance(x, y) == pytest.approx(expected, abs=1e-7)
    expected = mean(kernel(xx), True) + mean(kernel(yy), True) - 2 * mean(kernel(xy))
    assert mmd(x, y, bandwidths=1.0) == pytest.approx(expected, abs=1e-7)


def folded_mean(shift, std):
    """E |N(shift, std²)|."""
    return std * math.sqrt(2 / math.pi) * math.exp(-(shift**2) / (2 * std**2)) + shift * math.erf(
        shift / (std * math.sqrt(2))
    )


@pytest.mark.parametrize("shift, std", [(0.0, 1.0), (0.8, 1.0), (0.4, 2.0)])
def test_energy_distance_of_gaussians_on_the_line_has_its_closed_form_and_no_bias(shift, std):
    values = [
        energy_distance(gaussian(100, 1, Rng(2 * k)), gaussian(80, 1, Rng(2 * k + 1), shift, std)) for k in range(200)
    ]
    mean, stderr = mean_and_stderr(values)
    expected = 2 * folded_mean(shift, math.sqrt(1 + std**2)) - math.sqrt(2) * (1 + std) * math.sqrt(2 / math.pi)
    assert abs(mean - expected) < 4 * stderr


def test_energy_distance_of_isotropic_gaussians_in_many_dimensions():
    dims, std = 6, 1.8
    chi_mean = math.sqrt(2) * math.gamma((dims + 1) / 2) / math.gamma(dims / 2)
    values = [
        energy_distance(gaussian(100, dims, Rng(2 * k)), gaussian(100, dims, Rng(2 * k + 1), 0, std))
        for k in range(100)
    ]
    mean, stderr = mean_and_stderr(values)
    expected = chi_mean * (2 * math.sqrt(1 + std**2) - math.sqrt(2) * (1 + std))
    assert abs(mean - expected) < 4 * stderr


# Classifier two-sample test -----------------------------------------------------------------------------------------


def test_c2st_of_one_law_is_chance():
    results = [
        c2st(gaussian(400, 2, Rng(2 * k)), gaussian(400, 2, Rng(2 * k + 1)), rng=Rng(k), steps=200) for k in range(6)
    ]
    mean, _ = mean_and_stderr([result.accuracy for result in results])
    # 6 × 400 independent held-out points at probability ½
    assert abs(mean - 0.5) < 4 * 0.5 / math.sqrt(6 * 400)
    assert all(result.points == 400 for result in results)
    assert all(result.stderr == math.sqrt(result.accuracy * (1 - result.accuracy) / 400) for result in results)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_c2st_of_shifted_gaussians_is_near_the_bayes_accuracy(shift):
    n, dims = 2000, 3
    offset = torch.tensor([shift, 0.0, 0.0], dtype=torch.float64)
    result = c2st(gaussian(n, dims, Rng(0)), gaussian(n, dims, Rng(1), offset), rng=Rng(2))
    bayes = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))
    assert result.accuracy < bayes + 4 * result.stderr
    # no classifier beats Bayes; a fitted one loses at most the excess risk of its ~4,500 weights, held to 0.03
    assert result.accuracy > bayes - 4 * result.stderr - 0.03


def test_c2st_sees_what_means_and_variances_do_not():
    angles = Rng(0).uniform((1000,), dtype=torch.float64) * 2 * math.pi
    ring = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], 1)
    normal = gaussian(1000, 2, Rng(1))
    # Bayes: within ±0.1 of the ring's radius a Gaussian has P(1.31 < r < 1.51) ≈ 0.10; a thin ring is found otherwise
    assert c2st(ring, normal, rng=Rng(2)).accuracy > 0.85


def test_c2st_leaves_the_global_random_state_alone_and_works_without_gradients():
    state = torch.get_rng_state()
    x, y = gaussian(40, 2, Rng(0)), gaussian(40, 2, Rng(1))
    with torch.no_grad():
        first = c2st(x, y, rng=Rng(0), steps=20)
    assert torch.equal(torch.get_rng_state(), state) and first == c2st(x, y, rng=Rng(0), steps=20)
    with pytest.raises(ValueError, match="40 samples and y 30"):
        c2st(x, y[:30], rng=Rng(0))


# Fréchet ------------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_exact_moments_is_its_closed_form():
    from scipy.linalg import sqrtm

    rng, dims = Rng(0), 7
    mean, cov_x, cov_y = gaussian(1, dims, rng)[0], random_cov(dims, rng), random_cov(dims, rng)
    x = with_moments(50, torch.zeros(dims, dtype=torch.float64), cov_x, rng)
    y = with_moments(60, mean, cov_y, rng)
    cross = torch.from_numpy(sqrtm((cov_x @ cov_y).numpy()).real)
    expected = float(mean @ mean + (cov_x + cov_y - 2 * cross).trace())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_zero_on_itself_also_when_the_covariance_is_singular():
    x = gaussian(10, 30, Rng(0))
    # roots of eigenvalues that are 0 up to round-off, √1e-16, in 30 dimensions
    assert frechet_distance(x, x) < 30 * 1e-7
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 30, rel=1e-6)


def test_frechet_distance_of_one_law_is_its_small_sample_bias():
    n, dims = 400, 4
    values = [frechet_distance(gaussian(n, dims, Rng(2 * k)), gaussian(n, dims, Rng(2 * k + 1))) for k in range(100)]
    mean, stderr = mean_and_stderr(values)
    # means: D · 2/n. Roots: ‖A − B‖²/4 for covariances I + A and I + B, where E‖A‖² = D (D + 1)/n, so D (D + 1)/(2n)
    expected = 2 * dims / n + dims * (dims + 1) / (2 * n)
    assert abs(mean - expected) < 4 * stderr + 0.05 * expected  # next order in D/√n


class Halves(nn.Module):
    """Means over both halves; remembers what it saw."""

    def __init__(self, dims=2):
        super().__init__()
        self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.weight = nn.Parameter(torch.eye(2)[:, :dims].clone())
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        halves = torch.stack([half.flatten(1).mean(1) for half in x.chunk(2, dim=-1)], 1)
        return self.frozen(self.drop(halves @ self.weight))


def images(n, seed, low=-1.0):
    return low + (1 - low) * Rng(seed).uniform((n, 1, 4, 4))


def test_frechet_runs_in_eval_mode_in_batches_and_records_its_protocol():
    extractor = Halves().train()
    extractor.frozen.eval()
    metric = Frechet(extractor, "halves-FD", batch_size=64, min_samples=150)
    x, y = images(200, 0), images(150, 1)
    record = metric(x, y)
    assert extractor.training and extractor.drop.training and not extractor.frozen.training
    assert [len(batch) for batch in extractor.seen] == [64, 64, 64, 8, 64, 64, 22]
    plain = [torch.stack([half.flatten(1).mean(1) for half in z.chunk(2, dim=-1)], 1) for z in (x, y)]
    assert record.value == pytest.approx(frechet_distance(*plain), rel=1e-6)  # batches sum in another order, float32
    assert record.asdict() == {
        "value": record.value, "name": "halves-FD", "extractor": "Halves", "samples": 200, "reference": 150,
        "dims": 2, "rounding": "none", "small": False,
    }  # fmt: skip


def test_frechet_rounds_both_sides_to_the_raw_values():
    scaling, extractor = Scaling(levels=4), Halves()
    metric = Frechet(extractor, "halves-FD", scaling=scaling, min_samples=100)
    raw = (images(100, 0, 0) * 4).floor().to(torch.uint8)
    record = metric(scaling.encode(raw, rng=Rng(1)), scaling.encode(raw))
    assert record.value < 1e-7 and record.rounding == "4 levels"
    assert torch.cat(extractor.seen).unique().tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_frechet_refuses_few_samples_and_the_name_fid():
    few = images(100, 0)
    with pytest.raises(ValueError, match=r"at least 2048 samples.*100 and 100.*allow_small"):
        Frechet(Halves(), "halves-FD")(few, few)
    assert Frechet(Halves(), "halves-FD", allow_small=True)(few, few).small
    with pytest.raises(ValueError, match="2 samples cannot fill a covariance of 2"):
        Frechet(Halves(), "halves-FD", min_samples=2)(few[:2], few)
    for name in ("FID", "LeNet-FID", "fid10k"):
        with pytest.raises(ValueError, match="no Inception"):
            Frechet(Halves(), name)

    class InceptionV3(Halves):
        pass

    assert Frechet(InceptionV3(), "FID").name == "FID"


def test_frechet_refuses_features_that_are_not_vectors_and_restores_the_mode():
    extractor = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match=r"Sequential returned features of shape \(100, 1, 4, 4\)"):
        Frechet(extractor, "pixel-FD", min_samples=100)(images(100, 0), images(100, 1))
    assert extractor.training


# Refusals -----------------------------------------------------------------------------------------------------------

METRICS = [
    lambda x, y: sliced_w2(x, y, rng=Rng(0)),
    mmd,
    energy_distance,
    frechet_distance,
    lambda x, y: c2st(x, y, rng=Rng(0), steps=1),
]


@pytest.mark.parametrize("metric", METRICS)
def test_samples_that_cannot_be_compared_are_refused(metric):
    x = gaussian(30, 4, Rng(0))
    holed = x.clone()
    holed[3, 1] = math.nan
    for bad, error, words in [
        (holed, ValueError, "y holds 1 NaN"),
        (x[:1], ValueError, "y: expected at least"),
        (x[:, :3], ValueError, r"\(4,\), y of shape \(3,\)"),
        (x[:, 0], ValueError, "y: expected"),
        ((x * 9).to(torch.uint8), TypeError, "float64 and y torch.uint8"),
    ]:
        with pytest.raises(error, match=words):
            metric(x, bad)


def test_bandwidths_and_projections_must_be_positive():
    x = gaussian(30, 4, Rng(0))
    for bandwidths in (0.0, [1.0, -1.0], [], [math.inf]):
        with pytest.raises(ValueError, match="bandwidths are positive"):
            mmd(x, x, bandwidths=bandwidths)
    with pytest.raises(ValueError, match="median"):
        mmd(torch.ones(5, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="projections"):
        sliced_w2(x, x, projections=0, rng=Rng(0))
