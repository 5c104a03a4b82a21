"""The hourglass diffusion transformer (HDiT) on pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from ..diffusion.conditions import Cond
from .conditions import Conditions
from .embedding import FourierEmbedding

_EPS = 1e-6  # beside every square


class HourglassDiT(nn.Module):
    r"""A transformer F(x, c_noise, cond) on patches that are merged and split (Crowson et al. 2024); zero at first.

    x is cut into patches, each a token. On the way down four tokens become one of the next width, on the way up one
    becomes four, h ← skip + f · (split − skip) with a learned f. A block is h += attention(norm(h)), then
    h += W₂(a · GELU(b)) with (a, b) = W₁ norm(h); norm(h) = h/rms(h) · (1 + W emb), and emb is of the noise level and
    the label. Queries and keys have length √s with a learned s for each head, and `rotary` of their numbers are turned
    by the token's place. One level of width D with `rotary=1` is k-diffusion's first transformer.

    Args:
        event_shape: (C, H, W); H and W divisible by `patch` · 2^(levels − 1).
        patch: side of a patch, or (height, width).
        widths, depths: numbers per token and blocks, one per level.
        attention: one per level: "global", "none", or the side of windows, which every second block shifts by half.
        head_widths: numbers per head, dividing the width of their level.
        hidden: inner width of the perceptrons, one per level; None for 3 · widths.
        mapping_width, mapping_depth, mapping_hidden: of the perceptrons that make emb; the first even.
        rotary: share of a head's numbers that are turned, in (0, 1].
        aspect: height of a patch over its width, as places count it.
        classes, cond_dropout: see `Conditions`.

    Raises:
        ValueError: sizes that do not divide, numbers out of range; in forward, inputs of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        patch: int | Sequence[int] = 4,
        widths: Sequence[int] = (128, 256),
        depths: Sequence[int] = (2, 4),
        attention: Sequence[str | int] = (8, "global"),
        head_widths: Sequence[int] = (64, 64),
        hidden: Sequence[int] | None = None,
        mapping_width: int = 256,
        mapping_depth: int = 2,
        mapping_hidden: int = 768,
        rotary: float = 0.5,
        aspect: float = 1.0,
        classes: int = 0,
        cond_dropout: float = 0.0,
    ):
        super().__init__()
        self.event_shape = sizes(event_shape, "event_shape")
        self.patch = sizes((patch, patch) if isinstance(patch, int) else patch, "patch")
        widths, depths = sizes(widths, "widths"), sizes(depths, "depths")
        hidden = [3 * width for width in widths] if hidden is None else sizes(hidden, "hidden")
        lists = (depths, tuple(attention), tuple(head_widths), hidden)
        if not widths or any(len(each) != len(widths) for each in lists):
            raise ValueError(
                f"widths, depths, attention, head_widths and hidden have one entry per level; got {(widths, *lists)}."
            )
        grids = _grids(self.event_shape, self.patch, len(widths))
        emb = whole(mapping_width, "mapping_width", 2)
        self.conditions = Conditions(classes=classes, cond_dropout=cond_dropout)
        self.waves, self.noise = FourierEmbedding(emb), nn.Linear(emb, emb)
        self.label = nn.Embedding(classes + 1, emb) if classes else None
        self.mapping = nn.ModuleList(_Perceptron(emb, mapping_hidden) for _ in range(mapping_depth))
        self.first, self.last = _Norm(emb), _Norm(emb)
        volume = self.event_shape[0] * math.prod(self.patch)
        self.inlet, self.outlet = _dense(volume, widths[0]), _dense(widths[0], volume, zero=True)
        self.norm = _Norm(widths[0])

        def level(at: int) -> _Level:
            kind = attention[at]
            window = 0 if isinstance(kind, str) else whole(kind, "attention's window")
            if window and any(size % window for size in grids[at]):
                raise ValueError(f"Windows of {window} do not divide the {grids[at]} tokens of level {at}.")
            if isinstance(kind, str) and kind not in ("global", "none"):
                raise ValueError(f'attention is "global", "none" or the side of windows; got {kind!r}.')
            head_width = None if kind == "none" else whole(head_widths[at], "head_widths")
            blocks = (
                _Block(widths[at], hidden[at], emb, head_width, window, window // 2 * (k % 2), rotary)
                for k in range(depths[at])
            )
            return _Level(blocks, places(grids[at], aspect))

        upper = range(len(widths) - 1)
        self.downs, self.ups = nn.ModuleList(map(level, upper)), nn.ModuleList(map(level, upper))
        self.middle = level(len(widths) - 1)
        self.merges = nn.ModuleList(_dense(4 * widths[k], widths[k + 1]) for k in upper)
        self.splits = nn.ModuleList(_dense(widths[k + 1], 4 * widths[k]) for k in upper)
        self.shares = nn.Parameter(torch.full((len(upper),), 0.5))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, C, H, W) at x (B, C, H, W) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This HourglassDiT is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        emb, skips = self._embedding(x, c_noise, cond), []
        h = self.inlet(_merged(x.movedim(1, -1), self.patch))
        for level, merge in zip(self.downs, self.merges, strict=True):
            h = level(h, emb)
            skips.append(h)
            h = merge(_merged(h, (2, 2)))
        h = self.middle(h, emb)
        for at in reversed(range(len(self.ups))):
            h = torch.lerp(skips[at], _split(self.splits[at](h), (2, 2)), self.shares[at].to(h.dtype))
            h = self.ups[at](h, emb)
        return _split(self.outlet(self.norm(h)), self.patch).movedim(-1, 1).to(x.dtype)

    def _embedding(self, x: Tensor, c_noise: Tensor, cond: Cond) -> Tensor:
        """emb (B, 1, 1, mapping_width)."""
        emb = self.noise(self.waves(c_noise).to(x.dtype))
        given = self.conditions(cond, x)
        if self.label is not None:
            none = torch.full((len(x),), self.conditions.classes, device=x.device, dtype=torch.int64)
            emb = emb + self.label(given.get("label", none))
        emb = self.first(emb)
        for block in self.mapping:
            emb = block(emb)
        return self.last(emb)[:, None, None]

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditions.null(cond)


class _Norm(nn.Module):
    """h/rms(h) times a learned scale, or times 1 + W emb, which is one at the start."""

    def __init__(self, width: int, emb: int = 0):
        super().__init__()
        self.modulation = _dense(emb, width, zero=True) if emb else None
        if not emb:
            self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        scale = self.scale if self.modulation is None else self.modulation(emb) + 1
        return h * (scale * _inverse(h, h.shape[-1])).to(h.dtype)


class _Perceptron(nn.Module):
    """h + W₂(a · GELU(b)), (a, b) = W₁ norm(h)."""

    def __init__(self, width: int, hidden: int, emb: int = 0):
        super().__init__()
        self.norm = _Norm(width, emb)
        self.inner, self.outer = _dense(width, 2 * hidden), _dense(hidden, width, zero=True)

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        a, b = self.inner(self.norm(h, emb)).chunk(2, -1)
        return h + self.outer(a * F.gelu(b))


class _Attention(nn.Module):
    """h + W softmax(q kᵀ) v over all tokens (B, H, W, width), or in windows after a shift, without what it wraps."""

    freqs: Tensor

    def __init__(self, width: int, head_width: int, emb: int, window: int, shift: int, rotary: float):
        super().__init__()
        turned = round(head_width * rotary) // 4
        if width % head_width or not 0 < 4 * turned <= head_width:
            raise ValueError(
                f"A head's numbers, a multiple of {math.ceil(4 / rotary)}, divide the width {width}; got {head_width}."
            )
        self.heads, self.window, self.shift = width // head_width, window, shift
        self.norm = _Norm(width, emb)
        self.qkv, self.proj = _dense(width, 3 * width), _dense(width, width, zero=True)
        self.scale = nn.Parameter(torch.full((self.heads,), 10.0))
        steps = torch.arange(self.heads * turned, dtype=torch.float64).reshape(turned, self.heads).T / (
            self.heads * turned
        )
        freqs = math.pi * 10**steps  # from one turn over the picture to ten, spread over the heads
        self.register_buffer("freqs", torch.stack([freqs, freqs]).float())  # (2, heads, turned), vertical first

    def forward(self, h: Tensor, emb: Tensor, place: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(h, emb)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.unbind()
        angle = torch.cat([place[None, :, :, n, None] * self.freqs[n, :, None, None] for n in (0, 1)], -1)
        length = self.scale[:, None, None, None].sqrt()
        q, k = (_turned(part * (length * _inverse(part)).to(part.dtype), angle) for part in (q, k))
        if not self.window:
            answer = _attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), None).reshape(v.shape)
        else:
            rolled = (part.roll((self.shift, self.shift), (2, 3)) for part in (q, k, v))
            q, k, v = (_windows(part, self.window) for part in rolled)
            answer = _attend(q, k, v, self._together(h) if self.shift else None)
            answer = _whole(answer, self.window).roll((-self.shift, -self.shift), (2, 3))
        return h + self.proj(answer.permute(0, 2, 3, 1, 4).flatten(3))

    def _together(self, h: Tensor) -> Tensor:
        """Which tokens of a window were neighbours before the shift (H/n, W/n, n², n²)."""
        wrapped = [torch.arange(size, device=h.device, dtype=torch.int64) < self.shift for size in h.shape[1:3]]
        side = _windows((2 * wrapped[0][:, None] + wrapped[1].long()[None])[..., None], self.window)
        return side == side.transpose(-1, -2)


class _Block(nn.Module):
    def __init__(
        self, width: int, hidden: int, emb: int, head_width: int | None, window: int, shift: int, rotary: float
    ):
        super().__init__()
        self.attention = None if head_width is None else _Attention(width, head_width, emb, window, shift, rotary)
        self.perceptron = _Perceptron(width, hidden, emb)

    def forward(self, h: Tensor, emb: Tensor, place: Tensor) -> Tensor:
        if self.attention is not None:
            h = self.attention(h, emb, place)
        out: Tensor = self.perceptron(h, emb)
        return out


class _Level(nn.ModuleList):
    """Blocks on tokens at the same places (H, W, 2)."""

    place: Tensor

    def __init__(self, blocks: Iterable[nn.Module], place: Tensor):
        super().__init__(blocks)
        self.register_buffer("place", place, persistent=False)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for block in self:
            h = block(h, emb, self.place.to(h.dtype))
        return h


def places(grid: Sequence[int], aspect: float = 1.0) -> Tensor:
    """(H, W, 2) centres of patches of `aspect` height/width; the picture's longer side goes from −1 to 1."""
    height, width = grid[0] * aspect, float(grid[1])
    most = max(height, width)
    lines = [
        (2 * torch.arange(n, dtype=torch.float64) + 1 - n) / n * side / most
        for n, side in zip(grid, (height, width), strict=True)
    ]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).float()


def _grids(event_shape: tuple[int, ...], patch: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """Tokens along each axis, level by level."""
    if len(event_shape) != 3 or len(patch) != 2:
        raise ValueError(f"event_shape is (C, H, W), patch a side or (height, width); got {event_shape} and {patch}.")
    coarse = [side << (levels - 1) for side in patch]
    if any(size % side for size, side in zip(event_shape[1:], coarse, strict=True)):
        raise ValueError(f"Samples {event_shape} do not divide into {coarse}, the patches of the coarsest level.")
    fine = [size // side for size, side in zip(event_shape[1:], patch, strict=True)]
    return [tuple(size >> level for size in fine) for level in range(levels)]


def _dense(inputs: int, outputs: int, *, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


def _inverse(h: Tensor, count: int = 1) -> Tensor:
    """1/√(Σh²/count + 1e-6) along the last dimension, in float32 or wider."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    return (h.to(dtype).square().sum(-1, keepdim=True) / count + _EPS).rsqrt()


def _turned(h: Tensor, angle: Tensor) -> Tensor:
    """h (…, d) whose pairs (i, n + i), i < n, are turned by `angle` (…, n); the rest stays."""
    a, b, rest = h.split([angle.shape[-1], angle.shape[-1], h.shape[-1] - 2 * angle.shape[-1]], -1)
    cos, sin = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ) v of lengths as they are; on the CPU in two products, see `attend`."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    logits = q @ k.transpose(-1, -2)
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def _merged(h: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, H/p, W/q, pqC) of h (B, H, W, C): of each patch its rows, columns and numbers."""
    split = h.unflatten(2, (-1, patch[1])).unflatten(1, (-1, patch[0]))
    return split.transpose(2, 3).flatten(3)


def _split(h: Tensor, patch: Sequence[int]) -> Tensor:
    """The inverse of `_merged`."""
    split = h.unflatten(3, (*patch, -1)).transpose(2, 3)
    return split.flatten(3, 4).flatten(1, 2)


def _windows(h: Tensor, side: int) -> Tensor:
    """(…, H/n, W/n, n², d) of h (…, H, W, d)."""
    return h.unflatten(-2, (-1, side)).unflatten(-4, (-1, side)).transpose(-4, -3).flatten(-3, -2)


def _whole(h: Tensor, side: int) -> Tensor:
    """The inverse of `_windows`."""
    return h.unflatten(-2, (side, side)).transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)
