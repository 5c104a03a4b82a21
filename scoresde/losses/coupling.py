"""Which noise goes with which data while training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from ..ops import Noise

Coupling = Callable[[Tensor, Rng], tuple[Tensor, Tensor | Noise]]
"""(x0, rng) -> (x0, eps): which noise goes with which data. x0 keeps its order, so that its condition still fits."""


class Independent:
    """ε ~ N(0, I), independent of x_0."""

    def __call__(self, x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor | Noise]:
        return x0, rng.noise(x0)


class OptimalTransport:
    r"""Noise of the batch handed to its data so that Σ‖x_0 − ε‖² is least (Pooladian et al. 2023; Tong et al. 2023).

    The assignment is exact (`scipy.optimize.linear_sum_assignment`); ‖x_0‖² and ‖ε‖² are the same for every pairing,
    so it maximises Σ⟨x_0, ε⟩. It is a permutation: over batches, ε stays N(0, I) and x_0 the data, but the pair is
    correlated, and the more so the larger the group. Hence

    * ε̂ remains E[ε | x_t] and α̇ x̂_0 + σ̇ ε̂ the velocity that moves the marginals, now along straighter paths: the
      samplers and `log_likelihood` of the probability-flow ODE stay right;
    * −ε̂/σ is **not** the score: samplers that add noise, guidance by a likelihood, and the bound that
      `loss.Likelihood` estimates, assume independent noise;
    * where alpha(t_max) is not small (`VPSDE` with a small `beta_max`, say) x_T is not N(0, σ²I): meant for flows;
    * with a condition the noise of each class is no longer N(0, I) in training, as it is in sampling. Users report that
      it does worse than independent noise there (github.com/atong01/conditional-flow-matching/issues/117;
      Cheng & Schwing 2025, *The curse of conditions*).

    The cost matrix is read on the CPU: a step waits for the device.

    Args:
        group: pairs are made within groups of this many consecutive samples, ≥ 2 (a last group may be smaller). A batch
            that is divided among processes, or into accumulated parts, then has the same pairs as one that is not, if
            the group divides each part. None: all the samples of one call, so of one process's share.

    Raises:
        ValueError: a group smaller than 2; or, when called, an `Rng` with per-sample seeds, for a pairing depends on
            all its samples.
    """

    def __init__(self, group: int | None = None):
        if group is not None:
            group = whole(group, "group is a number of samples. It", 2, otherwise="null for all of a batch")
        self.group = group

    def __call__(self, x0: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        if rng.per_sample:
            raise ValueError("A pairing depends on the whole batch; use Rng(seed), not Rng(seeds=[…]).")
        eps = rng.normal_like(x0)
        rows = torch.arange(len(x0), device="cpu").split(self.group or max(len(x0), 1))
        order = torch.cat([part[_assign(x0[part], eps[part])] for part in rows])
        return x0, eps[order.to(x0.device)]


def _assign(x0: Tensor, eps: Tensor) -> Tensor:
    """(n,) the ε of each x_0."""
    from scipy.optimize import linear_sum_assignment

    gain = x0.detach().flatten(1).float() @ eps.flatten(1).float().T
    # data that is not finite makes a loss that is not, which the trainer leaves out: no reason to stop here
    _, columns = linear_sum_assignment(gain.nan_to_num().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)
