r"""One-step methods on the pair (x̂_0, ε̂), for every SDE, event shape and grid.

Coefficients are computed in the dtype of the grid (float64) and meet the batch once, in `ops.lincomb`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..checks import whole
from ..diffusion.denoiser import Cond, Denoiser
from ..diffusion.grids import Grid
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..diffusion.split import step_variances
from ..noise.rng import Rng
from ..ops import langevin, lincomb
from ..ops.broadcast import coefficient
from .sampler import LongStep, State, Step


class EulerMaruyama(Step):
    r"""Euler–Maruyama on the reverse SDE (Song et al. 2021, eq. 6; Anderson 1982):

    `x_s = x − [f x − g² score](t − s) + g √(t − s) z`.

    Strong order 1, because the noise is additive (g depends on t only; Kloeden & Platen 1992, sec. 10.2).

    Args:
        probability_flow: half the score term and no noise: the Euler method of the probability-flow ODE (eq. 13).
    """

    order, evaluations = 1.0, 1
    default_steps = 1000

    def __init__(self, probability_flow: bool = False):
        self.probability_flow = probability_flow

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde = denoiser.sde
        dt, g = t - s, sde.diffusion(t)
        part = 0.5 if self.probability_flow else 1.0
        _, sigma = sde.marginal(t)
        eps = denoiser(x, t, cond).eps
        noise = None if self.probability_flow else (g * dt.sqrt(), rng.noise(x))
        return lincomb(((1 - sde.drift(t) * dt, x), (-part * g**2 * dt / sigma, eps)), noise), state


class ReverseDiffusion(Step):
    r"""The reverse-diffusion predictor (Song et al. 2021, App. E, eq. 46): the forward move s → t, reversed.

    With x_t | x_s ~ N(a x_s, std² I), exact on the grid at hand: `x_s = (2 − a) x + std² score + std z`.
    For VE std² = σ_t² − σ_s², as in the paper; for VP a is the exact transition, which √(1 − β_i) approximates.

    Args:
        probability_flow: no noise, and to first order half the score: `(2 − a) x + [(2 − a) σ_t − σ_s] σ_t score`.
            The paper's ½ std² does not carry pure noise along its path, x_s = (σ_s/σ_t) x, and where α goes to 0 its
            errors multiply: 30 % of the variance of a flow after 150 steps.
    """

    order, evaluations = 1.0, 1
    default_steps = 1000

    def __init__(self, probability_flow: bool = False):
        self.probability_flow = probability_flow

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde = denoiser.sde
        scale, std = sde.transition(s, t)
        _, sigma = sde.marginal(t)
        eps = denoiser(x, t, cond).eps
        kick = (2 - scale) * sigma - sde.marginal(s)[1] if self.probability_flow else std**2 / sigma
        noise = None if self.probability_flow else (std, rng.noise(x))
        return lincomb(((2 - scale, x), (-kick, eps)), noise), state


def ddim_update(sde: SDE, p: Prediction, t: Tensor, s: Tensor, eta: float, rng: Rng) -> Tensor:
    r"""x_s = α_s x̂_0 + √(σ_s² − std²) ε̂ + std z, with std = η σ_s √(1 − e^{λ_t − λ_s}).

    (Song, Meng & Ermon 2021, eq. 12 and 16.) Nothing is divided by α or σ.
    """
    alpha, sigma = sde.marginal(s)
    if eta == 0:
        return lincomb(((alpha, p.x0), (sigma, p.eps)))
    alpha_t, sigma_t = sde.marginal(t)
    # share of σ_s² that the posterior q(x_s|x_t, x_0) holds, 1 − e^{λ_t − λ_s}
    gap = (1 - (alpha_t * sigma / (alpha * sigma_t)) ** 2).clamp(min=0)
    kept = sigma * (1 - eta**2 * gap).sqrt()
    return lincomb(((alpha, p.x0), (kept, p.eps)), (eta * sigma * gap.sqrt(), rng.noise(p.x0)))


class DDIM(LongStep):
    """The DDIM step (Song, Meng & Ermon 2021, eq. 12): exact for a constant prediction, in any SDE.

    Args:
        eta: noise, in [0, 1]: 0 is the probability-flow ODE (order 1), 1 the ancestral sampler.
    """

    order, evaluations = 1.0, 1

    def __init__(self, eta: float = 0.0):
        if not (0 <= eta <= 1):
            raise ValueError(f"DDIM needs eta in [0, 1]; got {eta}.")
        self.eta = float(eta)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        return ddim_update(denoiser.sde, denoiser(x, t, cond), t, s, self.eta, rng), state


class Ancestral(Step):
    """Draws x_s from a Gaussian with the mean of the posterior q(x_s | x_t, x̂_0) of the forward process, for every SDE.

    Under VP it is DDPM's sampler (Ho et al. 2020, eq. 7 and alg. 2), under VE with the posterior's variance the
    ancestral sampler of Song et al. 2021, App. F, eq. 47.

    Args:
        variance: where log Σ is between the variance of the posterior (0) and of the forward move (1), both of DDPM.
            None goes by a model that learnt it (`Split`; Nichol & Dhariwal 2021, eq. 15), and else is 0.
    """

    order, evaluations = 1.0, 1
    default_steps = 1000

    def __init__(self, variance: float | None = None):
        if variance is not None and not 0 <= variance <= 1:
            raise ValueError(f"variance is a share in [0, 1], or None for what the model learnt; got {variance}.")
        self.variance = variance

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde, p = denoiser.sde, denoiser(x, t, cond)
        share = p.share if self.variance is None else self.variance
        if share is None or self.variance == 0:
            return ddim_update(sde, p, t, s, 1.0, rng), state
        (alpha, sigma), scale, (least, wider) = sde.marginal(s), sde.transition(s, t)[0], step_variances(sde, t, s)
        mean = ((alpha, p.x0), (scale * sigma**2 / sde.marginal(t)[1], p.eps))  # whatever the variance is
        if self.variance is not None:
            return lincomb(mean, ((0.5 * (least + self.variance * wider)).exp(), rng.noise(x))), state
        std = (0.5 * (coefficient(least, x) + share * coefficient(wider, x))).exp()
        return lincomb(mean) + std * rng.normal_like(x), state


class Heun(LongStep):
    r"""Heun's method on dy/dς = ε̂, y = x/α, ς = σ/α (Karras et al. 2022, alg. 1, for every SDE):

    `x_s = α_s ȳ_0 + σ_s ε̄`, with ε̄ the mean of ε̂ at t and at the DDIM point, ȳ_0 = (x − σ_t ε̄)/α_t.
    """

    order, evaluations = 2.0, 2
    default_steps = 50

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        sde = denoiser.sde
        first = denoiser(x, t, cond)
        guess = ddim_update(sde, first, t, s, 0.0, rng)
        second = denoiser(guess, s, cond)
        # ½(ς_s − ς_t) α_s (ε̂_s − ε̂_t) on top of the DDIM point
        (alpha_t, sigma_t), (alpha, sigma) = sde.marginal(t), sde.marginal(s)
        slope = 0.5 * (sigma - alpha / alpha_t * sigma_t)
        return lincomb(((1.0, guess), (slope, second.eps), (-slope, first.eps))), state


class Langevin(Step):
    r"""The Langevin corrector with the signal-to-noise rule (Song et al. 2021, alg. 4 and 5), **per sample**:

    `x ← x + h score + √(2h) z`, `h = 2 snr² σ² (D + 64)/(‖σ score‖² + 64)`, so no sample depends on its batch-mates.

    The paper's `h = 2 (snr ‖z‖/‖score‖)²` takes norms over a batch. Those of one sample are noisy in few dimensions: a
    step that varies with z inflates the variance by (D + 2)/D, and one that varies with x biases the distribution by
    ‖score‖². So ‖z‖² is replaced by its mean D, and 64 dimensions of pure noise (‖σ score‖² = 1 each) are added: for
    images that is the paper's rule, and by itself it inflates the variance of a Gaussian by less than 1 + 2/(D + 64).
    h is at most σ², the longest step that is stable for every density, because −∇² log p_t ⪯ I/σ². The paper's factor
    α_i = 1 − β_i belongs to one training grid; here it is 1, so the rule holds on any grid.

    Args:
        snr: r > 0, target ratio of the score's step to the noise's.
        measured: use ‖z‖² of the noise that is added, as in the paper, instead of its mean D.
    """

    order, evaluations = 0.0, 1

    def __init__(self, snr: float = 0.16, measured: bool = False):
        if not (0 < snr < math.inf):
            raise ValueError(f"Langevin needs snr > 0; got {snr}.")
        self.snr, self.measured = float(snr), bool(measured)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        _, sigma = denoiser.sde.marginal(t)
        eps = denoiser(x, t, cond).eps
        return langevin(x, eps, sigma, self.snr, rng.noise(x), measured=self.measured), state


class AnnealedLangevin(Step):
    r"""Annealed Langevin dynamics (Song & Ermon 2019, alg. 1): `x ← x + h score + √(2h) z`, `h = 2 (snr σ_t)²`.

    The step follows the noise level alone, so each correction is an exact discretisation of a fixed diffusion.

    Args:
        snr: r in (0, 1): h/σ² = 2r² has to stay below 2 for stability.
    """

    order, evaluations = 0.0, 1

    def __init__(self, snr: float = 0.16):
        if not (0 < snr < 1):
            raise ValueError(f"AnnealedLangevin needs 0 < snr < 1; got {snr}.")
        self.snr = float(snr)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        _, sigma = denoiser.sde.marginal(t)
        eps, h = denoiser(x, t, cond).eps, 2 * self.snr**2
        return lincomb(((1.0, x), (-h * sigma, eps)), (math.sqrt(2 * h) * sigma, rng.noise(x))), state


class PredictorCorrector(Step):
    """`corrector_steps` corrections at t, then the predictor's move to s (Song et al. 2021, alg. 1, any pair, any SDE).

    Its order is the predictor's; a corrector of fixed snr leaves a bias of about snr² σ² that more steps do not remove,
    and that is small where it counts because σ(t_min) is.

    Args:
        predictor: a step that moves.
        corrector: a step at s == t.
        corrector_steps: ≥ 0.
    """

    def __init__(self, predictor: Step, corrector: Step, corrector_steps: int = 1):
        corrector_steps = whole(corrector_steps, "corrector_steps", 0)
        if predictor.evaluations is None or corrector.evaluations is None:
            raise ValueError("PredictorCorrector takes fixed-step parts; an adaptive solver has no steps to correct.")
        self.predictor, self.corrector, self.corrector_steps = predictor, corrector, corrector_steps
        self.order = predictor.order
        self.evaluations = predictor.evaluations + corrector_steps * corrector.evaluations
        self.default_steps = predictor.default_steps

    def init(self, x: Tensor) -> State:
        return self.predictor.init(x), self.corrector.init(x)

    def default_grid(self, denoiser: Denoiser) -> Grid:
        return self.predictor.default_grid(denoiser)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        moving, correcting = state
        for _ in range(self.corrector_steps):
            x, correcting = self.corrector(denoiser, x, t, t, correcting, cond=cond, rng=rng)
        x, moving = self.predictor(denoiser, x, t, s, moving, cond=cond, rng=rng)
        return x, (moving, correcting)
