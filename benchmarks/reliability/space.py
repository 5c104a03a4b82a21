"""R8: a disk that is full or fails while a checkpoint is written.

Whatever call fails, the checkpoints of before stay readable, nothing is left behind, the error says what is needed and
what is free, `on_save_error` is obeyed, and the next save works when there is room again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from child import HERE, Job, final, nursery, points
from result import Result

STEPS, EVERY = 16, 4
MESSAGE = re.compile(r"step-\d{8} could not be written: .*It takes [\d.]+ MiB, and [\d.]+ MiB are free there")
WHOLE_DISK = "mount -t tmpfs -o size=4m tmpfs {folder} && exec {python} {child} {job}"


def cases(full: bool, trace: Path, largest: int) -> dict[str, tuple[str, ...]]:
    """What goes wrong in the second save -> faults, the last of which ends it at the third."""
    calls = points(trace)
    starts = [i for i, (name, _, path) in enumerate(calls) if name == "mkdir" and path.endswith(".new")]
    nth = {name: n for name, n, _ in reversed(calls[starts[1] : starts[2]])}  # of the first in the second save
    second, third = calls[starts[1]][1], calls[starts[2]][1]
    limits: dict[str, tuple[str, ...]] = {
        f"RLIMIT_FSIZE at {percent} %": (f"mkdir:{second}:limit={largest * percent // 100}", f"mkdir:{third}:free")
        for percent in ((10, 50, 90, 99) if full else (50,))
    }
    raised = {
        f"{error} from {name}": (f"{name}:{nth[name] + late}:{error}",)
        for error in (("ENOSPC", "EIO", "EDQUOT") if full else ("ENOSPC",))
        for name, late in (("save_file", 2), ("open", 1), ("fsync", 3), ("rename", 0))
    }
    return limits | raised


def judge(job: Job, code: int, text: str, expected: dict[str, object]) -> str:
    """What is wrong with a run whose second save failed; "" for nothing."""
    left = sorted(path.name for path in job.checkpoints.iterdir() if path.name.startswith("."))
    kept = [path.name for path in job.checkpoints.glob("step-*")]
    first = job.checkpoints / f"step-{EVERY:08d}"
    told = len(MESSAGE.findall(text.replace("\n", " ")))
    if job.trainer["on_save_error"] == "warn":
        right = code == 0 and final(job) == expected and first.name not in kept and "tries again" in text
    else:
        right = code == 1 and kept == [first.name] and final(job.but(steps=EVERY)) != {}
    return (
        "" if right and told == 1 and not left else f"exit {code}, kept {kept}, left {left}, told {told}: {text[-200:]}"
    )


def failing_calls(full: bool, scratch: Path) -> Result:
    """RLIMIT_FSIZE, and errors from each kind of call."""
    reference = Job(str(scratch / "reference"), STEPS, EVERY, trace=str(scratch / "trace"))
    assert nursery().run(reference).code == 0
    expected = final(reference)
    largest = max(path.stat().st_size for path in reference.checkpoints.glob("*/*"))
    chosen = cases(full, scratch / "trace", largest)
    tried, problems, silent = 0, list[str](), 0
    for k, (name, faults) in enumerate(chosen.items()):
        for policy in ("stop", "warn"):
            tried += 1
            job = reference.but(
                folder=str(scratch / f"{k}-{policy}"), faults=faults, trainer={"on_save_error": policy}, trace=""
            )
            ended = nursery().run(job)
            wrong = judge(job, ended.code, ended.text, expected)
            if not wrong and policy == "stop":  # room again: the same command ends as if nothing had been
                again = nursery().run(job.but(faults=()))
                wrong = "" if again.code == 0 and final(job) == expected else f"then exit {again.code}"
            silent += ended.code == 0 and policy == "stop"
            problems += [f"{name}, {policy}: {wrong}"] if wrong else []
    note = "; ".join(problems[:4]) or f"{len(chosen)} faults x stop and warn: {', '.join(chosen)}"
    return Result("R8 failing writes", tried, tried - len(problems), silent, note)


def full_disk(scratch: Path) -> Result:
    """A file system of 4 MiB of its own, filled but for 100 KB before the second save: the kernel's own ENOSPC."""
    reference = Job(str(scratch / "reference"), STEPS, EVERY, trace=str(scratch / "trace"))
    assert nursery().run(reference).code == 0
    calls = [n for name, n, path in points(scratch / "trace") if name == "mkdir" and path.endswith(".new")]
    problems = []
    for policy in ("stop", "warn"):
        job = reference.but(
            folder=str(scratch / policy), faults=(f"mkdir:{calls[1]}:fill=100000", f"mkdir:{calls[2]}:free"),
            trainer={"on_save_error": policy}, trace="",
        )  # fmt: skip
        Path(job.folder).mkdir()
        # what is seen from inside is copied out, because the file system ends with its process
        inside = WHOLE_DISK.format(
            folder=job.folder, python=sys.executable, child=HERE / "space.py",
            job=f"'{json.dumps(dataclasses.asdict(job))}' {scratch / f'{policy}-kept'}",
        )  # fmt: skip
        done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, timeout=120)
        text = done.stdout + done.stderr
        wrong = judge(job.but(folder=str(scratch / f"{policy}-kept")), done.returncode, text, final(reference))
        problems += [f"{policy}: {wrong}"] if wrong else []
    note = "; ".join(problems) or "tmpfs of 4 MiB, stop and warn"
    return Result("R8 a full disk", 2, 2 - len(problems), 0, note)


def namespaces() -> bool:
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True).returncode == 0


def campaign(full: bool, scratch: Path) -> list[Result]:
    """Calls that fail; and where user namespaces are allowed a disk that is really full."""
    results = [failing_calls(full, scratch / "calls")]
    if full and namespaces():
        results.append(full_disk(scratch / "disk"))
    return results


if __name__ == "__main__":
    import shutil

    from child import perform

    inner = Job(**json.loads(sys.argv[1]))
    status = perform(inner)
    shutil.copytree(inner.folder, sys.argv[2], ignore=shutil.ignore_patterns("filler"))
    sys.exit(status)
