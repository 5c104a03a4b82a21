"""The layers of a U-Net, for 1 to 3 spatial dimensions: each is (h (B, C, *sizes), emb (B, E), tokens) -> h.

`tokens` are the sequence that the network is conditioned on, None without one; only `CrossAttention` reads them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.conditions import filled
from .layers import conv, group_norm, linear


class Tokens(NamedTuple):
    """A sequence per sample: values (B, L, E), and which of them are there (B, L)."""

    values: Tensor
    there: Tensor


class Stack(nn.ModuleList):
    """Layers one after another, all with the same embedding and tokens."""

    def forward(self, h: Tensor, emb: Tensor, tokens: Tokens | None = None) -> Tensor:
        for layer in self:
            h = layer(h, emb, tokens)
        return h


class Style(NamedTuple):
    """Choices by which published U-Nets differ; the defaults are ours, and `UNet` says who made the others."""

    scale_shift: bool = True
    resample_skip: bool = False
    fir_zeros: bool = False
    pyramid_conv_first: bool = False
    strided: bool = False
    attend_all: bool = False
    middle_attention: bool | None = None
    eps: float = 1e-6
    group_channels: int = 4

    def norm(self, channels: int) -> nn.GroupNorm:
        return group_norm(channels, self.group_channels, self.eps)


_OURS = Style()


class ResampleConv(nn.Module):
    """Resampling followed by a convolution, as in DDPM; with `conv_first` a convolution, then halving, then the bias.

    What the convolution makes beyond the edge of h, which goes on with zeros, is then filtered with the rest.
    """

    def __init__(self, dims: int, inputs: int, outputs: int, resample: nn.Module, conv_first: bool = False):
        super().__init__()
        self.resample, self.conv_first = resample, conv_first
        self.conv = conv(dims, inputs, outputs, 3)

    def forward(self, h: Tensor, emb: Tensor, tokens: Tokens | None = None) -> Tensor:
        if not self.conv_first:
            return self.conv(self.resample(h))
        weight, bias = self.conv.parameters()
        halved = self.resample((F.conv1d, F.conv2d, F.conv3d)[h.ndim - 3](h, weight, padding=3))
        for dim in range(2, h.ndim):
            halved = halved.narrow(dim, 1, h.shape[dim] // 2)
        return halved + bias.reshape(-1, *[1] * (h.ndim - 2))


class ResidualBlock(nn.Module):
    r"""skip(h) + conv(dropout(SiLU(FiLM(norm(conv(SiLU(norm(h)))), emb)))), all times `scaling`.

    FiLM is (1 + a) h + b with (a, b) linear in emb (Perez et al. 2018). With `resample`, both branches are
    resampled, the inner one after its first activation (BigGAN; Brock et al. 2019). A style without `scale_shift` has
    norm(conv(…) + b) in place of FiLM; one with `resample_skip` has a 1×1 convolution on every resampled skip.

    Args:
        dims: spatial dimensions, 1 to 3.
        inputs, outputs: channels.
        emb: width of the embedding.
        dropout: probability, before the last convolution.
        scaling: factor on the sum: 1/√2 keeps the variance.
        resample: `Downsample`, `Upsample` or None.
        style: see `Style`.
    """

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        emb: int,
        *,
        dropout: float = 0.0,
        scaling: float = 1.0,
        resample: nn.Module | None = None,
        style: Style = _OURS,
    ):
        super().__init__()
        self.scaling, self.scale_shift = scaling, style.scale_shift
        convolved = inputs != outputs or (style.resample_skip and resample is not None)
        self.resample = nn.Identity() if resample is None else resample
        self.norm1, self.conv1 = style.norm(inputs), conv(dims, inputs, outputs, 3)
        self.film = linear(emb, 2 * outputs if style.scale_shift else outputs)
        self.norm2, self.conv2 = style.norm(outputs), conv(dims, outputs, outputs, 3, zero=True)
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(dims, inputs, outputs, 1) if convolved else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor, tokens: Tokens | None = None) -> Tensor:
        inner = self.conv1(self.resample(F.silu(self.norm1(h))))
        film = self.film(emb).reshape(len(h), -1, *[1] * (h.ndim - 2))
        if self.scale_shift:
            scale, shift = film.chunk(2, 1)
            inner = self.norm2(inner) * (1 + scale) + shift
        else:
            inner = self.norm2(inner + film)
        inner = self.conv2(self.dropout(F.silu(inner)))
        return (self.skip(self.resample(h)) + inner) * self.scaling


def attend(q: Tensor, k: Tensor, v: Tensor, there: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v over tokens (B, heads, tokens, d); of keys and values, only those `there` (B, tokens).

    Fused except on the CPU, where two products are as fast at these sizes and have derivatives of every order
    and mode, which the fused kernel lacks. For a second derivative elsewhere use PyTorch's
    `sdpa_kernel(SDPBackend.MATH)`.
    """
    mask = None if there is None else there[:, None, None]
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


class Attention(nn.Module):
    """(h + proj(attention(norm(h)))) · scaling over all positions; `heads` divides `channels`; emb is unused."""

    def __init__(self, dims: int, channels: int, *, heads: int = 1, scaling: float = 1.0, style: Style = _OURS):
        super().__init__()
        self.heads, self.scaling = heads, scaling
        self.norm = style.norm(channels)
        self.qkv = conv(dims, channels, 3 * channels, 1)
        self.proj = conv(dims, channels, channels, 1, zero=True)

    def forward(self, h: Tensor, emb: Tensor, tokens: Tokens | None = None) -> Tensor:
        qkv = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1))
        answer = attend(*torch.unbind(qkv.transpose(-1, -2), 1))
        return (h + self.proj(answer.transpose(-1, -2).reshape(h.shape))) * self.scaling


class TokenEmbedding(nn.Module):
    """Tokens (B, L, inputs), NaN where padded, as `Tokens` of 1 + L: before them a learned one that is always there.

    That is the null token, the only one that a sample without tokens attends to. Attention does not see the order of
    tokens; where it matters, add positions to them.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.linear = linear(inputs, width)
        self.null = nn.Parameter(torch.randn(width))

    def forward(self, value: Tensor | None, like: Tensor) -> Tokens:
        null = self.null.to(like.dtype).expand(like.shape[0], 1, -1)
        alone = torch.ones(like.shape[0], 1, dtype=torch.bool, device=like.device)
        if value is None:
            return Tokens(null, alone)
        value, there = filled(value, 2)
        return Tokens(torch.cat([null, self.linear(value).to(null.dtype)], 1), torch.cat([alone, there], 1))


class CrossAttention(nn.Module):
    """(h + proj(attention(norm(h), tokens))) · scaling, queries from h, keys and values from the tokens; emb is unused.

    Args:
        dims: spatial dimensions, 1 to 3.
        channels: of h.
        width: of the tokens.
        heads: number of heads, dividing `channels`.
        scaling: factor on the sum.
    """

    def __init__(self, dims: int, channels: int, width: int, *, heads: int = 1, scaling: float = 1.0):
        super().__init__()
        self.heads, self.scaling = heads, scaling
        self.norm = group_norm(channels)
        self.query = conv(dims, channels, channels, 1)
        self.key_value = linear(width, 2 * channels)
        self.proj = conv(dims, channels, channels, 1, zero=True)

    def forward(self, h: Tensor, emb: Tensor, tokens: Tokens | None = None) -> Tensor:
        if tokens is None:
            raise ValueError("Cross-attention has no tokens to attend to: pass Tokens, as UNet(cond_tokens=…) does.")
        q = self.query(self.norm(h)).flatten(2).unflatten(1, (self.heads, -1)).transpose(-1, -2)
        k, v = self.key_value(tokens.values).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        answer = attend(q, k, v, tokens.there)
        return (h + self.proj(answer.transpose(-1, -2).reshape(h.shape))) * self.scaling
