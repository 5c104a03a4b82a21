"""The state of training: everything that changes, and so everything that a checkpoint holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import Augmentation, Dataset, EpochOrder, Loader
from ..data.dataset import drawn
from ..data.rows import Rows
from ..diffusion.conditions import Cond, named, unnamed
from ..losses.loss import Loss, Terms
from ..noise.rng import Rng
from ..runs.checkpoint import Checkpoint, CheckpointError, best
from ..runs.posthoc import write_snapshot
from .buffers import Buffers
from .ema import Average
from .parallel import Parallel, Single
from .scale import LossScale
from .slices import gathered, load, sliced_like
from .tally import Tally
from .world import Alone, World

# What training does between steps, besides; `TrainingState.marks` has these names.
ACTIONS = ("log", "evaluate", "sample", "snapshot", "checkpoint")
_log = logging.getLogger(__name__)


class TrainingState:
    """Weights, their average, the optimizer, the order of the data, the noise, and the counters.

    With several processes each takes its rows of every batch and of every draw, so what is learned does not depend on
    their number beyond round-off.

    Args:
        loss: the objective; its parameters are trained.
        optimizer: over `loss.parameters()`, fused: a step with a gradient that is not finite is then skipped on the
            device, without waiting for it.
        ema: an average of `loss`.
        dataset: encoded batch by batch; its training samples move to the device if they fill less than a quarter of
            its free memory.
        order: of its training samples.
        rng: dequantisation, times and noise.
        conditional: pass the conditions of the data to the denoiser.
        world: the processes that train together.
        parallel: how the network is spread over them; made before the optimizer.
        loss_scale: first value of the loss scale, for float16; None for none.
        augment: what is done to training samples whenever one is seen; None for nothing.
        workers: processes that read samples ahead which stay in files, ≥ 0.

    Attributes:
        average: the averaged copy of `loss`, in eval mode; where `loss` is sliced, a whole copy made by `refresh`.
        names, parameters: of the loss, in one order.
        step, images: optimizer steps taken, images seen.
        marks: action -> images seen when it was last done.

    Raises:
        ValueError: an optimizer that is not fused, a learning rate that is not finite, labels that are not there, or
            batches that cannot be divided.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        ema: Average,
        dataset: Dataset,
        order: EpochOrder,
        rng: Rng,
        *,
        conditional: bool = False,
        world: World | None = None,
        parallel: Parallel | None = None,
        loss_scale: float | None = None,
        augment: Augmentation | None = None,
        workers: int = 0,
    ):
        self.world = Alone() if world is None else world
        if not optimizer.defaults.get("fused"):
            raise ValueError("The trainer needs optimizer(fused=True): others cannot skip a bad step on the device.")
        for group in optimizer.param_groups:
            for name in ("lr", "eps", "weight_decay"):
                if not 0 <= group.get(name, 0) < math.inf:
                    raise ValueError(f"{name} is a finite number of at least 0; got {group[name]}.")
        if conditional and dataset.train.labels is None and not dataset.train.conditions:
            raise ValueError(f"conditional=true needs labels or other conditions; data set {dataset.name!r} has none.")
        if order.batch_size % self.world.size or (self.world.size > 1 and not order.drop_last):
            raise ValueError(
                f"trainer.batch_size={order.batch_size} is of all {self.world.size} processes together and has to be a "
                "multiple of their number, with drop_last=True."
            )
        if conditional and dataset.unseen and self.world.rank == 0:
            said = "%s: no training sample has class %s; it is drawn only when asked for."
            _log.warning(said, dataset.name, dataset.unseen)
        if augment is not None:
            augment.check(dataset.train, conditional)
        self.augment = augment
        self.loss, self.optimizer, self.ema = loss, optimizer, ema
        self.parallel = Single(loss) if parallel is None else parallel
        self.dataset, self.order, self.conditional = dataset, order, conditional
        self.rng = rng.share(self.world.rank, self.world.size)
        self.average = cast(Loss, ema.module)
        # listed once: walking through a module costs as much as an optimizer step of a small one
        named = dict(loss.named_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self.device, self.buffers = self.parameters[0].device, Buffers(loss)
        # an augmentation is of samples, so what is stored of them is of no use then
        moments = None if augment is not None else dataset.moments
        self.stored = moments is not None
        train = dataset.train if moments is None else replace(dataset.train, raw=moments)
        self.train = train.to(self.device) if _fits(train.raw, self.device) else train
        self.loader = Loader(self.train.raw, order, rank=self.world.rank, size=self.world.size, workers=workers)
        self.scale = LossScale(loss_scale, self.device)
        self.tally = Tally(self.device, loss.denoiser.sde, self.names, self.world)
        self.step, self.images = 0, 0
        self.marks: dict[str, int] = {}

    def batch(self) -> tuple[Tensor, Cond]:
        """This process's rows of the next batch: x0 (B/size, *event) and its condition, on the device."""
        index, raw = self.loader.next()
        told = dict[str, Tensor]()
        if self.augment is not None:
            raw, told = self.augment(raw, self.rng)
        cond = self.train.cond(index, self.conditional, self.device)
        if self.stored:
            x0 = self.dataset.codec.redraw.transform(raw, rng=self.rng).to(self.device)
        else:
            x0, cond = drawn(self.dataset.codec, raw, cond, self.rng, self.device)
        return x0, unnamed(named(cond) | {name: value.to(self.device) for name, value in told.items()})

    def terms(self) -> Terms:
        """The terms of the loss on the next batch."""
        x0, cond = self.batch()
        return self.parallel.terms(x0, cond, rng=self.rng)

    def refresh(self) -> None:
        """Brings `average` up to date. Every process calls it."""
        self.average = self.parallel.view(cast(Loss, self.ema.module))

    def snapshot(self, folder: Path) -> None:
        """Writes the averages to `folder`, from which others can be made later. Every process calls it.

        Raises:
            ValueError: averages that are not `PowerEMA`.
        """
        averages = {name: self.parallel.view(cast(Loss, m)).denoiser for name, m in self.ema.shadows.items()}
        if self.world.rank == 0:
            write_snapshot(folder, averages, self.images, self.ema.sigma_rel)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensor groups of a checkpoint, on the CPU and detached from what goes on. Every process calls it."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"{self.names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}
        groups: dict[str, Mapping[str, Tensor]] = {"optimizer": moments}
        for name, module in self._modules().items():
            groups |= _split(name, module)
        noise = self.rng.state_dict()
        random = {"noise": noise["streams"], "noise_version": noise["version"], "stats": self.tally.state()}
        random |= self.scale.state_dict()
        random["torch"] = torch.stack(self.world.gather(torch.get_rng_state()))
        if self.device.type == "cuda":  # dropout draws there
            random["cuda"] = torch.stack(self.world.gather(torch.cuda.get_rng_state(self.device)))
        groups["random"] = random
        # clones, so that a file can be written while training goes on
        return {
            name: {key: gathered(value.detach()).to("cpu", copy=True) for key, value in group.items()}
            for name, group in groups.items()
        }

    def records(self) -> dict[str, Any]:
        """JSON records of a checkpoint."""
        counters = {"step": self.step, "images": self.images, "marks": dict(self.marks)}
        return {"counters": counters, "order": self.order.state_dict(), "data": self.dataset.statistics.digests}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues where `checkpoint` was written, as if there had been no stop.

        With another number of processes only dropout draws other numbers.

        Raises:
            CheckpointError: it belongs to another network, optimizer or data set.
        """
        cure = "To resume, put the file back as it was; or train on what it holds now in another folder: out=…."
        try:
            self.dataset.check_unaltered(checkpoint.records.get("data") or {}, "the run", cure)
            for name, module in self._modules().items():
                load(module, _joined(name, checkpoint.tensors))
            self._restore_optimizer(checkpoint.tensors["optimizer"])
            random = checkpoint.tensors["random"]
            version = {"version": random["noise_version"]} if "noise_version" in random else {}
            if random["noise"].dtype == torch.uint8:
                _log.warning("The checkpoint has the generator of a release before 0.1: the noise begins anew.")
            else:
                self.rng.load_state_dict({"streams": random["noise"], **version})
            self.scale.load_state_dict(random)
            self.order.load_state_dict(checkpoint.records["order"])
            self.tally.load(random["stats"])
            counters = checkpoint.records["counters"]
            self.step, self.images = int(counters["step"]), int(counters["images"])
            # a checkpoint of format 0 has no marks: it was written after everything that was due
            marks = counters.get("marks", dict.fromkeys(ACTIONS, self.images))
            self.marks = {name: int(value) for name, value in marks.items()}
            self._restore_generators(random)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error

    def take_best(self, folder: Path, score: float | None) -> float | None:
        """Takes the averages of the checkpoint in `folder` whose score is the lowest, if it is lower than the present
        one. Every process calls it. Returns the score of what is there then.
        """
        found = best(folder)
        if found is None or found.score is None or (score is not None and score <= found.score):
            return score
        if self.world.rank == 0:
            _log.info("The average is that of step %d, which was the best on held-out data.", found.step)
        for name, module in self.ema.shadows.items():
            load(module, _joined(name, found.tensors))
        return found.score

    def _modules(self) -> dict[str, nn.Module]:
        return {"weights": self.loss, **self.ema.shadows}

    def _restore_generators(self, random: Mapping[str, Tensor]) -> None:
        states = random["torch"].reshape(-1, random["torch"].shape[-1])
        if len(states) != self.world.size:
            _log.warning("Written by %d processes, continued by %d: dropout draws anew.", len(states), self.world.size)
            torch.manual_seed(self.step * self.world.size + self.world.rank)
            return
        torch.set_rng_state(states[self.world.rank].clone())
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"].reshape(len(states), -1)[self.world.rank].clone(), self.device)

    def _restore_optimizer(self, moments: Mapping[str, Tensor]) -> None:
        index = {name: i for i, name in enumerate(self.names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            like = sliced_like(value, self.parameters[index[name]]) if value.ndim else value
            # a copy, or the optimizer would go on in the checkpoint
            state.setdefault(index[name], {})[kind] = like.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _split(name: str, loss: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The state of a loss in groups: that of its denoiser as `name`, the rest as `name-loss`."""
    state = loss.state_dict()
    own = {key: value for key, value in state.items() if not key.startswith("denoiser.")}
    inner = {k.removeprefix("denoiser."): v for k, v in state.items() if k not in own}
    return {name: inner, f"{name}-loss": own} if own else {name: inner}


def _joined(name: str, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"denoiser.{key}": value for key, value in groups[name].items()} | dict(groups.get(f"{name}-loss", {}))


def _fits(raw: Tensor | Rows, device: torch.device) -> bool:
    if device.type != "cuda" or not isinstance(raw, Tensor):
        return False
    return raw.numel() * raw.element_size() < torch.cuda.mem_get_info(device)[0] // 4
