"""The processes of diffusers' schedulers as ours, read from a `scheduler_config.json`; diffusers is not needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..diffusion.parameterization import X0, Eps, Parameterization, V, Velocity
from ..diffusion.sde import SDE, RectifiedFlow
from ..diffusion.table import TableSDE
from ..ops.broadcast import host

PREDICTIONS: dict[str, type[Parameterization]] = {
    "epsilon": Eps,
    "sample": X0,
    "v_prediction": V,
    "flow_prediction": Velocity,
}
_LONGEST = 100_000
_NO_TABLE = ("ScoreSde", "KarrasVe", "EDM", "VQDiffusion", "Consistency", "CogVideoX", "Cosine")
"""Beginnings of the names of schedulers whose processes are others than a table of betas or a flow."""


@dataclass(frozen=True)
class Process:
    """What a scheduler's configuration says of the forward process and of the network's output.

    Attributes:
        sde: the table of ᾱ as a `TableSDE` (entry i of N is t = (i + 1)/N), or `RectifiedFlow`.
        parameterization: of the network's output.
        steps: N, the training time steps.
        shift: how a flow's own grid is shifted, σ → shift σ/(1 + (shift − 1) σ) (Esser et al. 2024, eq. 23).
    """

    sde: SDE
    parameterization: Parameterization
    steps: int
    shift: float = 1.0

    @property
    def is_flow(self) -> bool:
        return self.sde.t_max < 1.0

    def index(self, t: Tensor) -> Tensor:
        """What the network hears at time t: the index N t − 1 of the table, fractions included; N σ for a flow."""
        return self.steps * t - (0 if self.is_flow else 1)

    def time(self, index: Tensor) -> Tensor:
        """The inverse of `index`, float64, within the ends of time."""
        t = (index.to(torch.float64) + (0 if self.is_flow else 1)) / self.steps
        return t.clamp(self.sde.t_min, self.sde.t_max)

    def shifted(self, sigmas: Tensor, mu: float | None = None) -> Tensor:
        """σ of a flow, shifted by `shift`, or by e^μ where a pipeline gives μ for its resolution."""
        shift = self.shift if mu is None else math.exp(mu)
        return shift * sigmas / (1 + (shift - 1) * sigmas)


def process(config: Mapping[str, Any]) -> Process:
    """The process of a scheduler's configuration.

    Args:
        config: `num_train_timesteps`, `beta_schedule`, `beta_start`, `beta_end`, `trained_betas`,
            `rescale_betas_zero_snr`, `prediction_type`, `shift` or `flow_shift`, as diffusers writes them; what is
            absent has diffusers' default.

    Raises:
        ValueError: a scheduler, a table or a prediction type that is none of these.
    """
    name = str(config.get("_class_name", ""))
    # a configuration that was not saved has no name, but only these have the keys
    flow = name.startswith("FlowMatch") or ("shift" in config and "beta_schedule" not in config)
    kind = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    if name.startswith(_NO_TABLE) or ("sigma_max" in config and "beta_schedule" not in config and not flow):
        raise ValueError(
            f"{name or 'This scheduler'} belongs to another process than a table of betas or a flow, which are what is "
            "read here. For a network of EDM, k-diffusion or score_sde take Preconditioned with EDMSDE or VESDE."
        )
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type is one of {', '.join(PREDICTIONS)}; got {kind!r}.")
    steps = whole(config.get("num_train_timesteps", 1000), "num_train_timesteps", 2)
    if steps > _LONGEST:
        raise ValueError(f"num_train_timesteps={steps:,} are more than {_LONGEST:,}, which no table has.")
    if kind == "flow_prediction":
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return Process(RectifiedFlow(), Velocity(), steps, float(shift or 1.0))
    return Process(TableSDE(alpha_bar(config, steps)), PREDICTIONS[kind](), steps)


def alpha_bar(config: Mapping[str, Any], steps: int) -> Tensor:
    """ᾱ_i = ∏(1 − β_j), (N,), in float32 as diffusers keeps it: networks were trained with these rounded numbers.

    linear: β evenly spaced; scaled_linear: √β evenly spaced (Rombach et al. 2022); squaredcos_cap_v2: Nichol &
    Dhariwal 2021, eq. 17; sigmoid: β ∝ a logistic function on [−6, 6]. With `rescale_betas_zero_snr` √ᾱ is shifted and
    stretched to end at 0 (Lin et al. 2024, alg. 1), in place of which half of the entry before is taken: log(α/σ) has
    to be finite.
    """
    schedule, betas = config.get("beta_schedule", "linear"), config.get("trained_betas")
    low, high = (float(config.get(key, usual)) for key, usual in (("beta_start", 1e-4), ("beta_end", 0.02)))
    if betas is not None:
        beta = torch.tensor(list(betas), dtype=torch.float32, device="cpu")
    elif schedule == "linear":
        beta = torch.linspace(low, high, steps, dtype=torch.float32, device="cpu")
    elif schedule == "scaled_linear":
        beta = torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float32, device="cpu") ** 2
    elif schedule == "squaredcos_cap_v2":
        cosines = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        beta = torch.tensor(
            [min(1 - later / one, 0.999) for one, later in itertools.pairwise(cosines)],
            dtype=torch.float32,
            device="cpu",
        )
    elif schedule == "sigmoid":
        beta = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float32, device="cpu")) * (high - low) + low
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
        raise ValueError(f"beta_schedule is one of {known}, or trained_betas has the table; got {schedule!r}.")
    if beta.shape != (steps,):
        raise ValueError(f"trained_betas holds num_train_timesteps = {steps} numbers; got {tuple(beta.shape)}.")
    bar = torch.cumprod(1 - beta, 0)
    if config.get("rescale_betas_zero_snr"):
        root = bar.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        root[-1] = root[-2] / 2
        bar = root**2
    return bar


def spaced(config: Mapping[str, Any], n: int, own: Process) -> Tensor:
    """The n indices, falling, that diffusers' schedulers take by themselves: `timestep_spacing`, `steps_offset`.

    (Lin et al. 2024, table 2.) For a flow they are real numbers, N times the shifted σ.

    Raises:
        ValueError: n outside 1 … N, or an unknown spacing.
    """
    n, spacing = whole(n, "num_inference_steps"), config.get("timestep_spacing", "linspace")
    if n > own.steps:
        raise ValueError(f"The network has {own.steps} time steps; got num_inference_steps={n}.")
    if own.is_flow:
        last = own.shifted(host(1 / own.steps))
        return own.steps * own.shifted(torch.linspace(1, float(last), n, dtype=torch.float64, device="cpu"))
    if spacing == "linspace":
        found = torch.linspace(own.steps - 1, 0, n, dtype=torch.float64, device="cpu")
    elif spacing == "leading":
        places = torch.arange(n - 1, -1, -1, dtype=torch.float64, device="cpu")
        found = places * (own.steps // n) + config.get("steps_offset", 0)
    elif spacing == "trailing":
        found = own.steps - 1 - torch.arange(n, dtype=torch.float64, device="cpu") * own.steps / n
    else:
        raise ValueError(f"timestep_spacing is linspace, leading or trailing; got {spacing!r}.")
    return found.round().clamp(0, own.steps - 1)
