"""The processes that train together: who is who, sums over all, and what one of them does for the others."""

from __future__ import annotations

import abc
import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class ProcessLost(RuntimeError):
    """Another process of this run ended or went silent; its own output says why."""


class World(abc.ABC):
    """Who trains. Every process has to make the same calls in the same order.

    Attributes:
        rank, size: this process and how many there are.
    """

    rank: int
    size: int

    @abc.abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, on its device, without waiting for that device."""

    @abc.abstractmethod
    def agree(self, code: int) -> int:
        """The largest `code` that any process gave at the *previous* call: the same answer for all, and no wait."""

    @abc.abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""

    @abc.abstractmethod
    def leader(self, task: Callable[[], Result]) -> Result:
        """What `task` returns on rank 0, told to all; what it raises there is raised everywhere."""

    @abc.abstractmethod
    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Around what exchanges tensors by other means: a lost process is a `ProcessLost` there too."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leaves the others, in good order."""


class Alone(World):
    """One process."""

    rank, size = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def agree(self, code: int) -> int:
        return code

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def leader(self, task: Callable[[], Result]) -> Result:
        return task()

    def watch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        pass


class Processes(World):
    """The processes that `torchrun` started, through torch.distributed.

    A process that dies closes its connections: with gloo the others know at once, with NCCL after `timeout`.

    Args:
        device: where tensors to be summed live: NCCL for CUDA, gloo for the CPU.
        timeout: seconds > 0 that a sum may take before the run is given up.

    Raises:
        ValueError: a timeout that is not positive.
    """

    # rank 0 may measure and draw for as long as it takes; one that dies is noticed by its closed connection
    _PATIENCE = datetime.timedelta(days=7)

    def __init__(self, device: torch.device, timeout: float = 600.0):
        import torch.distributed as dist

        self.timeout = float(timeout)
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
        # words go by the CPU, on connections of their own, so that they wait for no kernel and hold up no sum
        self._words = dist.new_group(backend="gloo", timeout=self._PATIENCE)
        self._code, self._pending = torch.zeros((), dtype=torch.int64), None

    def sum(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        with _losing(self):
            dist.all_reduce(x)
        return x

    def agree(self, code: int) -> int:
        import torch.distributed as dist

        with _losing(self):
            if self._pending is not None:
                self._pending.wait()
            agreed = int(self._code)
            self._code = torch.tensor(code)
            self._pending = dist.all_reduce(self._code, dist.ReduceOp.MAX, group=self._words, async_op=True)
        return agreed

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _losing(self):
            dist.all_gather_object(values, value, group=self._words)
        return values

    def leader(self, task: Callable[[], Result]) -> Result:
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = task()
            except BaseException as error:
                with _losing(self):
                    dist.broadcast_object_list([None, _portable(error)], src=0, group=self._words)
                raise
        with _losing(self):
            dist.broadcast_object_list(told, src=0, group=self._words)
        if told[1] is not None:
            raise told[1]
        return told[0]

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        import torch.distributed as dist

        try:
            yield
        except dist.DistBackendError as error:
            raise lost(self, error) from error
        except RuntimeError as error:
            if "gloo" in str(error):  # which has no error of its own
                raise lost(self, error) from error
            raise

    def close(self) -> None:
        import torch.distributed as dist

        if self._pending is not None:
            with _losing(self):
                self._pending.wait()
            self._pending = None
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device: torch.device, timeout: float = 600.0) -> World:
    """`Processes` where `torchrun` started more than one, else `Alone`.

    Raises:
        ValueError: a timeout that is no positive number of seconds.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout is a number of seconds > 0; got {timeout!r}.")
    return Processes(device, timeout) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def _portable(error: BaseException) -> BaseException:
    """An error of the same kind and text; what cannot be sent becomes a RuntimeError that names it."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _losing(world: World) -> Iterator[None]:
    """Turns the errors of a broken connection into `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        raise lost(world, error) from error


def lost(world: World, error: BaseException) -> ProcessLost:
    """The same failure of a collective in words that say what to do."""
    return ProcessLost(
        f"Rank {world.rank} of {world.size} on {socket.gethostname()} lost another process: {_first(error)}. "
        "The output of the one that ended first says why; the last checkpoint is whole, and resume=auto continues "
        "from it with any number of processes."
    )


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
