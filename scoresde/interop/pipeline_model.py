"""The networks of a pipeline of diffusers that draws pictures of sentences, without weights yet."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.conditions import PADDING, Cond, each, named, nothing
from ..nn.autoencoder import log_mass

CLASSES = {
    "diffusers": ("UNet2DConditionModel", "SD3Transformer2DModel", "AutoencoderKL"),
    "transformers": ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"),
}
_CACHED = 256  # sentences whose embeddings are kept


def class_of(kind: str) -> Any:
    """One of `CLASSES`, of its package.

    Raises:
        ValueError: another class.
        ImportError: the package is missing, or has no such class.
    """
    library = next((name for name, kinds in CLASSES.items() if kind in kinds), None)
    if library is None:
        raise ValueError(f"A part of a pipeline is one of {', '.join(sum(CLASSES.values(), ()))}; got {kind!r}.")
    try:
        return getattr(importlib.import_module(library), kind)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{kind} is run by the package {library}: pip install {library} ({error}).") from error


def encoder_of(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A text encoder of transformers, without weights."""
    made = class_of(kind)
    found: nn.Module = made(made.config_class(**config))
    return found.eval().requires_grad_(False)


class Sentences(nn.Module):
    """Sentences, (B, L) numbers of tokens with −1 behind the end, as the pipelines of diffusers read them.

    Every sentence is padded to a length of its own for each encoder, and the padding is read, too. A network gets
    its tokens (B, L', D) and its summary (B, P), which has no numbers where no encoder projects one. What was read is
    kept.

    Args:
        encoders: of each `kind` and `config`; `pad`, the token that sentences are padded with to `length`; `empty`, the
            tokens of no words; `start` and `size`, which tokens are its own: those from `start` on.
        last: read the last layer, as Stable Diffusion 1 and 2 do; or the one before, as SDXL and 3.
        joint: 0, or of Stable Diffusion 3 the width of tokens. Those of CLIP are filled up with zeros, and those of T5
            follow, or as many zeros as `rest` says where there is no T5.
        rest: see `joint`.
        zeros: no sentence is zeros, and not that without words.
        vocabulary: number of tokens of the tokenizer.

    Raises:
        ImportError: transformers is missing.
    """

    def __init__(
        self,
        encoders: Sequence[Mapping[str, Any]],
        last: bool = True,
        joint: int = 0,
        rest: int = 0,
        zeros: bool = False,
        vocabulary: int | None = None,
    ):
        super().__init__()
        self.vocabulary, self.last, self.joint, self.rest, self.zeros = vocabulary, last, joint, rest, zeros
        self.told = [dict(one) for one in encoders]
        self.encoders = nn.ModuleList(encoder_of(one["kind"], one["config"]) for one in encoders)
        self._made: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        keys = [(weight.device, weight.dtype, *(n for n in row if n >= 0)) for row in ids.tolist()]
        if new := [key for key in dict.fromkeys(keys) if key not in self._made]:
            with torch.inference_mode(False), torch.no_grad():
                self._made |= dict(zip(new, zip(*self._read([key[2:] for key in new]), strict=True), strict=True))
        tokens, summaries = zip(*(self._made[key] for key in keys), strict=True)
        while len(self._made) > _CACHED:
            self._made.popitem(last=False)
        return torch.stack(tokens), torch.stack(summaries)

    def _read(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and summaries of sentences."""
        weight = next(self.parameters())
        wide: list[Tensor] = []
        more: list[Tensor] = []
        summaries: list[Tensor] = [weight.new_zeros(len(rows), 0)]
        for encoder, how in zip(self.encoders, self.told, strict=True):
            ids = torch.full((len(rows), how["length"]), how["pad"], dtype=torch.int64, device=weight.device)
            for row, tokens in zip(ids, rows, strict=True):
                own = [n - how["start"] for n in tokens if 0 <= n - how["start"] < how["size"]] or how["empty"]
                row[: len(own)] = torch.tensor(own, dtype=torch.int64, device=weight.device)
            found = encoder(input_ids=ids, output_hidden_states=True)
            t5 = how["kind"] == "T5EncoderModel"
            (more if t5 else wide).append(found.last_hidden_state if t5 or self.last else found.hidden_states[-2])
            if how["kind"] == "CLIPTextModelWithProjection":
                summaries.append(found.text_embeds)
        read, summary = torch.cat(wide, -1), torch.cat(summaries, -1)
        if self.joint:
            more = more or [read.new_zeros(len(rows), self.rest, self.joint)]
            read = torch.cat([F.pad(read, (0, self.joint - read.shape[-1])), *more], 1)
        if self.zeros:
            there = torch.tensor([bool(row) for row in rows], dtype=torch.bool, device=weight.device)
            read, summary = read * there[:, None, None], summary * there[:, None]
        return read, summary


class TextToImage(nn.Module):
    """F(x, c_noise, cond) of latents told a sentence, by a network of the package diffusers.

    Args:
        kind: its class there: "UNet2DConditionModel" (Stable Diffusion 1, 2 and XL) or "SD3Transformer2DModel".
        config: its `config.json`.
        text: what reads sentences.
        event_shape: of latents, (C, H, W).
        pixels: the size of a picture, (H, W), which SDXL is told.
        cond_dropout: how often it was told nothing in training, as far as anybody knows; kept for who asks.

    Raises:
        ImportError: diffusers is missing.
        ValueError: another class.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        text: nn.Module,
        event_shape: Sequence[int],
        pixels: Sequence[int],
        cond_dropout: float = 0.1,
    ):
        super().__init__()
        self.inner, self.text = class_of(kind).from_config(dict(config)), text
        self.event_shape, self.pixels, self.joint = tuple(event_shape), tuple(pixels), kind.startswith("SD3")

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, C, H, W) at x (B, C, H, W), time steps c_noise (B,) and sentences (B, L)."""
        ids = named(cond).get("text")
        empty = torch.full((len(x), 1), PADDING, dtype=torch.int64, device=x.device)
        tokens, summary = self.text(empty if ids is None else ids)
        more: dict[str, Any] = {}
        if self.joint:
            more = {"pooled_projections": summary}
        elif summary.shape[1]:
            sizes = torch.tensor([[*self.pixels, 0, 0, *self.pixels]], device=x.device, dtype=x.dtype)
            more = {"added_cond_kwargs": {"text_embeds": summary, "time_ids": sizes.expand(len(x), -1)}}
        found: Tensor = self.inner(x, timestep=c_noise, encoder_hidden_states=tokens, **more).sample
        return found

    def null(self, cond: Cond) -> Cond:
        """No sentence."""
        return each(lambda value: nothing(value, 0), cond)


class KL(nn.Module):
    """`AutoencoderKL` of diffusers, as `codecs.Autoencoder` asks for it: pictures of 256 levels as latents.

    It was trained to look right, and has no density p(x | z). With `scale` it is given one, the logistic law of that
    scale about the decoded picture, so that there is a lower bound on log p; a good one where the scale is about √3/π
    times the standard deviation of what the autoencoder loses.

    Args:
        config: its `config.json`.
        event_shape: of pictures, (C, H, W).
        latent_shape: of latents, (C, H, W).
        low, high: ends of the bins of integers.
        scale: > 0 in units of model data, whose range is about [−1, 1]; None for no density.
    """

    levels = 256

    def __init__(
        self,
        config: Mapping[str, Any],
        event_shape: Sequence[int],
        latent_shape: Sequence[int],
        low: float = -1.0,
        high: float = 1.0,
        scale: float | None = None,
    ):
        super().__init__()
        self.inner = class_of("AutoencoderKL").from_config(dict(config))
        for part in self.inner.modules():
            if type(part).__name__ == "Attention":  # whose transposed output has no forward derivative of its norm
                part.register_forward_hook(_contiguous)
        self.event_shape, self.latent_shape = tuple(event_shape), tuple(latent_shape)
        self.ends, self.scale = (low, high), scale

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x)."""
        found = self.inner.encode(x).latent_dist
        return found.mean, found.std

    def decode(self, z: Tensor) -> Tensor:
        """The picture of latents."""
        # the kernel of attention that forward derivatives go through, which posterior methods take
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            found: Tensor = self.inner.decode(z).sample
        return found

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) (B,) in nats of the bins that x lies in.

        Raises:
            ValueError: there is no density.
        """
        if self.scale is None:
            raise ValueError(
                "An AutoencoderKL was trained to look right and has no density p(x | z), so there is no bound on log p "
                "of pictures. Import it with one, a logistic law about what it decodes: args.scale=0.05, in [-1, 1]."
            )
        low, high = self.ends
        bins = ((x - low) * (self.levels / (high - low))).floor().clamp(0, self.levels - 1)
        mean = self.decode(z)[:, None]
        return log_mass(bins, mean, torch.full_like(mean, self.scale).log(), self.levels, self.ends).flatten(1).sum(1)


def _contiguous(module: nn.Module, given: Any, found: Tensor) -> Tensor:
    return found.clone(memory_format=torch.contiguous_format)
