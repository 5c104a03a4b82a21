"""Several processes at once, each forked from one that has imported everything: `together(work, …)`, `start(work, …)`.

They see what `torchrun` would tell them (RANK, WORLD_SIZE, MASTER_PORT …) and lead a session each, so whatever they
leave behind can be found by its number.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
# the last three come with the first optimizer step, the first pairs of a coupling, and the first checkpoint
_CONTEXT.set_forkserver_preload([
    "torch.distributed.fsdp", "scoresde.cli.train", "torch._dynamo", "scipy.optimize", "safetensors.torch",
])  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit status, −n after signal n, None if it had to be killed because it hung.
        value: what the work returned, None if it did not return.
        output: standard output and error.
        seconds: from `Group.begin` to the end of this one.
        orphans: processes of its session that were left.
    """

    code: int | None
    value: Any
    output: str
    seconds: float
    orphans: int


class Group:
    """Processes that have been started.

    Attributes:
        begin: when the last was started, by `time.monotonic`; the first ever waits for all that is imported.
        processes: in the order of their ranks.
    """

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...], world: int, cwd: Path | None):
        self._folder = tempfile.TemporaryDirectory(prefix="scoresde-together-")
        # as with torchrun the store is the parent's: a port that is free now may be taken when rank 0 comes to want it
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
        port = 0 if self._store is None else self._store.port
        self.processes, self._results = [], []
        for rank in range(world):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            out = Path(self._folder.name) / str(rank)
            process = _CONTEXT.Process(target=_child, args=(work, arguments, rank, world, port, out, sender, cwd))
            process.start()
            sender.close()
            self.processes.append(process)
            self._results.append(receiver)
        self.begin = time.monotonic()

    def wait(self, limit: float = 600.0) -> list[Ended]:
        """Until all have ended; what has not after `limit` seconds from now is killed. It is there for what hangs."""
        deadline = time.monotonic() + limit
        ends: dict[int, float] = {}
        # a result is read as it comes: a process waits for its pipe to be emptied
        values: dict[int, Any] = {}
        open_ends = dict(enumerate(self._results))
        while len(ends) < len(self.processes) and (left := deadline - time.monotonic()) > 0:
            running = {p.sentinel: rank for rank, p in enumerate(self.processes) if rank not in ends}
            for ready in wait([*running, *open_ends.values()], left):
                if ready in running:
                    ends[running[ready]] = time.monotonic() - self.begin
                    continue
                rank = next(rank for rank, end in open_ends.items() if end is ready)
                try:
                    values[rank] = pickle.loads(ready.recv_bytes())
                except EOFError:
                    del open_ends[rank]
        ended = [self._end(rank, ends.get(rank), values.get(rank)) for rank in range(len(self.processes))]
        self._folder.cleanup()
        return ended

    def _end(self, rank: int, seconds: float | None, value: Any) -> Ended:
        process = self.processes[rank]
        if seconds is None:
            process.kill()
        process.join()
        output = (Path(self._folder.name) / str(rank)).read_text(errors="replace")
        code = None if seconds is None else process.exitcode
        return Ended(code, value, output, time.monotonic() - self.begin if seconds is None else seconds,
                     len(of_session(process.pid)))  # fmt: skip


def start(work: Callable[..., Any], *arguments: Any, world: int = 1, cwd: Path | None = None) -> Group:
    """Starts `work(*arguments)`, a function of a module, in `world` processes, in the folder `cwd`."""
    return Group(work, arguments, world, cwd)


def together(work: Callable[..., Any], *arguments: Any, world: int = 2, limit: float = 600.0) -> list[Any]:
    """What `work(*arguments)` returns in each of `world` processes.

    Raises:
        RuntimeError: one of them failed; with its output.
    """
    ended = start(work, *arguments, world=world).wait(limit)
    for rank, end in enumerate(ended):
        if end.code:
            raise RuntimeError(f"rank {rank} ended with {end.code}:\n{end.output}")
        if end.code is None:
            raise RuntimeError(f"rank {rank} hung for {limit} s:\n{end.output}")
    return [end.value for end in ended]


def of_session(leader: int | None) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # after the name, which may contain anything: state, parent, process group, session
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def _child(
    work: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world: int, port: int, out: Path,
    sender: Connection, cwd: Path | None,
) -> None:  # fmt: skip
    import torch

    os.setsid()
    with open(out, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # whoever writes to `sys.__stderr__` means the same; they stay open to the end
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # type: ignore[misc] # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc] # noqa: SIM115
    os.chdir(out.parent if cwd is None else cwd)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    try:
        # plain pickle: Connection.send leaves tensors in memory that ends with the process
        sender.send_bytes(pickle.dumps(work(*arguments)))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)
    finally:
        sys.stdout.flush()
