"""Embeddings: how an embedder is trained, and the chain of an exact prior and a decoder that is told what it draws."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde import (
    DDIM,
    VPSDE,
    Cascade,
    Contrastive,
    ContrastiveLoss,
    DPMSolverPP,
    GaussianMixtureDenoiser,
    LogSNRGrid,
    Prediction,
    Rng,
    Run,
    Sampler,
)
from scoresde.codecs import Scaling, Standardise
from scoresde.config import ConfigError
from scoresde.data import Dataset, Embedding, Split
from scoresde.data.excerpt import excerpt, packed
from scoresde.diffusion.conditions import Cond, named
from scoresde.diffusion.denoiser import Denoiser
from scoresde.nn import Embedder, TextTransformer
from scoresde.runs.kept import unpack

SDE = VPSDE(beta_max=60.0, t_min=1e-6)
FINE = Sampler(DPMSolverPP(), LogSNRGrid(), steps=60)
MEANS = torch.tensor([[1.5, 0.0, 0.5], [-1.0, 1.0, 0.5]])  # of embeddings given a label
SPREADS = torch.tensor([0.2, 0.4])


class Known(nn.Module):
    """Similarities that are given: of the sample i with the sentence j, (B, B)."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def image(self, x: Tensor) -> Tensor:
        return x[:, 0].long()

    def words(self, ids: Tensor) -> Tensor:
        return ids[:, 0].long()

    def similarity(self, images: Tensor, words: Tensor) -> Tensor:
        return self.table[images][:, words]


def test_the_loss_is_the_cross_entropy_of_both_ways() -> None:
    """Against a sum that is written out in float64; four numbers a side, so round-off is below 1e-12."""
    table = Rng(3).normal((4, 4), dtype=torch.float64)
    loss = ContrastiveLoss(Contrastive(Known(table), SDE))
    x, ids = torch.arange(4.0)[:, None], torch.arange(4)[:, None].int()
    found = loss.terms(x, {"text": ids}).loss
    s = table.tolist()
    for k in range(4):
        row = math.log(sum(math.exp(s[k][j]) for j in range(4))) - s[k][k]
        column = math.log(sum(math.exp(s[j][k]) for j in range(4))) - s[k][k]
        assert float(found[k].detach()) == pytest.approx((row + column) / 2, abs=1e-12)


def test_the_exact_ratio_measures_the_information() -> None:
    """x says which of two sentences is true: I = log 2. With s = log p(x|c)/p(x), log 2 or −∞ (−200 here), and four of
    each in a batch of eight, log B − loss = log 8 − log 4 = log 2, and e⁻²⁰⁰ besides. Any other constant is worse."""
    x, ids = torch.tensor([0.0, 1.0] * 4)[:, None], torch.tensor([0, 1] * 4)[:, None].int()
    exact = math.log(2) * torch.eye(2, dtype=torch.float64) - 200 * (1 - torch.eye(2, dtype=torch.float64))
    for shift in (0.0, 3.0):
        found = ContrastiveLoss(Contrastive(Known(exact + shift), SDE)).measured(x, {"text": ids})
        torch.testing.assert_close(found["information"].detach(), torch.full((8,), math.log(2), dtype=torch.float64))
        assert bool((found["retrieval"] == 1).all())
    blurred = ContrastiveLoss(Contrastive(Known(torch.eye(2, dtype=torch.float64)), SDE)).measured(x, {"text": ids})
    assert float(blurred["information"].mean().detach()) < math.log(2) - 0.1


def embedder(shape: tuple[int, ...] = (1, 4, 4)) -> Embedder:
    torch.manual_seed(0)
    return Embedder(shape, text=TextTransformer(7, width=8, depth=1, heads=2), dim=3, width=8)


@pytest.mark.parametrize("shape", [(1, 4, 4), (5,)])
def test_embeddings_lie_on_the_sphere_and_padding_says_nothing(shape: tuple[int, ...]) -> None:
    """To float32 round-off of a norm √3; a row of padding changes a sentence by round-off of its attention."""
    network, x = embedder(shape).eval(), Rng(1).normal((6, *shape))
    ids = Rng(2).integers(7, (6, 3)).int()
    images, words = network.image(x), network.words(ids)
    for found in (images, words):
        torch.testing.assert_close(found.norm(dim=1), torch.full((6,), math.sqrt(3)), atol=1e-6, rtol=0)
    longer = torch.cat([ids, torch.full((6, 2), -1, dtype=torch.int32)], 1)
    torch.testing.assert_close(network.words(longer), words, atol=1e-5, rtol=0)
    assert float((images[0] - images[1]).abs().max().detach()) > 1e-3
    angle = F.cosine_similarity(images[:1], words[:1])
    torch.testing.assert_close(network.similarity(images, words)[0, 0], network.scale * angle[0], atol=1e-4, rtol=0)


def test_it_learns_which_sentence_is_of_which_sample() -> None:
    """Two sentences of bright and dark squares; chance is 1/2, and 30 steps find all."""
    network = embedder()
    loss, rng = ContrastiveLoss(Contrastive(network, SDE)), Rng(4)
    ids = torch.tensor([[1, 2], [1, 3]], dtype=torch.int32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    def batch() -> tuple[Tensor, dict[str, Tensor]]:
        k = rng.integers(2, (16,))
        return 0.3 * rng.normal((16, 1, 4, 4)) + (2.0 * k - 1)[:, None, None, None], {"text": ids[k]}

    for _ in range(30):
        optimizer.zero_grad()
        loss(*batch()).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = loss.measured(*batch())
    assert float(found["retrieval"].mean()) == 1.0 and float(found["information"].mean()) > 0.5


class Flat(nn.Module):
    """An embedder of points (3,), which are their own direction."""

    dim, event_shape = 3, (3,)

    def image(self, x: Tensor) -> Tensor:
        return math.sqrt(3) * F.normalize(x, dim=-1)


FLAT = Embedding(Scaling.identity(), Flat(), "{}")


class Prior(Denoiser):
    """The exact posterior mean of embeddings given a label, each a Gaussian of its own."""

    def __init__(self, codec: Standardise):
        super().__init__(SDE)
        scale = torch.tensor(codec.std)
        self.of = nn.ModuleList(
            GaussianMixtureDenoiser(
                ((MEANS[k] - torch.tensor(codec.mean)) / scale)[None].double(),
                torch.diag(float(SPREADS[k]) ** 2 / scale**2)[None].double(),
                torch.ones(1, dtype=torch.float64),
                SDE,
            )
            for k in range(2)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        a, b = (each(x, t, None) for each in self.of)
        first = (named(cond)["label"] == 0)[:, None]
        return Prediction(torch.where(first, a.x0, b.x0), torch.where(first, a.eps, b.eps), self.sde.at(t, x))


class Decoder(Denoiser):
    """The exact posterior mean of points x = e + 0.1 ε given an embedding e."""

    def __init__(self) -> None:
        super().__init__(SDE)
        self.heard = list[Tensor]()

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        e, scales = named(cond)["vector"], self.sde.at(t, x)
        self.heard.append(e)
        gain = scales.alpha * 0.01 / (scales.alpha**2 * 0.01 + scales.sigma**2)
        x0 = e + gain * (x - scales.alpha * e)
        return Prediction(x0, (x - scales.alpha * x0) / scales.sigma, scales)


def run(dataset: Dataset, denoiser: Denoiser, name: str) -> Run:
    return Run(Path(name), {"network": {"cond_dropout": 0.0}}, 1, "0" * 64, dataset, denoiser.eval(), True)


def chain() -> Cascade:
    labels = torch.arange(200) % 2
    e = MEANS[labels] + SPREADS[labels][:, None] * Rng(5).normal((200, 3))
    told = Split(e, labels)
    prior = Dataset("e", told, told, Standardise.of(e, integers=()), 2, embedder=FLAT)
    points = Split(e, None, {"vector": FLAT.of(e)})
    decoder = Dataset("x", points, points, Scaling.identity(), embedder=FLAT)
    return Cascade([run(prior, Prior(prior.codec), "prior"), run(decoder, Decoder(), "decoder")])  # type: ignore[arg-type]


def test_the_chain_draws_the_exact_conditional() -> None:
    """Embeddings of a mixture of two, given which: mean and deviation of 1,000 within four standard errors, σ/√n and
    σ/√2n, and 0.5 % of a deviation, by which 60 steps of order 2 are off; the decoder hears them on the sphere (float32
    round-off), and its samples are 0.1 from there in each number, within the same errors."""
    cascade, n = chain(), 1000
    label = torch.arange(n) % 2
    first, second = cascade.runs
    drawn = first.codec.decode(first.draw(label, Rng(seeds=list(range(n))), sampler=FINE, progress=False))
    for k in range(2):
        mine, std = drawn[label == k], float(SPREADS[k])
        error = 4 * std / math.sqrt(n / 2)
        assert float((mine.mean(0) - MEANS[k]).abs().max()) < error
        assert float((mine.std(0) - std).abs().max()) < error / math.sqrt(2) + 0.005 * std
    made = cascade.sample(n, cond={"label": label}, sampler=FINE, rng=Rng(seeds=list(range(n))), progress=False)
    heard: Any = second.denoiser.heard  # type: ignore[union-attr]
    expected = math.sqrt(3) * F.normalize(drawn, dim=1)
    steps = len(heard) // -(-n // 128)
    told = torch.cat(heard[::steps])
    torch.testing.assert_close(told, expected, atol=2e-5, rtol=0)
    off = made - told
    assert float(off.mean(0).abs().max()) < 4 * 0.1 / math.sqrt(n)
    assert float((off.std(0) - 0.1).abs().max()) < 4 * 0.1 / math.sqrt(2 * n) + 5e-4


def test_a_sample_depends_on_its_seed_alone() -> None:
    cascade, few = chain(), Sampler(DDIM(), steps=5)
    how: dict[str, Any] = {"sampler": few, "progress": False}
    every = cascade.sample(6, cond={"label": [0, 1]}, rng=Rng(seeds=[3, 1, 4, 1, 5, 9]), batch_size=4, **how)
    alone = cascade.sample(1, cond={"label": 1}, rng=Rng(seeds=[9]), **how)
    torch.testing.assert_close(every[5:], alone, atol=1e-6, rtol=0)
    first, fourth = every[1], every[3]
    torch.testing.assert_close(first, fourth, atol=1e-6, rtol=0)  # the same label and seed


def test_variations_and_interpolations_are_told_what_is_given() -> None:
    """Variations hear the embedding of the input, and differ by noise; an interpolation begins and ends at the
    embeddings of its ends, is as far along the arc as its share (float64 arc, float32 round-off), and has one noise."""
    cascade, few = chain(), Sampler(DDIM(), steps=5)
    decoder = cascade.runs[1]
    raw = decoder.dataset.test.raw[:2]
    ends = FLAT.of(raw)
    heard: Any = decoder.denoiser.heard  # type: ignore[union-attr]
    made = decoder.variations(raw, 3, sampler=few, progress=False)
    assert made.shape == (2, 3, 3) and torch.equal(heard[-1], ends.repeat_interleave(3, 0))
    assert float((made[0, 0] - made[0, 1]).abs().max()) > 1e-3
    way = decoder.interpolation(raw, 5, sampler=few, progress=False)
    told = heard[-1]
    torch.testing.assert_close(told[[0, -1]], ends, atol=1e-6, rtol=0)
    angles = torch.acos((told[:1] @ told.T)[0].div(3).clamp(-1, 1))
    torch.testing.assert_close(angles, angles[-1] * torch.arange(5) / 4, atol=2e-3, rtol=0)
    torch.testing.assert_close(told.norm(dim=1), torch.full((5,), math.sqrt(3)), atol=1e-6, rtol=0)
    same = decoder.interpolation(raw[[0, 0]], 3, sampler=few, progress=False)
    torch.testing.assert_close(same[0], same[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(same[0], way[0], atol=1e-5, rtol=0)


def test_stages_that_do_not_fit_are_refused() -> None:
    prior, decoder = chain().runs
    other = Embedding(Scaling.identity(), Flat(), '{"other": 1}')
    for stages, said in (
        ([decoder, prior], "draws embeddings, and is a first stage: run=prior then=decoder"),
        ([decoder, decoder], "A prior draws them"),
        ([replace(prior, dataset=replace(prior.dataset, embedder=other)), decoder], "by another embedder"),
    ):
        with pytest.raises(ConfigError, match=said):
            Cascade(stages)
    with pytest.raises(ConfigError, match="no exact likelihood"):
        chain().check_exact()
    plain = replace(decoder, dataset=replace(decoder.dataset, embedder=None))
    with pytest.raises(ValueError, match="has no embedder"):
        plain.variations(decoder.dataset.test.raw[:1], 2)
    with pytest.raises(ValueError, match=r"samples of shape \(3,\); these have \(4,\)"):
        decoder.embed(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="told a sentence of each of 2 samples"):
        Contrastive(embedder(), SDE)(torch.zeros(2, 1, 4, 4), torch.tensor(0.0), None)


def test_a_run_folder_keeps_the_embedder(tmp_path: Path) -> None:
    """The same weights and digest, and so the same embeddings to the last bit."""
    node = (
        '{"_target_": "scoresde.nn.Embedder", "dim": 3, "event_shape": [1, 4, 4], "width": 8, "text": {"_target_": '
        '"scoresde.nn.TextTransformer", "vocabulary": 7, "width": 8, "depth": 1, "heads": 2}}'
    )
    kept = Embedding(Scaling(-1, 1, levels=256), embedder(), node)
    raw = Rng(6).integers(256, (20, 1, 4, 4)).to(torch.uint8)
    split = Split(raw, None, {"vector": kept.of(raw)})
    dataset = Dataset("x", split, split, kept.base, embedder=kept)
    found = unpack(tmp_path, *packed(excerpt(dataset)), ())
    assert found.embedder is not None and found.embedder.digest == kept.digest != ""
    assert torch.equal(found.embedder.of(raw), kept.of(raw))
