"""A network of diffusers as it is, for those that no network of ours equals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.conditions import Cond, named
from ..diffusion.table import TableSDE
from .schedules import alpha_bar

KINDS = ("UNet2DModel", "DiTTransformer2DModel")


class DiffusersModel(nn.Module):
    """F(x, c_noise, cond) by a network of the package diffusers, without weights yet.

    Args:
        kind: its class there, one of `KINDS`.
        config: its `config.json`.
        event_shape: (C, H, W); of what the network says the first C channels count, and with `outputs` 2 the second.
        classes: number of labels, 0 for none. A DiT has one more, which says nothing.
        outputs: 2 keeps the variance that it has learned.
        cond_dropout: how often the network was told nothing in training, 0 for never; kept for who asks.

    Raises:
        ImportError: diffusers is missing.
        ValueError: another class.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        event_shape: Sequence[int],
        classes: int = 0,
        outputs: int = 1,
        cond_dropout: float = 0.0,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"A network of diffusers is one of {', '.join(KINDS)}; got {kind!r}.")
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                f"This {kind} is none of ours, so diffusers runs it: pip install diffusers ({error})."
            ) from error
        self.inner = getattr(diffusers, kind).from_config(dict(config))
        self.event_shape, self.outputs = tuple(event_shape), outputs
        self.classes, self.always = classes, kind == "UNet2DModel"

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, outputs · C, H, W) at x (B, C, H, W), time steps c_noise (B,) and labels (B,)."""
        label = named(cond).get("label")
        if self.classes and label is None:
            if self.always:
                raise ValueError("This network was never told nothing: it needs a label of each sample.")
            label = torch.full((len(x),), self.classes, dtype=torch.int64, device=x.device)
        told = {"class_labels": label} if self.classes else {}
        found: Tensor = self.inner(x, timestep=c_noise, **told).sample
        return found[:, : self.outputs * self.event_shape[0]]

    def null(self, cond: Cond) -> Cond:
        """The label that says nothing; None where there is none."""
        return None if self.always or cond is None else torch.tensor([self.classes], dtype=torch.int64, device="cpu")


def beta_table(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> TableSDE:
    """The process of a table of betas as diffusers keeps it, in float32; see `schedules.alpha_bar`."""
    return TableSDE(alpha_bar(dict(locals()), num_train_timesteps))
