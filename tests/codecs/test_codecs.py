"""Codecs against autograd, quadrature and PyTorch's own rearrangements."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scoresde import Rng
from scoresde.codecs import Centred, Chain, Codec, Patches, Scaling, Standardise
from scoresde.config import build
from scoresde.data import Dataset, Split
from scoresde.data.excerpt import packed


def draw(*shape: int, seed: int = 0) -> Tensor:
    return Rng(seed).normal(shape, dtype=torch.float64)


TABLE = draw(400, 3) * torch.tensor([1.0, 10.0, 100.0]) + torch.tensor([0.0, -7.0, 1013.0])
SKEWED = torch.stack([TABLE[:, 0], TABLE[:, 0].exp() * 3, draw(400, seed=1).sinh()], 1)
COUNTS = torch.stack([Rng(3).integers(7, (400,)), Rng(4).integers(5, (400,)) ** 2], 1)
MIXED = torch.stack([SKEWED[:, 1], COUNTS[:, 1].double()], 1).float()
POINTS = draw(5, 4, 3)
POINTS = POINTS - POINTS.mean(1, keepdim=True)

CONTINUOUS: dict[str, tuple[Codec, Tensor]] = {
    "scaling": (Scaling(-2, 3, raw_low=-0.5, raw_high=4, bounded=False), draw(4, 3)),
    "standardise": (Standardise.of(TABLE), TABLE[:4]),
    "log": (Standardise.of(SKEWED, log=(1,)), SKEWED[:4]),
    "quantile": (Standardise.of(SKEWED, quantile=("all",)), SKEWED[:4] * 3),  # beyond the last quantile, too
    "channels": (Standardise.of(TABLE.T.reshape(20, 3, 20)), draw(2, 3, 4)),
    "patches": (Patches(2), draw(2, 2, 4)),
    "centred": (Centred.of(POINTS), POINTS),
    "chain": (Chain((Standardise.of(draw(9, 2, 8).exp(), log=(0,)), Patches((2,)))), draw(2, 2, 4).exp()),
    "chain of points": (Chain((Centred(0.7), Scaling(-1, 1, raw_low=-3, raw_high=3, bounded=False))), POINTS),
}


@pytest.mark.parametrize("codec, raw", CONTINUOUS.values(), ids=CONTINUOUS)
def test_log_volume_is_the_log_determinant_of_autograd(codec: Codec, raw: Tensor) -> None:
    """½ log det J Jᵀ is log |det J| of a square J, and of a map of a subspace by orthonormal rows the volume there. J
    has D ≤ 24 rows, a condition number below 1e3, and J Jᵀ one below 1e6: rounding costs D · 1e6 · 1e-16."""
    found = codec.log_volume(raw, codec.encode(raw))
    assert found.shape == (len(raw),) and found.dtype == torch.float64
    for row, volume in zip(raw, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda value: codec.transform(value[None])[0].flatten(), row)
        j = jacobian.flatten(1)
        assert float(volume) == pytest.approx(0.5 * float(torch.linalg.slogdet(j @ j.T).logabsdet), abs=1e-8)


@pytest.mark.parametrize("codec, raw", CONTINUOUS.values(), ids=CONTINUOUS)
def test_decode_undoes_encode(codec: Codec, raw: Tensor) -> None:
    """In double precision to rounding, amplified by slopes of up to 1e3; in float32 likewise."""
    x = codec.encode(raw)
    assert tuple(x.shape[1:]) == codec.encoded_shape(raw.shape[1:])
    torch.testing.assert_close(codec.decode(x), raw, rtol=1e-10, atol=1e-10)
    single = codec.decode(codec.encode(raw.float()))
    torch.testing.assert_close(single, raw.float(), rtol=1e-4, atol=1e-4)


DISCRETE: dict[str, tuple[Codec, Tensor]] = {
    "int8": (Scaling(levels=9, offset=-4), torch.arange(-4, 5, dtype=torch.int8)[:, None]),
    "int16": (Scaling(levels=65536, offset=-32768), torch.tensor([[-32768], [-1], [0], [32767]], dtype=torch.int16)),
    "CT": (Scaling(levels=4096, offset=-1024), torch.tensor([[-1024, 3071]], dtype=torch.int16)),
    "integers": (Standardise.of(COUNTS), COUNTS),
    "log": (Standardise.of(COUNTS, log=(1,)), COUNTS),
    "quantile": (Standardise.of(COUNTS.float(), quantile=("all",)), COUNTS.float()),
    "patches": (Chain((Scaling(levels=7), Patches(2))), COUNTS[:, 0].reshape(20, 1, 20).byte()),
    "channels": (Standardise.of(COUNTS.reshape(20, 2, 20).int()), COUNTS.reshape(20, 2, 20).int()),
}


@pytest.mark.parametrize("codec, raw", DISCRETE.values(), ids=DISCRETE)
def test_integers_come_back_from_anywhere_in_their_bins(codec: Codec, raw: Tensor) -> None:
    assert codec.discrete
    for rng in (None, Rng(0), Rng(1)):
        x = codec.encode(raw, rng=rng)
        assert x.dtype == torch.float32 and torch.equal(codec.decode(x), raw)
        assert codec.decode(x).dtype == codec.raw_dtype == raw.dtype


@pytest.mark.parametrize("codec, raw", DISCRETE.values(), ids=DISCRETE)
def test_dequantised_values_are_uniform_in_their_bins_which_are_the_volume(codec: Codec, raw: Tensor) -> None:
    """Kolmogorov's distance of n uniforms exceeds 1.95/√n in 1 of 1,000 cases; float32 rounds where bins are narrow."""
    edges = codec.bins(raw)
    assert edges is not None
    low, high = edges
    raws = raw.repeat(math.ceil(4000 / raw.numel()), *[1] * (raw.ndim - 1))
    x = codec.encode(raws, rng=Rng(5)).double()
    times = len(raws) // len(raw)
    low, high = (edge.repeat(times, *[1] * (edge.ndim - 1)) for edge in (low, high))
    u = ((x - low) / (high - low)).flatten().sort().values
    assert float(u[0]) > -0.01 and float(u[-1]) < 1.01
    distance = (u - torch.arange(1, len(u) + 1) / len(u)).abs().max()
    assert float(distance) < 1.95 / math.sqrt(len(u)) + 0.01
    torch.testing.assert_close(codec.log_volume(raws, x), (high - low).log().flatten(1).sum(1), rtol=1e-9, atol=1e-9)


class Nodes:
    """A source of numbers that are given."""

    def __init__(self, u: Tensor):
        self.u = u

    def uniform(self, shape, *, dtype, device) -> Tensor:
        return self.u.expand(shape).to(device, dtype)


GRIDS = {
    "scaling": (Scaling(-1.5, 1.0, levels=5, offset=-2), (range(-2, 3), range(-2, 3))),
    "standardise": (Standardise.of(COUNTS), (range(-30, 40), range(-60, 80))),
    "log": (Standardise.of(COUNTS, log=(0, 1)), (range(0, 80), range(0, 400))),
    "patches": (Chain((Scaling(levels=6), Patches(2))), (range(6), range(6))),
}


@pytest.mark.parametrize("codec, ranges", GRIDS.values(), ids=GRIDS)
def test_probabilities_over_all_integers_sum_to_the_mass_of_their_bins(codec: Codec, ranges) -> None:
    """P(k) = ∫ p(x(k + u)) e^log_volume du with p = N((0.2, −0.3), Σ), correlated, by Gauss–Legendre of 6 points a bin.
    The integers are all that there are, or all that p knows, so the sum is the mass of p on the product of their bins:
    1 but for what lies outside. Bins are at most 1.6 deviations wide; x is rounded to float32, 1e-7 relative."""
    first, second = (torch.tensor(list(each)) for each in ranges)
    shape = (1, 2) if "Patches" in repr(codec) else (2,)
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(6))
    law = torch.distributions.MultivariateNormal(
        torch.tensor([0.2, -0.3], dtype=torch.float64), torch.tensor([[0.4, 0.15], [0.15, 0.3]], dtype=torch.float64)
    )
    grid = torch.cartesian_prod(first, second).reshape(-1, *shape)
    total = torch.zeros((), dtype=torch.float64)
    for u, wu in zip((nodes + 1) / 2, weights / 2, strict=True):
        for v, wv in zip((nodes + 1) / 2, weights / 2, strict=True):
            x = codec.encode(grid, rng=Nodes(torch.stack([u, v]).reshape(shape)))
            total += wu * wv * (law.log_prob(x.double().flatten(1)) + codec.log_volume(grid, x)).exp().sum()
    low, high = codec.bins(grid)
    inside = mass(law, low.flatten(1).amin(0), high.flatten(1).amax(0))
    assert float(total) == pytest.approx(inside, abs=2e-6)
    if min(ranges[0]) < -2:  # all that p knows
        assert inside == pytest.approx(1.0, abs=1e-9)


def mass(law, low: Tensor, high: Tensor) -> float:
    """P(low < x < high) of a normal vector in the plane, by the conditional law of the second given the first."""
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(400))
    (m1, m2), cov = law.mean, law.covariance_matrix
    low, high = low.clamp(-9, 9), high.clamp(-9, 9)
    x = low[0] + (nodes + 1) / 2 * (high[0] - low[0])
    marginal = torch.distributions.Normal(m1, cov[0, 0].sqrt()).log_prob(x).exp()
    given = torch.distributions.Normal(
        m2 + cov[0, 1] / cov[0, 0] * (x - m1), (cov[1, 1] - cov[0, 1] ** 2 / cov[0, 0]).sqrt()
    )
    return float(((given.cdf(high[1]) - given.cdf(low[1])) * marginal * weights).sum() * (high[0] - low[0]) / 2)


def test_a_table_of_integers_and_floats_has_a_density_that_sums_to_one() -> None:
    """Σ_k ∫ dv p(x(v, k)) e^log_volume with p = N(0, I), v by a rule of 1,001 points in log v, k over all that p
    knows, the bins by Gauss–Legendre as above. The trapezium rule of a smooth bump is exact to rounding."""
    codec = Standardise.of(MIXED, log=(0,))
    assert codec.integers == (1,) and codec.discrete and codec.raw_dtype == torch.float32
    log_v, k = torch.linspace(-12, 14, 1001, dtype=torch.float64), torch.arange(-60, 90, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(6))
    grid = torch.cartesian_prod(log_v, k)
    raw = torch.stack([grid[:, 0].exp(), grid[:, 1]], 1)
    total = 0.0
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        x = codec.encode(raw, rng=Nodes(u.reshape(1)))
        density = -0.5 * x.square().sum(1) - math.log(2 * math.pi) + codec.log_volume(raw, x)
        total += float(w) * float((density + grid[:, 0]).exp().sum()) * float(log_v[1] - log_v[0])
    assert total == pytest.approx(1.0, abs=1e-6)


ALL = {**CONTINUOUS, **{f"integers, {name}": each for name, each in DISCRETE.items()}}


@pytest.mark.parametrize("codec, raw", ALL.values(), ids=ALL)
def test_what_a_sample_becomes_depends_on_its_own_stream_alone(codec: Codec, raw: Tensor) -> None:
    n = min(len(raw), 4)
    batch = codec.encode(raw[:n], rng=Rng(seeds=range(n)))
    for row in range(n):
        torch.testing.assert_close(
            batch[row : row + 1], codec.encode(raw[row : row + 1], rng=Rng(seeds=[row])), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("codec, raw", ALL.values(), ids=ALL)
def test_a_run_folder_keeps_a_codec_as_json(codec: Codec, raw: Tensor) -> None:
    raw = raw.float() if raw.is_floating_point() else raw
    _, record = packed(Dataset("made", Split(raw), Split(raw), codec))
    again = build(json.loads(json.dumps(record["codec"])), key="codec")
    assert again == codec and hash(again) == hash(codec) and torch.equal(again.encode(raw), codec.encode(raw))


def test_standardised_columns_have_mean_0_and_deviation_1_each() -> None:
    """Over all rows that were measured, in float64, to rounding; integers with 12 draws of uniform noise to 5 standard
    errors, 1/√(12 n) of the mean and at most 1.5/√(12 n) of the deviation."""
    for codec, raw in (ALL["standardise"], ALL["log"], ALL["quantile"]):
        whole = TABLE if codec == ALL["standardise"][0] else SKEWED
        x = codec.encode(whole)
        assert float(x.mean(0).abs().max()) < 1e-12 and float((x.std(0, correction=0) - 1).abs().max()) < 1e-12
        assert raw.shape[1] == whole.shape[1]
    for name in ("integers", "log", "quantile"):
        codec, raw = DISCRETE[name]
        x = codec.encode(raw.repeat(12, 1), rng=Rng(0)).double()
        assert float(x.mean(0).abs().max()) < 5 / math.sqrt(len(x))
        assert float((x.std(0) - 1).abs().max()) < 7.5 / math.sqrt(len(x))


def test_large_means_do_not_cost_digits() -> None:
    """A year ± 3 in float32: what is stored is exact, so the result is to float32's rounding of itself."""
    years = (2015 + 3 * draw(500, 1)).float()
    codec = Standardise.of(years)
    exact = (years.double() - codec.mean[0]) / codec.std[0]
    assert float((codec.encode(years).double() - exact).abs().max()) < 3e-7


def test_a_table_of_quantiles_makes_any_column_about_normal() -> None:
    """n = 400 values at 20 quantiles: the distance of distributions is below a quarter of the mass between two."""
    x = Standardise.of(SKEWED, quantile=("all",)).encode(SKEWED)
    for column in x.T:
        ranks = (torch.arange(len(column)) + 0.5) / len(column)
        assert float((torch.special.ndtr(column.sort().values) - ranks).abs().max()) < 0.04


def test_a_column_of_ties_is_mapped_by_an_increasing_map() -> None:
    raw = torch.cat([torch.zeros(300, 1), draw(100, 1).float().abs() + 0.5])
    codec = Standardise.of(raw, quantile=(0,), integers=())
    x = codec.encode(torch.linspace(-1, 4, 1000)[:, None])
    assert bool((x.diff(dim=0) > 0).all()) and torch.allclose(
        codec.decode(x), torch.linspace(-1, 4, 1000)[:, None], atol=1e-4
    )


@pytest.mark.parametrize("shape, size", [((2, 3, 4, 6), 2), ((1, 1, 6, 6), 3)])
def test_patches_of_pictures_are_pixel_unshuffle(shape, size) -> None:
    x = draw(*shape)
    assert torch.equal(Patches(size).encode(x), F.pixel_unshuffle(x, size))


def test_patches_of_signals_and_videos_are_where_they_are_said_to_be() -> None:
    signal = torch.arange(12.0).reshape(1, 2, 6)
    assert Patches(2).encode(signal)[0].tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    video = draw(2, 1, 3, 4, 6)
    frames = F.pixel_unshuffle(video[:, 0], 2)  # (2, 12, 2, 3): frame by frame
    assert torch.equal(Patches((1, 2, 2)).encode(video), frames.unflatten(1, (3, 4)).transpose(1, 2))


def test_centred_points_turn_with_the_points_and_keep_distances() -> None:
    codec = Centred.of(POINTS)
    q, _ = torch.linalg.qr(draw(3, 3, seed=9))
    torch.testing.assert_close(codec.encode(POINTS @ q.T), codec.encode(POINTS) @ q.T, rtol=0, atol=1e-12)
    x = codec.encode(POINTS) * codec.scale
    torch.testing.assert_close(x.flatten(1).norm(dim=1), POINTS.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    assert float(codec.encode(POINTS).square().mean()) == pytest.approx(1.0, abs=1e-12)
    moved = Centred(codec.scale, move=True).encode(POINTS + 5)
    torch.testing.assert_close(moved, codec.encode(POINTS), rtol=0, atol=1e-12)


NAMED = Standardise.of(SKEWED, columns=("a", "price", "c"), log=("price",), high={"a": 50.0})
ROWS = SKEWED[:6].clone()


def changed(row: int, column: int, value: float) -> Tensor:
    raw = ROWS.clone()
    raw[row, column] = value
    return raw


WHOLE = Standardise.of(MIXED, columns=("v", "n"))
REFUSED = {
    "NaN": (lambda: NAMED.encode(changed(4, 2, math.nan)), r"column 'c', row 4: nan is no finite number"),
    "log": (lambda: NAMED.encode(changed(2, 1, 0.0)), r"column 'price', row 2: 0 has no logarithm"),
    "bound": (lambda: NAMED.encode(changed(3, 0, 51.0)), r"column 'a', row 3: 51 is above its bound"),
    "fraction": (lambda: WHOLE.encode(torch.tensor([[1.0, 2.0], [1.0, 2.5]])), r"column 'n', row 1: 2\.5 is not whole"),
    "columns": (lambda: NAMED.encode(ROWS[:, :2]), r"shape \(6, 2\), expected \(N, 3\)"),
    "no such column": (
        lambda: Standardise.of(ROWS, columns=("a", "b", "c"), log=("d",)),
        "no column 'd'. They are a",
    ),
    "constant": (lambda: Standardise.of(torch.full((9, 1), 0.5)), r"Column 0 holds 0\.5 in every row"),
    "log of less": (lambda: Standardise.of(TABLE, log=(1,)), r"Column 1 goes down to -\d+\.\d+, and has no logarithm"),
    "both maps": (lambda: Standardise.of(SKEWED, log=(1,), quantile=(1,)), r"no column 1|in log= and in quantile="),
    "centre": (lambda: Centred().encode(torch.cat([POINTS, POINTS + 1])), r"5 of 10 .* first in row 5: \(1, 1, 1\)"),
    "no points": (lambda: Centred().encode(draw(3, 4)), r"N ≥ 2 points \(N, d\); got \(4,\)"),
    "patches": (lambda: Patches(3).encode(draw(1, 1, 8)), r"whose sizes they divide; got \(1, 8\)"),
    "no patches": (lambda: Patches(3).encode(draw(1, 8)), r"take samples \(C, L\).* got \(8,\)"),
    "levels": (lambda: Scaling(levels=2**24), "levels is at most 8388608"),
    "offset": (lambda: Scaling(levels=4, offset=-2).encode(torch.tensor([[-3]])), r"-3 … -3, expected integers -2 … 1"),
    "chain": (lambda: Chain((Patches(2), Scaling(levels=4))), "its first one alone takes integers"),
    "chain of points": (lambda: Chain((Scaling.identity(), Centred())), "or removes a centre"),
    "decode": (lambda: NAMED.decode(changed(0, 0, math.inf)), "sampling failed before"),
    "no increase": (
        lambda: Standardise((0.0,), (1.0,), quantiles=((0.0, 1.0, 1.0),)),
        "quantiles of a column increase",
    ),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_column_and_row(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_integers_where_floats_are_expected_are_refused() -> None:
    for codec in (Patches(2), Centred(), NAMED):
        with pytest.raises(TypeError, match="expected floating-point values"):
            codec.encode(torch.ones(2, 3, 4, dtype=torch.int64) if codec != NAMED else torch.ones(2, 3).long())


def test_bounded_columns_are_decoded_within_their_bounds() -> None:
    codec = Standardise.of(COUNTS.float(), low={0: 0}, high={0: 6})
    far = torch.tensor([[-50.0, -50.0], [50.0, 50.0]])
    decoded = codec.decode(far)
    assert decoded[:, 0].tolist() == [0, 6]
    # without bounds: what training had; other integers are taken all the same, each with a bin of its own
    assert decoded[:, 1].tolist() == [float(COUNTS[:, 1].min()), float(COUNTS[:, 1].max())]
    other = torch.full((1, COUNTS.shape[1]), 3.0).index_fill(1, torch.tensor([1]), 1.0 + float(COUNTS[:, 1].max()))
    assert bool(codec.log_volume(other, codec.encode(other)).isfinite())
    low, high = codec.bins(COUNTS.float(), open_ends=True)
    assert torch.equal(low[:, 0].isinf(), COUNTS[:, 0] == 0) and torch.equal(high[:, 0].isinf(), COUNTS[:, 0] == 6)
    assert not bool(low[:, 1].isinf().any())
