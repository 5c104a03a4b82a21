"""The rows of the batches that come next, read ahead by other processes where that is asked for."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .order import EpochOrder
from .rows import Rows


class Loader:
    """The samples of a process's rows of each batch of an order, in torch's `DataLoader` where they lie in files.

    What is read ahead is of a copy of the order: the position of `order` is that of the batches that were taken, so it
    can be saved at any time, and moved: what was read ahead of another position is then left.

    Workers are started by a server of their own (`forkserver`): a fork of a process with threads, CUDA, a lock on the
    run folder and handlers of signals would take all of these along. They hear no signal that asks the run to end,
    which a scheduler sends to every process, and end with the run: within 5 s if it is killed.

    Args:
        raw: the samples; a tensor is read where it is, without workers.
        order: of all processes together.
        rank, size: this process, and how many there are.
        workers: processes that read ahead, ≥ 0; 0 reads when it is asked.
    """

    def __init__(self, raw: Tensor | Rows, order: EpochOrder, *, rank: int = 0, size: int = 1, workers: int = 0):
        self.raw, self.order, self.rank, self.size, self.workers = raw, order, rank, size, workers
        self._ahead: Iterator[tuple[Tensor, Any]] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """The next indices of this process, (n,) int64, and their samples.

        Raises:
            DataChanged: a file is not what it was when it was opened.
            RuntimeError: a worker ended.
            ValueError: a sample that cannot be read.
        """
        raw, place = self.raw, self.order.state_dict()
        index = _share(self.order, self.rank, self.size)
        if isinstance(raw, Tensor):
            index = index.to(raw.device)
            return index, raw[index]
        if self._ahead is None:
            self._ahead = self._start(raw, place)
        try:
            read, found = next(self._ahead)
            if not torch.equal(read, index):  # the order was moved, to where a checkpoint was written, say
                self.close()
                self._ahead = self._start(raw, place)
                read, found = next(self._ahead)
        except RuntimeError as error:
            raise RuntimeError(f"A process that reads data ahead has ended: {error}") from error
        if isinstance(found, Exception):
            raise found
        return index, found

    def close(self) -> None:
        """Ends the workers; the next batch starts others."""
        self._ahead = None
        _end(self._processes)

    def _start(self, raw: Rows, place: dict[str, int]) -> Iterator[tuple[Tensor, Any]]:
        ahead = copy.copy(self.order)
        ahead.load_state_dict(place)
        context = None
        if self.workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        loader: DataLoader[Any] = DataLoader(
            _Reads(raw),  # type: ignore[arg-type]  # it has what is asked of a data set
            batch_size=None,
            sampler=_Ahead(ahead, self.rank, self.size),
            num_workers=self.workers,
            multiprocessing_context=context,
            worker_init_fn=_quiet,
            generator=torch.Generator(),  # or it would draw from torch's own, as dropout does
        )
        before = multiprocessing.active_children()
        ahead_of_us = iter(loader)
        self._processes += [child for child in multiprocessing.active_children() if child not in before]
        atexit.register(_end, self._processes)  # before multiprocessing waits for them
        return ahead_of_us


def _share(order: EpochOrder, rank: int, size: int) -> Tensor:
    return order.next().chunk(size)[rank]


class _Ahead:
    """The shares of one process of all batches to come, as the sampler of a `DataLoader`."""

    def __init__(self, order: EpochOrder, rank: int, size: int):
        self.order, self.rank, self.size = order, rank, size

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield _share(self.order, self.rank, self.size)


class _Reads:
    """index -> (index, the samples or the error of reading them), which comes through as it was raised."""

    def __init__(self, raw: Rows):
        self.raw = raw

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | Exception]:
        try:
            return index, self.raw[index]
        except Exception as error:
            return index, error


def _end(processes: list[multiprocessing.process.BaseProcess]) -> None:
    """Ends those that have not ended on request, which hear no other signal."""
    while processes:
        process = processes.pop()
        process.kill()
        process.join()


def _quiet(worker: int) -> None:
    """Leaves the signals that ask the run to end to the run."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
