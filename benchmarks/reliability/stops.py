"""R14 and R32: a run that is asked to end saves and loses nothing, whatever it was doing; a folder has one process."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small
from result import Result
from together import of_session, start

from scoresde.runs import lock
from scoresde.runs.checkpoint import latest
from scoresde.runs.logger import read_rows

HERE = Path(__file__).resolve().parent

# Schedulers kill 30 s after they have asked (Kubernetes' terminationGracePeriodSeconds, Slurm's KillWait). What a
# signal should break off takes HELD: whoever waits for it to end is found out, on a slow machine, too.
GRACE, HELD = 30.0, 60.0
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143}
STEPS = 10
ARGUMENTS = (
    "data=8gaussians", "data.train=256", "data.test=32", "network=mlp", "network.width=8", "network.depth=1",
    f"trainer.images={64 * STEPS}", "trainer.batch_size=64", "trainer.warmup=0", "trainer.log_every=64",
    "trainer.evaluate_every=256", "trainer.checkpoint_every=192", "evaluation.points=8", "evaluation.points_during=4",
    "evaluation.samples=8", "evaluation.batch_size=2", "evaluation.pictures=false", "likelihood.solver.rtol=1e-2",
    "likelihood.solver.atol=1e-2", "threads=1", "logger=jsonl", "sampler=ddim", "sampler.steps=3", "device=cpu",
    "resume=auto", "out=run",
)  # fmt: skip


@dataclass(frozen=True)
class Strike:
    """A signal from within.

    Attributes:
        place: see `PLACES`.
        name: of the signal.
        group: to the whole process group, as a terminal's Ctrl-C; else to the process.
        again: seconds after which a second one comes, while the place holds on for `HELD`; 0 for none.
    """

    place: str
    name: str = "SIGTERM"
    group: bool = False
    again: float = 0.0

    @property
    def told(self) -> str:
        return (
            f"{self.name} {'to the group ' if self.group else ''}in {self.place}{' and another' if self.again else ''}"
        )


# place -> (object, attribute, number of the call, seconds the call takes where it may be broken off)
PLACES: dict[str, tuple[str, str, int, float]] = {
    "a step": ("scoresde.train.state:TrainingState", "batch", 5, 0.0),
    "an evaluation": ("scoresde.cli.train", "measure", 1, HELD),
    "a save": ("safetensors.torch", "save_file", 2, 0.3),
    "the last save": ("safetensors.torch", "save_file", 11, 0.3),
    "the last measurement": ("scoresde.cli.train", "finish", 1, 0.0),
    "sampling": ("scoresde.evaluate.shards:Shards", "_save", 3, HELD),
    "the first step": ("scoresde.train.state:TrainingState", "batch", 1, HELD),
}


def strike(how: Strike) -> None:
    with open("struck", "a") as file:
        file.write(f"{time.monotonic()}\n")
    number = signal.Signals[how.name]
    if how.group:
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)


def owner_of(where: str) -> Any:
    """The module `where`, or "module:Class", in which a fault is planted."""
    module, _, name = where.partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, name) if name else owner


def arm(how: Strike) -> None:
    """Puts the signal where it belongs."""
    where, attribute, wanted, seconds = PLACES[how.place]
    owner = owner_of(where)
    call: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    def struck(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == wanted:
            strike(how)
            if how.again:  # counted from when the first was heard
                threading.Timer(how.again, strike, (how,)).start()
            time.sleep(HELD if how.again else seconds)
        return call(*args, **options)

    setattr(owner, attribute, struck)


def command(arguments: tuple[str, ...], how: Strike | None = None, hold: str = "") -> None:
    """scoresde-train. A dot in `batches` for each batch that was used; at the third it waits for the file `hold`."""
    from scoresde.cli.train import main
    from scoresde.train.state import TrainingState

    terms, used = TrainingState.terms, os.open("batches", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted(run: TrainingState) -> Any:
        found = terms(run)
        os.write(used, b".")
        while hold and run.step == 2 and not Path(hold).exists():
            time.sleep(0.01)
        return found

    TrainingState.terms = counted  # type: ignore[method-assign]
    if how is not None:
        arm(how)
    sys.argv = ["scoresde-train", *arguments]
    main()


@dataclass(frozen=True)
class State:
    """What a finished run left: its last state, every row, its results, and the number of batches that were used."""

    digest: str
    rows: tuple[str, ...]
    results: str
    batches: int


def state(cwd: Path, run: str = "run") -> State:
    saved = latest(cwd / run / "checkpoints")
    found = [row for row in read_rows(cwd / run / "metrics.jsonl") if "header" not in row]
    clocks = ("time", "train/imgs_per_s")
    rows = tuple(str({key: v for key, v in row.items() if key not in clocks}) for row in found)
    summary = json.loads((cwd / run / "summary.json").read_text())
    results = [summary["loss"], summary["bits_per_dim"], *summary["samplers"]]
    for part in results[1:]:
        del part["seconds"]
    batches = (cwd / "batches").stat().st_size
    return State("" if saved is None else small.digest(saved.tensors), rows, json.dumps(results), batches)


def room(scratch: Path, name: str) -> Path:
    path = scratch / re.sub(r"\W+", "-", name)
    path.mkdir()
    return path


class Tally:
    """Cases of one line of the table."""

    def __init__(self) -> None:
        self.tried, self.silent, self.faults, self.seconds = 0, 0, list[str](), list[float]()

    def add(self, name: str, wrong: list[str], *, silent: bool = False) -> None:
        self.tried += 1
        self.silent += silent
        self.faults += [f"{name}: {', '.join(wrong)}"] if wrong else []

    def result(self, name: str, note: str) -> Result:
        if self.seconds:
            note += f"; seconds to exit: median {statistics.median(self.seconds):.1f}, max {max(self.seconds):.1f}"
        return Result(name, self.tried, self.tried - len(self.faults), self.silent, "; ".join([note, *self.faults]))


def stopped(how: Strike, scratch: Path, whole: State, tally: Tally) -> None:
    """Strikes, looks at what is left, and lets the same command go on."""
    cwd, wrong = room(scratch, how.told), list[str]()
    group = start(command, ARGUMENTS, how, cwd=cwd)
    (end,) = group.wait()
    code = CODES[how.name]
    if end.code != code:
        wrong.append(f"exit status {end.code}, not {code}: {end.output[-300:]}")
    if end.orphans:
        wrong.append(f"{end.orphans} orphans")
    times = [float(line) for line in (cwd / "struck").read_text().split()] if (cwd / "struck").exists() else []
    if len(times) != 1 + (how.again > 0):
        wrong.append(f"struck {len(times)} times")
    else:
        tally.seconds.append(group.begin + end.seconds - times[-1])
        if tally.seconds[-1] > GRACE:
            wrong.append(f"{tally.seconds[-1]:.0f} s to exit")
    saved, used = latest(cwd / "run" / "checkpoints"), (cwd / "batches").stat().st_size
    if not how.again and (0 if saved is None else saved.step) != used:
        wrong.append(f"{used} steps made, {0 if saved is None else saved.step} saved")
    (end,) = start(command, ARGUMENTS, cwd=cwd).wait()
    if end.code:
        wrong.append(f"resume ended with {end.code}: {end.output[-300:]}")
        tally.add(how.told, wrong)
        return
    found = state(cwd)
    for name in ("digest", "rows", "results", *(() if how.again else ("batches",))):
        if getattr(found, name) != getattr(whole, name):
            wrong.append(f"other {name} than the run that was left alone")
    tally.add(how.told, wrong, silent=found.digest != whole.digest)


def sweep(name: str, scratch: Path, whole: State, tally: Tally) -> None:
    """The first of two jobs is stopped: so is the sweep, with the same status, and the same command goes on."""
    how = Strike("a step", name)
    cwd, wrong = room(scratch, f"sweep {name}"), list[str]()
    arguments = ("-m", *ARGUMENTS[:-1], "seed=0,1", "out=s")
    (end,) = start(command, arguments, how, cwd=cwd).wait()
    if end.code != CODES[name]:
        wrong.append(f"exit status {end.code}: {end.output[-300:]}")
    if (cwd / "s" / "1" / "checkpoints").exists():
        wrong.append("the second job was started")
    (end,) = start(command, arguments, cwd=cwd).wait()
    if end.code:
        wrong.append(f"going on ended with {end.code}: {end.output[-300:]}")
    elif state(cwd, "s/0").digest != whole.digest or not (cwd / "s" / "1" / "summary.json").exists():
        wrong.append("not what an unbroken sweep makes")
    tally.add(f"{name} in a sweep", wrong)


def compiling(name: str, scratch: Path, tally: Tally) -> None:
    """torch.compile, really: the compiler and its helpers are at work, nothing is there to be saved."""
    cwd, wrong = room(scratch, f"compile {name}"), list[str]()
    run = subprocess.Popen(
        [sys.executable, "-m", "scoresde.cli.train", *ARGUMENTS, "compile=true"], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "TORCHINDUCTOR_CACHE_DIR": str(cwd / "cache")},
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("Training"):
            break
    time.sleep(1.0)
    struck = time.monotonic()
    os.killpg(run.pid, signal.Signals[name])
    try:
        output, _ = run.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        run.kill()
        output, _ = run.communicate()
        wrong.append("hung")
    tally.seconds.append(time.monotonic() - struck)
    if run.returncode != CODES[name]:
        wrong.append(f"exit status {run.returncode}: {output[-300:]}")
    time.sleep(0.5)
    if left := of_session(run.pid):
        wrong.append(f"{len(left)} orphans")
    # the compiler may swallow what a signal raises; then the step is finished, and saved
    saved = latest(cwd / "run" / "checkpoints")
    if saved is not None and saved.step != 1:
        wrong.append(f"step {saved.step} was saved")
    tally.add(f"{name} while compiling", wrong)


def one_folder(scratch: Path, whole: State, tries: int) -> Result:
    """While one run is at work others want its folder; then it is killed, and the next has it at once."""
    tally, cwd = Tally(), room(scratch, "one folder")
    holding = start(command, ARGUMENTS, None, "go", cwd=cwd)
    pid, deadline = holding.processes[0].pid, time.monotonic() + 300
    while (lock.holder(cwd / "run") or {}).get("pid") != pid and time.monotonic() < deadline:
        time.sleep(0.02)
    others = room(scratch, "others")
    arguments = (*ARGUMENTS, f"out={cwd / 'run'}")
    for attempt in range(tries):
        # two at a time, which also meet each other
        for end in start(refused, arguments, world=2, cwd=others).wait():
            named = f"Process {pid} on {socket.gethostname()}" in end.output
            wrong = [] if end.code == 1 and named else [f"exit status {end.code}: {end.output[-300:]}"]
            tally.seconds.append(end.seconds)
            tally.add(f"attempt {attempt + 1}", wrong, silent=end.code == 0)
    (cwd / "go").touch()
    (end,) = holding.wait()
    found = state(cwd) if end.code == 0 else None
    tally.add("the one that was first", [] if found == whole else [f"ended with {end.code}, or otherwise"])

    cwd = room(scratch, "killed")
    holding = start(command, ARGUMENTS, None, "go", cwd=cwd)
    while not (cwd / "batches").exists() or (cwd / "batches").stat().st_size < 3:
        time.sleep(0.02)
    holding.processes[0].kill()
    holding.wait()
    left = (cwd / "run" / ".lock").exists()
    (end,) = start(command, ARGUMENTS, cwd=cwd).wait()
    good = left and end.code == 0 and state(cwd).digest == whole.digest
    tally.add("after kill -9", [] if good else [f"lock left: {left}, exit status {end.code}: {end.output[-300:]}"])
    return tally.result("R32 two processes, one folder", f"collisions {tally.silent}")


def refused(arguments: tuple[str, ...]) -> None:
    """One of several commands that know nothing of each other."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    command(arguments)


def campaign(full: bool, scratch: Path) -> list[Result]:
    cwd = room(scratch, "whole")
    (end,) = start(command, ARGUMENTS, cwd=cwd).wait()
    if end.code:
        raise RuntimeError(f"the run that is left alone ended with {end.code}:\n{end.output}")
    whole, tally = state(cwd), Tally()
    if full:
        strikes = [Strike(place, name) for place in PLACES for name in CODES]
        strikes += [Strike(place, "SIGINT", group=True) for place in PLACES]
        strikes += [Strike(place, name, again=2.5) for place in ("a step", "a save", "the last save") for name in CODES]
    else:
        strikes = [
            Strike("a step"), Strike("an evaluation", "SIGINT", group=True), Strike("a save", "SIGUSR1"),
            Strike("sampling"), Strike("the first step", "SIGINT"), Strike("a step", again=2.5),
        ]  # fmt: skip
    for how in strikes:
        stopped(how, scratch, whole, tally)
    for name in ("SIGTERM", "SIGINT")[: 2 if full else 1]:
        sweep(name, scratch, whole, tally)
    for name in ("SIGTERM", "SIGINT")[: 2 if full else 0]:
        compiling(name, scratch, tally)
    lost = "steps lost 0" if not any("saved" in fault for fault in tally.faults) else "steps lost"
    return [tally.result("R14 signals", lost), one_folder(scratch, whole, 10 if full else 2)]
