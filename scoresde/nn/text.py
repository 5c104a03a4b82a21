"""Encoders of texts: one that is trained with the denoiser, and those that others trained."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import whole
from .conditions import TextEncoder
from .transformer import positions

_CACHED = 4096  # texts whose embeddings a frozen encoder keeps
# What holds the text encoder of a folder, by the type that its configuration names.
_FROZEN = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}


class TextTransformer(TextEncoder):
    """A transformer that is trained with the denoiser: tokens with sine-cosine positions behind one that sums them up.

    Its layers are torch's own, normalised first.

    Args:
        vocabulary: number of tokens, ≥ 1.
        width: numbers per token, even and divisible by `heads`.
        depth: layers, ≥ 1.
        heads: attention heads.
        mlp_ratio: hidden width of the perceptrons over `width`.
        dropout: probability in [0, 1), in every layer, in training mode.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.vocabulary, self.width = whole(vocabulary, "vocabulary"), whole(width, "width")
        if width % whole(heads, "heads") or width % 2:
            raise ValueError(f"width is even and divisible by heads={heads}; got {width}.")
        self.embedding = nn.Embedding(vocabulary, width)
        self.summary = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, round(mlp_ratio * width), dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(whole(depth, "depth"))
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        places = positions((ids.shape[1],), self.width).to(self.summary)
        h = torch.cat([self.summary.expand(len(ids), 1, -1), self.embedding(ids) + places], 1)
        absent = torch.cat([torch.zeros_like(there[:, :1]), ~there], 1)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=absent)
        h = self.norm(h)
        return h[:, 1:], h[:, 0]


class FrozenText(TextEncoder):
    """The text encoder of a folder that `save_pretrained` of `transformers` wrote: CLIP's, T5's, or another.

    It is not trained, and neither copied nor saved with the network, so that the folder has to stay. Texts that were
    embedded are kept. The summary is the encoder's own (CLIP's, at the end of the text) or the mean of its tokens.
    The captions need the tokenizer of the same folder.

    Args:
        path: the folder.
        vocabulary: number of tokens of the tokenizer; None leaves them unchecked.

    Raises:
        ImportError: transformers is missing.
        ValueError: the folder holds no encoder, or one with fewer tokens.
    """

    def __init__(self, path: str, vocabulary: int | None = None):
        super().__init__()
        self.vocabulary, self._frozen = vocabulary, _Frozen(path)
        own = self._frozen.model.config.vocab_size
        if vocabulary is not None and vocabulary > own:
            raise ValueError(
                f"{path} knows {own} tokens, and the tokenizer of the captions has {vocabulary}: take that of the same "
                f"folder, data.captions.tokenizer={path}."
            )
        self.width: int = self._frozen.model.config.hidden_size
        self.place: Tensor
        self.register_buffer("place", torch.zeros(()), persistent=False)  # whose device and dtype the others follow

    def forward(self, ids: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pooled = self._frozen(ids.cpu(), there.cpu())
        return tokens.to(self.place), pooled.to(self.place)


class _Frozen:
    """A model that copies of the network share, on the CPU in float32, with what it made of texts."""

    def __init__(self, path: str):
        try:
            import transformers
        except ImportError as error:
            raise ImportError("Frozen text encoders need transformers: pip install transformers.") from error
        try:
            kind = transformers.AutoConfig.from_pretrained(path, local_files_only=True).model_type
            make = getattr(transformers, _FROZEN.get(kind, "AutoModel"))
            model = make.from_pretrained(path, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} holds no text encoder of transformers: {error!s:.300}") from error
        self.model: Any = model.eval().float().requires_grad_(False)
        self.made: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def __deepcopy__(self, memo: Any) -> _Frozen:
        return self

    @torch.no_grad()
    def __call__(self, ids: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        keys = [row.numpy().tobytes() for row in torch.where(there, ids, -1)]
        if new := list({key: k for k, key in enumerate(keys) if key not in self.made}.values()):
            found = self.model(input_ids=ids[new], attention_mask=there[new].long())
            tokens, pooled = found.last_hidden_state, found.get("pooler_output")
            if pooled is None:
                some = there[new, :, None]
                pooled = tokens.masked_fill(~some, 0).sum(1) / some.sum(1).clamp(min=1)
            self.made |= {keys[k]: pair for k, *pair in zip(new, tokens, pooled, strict=True)}
        rows = [self.made[key] for key in keys]
        while len(self.made) > _CACHED:
            self.made.popitem(last=False)
        return torch.stack([tokens for tokens, _ in rows]), torch.stack([pooled for _, pooled in rows])
