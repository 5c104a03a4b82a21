"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch

from ..codecs.scaling import Scaling
from .dataset import Dataset, Split, hold_out


def Digits(test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """1,797 digits of 8 × 8 pixels in 17 grey levels 0 … 16, ten classes (Alpaydin & Kaynak 1998, UCI).

    Args:
        test_fraction: share held out, in (0, 1), in the same proportion of every class.
        seed: of the split, which is a function of `test_fraction` and `seed` alone.

    Returns:
        raw (N, 1, 8, 8) uint8; with the defaults 1,438 to train on and 359 to test.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("Digits needs scikit-learn: pip install 'scoresde[data]'.") from error

    bunch = load_digits()
    raw = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    return Dataset("digits", *hold_out(Split(raw, labels), test_fraction, seed), Scaling(levels=17), classes=10)
