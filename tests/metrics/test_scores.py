"""Metrics with errors: what is planted is found, equal laws are at chance, errors cover, pairs share."""

import math

import pytest
import torch

from scoresde.metrics import (
    Score,
    c2st_score,
    density_coverage,
    frechet_score,
    kernel_score,
    kid,
    memorisation,
    precision_recall,
    score,
)
from scoresde.metrics.jackknife import without
from scoresde.noise.rng import Rng


def gaussian(n, seed, dims=2, mean=0.0, std=1.0):
    return mean + std * Rng(seed).normal((n, dims), dtype=torch.float64)


def neighbours(made, held_out, k_pr=3, k_dc=5):
    return precision_recall(made, held_out, held_out, k=k_pr) | density_coverage(made, held_out, held_out, k=k_dc)


# Neighbours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_neighbour_shares_equal_their_definitions_also_across_blocks(k, monkeypatch):
    monkeypatch.setattr("scoresde.metrics.pairs._ENTRIES", 100)
    x, y = gaussian(37, 0, 3), gaussian(29, 1, 3, 0.5)
    apart = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1).sqrt()  # noqa: E731
    radius = lambda a: apart(a, a).sort(1).values[:, k]  # noqa: E731
    real, made = apart(x, y) <= radius(y), apart(y, x) <= radius(x)
    expected = {
        "precision": real.any(1).double().mean(), "recall": made.any(1).double().mean(),
        "density": real.sum(1).double().mean() / k, "coverage": real.any(0).double().mean(),
    }  # fmt: skip
    assert neighbours(x, y, k, k) == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-12)


def test_equal_laws_have_density_one_and_the_coverage_of_naeem():
    """E density = 1 exactly, as each sample is in a ball with probability k/m, up to O(1/m). E coverage is
    1 − Π_{i<k} (m − 1 − i)/(n + m − 1 − i), their Lemma 2."""
    n, k, found = 200, 5, []
    for seed in range(30):
        found.append(density_coverage(gaussian(n, 2 * seed), gaussian(n, 2 * seed + 1), torch.empty(0), k=k))
    for name, expected in (
        ("density", 1.0),
        ("coverage", 1 - math.prod((n - 1 - i) / (2 * n - 1 - i) for i in range(k))),
    ):
        values = torch.tensor([each[name] for each in found])
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(30) + 1 / n, name


def test_a_dropped_mode_is_found_and_a_wrong_one_too():
    """Two far Gaussians: one alone reaches half of the data and is precise; one that is nowhere is neither."""
    data = torch.cat([gaussian(200, 0), gaussian(200, 1, mean=50.0)])
    half = neighbours(gaussian(400, 2), data)
    assert half["recall"] <= 0.5 and half["coverage"] <= 0.5 and half["precision"] > 0.9
    wrong = neighbours(torch.cat([gaussian(200, 3), gaussian(200, 4, mean=-50.0)]), data)
    assert wrong["precision"] <= 0.5 and wrong["density"] < 0.7 and wrong["coverage"] <= 0.5
    both = neighbours(torch.cat([gaussian(200, 5), gaussian(200, 6, mean=50.0)]), data)
    assert min(both.values()) > 0.8


def test_points_on_the_border_are_inside_whatever_round_off_says():
    """Copies of data with many duplicates, whose balls have radius 0, far from the origin."""
    data = (1e3 + torch.arange(12.0)[:, None].expand(12, 3)).repeat(8, 1)
    assert neighbours(data.clone(), data) == {"precision": 1, "recall": 1, "density": 8 / 5, "coverage": 1}


# Memorisation -------------------------------------------------------------------------------------------------------


def test_planted_copies_are_found_and_nothing_else():
    train, held_out = gaussian(400, 0, 5), gaussian(100, 1, 5)
    new = memorisation(gaussian(300, 2, 5), held_out, train)
    for value, stderr in new.values():
        assert abs(value) < 4 * stderr
    for share in (0.2, 1.0):
        count = round(300 * share)
        planted = torch.cat([train[:count] + 1e-3, gaussian(300 - count, 3, 5)])
        found = memorisation(planted, held_out, train)
        for name, (value, stderr) in found.items():
            assert abs(value - share) < 4 * stderr, name
        # one held-out point to four of training says little of new and old, but copies stand out by themselves
        assert found["copies"][0] > 4 * new["copies"][1] and (
            share < 1 or found["memorised"][0] > 4 * new["memorised"][1]
        )
    assert memorisation(held_out, held_out, train)["memorised"][0] == pytest.approx(-4)  # (0 − 0.8)/0.2


def test_the_error_of_memorised_covers_and_has_its_closed_form():
    """Of samples that know nothing of the split; and the variance is that of all divisions of 6 points, counted."""
    z = []
    for seed in range(200):
        x, y, t = gaussian(60, 3 * seed), gaussian(30, 3 * seed + 1), gaussian(50, 3 * seed + 2)
        value, stderr = memorisation(x, y, t)["memorised"]
        z.append(value / stderr)
    z = torch.tensor(z)
    # mean 0 ± 1/√200, and a variance of 1 ± √(2/200)
    assert abs(float(z.mean())) < 4 / math.sqrt(200) and abs(float(z.var()) - 1) < 4 * math.sqrt(2 / 200)
    from itertools import combinations

    points, x = gaussian(6, 7), gaussian(9, 8)
    nearest = torch.cdist(x, points).argmin(1).tolist()
    shares = [sum(i in chosen for i in nearest) / 9 for chosen in combinations(range(6), 4)]
    spread = float(torch.tensor(shares, dtype=torch.float64).std(correction=0)) / (1 - 4 / 6)
    assert memorisation(x, points[4:], points[:4])["memorised"][1] == pytest.approx(spread, rel=1e-12)


# Errors -------------------------------------------------------------------------------------------------------------


def drawn(metric, name, repeats, n, shift, **settings):
    scores = []
    for seed in range(repeats):
        made, real = gaussian(n, 2 * seed, mean=shift), gaussian(n, 2 * seed + 1)
        scores.append(score(lambda *sets: metric(*sets, **settings), name, made, real, real, groups=10)[name])
    return torch.tensor([each.value for each in scores]), torch.tensor([each.stderr for each in scores])


@pytest.mark.parametrize(
    ("metric", "name", "most"),
    [(kernel_score, "kernel", 1), (frechet_score, "frechet", 1), (precision_recall, "recall", 4)],
)
def test_errors_are_the_spread_of_repeated_draws(metric, name, most):
    """The mean of stderr² is the variance of the values: over 40 draws that is known to √(2/39) = 0.23 of itself, and
    the mean of 40 estimates with 9 degrees of freedom each to √(2/9/40) = 0.07. A jackknife counts the part of a
    statistic in which r points meet r times (Efron & Stein 1981, theorem 1): k + 1 = 4 for third neighbours."""
    values, errors = drawn(metric, name, 40, 80, 1.0)
    ratio = float((errors**2).mean() / values.var())
    assert 0.5 < ratio < most * (1 + 4 * 0.24)  # an error that were of one sample alone would be about half


def test_frechet_covers_its_closed_form():
    """|δ|² for equal covariances, here 2; biased upwards by 2 D/n + D (D + 1)/(2 n), which is taken off."""
    n, dims = 200, 2
    values, errors = drawn(frechet_score, "frechet", 30, n, 1.0)
    z = (values - 2 - 2 * dims / n - dims * (dims + 1) / (2 * n)) / errors
    assert float((z.abs() < 2).double().mean()) > 0.8  # 95 % of a normal; 4 σ of 30 draws below is 0.79
    assert abs(float(z.mean())) < 4 / math.sqrt(30) * float(z.std())


def test_the_kernel_distance_of_equal_laws_is_0_within_errors_that_are_not_too_small():
    values, errors = drawn(kernel_score, "kernel", 40, 60, 0.0)
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(40)
    assert float((values.abs() < 2 * errors).double().mean()) > 0.8
    assert float((errors**2).mean()) > 0.7 * float(values.var())


def test_kid_is_its_definition():
    x, y = gaussian(7, 0, 3), gaussian(5, 1, 3)
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3  # noqa: E731
    off = lambda a: (kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1))  # noqa: E731
    assert kid(x, y) == pytest.approx(float(off(x) + off(y) - 2 * kernel(x, y).mean()), rel=1e-12)


def test_c2st_is_at_chance_for_equal_laws_and_states_its_own_error():
    calls = []

    def metric(*sets):
        calls.append(1)
        return c2st_score(*sets, steps=100)

    found = score(metric, "c2st", gaussian(500, 0), gaussian(400, 1), torch.empty(0))["c2st"]
    assert abs(found.value - 0.5) < 4 * found.stderr and found.stderr == pytest.approx(0.5 / 20, rel=0.05)
    assert len(calls) == 1 and found.left_out == ()
    assert c2st_score(gaussian(400, 0, mean=3.0), gaussian(400, 1), torch.empty(0), steps=100)[0] > 0.9


def mean_gap(made, held_out, train):
    return float(made.mean() - held_out.mean())


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """With groups of one it is the textbook's to the last digit; both samples count."""
    made, real = gaussian(60, 0, 1), gaussian(60, 1, 1, std=2.0)
    found = score(mean_gap, "gap", made[:30], real[:30], real, groups=15)["gap"]
    pairs = lambda x: torch.stack([x[Rng(0).permutation(30)[g::15]].mean() for g in range(15)])  # noqa: E731
    differences = pairs(made[:30]) - pairs(real[:30])
    assert found.stderr == pytest.approx(float(differences.std()) / math.sqrt(15), rel=1e-9)
    kept = torch.cat([without(torch.arange(7), g, 3) for g in range(3)])
    assert sorted(kept.tolist()) == sorted(2 * list(range(7)))  # every one is left out once


def test_samplers_that_share_seeds_are_compared_by_paired_errors():
    """b is a and a shift of 0.01 with noise of 0.01: the difference is known to 0.01/√n, each alone to 0.1."""
    real, a = gaussian(100, 0, 1), gaussian(100, 1, 1)
    b = a + 0.01 + 0.01 * gaussian(100, 2, 1)
    first, second = (score(mean_gap, "gap", x, real, real)["gap"] for x in (a, b))
    gap = second.minus(first)
    assert gap.value == pytest.approx(second.value - first.value) and first.stderr > 0.08
    assert 0.0004 < gap.stderr < 0.002 and abs(gap.value - 0.01) < 4 * gap.stderr
    assert Score(1.0, 0.3).minus(Score(0.5, 0.4)) == Score(0.5, 0.5)


def test_what_cannot_be_measured_is_refused():
    x = gaussian(50, 0, 60)
    with pytest.raises(ValueError, match="50 samples cannot fill the covariance of 60 features"):
        frechet_score(x, x, x)
    with pytest.raises(ValueError, match="at least 40 samples; got 39"):
        score(mean_gap, "gap", x[:39], x, x)
    with pytest.raises(ValueError, match="at least 40 held-out points; got 12"):
        score(mean_gap, "gap", x, x[:12], x)
    for result in ("much", None, (1.0,), {"a": [1]}):
        with pytest.raises(TypeError, match=r"expected a number, \(number, standard error\), or a mapping"):
            score(lambda *_, result=result: result, "gap", x, x, x)
    with pytest.raises(ValueError, match="x: expected at least 4 samples"):
        precision_recall(x[:3], x, x)
    with pytest.raises(ValueError, match="ratio"):
        memorisation(x, x, x, ratio=1.5)
