r"""The reverse SDE to a tolerance, with an error, a step size and a Brownian path per sample.

Everything is in ℓ = log(α/σ) = λ/2, in which the noise of `dx = [f x − ½(1 + η²) g² score] dt + η g dw` is, per σ, a
Brownian motion in the clock e^{2η²ℓ}, and for a constant x̂_0 a step of any length is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import positive, whole
from ..diffusion.conditions import Cond, take
from ..diffusion.denoiser import Denoiser
from ..diffusion.prediction import Prediction
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ode import SolverError, check_finite, check_tolerances
from ..ops.broadcast import coefficient, expand_as_batch
from .sampler import State, Step


class AdaptiveSDE(Step):
    r"""The adaptive solver of Jolicoeur-Martineau et al. 2021 (alg. 1): Euler–Maruyama for the step, and the stochastic
    improved Euler method, on the same noise, for its error and as the result.

    With h = ℓ_s − ℓ_t and z ~ N(0, I), the pair is, for constant and for linear x̂_0 in between,

        x′ = α_s x̂_0 + σ_s (e^{−η²h} ε̂ + √(1 − e^{−2η²h}) z)
        x″ = x′ + α_s [1 − (1 − e^{−a})/a] (x̂_0(x′, s) − x̂_0),   a = (1 + η²) h,

    a step is accepted where the RMS of (x″ − x′)/(atol + rtol max(|x|, |x′|)) is at most 1, and h follows it to the
    power −2/3, because the error is of size h^{3/2}.

    A rejected step was rejected for its noise. Drawing that again would leave out just the paths that move most, so it
    is kept: the shorter step gets its part of it by a Brownian bridge, and the rest waits for the steps after it
    (Rackauckas & Nie 2017, RSwM1).

    Each sample has its own path and steps and, with `Rng(seeds=…)`, depends on its own seed only. Times can differ
    between samples.

    Args:
        rtol, atol: tolerances, > 0, on x. The paper's atol is one of the 256 grey levels of data in [−1, 1].
        eta: noise, > 0; 1 is the reverse SDE.
        first_step, max_step: in ℓ, > 0: 1 is a factor e in σ/α. The error estimate says nothing about the variance, of
            which steps of 0.5 can take 10 %.
        max_evaluations: limit on network calls per solve.

    Raises:
        ValueError: an argument outside these.
        SolverError: evaluation limit, step size underflow or a state that is not finite; names the samples.
    """

    order, evaluations = 1.0, None
    default_steps = 1

    def __init__(
        self,
        rtol: float = 0.02,
        atol: float = 2 / 256,
        eta: float = 1.0,
        first_step: float = 0.1,
        max_step: float = 0.5,
        max_evaluations: int = 10_000,
    ):
        self.rtol, self.atol = check_tolerances(rtol, atol)
        self.eta = positive(eta, "eta", "an amount of noise, see AdaptiveODE for 0,")
        self.max_step = positive(max_step, "max_step", "a length in log(α/σ)")
        self.first_step = min(positive(first_step, "first_step", "a length in log(α/σ)"), self.max_step)
        self.max_evaluations = whole(max_evaluations, "max_evaluations")

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        check_finite(x, "The state is not finite before the solve", t=float(t.flatten()[0]))
        t, s = (time.to(x.device, torch.float64).expand(len(x)) for time in (t, s))
        return _solve(self, denoiser, x, t, s, cond, rng), state


class _Path:
    """Brownian motions in the clock e^{2η²ℓ}, one per sample, with the increments already drawn for later steps.

    These are a stack of pieces: where a piece ends, and its increment as a unit normal. The next one is on top.
    """

    def __init__(self, eta: float, like: Tensor):
        self.rate = 2 * eta**2
        self.depth = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.ends = torch.zeros(len(like), 0, dtype=torch.float64, device=like.device)
        self.pieces = like.new_zeros(len(like), 0, *like.shape[1:])

    def take(self, level: Tensor, want: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """The increment over the next `want` (n,) from `level` (n,), or over the first piece if that is no longer.

        Returns lengths (n,) and unit normals like `fresh`, which is used where nothing is known, or to split a piece:
        with f the fraction of the clock that the first part takes, (z, fresh) turns into
        (√f z + √(1 − f) fresh, √(1 − f) z − √f fresh).
        """
        known = (self.depth > 0).nonzero().flatten()
        if not len(known):
            return want, fresh
        want, fresh, top = want.clone(), fresh.clone(), self.depth[known] - 1
        length, asked, old = self.ends[known, top] - level[known], want[known], self.pieces[known, top]
        entire = length <= 1.01 * asked  # leave no slivers
        self.depth[known[entire]] -= 1
        fraction = torch.exp(self.rate * (asked - length)) * torch.expm1(-self.rate * asked)
        fraction = torch.where(entire, 1.0, fraction / torch.expm1(-self.rate * length))
        part, rest = coefficient(fraction.sqrt(), old), coefficient((1 - fraction).sqrt(), old)
        self.pieces[known, top] = rest * old - part * fresh[known]
        want[known] = torch.where(entire, length, asked)
        fresh[known] = part * old + rest * fresh[known]
        return want, fresh

    def put_back(self, rows: Tensor, ends: Tensor, z: Tensor) -> None:
        """Rejected increments `z` of `rows`, over the way to `ends`, are the next to be taken."""
        if len(rows) and int(self.depth[rows].max()) == self.ends.shape[1]:
            self.ends = torch.cat([self.ends, torch.zeros_like(self.depth, dtype=torch.float64)[:, None]], 1)
            self.pieces = torch.cat([self.pieces, z.new_zeros(len(self.depth), 1, *z.shape[1:])], 1)
        self.ends[rows, self.depth[rows]], self.pieces[rows, self.depth[rows]] = ends, z
        self.depth[rows] += 1

    def keep(self, rows: Tensor) -> None:
        self.depth, self.ends, self.pieces = self.depth[rows], self.ends[rows], self.pieces[rows]


def _solve(step: AdaptiveSDE, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond, rng: Rng) -> Tensor:
    """A loop of attempts, one per sample; a sample that has arrived leaves it."""
    sde, result, evaluations = denoiser.sde, x.clone(), 0
    level, end = 0.5 * sde.log_snr(t), 0.5 * sde.log_snr(s)
    rows = (end > level).nonzero().flatten()  # the samples that are still under way
    x, t, s, level, end = (value[rows] for value in (x, t, s, level, end))
    smallest = 1e-10 * (end - level)
    h, path = torch.full_like(level, step.first_step), _Path(step.eta, x)
    x0, eps, moved = torch.empty_like(x), torch.empty_like(x), torch.ones_like(rows, dtype=torch.bool)

    def predict(x: Tensor, t: Tensor, which: Tensor) -> Prediction:
        nonlocal evaluations
        if evaluations >= step.max_evaluations:
            fail(f"The solver used its max_evaluations={step.max_evaluations}", torch.ones_like(rows, dtype=torch.bool))
        evaluations += 1
        return denoiser(x, t, take(cond, which))

    def fail(reason: str, which: Tensor) -> None:
        raise SolverError(reason, t=float(t[which][0]), evaluations=evaluations, samples=rows[which].tolist())

    while len(rows):
        if bool(moved.any()):
            p = predict(x[moved], t[moved], rows[moved])
            x0[moved], eps[moved] = p.x0, p.eps
        want = torch.minimum(h, end - level)
        length, z = path.take(level, want, rng.rows(rows).normal_like(x))
        last = length >= (end - level) * (1 - 1e-12)
        after = torch.where(last, end, level + length)
        time = torch.where(last, s, sde.time(2 * after).clamp(min=s, max=t))
        guess, weight = _euler(sde, step.eta, x0, eps, z, time, length)
        change = weight * (predict(guess, time, rows).x0 - x0)
        scale = step.atol + step.rtol * torch.maximum(x.abs(), guess.abs())
        norm = (change / scale).flatten(1).double().square().mean(1).sqrt()
        norm = torch.where(torch.isfinite(norm), norm, torch.inf).clamp(min=1e-10)
        moved = norm <= 1
        again = (~moved).nonzero().flatten()
        path.put_back(again, after[again], z[again])
        grown = length * (0.9 * norm ** (-2 / 3)).clamp(0.1, 5.0)
        # a piece shorter than h says nothing against h
        h = torch.where(moved & (length < want), torch.maximum(h, grown), grown).clamp(max=step.max_step)
        stuck = ~moved & (h < smallest)
        if bool(stuck.any()):
            fail("The step size underflowed: the prediction is not finite or jumps", stuck)
        x = torch.where(expand_as_batch(moved, x), guess + change, x)
        t, level = torch.where(moved, time, t), torch.where(moved, after, level)
        arrived = moved & last
        if bool(arrived.any()):
            result[rows[arrived]] = x[arrived]
            keep = (~arrived).nonzero().flatten()
            path.keep(keep)
            rows, x, t, s, level, end, smallest, h, x0, eps, moved = (
                value[keep] for value in (rows, x, t, s, level, end, smallest, h, x0, eps, moved)
            )
    return result


def _euler(sde: SDE, eta: float, x0: Tensor, eps: Tensor, z: Tensor, s: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """x′ at s, h in ℓ further on, and the factor of what a change in x̂_0 adds to it."""
    alpha, sigma = sde.marginal(s)
    a, decay = (1 + eta**2) * h, -(eta**2) * h
    noise = coefficient(decay.exp(), x0) * eps + coefficient((-torch.expm1(2 * decay)).sqrt(), x0) * z
    guess = coefficient(alpha, x0) * x0 + coefficient(sigma, x0) * noise
    return guess, coefficient(alpha * (1 + torch.expm1(-a) / a), x0)
