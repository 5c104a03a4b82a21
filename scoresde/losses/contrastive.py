r"""Contrastive learning of an embedder: which sentence of a batch belongs to which sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.conditions import Cond, named
from ..diffusion.sde import SDE
from ..noise.rng import Rng
from ..ops.broadcast import samples
from .loss import Loss, Terms


class Contrastive(nn.Module):
    """Embeddings of samples and of their sentences, in the place of a denoiser: what a run of its own trains, and what
    `codec=embeddings` and `codec=with_embedding` take.

    Args:
        network: with `image(x) -> (B, dim)`, `words(ids) -> (B, dim)` and `similarity` of these, as `nn.Embedder`.
        sde: whose t_min stands for the time, of which an embedder has none.
    """

    kind, draws, encodes = "an embedder", False, False  # see `Denoiser`

    def __init__(self, network: nn.Module, sde: SDE):
        super().__init__()
        self.network: Any = network
        self.sde = sde

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The similarity of x (B, *event) with each sentence of the batch, (B, B) nats.

        Raises:
            ValueError: there are none, one for each sample.
        """
        ids = named(cond).get("text")
        if ids is None or len(ids) != len(x):
            raise ValueError(f"An embedder is told a sentence of each of {len(x)} samples, cond['text'].")
        return self.network.similarity(self.network.image(x), self.network.words(ids))


class ContrastiveLoss(Loss):
    r"""Per-sample ½ (−log softmax_j s(x_i, c_j)_i − log softmax_j s(x_j, c_i)_i) in nats: the sentence c_i of a sample
    x_i among those of the batch, and the sample of the sentence (Radford et al. 2021, fig. 3).

    Its least mean is reached where s(x, c) = log p(x|c)/p(x) up to a constant, also where a sentence is of several
    samples in the batch, and log B − loss is a lower bound on the information I(x; c) (van den Oord et al. 2018, sec.
    2.3). With several processes each contrasts its own rows of a batch.

    Args:
        embedder: what is trained.
    """

    def __init__(self, embedder: Contrastive):
        super().__init__()
        self.denoiser = embedder

    def terms(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> Terms:
        """The terms of samples x0 (B, *event) with sentences cond["text"] (B, L); nothing is drawn."""
        loss, _ = self._answers(x0, cond)
        t = torch.full((len(loss),), self.denoiser.sde.t_min, dtype=torch.float64, device=loss.device)
        return Terms(loss, loss, t)

    def measured(self, x0: Tensor, cond: Cond = None, *, rng: Rng | None = None) -> dict[str, Tensor]:
        """What is reported of held-out samples, (B,) each: "loss"; "information", log B − loss in nats; and
        "retrieval", 1 where the likeliest sentence of the batch reads as the sample's own."""
        loss, logits = self._answers(x0, cond)
        ids = named(cond)["text"]
        right = (ids[logits.argmax(1)] == ids).all(1)
        return {"loss": loss, "information": math.log(len(loss)) - loss, "retrieval": right.to(loss.dtype)}

    def _answers(self, x0: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(loss, similarities)."""
        x0 = samples(x0, "x0")
        logits = self.denoiser(x0, None, cond)
        ways = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
        return -0.5 * ways, logits
