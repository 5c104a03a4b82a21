"""The magnitude-preserving U-Net of EDM2, in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from ..diffusion.conditions import Cond
from .blocks import attend
from .conditions import Conditions
from .embedding import FourierEmbedding
from .resample import Downsample, Upsample
from .unet import check_sides

_EPS = 1e-4  # beside every root mean square


class Balances(NamedTuple):
    """The weight of the second of two branches that are summed or joined, and where activations are cut off."""

    label: float = 0.5
    concat: float = 0.5
    residual: float = 0.3
    attention: float = 0.3
    clip: float = 256.0


class MagnitudeUNet(nn.Module):
    r"""A U-Net F(x, c_noise, cond) whose layers keep the magnitude of what goes through (Karras et al. 2024, config G).

    Every weight w is used as w/(rms(w) + 1e-4)/√fan-in, row by row; SiLU is divided by 0.596; sums are
    ((1 − t)a + t b)/√((1 − t)² + t²), joins likewise; an embedding multiplies by 1 + gain · linear; attention is of
    normalised queries, keys and values; x gets a channel of ones in place of biases. Zero at the start: its gain is.

    Args:
        event_shape: (C, L), (C, H, W) or (C, D, H, W); spatial sizes divisible by 2^(len(multipliers) − 1).
        width: channels at full size, even.
        multipliers: channel multipliers, one per level.
        blocks: residual blocks per level on the way down, one more on the way up.
        attention: resolutions with self-attention, after every block; the middle has one in any case.
        head_width: channels per head.
        embedding_width, waves: of the embedding, even; None for the widest level, and for `width` · multipliers[0].
        dropout: probability in [0, 1), in training mode.
        classes, cond_dropout: see `Conditions`; no class adds nothing.
        balances: (label, concat, residual, attention, clip), see `Balances`.

    Raises:
        ValueError: sizes that cannot be halved, numbers out of range; in forward, inputs of another shape.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        width: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        head_width: int = 64,
        embedding_width: int | None = None,
        waves: int | None = None,
        dropout: float = 0.0,
        classes: int = 0,
        cond_dropout: float = 0.0,
        balances: Sequence[float] = Balances(),
    ):
        super().__init__()
        self.event_shape, self.balances = sizes(event_shape, "event_shape"), Balances(*map(float, balances))
        widths = [whole(width, "width", 2) * multiplier for multiplier in sizes(multipliers, "multipliers")]
        blocks, head_width = whole(blocks, "blocks"), whole(head_width, "head_width")
        sides = check_sides(self.event_shape, len(widths))
        emb = max(widths) if embedding_width is None else whole(embedding_width, "embedding_width", 2)
        waves = widths[0] if waves is None else whole(waves, "waves", 2)
        self.conditions = Conditions(classes=classes, cond_dropout=cond_dropout)
        steady = torch.arange(waves, dtype=torch.float64) * (math.sqrt(5) - 1) / 2 % 1  # evenly spread, without a draw
        self.register_buffer("freqs", FourierEmbedding(2 * waves).omega.clone())
        self.register_buffer("phases", (2 * math.pi * steady).float())
        self.noise = _Layer(waves, emb)
        self.label = _Layer(classes, emb) if classes else None
        dims, channels = len(self.event_shape) - 1, self.event_shape[0]
        make = _Blocks(dims, emb, head_width, dropout, self.balances)
        attends = [side in attention for side in sides]
        self.inlet = _Layer(channels + 1, widths[0], dims, 3)
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        skips = self._build_encoder(make, widths, attends, blocks)
        c = widths[-1]
        self.middle = nn.ModuleList([make(c, c, attends=True), make(c, c)])
        self._build_decoder(make, widths, attends, blocks, skips)
        self.outlet, self.gain = _Layer(widths[0], channels, dims, 3), nn.Parameter(torch.zeros(()))

    def _build_encoder(self, make: _Blocks, widths: list[int], attends: list[bool], blocks: int) -> list[int]:
        """The way down. Returns the channels of the skips."""
        skips, c = [widths[0]], widths[0]
        for level, outputs in enumerate(widths):
            if level:
                self.downs.append(make(c, c, Downsample(), encoder=True))
                skips.append(c)
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(make(c, outputs, attends=attends[level], encoder=True))
                c = outputs
                skips.append(c)
            self.encoder.append(stages)
        return skips

    def _build_decoder(
        self, make: _Blocks, widths: list[int], attends: list[bool], blocks: int, skips: list[int]
    ) -> None:
        """The way up, each block taking the last of `skips`."""
        c = widths[-1]
        for level in reversed(range(len(widths))):
            if level < len(widths) - 1:
                self.ups.append(make(c, c, Upsample()))
            stages = nn.ModuleList()
            for _ in range(blocks + 1):
                stages.append(make(c + skips.pop(), widths[level], attends=attends[level]))
                c = widths[level]
            self.decoder.append(stages)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, *event_shape) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This MagnitudeUNet is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        emb = _silu(self._embedding(x, c_noise, cond))
        h = self.inlet(torch.cat([x, torch.ones_like(x[:, :1])], 1))
        skips = [h]
        for level, stages in enumerate(self.encoder):
            if level:
                h = self.downs[level - 1](h, emb)
                skips.append(h)
            for stage in stages.children():
                h = stage(h, emb)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, emb)
        for level, stages in enumerate(self.decoder):
            if level:
                h = self.ups[level - 1](h, emb)
            for stage in stages.children():
                h = stage(_joined(h, skips.pop(), self.balances.concat), emb)
        return (self.outlet(h) * self.gain).to(x.dtype)

    def _embedding(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        dtype = torch.promote_types(c_noise.dtype, torch.float32)
        angle = c_noise.to(dtype)[:, None] * self.freqs.to(dtype) + self.phases.to(dtype)
        emb = self.noise((math.sqrt(2) * angle.cos()).to(x.dtype))
        if self.label is None:
            return emb
        label = self.conditions(cond, x).get("label")
        if label is None:
            told = torch.zeros_like(emb)
        else:  # a column for each class, and nothing for none
            table = F.pad(self.label.scaled() * math.sqrt(self.conditions.classes), (0, 1))
            told = table.T[label].to(emb.dtype)
        return _sum(emb, told, self.balances.label)

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditions.null(cond)


class _Layer(nn.Module):
    """A dense layer, or a convolution that keeps sizes, of weights whose rows are normalised at each use; no bias."""

    def __init__(self, inputs: int, outputs: int, dims: int = 0, kernel: int = 1):
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *[kernel] * dims))

    def scaled(self) -> Tensor:
        w = self.weight
        rms = w.float().flatten(1).norm(dim=1) / math.sqrt(w[0].numel())
        return w / (rms + _EPS).to(w.dtype).reshape(-1, *[1] * (w.ndim - 1)) / math.sqrt(w[0].numel())

    def forward(self, h: Tensor) -> Tensor:
        w = self.scaled().to(h.dtype)
        if not self.dims:
            return h @ w.T
        return (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1](h, w, padding=w.shape[-1] // 2)


class _Blocks(NamedTuple):
    """How the blocks of one network are made."""

    dims: int
    emb: int
    head_width: int
    dropout: float
    balances: Balances

    def __call__(
        self,
        inputs: int,
        outputs: int,
        resample: nn.Module | None = None,
        *,
        attends: bool = False,
        encoder: bool = False,
    ) -> _Block:
        heads = 0
        if attends:
            if outputs % self.head_width:
                raise ValueError(f"head_width divides the {outputs} channels of its level; got {self.head_width}.")
            heads = outputs // self.head_width
        return _Block(self, inputs, outputs, heads, encoder, nn.Identity() if resample is None else resample)


class _Block(nn.Module):
    """A residual block and its attention; on the way down the skip comes first and its pixels are normalised."""

    def __init__(self, how: _Blocks, inputs: int, outputs: int, heads: int, encoder: bool, resample: nn.Module):
        super().__init__()
        dims, self.balances, self.heads, self.encoder = how.dims, how.balances, heads, encoder
        self.resample, self.dropout = resample, nn.Dropout(how.dropout)
        self.res0 = _Layer(outputs if encoder else inputs, outputs, dims, 3)
        self.emb, self.gain = _Layer(how.emb, outputs), nn.Parameter(torch.zeros(()))
        self.res1 = _Layer(outputs, outputs, dims, 3)
        self.skip = _Layer(inputs, outputs, dims) if inputs != outputs else nn.Identity()
        if heads:
            self.qkv, self.proj = _Layer(outputs, 3 * outputs, dims), _Layer(outputs, outputs, dims)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.resample(h)
        if self.encoder:
            h = _normalised(self.skip(h), 1)
        inner = self.res0(_silu(h))
        modulation = 1 + self.gain * self.emb(emb)
        inner = _silu(inner * modulation.reshape(*modulation.shape, *[1] * (h.ndim - 2)))
        inner = self.res1(self.dropout(inner))
        h = _sum(h if self.encoder else self.skip(h), inner, self.balances.residual)
        if self.heads:
            q, k, v = self.qkv(h).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
            q, k, v = (_normalised(part, 2).transpose(-1, -2) for part in (q, k, v))
            answer = attend(q, k, v).transpose(-1, -2).reshape(h.shape)
            h = _sum(h, self.proj(answer), self.balances.attention)
        return h.clamp(-self.balances.clip, self.balances.clip)


def _silu(h: Tensor) -> Tensor:
    return F.silu(h) / 0.596


def _sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.hypot(1 - t, t)


def _joined(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of both, weighted so that each has its share of the magnitude, whatever its number of channels."""
    c = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([a * (c * (1 - t) / math.sqrt(a.shape[1])), b * (c * t / math.sqrt(b.shape[1]))], 1)


def _normalised(h: Tensor, dim: int) -> Tensor:
    """h over its root mean square along a dimension."""
    rms = h.float().norm(dim=dim, keepdim=True) / math.sqrt(h.shape[dim])
    return h / (rms + _EPS).to(h.dtype)
