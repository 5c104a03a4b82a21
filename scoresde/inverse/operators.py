"""Operators: what a camera, a sensor or a scale does to x_0. Any function will do; these are the usual ones.

Events are (D,), or (C, *space) with a channel first; "space" of (D,) is D itself.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive, whole
from ..noise.rng import Rng
from ..ops.broadcast import host


class Operator(nn.Module, abc.ABC):
    """A: (B, *event) -> (B, *y).

    Attributes:
        linear: whether A(a x + b z) = a A(x) + b A(z).
    """

    linear = True

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A(x)."""


class Mask(Operator):
    """x where the mask is 1, and 0 elsewhere: the missing part of an image. There y has no effect; let it be 0.

    Args:
        mask: True (or 1) where x is seen; of the event shape or one that broadcasts to it, or (B, *event).

    Raises:
        ValueError: values other than 0 and 1, or a mask that hides everything.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        mask = torch.as_tensor(mask)
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError("A mask is True or 1 where x is seen and 0 elsewhere, and something is seen.")
        self.register_buffer("mask", mask.bool(), persistent=False)

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        mask, event = tuple(self.mask.shape), tuple(x.shape)
        if len(mask) > len(event) or any(n not in (1, m) for n, m in zip(mask[::-1], event[::-1], strict=False)):
            raise ValueError(f"A mask of shape {mask} is not one of {len(x)} samples of shape {event[1:]}.")
        return torch.where(self.mask.to(x.device), x, torch.zeros((), dtype=x.dtype, device=x.device))


class DownSample(Operator):
    """The mean of each block of `factor` entries along every axis of space: a coarser image.

    Args:
        factor: ≥ 1; the sizes of those axes are multiples of it.
    """

    def __init__(self, factor: int):
        super().__init__()
        self.factor = whole(factor, "factor")

    def forward(self, x: Tensor) -> Tensor:
        for axis in _space(x):
            if x.shape[axis] % self.factor:
                raise ValueError(f"An axis of {x.shape[axis]} has no blocks of {self.factor}; got {tuple(x.shape)}.")
            x = x.unflatten(axis, (-1, self.factor)).mean(axis + 1)
        return x


class Blur(Operator):
    """Each axis of space convolved with a kernel.

    Args:
        std: of a Gaussian kernel, in entries, > 0, cut off at 4 std; or the kernel itself, (k,) with k odd.
        edges: "reflect" or "circular": how x continues beyond its edges.
    """

    def __init__(self, std: float | Tensor, edges: str = "reflect"):
        super().__init__()
        if edges not in ("reflect", "circular"):
            raise ValueError(f"edges are 'reflect' or 'circular'; got {edges!r}.")
        if isinstance(std, Tensor):
            kernel = std
        else:
            std = positive(std, "std", "the width of a Gaussian in entries")
            reach = math.ceil(4 * std)
            kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu") / std) ** 2)
            kernel = kernel / kernel.sum()
        if kernel.ndim != 1 or len(kernel) % 2 == 0 or not bool(torch.isfinite(kernel).all()):
            raise ValueError(f"A kernel is (k,) with k odd, and finite; got shape {tuple(kernel.shape)}.")
        self.register_buffer("kernel", kernel, persistent=False)
        self.edges = edges

    kernel: Tensor

    def forward(self, x: Tensor) -> Tensor:
        reach, kernel = len(self.kernel) // 2, self.kernel.to(x)
        for axis in _space(x):
            if x.shape[axis] <= reach:
                raise ValueError(f"A kernel of {len(kernel)} is too wide for an axis of {x.shape[axis]}; lower std.")
            rows = x.movedim(axis, -1)
            padded = F.pad(rows.reshape(-1, 1, x.shape[axis]), (reach, reach), mode=self.edges)
            x = F.conv1d(padded, kernel.flip(0)[None, None]).reshape(rows.shape).movedim(-1, axis)
        return x


class ColourMix(Operator):
    """The channels of each pixel, mixed: y_k = Σ_c m_kc x_c.

    Args:
        matrix: (K, C).
    """

    def __init__(self, matrix: Tensor):
        super().__init__()
        matrix = torch.as_tensor(matrix)
        if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"A colour matrix is (K, C), and finite; got shape {tuple(matrix.shape)}.")
        self.register_buffer("matrix", matrix, persistent=False)

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.matrix.shape[1]:
            raise ValueError(
                f"This matrix mixes {self.matrix.shape[1]} channels; got samples of shape {tuple(x.shape[1:])}."
            )
        return torch.einsum("kc,bc...->bk...", self.matrix.to(x), x)


def grey() -> ColourMix:
    """Red, green and blue to their luma (ITU-R BT.601)."""
    return ColourMix(host([[0.299, 0.587, 0.114]]))


class RandomProjection(Operator):
    """(B, *event) -> (B, rows), by a fixed matrix of independent N(0, 1/D) entries, D the size of an event.

    Args:
        rows: ≥ 1.
        event_shape: of x, (D,) or (C, *space).
        rng: draws the matrix; default `Rng(0)`.

    Raises:
        ValueError: rows or sizes that are not whole numbers of at least 1.
    """

    def __init__(self, rows: int, event_shape: Sequence[int], rng: Rng | None = None):
        super().__init__()
        rows = whole(rows, "rows")
        if not _counts(event_shape):
            raise ValueError(f"event_shape is that of one sample, as in (2,) or (1, 28, 28); got {event_shape!r}.")
        size = math.prod(event_shape)
        matrix = (Rng(0) if rng is None else rng).normal((1, rows * size), dtype=torch.float64)
        self.register_buffer("matrix", matrix.reshape(rows, size) / math.sqrt(size), persistent=False)

    matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() != self.matrix.shape[1]:
            raise ValueError(f"This matrix is for {self.matrix.shape[1]} entries; got samples of {tuple(x.shape[1:])}.")
        return x.flatten(1) @ self.matrix.to(x).mT


class Magnitude(Operator):
    """|F x|, the magnitude of a transform without its phase. Not linear.

    Args:
        transform: F, any function with real or complex values; by default the unitary Fourier transform over space.
    """

    linear = False

    def __init__(self, transform: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.transform = _fourier if transform is None else transform

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x).abs()


class Compose(Operator):
    """Operators one after the other: Compose(Blur(1.0), DownSample(4)) blurs first. Linear where all of them are.

    Args:
        operators: any functions; those without an attribute `linear` count as not linear.
    """

    def __init__(self, *operators: Callable[[Tensor], Tensor]):
        super().__init__()
        if not operators:
            raise ValueError("Compose needs an operator.")
        self.operators = operators
        self.parts = nn.ModuleList(one for one in operators if isinstance(one, nn.Module))
        self.linear = all(getattr(one, "linear", False) for one in operators)

    def forward(self, x: Tensor) -> Tensor:
        for operator in self.operators:
            x = operator(x)
        return x


def _counts(sizes: object) -> bool:
    """Whether `sizes` are whole numbers of at least 1, and not empty."""
    return isinstance(sizes, Sequence) and len(sizes) > 0 and all(isinstance(n, Integral) and int(n) > 0 for n in sizes)


def _space(x: Tensor) -> range:
    return range(min(2, x.ndim - 1), x.ndim)


def _fourier(x: Tensor) -> Tensor:
    return torch.fft.fftn(x, dim=tuple(_space(x)), norm="ortho")
