"""A fixed split of one set of samples into training and test."""

from __future__ import annotations

import torch

from ..noise.rng import Rng
from .dataset import Split


def hold_out(samples: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(train, test): each sample is in one of them, in the old order; a function of the arguments alone.

    Args:
        samples: all of them. Where they have labels, every class is split in the same proportion (stratified).
        fraction: share of the test split, in (0, 1).
        seed: of the permutation.

    Raises:
        ValueError: a fraction outside (0, 1), or one that leaves a side of the split empty.
    """
    if not (0 < fraction < 1):
        raise ValueError(f"test_fraction lies in (0, 1); got {fraction}.")
    n, labels = len(samples), samples.labels
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
    return samples.take(train.sort().values), samples.take(test.sort().values)
