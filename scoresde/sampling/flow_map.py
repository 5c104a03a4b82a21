r"""Flow maps: from t to s along the probability-flow ODE in one network call."""

from __future__ import annotations

from torch import Tensor

from ..diffusion.conditions import tell
from ..diffusion.denoiser import Cond, Denoiser
from ..noise.rng import Rng
from ..ops import lincomb
from ..ops.broadcast import per_sample
from .sampler import LongStep, State
from .steps import ddim_update


class FlowMap(LongStep):
    r"""A DDIM step whose x̂_0 knows where it is going: with y = x/α, ς = σ/α and r = ς_s/ς_t

        y_s = r y_t + (1 − r) g(y_t, t, s),    that is    x_s = α_s g + σ_s (x_t − α_t g)/σ_t,

    which has no division by α, so that a flow may start at t_max. Where g ignores s it is DDIM, bit for bit; where g is
    that of the exact flow, one step from t_max to t_min lands where the ODE ends, under every SDE. (The same line under
    one process: Kim et al. 2024, *Consistency trajectory models*, eq. 9; Boffi et al. 2025, *Flow map matching*.)

    Args:
        map: a flow map, that is a denoiser with "end" in `told`; None takes the one that is sampled. Guidance around
            either guides the map from outside.
        renoise: go to t_min each time, and back to s by noise of the sample's own (consistency sampling; Song et al.
            2023, alg. 1): errors of a map are forgotten on the way, and the samples are no longer a function of x_T.

    Raises:
        ValueError: when called: a denoiser that is told one time only, or s > t.
    """

    order, evaluations = 1.0, 1
    default_steps = 1

    def __init__(self, map: Denoiser | None = None, *, renoise: bool = False):
        self.map, self.renoise = map, bool(renoise)

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, state: State, *, cond: Cond, rng: Rng
    ) -> tuple[Tensor, State]:
        told, sde = denoiser if self.map is None else self.map, denoiser.sde
        if "end" not in told.told:
            raise ValueError(
                "FlowMap needs a model that is told where it goes, and this one is told one noise level only: "
                "Preconditioned(network, …, told=['end']), as scoresde-distil makes of a trained model. For any other "
                "take sampler=ddim, or a budget."
            )
        if s.device.type == "cpu" and bool((s > t).any()):
            raise ValueError(f"A flow map goes from noise to data, from t to s ≤ t; got t = {t} and s = {s}.")
        end = s.new_tensor(sde.t_min) if self.renoise else s
        prediction = told(x, t, tell(cond, end=per_sample(end, x)))
        x = ddim_update(sde, prediction, t, end, 0.0, rng)
        if not self.renoise:
            return x, state
        scale, std = sde.transition(end, s)
        return lincomb(((scale, x),), (std, rng.noise(x))), state
