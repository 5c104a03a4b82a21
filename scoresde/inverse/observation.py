r"""What was measured: y = A(x_0) + std · noise, and A near a guess of x_0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.conditions import Cond, named, unnamed
from ..diffusion.denoiser import Denoiser, DenoiserWrapper
from ..diffusion.prediction import Prediction
from ..ops.broadcast import as_double
from .conjugate import conjugate_gradients

Map = Callable[[Tensor], Tensor]


class Measured(NamedTuple):
    """y of shape (B, *y) or one for all, and its noise level."""

    y: Tensor
    std: Tensor


class Linear(NamedTuple):
    """An observation near x̂_0: y − A(x) ≈ residual − forward(x − x̂_0).

    Attributes:
        residual: y − A(x̂_0), (B, *y); 0 where not reached.
        variance: std², float64, of the same shape; 1 where not reached.
        reached: bool, of the same shape: entries that depend on x at all, not those in the hole of a mask.
        forward: v (B, *event) -> A′v (B, *y), the derivative at x̂_0; A itself if it is linear.
        adjoint: u (B, *y) -> A′ᵀu (B, *event), in the dtype of x̂_0.
    """

    residual: Tensor
    variance: Tensor
    reached: Tensor
    forward: Map
    adjoint: Map


class Observation(nn.Module):
    r"""y = A(x_0) + std · noise, noise ~ N(0, I).

    No matrix is needed: products with Aᵀ come from autograd, and where A is not linear its derivative at x̂_0 takes its
    place.

    Args:
        y: what was seen, (B, *y), one per sample of a batch; or (1, *y) or (*y), one for all. With None it comes in the
            condition, `cond={"y": y}`, together with noise levels "std", (B,) or of the shape of y, if these differ.
            The other entries of that mapping go on to the denoiser; an entry "cond" that is the only other goes on as
            a bare tensor. Solvers that give every sample its own steps need y in the condition, because they drop
            samples as they go. Where y is given here, a "y" in the condition belongs to an observation further inside.
        operator: A, (B, *event) -> (B, *y), differentiable, sample by sample; a single number is (B, 1).
        std: noise level, ≥ 0: a number, (B,) or of the shape of y. If B and y have the same size, a vector given here
            holds the entries of y, and one in the condition the samples. Methods that divide by it say so.
        linear: whether A is linear. None reads `operator.linear`; an operator without it counts as not linear. The
            claim is tested at first use.

    Raises:
        TypeError: an operator that is not a function.
        ValueError: y that is not a tensor or not finite, or a negative std; at first use also shapes of y and A(x) that
            do not fit, a complex A(x), a wrong claim that A is linear, or an operator that mixes samples of a batch.
    """

    y: Tensor | None
    std: Tensor

    def __init__(self, y: Tensor | None, operator: Map, std: Tensor | float = 0.0, *, linear: bool | None = None):
        super().__init__()
        std = as_double(std)
        if not callable(operator):
            raise TypeError(f"An operator is a function of x, (B, *event) -> (B, *y); got {type(operator).__name__}.")
        _check(y, std)
        self.register_buffer("y", y, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.operator = operator
        self.linear = bool(getattr(operator, "linear", False)) if linear is None else bool(linear)
        self._tried = False

    def forward(self, x0: Tensor) -> Tensor:
        """A(x_0), (B, *y)."""
        return self.operator(x0)

    def split(self, cond: Cond) -> tuple[Measured, Cond]:
        """What was measured, and the condition that is left for the denoiser inside."""
        if self.y is not None:
            return Measured(self.y, self.std), cond
        rest = named(cond, "cond")
        if "y" not in rest:
            raise ValueError('This Observation has no y; give it as cond={"y": y}, or to Observation(y, …).')
        y = rest.pop("y")
        std = as_double(rest.get("std", self.std))
        if std.ndim == 1 and "std" in rest:
            std = std.reshape(-1, *[1] * (y.ndim - 1))
        rest.pop("std", None)
        return Measured(y, std), unnamed(rest, "cond")

    def null(self, cond: Cond, denoiser: Denoiser) -> Cond:
        """A condition with the same measurement, and otherwise the null condition of `denoiser`."""
        if not self.within(cond):
            return denoiser.null(cond)
        measured = {name: value for name, value in named(cond, "cond").items() if name in ("y", "std")}
        return measured | named(denoiser.null(self.split(cond)[1]), "cond")

    def within(self, cond: Cond) -> bool:
        """Whether y comes with the condition."""
        return self.y is None and "y" in named(cond, "cond")

    def near(self, x0: Tensor, measured: Measured) -> Linear:
        """The observation linearised at x̂_0 (B, *event)."""
        if not self._tried and not torch.compiler.is_compiling():
            self._try(x0)
            _check(*measured)
        if self.linear:
            seen, back = self.operator(x0), torch.func.vjp(self.operator, torch.zeros_like(x0))[1]
        else:
            seen, back = torch.func.vjp(self.operator, x0)  # type: ignore[misc]
        y, std = self.fitted(measured, seen)

        def forward(v: Tensor) -> Tensor:
            v = v.to(x0.dtype)
            return self.operator(v) if self.linear else torch.func.jvp(self.operator, (x0,), (v,))[1]

        def adjoint(u: Tensor) -> Tensor:
            return back(u.to(seen.dtype))[0]

        # entries of y where A has a row of zeros carry no information, and would count in the norms that solvers use
        reached = forward(_numbers(x0)) != 0
        variance = (std.double() ** 2).expand(seen.shape)
        return Linear(
            torch.where(reached, y - seen, 0.0), torch.where(reached, variance, 1.0), reached, forward, adjoint
        )

    def fitted(self, measured: Measured, seen: Tensor) -> Measured:
        """y and std so that they broadcast against A(x) = `seen`, on its device."""
        y, std, shape = measured.y.to(seen), measured.std.to(seen.device), tuple(seen.shape)
        if len(shape) < 2:
            raise ValueError(f"A(x) is (B, *y), and one number a sample (B, 1); got shape {shape}.")
        y = y[None] if y.shape == shape[1:] else y
        if y.ndim == len(shape) and y.shape[1:] == shape[1:] and len(y) not in (1, shape[0]):
            raise ValueError(
                f"y is of {len(y)} samples, and x of {shape[0]}. Solvers that give every sample its own steps drop "
                'samples as they go: build Observation(None, …) and give y as cond={"y": y}.'
            )
        if y.shape not in (shape, (1, *shape[1:])):
            raise ValueError(
                f"A(x) has shape {shape}, so y is {shape}, or one for all, {shape[1:]}; got {tuple(y.shape)}."
            )
        if std.ndim == 1 and std.shape != shape[1:] and len(std) == shape[0]:
            std = std.reshape(-1, *[1] * (len(shape) - 1))
        try:
            std = std.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"std is a number, ({shape[0]},) or of the shape of y, {shape}; got {tuple(std.shape)}."
            ) from None
        return Measured(y, std)

    def project(self, x: Tensor, target: Tensor, *, iterations: int = 200, tolerance: float = 1e-6) -> Tensor:
        r"""x + A⁺(target − A x): the x′ nearest to x that comes nearest to A x′ = target, for a linear A.

        By conjugate gradients on AᵀA w = Aᵀ(target − A x), which is solvable whatever the rank of A.

        Raises:
            ValueError: A is not linear. RuntimeError: not solved in `iterations`.
        """
        if not self.linear:
            raise ValueError("A pseudo-inverse is of a linear operator; say linear=True, or take DPS, PiGDM or MMPS.")
        back = torch.func.vjp(self.operator, torch.zeros_like(x))[1]

        def normal(v: Tensor) -> Tensor:
            return back(self.operator(v.to(x.dtype)))[0]

        rough = 10 * torch.finfo(x.dtype).eps  # no product is better than that
        b = back((target - self.operator(x)).to(x.dtype))[0]
        change = conjugate_gradients(normal, b, iterations=iterations, tolerance=max(tolerance, rough), strict=True)
        return x + change.to(x.dtype)

    def _try(self, x0: Tensor) -> None:
        """The shape of A(x), the claim that A is linear, A(a + 2b) = A(a) + 2 A(b), and that samples do not meet."""
        with torch.no_grad():
            a, b = _numbers(x0, 0.6180339887), _numbers(x0, 0.7548776662)
            both, one, two = self.operator(a + 2 * b), self.operator(a), self.operator(b)
            if both.ndim == 0 or len(both) != len(x0):
                raise ValueError(
                    f"An operator keeps samples apart: (B, *event) -> (B, *y). For {tuple(x0.shape)} it returned "
                    f"{tuple(both.shape)}."
                )
            if both.is_complex():
                raise ValueError(
                    f"A(x) is {both.dtype}; y has real and imaginary parts as entries of their own: "
                    "torch.view_as_real(A(x))."
                )
            gap, size = (both - one - 2 * two).abs().amax(), one.abs().amax() + two.abs().amax()
            rough = 10 * torch.finfo(x0.dtype).eps ** 0.5 * size
            if self.linear and not bool(gap <= rough):
                raise ValueError(
                    f"The operator is said to be linear, but A(a + 2b) − A(a) − 2A(b) is up to {float(gap):.2g}. Say "
                    "linear=False; of an affine one, A(x) = M x + c, take c from y."
                )
            other = self.operator(torch.cat([b[:1], a[1:]]))
            if not bool(((other - one)[1:].abs() <= rough).all()):
                raise ValueError(
                    "An operator keeps samples apart, and in this one the first sample changes the others."
                )
        self._tried = True


def _numbers(like: Tensor, step: float = 0.6180339887) -> Tensor:
    """Normal quantiles in an order without pattern, so that no row of an operator but one of zeros is orthogonal to
    them: of the fractions themselves many differences cancel."""
    count = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return torch.special.ndtri((count * step) % 1).to(like.dtype).reshape(like.shape)


def _check(y: Tensor | None, std: Tensor) -> None:
    if y is not None and not (isinstance(y, Tensor) and y.is_floating_point() and bool(torch.isfinite(y).all())):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y holds finite floating-point numbers; got {kind}, or NaN or infinite ones among it.")
    if not bool((std >= 0).all() & torch.isfinite(std).all()):
        raise ValueError(f"std is a noise level, ≥ 0 and finite; got {std.tolist()}.")


class WithoutMeasurement(DenoiserWrapper):
    """A denoiser from whose condition y is taken out: steps that put y in themselves keep it from the network, but the
    last denoising of a `Sampler` does not.

    Args:
        denoiser: of p(x_0).
        observation: one without y, see `Observation`.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation):
        super().__init__(denoiser)
        self.observation = observation

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Prediction:
        return self.denoiser(x, t, self._rest(cond))

    def null(self, cond: Cond) -> Cond:
        return self.observation.null(cond, self.denoiser)

    def prior_log_prob_given(self, z: Tensor, cond: Cond) -> Tensor:
        return self.denoiser.prior_log_prob_given(z, self._rest(cond))

    def _rest(self, cond: Cond) -> Cond:
        return self.observation.split(cond)[1] if self.observation.within(cond) else cond
