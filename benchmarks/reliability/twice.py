"""R30: the same command in two fresh processes gives the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from child import HERE, manifest
from damage import COMMAND
from result import Result

SUBJECTS = {
    "MLP": (*COMMAND, "network.width=32"),
    "U-Net, bfloat16": (
        *(part for part in COMMAND if not part.startswith(("data", "network"))), "data=digits", "network.width=8",
        "network.blocks=1", "network.multipliers=[1,2]", "network.dropout=0.1", "denoiser.autocast=bfloat16",
    ),
}  # fmt: skip


def trained(subject: tuple[str, ...], threads: int, hash_seed: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PYTHONHASHSEED": hash_seed}
    return subprocess.Popen(
        [sys.executable, "-m", "scoresde.cli.train", *subject, f"threads={threads}", f"out={folder}"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def same(name: str, threads: int, scratch: Path) -> tuple[str, dict[str, str]]:
    """What is wrong with two runs, "" for nothing; and the sums of the first."""
    folders, runs, texts = [scratch / f"{threads}-{run}" for run in "ab"], list[subprocess.Popen[str]](), list[str]()
    for seed, folder in zip(("0", "12345"), folders, strict=True):
        runs.append(trained(SUBJECTS[name], threads, seed, folder))
        if threads > 1:  # two at a time would fight for the cores
            texts.append(runs[-1].communicate(timeout=900)[0])
    texts = texts or [run.communicate(timeout=900)[0] for run in runs]
    if any(run.returncode for run in runs):
        return f"{name}, {threads} threads: {texts[0][-300:]}", {}
    sums = [last(folder) for folder in folders]
    rows = [losses(folder / "metrics.jsonl") for folder in folders]
    return ("" if sums[0] == sums[1] and rows[0] == rows[1] else f"{name}, {threads} threads: differ"), sums[0]


def last(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of the last checkpoint."""
    return manifest(max((folder / "checkpoints").glob("step-*")))


def losses(path: Path) -> list[float]:
    """Every loss of a run."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in found for key in ("train/loss", "eval/loss") if key in row]


def campaign(full: bool, scratch: Path) -> list[Result]:
    """Two processes each, of 1 and 2 threads, with other hash seeds; control: another seed of the run differs."""
    problems, silent, first = list[str](), 0, dict[tuple[str, int], dict[str, str]]()
    cases = [(name, threads) for name in SUBJECTS for threads in (1, 2)] if full else [("MLP", 1)]
    for k, (name, threads) in enumerate(cases):
        wrong, first[name, threads] = same(name, threads, scratch / f"{k}")
        problems += [wrong] if wrong else []
        silent += wrong.endswith("differ")
    told = ""
    if full:
        trained((*SUBJECTS["MLP"], "seed=1"), 1, "0", scratch / "control").communicate(timeout=900)
        weights = {case: sums.get("weights.safetensors") for case, sums in first.items()}
        if last(scratch / "control")["weights.safetensors"] == weights["MLP", 1]:
            problems.append("another seed gives the same weights")
        changed = [name for name in SUBJECTS if weights[name, 1] != weights[name, 2]]
        told = f"; other weights with 2 threads than with 1: {', '.join(changed) or 'none'}; another seed differs"
    note = "; ".join(problems) or f"SHA-256 of weights, average and moments, and every loss{told}"
    return [Result("R30 the same run twice", len(cases), len(cases) - len(problems), silent, note)]
