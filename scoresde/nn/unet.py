"""The U-Net of DDPM++ and NCSN++ with its choices as switches, in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive, sizes, whole
from ..diffusion.conditions import Cond
from .blocks import Attention, CrossAttention, ResampleConv, ResidualBlock, Stack, Style, TokenEmbedding
from .conditioning import Conditioning, Options, check_joined, joined
from .layers import conv
from .resample import Decimate, Downsample, Upsample


class Switches(Options, total=False):
    """The arguments of `UNet` that published networks need; see there."""

    scale_shift: bool
    resample_skip: bool
    fir_zeros: bool
    pyramid_conv_first: bool
    strided: bool
    attend_all: bool
    middle_attention: bool | None
    eps: float
    group_channels: int
    embedding_width: int | None
    waves: int | None
    late: bool


class UNet(nn.Module):
    r"""A U-Net F(x, c_noise, cond) after Ho et al. (2020) and Song et al. (2021, app. H); zero at the start.

    DDPM++ is `embedding="sinusoidal"` and the other defaults; NCSN++ is `fir=True,
    progressive_input="residual", embedding_scale=16`, both but for the details that `switches` change. Level i works
    at 1/2^i of the size with `multipliers[i] * width` channels: `blocks` residual blocks on the way down and
    `blocks + 1` on the way up.

    Args:
        event_shape: (C, L), (C, H, W) or (C, D, H, W); spatial sizes divisible by 2^(len(multipliers) − 1).
        width: channels at full size, ≥ 2; the embedding is four times as wide.
        multipliers: channel multipliers, one per level, each ≥ 1.
        blocks: residual blocks per level, ≥ 1.
        attention: resolutions (longest side, in samples) with self-attention, after every residual block on the
            way down and after the last one on the way up. Unless empty, the middle has one more.
        heads: attention heads, dividing the channels of every level with attention.
        head_width: channels per head instead of `heads`; None for `heads`.
        residual_scaling: sums of two branches are divided by √2, which keeps their variance.
        fir: resample with the (1, 3, 3, 1) filter; False averages pairs and repeats.
        resnet_resample: resample inside residual blocks (BigGAN); False by a convolution of its own.
        progressive_input: "residual" adds resampled, convolved x to each level (NCSN++); "none".
        dropout: probability in [0, 1), in every residual block, in training mode.
        outputs: 2 returns two outputs, (B, 2C, *sizes): the second is for a learned variance. None is 1.
        encode_image: False joins the image to x as further channels, brought to its size by linear interpolation, and
            one that says whether there is an image; True reads it by an encoder, for images that do not align with x.
        conditioning: embedding and embedding_scale, the waves that carry c_noise, see `Conditioning`; classes,
            cond_dim, cond_image, cond_tokens, text and cond_dropout, the conditions there are, see `Conditions`. Tokens
            and the words of a text are attended to where there is self-attention, after it, and always in the middle.
        switches: what makes it one of the published networks, weight by weight; none is on by default. The following.
        scale_shift: False adds the embedding before the second norm of a block, as EDM's SongUNet, score_sde and
            guided-diffusion's use_scale_shift_norm=False do; True scales and shifts after it.
        resample_skip: a 1×1 convolution on every skip that is resampled (SongUNet, score_sde).
        fir_zeros: the filter goes on with zeros beyond the edge and does not repeat it (NCSN++ of both).
        pyramid_conv_first: x is convolved before it is halved (NCSN++ of both).
        strided: with resnet_resample=False, halve by a convolution of stride 2 (guided-diffusion's
            resblock_updown=False).
        attend_all: attention after every residual block on the way up (ADM: DhariwalUNet, guided-diffusion).
        middle_attention: whatever `attention` says (SongUNet, score_sde, guided-diffusion); None is as above.
        eps: of every norm; 1e-5 in ADM.
        group_channels: the fewest channels in a group of a norm, 4; guided-diffusion has 32 groups always, that is 1.
        embedding_width, waves: of the embedding, 4 width, and of the waves, as wide.
        late: conditions are added after the second layer of the embedding (ADM).

    Raises:
        ValueError: arguments out of range, sizes that cannot be halved, attention at a resolution that never
            occurs; in forward, inputs of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        head_width: int | None = None,
        residual_scaling: bool = True,
        fir: bool = False,
        resnet_resample: bool = True,
        progressive_input: str = "none",
        dropout: float = 0.0,
        outputs: int | None = None,
        encode_image: bool = False,
        **switches: Unpack[Switches],
    ):
        super().__init__()
        style, emb, conditioning = _read(switches, 4 * width)
        self.event_shape = sizes(event_shape, "event_shape")
        _check(width, multipliers, blocks, progressive_input, dropout)
        sides = check_sides(self.event_shape, len(multipliers))
        if unknown := sorted(set(attention) - set(sides)):
            raise ValueError(f"The resolutions are {sides}; attention at {unknown} would never happen.")
        dims, channels = len(self.event_shape) - 1, self.event_shape[0]
        predictions = 1 if outputs is None else whole(outputs, "outputs")
        widths = [width * multiplier for multiplier in multipliers]
        attends = [side in attention for side in sides]
        self.scaling = math.sqrt(0.5) if residual_scaling else 1.0
        self.conditioning = Conditioning(emb, encode_image=encode_image, **conditioning)
        shapes = self.conditioning.conditions.shapes
        tokens = self.conditioning.tokens
        make = _Layers(dims, emb, heads, head_width, bool(tokens), fir, resnet_resample, dropout, self.scaling, style)

        # the order of these lines is that of the parameters, and of the random numbers they start from
        self.inlet = conv(dims, channels, width, 3)
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        self.pyramid = nn.ModuleList()
        skips = self._build_encoder(make, width, widths, attends, blocks, progressive_input == "residual")
        c, central = widths[-1], bool(attention) if style.middle_attention is None else style.middle_attention
        self.middle = Stack([make.block(c, c), *make.attention(c, itself=central), make.block(c, c)])
        self._build_decoder(make, widths, attends, blocks, skips)
        self.norm, self.outlet = style.norm(widths[0]), conv(dims, widths[0], predictions * channels, 3, zero=True)
        self.tokens = TokenEmbedding(tokens, emb) if tokens else None
        self.joint = None if encode_image else _joint(self.event_shape, shapes.get("image", ()), width)

    def _build_encoder(
        self, make: _Layers, inputs: int, widths: list[int], attends: list[bool], blocks: int, residual: bool
    ) -> list[int]:
        """The way down from `inputs` channels; with `residual`, its pyramid too. Returns the channels of the skips."""
        skips, c = [inputs], inputs
        for level, outputs in enumerate(widths):
            if level:
                self.downs.append(make.down(c))
                skips.append(c)
                if residual:
                    above = self.event_shape[0] if level == 1 else widths[level - 2]
                    halve, first = Downsample(make.fir, make.style.fir_zeros), make.style.pyramid_conv_first
                    self.pyramid.append(ResampleConv(make.dims, above, c, halve, first))
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(make.stage(c, outputs, attends[level]))
                c = outputs
                skips.append(c)
            self.encoder.append(stages)
        return skips

    def _build_decoder(
        self, make: _Layers, widths: list[int], attends: list[bool], blocks: int, skips: list[int]
    ) -> None:
        """The way up, each stage taking the last of `skips`; attention comes after the last stage of a level."""
        c, last = widths[-1], blocks
        for level in reversed(range(len(widths))):
            if level < len(widths) - 1:
                self.ups.append(make.resample(c, Upsample(make.fir, make.style.fir_zeros)))
            stages = nn.ModuleList()
            for index in range(blocks + 1):
                attended = attends[level] and (make.style.attend_all or index == last)
                stages.append(make.stage(c + skips.pop(), widths[level], attended))
                c = widths[level]
            self.decoder.append(stages)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, outputs · C, *sizes) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This UNet is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        given = self.conditioning.read(cond, x)
        emb = self.conditioning.embed(c_noise, given, x)
        tokens = None if self.tokens is None else self.tokens(given.get("tokens"), x)
        h, pyramid = self.inlet(x), x
        if self.joint is not None:  # a convolution of all channels together, in two parts
            h = h + self.joint(joined(given.get("image"), self.conditioning.conditions.shapes["image"][0], x))
        skips = [h]
        for level, stages in enumerate(self.encoder):
            if level:
                h = self.downs[level - 1](h, emb, tokens)
                if self.pyramid:
                    pyramid = h = (h + self.pyramid[level - 1](pyramid, emb)) * self.scaling
                skips.append(h)
            for stage in stages.children():
                h = stage(h, emb, tokens)
                skips.append(h)
        h = self.middle(h, emb, tokens)
        for level, stages in enumerate(self.decoder):
            if level:
                h = self.ups[level - 1](h, emb, tokens)
            for stage in stages.children():
                h = stage(torch.cat([h, skips.pop()], 1), emb, tokens)
        return self.outlet(F.silu(self.norm(h))).to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditioning.conditions.null(cond)


class _Layers(NamedTuple):
    """How the layers of one U-Net are made."""

    dims: int
    emb: int
    heads: int
    head_width: int | None
    tokens: bool
    fir: bool
    resnet_resample: bool
    dropout: float
    scaling: float
    style: Style

    def block(self, inputs: int, outputs: int, resample: nn.Module | None = None) -> ResidualBlock:
        how = {"dropout": self.dropout, "scaling": self.scaling}
        return ResidualBlock(self.dims, inputs, outputs, self.emb, **how, resample=resample, style=self.style)

    def attention(self, channels: int, itself: bool = True) -> list[nn.Module]:
        """To all positions, where `itself`, and then to the tokens, where there are any."""
        if not (itself or self.tokens):
            return []
        n, layers = _heads(channels, self.heads, self.head_width), nn.ModuleList()
        if itself:
            layers.append(Attention(self.dims, channels, heads=n, scaling=self.scaling, style=self.style))
        if self.tokens:
            layers.append(CrossAttention(self.dims, channels, self.emb, heads=n, scaling=self.scaling))
        return list(layers)

    def stage(self, inputs: int, outputs: int, attends: bool) -> Stack:
        attention = self.attention(outputs) if attends else []  # first: it has the first of the random numbers
        return Stack([self.block(inputs, outputs), *attention])

    def down(self, channels: int) -> nn.Module:
        if self.style.strided and not self.resnet_resample:
            return ResampleConv(self.dims, channels, channels, Decimate(), conv_first=True)
        return self.resample(channels, Downsample(self.fir, self.style.fir_zeros))

    def resample(self, channels: int, module: nn.Module) -> nn.Module:
        if self.resnet_resample:
            return self.block(channels, channels, module)
        return ResampleConv(self.dims, channels, channels, module)


def _read(switches: Switches, usual: int) -> tuple[Style, int, dict[str, Any]]:
    """(style, width of the embedding, arguments of `Conditioning`) of the arguments that are left to a U-Net."""
    rest: dict[str, Any] = dict(switches)
    style = Style(**{name: rest.pop(name) for name in Style._fields if name in rest})
    positive(style.eps, "eps"), whole(style.group_channels, "group_channels")
    emb = rest.pop("embedding_width", None)
    return style, usual if emb is None else whole(emb, "embedding_width", 2), rest


def _check(width: int, multipliers: Sequence[int], blocks: int, progressive_input: str, dropout: float) -> None:
    whole(width, "width", 2), whole(blocks, "blocks")
    if not sizes(multipliers, "multipliers"):
        raise ValueError("multipliers has one number for each level, at least one; got none.")
    if progressive_input not in ("none", "residual"):
        raise ValueError(f"progressive_input is 'none' or 'residual'; got {progressive_input!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability in [0, 1); got {dropout}.")


def _joint(event_shape: tuple[int, ...], image: tuple[int, ...], width: int) -> nn.Module | None:
    """The convolution of an image that is joined to x, and of the channel beside it."""
    check_joined(event_shape, image)
    return conv(len(image) - 1, image[0] + 1, width, 3) if image else None


def check_sides(event_shape: tuple[int, ...], levels: int) -> list[int]:
    """The longest side at every level; refuses shapes that cannot be halved levels − 1 times."""
    if not 2 <= len(event_shape) <= 4:
        raise ValueError(
            f"event_shape is (C, L), (C, H, W) or (C, D, H, W); got {event_shape}. Vectors take network=mlp."
        )
    step = 2 ** (levels - 1)
    wrong = sorted({size for size in event_shape[1:] if size % step})
    if wrong:
        options = ", ".join(
            f"{size} → " + " or ".join(str(n) for n in (size // step * step, -(-size // step) * step) if n)
            for size in wrong
        )
        raise ValueError(
            f"{levels} levels halve every spatial size {levels - 1} times, so sizes are multiples of {step}: "
            f"in {event_shape}, {options}. Pad or crop the data, or use fewer multipliers."
        )
    return [max(event_shape[1:]) >> level for level in range(levels)]


def _heads(channels: int, heads: int, head_width: int | None) -> int:
    if head_width is None:
        if whole(heads, "heads", 0) < 1 or channels % heads:
            raise ValueError(f"heads divides the {channels} channels of its level, at least 1; got {heads}.")
        return heads
    if heads != 1:
        raise ValueError(f"Give heads or head_width, not both; got heads={heads}, head_width={head_width}.")
    if whole(head_width, "head_width", 0) < 1 or channels % head_width:
        raise ValueError(f"head_width divides the {channels} channels of its level; got {head_width}.")
    return channels // head_width
