"""How much noise a variance-exploding process needs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise.rng import Rng


def suggest_sigma_max(data: Tensor, *, sample: int = 2000, rng: Rng | None = None) -> float:
    """The largest Euclidean distance between two samples: at that noise level no two data points can be told apart.

    Technique 1 of Song & Ermon (2020), arXiv:2006.09011.

    Args:
        data: (N, *event) model data, e.g. `dataset.encode(dataset.train.raw)`.
        sample: compare at most this many of them, ≥ 2; the result grows slowly with it.
        rng: chooses them; default `Rng(0)`.

    Returns:
        In units of model data.

    Raises:
        TypeError: integers; encode them first.
        ValueError: fewer than two samples, NaN, or samples that are all equal.
    """
    if not data.is_floating_point():
        raise TypeError(f"Expected encoded data in floating point; got {data.dtype}. Use dataset.encode(raw).")
    if data.ndim < 2 or len(data) < 2 or sample < 2:
        raise ValueError(f"Expected (N ≥ 2, *event) and sample ≥ 2; got shape {tuple(data.shape)}, sample={sample}.")
    rng = Rng(0) if rng is None else rng
    chosen = data[rng.permutation(len(data))[:sample].to(data.device)].flatten(1).double()
    if not bool(chosen.isfinite().all()):
        raise ValueError("The data hold NaN or infinite values.")
    distance = float(torch.cdist(chosen, chosen).max())
    if distance == 0:
        raise ValueError(f"All {len(chosen)} samples compared are equal, so no noise level follows from them.")
    return distance
