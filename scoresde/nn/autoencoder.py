"""A convolutional autoencoder with densities on both sides: q(z | x) a Gaussian, p(x | z) of integers or of floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from .blocks import ResidualBlock, Stack
from .layers import conv, group_norm
from .resample import Downsample, Upsample
from .transformer import patches, unpatched

_NARROWEST = -7.0  # log of the least scale of p(x | z), in units of model data, so that no density is unbounded


class Autoencoder(nn.Module):
    r"""Samples (C, *sizes) as latents (`latent`, *sizes/f) and back, in 1 to 3 dimensions, f = patch · 2^k.

    q(z | x) = N(mean(x), std(x)²), independent in each place. p(x | z) is independent in each place and channel. Of
    integers, `levels` equal bins of [low, high], it is a probability: that of the bin under a mixture of `mixtures`
    logistic laws, of which the outer bins get all that lies beyond (Salimans et al. 2017, PixelCNN++, eq. 2, without
    its dependence of channels), so it sums to 1 over the integers exactly. Of floats it is a Gaussian with a scale of
    its own in each place.

    Args:
        event_shape: (C, L), (C, H, W) or (C, D, H, W); sizes are multiples of f.
        latent: channels of z, ≥ 1.
        width: channels at the first size, ≥ 1.
        multipliers: k + 1 numbers, channels at each size as a multiple of `width`; each size is half of the one before.
        patch: side of the patches that are channels of the first size, ≥ 1; 2 saves most of the time.
        blocks: residual blocks at each size, ≥ 1.
        levels: number of integers, of which x holds the centres of bins; None for floats.
        low, high: ends of the bins.
        mixtures: logistic laws in p(x | z) of integers, ≥ 1.

    Raises:
        ValueError: arguments out of range, or sizes that f does not divide.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        latent: int = 4,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        patch: int = 2,
        blocks: int = 1,
        levels: int | None = None,
        low: float = -1.0,
        high: float = 1.0,
        mixtures: int = 3,
    ):
        super().__init__()
        self.event_shape, widths = sizes(event_shape, "event_shape"), sizes(multipliers, "multipliers")
        latent, width, blocks = whole(latent, "latent"), whole(width, "width"), whole(blocks, "blocks")
        if not 2 <= len(self.event_shape) <= 4 or not widths:
            raise ValueError(
                f"An autoencoder takes samples (C, L), (C, H, W) or (C, D, H, W), and a multiplier or more; got "
                f"{self.event_shape} and {widths}."
            )
        self.patch = whole(patch, "patch")
        factor = self.patch * 2 ** (len(widths) - 1)
        if any(size % factor for size in self.event_shape[1:]):
            raise ValueError(
                f"patch={patch} and multipliers={list(widths)}, {len(widths)} sizes each half of the one before, want "
                f"sizes that are multiples of {factor}; got {self.event_shape[1:]}. Take fewer multipliers, or pad the "
                "samples."
            )
        dims, channels = len(self.event_shape) - 1, self.event_shape[0]
        self.levels, self.low, self.high = levels, float(low), float(high)
        self.latent_shape = (latent, *(size // factor for size in self.event_shape[1:]))
        self.mixtures = whole(mixtures, "mixtures")
        outputs = channels * (2 if levels is None else 3 * self.mixtures)
        wide, self._first = (
            [width * each for each in widths],
            tuple(size // self.patch for size in self.event_shape[1:]),
        )
        self.encoder_in = conv(dims, channels * self.patch**dims, wide[0], 3)
        self.encoder = _blocks(dims, wide, blocks, Downsample)
        self.encoder_out = nn.Sequential(group_norm(wide[-1]), nn.SiLU(), conv(dims, wide[-1], 2 * latent, 3))
        self.decoder_in = conv(dims, latent, wide[-1], 3)
        self.decoder = _blocks(dims, wide[::-1], blocks, Upsample)
        self.decoder_out = nn.Sequential(
            group_norm(wide[0]), nn.SiLU(), conv(dims, wide[0], outputs * self.patch**dims, 3)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x), (B, *latent_shape) each."""
        h = patches(x, self.patch).transpose(1, 2).unflatten(2, self._first)
        h = self.encoder(self.encoder_in(h), x.new_zeros(len(x), 1))
        mean, log_std = self.encoder_out(h).chunk(2, 1)
        return mean, log_std.clamp(-10, 3).exp()

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x | z), (B, *event_shape); of integers within the centres of the outer bins."""
        head = self._head(z)
        if self.levels is None:
            return head[:, 0]
        weights, means, _ = head.unflatten(1, (3, self.mixtures)).unbind(1)
        half = 0.5 * (self.high - self.low) / self.levels
        return (weights.softmax(1) * means.clamp(self.low + half, self.high - half)).sum(1)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) (B,) in nats: of integers, whose bins x lies in, their log-probability."""
        head = self._head(z)
        if self.levels is None:
            mean, log_scale = head.unbind(1)
            log_scale = log_scale.clamp(min=_NARROWEST)
            each = -0.5 * ((x - mean) * (-log_scale).exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)
            return each.flatten(1).sum(1)
        weights, means, log_scales = head.unflatten(1, (3, self.mixtures)).unbind(1)
        each = log_mass(self._bins(x), means, log_scales.clamp(min=_NARROWEST), self.levels, (self.low, self.high))
        return (weights.log_softmax(1) + each).logsumexp(1).flatten(1).sum(1)

    def centred(self, x: Tensor) -> Tensor:
        """x with every value in the centre of its bin: what is encoded of integers, however they were dequantised."""
        return x if self.levels is None else self.low + (self._bins(x) + 0.5) * ((self.high - self.low) / self.levels)

    def _bins(self, x: Tensor) -> Tensor:
        assert self.levels is not None
        return ((x - self.low) * (self.levels / (self.high - self.low))).floor().clamp(0, self.levels - 1)

    def _head(self, z: Tensor) -> Tensor:
        """(B, parameters, *event_shape) of p(x | z); the means of a mixture begin evenly spaced."""
        h = self.decoder_out(self.decoder(self.decoder_in(z), z.new_zeros(len(z), 1)))
        shape = (len(z), h.shape[1] // self.patch ** len(self._first), *self.event_shape[1:])
        h = unpatched(h.flatten(2).transpose(1, 2), shape, self.patch).unflatten(1, (-1, self.event_shape[0]))
        if self.levels is None:
            return h
        spaced = (
            self.low
            + (self.high - self.low)
            * (torch.arange(self.mixtures, dtype=h.dtype, device=h.device) + 0.5)
            / self.mixtures
        )
        nothing = torch.zeros_like(spaced)
        start = torch.cat([nothing, spaced, nothing + math.log(0.25 * (self.high - self.low) / self.mixtures)])
        return h + start.reshape(-1, *[1] * len(self.event_shape))


def log_mass(bins: Tensor, mean: Tensor, log_scale: Tensor, levels: int, ends: tuple[float, float]) -> Tensor:
    r"""log P of bins (B, C, *sizes) under logistic laws (B, K, C, *sizes), the outer bins open.

    With b, a the upper and lower edge in units of the scale: S(b) − S(a) = S(b) S(−a) (1 − e^{a−b}), S the logistic
    function, which loses no digits in the tails.
    """
    step, k = (ends[1] - ends[0]) / levels, bins[:, None]
    lower = (ends[0] + k * step - mean) * (-log_scale).exp()
    width = (step * (-log_scale).exp()).expand_as(lower)
    first, last = (k == 0).expand_as(lower), (k == levels - 1).expand_as(lower)
    upper_tail = F.logsigmoid(lower + width).masked_fill(last, 0.0)
    lower_tail = F.logsigmoid(-lower).masked_fill(first, 0.0)
    inside = torch.log(-torch.expm1(-width)).masked_fill(first | last, 0.0)
    return upper_tail + lower_tail + inside


def _blocks(dims: int, widths: Sequence[int], blocks: int, resample: type[nn.Module]) -> Stack:
    """Residual blocks at each size, the first at each but the first resampled; they are told nothing besides."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        for block in range(blocks):
            change = resample() if index and not block else None
            layers.append(
                ResidualBlock(dims, after if block else before, after, 1, scaling=math.sqrt(0.5), resample=change)
            )
    return Stack(layers)
