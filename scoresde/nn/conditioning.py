"""(c_noise, cond) as one vector per sample, for every network alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import FourierEmbedding, SinusoidalEmbedding
from .layers import linear

Cond = Tensor | Mapping[str, Tensor] | None

_EMBEDDINGS = {"fourier": FourierEmbedding, "sinusoidal": SinusoidalEmbedding}


class Conditioning(nn.Module):
    r"""SiLU(W₂ SiLU(W₁ waves(c_noise) + label + vector)), the vector that modulates every block of a network.

    `cond` is a tensor when the network has one kind of condition, or a mapping with "label" (B,) integers in
    0 … classes and/or "vector" (B, cond_dim) floats. What is absent is replaced by a learned null: the label
    `classes`, or a vector in place of the embedded one. With `cond_dropout` p, a forward in training mode replaces
    the whole condition of each sample by null with probability p (Ho & Salimans 2022); it draws from torch's global
    generator, as `nn.Dropout` does, and evaluation mode draws nothing.

    Args:
        width: size of the result (B, width), even.
        embedding: "fourier" or "sinusoidal".
        embedding_scale: frequency scale of the embedding, > 0; 1 suits c_noise in about [−3, 3].
        classes: number of labels K ≥ 0; 0 for none. Index K is the null label.
        cond_dim: size of the condition vector ≥ 0; 0 for none.
        cond_dropout: p in [0, 1).

    Raises:
        ValueError: at construction for arguments out of range; in forward for a condition that the network was
            not built for, of the wrong shape, or (labels on the CPU, outside torch.compile) out of range.
    """

    def __init__(
        self,
        width: int,
        *,
        embedding: str = "fourier",
        embedding_scale: float = 1.0,
        classes: int = 0,
        cond_dim: int = 0,
        cond_dropout: float = 0.0,
    ):
        super().__init__()
        if embedding not in _EMBEDDINGS:
            raise ValueError(f"embedding is one of {', '.join(map(repr, _EMBEDDINGS))}; got {embedding!r}.")
        if not embedding_scale > 0:
            raise ValueError(f"embedding_scale is a frequency scale, > 0; got {embedding_scale}.")
        if classes < 0 or cond_dim < 0:
            raise ValueError(f"classes and cond_dim are counts, 0 for none; got {classes} and {cond_dim}.")
        if not 0 <= cond_dropout < 1:
            raise ValueError(f"cond_dropout is a probability in [0, 1); got {cond_dropout}.")
        if cond_dropout and not (classes or cond_dim):
            raise ValueError(f"cond_dropout={cond_dropout} has no condition to drop: set classes or cond_dim.")
        self.classes, self.cond_dim, self.cond_dropout = int(classes), int(cond_dim), float(cond_dropout)
        self.waves = _EMBEDDINGS[embedding](width, embedding_scale)
        self.inner, self.outer = linear(width, width), linear(width, width)
        if classes:
            self.label = nn.Embedding(classes + 1, width)
        if cond_dim:
            self.vector = linear(cond_dim, width)
            self.null_vector = nn.Parameter(torch.randn(width))

    def forward(self, c_noise: Tensor, cond: Cond, like: Tensor) -> Tensor:
        """The embedding (B, width) in the dtype of `like` (B, *)."""
        batch = like.shape[0]
        if c_noise.shape != (batch,):
            raise ValueError(f"c_noise has shape ({batch},), one number per sample; got {tuple(c_noise.shape)}.")
        h = self.inner(self.waves(c_noise).to(like.dtype))
        parts = self._parts(cond)
        keep = None
        if parts and self.training and self.cond_dropout:
            keep = torch.rand(batch, device=like.device) >= self.cond_dropout
        if self.classes:
            h = h + self.label(self._labels(parts.get("label"), keep, batch, like.device))
        if self.cond_dim:
            h = h + self._vectors(parts.get("vector"), keep, like)
        return F.silu(self.outer(F.silu(h)))

    def _parts(self, cond: Cond) -> dict[str, Tensor]:
        if cond is None:
            return {}
        names = ["label"] * bool(self.classes) + ["vector"] * bool(self.cond_dim)
        if not names:
            raise ValueError("This network is unconditional: leave cond out, or build it with classes or cond_dim.")
        if isinstance(cond, Tensor):
            if len(names) > 1:
                raise ValueError('This network has two conditions: pass cond={"label": …, "vector": …}.')
            return {names[0]: cond}
        unknown = sorted(set(cond) - set(names))
        if unknown:
            raise ValueError(f"This network's conditions are {names}; got also {unknown}.")
        return dict(cond)

    def _labels(self, label: Tensor | None, keep: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if label is None:
            return torch.full((batch,), self.classes, device=device)
        if label.shape != (batch,) or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(
                f"Labels are integers of shape ({batch},); got {label.dtype} of shape {tuple(label.shape)}."
            )
        # Reading a label on an accelerator waits for it; there the embedding's own device assertion guards.
        if not torch.compiler.is_compiling() and label.device.type == "cpu" and batch:
            low, high = int(label.min()), int(label.max())
            if low < 0 or high > self.classes:
                raise ValueError(
                    f"Labels are in 0 … {self.classes - 1}, or {self.classes} for none; got {low} to {high}."
                )
        label = label.long()
        return label if keep is None else torch.where(keep, label, self.classes)

    def _vectors(self, vector: Tensor | None, keep: Tensor | None, like: Tensor) -> Tensor:
        batch = like.shape[0]
        if vector is None:
            return self.null_vector.expand(batch, -1)
        if vector.shape != (batch, self.cond_dim) or not vector.is_floating_point():
            raise ValueError(
                f"The condition vector is floating-point of shape ({batch}, {self.cond_dim}); "
                f"got {vector.dtype} of shape {tuple(vector.shape)}."
            )
        h = self.vector(vector.to(like.dtype))
        return h if keep is None else torch.where(keep[:, None], h, self.null_vector.to(h.dtype))
