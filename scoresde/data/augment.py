"""Training samples flipped and shifted at random, and a network that may be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import whole
from ..noise.rng import Rng
from .dataset import Split


@dataclass(frozen=True)
class Augmentation:
    r"""Flips and shifts of raw training samples (B, C, *sizes), drawn anew whenever a sample is seen.

    Each sample is flipped along each axis of `flip` with probability ½, and moved along the last axes by a whole number
    of places, uniform in −shift … shift, which is a random crop of a sample padded by as much. All of it is left out
    with probability 1 − `probability`. Values are moved and never changed, so integers stay integers.

    Without `tell` the model is one of the augmented distribution: its samples are augmented, too, and its log p(x) is
    at best that of a mixture of `variants` densities, so at least log p(x) − log(variants) of the data as they are.
    With `tell` the network gets what was done to each sample as the condition "augment", zeros for nothing, which is
    also what it takes where none is given: samples and likelihoods are of the data as they are, and augmentation does
    not leak into them (Karras et al. 2022, app. F.2).

    Args:
        flip: axes, counted from the last: −1 is left to right of an image (C, H, W) and the time of a sound, −2 is
            upside down.
        shift: how far at most, ≥ 0, along each of the last axes: [2, 4] is two rows and four columns.
        padding: "edge" repeats the outermost values where a shift uncovers places, "reflect" mirrors there.
        probability: in (0, 1].
        tell: tell the network.

    Raises:
        ValueError: an argument outside these.
    """

    flip: Sequence[int] = ()
    shift: Sequence[int] = ()
    padding: str = "edge"
    probability: float = 1.0
    tell: bool = False

    def __post_init__(self) -> None:
        for axis in self.flip:
            if isinstance(axis, bool) or not isinstance(axis, int) or axis >= 0:
                raise ValueError(f"augment.flip has axes counted from the last, −1, −2, …; got {axis!r}.")
        if len(set(self.flip)) < len(self.flip):
            raise ValueError(f"augment.flip names each axis once; got {list(self.flip)}.")
        for distance in self.shift:
            whole(distance, "augment.shift", 0)
        if not (self.flip or any(self.shift)):
            raise ValueError("augment has nothing to do: give flip=[-1], shift=[2,2] or both, or augment=none.")
        if self.padding not in ("edge", "reflect"):
            raise ValueError(f"augment.padding is 'edge' or 'reflect'; got {self.padding!r}.")
        if not 0 < self.probability <= 1:
            raise ValueError(f"augment.probability lies in (0, 1]; got {self.probability}.")

    def __str__(self) -> str:
        done = [f"flipped along axes {list(self.flip)}"] if self.flip else []
        done += [f"shifted by up to {list(self.shift)}"] if any(self.shift) else []
        what = f"Training samples are {' and '.join(done)} at random."
        if self.tell:
            return f"{what} The network is told; samples and bits/dim are of the data as they are."
        return (
            f"{what} The model is one of such samples: it draws them, and a sample as it is may cost up to "
            f"{math.log2(self.variants):.3g} bits more under it. augment.tell=true avoids both."
        )

    @property
    def variants(self) -> int:
        """How many samples one may become."""
        return 2 ** len(self.flip) * math.prod(2 * distance + 1 for distance in self.shift)

    @property
    def told(self) -> int:
        """Size of the condition "augment": 0 where the network is not told."""
        return len(self.flip) + len(self.shift) if self.tell else 0

    def check(self, split: Split, conditional: bool) -> None:
        """Refuses samples that it cannot change, and an image as a condition, which would stay as it is.

        Raises:
            ValueError: it is one of these.
        """
        shape = tuple(split.raw.shape[1:])
        sizes, axes = shape[1:], max([-axis for axis in self.flip] + [len(self.shift)])
        if axes > len(sizes):
            raise ValueError(
                f"augment changes the last {axes} axes behind the channels; samples have the shape {shape}."
            )
        for distance, size in zip(reversed(self.shift), reversed(sizes), strict=False):
            if distance >= size:
                raise ValueError(f"augment.shift={list(self.shift)} moves samples {shape} out of sight.")
        if conditional and "image" in split.conditions:
            raise ValueError("augment moves the samples and not the images that they are conditioned on: augment=none.")

    def __call__(self, raw: Tensor, rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
        """(samples like `raw` (B, C, *sizes), {"augment": (B, told) float32} or {}); row k is a function of raw[k] and
        row k of one draw.
        """
        flips, ends = len(self.flip), torch.tensor(tuple(self.shift), dtype=torch.float64, device=raw.device)
        u = rng.uniform((len(raw), 1 + flips + len(ends)), dtype=torch.float64, device=raw.device)
        some, u = u[:, :1] < self.probability, u[:, 1:]
        flipped = (u[:, :flips] < 0.5) & some
        moved = (((2 * ends + 1) * u[:, flips:]).floor() - ends) * some
        for axis, which in zip(self.flip, flipped.unbind(1), strict=True):
            raw = torch.where(which.reshape(-1, *[1] * (raw.ndim - 1)), raw.flip(axis), raw)
        for axis, by in zip(range(-len(ends), 0), moved.long().unbind(1), strict=True):
            raw = self._shifted(raw, axis, by)
        told = torch.cat([flipped, moved / ends.clamp(min=1)], 1).float()
        return raw, {"augment": told} if self.tell else {}

    def _shifted(self, raw: Tensor, axis: int, by: Tensor) -> Tensor:
        """Each sample moved by by[k] places along an axis."""
        last = raw.shape[axis] - 1
        source = torch.arange(last + 1, device=raw.device) - by[:, None]
        source = source.clamp(0, last) if self.padding == "edge" else last - (last - source.abs()).abs()
        shape = [len(raw), *[1] * (raw.ndim - 1)]
        shape[axis] = last + 1
        return raw.take_along_dim(source.reshape(shape), axis)
