"""A sweep's end: `sweep.csv` and a printed table, sorted by the objective, failed jobs with their reason."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from .report import layout

_FIXED = ("job", "status", "objective")
_MEASURED = ("bits_per_dim", "stderr", "loss", "seconds", "folder", "error")


class SweepSummary(Callback):
    """Hydra calls this around a multirun; each job has left a `job.json` in its folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(str(config.hydra.sweep.dir))
        again = OmegaConf.select(config, "resume") == "auto" or OmegaConf.select(config, "overwrite") is True
        outcomes = list(folder.glob("*/job.json"))
        if ((folder / "sweep.csv").exists() or outcomes) and not again:
            # Hydra swallows any other exception of a callback
            raise SystemExit(
                f"error: {folder} holds a sweep already. Continue it with resume=auto, replace it with overwrite=true, "
                "or choose another folder: out=…."
            )
        for path in outcomes:  # each job of this sweep leaves a new one; those of a larger one before it are no rows
            path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(str(config.hydra.sweep.dir))
        rows = gather(folder)
        if not rows:
            return
        write_csv(folder / "sweep.csv", rows)
        swept = [name for name in rows[0] if name not in (*_FIXED, *_MEASURED)]
        columns = [*_FIXED, *swept, *(["error"] if any(row["error"] for row in rows) else [])]
        print(f"\n{layout(columns, [[_cell(row[name]) for name in columns] for row in rows])}")
        print(f"Sweep in {folder / 'sweep.csv'}", flush=True)
        failed = sum(row["status"] == "failed" for row in rows)
        if failed:
            print(f"error: {failed} of {len(rows)} jobs failed", file=sys.stderr)
            raise SystemExit(1)


def write_job(folder: Path, overrides: list[str], status: str, **measured: Any) -> None:
    """Leaves the outcome of one job in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"job": folder.name, "status": status, "overrides": overrides, "folder": str(folder), **measured}
    (folder / "job.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def gather(folder: Path) -> list[dict[str, Any]]:
    """One row per job of the sweep in `folder`, best objective first, failed jobs last."""
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/job.json"))]
    values = [
        dict(override.lstrip("+~").split("=", 1) for override in job["overrides"] if "=" in override) for job in jobs
    ]
    names = list(dict.fromkeys(name for row in values for name in row))
    swept = [name for name in names if len({row.get(name) for row in values}) > 1]
    rows = []
    for job, row in zip(jobs, values, strict=True):
        measured = {name: job.get(name, "") for name in _MEASURED}
        rows.append(
            {name: job.get(name, "") for name in _FIXED} | {name: row.get(name, "") for name in swept} | measured
        )
    return sorted(rows, key=lambda row: (row["status"] == "failed", _number(row["objective"]), _order(str(row["job"]))))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _order(job: str) -> tuple[int, str]:
    return (int(job) if job.isdigit() else sys.maxsize, job)


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.inf


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
