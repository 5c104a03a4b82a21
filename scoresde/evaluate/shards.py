"""Long jobs in batches that processes share out: each batch is a file, and all are merged in order.

Rank i mod world makes batch i on its own. Processes do not wait for each other, so an adaptive solver that takes longer
on one rank delays no other. A batch is published whole, so a process that was killed goes on when the same command is
repeated. Rank 0 waits for all files and merges them in order: the result depends on the batch size at most by
round-off, and not on the number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..runs.posthoc import digest
from ..runs.progress import track
from ..runs.publish import content_of, publish

Tensors = dict[str, Tensor]
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job(Generic[Result]):
    """Work that consists of independent batches.

    Attributes:
        name: for the progress bar and the folder of its batches.
        count: number of batches.
        ticks: how often `batch` yields.
        batch: i -> iterator over the work on batch i. It yields empty dicts as it goes on, and at last the tensors.
        merge: all batches, in order -> the result.
        settings: everything that the batches depend on, as JSON: seeds, points, batch size …
    """

    name: str
    count: int
    ticks: int
    batch: Callable[[int], Iterator[Tensors]]
    merge: Callable[[list[Tensors]], Result]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the batches depend on."""
        return _digest([self.name, self.count, self.settings])

    def work(self, indices: Sequence[int], done: Callable[[int, Tensors], object], *, show: bool = True) -> None:
        """Makes the batches `indices`, with a bar; `done` takes the index and the tensors of each, timed."""

        def steps() -> Iterator[Tensors]:
            for index in indices:
                start, made = time.monotonic(), Tensors()
                for made in self.batch(index):
                    yield made
                seconds = torch.tensor(time.monotonic() - start, dtype=torch.float64)
                done(index, {**made, "seconds": seconds})

        for _ in track(steps(), self.name, self.ticks * len(indices), show=show):
            pass

    def run(self) -> Result:
        """The result of all batches, made here and now."""
        made: dict[int, Tensors] = {}
        self.work(range(self.count), made.__setitem__)
        return self.merge(list(made.values()))


class ShardError(RuntimeError):
    """Another rank has not delivered its batches."""


class Shards:
    """One process's share of jobs whose batches are kept in a folder.

        shards = Shards(folder, {"model": "mine, step 1000"}, *ranks())
        shards.work(job)
        if shards.rank == 0:
            result = shards.result(job)
            shards.clear()

    Args:
        folder: shared by all ranks and used by nothing else; made with the first batch.
        settings: what all batches depend on besides the settings of their jobs, as JSON: the model, the sampler.
        rank, world: this process and the number of processes, 0 ≤ rank < world.
        timeout: seconds > 0 without a new batch after which `result` gives up a rank: more than a batch takes.

    Raises:
        ValueError: an argument outside these, or a folder with batches of other settings: says which.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        timeout: float = 1800.0,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank is one of 0 … world − 1; got rank={rank} of world={world}.")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout is a number of seconds > 0; got {timeout!r}.")
        self.folder, self.rank, self.world, self.timeout = Path(folder), rank, world, float(timeout)
        self.settings = json.loads(json.dumps(settings or {}))
        self._digest = _digest(self.settings)
        self._agree()

    def _agree(self) -> None:
        path = self.folder / "settings.json"
        try:
            found = json.loads(content_of(path))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged, so what the batches beside it were made with is unknown. Remove {self.folder}, "
                "and the same command begins anew."
            ) from error
        for key, there, here in _differences(found, self.settings):
            raise ValueError(
                f"{self.folder} holds batches made with {key}={there}, and this asks for {key}={here}; they are not "
                "mixed. The command that made them goes on from them; for another, choose another folder or delete it."
            )

    def work(self, job: Job[Any]) -> None:
        """Makes the batches of this rank that are missing. Does not wait for other ranks."""
        own = range(self.rank, job.count, self.world)
        todo = [index for index in own if self._load(job, index) is None]
        for path in filter(Path.exists, (self._file(job, index)[0] for index in todo)):
            _log.warning("%s is damaged or was made with other settings, and is made again", path)
        if self.rank == 0 and 0 < len(todo) < len(own):
            there = f"{len(own) - len(todo)} of {len(own)} batches are there already"
            _log.info("%s: %s, in %s", job.name, there, self.folder / job.name)
        job.work(todo, lambda index, made: self._save(job, index, made), show=self.rank == 0)

    def result(self, job: Job[Result]) -> Result:
        """The merged batches of all ranks: makes what is missing of this rank's own, and waits for the others.

        Raises:
            ShardError: a rank delivered nothing for `timeout` seconds; it is named, with what it owes.
        """
        self.work(job)
        label = f"{job.name}, all ranks"
        batches = dict(track(self._arrivals(job), label, job.count, show=self.rank == 0 and self.world > 1))
        return job.merge([batches[index] for index in range(job.count)])

    def _arrivals(self, job: Job[Any]) -> Iterator[tuple[int, Tensors]]:
        """(index, batch) in the order in which the files appear."""
        waiting, heard = set(range(job.count)), [time.monotonic()] * self.world
        while waiting:
            for index in sorted(waiting):
                batch = self._load(job, index)
                if batch is not None:
                    waiting.remove(index)
                    heard[index % self.world] = time.monotonic()
                    yield index, batch
            late = [index for index in sorted(waiting) if time.monotonic() - heard[index % self.world] > self.timeout]
            if late:
                owed = "; ".join(
                    f"rank {rank} owes batches {', '.join(str(index) for index in late if index % self.world == rank)}"
                    for rank in sorted({index % self.world for index in late})
                )
                raise ShardError(
                    f"{job.name}: of {self.world} ranks, {owed}, and wrote nothing to {self.folder} for "
                    f"{self.timeout:g} s. See how that ended, and repeat the command: what is done stays done, and any "
                    "number of ranks may go on with it. Where a batch takes longer than that, give a longer timeout."
                )
            if waiting:
                time.sleep(min(0.5, self.timeout / 10))

    def clear(self) -> None:
        """Removes the folder, once the results are written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, job: Job[Any], index: int) -> tuple[Path, dict[str, str]]:
        """The file of a batch, and its metadata."""
        stamp = {"settings": self._digest, "job": job.digest, "batch": str(index)}
        return self.folder / job.name / f"{index:06d}.safetensors", stamp

    def _save(self, job: Job[Any], index: int, batch: Tensors) -> None:
        from safetensors.torch import save

        path, stamp = self._file(job, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():
            publish(self.folder / "settings.json", json.dumps(self.settings, indent=1))
        self._agree()
        # copies, because safetensors refuses tensors that share memory
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in batch.items()}
        publish(path, save(tensors, {**stamp, "sha256": digest(tensors, stamp)}))

    def _load(self, job: Job[Any], index: int) -> Tensors | None:
        from safetensors import SafetensorError, safe_open

        path, stamp = self._file(job, index)
        if not path.is_file():  # a pipe would keep us waiting
            return None
        try:
            with safe_open(path, "pt") as file:
                # copies, because what is read is mapped from the file, which `clear` removes
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                whole = file.metadata() == {**stamp, "sha256": digest(found, stamp)}
        except (OSError, SafetensorError):
            return None
        return found if whole else None


def ranks() -> tuple[int, int]:
    """(rank, world) of this process: RANK and WORLD_SIZE as `torchrun` sets them, (0, 1) without.

    Raises:
        ValueError: they are not whole numbers.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return int(rank), int(world)
    except ValueError as error:
        raise ValueError(
            f"RANK and WORLD_SIZE are whole numbers, as torchrun sets them; got {rank}, {world}."
        ) from error


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of the leaves where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b
