"""Everything that changes while training, and so everything that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..data import Dataset, EpochOrder
from ..loss import DenoisingLoss
from ..rng import Rng
from .checkpoint import Checkpoint, CheckpointError
from .ema import EMA


@dataclass(frozen=True)
class Averages:
    """What happened since the last look: means over the steps that were kept.

    Attributes:
        loss, grad_norm: means; NaN when no step was kept.
        skipped: steps left out since the start, because loss or gradient was not finite.
        streak: length of the row of skipped steps that ends at the last one, 0 if that was kept.
    """

    loss: float
    grad_norm: float
    skipped: int
    streak: int


class Training:
    """Weights, their average, the optimizer, the order of the data, the noise, and the counters.

    Args:
        loss: what is minimised; its denoiser's parameters are trained.
        optimizer: over `loss.parameters()`, fused: a step with a gradient that is not finite is then skipped on the
            device, without waiting for it.
        ema: an average of `loss`.
        dataset: encoded batch by batch.
        order: of its training samples.
        rng: dequantisation, times and noise.
        conditional: pass the labels of the data to the denoiser.

    Attributes:
        average: the averaged copy of `loss`, in eval mode.
        step, images: optimizer steps taken, images seen.

    Raises:
        ValueError: an optimizer that is not fused, or labels that are not there.
    """

    def __init__(
        self,
        loss: DenoisingLoss,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        dataset: Dataset,
        order: EpochOrder,
        rng: Rng,
        *,
        conditional: bool = False,
    ):
        if not optimizer.defaults.get("fused"):
            raise ValueError(
                "The trainer needs optimizer(fused=True): other ones cannot skip a bad step on the device."
            )
        if conditional and dataset.train.labels is None:
            raise ValueError(f"conditional=true needs labels, and data set {dataset.name!r} has none.")
        self.loss, self.optimizer, self.ema = loss, optimizer, ema
        self.dataset, self.order, self.rng, self.conditional = dataset, order, rng, conditional
        self.average = cast(DenoisingLoss, ema.module)
        self.names = [name for name, _ in loss.named_parameters()]
        self.device = next(loss.parameters()).device
        self.step, self.images = 0, 0
        # sums of loss and gradient norm, steps kept (since the last look); steps skipped, streak (since the start)
        self._stats = torch.zeros(5, dtype=torch.float64, device=self.device)

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """The next (x0 (B, *event), labels (B,) or None), on the device."""
        index = self.order.next()
        x0 = self.dataset.encode(self.dataset.train.raw[index], self.rng).to(self.device)
        return x0, self.dataset.train.cond(index, self.conditional, self.device)

    def note(self, loss: Tensor, grad_norm: Tensor, keep: Tensor) -> None:
        """Adds one step to the averages, on the device."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        kept, skipped = keep.double(), (~keep).double()
        mean = torch.stack([torch.where(keep, loss.double(), zero), torch.where(keep, grad_norm.double(), zero), kept])
        self._stats[:3] += mean
        self._stats[3] += skipped
        self._stats[4] = (self._stats[4] + 1) * skipped

    def averages(self, reset: bool = False) -> Averages:
        """The averages so far: the one place that waits for the device."""
        loss, norm, kept, skipped, streak = self._stats.tolist()
        if reset:
            self._stats[:3] = 0
        mean = (lambda total: total / kept) if kept else (lambda total: float("nan"))
        return Averages(mean(loss), mean(norm), int(skipped), int(streak))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensor groups of a checkpoint."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"{self.names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}
        random = {"noise": self.rng.state_dict()["streams"], "torch": torch.get_rng_state(), "stats": self._stats}
        if self.device.type == "cuda":  # dropout draws there
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "weights": self.loss.denoiser.state_dict(),
            "ema": self.average.denoiser.state_dict(),
            "optimizer": moments,
            "random": random,
        }

    def records(self) -> dict[str, Any]:
        """JSON records of a checkpoint."""
        return {"counters": {"step": self.step, "images": self.images}, "order": self.order.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues where `checkpoint` was written: everything that follows is as if there had been no stop.

        Raises:
            CheckpointError: it belongs to another network, optimizer or data set.
        """
        try:
            self.loss.denoiser.load_state_dict(checkpoint.tensors["weights"])
            self.average.denoiser.load_state_dict(checkpoint.tensors["ema"])
            self._restore_optimizer(checkpoint.tensors["optimizer"])
            random = checkpoint.tensors["random"]
            self.rng.load_state_dict({"streams": random["noise"]})
            self.order.load_state_dict(checkpoint.records["order"])
            self._stats.copy_(random["stats"])
            counters = checkpoint.records["counters"]
            self.step, self.images = int(counters["step"]), int(counters["images"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
        torch.set_rng_state(random["torch"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def _restore_optimizer(self, moments: Mapping[str, Tensor]) -> None:
        index = {name: i for i, name in enumerate(self.names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            state.setdefault(index[name], {})[kind] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
