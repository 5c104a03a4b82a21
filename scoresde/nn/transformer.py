"""A diffusion transformer (DiT) on patches of signals, pictures and volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from ..diffusion.conditions import Cond
from .blocks import TokenEmbedding, Tokens, attend
from .conditioning import Conditioning, Options, check_joined, joined
from .layers import linear

_WAVES = 256  # of the noise level, in every published size


class DiT(nn.Module):
    r"""A transformer F(x, c_noise, cond) with adaLN-zero after Peebles & Xie (2023); zero at the start.

    x is cut into patches, each a token of `width` numbers with a fixed sine-cosine position. Blocks of self-attention
    and a perceptron are modulated by the embedding of the noise level and the conditions (shift, scale and gate of
    both), and a last linear layer makes each token a patch again. The published sizes, with patches of 2:

        S  width=384  depth=12 heads=6        B  width=768  depth=12 heads=12
        L  width=1024 depth=24 heads=16       XL width=1152 depth=28 heads=16

    An image is joined to x as further channels. Tokens, or those of a text, are attended to beside the patches, in one
    sequence, after one learned token that says that there may be none; they bring their own positions where their order
    matters.

    Args:
        event_shape: (C, L), (C, H, W) or (C, D, H, W).
        patch: side of a patch, dividing every spatial size.
        width: numbers per token, divisible by `heads` and by twice the number of spatial sizes.
        depth: blocks, ≥ 1.
        heads: attention heads.
        mlp_ratio: hidden width of the perceptrons over `width`.
        outputs: 2 returns two outputs, (B, 2C, *sizes): the second is for a learned variance.
        skips: join what the first half of the blocks made to the second half by linear layers (U-ViT; Bao et al. 2023).
        local: add to the inner layer of every perceptron a depthwise convolution of it over neighbouring patches (the
            Mix-FFN of SegFormer; Xie et al. 2021, eq. 3). Attention learns late what is near; this knows it at once.
        conditioning: embedding and embedding_scale, see `Conditioning`; classes, cond_dim, cond_image, cond_tokens,
            text and cond_dropout, see `Conditions`.

    Raises:
        ValueError: arguments out of range, sizes that do not divide into patches; in forward, inputs of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        outputs: int = 1,
        skips: bool = False,
        local: bool = False,
        **conditioning: Unpack[Options],
    ):
        super().__init__()
        self.event_shape = sizes(event_shape, "event_shape")
        self.patch, self.outputs = whole(patch, "patch"), whole(outputs, "outputs")
        grid = _grid(self.event_shape, self.patch)
        width, depth, heads, dims = whole(width, "width"), whole(depth, "depth"), whole(heads, "heads"), len(grid)
        if width % heads or width % (2 * dims):
            raise ValueError(
                f"width is divisible by heads={heads}, and by {2 * dims} for a sine and a cosine of each of {dims} "
                f"positions; got {width}."
            )
        self.conditioning = Conditioning(width, encode_image=False, waves=_WAVES, late=True, **conditioning)
        shapes = self.conditioning.conditions.shapes
        volume, channels, image = self.patch**dims, self.event_shape[0], shapes.get("image", ())
        check_joined(self.event_shape, image)
        self.inlet = linear(channels * volume, width)
        self.joint = linear((image[0] + 1) * volume, width) if image else None
        self.tokens = TokenEmbedding(self.conditioning.tokens, width) if self.conditioning.tokens else None
        self.register_buffer("positions", positions(grid, width), persistent=False)
        self.joined_blocks = depth // 2 if skips else 0  # so many blocks at the end get what as many at the start made
        hidden, near = round(mlp_ratio * width), grid if local else ()
        self.blocks = nn.ModuleList(
            _Block(width, heads, hidden, skip=k >= depth - self.joined_blocks, grid=near) for k in range(depth)
        )
        self.modulation, self.outlet = _zero(width, 2 * width), _zero(width, outputs * channels * volume)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, outputs · C, *sizes) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This DiT is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        given = self.conditioning.read(cond, x)
        emb = self.conditioning.embed(c_noise, given, x)
        h = self.inlet(patches(x, self.patch)) + self.positions.to(x.dtype)
        if self.joint is not None:
            image = joined(given.get("image"), self.conditioning.conditions.shapes["image"][0], x)
            h = h + self.joint(patches(image, self.patch))
        n, there = h.shape[1], None
        if self.tokens is not None:
            h, there = _beside(h, self.tokens(given.get("tokens"), x))
        kept: list[Tensor] = []
        for k, block in enumerate(self.blocks):
            h = block(h, emb, there, kept.pop() if block.skip is not None else None)
            if k < self.joined_blocks:
                kept.append(h)
        shift, scale = self.modulation(emb)[:, None].chunk(2, -1)
        return unpatched(self.outlet(_modulated(h[:, :n], shift, scale)), x.shape, self.patch).to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditioning.conditions.null(cond)


class _Block(nn.Module):
    r"""h += g₁ attention(norm(h)(1 + a₁) + b₁), then h += g₂ perceptron(norm(h)(1 + a₂) + b₂), six parts linear in emb.

    The gates g are zero at the start, so that the block is the identity. With a grid the perceptron sees neighbours.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, skip: bool, grid: tuple[int, ...] = ()):
        super().__init__()
        self.heads = heads
        self.skip = linear(2 * width, width) if skip else None
        self.modulation = _zero(width, 6 * width)
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        self.inner, self.outer = linear(width, hidden), linear(hidden, width)
        self.near = _Neighbours(hidden, grid) if grid else None

    def forward(self, h: Tensor, emb: Tensor, there: Tensor | None, early: Tensor | None) -> Tensor:
        if self.skip is not None and early is not None:
            h = self.skip(torch.cat([h, early], -1))
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        qkv = self.qkv(_modulated(h, shift, scale)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        h = h + gate * self.proj(attend(q, k, v, there).transpose(1, 2).flatten(2))
        inner = self.inner(_modulated(h, shift2, scale2))
        if self.near is not None:
            inner = self.near(inner)
        return h + gate2 * self.outer(F.gelu(inner, approximate="tanh"))


class _Neighbours(nn.Module):
    """h plus its depthwise convolution over patches next to each other; tokens beside the patches stay as they are."""

    def __init__(self, width: int, grid: tuple[int, ...]):
        super().__init__()
        self.grid, self.places = grid, math.prod(grid)
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1](width, width, 3, padding=1, groups=width)

    def forward(self, h: Tensor) -> Tensor:
        own = h[:, : self.places]
        mixed = own + self.conv(own.mT.unflatten(2, self.grid)).flatten(2).mT
        return mixed if h.shape[1] == self.places else torch.cat([mixed, h[:, self.places :]], 1)


def positions(grid: Sequence[int], width: int) -> Tensor:
    """Fixed sine-cosine positions (Π grid, width), float32: an equal part of `width` for each axis, the last one first.

    A part holds sin(k ω_i), then cos(k ω_i), at place k with ω_i = 10⁴^(−i/n), i = 0 … n − 1.
    """
    n = width // (2 * len(grid))
    omega = 1e4 ** (-torch.arange(n, dtype=torch.float64) / n)
    places = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [place.flatten()[:, None] * omega for place in reversed(places)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1).float()


def patches(x: Tensor, side: int) -> Tensor:
    """(B, places, C · side^d) of x (B, C, *sizes): of each patch the channels, then its rows and columns."""
    batch, channels, *sizes = x.shape
    dims = len(sizes)
    split = x.reshape(batch, channels, *(n for size in sizes for n in (size // side, side)))
    order = (0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return split.permute(order).reshape(batch, -1, channels * side**dims)


def unpatched(h: Tensor, shape: Sequence[int], side: int) -> Tensor:
    """(B, C, *sizes) of patches (B, places, side^d · C), each by rows, columns and channels, for samples of `shape`."""
    batch, _, *sizes = shape
    dims = len(sizes)
    split = h.reshape(batch, *(size // side for size in sizes), *[side] * dims, -1)
    order = (0, 1 + 2 * dims, *(n for d in range(dims) for n in (1 + d, 1 + dims + d)))
    return split.permute(order).reshape(batch, -1, *sizes)


def _grid(event_shape: tuple[int, ...], patch: int) -> tuple[int, ...]:
    """Patches along each axis."""
    if not 2 <= len(event_shape) <= 4:
        raise ValueError(f"event_shape is (C, L), (C, H, W) or (C, D, H, W); got {event_shape}.")
    if wrong := sorted({size for size in event_shape[1:] if size % patch}):
        common = math.gcd(*event_shape[1:])
        cure = f"take a patch that divides {common}" if common > 1 else "pad or crop the data"
        raise ValueError(f"Patches of {patch} do not divide the sizes {wrong} of samples {event_shape}: {cure}.")
    return tuple(size // patch for size in event_shape[1:])


def _beside(h: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Patches and tokens in one sequence, and which of them are there (B, places + tokens)."""
    patches = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    return torch.cat([h, tokens.values], 1), torch.cat([patches, tokens.there], 1)


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(h)(1 + scale) + shift, with a LayerNorm without weights."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _zero(inputs: int, outputs: int) -> nn.Linear:
    """A dense layer that is zero at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer
