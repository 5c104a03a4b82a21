"""Augmentation: what it does to a sample, from which random numbers, and what a network knows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde import DDIM, EDM, VPSDE, DenoisingLoss, Preconditioned, Rng, Sampler
from scoresde.codecs import Scaling
from scoresde.config import ConfigError, build_network
from scoresde.data import Augmentation, Dataset, EpochOrder, Split
from scoresde.nn import MLP, Conditions
from scoresde.train.ema import EMA
from scoresde.train.state import TrainingState
from scoresde.train.world import World

ALL = Augmentation(flip=[-1, -2], shift=[1, 2], tell=True)


def images(n: int, *shape: int) -> Tensor:
    return torch.arange(n * torch.Size(shape).numel()).reshape(n, *shape)


def test_it_flips_and_shifts_as_it_says() -> None:
    """Each sample is compared with what it is told to be, made by slices, where it is still in sight."""
    raw, seen = images(64, 2, 4, 5), set()
    made, cond = ALL(raw, Rng(0))
    for x, y, told in zip(raw, made, cond["augment"], strict=True):
        flips, (down, right) = told[:2].tolist(), (told[2:] * torch.tensor([1, 2])).long().tolist()
        x = x.flip(-1) if flips[0] else x
        x = x.flip(-2) if flips[1] else x
        there = [slice(max(by, 0), n + min(by, 0)) for by, n in ((down, 4), (right, 5))]
        here = [slice(max(-by, 0), n + min(-by, 0)) for by, n in ((down, 4), (right, 5))]
        assert torch.equal(y[:, there[0], there[1]], x[:, here[0], here[1]])
        if right > 0:  # the edge is repeated
            assert torch.equal(y[:, :, :right], y[:, :, right : right + 1].expand(-1, -1, right))
        seen.add((*flips, down, right))
    # 64 draws of 60 equal ones: 60 (1 − (59/60)^64) = 39.5 different ones, with a deviation below √(60/4) = 3.9
    assert len(seen) > 24 and ALL.variants == 60


def test_the_padding_may_mirror() -> None:
    line = torch.arange(4).reshape(1, 1, 4).expand(200, 1, 4)
    made, cond = Augmentation(shift=[2], padding="reflect", tell=True)(line, Rng(0))
    expected = {-1.0: [2, 3, 2, 1], -0.5: [1, 2, 3, 2], 0.0: [0, 1, 2, 3], 0.5: [1, 0, 1, 2], 1.0: [2, 1, 0, 1]}
    assert {float(told): row.flatten().tolist() for told, row in zip(cond["augment"], made, strict=True)} == expected


def test_how_often() -> None:
    """Counts of 4,000 draws are within 4.5 deviations of a binomial: one in 150,000 is not."""
    _, cond = Augmentation(flip=[-1], shift=[1], probability=0.5, tell=True)(images(4000, 1, 3), Rng(1))
    flip, shift = cond["augment"].T
    left_alone = 0.5 + 0.5 / 6
    for share, found in (
        (0.25, flip == 1),
        (1 / 6, shift == 1),
        (1 / 6, shift == -1),
        (left_alone, (flip == 0) & (shift == 0)),
    ):
        assert abs(int(found.sum()) - 4000 * share) < 4.5 * (4000 * share * (1 - share)) ** 0.5


def state(augment: Augmentation | None, world: World | None = None, batch: int = 8, **data: Any) -> TrainingState:
    """A network of 16 samples (1, 1, 2): a in the first place, −a in the second, and a class where `data` asks."""
    torch.manual_seed(0)
    raw = torch.linspace(0.5, 1, 16)[:, None, None, None] * torch.tensor([1.0, -1.0])
    split = Split(raw, torch.arange(16) % 2 if data else None)
    network = MLP((1, 1, 2), width=64, depth=2, cond_augment=augment.told if augment else 0, **data)
    loss = DenoisingLoss(Preconditioned(network, VPSDE(), EDM(sigma_data=0.75), sigma_data=0.75))
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3, fused=True)
    dataset = Dataset("pairs", split, split, Scaling.identity(), data.get("classes", 0))
    how: dict[str, Any] = {"conditional": bool(data), "world": world, "augment": augment}
    return TrainingState(loss, optimizer, EMA(loss, half_life=100), dataset, EpochOrder(16, batch, 0), Rng(3), **how)


class One(World):
    """One of two processes, of which there is only this."""

    size = 2

    def __init__(self, rank: int):
        self.rank = rank


FLIP = Augmentation(flip=[-1], tell=True)


def test_the_same_bits_for_any_number_of_processes_and_size_of_batch() -> None:
    whole, halves = state(FLIP), [state(FLIP, One(rank)) for rank in range(2)]
    for _ in range(3):  # across epochs
        x0, cond = whole.batch()
        parts = [half.batch() for half in halves]
        assert torch.equal(x0, torch.cat([x for x, _ in parts]))
        assert torch.equal(cond["augment"], torch.cat([c["augment"] for _, c in parts]))
    raw = images(16, 1, 4, 5)
    assert torch.equal(ALL(raw, Rng(5))[0][:7], ALL(raw[:7], Rng(5))[0])


def test_a_network_hears_of_it_beside_its_own_conditions() -> None:
    x0, cond = state(FLIP, classes=2, cond_dim=0).batch()
    assert cond["label"].shape == (8,) and set(cond["augment"].flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(x0[:, 0, 0, 0] < 0, cond["augment"][:, 0] == 1)  # the second place was negative
    x0, cond = state(Augmentation(flip=[-1]), classes=2).batch()
    assert isinstance(cond, Tensor) and bool((x0[:, 0, 0, 0] < 0).any())  # not told: the labels, as ever
    assert state(None).batch()[1] is None


def test_without_a_word_nothing_was_done() -> None:
    """None, zeros and a null are one and the same; dropping conditions never drops this one."""
    network, x, t = MLP((3,), classes=4, cond_augment=2), torch.randn(5, 3), torch.zeros(5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    label = torch.arange(5) % 4
    plain = network(x, t, label)
    for told in (torch.zeros(5, 2), torch.full((5, 2), torch.nan)):
        assert torch.equal(network(x, t, {"label": label, "augment": told}), plain)
    assert not torch.equal(network(x, t, {"label": label, "augment": torch.ones(5, 2)}), plain)
    reader = Conditions(classes=4, cond_dropout=0.999, cond_augment=2).train()
    given = reader({"label": label.repeat(20), "augment": torch.ones(100, 2)}, torch.zeros(100, 3))
    assert bool((given["augment"] == 1).all()) and int((given["label"] == 4).sum()) > 90
    with pytest.raises(ValueError, match="unconditional"):
        MLP((3,), cond_augment=2)(x, t, label)


@pytest.mark.parametrize("tell", [True, False])
def test_it_leaks_into_samples_unless_the_network_is_told(tell: bool) -> None:
    """Data have the greater number in the first place, always. A sample of their mixture with the flipped ones has with
    probability ½: of 200, between 60 and 140 (5.6 deviations)."""
    run = state(Augmentation(flip=[-1], tell=tell), batch=16)
    for _ in range(400):
        run.optimizer.zero_grad()
        run.terms().loss.mean().backward()
        run.optimizer.step()
    denoiser = run.loss.denoiser.eval()
    drawn = Sampler(DDIM(), steps=12)(denoiser, (200, 1, 1, 2), rng=Rng(0)).reshape(200, 2)
    right = int((drawn[:, 0] > drawn[:, 1]).sum())
    assert right >= 198 if tell else 60 <= right <= 140


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "nothing to do"),
        ({"flip": [0]}, "axes counted from the last"),
        ({"flip": [-1, -1]}, "each axis once"),
        ({"shift": [-1]}, "augment.shift is a whole number"),
        ({"flip": [-1], "padding": "zeros"}, "'edge' or 'reflect'"),
        ({"flip": [-1], "probability": 0.0}, r"\(0, 1\]"),
    ],
)
def test_what_cannot_be_done_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Augmentation(**wrong)


def test_samples_that_it_does_not_fit_are_refused() -> None:
    points, tiny = Split(torch.zeros(4, 2)), Split(torch.zeros(4, 1, 2, 2), conditions={"image": torch.zeros(4, 1, 2)})
    with pytest.raises(ValueError, match=r"last 1 axes.*\(2,\)"):
        Augmentation(flip=[-1]).check(points, False)
    with pytest.raises(ValueError, match="out of sight"):
        Augmentation(shift=[0, 2]).check(tiny, False)
    with pytest.raises(ValueError, match="augment=none"):
        Augmentation(flip=[-1]).check(tiny, True)
    node = {"_target_": "scoresde.nn.Classifier", "_partial_": True}
    with pytest.raises(ConfigError, match=r"augment\.tell=true"):
        build_network(node, event_shape=(1, 8, 8), classes=2, cond_augment=3)


def test_it_says_what_it_does_to_bits() -> None:
    plain, told = str(Augmentation(flip=[-1], shift=[1, 1])), str(ALL)
    assert "4.17 bits more" in plain and "tell=true" in plain  # log2(2 · 9)
    assert "The network is told" in told
