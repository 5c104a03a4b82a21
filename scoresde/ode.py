r"""The probability-flow ODE in scaled coordinates, and `integrate`, which sampling, encoding and likelihood share.

With y = x/α and u = log ς, ς = σ/α, every affine SDE has the same probability-flow ODE, dy/du = ς ε̂ (Karras et al.
2022, eq. 4 with s = α; Zhang & Chen 2023). States are (B, N) matrices in float64, one row per sample; the network sees
its own dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import positive
from .diffusion.conditions import Cond, take
from .diffusion.denoiser import Denoiser
from .diffusion.sde import SDE

Rhs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(u (n,), y (n, N), rows (n,)) -> dy/du (n, N): `rows` names the samples of the batch that are asked for."""

Watch = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(rows (n,), u (n,), dy/du (n, N), error (n, N)) of the steps just accepted: where they end, what they may miss."""

FIXED_STEP = {
    "euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4, "implicit_adams": 5,
    "fixed_adams": 5,
}  # fmt: skip
"""Methods of torchdiffeq without step control, each with its order."""
METHODS: dict[str, dict[str, int]] = {
    "native": {"dopri5": 5},
    "torchdiffeq": {"dopri5": 5, "dopri8": 8, "bosh3": 3, "adaptive_heun": 2, **FIXED_STEP},
    "scipy": {"RK45": 5, "RK23": 3, "DOP853": 8, "Radau": 5, "BDF": 5, "LSODA": 12},
}
"""Methods by backend, each with its (highest) order; the first is the default."""


class SolverError(RuntimeError):
    """A solve that did not reach its end: no state of it is ever returned.

    Attributes:
        reason: what happened.
        t: diffusion time at which it happened (None where the backend does not say).
        evaluations: right-hand sides evaluated until then.
        samples: indices in the batch of the samples that failed (empty where the backend couples the batch).
    """

    def __init__(self, reason: str, *, t: float | None = None, evaluations: int = 0, samples: Sequence[int] = ()):
        self.reason, self.t, self.evaluations, self.samples = reason, t, evaluations, list(samples)
        where = "" if t is None else f" at t={t:.6g}"
        which = f", samples {self.samples[:8]}{'…' if len(self.samples) > 8 else ''}" if self.samples else ""
        super().__init__(f"{reason}{where} after {evaluations} evaluations{which}.")


def check_finite(x: Tensor, reason: str, *, t: float | None = None, evaluations: int = 0) -> None:
    """Raises a SolverError that names the samples of `x` (B, *event) with values that are not finite."""
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise SolverError(reason, t=t, evaluations=evaluations, samples=bad)


def log_ratio(sde: SDE, t: Tensor) -> Tensor:
    """u = log(σ/α) = −λ/2 at t."""
    return -0.5 * sde.log_snr(t)


def point(sde: SDE, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(t, α, σ), each of the shape of u = log(σ/α); clamped to the time range, which round-off may leave."""
    t = sde.time(-2 * u).clamp(sde.t_min, sde.t_max)
    alpha, sigma = sde.marginal(t)
    return t, alpha, sigma


def lagrange(nodes: Tensor, u: Tensor) -> Tensor:
    """The polynomials that are 1 at one of the nodes (…, k) and 0 at the others, at u (…, Q): (…, k, Q)."""
    same = torch.eye(nodes.shape[-1], dtype=torch.bool, device=nodes.device)
    above = (u[..., None, :] - nodes[..., None])[..., None, :, :].masked_fill(same[..., None], 1.0).prod(-2)
    below = (nodes[..., None] - nodes[..., None, :]).masked_fill(same, 1.0).prod(-1)
    return above / below[..., None]


def probability_flow(denoiser: Denoiser, like: Tensor, cond: Cond) -> Rhs:
    """dy/du = ς ε̂(α y) for states that are flattened batches of the event shape and dtype of `like`."""

    def rhs(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        t, alpha, sigma = point(denoiser.sde, u)
        x = (alpha[:, None] * y).to(like.dtype).reshape(-1, *like.shape[1:])
        eps = denoiser(x, t, take(cond, rows)).eps
        return (sigma / alpha)[:, None] * eps.flatten(1).double()

    return rhs


def integrate(
    rhs: Rhs,
    y0: Tensor,
    u0: float,
    u1: float,
    *,
    rtol: float,
    atol: float,
    backend: str = "native",
    method: str | None = None,
    fixed_steps: int = 100,
    blocks: Sequence[int] | None = None,
    max_evaluations: int = 20_000,
    time: Callable[[float], float] = lambda u: u,
    watch: Watch | None = None,
) -> Tensor:
    """y(u1) of dy/du = rhs(u, y, rows) with y(u0) = y0 (B, N), float64; either direction.

    Args:
        rtol, atol: tolerances, > 0: a step's error in component i is measured against atol + rtol·|y_i|.
        backend: "native" (Dormand–Prince 5(4), error and step size per sample: a row does not depend on the others),
            "torchdiffeq" or "scipy" (one step size for the whole batch; reference implementations).
        method: one of `METHODS[backend]`; default the first.
        fixed_steps: number of equal steps a fixed-step torchdiffeq method takes.
        blocks: sizes of the leading groups of columns that are under error control, each by its own RMS, so that
            a single log-density is not outvoted by many pixels; default: all columns as one. Native only.
        max_evaluations: limit on right-hand sides.
        time: u -> diffusion time, for error messages.
        watch: called after each step with the local errors (of the embedded fourth-order solution). Native only.

    Autograd passes through a native solve; its step sizes are constants to it.

    Raises:
        SolverError: step size underflow, evaluation limit, non-finite state, or the backend's own failure.
        ValueError: unknown backend or method, tolerances that are not positive.
    """
    method = check_solver(backend, method, rtol, atol)
    check_finite(y0, "The state is not finite before the solve", t=time(u0))
    count = _Counted(rhs, max_evaluations, time)
    if backend == "native":
        y1 = _dormand_prince(count, y0, u0, u1, rtol, atol, blocks or [y0.shape[1]], watch)
    elif backend == "torchdiffeq":
        y1 = _torchdiffeq(count, y0, u0, u1, rtol, atol, method, fixed_steps)
    else:
        y1 = _scipy(count, y0, u0, u1, rtol, atol, method)
    check_finite(y1, "The solution is not finite", t=time(u1), evaluations=count.evaluations)
    return y1


def check_solver(backend: str, method: str | None, rtol: float, atol: float) -> str:
    """The method, by default the backend's first; refuses what cannot work, before anything is evaluated."""
    if backend not in METHODS:
        raise ValueError(f"Unknown backend {backend!r}; choose one of {', '.join(METHODS)}.")
    if method is not None and method not in METHODS[backend]:
        others = [f"backend={name!r}" for name, methods in METHODS.items() if method in methods]
        elsewhere = f" {method} belongs to {' or '.join(others)}." if others else ""
        raise ValueError(
            f"backend={backend!r} has no method {method!r}; choose one of {', '.join(METHODS[backend])}.{elsewhere}"
        )
    check_tolerances(rtol, atol)
    return method or next(iter(METHODS[backend]))


def check_tolerances(rtol: float, atol: float) -> tuple[float, float]:
    """Both, or a ValueError where one is not positive and finite."""
    return positive(rtol, "rtol", "a tolerance"), positive(atol, "atol", "a tolerance")


class _Counted:
    """A right-hand side that counts its calls and ends a solve that takes too many."""

    def __init__(self, rhs: Rhs, limit: int, time: Callable[[float], float]):
        self.rhs, self.limit, self.time = rhs, limit, time
        self.evaluations = 0

    def __call__(self, u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        if self.evaluations >= self.limit:
            self.fail(f"The solver used its max_evaluations={self.limit}", u, rows)
        self.evaluations += 1
        return self.rhs(u, y, rows)

    def fail(self, reason: str, u: Tensor, rows: Tensor) -> None:
        raise SolverError(
            reason, t=self.time(float(u.flatten()[0])), evaluations=self.evaluations, samples=rows.tolist()
        )


# Dormand & Prince 1980, RK5(4)7M; the last row of A is the fifth-order solution, so k_7 is the next step's k_1
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _error_norm(error: Tensor, scale: Tensor, blocks: Sequence[int]) -> Tensor:
    """The largest block RMS of error/scale, per sample (n,); a constant to autograd."""
    parts = (error / scale).detach()[:, : sum(blocks)].square().split(list(blocks), dim=1)
    return torch.stack([part.mean(1) for part in parts]).amax(0).sqrt()


def _first_step(
    rhs: _Counted, u: Tensor, y: Tensor, k: Tensor, span: Tensor, rows: Tensor, rtol: float, atol: float, blocks
) -> Tensor:
    """Signed first step per sample (Hairer, Nørsett & Wanner 1993, sec. II.4), at the cost of one evaluation."""
    scale = atol + rtol * y.abs()
    d0, d1 = _error_norm(y, scale, blocks), _error_norm(k, scale, blocks)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp(min=1e-30)).minimum(span.abs())
    h0 = h0.clamp(min=1e-10)  # a non-finite start shows in the first error norm
    moved = rhs(u + span.sign() * h0, y + (span.sign() * h0)[:, None] * k, rows)
    d2 = _error_norm(moved - k, scale, blocks) / h0
    steep = torch.maximum(d1, d2)
    h1 = torch.where(steep <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steep.clamp(min=1e-30)) ** 0.2)
    return span.sign() * torch.minimum(100 * h0, h1).nan_to_num(1e-6)


def _dormand_prince(
    rhs: _Counted,
    y0: Tensor,
    u0: float,
    u1: float,
    rtol: float,
    atol: float,
    blocks: Sequence[int],
    watch: Watch | None,
) -> Tensor:
    """Each sample has its own time, step and PI controller; a sample that has arrived leaves the active set."""
    result = y0.clone()
    rows = torch.arange(len(y0), device=y0.device)
    y, u = y0, torch.full((len(y0),), u0, dtype=torch.float64, device=y0.device)
    k1 = rhs(u, y, rows)
    h = _first_step(rhs, u, y, k1, u1 - u, rows, rtol, atol, blocks)
    previous = torch.full_like(u, 1e-4)
    smallest = 1e-12 * max(abs(u1 - u0), abs(u0), abs(u1))
    while len(rows):
        remaining = u1 - u
        last = h.abs() >= remaining.abs() * (1 - 1e-12)
        h = torch.where(last, remaining, h)
        stages, new = [k1], y
        for row, c in zip(_A, _C, strict=True):
            new = y + h[:, None] * sum(a * k for a, k in zip(row, stages, strict=True) if a)
            stages.append(rhs(u + c * h, new, rows))
        error = h[:, None] * sum(e * k for e, k in zip(_E, stages, strict=True) if e)
        norm = _error_norm(error, atol + rtol * torch.maximum(y.abs(), new.abs()), blocks)
        norm = torch.where(torch.isfinite(norm) & torch.isfinite(new).all(1), norm, torch.inf).clamp(min=1e-10)
        accept = norm <= 1
        if watch is not None and bool(accept.any()):
            watch(rows[accept], (u + h)[accept], stages[-1][accept].detach(), error[accept].detach())
        # PI control (Hairer & Wanner 1996, sec. IV.2); after a rejection only shrink
        growth = 0.9 * norm**-0.14 * previous**0.08
        factor = torch.where(accept, growth.clamp(0.2, 5.0), (0.9 * norm**-0.2).clamp(0.1, 0.9))
        arrived = accept & last
        result[rows[arrived]] = new[arrived]
        u = torch.where(accept, u + h, u)
        y = torch.where(accept[:, None], new, y)
        k1 = torch.where(accept[:, None], stages[-1], k1)
        previous = torch.where(accept, norm.clamp(min=1e-4), previous)
        h = h * factor
        stuck = (h.abs() < smallest) & ~arrived
        if bool(stuck.any()):
            rhs.fail("The step size underflowed: the field is not finite or too steep", u[stuck], rows[stuck])
        keep = ~arrived
        if bool(arrived.any()):
            rows, u, y, k1, h, previous = (v[keep] for v in (rows, u, y, k1, h, previous))
    return result


def _torchdiffeq(
    rhs: _Counted, y0: Tensor, u0: float, u1: float, rtol: float, atol: float, method: str, fixed_steps: int
) -> Tensor:
    from torchdiffeq import odeint

    rows = torch.arange(len(y0), device=y0.device)
    ends = torch.tensor([u0, u1], dtype=torch.float64, device=y0.device)
    options: dict[str, Any] = {}
    if method in FIXED_STEP:
        options["step_size"] = abs(u1 - u0) / fixed_steps
    if method.endswith("_adams"):
        options["max_order"] = 5  # Adams–Bashforth 4; the default, 11, is unstable at any usual number of steps

    def field(u: Tensor, y: Tensor) -> Tensor:
        return rhs(u.expand(len(y)), y, rows)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Functional iteration did not converge")
            path = odeint(field, y0, ends, rtol=rtol, atol=atol, method=method, options=options or None)
    except (AssertionError, UserWarning) as error:  # how torchdiffeq reports underflow, NaN, and a failed iteration
        raise SolverError(f"torchdiffeq {method}: {error}", evaluations=rhs.evaluations) from error
    return path[-1]


def _scipy(rhs: _Counted, y0: Tensor, u0: float, u1: float, rtol: float, atol: float, method: str) -> Tensor:
    from scipy.integrate import solve_ivp

    rows = torch.arange(len(y0), device=y0.device)

    def field(u, flat):
        y = torch.as_tensor(flat, dtype=torch.float64, device=y0.device).reshape(y0.shape)
        times = torch.full((len(y),), float(u), dtype=torch.float64, device=y0.device)
        return rhs(times, y, rows).cpu().numpy().reshape(-1)

    start = y0.cpu().numpy().reshape(-1)
    try:
        solution = solve_ivp(field, (u0, u1), start, method=method, rtol=rtol, atol=atol)
    except (ValueError, np.linalg.LinAlgError) as error:  # how the implicit methods report a NaN
        raise SolverError(f"scipy {method}: {error}", evaluations=rhs.evaluations) from error
    if not solution.success:
        raise SolverError(
            f"scipy {method}: {solution.message}", t=rhs.time(float(solution.t[-1])), evaluations=rhs.evaluations
        )
    return torch.as_tensor(solution.y[:, -1], device=y0.device).reshape(y0.shape)
