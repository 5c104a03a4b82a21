"""The rows of the batches that come next, read ahead by other processes where that is asked for."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .order import EpochOrder
from .rows import DataLost, Rows


class Loader:
    """The samples of a process's rows of each batch of an order, in torch's `DataLoader` where they lie in files.

    What is read ahead is of a copy of the order: the position of `order` is that of the batches that were taken, so it
    can be saved at any time, and moved: what was read ahead of another position is then left.

    Workers are started by a server of their own (`forkserver`): a fork of a process with threads, CUDA, a lock on the
    run folder and handlers of signals would take all of these along. They hear no signal that asks the run to end,
    which a scheduler sends to every process, and end with the run, also if it is killed.

    Args:
        raw: the samples; a tensor is read where it is, without workers.
        order: of all processes together.
        rank, size: this process, and how many there are.
        workers: processes that read ahead, ≥ 0; 0 reads when it is asked.
    """

    def __init__(self, raw: Tensor | Rows, order: EpochOrder, *, rank: int = 0, size: int = 1, workers: int = 0):
        self.raw, self.order, self.rank, self.size, self.workers = raw, order, rank, size, workers
        self._ahead: Iterator[tuple[np.ndarray, Any]] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """The next indices of this process, (n,) int64, and their samples.

        Raises:
            DataLost: a sample can no longer be read, or a worker has ended.
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
            if not np.array_equal(read, index):  # the order was moved, to where a checkpoint was written, say
                self.close()
                self._ahead = self._start(raw, place)
                read, found = next(self._ahead)
        except (RuntimeError, OSError, EOFError) as error:
            ended = (
                f"A process that reads samples ahead has ended: {error}. What ended it (memory?) is in the system's log"
            )
            raise DataLost(f"{ended}; resume=auto goes on from the last checkpoint.") from error
        if isinstance(found, Exception):
            raise found
        return index, torch.from_numpy(found)

    def close(self) -> None:
        """Ends the workers; the next batch starts others."""
        self._ahead = None
        _end(self._processes)

    def _start(self, raw: Rows, place: dict[str, int]) -> Iterator[tuple[np.ndarray, Any]]:
        ahead = copy.copy(self.order)
        ahead.load_state_dict(place)
        context = None
        if self.workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        loader: DataLoader[Any] = DataLoader(
            _Reads(raw),  # type: ignore[arg-type]  # it has what is asked of a data set
            batch_size=None,
            collate_fn=tuple,  # as it is
            sampler=_Ahead(ahead, self.rank, self.size),
            num_workers=self.workers,
            multiprocessing_context=context,
            worker_init_fn=_attend,
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
    """index -> (index, the samples or the error of reading them, which comes through as it was raised).

    As arrays, which go through a pipe: tensors would take shared memory, of which containers have little.
    """

    def __init__(self, raw: Rows):
        self.raw = raw

    def __getitem__(self, index: Tensor) -> tuple[np.ndarray, np.ndarray | Exception]:
        try:
            return index.numpy(), self.raw[index].numpy()
        except Exception as error:
            return index.numpy(), error


def _end(processes: list[multiprocessing.process.BaseProcess]) -> None:
    """Ends those that have not ended on request, which hear no other signal."""
    while processes:
        process = processes.pop()
        process.kill()
        process.join()


def _attend(worker: int) -> None:
    """Leaves the signals that ask the run to end to the run, and ends this process when the run has ended."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # torch looks who its parent is, which a worker that begins when the run was just killed no longer sees
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
