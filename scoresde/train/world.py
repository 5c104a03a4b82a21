"""The processes that train together: who is who, sums over all, and what one of them does for the others."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import positive

Result = TypeVar("Result")


class ProcessLost(RuntimeError):
    """Another process of this run ended or went silent; its own output says why."""


class World:
    """Who trains. Every process has to make the same calls in the same order. What is written here serves one process.

    Attributes:
        rank, size: this process and how many there are.
    """

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, on its device, without waiting for that device."""
        return x

    def agree(self, code: int) -> int:
        """The largest `code` that any process gave at the *previous* call: the same answer for all, and no wait.

        One process has its own answer at once.
        """
        return code

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        return [value]

    def leader(self, task: Callable[[], Result]) -> Result:
        """What `task` returns on rank 0, sent to all; what it raises there is raised everywhere."""
        return task()

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Around what exchanges tensors by other means: a lost process is a `ProcessLost` there too."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Leaves the others, in good order."""


class Alone(World):
    """One process."""


class Processes(World):
    """The processes that `torchrun` started, through torch.distributed.

    A process that dies closes its connections: with gloo the others know at once, with NCCL after `timeout`.

    Args:
        device: where tensors to be summed live: NCCL for CUDA, gloo for the CPU.
        timeout: seconds > 0 that a sum may take before the run is given up.
    """

    # rank 0 may measure and draw for as long as it takes; one that dies is noticed by its closed connection
    _PATIENCE = datetime.timedelta(days=7)

    def __init__(self, device: torch.device, timeout: float = 600.0):
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            limit = datetime.timedelta(seconds=timeout)
            store, rank, size = next(dist.rendezvous("env://", timeout=limit))
            # torchrun keeps its store when it starts all again, and the addresses of the dead in it
            # (github.com/pytorch/pytorch/issues/135712); only on one node is this count the same for all
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # objects go by the CPU, on connections of their own, so that they wait for no kernel and hold up no sum
        self._objects = dist.new_group(backend="gloo", timeout=self._PATIENCE)
        self._code = torch.zeros((), dtype=torch.int64, device="cpu")
        self._pending: dist.Work | None = None

    def sum(self, x: Tensor) -> Tensor:
        with self._exchange():
            dist.all_reduce(x)
        return x

    def agree(self, code: int) -> int:
        with self._exchange():
            if self._pending is not None:
                self._pending.wait()
            agreed = int(self._code)
            self._code = torch.tensor(code, device="cpu")
            self._pending = dist.all_reduce(self._code, dist.ReduceOp.MAX, group=self._objects, async_op=True)
        return agreed

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value, group=self._objects)
        return values

    def leader(self, task: Callable[[], Result]) -> Result:
        sent: list[Any] = [None, None]
        if self.rank == 0:
            try:
                sent[0] = task()
            except BaseException as error:
                with self._exchange():
                    dist.broadcast_object_list([None, _portable(error)], src=0, group=self._objects)
                raise
        with self._exchange():
            dist.broadcast_object_list(sent, src=0, group=self._objects)
        if sent[1] is not None:
            raise sent[1]
        return sent[0]

    def watch(self) -> contextlib.AbstractContextManager[None]:
        return self._exchange(alone=False)

    def close(self) -> None:
        if self._pending is not None:
            with self._exchange():
                self._pending.wait()
            self._pending = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _exchange(self, alone: bool = True) -> Iterator[None]:
        """Turns the errors of a broken connection into `ProcessLost`: all there are, or where other things happen in
        here (`alone` is False) those of the backends; gloo has no class of its own.
        """
        try:
            yield
        except RuntimeError as error:
            if not (alone or isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
                raise
            cause = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ProcessLost(
                f"Rank {self.rank} of {self.size} on {socket.gethostname()} lost another process: {cause}. The output "
                "of the one that ended first says why; the last checkpoint is whole, and resume=auto continues from it "
                "with any number of processes."
            ) from error


def join(device: torch.device, timeout: float = 600.0) -> World:
    """`Processes` where `torchrun` started more than one, else `Alone`.

    Raises:
        ValueError: a timeout that is no positive number of seconds.
    """
    timeout = positive(timeout, "timeout", "a number of seconds")
    return Processes(device, timeout) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def _portable(error: BaseException) -> BaseException:
    """`error`, or a RuntimeError that names it where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")
    return error
