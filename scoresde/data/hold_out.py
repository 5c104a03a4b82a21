"""A fixed split of one set of samples into training and test."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise.rng import Rng


def hold_out(n: int, fraction: float, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(train, test) indices, disjoint, together 0 … n − 1, each in rising order; a function of the arguments alone.

    Args:
        n: number of samples.
        fraction: share of the test split, in (0, 1).
        seed: of the permutation.
        labels: (n,) class indices; every class is then split in the same proportion (stratified).

    Raises:
        ValueError: a fraction outside (0, 1), or one that leaves a side of the split empty.
    """
    if not (0 < fraction < 1):
        raise ValueError(f"test_fraction lies in (0, 1); got {fraction}.")
    order = Rng(seed).permutation(n)
    groups = [order] if labels is None else [order[labels[order] == k] for k in labels.unique()]
    counts = [round(fraction * len(group)) for group in groups]
    test = torch.cat([group[:count] for group, count in zip(groups, counts, strict=True)])
    train = torch.cat([group[count:] for group, count in zip(groups, counts, strict=True)])
    if len(test) == 0 or len(train) == 0:
        raise ValueError(
            f"test_fraction={fraction} of {n} samples leaves {len(train)} to train on and {len(test)} to test; "
            "both must be at least 1. Add samples or change the fraction."
        )
    return train.sort().values, test.sort().values
