"""Flow maps: the exact one of Gaussian data, and networks that are told both ends."""

from __future__ import annotations

import pytest
import torch
from flow_maps import VAR, ExactMap
from oracles import EVENT_SHAPES, all_sdes

from scoresde import (
    DDIM,
    EDM,
    VPSDE,
    ClassifierFree,
    Eps,
    FlowMap,
    GaussianMixtureDenoiser,
    Preconditioned,
    Rng,
    Sampler,
    sample,
)
from scoresde.diffusion.conditions import named
from scoresde.guidance import Conditioned
from scoresde.nn import MLP, DiT, UNet

ALL = all_sdes()
each_sde = pytest.mark.parametrize("sde", ALL.values(), ids=ALL.keys())


def network(kind: str, **how):
    shape = {"mlp": (5,), "unet": (1, 4, 4), "dit": (1, 4, 4), "unet1d": (2, 8)}[kind]
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP(shape, width=16, depth=2, **how), shape
    if kind == "dit":
        return DiT(shape, width=16, depth=2, heads=2, **how), shape
    return UNet(shape, width=8, multipliers=(1, 2), blocks=1, **how), shape


def trained(kind: str, sde=None, parameterization=None, **how):
    """(a network of one noise level, that is not zero; a flow map with its weights; the event shape)."""
    one, shape = network(kind, **how)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    both, _ = network(kind, told=["end"], **how)
    missing, unexpected = both.load_state_dict(one.state_dict(), strict=False)
    assert not unexpected and missing == ["conditioning.told.end.weight"]
    facts = VPSDE() if sde is None else sde, EDM() if parameterization is None else parameterization
    return Preconditioned(one, *facts).eval(), Preconditioned(both, *facts, told=["end"]).eval(), shape


@each_sde
@pytest.mark.parametrize("event", EVENT_SHAPES, ids=str)
def test_one_step_or_many_of_the_exact_map_end_where_the_ode_does(sde, event) -> None:
    """Closed form of the Gaussian ODE; in float64, so up to round-off / (1 − r)."""
    denoiser = ExactMap(sde)
    x = Rng(0).normal((3, *event), dtype=torch.float64)
    (a, b), (c, d) = sde.marginal(sde.terminal), sde.marginal(torch.tensor(sde.t_min, dtype=torch.float64))
    want = x * ((VAR * c**2 + d**2) / (VAR * a**2 + b**2)).sqrt()
    for steps in (1, 2, 5):
        got = Sampler(FlowMap(denoiser), None, steps, denoise=False)(denoiser, x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@each_sde
@pytest.mark.parametrize("steps", [1, 7])
def test_an_untrained_map_is_ddim(sde, steps) -> None:
    teacher, student, shape = trained("mlp", sde, Eps())
    x = teacher.prior_sample((4, *shape), rng=Rng(1))
    want = Sampler(DDIM(), None, steps, denoise=False)(teacher, x)
    got = Sampler(FlowMap(), None, steps, denoise=False)(student, x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


ALONE = ({}, None)
LABEL = ({"classes": 3, "cond_dropout": 0.1}, torch.tensor([0, 2]))
VECTOR = ({"cond_dim": 2}, torch.tensor([[0.5, -1.0], [0.0, 1.0]]))
BOTH = ({"classes": 3, "cond_dim": 1}, {"label": torch.tensor([0, 2]), "vector": torch.tensor([[0.5], [0.0]])})
IMAGE = ({"cond_image": (1, 4, 4)}, Rng(2).normal((2, 1, 4, 4)))
TOKENS = ({"cond_tokens": 3}, Rng(2).normal((2, 5, 3)))


@pytest.mark.parametrize(
    ("kind", "how", "cond"),
    [
        *((kind, *given) for kind in ("mlp", "unet", "unet1d", "dit") for given in (ALONE, LABEL, VECTOR, BOTH)),
        *((kind, *IMAGE) for kind in ("mlp", "unet", "dit")),
        *((kind, *TOKENS) for kind in ("unet", "dit")),
    ],
)
def test_every_network_and_condition_begins_as_its_teacher(kind, how, cond) -> None:
    teacher, student, shape = trained(kind, **how)
    x = teacher.prior_sample((2, *shape), rng=Rng(1))
    want = Sampler(DDIM(), None, 2, denoise=False)(teacher, x, cond=cond)
    got = Sampler(FlowMap(), None, 2, denoise=False)(student, x, cond=cond)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(student(x, torch.tensor(0.5), cond).x0, teacher(x, torch.tensor(0.5), cond).x0)
    torch.nn.init.normal_(student.network.conditioning.told["end"].weight)  # and then it hears where it goes
    assert not torch.allclose(Sampler(FlowMap(), None, 2, denoise=False)(student, x, cond=cond), want, atol=1e-3)
    stays = {"end": torch.full((2,), 0.5), **named(cond, "")}
    torch.testing.assert_close(student(x, torch.tensor(0.5), stays).x0, student(x, torch.tensor(0.5), cond).x0)


def test_guidance_around_a_map_blends_two_maps_to_the_same_end() -> None:
    _, student, shape = trained("mlp", classes=3, cond_dropout=0.1)
    torch.nn.init.normal_(student.network.conditioning.told["end"].weight)
    x, label = student.prior_sample((2, *shape), rng=Rng(1)), torch.tensor([0, 2])
    t, s = torch.tensor([0.9, 0.7]), torch.tensor([0.3, 0.1])
    got = ClassifierFree(student, 3.0)(x, t, {"": label, "end": s}).x0
    plain, told = (student(x, t, {"label": c, "end": s}).x0 for c in (torch.tensor([3, 3]), label))
    torch.testing.assert_close(got, plain + 3 * (told - plain), rtol=1e-4, atol=1e-5)


def test_guidance_around_a_map_that_is_told_scales_tells_it_in_one_call() -> None:
    net = MLP((3,), width=16, classes=3, cond_dropout=0.1, told=["end", "scale"])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    student = Preconditioned(net, VPSDE(), EDM(), told=["end", "scale"]).eval()
    x, label = student.prior_sample((2, 3), rng=Rng(1)), torch.tensor([0, 2])
    t, s = torch.tensor([0.9, 0.7]), torch.tensor([0.3, 0.1])
    sizes = []
    net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    got = ClassifierFree(student, 3.0)(x, t, {"": label, "end": s}).x0
    assert sizes == [2]
    torch.testing.assert_close(got, student(x, t, {"": label, "end": s, "scale": torch.full((2,), 3.0)}).x0)
    assert not torch.allclose(got, student(x, t, {"": label, "end": s}).x0, atol=1e-3)
    for outside in ({"scale": -1.0}, {"scale": 3.0, "null": torch.tensor([1])}, {"scale": 3.0, "rescale": 0.5}):
        sizes.clear()
        ClassifierFree(student, **outside)(x, t, {"": label, "end": s})
        assert sizes == [4]


def test_a_map_with_its_condition_filled_in_is_still_told_where_it_goes() -> None:
    _, student, shape = trained("mlp", classes=3)
    torch.nn.init.normal_(student.network.conditioning.told["end"].weight)
    x, label = student.prior_sample((2, *shape), rng=Rng(1)), torch.tensor([2, 2])
    sampler = Sampler(FlowMap(), None, 2, denoise=False)
    want = sampler(student, x, cond=label)
    torch.testing.assert_close(sampler(Conditioned(student, label[:1]), x), want)
    picked = Conditioned(student, lambda cond: cond["second"])
    torch.testing.assert_close(sampler(picked, x, cond={"first": 0 * label, "second": label}), want)
    lowered = Conditioned(student, lambda cond: cond - 1)  # of a bare tensor, in the form in which it was given
    torch.testing.assert_close(sampler(lowered, x, cond=label + 1), want)
    with pytest.raises(ValueError, match="leave cond out"):
        sampler(Conditioned(student, label[:1]), x, cond=label)


@pytest.mark.parametrize("renoise", [False, True])
def test_sample_k_depends_on_seed_k_only(renoise) -> None:
    _, student, shape = trained("mlp")
    sampler = Sampler(FlowMap(renoise=renoise), None, 3, denoise=False)
    together = sampler(student, (3, *shape), rng=Rng(seeds=[5, 6, 7]))
    alone = sampler(student, (1, *shape), rng=Rng(seeds=[6]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)  # matrix products of other shapes


@each_sde
def test_noise_between_steps_keeps_the_marginal(sde) -> None:
    """20,000 samples of the exact map have variance α² VAR + σ² after a jump and back: ± 5 √(2/20000) = 5 %."""
    denoiser, n = ExactMap(sde), 20_000
    gaussian = GaussianMixtureDenoiser(torch.zeros(1, 1), torch.tensor(VAR), torch.ones(1), sde)
    x = gaussian.prior_sample((n, 1), rng=Rng(0), dtype=torch.float64)
    t = torch.tensor(0.5 * (sde.t_min + sde.t_max), dtype=torch.float64)
    alpha, sigma = sde.marginal(sde.terminal)
    x = x * ((alpha**2 * VAR + sigma**2) / sigma**2).sqrt()
    got, _ = FlowMap(renoise=True)(denoiser, x, sde.terminal, t, None, cond=None, rng=Rng(1))
    alpha, sigma = sde.marginal(t)
    assert float(got.var()) == pytest.approx(float(alpha**2 * VAR + sigma**2), rel=0.05)
    other, _ = FlowMap(renoise=True)(denoiser, x, sde.terminal, t, None, cond=None, rng=Rng(2))
    assert not torch.equal(got, other)


def test_a_budget_of_a_map_is_so_many_steps_of_it() -> None:
    denoiser = ExactMap(VPSDE())
    x = Rng(0).normal((3, 2), dtype=torch.float64)
    want = Sampler(FlowMap(), None, 2, denoise=False)(denoiser, x)
    torch.testing.assert_close(sample(denoiser, x, budget=2), want)
    denoiser.trials = {}  # as of one that was measured
    torch.testing.assert_close(sample(denoiser, x, budget=2), want)


def test_what_cannot_be_a_flow_map_is_refused() -> None:
    teacher, student, shape = trained("mlp", classes=3)
    with pytest.raises(ValueError, match="one noise level only"):
        Sampler(FlowMap())(teacher, (2, *shape))
    with pytest.raises(ValueError, match="one noise level only"):
        teacher(torch.zeros(2, *shape), torch.tensor(0.5), {"end": torch.tensor([0.1, 0.1])})
    with pytest.raises(ValueError, match="s ≤ t"):
        FlowMap()(student, torch.zeros(2, *shape), torch.tensor(0.2), torch.tensor(0.5), None, cond=None, rng=Rng(0))
    with pytest.raises(ValueError, match="told is a list"):
        MLP((2,), told=["ends"])
    with pytest.raises(ValueError, match="told is a list"):
        Preconditioned(MLP((2,)), VPSDE(), Eps(), told="end")
    deaf = Preconditioned(MLP((2,), width=16), VPSDE(), Eps(), told=["end"])
    with pytest.raises(ValueError, match="told=\\['end'\\]"):
        Sampler(FlowMap())(deaf, (2, 2))
