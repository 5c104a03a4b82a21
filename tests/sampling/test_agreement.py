"""Steps that another library defines the same way give its trajectories: diffusers, on the same grid and noise.

Network outputs are one smooth function of (x, noise input) on both sides. diffusers keeps sigmas, and so every
coefficient, in float32: h = λ_s − λ_t is known to 1e-6 of its size and divided differences lose another digit, so
states of order 1 agree to 1e-5 (measured: 7e-6) and the tolerance is 1e-4. Swapping bh1 for bh2, τ = 1 for 0.95 or an
exact two-node start for bh1's moves them by 9e-3 and up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.schedulers import scheduling_sde_ve
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from scoresde import (
    DDIM,
    DEIS,
    EDM,
    EDMSDE,
    IPNDM,
    SDE,
    VESDE,
    X0,
    Ancestral,
    AnnealedLangevin,
    CosineSDE,
    Denoiser,
    DPMSolverPP,
    Eps,
    Heun,
    KarrasGrid,
    Langevin,
    Multistep,
    Preconditioned,
    PredictorCorrector,
    ReverseDiffusion,
    Rng,
    Sampler,
    SASolver,
    Score,
    Split,
    Step,
    TableSDE,
    UniPC,
    V,
)
from scoresde.ops import lincomb
from scoresde.sampling.multistep import History
from scoresde.sampling.weights import knots

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # numpy on torch tensors
STEPS, SEED = 8, 7


class TheirNoise(Rng):
    """The numbers of a `torch.Generator`, from which diffusers draws."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape, *, dtype=None, device=None):
        return torch.randn(tuple(shape), generator=self.generator, dtype=dtype, device=device)


SHAPE = (4, 3, 4, 4)
TO_DATA = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}  # no first-order last step, and none to zero


def network(x: Tensor, c_noise: Tensor) -> Tensor:
    """Of order 1, with slopes of order 1, not linear in either argument, and mixing dimensions."""
    c = c_noise.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x.roll(1, -1) - 0.4 * x + 0.3) + 0.5 * torch.sin(c / 60)


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def theirs(scheduler, x: Tensor, c_noise: Tensor, seeded: bool = False) -> list[Tensor]:
    """x after every call of the scheduler; `c_noise` is what the network hears in each."""
    kwargs = {"generator": torch.Generator().manual_seed(SEED)} if seeded else {}
    states = []
    for t, c in zip(scheduler.timesteps, c_noise, strict=True):
        output = network(scheduler.scale_model_input(x, t), c.float().expand(len(x)))
        x = scheduler.step(output, t, x, **kwargs).prev_sample
        states.append(x)
    return states


def assert_same(step: Step, denoiser: Denoiser, times: Tensor, x: Tensor, expected: list[Tensor], **kwargs) -> None:
    """Every state of our run over `times` is theirs; TheirNoise draws the numbers of their generator."""
    sampler = Sampler(step, lambda sde, n: times.double(), len(times) - 1, **kwargs)
    states = [trace.x for trace in sampler.iterate(denoiser, x, rng=TheirNoise(SEED))][1:]
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-4, atol=1e-4)


def table(scheduler) -> TableSDE:
    return TableSDE(scheduler.alphas_cumprod)


def preserving(sde: SDE, parameterization=None) -> Preconditioned:
    """The network as diffusers asks it: x unscaled, and the step index (entry i of a table is t = i/N, from 1)."""
    return Preconditioned(
        network, sde, parameterization or V(), noise_input=lambda sde, t: t * 1000 - 1, scale_input=False
    )


def index_times(timesteps: Tensor) -> Tensor:
    return (timesteps.double() + 1) / 1000


# the ramp of orders at the start is the same for these; sampling ends at the last entry of the table
MULTISTEP: dict[str, tuple[Multistep, Callable]] = {
    f"dpm++{order}{'-sde' if eta else ''}": (
        DPMSolverPP(order, eta),
        lambda order=order, eta=eta: DPMSolverMultistepScheduler(
            solver_order=order,
            algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
            prediction_type="v_prediction",
            **TO_DATA,
        ),
    )
    for order in (1, 2)
    for eta in (0.0, 1.0)
}
MULTISTEP |= {
    f"exact-slope{'-sde' if eta else ''}": (
        Multistep(2, eta=eta),
        lambda eta=eta: DPMSolverMultistepScheduler(
            solver_type="heun",
            algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
            prediction_type="v_prediction",
            **TO_DATA,
        ),
    )
    for eta in (0.0, 1.0)
}
MULTISTEP |= {
    f"unipc{order}-{variant}": (
        UniPC(order, variant),
        lambda order=order, variant=variant: UniPCMultistepScheduler(
            solver_order=order, solver_type=variant, prediction_type="v_prediction", **TO_DATA
        ),
    )
    for order in (1, 2)
    for variant in ("bh1", "bh2")
}
MULTISTEP |= {
    f"deis{order}": (
        DEIS(order),
        lambda order=order: DEISMultistepScheduler(
            solver_order=order, prediction_type="v_prediction", lower_order_final=False
        ),
    )
    for order in (1, 2)
}
MULTISTEP |= {
    f"sa{p}+{c}-tau{tau}": (
        SASolver(p, c, tau),
        lambda p=p, c=c, tau=tau: SASolverScheduler(
            predictor_order=p,
            corrector_order=c,
            tau_func=lambda t: torch.tensor(tau),
            prediction_type="v_prediction",
            lower_order_final=False,
        ),
    )
    for p, c in ((1, 2), (2, 2), (2, 3), (3, 3))
    for tau in (0.0, 1.0)
}


@pytest.mark.parametrize(("step", "make"), MULTISTEP.values(), ids=MULTISTEP.keys())
def test_multistep_methods_on_a_table(step, make) -> None:
    """DPM-Solver++ 1 and 2 (both slopes, ODE and SDE), UniPC 1 and 2, DEIS 1 and 2 and SA-Solver are diffusers' own."""
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    x, seeded = noise(), step.eta > 0 or isinstance(scheduler, SASolverScheduler)
    expected = theirs(scheduler, x, scheduler.timesteps, seeded)
    times = index_times(torch.cat([scheduler.timesteps, torch.zeros(1)]))
    assert_same(step, preserving(table(scheduler)), times, x, expected, denoise=False)


LATER: dict[str, tuple[Multistep, Callable]] = {
    f"unipc3-{variant}": (
        UniPC(3, variant),
        lambda variant=variant: UniPCMultistepScheduler(
            solver_order=3, solver_type=variant, prediction_type="v_prediction", **TO_DATA
        ),
    )
    for variant in ("bh1", "bh2")
}
LATER["deis3"] = (
    DEIS(3),
    lambda: DEISMultistepScheduler(solver_order=3, prediction_type="v_prediction", lower_order_final=False),
)
LATER["dpm++3"] = (
    DPMSolverPP(3),
    lambda: DPMSolverMultistepScheduler(solver_order=3, prediction_type="v_prediction", **TO_DATA),
)


@pytest.mark.parametrize(("step", "make"), LATER.values(), ids=LATER.keys())
def test_third_order_methods_once_they_have_their_values(step, make) -> None:
    """Step 5 from diffusers' own memory, as the first steps differ: they raise the order, we redo them (order 3 holds).

    For DPM-Solver++ the published formula then lacks half of the curvature term, α (½ − (e^{−h} − 1 + h)/h²) D2,
    whose full value makes it the integral of a parabola.
    """
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    denoiser, x = preserving(table(scheduler)), noise()
    times = index_times(torch.cat([scheduler.timesteps, torch.zeros(1)]))
    states = [x]
    for k in range(5):
        c = scheduler.timesteps[k].float().expand(len(x))
        if k == 4:
            state = remembered(step, scheduler, states, times, k)
        states.append(scheduler.step(network(states[-1], c), scheduler.timesteps[k], states[-1]).prev_sample)
    moved, _ = step(denoiser, states[4], times[4], times[5], state, cond=None, rng=TheirNoise(SEED))
    expected = states[5] + (missing_curvature(denoiser, states, times) if type(step) is DPMSolverPP else 0)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def remembered(step: Multistep, scheduler, states: list[Tensor], times: Tensor, k: int) -> History:
    """diffusers' memory before its call number k, in our terms: the values before it, and the last step's base."""
    sde = table(scheduler)
    here, *past = knots(sde, times[[k, k - 1, k - 2, k - 3]], step.q(preserving(sde)))
    values = tuple(scheduler.model_outputs[-1 - back] for back in range(3))
    before = scheduler.last_sample if step.corrector else states[k - 1]
    carried, noise = step.carried(before, past[0], here, TheirNoise(SEED))
    base = lincomb((carried,), noise)
    return History(base, tuple(past), values, None)


def missing_curvature(denoiser: Preconditioned, states: list[Tensor], times: Tensor) -> Tensor:
    """α_s (½ − (e^{−h} − 1 + h)/h²) D2 of the step from times[4]; D2 is h² times the second divided difference."""
    level = 0.5 * denoiser.sde.log_snr(times)
    m0, m1, m2 = (denoiser(states[k], times[k]).x0 for k in (4, 3, 2))
    h, r0, r1 = (level[k + 1] - level[k] for k in (4, 3, 2))
    second = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
    alpha = denoiser.sde.marginal(times[5])[0]
    return (alpha * (0.5 - (math.expm1(-h) + h) / h**2) * h**2 * second).float()


PREDICTIONS = {"epsilon": Eps(), "sample": X0(), "v_prediction": V()}
ANCESTRAL = [
    pytest.param(DDIM(0.0), lambda **kw: DDIMScheduler(**kw), 0.0, id="ddim"),
    pytest.param(DDIM(0.5), lambda **kw: DDIMScheduler(**kw), 0.5, id="ddim-half"),
    pytest.param(DDIM(1.0), lambda **kw: DDIMScheduler(**kw), 1.0, id="ddim-1"),
    pytest.param(Ancestral(), lambda **kw: DDPMScheduler(**kw), None, id="ddpm"),
]


@pytest.mark.parametrize(("step", "make", "eta"), ANCESTRAL)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_and_ddpm_in_every_parameterisation(step, make, eta, prediction) -> None:
    """DDIM for any eta and DDPM with the posterior variance; their last step, to ᾱ = 1, is our denoising."""
    scheduler = make(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x = noise()
    if eta is not None:
        original = scheduler.step
        scheduler.step = lambda *args, **kwargs: original(*args, eta=eta, **kwargs)
    expected = theirs(scheduler, x, scheduler.timesteps, seeded=True)
    denoiser = preserving(table(scheduler), PREDICTIONS[prediction])
    assert_same(step, denoiser, index_times(scheduler.timesteps), x, expected)


def two_heads(x: Tensor, c_noise: Tensor) -> Tensor:
    return torch.cat([network(x, c_noise), torch.sin(2 * x.roll(2, -1))], 1)


@pytest.mark.parametrize("steps", [STEPS, 1000], ids=["respaced", "whole"])
@pytest.mark.parametrize(("kind", "variance"), [("learned_range", None), ("fixed_large", 1.0), ("fixed_small", 0.0)])
def test_ddpm_with_every_variance(kind, variance, steps) -> None:
    """The learned range of Nichol & Dhariwal and both of Ho et al., over all steps and respaced, in float64 to 1e-5.

    Both tables are of the same numbers. The last step of theirs, to ᾱ = 1, is our denoising.
    """
    scheduler = DDPMScheduler(variance_type=kind, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = scheduler.one.double()
    scheduler.set_timesteps(steps)
    heads = two_heads if kind == "learned_range" else network
    x, generator = noise().double(), torch.Generator().manual_seed(SEED)
    expected = []
    for t in scheduler.timesteps:
        sample = expected[-1] if expected else x
        output = heads(sample, t.double().expand(len(x)))
        expected.append(scheduler.step(output, t, sample, generator=generator).prev_sample)
    kind_of = Split if kind == "learned_range" else Preconditioned
    how = {"noise_input": lambda sde, t: t * 1000 - 1, "scale_input": False}
    denoiser = kind_of(heads, table(scheduler), Eps(), **how)
    sampler = Sampler(Ancestral(variance), lambda sde, n: index_times(scheduler.timesteps), steps - 1)
    assert sampler.evaluations == steps
    states = [trace.x for trace in sampler.iterate(denoiser, x, rng=TheirNoise(SEED))][1:]
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-5, atol=1e-5)


EXPLODING = {
    "euler": (DDIM(), lambda: EulerDiscreteScheduler(use_karras_sigmas=True), Eps()),
    "heun": (Heun(), lambda: HeunDiscreteScheduler(use_karras_sigmas=True), Eps()),
    "edm-euler": (DDIM(), lambda: EDMEulerScheduler(sigma_data=0.5), EDM(0.5)),
    "edm-dpm++2": (DPMSolverPP(2), lambda: EDMDPMSolverMultistepScheduler(lower_order_final=False), EDM(0.5)),
    "edm-dpm++2-sde": (
        DPMSolverPP(2, 1.0),
        lambda: EDMDPMSolverMultistepScheduler(lower_order_final=False, algorithm_type="sde-dpmsolver++"),
        EDM(0.5),
    ),
}


@pytest.mark.parametrize(("step", "make", "parameterization"), EXPLODING.values(), ids=EXPLODING.keys())
def test_methods_over_noise_levels(step, make, parameterization) -> None:
    """Euler in σ is DDIM under α = 1, Heun is Karras' algorithm 1; with EDM's preconditioning, and its c_noise.

    Their last step, to σ = 0, is our denoising.
    """
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    x = noise() * float(sigmas[0])
    seeded = getattr(step, "eta", 0) > 0
    expected = theirs(scheduler, x, 0.25 * sigmas[:-1].log(), seeded)
    levels = sigmas[:-1].unique_consecutive()
    if isinstance(parameterization, EDM):
        rho7 = KarrasGrid(7.0)(EDMSDE(0.002, 80.0), STEPS - 1)
        torch.testing.assert_close(levels, rho7, rtol=1e-5, atol=0)
    if type(step) is Heun:  # two of their calls are one step, and the guess between them is not ours to compare
        expected = [*expected[1::2], expected[-1]]
    sde = EDMSDE(float(levels[-1]), float(levels[0]))
    sigma_data = getattr(parameterization, "sigma_data", 1.0)
    denoiser = Preconditioned(network, sde, parameterization, sigma_data=sigma_data)
    assert_same(step, denoiser, levels, x, expected)


def test_ipndm() -> None:
    """Adams–Bashforth coefficients on ε̂ and a DDIM step, over any angles: diffusers' time is that of the cosine SDE.

    Its network predicts v, seen at the angle itself.
    """
    betas = torch.sin(torch.linspace(0.97, 0.05, STEPS + 1) * math.pi / 2)
    scheduler = IPNDMScheduler(trained_betas=betas.tolist())
    scheduler.set_timesteps(STEPS)
    x = noise()
    expected = theirs(scheduler, x, scheduler.timesteps)
    times = 2 / math.pi * torch.asin(betas.double())
    denoiser = Preconditioned(network, CosineSDE(), V(), noise_input=lambda sde, t: t, scale_input=False)
    assert_same(IPNDM(4), denoiser, times, x, expected, denoise=False)


class UnitNoise(Rng):
    """Normals brought to root mean square 1, sample by sample."""

    def normal(self, shape, *, dtype=None, device=None):
        return unit(super().normal(shape, dtype=dtype, device=device))


def unit(z: Tensor) -> Tensor:
    return z / z.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (z.ndim - 1))


@pytest.mark.parametrize("corrector", [Langevin(0.15), AnnealedLangevin(0.15)], ids=lambda s: type(s).__name__)
def test_ve_predictor_corrector(corrector, monkeypatch) -> None:
    """ScoreSdeVe's predictor and its Langevin corrector, with the mean as last move (our denoising).

    Its corrector takes h = 2 (snr ‖z‖/‖score‖)² with norms averaged over the batch, which couples its samples. Ours
    takes E‖z‖² = D and norms per sample (`Langevin`), or σ² for the norms (`AnnealedLangevin`); the three are one rule
    where ‖z‖ = ‖σ score‖ = √D, so the noise and the scores of this test are made so.
    """
    scheduler = scheduling_sde_ve.ScoreSdeVeScheduler(snr=0.15, sigma_min=0.05, sigma_max=30.0)
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    theirs_rng = UnitNoise(SEED)
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda shape, **kwargs: theirs_rng.normal(shape))
    sigmas = scheduler.discrete_sigmas.flip(0).double()

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return -unit(network(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt(), sigma)) / sigma.reshape(-1, 1, 1, 1)

    x = start = noise() * float(sigmas[0])
    expected = []
    for t, sigma in zip(scheduler.timesteps, sigmas.float(), strict=True):
        level = sigma.expand(len(x))
        last = len(expected) == STEPS - 1
        if not last:
            x = scheduler.step_correct(score(x, level), x).prev_sample
        output = scheduler.step_pred(score(x, level), t, x)
        x = output.prev_sample_mean if last else output.prev_sample
        expected.append(x)
    sde = VESDE(0.05 * 0.999, 30.0)
    denoiser = Preconditioned(score, sde, Score(), noise_input=lambda sde, t: sde.marginal(t)[1], scale_input=False)
    step = PredictorCorrector(ReverseDiffusion(), corrector)
    sampler = Sampler(step, lambda sde, n: sde.time(-2 * sigmas.log()).clamp(max=1.0), STEPS - 1)
    states = [trace.x for trace in sampler.iterate(denoiser, start, rng=UnitNoise(SEED))][1:]
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-4, atol=1e-4)
