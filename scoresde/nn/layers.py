"""The three layers with parameters that everything else is made of, and their initialisation."""

from __future__ import annotations

from torch import nn


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A dense layer with variance 2/(inputs + outputs) and no bias at the start (Glorot & Bengio 2010)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv(dims: int, inputs: int, outputs: int, kernel: int, *, zero: bool = False) -> nn.Module:
    """A convolution that keeps sizes; variance 2/(fan in + fan out) at the start, or zero; bias zero."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](inputs, outputs, kernel, padding=kernel // 2)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    if not zero:
        nn.init.xavier_uniform_(layer.weight)
    return layer


def group_norm(channels: int, least: int = 4, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm with min(32, channels / `least`) groups, or the next smaller number that divides the channels."""
    groups = max(1, min(32, channels // least))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=eps)
