"""Classifier two-sample test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .pairs import paired


@dataclass(frozen=True)
class C2ST:
    """What the classifier reached on points it had not seen.

    Attributes:
        accuracy: in [0, 1]; ½ for equal laws, 1 for laws that can be told apart always. A weak classifier reads low:
            it is a lower bound on the best accuracy, up to `stderr`.
        stderr: √(a (1 − a)/points), binomial.
        points: number of held-out points, both samples together.
    """

    accuracy: float
    stderr: float
    points: int


def c2st(x: Tensor, y: Tensor, *, rng: Rng, hidden: int = 64, steps: int = 1000, batch_size: int = 128) -> C2ST:
    """Held-out accuracy of a small network that tells x from y (Lopez-Paz & Oquab 2017, arXiv:1610.06545).

    Half of each sample trains a network with two hidden layers (standardised inputs, GELU, AdamW, float64), the other
    half judges it. The global random state is not touched.

    Args:
        x, y: (n, *event) each, of the same n ≥ 20, so that chance is ½.
        rng: splits, weights and batches.
        hidden: width of the layers, ≥ 1.
        steps: of training, ≥ 1.
        batch_size: points per step, ≥ 1.

    Raises:
        TypeError, ValueError: see `scoresde.metrics.pairs.paired`; samples of different size.
    """
    x, y = paired(x, y, minimum=20)
    if len(x) != len(y):
        raise ValueError(
            f"x has {len(x)} samples and y {len(y)}: chance is ½ for equal numbers only. Draw as many of each."
        )
    hidden, steps, batch_size = whole(hidden, "hidden"), whole(steps, "steps"), whole(batch_size, "batch_size")
    half = len(x) // 2
    parts = [(z[order[:half]], z[order[half:]]) for z in (x, y) for order in (rng.permutation(len(z)).to(z.device),)]
    train, test = (torch.cat(part) for part in zip(*parts, strict=True))
    mean, std = train.mean(0), train.std(0).clamp_min(1e-12)
    train, test = (train - mean) / std, (test - mean) / std
    target = torch.arange(len(train), device=x.device) >= half
    truth = torch.arange(len(test), device=x.device) >= len(test) // 2
    layers = _fit(train, target.double(), rng, hidden, steps, batch_size)
    with torch.no_grad():
        accuracy = float(((_logits(layers, test) > 0) == truth).double().mean())
    return C2ST(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(test)), len(test))


def _fit(x: Tensor, target: Tensor, rng: Rng, hidden: int, steps: int, batch_size: int) -> list[Tensor]:
    """Weights and biases of three layers."""
    sizes = [x.shape[1], hidden, hidden, 1]
    layers = []
    for inputs, outputs in pairwise(sizes):
        weight = rng.normal((outputs, inputs), dtype=torch.float64, device=x.device) / math.sqrt(inputs)
        layers += [weight.requires_grad_(), x.new_zeros(outputs).requires_grad_()]
    optimizer = torch.optim.AdamW(layers, lr=1e-3, weight_decay=1e-2)
    with torch.enable_grad():
        for _ in range(steps):
            index = rng.integers(len(x), (min(batch_size, len(x)),), device=x.device)
            loss = F.binary_cross_entropy_with_logits(_logits(layers, x[index]), target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layers


def _logits(layers: list[Tensor], x: Tensor) -> Tensor:
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = F.gelu(F.linear(x, weight, bias))
    return F.linear(x, layers[-2], layers[-1])[:, 0]
