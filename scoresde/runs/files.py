"""Reads one run folder: its configuration, its numbers, and whether it runs, is finished, or can be resumed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import lock
from .listing import differing, flat, number
from .logger import parse_rows
from .publish import content_of

STATES = ("running", "finished", "resumable", "failed", "empty")
# Overrides that say how a job is run, not what it is.
CONTROL = ("out", "resume", "overwrite", "device", "threads", "kernels")
MARK = "# scoresde"
# Folders that hold no runs but may hold thousands of files.
_CLOSED = ("checkpoints", "wandb", "progress", "batches", "averages")
# Bytes of a file that are read, which every run keeps to: a megabyte of YAML takes ten seconds, one of JSON none.
_YAML_BYTES, _JSON_BYTES, _ROW_BYTES = 1 << 18, 16 << 20, 1 << 30
_DEPTH = 50  # levels of nesting that a record may have, a tenth of what Python's functions take


@dataclass
class Run:
    """What the files of one run folder say.

    Attributes:
        folder: where it is.
        state: "running" (a process holds its lock), "finished", "resumable" (a whole checkpoint, and no end),
            "failed", or "empty".
        reason: a few words on the state: why it failed, who runs it, which files cannot be read.
        step, images: how far training came, None if that is not known.
        goal: number of images that it was to see.
        bits, stderr: held-out bits/dim and its standard error from summary.json; loss: the last held-out loss.
        config: flat configuration, `{"sde": "VPSDE", "sde.beta_max": 20.0, …}`.
        overrides: those that the job of a sweep was started with; None outside of sweeps.
        rows: metrics.jsonl.
    """

    folder: Path
    state: str = "empty"
    reason: str = ""
    step: int | None = None
    images: int | None = None
    goal: int | None = None
    bits: float | None = None
    stderr: float | None = None
    loss: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def numbers(self) -> dict[str, float | None]:
        """The numbers of a run that tables show, by column."""
        return {"step": self.step, "images": self.images, "bits/dim": self.bits, "loss": self.loss}


def find(root: Path) -> Iterator[Path]:
    """Run folders at and below `root`, in natural order (2 before 10)."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted((f for f in folders if f not in _CLOSED and not f.startswith(".")), key=natural)
        known = {"metrics.jsonl", "job.json", "failed.json"} & set(files)
        if known or ("config.yaml" in files and marked(Path(place, "config.yaml"))):
            yield Path(place)


def read(folder: Path) -> Run:
    """Reads the files of one run. A damaged file is named in `reason`; it raises nothing, whatever is in the folder."""
    try:
        return _read(folder)
    except Exception as error:  # one folder that cannot be read hides no other
        return Run(folder, "failed", f"damaged: {error!r:.200}")


def _read(folder: Path) -> Run:
    broken: list[str] = []

    def get(name: str, parse: Callable[[bytes], Any], kind: type, limit: int = _JSON_BYTES) -> Any:
        try:
            found = parse(content_of(folder / name, limit))
        except FileNotFoundError:
            return kind()
        except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
            found = None
        if not isinstance(found, kind):
            broken.append(name)
            return kind()
        return found

    config = get("config.yaml", _configuration, dict, _YAML_BYTES)
    summary, job, failure = (get(f"{name}.json", _json, dict) for name in ("summary", "job", "failed"))
    lines = get("metrics.jsonl", parse_rows, list, _ROW_BYTES)
    if None in lines[:-1]:  # the last line may still be being written
        broken.append("metrics.jsonl")
    rows = [row for row in lines if row is not None and "header" not in row]
    bits = summary.get("bits_per_dim")
    bits = bits if isinstance(bits, dict) else {}
    run = Run(folder, config=config, rows=rows, bits=number(bits.get("mean")), stderr=number(bits.get("stderr")))
    run.step = _whole(_numbers("step", [summary, *rows]))
    run.images = _whole(_numbers("images", [summary, *rows]))
    run.goal = _whole(_numbers("trainer.images", [config]))
    run.loss = next(iter([*_numbers("eval/loss", rows)[::-1], *_numbers("loss", [summary])]), None)
    if isinstance(job.get("overrides"), list):
        run.overrides = values(job["overrides"])
    run.state, run.reason = _state(run, summary, job, failure)
    if broken:
        run.reason = "; ".join(filter(None, [run.reason, f"damaged: {', '.join(broken)}"]))
    return run


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which no run writes and which unfold without end. (CSafeLoader crashes on "[[[[…".)"""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a configuration of a run has no aliases")
        return super().compose_node(parent, index)


def _configuration(content: bytes) -> Any:
    found = _shallow(yaml.load(content, _Loader))
    repr(found)  # which refuses a number that is too long to be shown
    return flat(found) if isinstance(found, dict) else None


def _json(content: bytes) -> Any:
    return _shallow(json.loads(content))


def _shallow(value: Any, depth: int = _DEPTH) -> Any:
    """The value itself, if its nesting ends within `depth` levels; whoever copies or shows it takes some for each."""
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise RecursionError("nested too deep")
        for entry in value.values() if isinstance(value, dict) else value:
            _shallow(entry, depth - 1)
    return value


def _numbers(name: str, records: Sequence[dict[str, Any]]) -> list[float]:
    """The finite numbers that stand under one name."""
    return [value for record in records if (value := number(record.get(name))) is not None]


def _whole(found: Sequence[float]) -> int | None:
    return int(max(found)) if found else None


def _state(run: Run, summary: dict[str, Any], job: dict[str, Any], failure: dict[str, Any]) -> tuple[str, str]:
    saved = newest_checkpoint(run.folder)
    status, rest = job.get("status"), "" if saved is None else f"resumable at step {saved}"
    if (run.folder / ".lock").exists() and (holder := lock.holder(run.folder)) is not None:
        return "running", f"process {holder.get('pid')} on {holder.get('host')}"
    if status == "running" and lock.alive(job):
        return "running", f"process {job['pid']}"
    if failure:
        return "failed", "; ".join(filter(None, [str(failure.get("reason", "")), rest]))
    last = run.rows[-1] if run.rows else {}
    images = summary.get("images") if summary else last.get("images") if last.get("final") else None
    reached = images is not None and (run.goal is None or (number(images) or 0) >= run.goal)
    done = reached if summary else reached and saved is not None and run.config.get("evaluate_at_end") is False
    # a job of a sweep may have been finished later, by a command of its own
    end = run.folder / ("summary.json" if summary else "metrics.jsonl")
    later = done and _written(end) >= _written(run.folder / "job.json")
    if status in ("failed", "running") and not later:
        error = "ended without a word" if status == "running" else str(job.get("error", ""))
        return "failed", "; ".join(filter(None, [error, rest]))
    if done:
        return "finished", ""
    return ("resumable", f"at step {saved}") if saved is not None else ("empty", "")


def newest_checkpoint(folder: Path) -> int | None:
    """Step of the newest checkpoint whose files are all there with their sizes; None if there is none."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            files = json.loads(content_of(path / "manifest.json"))["files"]
            if files and all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items()):
                return int(path.name.removeprefix("step-"))
    return None


def values(overrides: Sequence[Any]) -> dict[str, str]:
    """`["sde=vp", "+a.b=1", "resume=auto"]` as `{"sde": "vp", "a.b": "1"}`: the overrides that define a job."""
    pairs = [str(override).lstrip("+").split("=", 1) for override in overrides if "=" in str(override)]
    return {name: re.sub(r"^([\"'])(.*)\1$", r"\2", value) for name, value in pairs if name not in CONTROL}


def marked(path: Path) -> bool:
    """Whether a configuration is a run's, whose first line says so."""
    try:
        return content_of(path, _YAML_BYTES).startswith(MARK.encode())
    except (OSError, ValueError):
        return False


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -math.inf


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2 before 10."""
    parts = re.split(r"0*(\d+)", name)  # without the zeros in front, a longer number is the larger one
    return [(1, 0, part) if i % 2 == 0 else (0, len(part), part) for i, part in enumerate(parts)]


def measured(run: Run) -> dict[str, str]:
    """Steps, images, bits/dim and loss of a run as a table shows them."""
    digits = {"step": ",", "images": ",", "bits/dim": ".4f", "loss": ".5g"}
    shown = {name: "–" if value is None else format(value, digits[name]) for name, value in run.numbers.items()}
    if run.bits is not None and run.stderr is not None:
        shown["bits/dim"] += f" ± {run.stderr:.4f}"
    return shown


def count_states(runs: Sequence[Run]) -> str:
    """`2 finished, 1 failed`."""
    counts = Counter(run.state for run in runs)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def keys(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """(one flat table per run, the keys in which they differ, the entries that they all share).

    The jobs of one sweep are compared by their overrides, other runs by their whole configuration.
    """
    swept = len({run.folder.parent for run in runs}) == 1 and all(run.overrides is not None for run in runs)
    tables = [(run.overrides if swept else run.config or run.overrides) or {} for run in runs]
    tables = [{k: v for k, v in table.items() if k.partition(".")[0] not in (*CONTROL, "logger")} for table in tables]
    return tables, *differing(tables)
