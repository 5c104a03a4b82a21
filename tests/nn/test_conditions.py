"""Conditions of every kind from a file to samples and densities: what is told is heard, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import (
    EDM,
    EDMSDE,
    VPSDE,
    AdaptiveODE,
    DenoisingLoss,
    Exact,
    Heun,
    LogSNRGrid,
    Preconditioned,
    Rng,
    Sampler,
    log_likelihood,
)
from scoresde.codecs import Scaling
from scoresde.data import Arrays, Dataset, EpochOrder, Split
from scoresde.guidance import ClassifierFree
from scoresde.likelihood.tolerance import Tolerance
from scoresde.losses.classifier import ClassifierLoss, NoisyClassifier
from scoresde.losses.denoising import EDMWeighting, LogNormalTimes
from scoresde.nn import MLP, Classifier, UNet
from scoresde.nn.conditions import Conditions
from scoresde.train.ema import EMA
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer

N = 2048


def told(kind: str, n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(condition, m (n,)): samples are m(condition) everywhere, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "label":
        label = torch.randint(3, (n,), generator=generator)
        return label, label - 1.0
    shape = {"vector": (3,), "image": (1, 2, 2), "tokens": (4, 3)}[kind]
    values = torch.randn(n, *shape, generator=generator)
    if kind == "tokens":  # their number differs
        values[torch.arange(4) >= torch.randint(1, 5, (n, 1), generator=generator)] = torch.nan
        return values, values[:, :, 0].nanmean(1)
    return values, values.flatten(1).mean(1) * values[0].numel() ** 0.5


ARGUMENTS = {
    "label": {"classes": 3},
    "vector": {"cond_dim": 3},
    "image": {"cond_image": (1, 2, 2)},
    "tokens": {"cond_tokens": 3},
}


def file_of(kind: str, folder) -> Dataset:
    cond, mean = told(kind)
    x = mean[:, None, None, None] + 0.1 * torch.randn(N, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    np.savez(folder / "x.npz", x=x, c=cond)
    keys = {"label_key": "c"} if kind == "label" else {"cond_keys": {kind: "c"}}
    return Arrays(str(folder / "x.npz"), key="x", raw_low=-6.0, raw_high=6.0, **keys)


def training(loss: nn.Module, data: Dataset, lr: float = 5e-3) -> TrainingState:
    optimizer = torch.optim.Adam(loss.parameters(), lr, fused=True)
    order = EpochOrder(len(data.train), 128, 0)
    return TrainingState(loss, optimizer, EMA(loss, half_life=2000), data, order, Rng(0), conditional=True)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_what_a_file_tells_reaches_the_samples_and_dropping_it_teaches_the_null(kind, tmp_path):
    """At t_max x_t is noise, so x̂_0 is the mean of what is told: m(cond), and of nothing: 0 (the data are centred)."""
    data = file_of(kind, tmp_path)
    torch.manual_seed(0)
    network = UNet((1, 2, 2), width=16, multipliers=(1,), blocks=1, cond_dropout=0.2, **ARGUMENTS[kind])
    denoiser = Preconditioned(network, EDMSDE(0.02, 3.0), EDM(0.15), sigma_data=0.15)  # ±6 in the file is ±1
    loss = DenoisingLoss(denoiser, LogNormalTimes(0.5, 1.0), EDMWeighting(0.15))
    run, trainer = training(loss, data, lr=1e-2), Trainer(images=70 * 128, batch_size=128, cooldown=40 * 128)
    loss.train()
    while run.images < trainer.images:
        trainer.step(run)
    loss.eval()
    cond, mean = told(kind, 256, seed=7)
    x, t = denoiser.prior_sample((256, 1, 2, 2), rng=Rng(3)), torch.tensor(3.0)
    with torch.no_grad():
        heard = denoiser(x, t, cond).x0.mean((1, 2, 3)) * 6
        silent = denoiser(x, t).x0.mean((1, 2, 3)) * 6
        drawn = Sampler(Heun(), LogSNRGrid(), steps=5)(denoiser, x, cond=cond).mean((1, 2, 3)) * 6
    # shares of the variance of m that 70 steps leave open: hardly any at t_max, more where they were rarer; and what is
    # made up where nothing is told
    assert (heard - mean).square().mean() < 0.1 * mean.var()
    assert (drawn - mean).square().mean() < 0.6 * mean.var()
    assert silent.square().mean() < 0.1 * mean.var()


def test_a_classifier_is_trained_by_the_same_trainer(tmp_path):
    data = file_of("label", tmp_path)
    torch.manual_seed(0)
    classifier = NoisyClassifier(Classifier((1, 2, 2), classes=3, width=8), VPSDE(), sigma_data=0.2)
    run, trainer = training(ClassifierLoss(classifier), data), Trainer(images=10**9, batch_size=128)
    for _ in range(60):
        trainer.step(run)
    with torch.no_grad():
        x, y = data.encode(data.test.raw), data.test.labels
        t = torch.tensor(0.02)
        clean = classifier(VPSDE().perturb(x, t, Rng(0).normal_like(x)), t, y)
        noise = classifier(torch.randn(len(x), 1, 2, 2), torch.tensor(1.0), y)
    # at t = 0.02, σ/α is 0.05 and classes lie 1/6 apart over four pixels: 6 σ; at t_max there is nothing to know
    assert clean.exp().mean() > 0.7
    assert abs(noise.mean() + np.log(3)) < 0.15


def test_solvers_that_ask_for_parts_of_a_batch_find_the_conditions_of_those():
    """Step sizes per sample leave samples behind one by one; every kind of condition follows, NaN rows and all."""
    torch.manual_seed(0)
    kinds = {"classes": 3, "cond_dim": 2, "cond_image": (1, 3), "cond_tokens": 3, "encode_image": True}
    network = UNet((1, 2), width=8, multipliers=(1,), blocks=1, **kinds).double().eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    guided = ClassifierFree(Preconditioned(network, VPSDE(), EDM(1.0)), 1.7)
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    cond = {"label": torch.tensor([0, 3, 2]), "vector": draw(3, 2), "image": draw(3, 1, 3), "tokens": draw(3, 2, 3)}
    cond["tokens"][1, 1], cond["image"][2] = torch.nan, torch.nan
    x, only = draw(3, 1, 2), {name: value[1:2] for name, value in cond.items()}
    sampler = Sampler(AdaptiveODE(1e-2, 1e-2))
    together = sampler(guided, x, cond=cond)
    torch.testing.assert_close(sampler(guided, x[1:2], cond=only)[0], together[1], rtol=1e-8, atol=1e-8)
    settings = {"solver": Tolerance(1e-2, 1e-2), "divergence": Exact()}
    density = log_likelihood(guided, x, cond=cond, **settings).log_prob
    alone = log_likelihood(guided, x[1:2], cond=only, **settings).log_prob
    torch.testing.assert_close(alone[0], density[1], rtol=1e-8, atol=1e-8)
    assert (log_likelihood(guided, x, **settings).log_prob - density).abs().min() > 1e-3


# Data sets


def split(n: int = 6, **conds) -> Split:
    return Split(torch.zeros(n, 2), None, conds)


def test_a_split_tells_by_name_what_it_has():
    vector, labels = torch.arange(12.0).reshape(6, 2), torch.arange(6) % 2
    cpu, index = torch.device("cpu"), torch.tensor([4, 1])
    both = Split(torch.zeros(6, 2), labels, {"vector": vector})
    cond = both.cond(index, True, cpu)
    assert torch.equal(cond["label"], labels[index]) and torch.equal(cond["vector"], vector[index])
    assert split(vector=vector).cond(index, True, cpu).keys() == {"vector"}
    assert torch.equal(Split(torch.zeros(6, 2), labels).cond(index, True, cpu), labels[index])
    assert split().cond(index, True, cpu) is None and both.cond(index, False, cpu) is None
    part = both.take(index)
    assert torch.equal(part.conditions["vector"], vector[index]) and torch.equal(part.labels, labels[index])
    assert torch.equal(both.to(cpu).conditions["vector"], vector)


def test_conditions_of_a_file_are_split_with_the_samples(tmp_path):
    vector = np.arange(40.0).reshape(20, 2)
    vector[3] = np.nan
    np.savez(tmp_path / "x.npz", x=np.arange(20.0)[:, None].repeat(2, 1), v=vector, y=np.arange(20))
    data = Arrays(str(tmp_path / "x.npz"), key="x", cond_keys={"vector": "v"}, raw_low=0.0, raw_high=19.0)
    for part in (data.train, data.test):
        row = part.raw[:, 0].long()
        assert torch.equal(part.conditions["vector"].nan_to_num(-1), torch.tensor(vector[row]).float().nan_to_num(-1))
    assert len(data.test) == 2 and data.classes == 0
    with pytest.raises(ValueError, match="'vector' is floats"):
        Arrays(str(tmp_path / "x.npz"), key="x", cond_keys={"vector": "y"}, raw_low=0.0, raw_high=19.0)
    with pytest.raises(ValueError, match="no array 'w'"):
        Arrays(str(tmp_path / "x.npz"), key="x", cond_keys={"vector": "w"}, raw_low=0.0, raw_high=19.0)


@pytest.mark.parametrize(
    "train, test, error, words",
    [
        (split(colour=torch.zeros(6, 2)), split(), ValueError, "got 'colour'"),
        (split(vector=torch.zeros(5, 2)), split(), ValueError, r"\(5, 2\).*N = 6"),
        (split(image=torch.zeros(6, 2)), split(), ValueError, r"\(6, 2\)"),
        (split(vector=torch.zeros(6, 2).double()), split(), TypeError, "float64"),
        (split(vector=torch.zeros(6, 2)), split(), ValueError, "names and shapes must agree"),
        (split(vector=torch.zeros(6, 2)), split(vector=torch.zeros(6, 3)), ValueError, "names and shapes must agree"),
    ],
)
def test_conditions_that_do_not_fit_the_samples_are_refused(train, test, error, words):
    with pytest.raises(error, match=words):
        Dataset("made", train, test, Scaling.identity())


def test_training_without_anything_to_tell_is_refused():
    loss = DenoisingLoss(Preconditioned(MLP((2,), width=8, cond_dim=2), VPSDE(), EDM(1.0)))
    data = Dataset("made", split(256), split(256), Scaling.identity())
    with pytest.raises(ValueError, match="needs labels or other conditions"):
        training(loss, data)


def test_a_low_resolution_is_noised_in_training_and_told_how_much() -> None:
    """√(1 − s²) image + s ε with s uniform up to 0.5: of an image of ones what is left has the deviation
    s, by thirds of the levels to 5 standard errors of 33,000 numbers each; the mean level is 0.25 to 5 of 1,000."""
    conditions = Conditions(3, cond_image=(1, 10, 10), cond_dropout=0.5, cond_noise=0.5)
    image, label = torch.ones(1000, 1, 10, 10), torch.arange(1000) % 3
    torch.manual_seed(0)
    given = conditions.train()({"image": image, "label": label}, image)
    level = given["level"]
    assert level.shape == (1000,) and bool(((level >= 0) & (level <= 0.5)).all())
    assert abs(float(level.mean()) - 0.25) < 5 * 0.5 / 12**0.5 / 1000**0.5
    s = level.reshape(-1, 1, 1, 1)
    eps = (given["image"] - (1 - s**2).sqrt()) / s.clamp(min=1e-3)
    for part in level.sort().indices.split(334)[1:]:  # of the least levels rounding is what is left
        assert abs(float(eps[part].std()) - 1) < 5 / (2 * 33000) ** 0.5
    assert not bool(given["image"].isnan().any()) and 400 < int((given["label"] == 3).sum()) < 600  # dropped alone
    given = conditions.eval()({"image": image, "label": label}, image)
    assert torch.equal(given["image"], image) and "level" not in given
    null = conditions.null({"image": image, "label": label, "level": level})
    assert torch.equal(null["image"], image) and torch.equal(null["level"], level) and null["label"].unique() == 3


def test_noise_of_what_is_no_low_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a share in \[0, 1\] of noise in an image"):
        Conditions(3, cond_noise=0.5)
    with pytest.raises(ValueError, match=r"a share in \[0, 1\]"):
        Conditions(cond_image=(1, 4, 4), cond_noise=2.0)
    with pytest.raises(ValueError, match="no condition to drop"):
        Conditions(cond_image=(1, 4, 4), cond_noise=0.5, cond_dropout=0.1)
