"""Objectives of flow maps against the exact map of Gaussian data, whose ODE has a closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from flow_maps import VAR, ExactMap, QuantileMap
from oracles import all_sdes

from scoresde import EDM, EDMSDE, VPSDE, GaussianMixtureDenoiser, Heun, Preconditioned, Rng, Sampler
from scoresde.losses import (
    ConsistencyLoss,
    FlowMapLoss,
    LogNormalTimes,
    MeanFlowLoss,
    Pairs,
    SemigroupLoss,
    TrajectoryLoss,
)
from scoresde.nn import MLP, DiT, LogVariance, UNet

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())
KINDS = (TrajectoryLoss, SemigroupLoss, MeanFlowLoss, ConsistencyLoss)


def gaussian(sde, dims: int = 2) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.zeros(1, dims), torch.tensor(VAR), torch.ones(1), sde)


def data(n: int = 64, dims: int = 2):
    return VAR**0.5 * Rng(3).normal((n, dims), dtype=torch.float64)


def network(sde=None) -> Preconditioned:
    torch.manual_seed(0)
    net = MLP((2,), width=32, depth=2, told=["end"])
    return Preconditioned(net, VPSDE() if sde is None else sde, EDM(), told=["end"])


@pytest.mark.parametrize("kind", [SemigroupLoss, MeanFlowLoss, ConsistencyLoss])
@each_sde
def test_the_exact_map_costs_nothing(kind, sde) -> None:
    """In float64: a target is off by round-off/(1 − r), and close pairs are drawn."""
    loss = kind(ExactMap(sde), gaussian(sde))
    assert float(loss(data(), rng=Rng(0)).max()) < 1e-12


@each_sde
def test_the_tangent_vanishes_for_the_exact_map_of_a_mixture_and_for_no_other(sde) -> None:
    """Where g bends in y, as the Gaussian's does not; the inner 98 % of noise, whose quantiles have digits left."""
    map = QuantileMap(sde)
    mixture = GaussianMixtureDenoiser(map.means[:, None], map.stds[:, None] ** 2, map.weights, sde)
    low, high = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
    t, s = (
        sde.time(low + torch.linspace(*ends, 9, dtype=torch.float64) * (high - low))
        for ends in ((0.01, 0.6), (0.3, 0.9))
    )
    x0 = mixture.sample(9, rng=Rng(0)).double()
    x = sde.perturb(x0, t, Rng(1).normal((9, 1), dtype=torch.float64).clamp(-2.3, 2.3))
    g, tangent = MeanFlowLoss(map, mixture).tangent(x, t, s, mixture(x, t).x0, None)
    torch.testing.assert_close(tangent, torch.zeros_like(g), rtol=0, atol=1e-6)
    _, wrong = MeanFlowLoss(map, mixture).tangent(x, t, s, mixture(x, t).x0 + 0.1, None)
    assert float(wrong.abs().max()) > 1e-2


@each_sde
def test_trajectories_lead_to_the_exact_map(sde) -> None:
    """Order 3 with 64 steps: 1e-4 of the spread, and the loss counts its square."""
    loss = TrajectoryLoss(ExactMap(sde), gaussian(sde), steps=64, reuse=4)
    assert float(loss(data(), rng=Rng(0)).max()) < 1e-6


@each_sde
def test_a_map_that_is_its_own_teacher_keeps_what_is_exact(sde) -> None:
    """The 0.8 that stay are held against the data themselves, whose mean given x_t costs their variance."""
    loss = TrajectoryLoss(ExactMap(sde), steps=64, reuse=4)
    terms = loss.terms(data(), rng=Rng(0))
    assert float(terms.loss[51:].max()) < 1e-6 < 1e-3 < float(terms.loss[:51].mean())
    taught = TrajectoryLoss(ExactMap(sde), gaussian(sde), steps=64, reuse=4, still=0.25).terms(data(), rng=Rng(0))
    assert float(taught.loss.max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_another_map_costs_something(kind) -> None:
    wrong = ExactMap(VPSDE())
    loss = kind(wrong, gaussian(VPSDE()))
    wrong.factor = 1.1
    assert float(loss(data(), rng=Rng(0)).mean()) > 1e-3


@each_sde
def test_the_tangent_of_data_has_that_of_the_posterior_mean_as_its_mean(sde) -> None:
    """T is affine in x̂_0, so that E[x_0 | x_t] may be replaced by x_0."""
    map, x = ExactMap(sde), data(4)
    map.factor = 1.3
    loss = MeanFlowLoss(map)
    t, s = (torch.full((4,), sde.t_min + share * (sde.t_max - sde.t_min), dtype=torch.float64) for share in (0.6, 0.2))
    one, two = data(8).chunk(2)
    tangents = [loss.tangent(x, t, s, guess, None)[1] for guess in (one, two, 0.3 * one + 0.7 * two)]
    torch.testing.assert_close(0.3 * tangents[0] + 0.7 * tangents[1], tangents[2], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["mlp", "unet", "dit", "ncsnpp"])
def test_the_tangent_of_a_network_is_the_slope_of_where_it_ends(kind) -> None:
    """T = dy_end/dλ by central differences along the ODE, in float64: h² of the third derivative, and 1e-16/h."""
    torch.manual_seed(0)
    shape = (2,) if kind == "mlp" else (1, 4, 4)
    net: torch.nn.Module = MLP(shape, width=16, told=["end"])
    if kind == "dit":
        net = DiT(shape, width=16, depth=2, heads=2, told=["end"])
    elif kind != "mlp":
        more = {"fir": True, "progressive_input": "residual"} if kind == "ncsnpp" else {}
        net = UNet(shape, width=8, multipliers=(1, 2), blocks=1, attention=(2,), told=["end"], **more)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sde = EDMSDE()
    map = Preconditioned(net.double(), sde, EDM(), told=["end"])
    x, guess = Rng(0).normal((2, 3, *shape), dtype=torch.float64)
    t, s = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    _, tangent = MeanFlowLoss(map).tangent(x, t, s, guess, None)

    def end(h: float) -> torch.Tensor:
        there = t * (1 + h)  # λ + h, to first order
        wide = there.reshape(-1, *[1] * len(shape)), s.reshape(-1, *[1] * len(shape))
        y = guess + (x - guess) * (1 + h)
        g = map(y, there, {"end": s}).x0
        return wide[1] / wide[0] * y + (1 - wide[1] / wide[0]) * g

    with torch.no_grad():
        slope = (end(1e-4) - end(-1e-4)) / 2e-4
    torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-5)


def test_pairs_fall_and_have_their_shares() -> None:
    """Shares of 20,000 draws to 5 √(¼/20000) = 0.018."""
    sde = EDMSDE()
    pairs = Pairs(LogNormalTimes(), first=0.2, last=0.3, still=0.4)
    t, s = pairs.sample(sde, 20_000, Rng(0), torch.device("cpu"))
    assert bool((s <= t).all() and (s >= sde.t_min).all())
    for found, share in ((t == sde.t_max, 0.2), (s == sde.t_min, 0.3), (s == t, 0.4)):
        assert float(found.double().mean()) == pytest.approx(share, abs=0.018)


@pytest.mark.parametrize("taught", [True, False], ids=["taught", "from-data"])
@pytest.mark.parametrize("kind", [TrajectoryLoss, SemigroupLoss])  # the others need more steps: benchmarks/few_step.py
def test_training_brings_a_network_to_the_exact_map(kind, taught) -> None:
    """One step from t_max to t_min comes near the exact one, and the semigroup error falls: both to a half."""
    sde = EDMSDE(0.2, 3.0)
    map = network(sde)
    loss = kind(
        map,
        gaussian(sde) if taught else None,
        **({"steps": 4, "solver": Sampler(Heun())} if kind is TrajectoryLoss else {}),
    )
    optimizer, rng, x0 = torch.optim.Adam(map.parameters(), 5e-3), Rng(0), data(128).float()
    t, s, stop = (torch.full((128,), time) for time in (3.0, 0.2, 1.0))
    x = sde.perturb(x0, t, Rng(7).normal_like(x0))

    def errors() -> list[float]:
        with torch.no_grad():
            straight = loss.go(x, t, s, None)
            exact = ExactMap(sde)(x, t, {"end": s})
            alpha, sigma = sde.marginal(s)
            two = loss.go(loss.go(x, t, stop, None), stop, s, None)
            want = alpha[:, None] * exact.x0 + sigma[:, None] * exact.eps
            return [float((straight - other).square().mean()) for other in (want, two)]

    before = errors()
    for _ in range(60):
        loss(x0, rng=rng).mean().backward()
        optimizer.step(), optimizer.zero_grad()
    after = errors()
    assert after[0] < before[0] / 2 and after[1] < before[1] / 2, (before, after)


def test_a_short_step_in_float32_has_the_target_of_its_ends() -> None:
    """What does not hear where it goes is its own target up to its own change on the way, here a ten-thousandth."""
    map, x = network(), data(64).float()
    torch.nn.init.normal_(map.network.outlet.weight)
    t = torch.full((64,), 1e-4, dtype=torch.float64)
    s = t * (1 - 1e-5)
    with torch.no_grad():
        target = SemigroupLoss(map).improved(x, t, s, x, None)
        torch.testing.assert_close(target, map(x, t, {"end": s}).x0, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_neither_trained_nor_copied_nor_changed() -> None:
    teacher = Preconditioned(MLP((2,), width=16), VPSDE(), EDM())
    loss = TrajectoryLoss(network(), teacher, steps=2, reuse=2, uncertainty=LogVariance(8), adaptive=0.5)
    assert teacher.training
    loss(data(4).float(), rng=Rng(0)).mean().backward()
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name in loss.state_dict())
    assert copy.deepcopy(loss).teacher is teacher


def test_a_scale_that_is_told_guides_the_teacher() -> None:
    torch.manual_seed(0)
    how = {"width": 16, "classes": 2, "cond_dropout": 0.1}
    teacher = Preconditioned(MLP((2,), **how), VPSDE(), EDM()).eval()
    map = Preconditioned(MLP((2,), told=["end", "scale"], **how), VPSDE(), EDM(), told=["end", "scale"])
    torch.nn.init.normal_(map.network.outlet.weight)
    for kind in KINDS:
        loss = kind(map, teacher, scales=(1.0, 4.0))
        loss(data(6).float(), torch.tensor([0, 1] * 3), rng=Rng(0)).mean().backward()
    weight = map.network.conditioning.told["scale"].weight
    assert weight.grad is not None and not torch.equal(weight.grad, torch.zeros_like(weight))
    x, t, s = data(2).float(), torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.1])
    torch.nn.init.normal_(weight)
    map.eval()
    one, two = (
        map(x, t, {"label": torch.tensor([0, 1]), "end": s, "scale": torch.full((2,), w)}).x0 for w in (1.0, 3.0)
    )
    assert not torch.allclose(one, two)
    torch.testing.assert_close(map(x, t, {"label": torch.tensor([0, 1]), "end": s}).x0, one)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_cannot_work_are_refused(kind: type[FlowMapLoss]) -> None:
    deaf = Preconditioned(MLP((2,), width=16), VPSDE(), EDM())
    with pytest.raises(ValueError, match="one noise level only"):
        kind(deaf, gaussian(VPSDE()))
    with pytest.raises(ValueError, match="need the same SDE"):
        kind(network(), gaussian(EDMSDE()))
    with pytest.raises(ValueError, match="adaptive"):
        kind(network(), gaussian(VPSDE()), adaptive=2.0)
    with pytest.raises(ValueError, match="scales is"):
        kind(network(), gaussian(VPSDE()), scales=(1.0, 2.0))
    with pytest.raises(ValueError, match="needs a teacher"):
        kind(network(), scales=(1.0, 2.0))


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 0 without a teacher"):
        TrajectoryLoss(network(), still=0.0)
    with pytest.raises(ValueError, match="still is the share"):
        TrajectoryLoss(network(), gaussian(VPSDE()), still=1.0)
    with pytest.raises(ValueError, match="last"):
        Pairs(last=0.8, still=0.4)
    with pytest.raises(ValueError, match="c, which"):
        ConsistencyLoss(network(), c=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_is_dropped_for_teacher_and_map_alike(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 samples a share of ½ ± 4 standard errors; both hear the same labels, 3 being none."""
    torch.manual_seed(0)
    teacher = Preconditioned(MLP((2,), width=8, depth=1, classes=3), VPSDE(), EDM())
    map = Preconditioned(MLP((2,), width=8, depth=1, classes=3, told=["end"]), VPSDE(), EDM(), told=["end"])
    loss, label = kind(map, teacher, cond_dropout=0.5), torch.arange(512) % 3
    heard: list[torch.Tensor] = []
    call = type(teacher).forward

    def listening(self, x, t, cond=None):
        if self is teacher:
            heard.append(cond)
        return call(self, x, t, cond)

    monkeypatch.setattr(Preconditioned, "forward", listening)
    target = loss.target(data(512).float(), loss._dropped(label, 512, Rng(1)), teacher, Rng(0))
    own = target.cond if isinstance(target.cond, torch.Tensor) else target.cond["label"]
    dropped = own == 3
    assert abs(float(dropped.float().mean()) - 0.5) < 4 * (0.25 / len(heard[0])) ** 0.5
    assert torch.equal(heard[0], own[: len(heard[0])])
    assert bool(torch.isfinite(loss(data(512).float(), label, rng=Rng(0))).all())
    with pytest.raises(ValueError, match="cond_dropout is a share"):
        kind(map, teacher, cond_dropout=1.0)
