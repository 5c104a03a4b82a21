"""R15: one of two processes dies, fails or is asked to end; the other knows within the timeout, and nothing is lost.

torchrun --nproc-per-node 2 ranks.py PLACE RANK ACTION arguments…    # scoresde-train with a fault in its first life
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parents[1])) if path not in sys.path]

import stops  # noqa: E402
from result import Result  # noqa: E402
from stops import CODES, State, Tally, owner_of, room, state  # noqa: E402
from together import Ended, of_session, start  # noqa: E402

from scoresde.runs.checkpoint import latest  # noqa: E402

TIMEOUT = 30
ARGUMENTS = (*stops.ARGUMENTS, f"timeout={TIMEOUT}")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    Attributes:
        place: see `PLACES`.
        rank: whom it strikes; None for all.
        action: "SIGKILL", "raise", or a signal that asks; "parent SIGTERM" goes to the parent, torchrun, and
            "all SIGTERM" to both.
    """

    place: str
    rank: int | None
    action: str

    @property
    def told(self) -> str:
        who = "both ranks" if self.rank is None else f"rank {self.rank}"
        return f"{self.action} in {self.place}, {who}"


# place -> (object, attribute, number of the call); a call to an exchange is made before the fault
PLACES: dict[str, tuple[str, str, int]] = {
    "a step": ("scoresde.train.state:TrainingState", "batch", 5),
    "an exchange": ("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "allreduce_hook", 5),
    "a gathering": ("scoresde.train.state:TrainingState", "tensors", 2),
    "a save": ("safetensors.torch", "save_file", 6),
    "a load": ("scoresde.train.state:TrainingState", "restore", 1),
    "an evaluation": ("scoresde.cli.train", "measure", 1),
}


def act(fault: Fault) -> None:
    with open("struck", "a") as file:
        file.write(f"{time.monotonic()}\n")
    whom, _, name = fault.action.rpartition(" ")
    if name == "raise":
        raise ArithmeticError("planted")
    if whom != "":
        os.kill(os.getppid(), signal.Signals[name])
    if whom != "parent":
        os.kill(os.getpid(), signal.Signals[name])


def arm(fault: Fault) -> None:
    where, attribute, wanted = PLACES[fault.place]
    owner = owner_of(where)
    call: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def struck(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != wanted:
            return call(*args, **options)
        if fault.place == "an exchange":
            under_way = call(*args, **options)
            act(fault)
            return under_way
        act(fault)
        return call(*args, **options)

    setattr(owner, attribute, struck)


def command(arguments: tuple[str, ...], fault: Fault | None = None) -> None:
    """scoresde-train in one process of several; rank 0 counts the batches."""
    rank = int(os.environ["RANK"])
    if fault is not None and fault.rank in (None, rank):
        arm(fault)
    if rank:
        from scoresde.cli.train import main

        sys.argv = ["scoresde-train", *arguments]
        return main()
    stops.command(arguments)


def judge(cwd: Path, fault: Fault, ends: list[Ended], begin: float, tally: Tally) -> list[str]:
    """What was wrong with the end of a run by two processes."""
    wrong = []
    struck = [float(line) for line in (cwd / "struck").read_text().split()] if (cwd / "struck").exists() else []
    if not struck:
        wrong.append("never struck")
    for rank, end in enumerate(ends):
        expected: tuple[int, ...] = (1,)
        if fault.action == "SIGKILL" and rank == fault.rank:
            expected = (-9,)
        elif fault.action in CODES:
            expected = (CODES[fault.action], 143)
        if end.code is None:
            wrong.append(f"rank {rank} hung")
        elif end.code not in expected:
            wrong.append(f"rank {rank} ended with {end.code}: {end.output[-300:]}")
        if end.orphans:
            wrong.append(f"{end.orphans} orphans of rank {rank}")
        if struck:
            tally.seconds.append(begin + end.seconds - struck[0])
    return wrong


def compare(cwd: Path, whole: State, counted: bool) -> list[str]:
    """How a run that has finished differs from the unbroken one, bit by bit."""
    found = state(cwd)
    names = ("digest", "rows", "results", *(("batches",) if counted else ()))
    return [f"other {name}" for name in names if getattr(found, name) != getattr(whole, name)]


def broken(fault: Fault, scratch: Path, whole: State, tally: Tally) -> None:
    """One fault in two processes, then the same command again."""
    cwd, wrong = room(scratch, fault.told), list[str]()
    asked = fault.action in CODES
    if fault.place == "a load":
        start(command, ARGUMENTS, Fault("a step", 0, "SIGTERM"), world=2, cwd=cwd).wait()
        (cwd / "struck").unlink()
    group = start(command, ARGUMENTS, fault, world=2, cwd=cwd)
    wrong += judge(cwd, fault, group.wait(), group.begin, tally)
    if asked:
        saved = latest(cwd / "run" / "checkpoints")
        made = (cwd / "batches").stat().st_size
        if saved is None or saved.step != made:
            wrong.append(f"{made} steps made, {None if saved is None else saved.step} saved")
    elif tally.seconds and max(tally.seconds[-2:]) > TIMEOUT + 10:
        wrong.append(f"{max(tally.seconds[-2:]):.0f} s to notice")
    ends = start(command, ARGUMENTS, world=2, cwd=cwd).wait()
    if any(end.code != 0 for end in ends):
        wrong.append(f"resume ended with {[end.code for end in ends]}: {ends[0].output[-300:]}")
        tally.add(fault.told, wrong)
        return
    differs = compare(cwd, whole, counted=asked)
    tally.add(fault.told, wrong + differs, silent=bool(differs))


def torchrun(fault: Fault, scratch: Path, whole: State, tally: Tally, restarts: int) -> None:
    """The same under the real torchrun, which starts all again, or is asked to end itself."""
    cwd, wrong = room(scratch, f"torchrun {fault.told}"), list[str]()
    rank = "all" if fault.rank is None else str(fault.rank)

    def run() -> tuple[int, str, float]:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [*words, f"--max-restarts={restarts}", __file__, fault.place, rank, fault.action, *ARGUMENTS], cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=6 * TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            wrong.append("hung")
            output, _ = process.communicate()
        if of_session(process.pid):
            wrong.append("orphans")
        return process.returncode, output, time.monotonic()

    code, output, end = run()
    if not (cwd / "struck").exists():
        tally.add(f"torchrun, {fault.told}", [f"never struck: {output[-500:]}"])
        return
    tally.seconds.append(end - float((cwd / "struck").read_text().split()[0]))
    if restarts:
        if code:
            wrong.append(f"ended with {code}: {output[-500:]}")
    else:
        saved, made = latest(cwd / "run" / "checkpoints"), (cwd / "batches").stat().st_size
        if not code or saved is None or saved.step != made:
            wrong.append(f"ended with {code}, {made} steps made, {None if saved is None else saved.step} saved")
        code, output, _ = run()
        if code:
            wrong.append(f"resume ended with {code}: {output[-500:]}")
    differs = [] if code else compare(cwd, whole, counted=not restarts)
    tally.add(f"torchrun, {fault.told}", wrong + differs, silent=bool(differs))


def campaign(full: bool, scratch: Path) -> list[Result]:
    cwd = room(scratch, "whole")
    ends = start(command, ARGUMENTS, world=2, cwd=cwd).wait()
    if any(end.code for end in ends):
        raise RuntimeError(f"the run that is left alone ended with {ends[0].code}:\n{ends[0].output}")
    whole, deaths, stopping = state(cwd), Tally(), Tally()
    if full:
        killed = [Fault(place, rank, "SIGKILL") for place in ("a step", "an exchange", "a load") for rank in (0, 1)]
        killed += [Fault("a save", 0, "SIGKILL"), Fault("a gathering", 1, "SIGKILL")]
        killed += [Fault("a step", 0, "raise"), Fault("a step", 1, "raise")]
        asked = [Fault("a step", rank, name) for rank in (0, 1, None) for name in ("SIGTERM", "SIGINT")]
        asked += [Fault("an evaluation", 0, "SIGTERM"), Fault("a save", 0, "SIGUSR1")]
    else:
        killed = [Fault("an exchange", 1, "SIGKILL"), Fault("a step", 0, "raise")]
        asked = [Fault("a step", 1, "SIGTERM")]
    for fault in killed:
        broken(fault, scratch, whole, deaths)
    for fault in asked:
        broken(fault, scratch, whole, stopping)
    if full:
        torchrun(Fault("a step", 1, "SIGKILL"), scratch, whole, deaths, 1)
        torchrun(Fault("an exchange", 0, "SIGKILL"), scratch, whole, deaths, 1)
        torchrun(Fault("a step", 0, "parent SIGTERM"), scratch, whole, stopping, 0)
        torchrun(Fault("a step", 0, "parent SIGINT"), scratch, whole, stopping, 0)
        torchrun(Fault("a step", None, "all SIGTERM"), scratch, whole, stopping, 0)
    hangs = sum("hung" in fault for fault in deaths.faults)
    return [deaths.result("R15 a rank dies", f"hangs {hangs}"), stopping.result("R15 a rank is asked to end", "")]


if __name__ == "__main__":
    place, struck_rank, action, *given = sys.argv[1:]
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and not Path("struck").exists()
    planned = Fault(place, None if struck_rank == "all" else int(struck_rank), action)
    command(tuple(given), planned if first_life else None)
