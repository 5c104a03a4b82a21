"""A cascade of exact models: its density, its samples, what it is told, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde import (
    DDIM,
    VPSDE,
    Budget,
    Cascade,
    Exact,
    GaussianMixtureDenoiser,
    Prediction,
    Rng,
    Run,
    Sampler,
    Tolerance,
)
from scoresde.codecs import Codec, Haar, HaarLow, LiftedDetails, Scaling
from scoresde.config import ConfigError
from scoresde.data import Dataset, Split
from scoresde.data.recode import haar_details, haar_low, upsampled
from scoresde.diffusion.conditions import Cond, named
from scoresde.diffusion.denoiser import Denoiser, DenoiserWrapper

SHAPE = (1, 4, 2)
SDE = VPSDE(beta_max=60.0, t_min=1e-6)  # of the data nothing is left at t_max: α = 3e-7
FLOATS = Scaling(-1, 1, raw_low=-4, raw_high=6, bounded=False)


class Mixture:
    """Two Gaussians over Haar bands (low, details) of SHAPE, x their model data; float64."""

    def __init__(self) -> None:
        make = Rng(11)
        self.weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        self.means = 0.4 * make.normal((2, 8), dtype=torch.float64)
        root = make.normal((2, 8, 8), dtype=torch.float64)
        self.covs = 0.02 * root @ root.mT + 0.05 * torch.eye(8, dtype=torch.float64)

    def log_parts(self, x: Tensor, k: slice) -> Tensor:
        """log w_k N(x; mean, cov) (B, 2) of the bands in `k`."""
        normal = torch.distributions.MultivariateNormal(self.means[:, k], self.covs[:, k, k])
        return self.weights.log() + normal.log_prob(x[:, None])

    def details_given(self, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (B, 2), means (B, 2, 6) and covariances (2, 6, 6) of details | low (B, 2)."""
        a, b = slice(0, 2), slice(2, 8)
        gain = self.covs[:, b, a] @ torch.linalg.inv(self.covs[:, a, a])
        means = self.means[:, b] + torch.einsum("kij,bkj->bki", gain, low[:, None] - self.means[:, a])
        return self.log_parts(low, a).softmax(1), means, self.covs[:, b, b] - gain @ self.covs[:, a, b]


class Details(Denoiser):
    """The exact posterior mean of details (3, 2, 1) given cond["image"] (1, 2, 1), the mean of each block."""

    def __init__(self, mixture: Mixture):
        super().__init__(SDE)
        self.mixture, self.told = mixture, list[Cond]()

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        self.told.append(cond)
        scales, z = self.sde.at(t, x), x.double().flatten(1)
        alpha, sigma = (value.double().reshape(-1, 1) for value in (scales.alpha, scales.sigma))
        weights, means, covs = self.mixture.details_given(2 * named(cond)["image"].double().flatten(1))
        noised = alpha[..., None, None] ** 2 * covs + sigma[..., None, None] ** 2 * torch.eye(6, dtype=torch.float64)
        off = z[:, None] - alpha[..., None] * means
        solved = torch.linalg.solve(noised, off[..., None])[..., 0]
        log = weights.log() - 0.5 * (off * solved).sum(-1) - 0.5 * torch.logdet(noised)
        posterior = means + alpha[..., None] * torch.einsum("kij,bkj->bki", covs, solved)
        x0 = (log.softmax(1)[..., None] * posterior).sum(1)
        eps = (z - alpha * x0) / sigma
        return Prediction(x0.reshape(x.shape).to(x), eps.reshape(x.shape).to(x), scales)


def data(codec: Codec = FLOATS, shape: Sequence[int] = SHAPE, n: int = 40, seed: int = 2) -> Dataset:
    raw = 0.3 * Rng(seed).normal((n, *shape))
    if codec.discrete:
        raw = Rng(seed).integers(256, (n, *shape)).to(torch.uint8)
    return Dataset("mine", Split(raw), Split(raw), codec)


def run(dataset: Dataset, denoiser: Denoiser, name: str, **network: Any) -> Run:
    conditional = bool(dataset.test.conditions) or dataset.classes > 0
    config = {"network": {"cond_dropout": 0.0, **network}}
    return Run(Path(name), config, 1, "0" * 64, dataset, denoiser.eval(), conditional)


def exact() -> tuple[Mixture, Cascade]:
    mixture, dataset = Mixture(), data()
    low = GaussianMixtureDenoiser(mixture.means[:, :2], mixture.covs[:, :2, :2], mixture.weights, SDE)
    base = run(haar_low(dataset), Shaped(low), "low")
    return mixture, Cascade([base, run(haar_details(dataset), Details(mixture), "details")])


class Shaped(DenoiserWrapper):
    """A denoiser of vectors for events of any shape."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        p = self.denoiser(x.flatten(1), t, None)
        return Prediction(p.x0.reshape(x.shape), p.eps.reshape(x.shape), self.sde.at(t, x))


def test_the_chain_rule_is_the_density_of_the_mixture() -> None:
    """log p(low) + log p(details | low) + log_volume against the mixture's own density of the 8 bands, whose map to raw
    data has the volume 8 log slope. t_min = 1e-6 hides σ² = 1e-7 beside covariances ≥ 0.05: 8 · 1e-6 nats and below;
    the solver is held to 1e-6; float32 model data are off by 1e-7, which costs 1e-7/√0.05 · 3 a number.
    """
    mixture, cascade = exact()
    raw = data(n=2, seed=9).train.raw * 2
    found = cascade.log_likelihood(raw, solver=Tolerance(1e-6, 1e-6), divergence=Exact(), progress=False)
    bands = Haar().encode(FLOATS.encode(raw.double())).flatten(1)
    truth = mixture.log_parts(bands, slice(0, 8)).logsumexp(1) + 8 * math.log(0.2)
    assert float((found.log_prob - truth).abs().max()) < 2e-5
    torch.testing.assert_close(found.bits_per_dim, -found.log_prob / (8 * math.log(2)))
    assert found.latent.shape == (2, *SHAPE) and float(found.divergence_error.abs().max()) == 0


def test_stages_measured_by_themselves_add_up_to_the_whole() -> None:
    """Of integers too, each stage's Run dequantising by the same seeds: bits/dim of all numbers in a raw sample."""
    mixture = Mixture()
    dataset = data(Scaling(levels=256))
    low = GaussianMixtureDenoiser(mixture.means[:, :2], mixture.covs[:, :2, :2], mixture.weights, SDE)
    runs = [run(haar_low(dataset), Shaped(low), "low"), run(haar_details(dataset), Details(mixture), "details")]
    raw, how = dataset.test.raw[:3], {"solver": Budget(20), "divergence": Exact(), "progress": False}
    seeds = [3, 1, 4]
    each = [one.log_likelihood(raw, rng=Rng(seeds=seeds), **how) for one in runs]
    both = Cascade(runs).log_likelihood(raw, rng=Rng(seeds=seeds), **how)
    torch.testing.assert_close(both.log_prob, each[0].log_prob + each[1].log_prob, rtol=0, atol=1e-3)
    torch.testing.assert_close(both.bits_per_dim, each[0].bits_per_dim + each[1].bits_per_dim, rtol=0, atol=1e-3)
    assert both.evaluations == each[0].evaluations + each[1].evaluations


def test_samples_have_the_moments_of_the_mixture_and_the_low_band_of_the_first_stage() -> None:
    """4,000 samples by 40 DDIM steps: means to 5 standard errors and 0.01 for the steps; the residual is that of
    float32 sums of four values of about 1."""
    mixture, cascade = exact()
    x, kept = list[Tensor](), list[Tensor]()
    for stage in range(2):
        rows = Rng(seeds=range(4000))
        own = cascade.begin(stage, None, x[-1] if x else None, 0.0, rows)
        rows.skip(cascade.skipped(stage))
        made = cascade.runs[stage].draw(own, rows, sampler=Sampler(DDIM(), steps=40), batch_size=4000, progress=False)
        kept.append(made)
        x.append(made if stage == 0 else cascade.runs[stage].codec.joined(x[-1], made))
    low = HaarLow(FLOATS).low(x[1], 1)
    assert float((low - kept[0]).abs().max()) < 1e-6
    bands, mean = Haar().transform(x[1]).flatten(1).double(), (mixture.weights[:, None] * mixture.means).sum(0)
    error = bands.std(0) / math.sqrt(len(bands))
    assert bool(((bands.mean(0) - mean).abs() < 5 * error + 0.01).all())
    raw = cascade.sample(4, sampler=Sampler(DDIM(), steps=40), rng=Rng(seeds=range(4)), progress=False)
    torch.testing.assert_close(raw, FLOATS.decode(x[1][:4]), rtol=1e-4, atol=1e-4)


def test_a_sample_depends_on_its_own_seed_alone() -> None:
    _, cascade = exact()
    how: dict[str, Any] = {"sampler": Sampler(DDIM(eta=1.0), steps=6), "progress": False}
    whole = cascade.sample(5, rng=Rng(seeds=[5, 6, 7, 8, 9]), batch_size=2, **how)
    alone = cascade.sample(1, rng=Rng(seeds=[8]), **how)
    torch.testing.assert_close(whole[3:4], alone, rtol=0, atol=1e-5)
    assert float((whole[0] - whole[1]).abs().max()) > 1e-2


class Recording(Denoiser):
    """x̂_0 = 0, and what it was told."""

    def __init__(self) -> None:
        super().__init__(SDE)
        self.told = list[Mapping[str, Tensor]]()

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        self.told.append(named(cond))
        scales = self.sde.at(t, x)
        return Prediction(torch.zeros_like(x), x / scales.sigma, scales)


def labelled(dataset: Dataset) -> Dataset:
    split = replace(dataset.train, labels=torch.arange(len(dataset.train)) % 3)
    return replace(dataset, train=split, test=split, classes=3)


def published() -> tuple[Recording, Cascade]:
    shape, second = (1, 4, 4), Recording()
    dataset = labelled(data(Scaling(levels=256), shape))
    first = run(haar_low(dataset), Recording(), "base")
    return second, Cascade([first, run(upsampled(dataset), second, "fine", cond_noise=0.5)])


def test_the_published_form_is_told_a_noisy_picture_its_level_and_the_label() -> None:
    """√(1 − s²) picture + s ε at s = 0.3, where the picture is 0: its deviation is s, to 5 standard errors of 1,600."""
    second, cascade = published()
    how: dict[str, Any] = {"sampler": Sampler(DDIM(), steps=2), "progress": False}
    raw = cascade.sample(400, cond=2, level=0.3, batch_size=400, **how)
    told = second.told[0]
    assert raw.shape == (400, 1, 4, 4) and raw.dtype == torch.uint8
    assert told["level"].unique().tolist() == pytest.approx([0.3]) and told["label"].unique().tolist() == [2]
    assert float(told["image"].std()) == pytest.approx(0.3, abs=5 * 0.3 / math.sqrt(2 * 1600) + 0.02)
    cascade.sample(2, level=0.0, **how)
    assert set(second.told[-1]) == {"image", "label"}


def test_the_published_form_has_no_exact_likelihood_and_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no exact likelihood. One of codec=haar_low and codec=haar_details has"):
        published()[1].log_likelihood(data(Scaling(levels=256), (1, 4, 4)).test.raw, solver=Budget(5))


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda low, details, other, fine: [low], "two stages or more"),
        (lambda low, details, other, fine: [details, low], "no first stage"),
        (lambda low, details, other, fine: [low, low], "is told no image"),
        (lambda low, details, other, fine: [fine, details], "draws the details of"),
        (lambda low, details, other, fine: [low, other], "different data"),
        (lambda low, details, other, fine: [low, fine, details], "draws the details of"),
        (lambda low, details, other, fine: [fine, fine], "draws pictures of shape"),
    ],
)
def test_stages_that_do_not_fit_are_refused(build: Any, said: str) -> None:
    mine, others = data(), data(seed=7)
    low, details = run(haar_low(mine), Recording(), "low"), run(haar_details(mine), Recording(), "details")
    other, fine = run(haar_details(others), Recording(), "other"), run(upsampled(mine), Recording(), "fine")
    with pytest.raises(ConfigError, match=said):
        Cascade(build(low, details, other, fine))


def test_lists_and_levels_that_do_not_fit_are_refused() -> None:
    _, cascade = published()
    with pytest.raises(ConfigError, match=r"list of 2"):
        cascade.sample(1, guidance=[1.0])
    with pytest.raises(ConfigError, match=r"up to cond_noise=0.5"):
        cascade.sample(1, level=0.7)
    with pytest.raises(ConfigError, match=r"lies in \[0, 1\]"):
        cascade.sample(1, level=-1.0)


def test_three_stages_draw_a_whole() -> None:
    dataset = data(Scaling(levels=256), (1, 8, 8))
    runs = [
        run(haar_low(dataset, level=2), Recording(), "a"),
        *(run(haar_details(dataset, level=level), Recording(), "b") for level in (2, 1)),
    ]
    raw = Cascade(runs).sample(3, sampler=Sampler(DDIM(), steps=2), progress=False)
    assert raw.shape == (3, 1, 8, 8) and raw.unique().tolist() == [128]
    assert isinstance(Cascade(runs).codec, Scaling) and LiftedDetails(Scaling(levels=256)) == runs[-1].codec
