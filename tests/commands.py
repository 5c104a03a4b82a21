"""The commands as they are typed, and what they leave: `from commands import command`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde
from scoresde.runs.checkpoint import latest
from scoresde.runs.logger import read_rows

TINY = (
    "data=8gaussians", "data.train=256", "data.test=32", "network=mlp", "network.width=8", "network.depth=1",
    "trainer.images=640", "trainer.batch_size=64", "trainer.warmup=0", "trainer.log_every=64",
    "trainer.evaluate_every=0", "trainer.checkpoint_every=192", "evaluation.points=4", "evaluation.samples=4",
    "evaluation.pictures=false", "likelihood.solver.rtol=1e-3", "likelihood.solver.atol=1e-3", "threads=1",
)  # fmt: skip
PLAIN = ("logger=jsonl", "sampler=ddim", "sampler.steps=4")


@dataclass
class Done:
    code: int
    out: str
    err: str


def command(name: str, *arguments: str, cwd: Path) -> Done:
    """`scoresde-<name> arguments…` typed in `cwd`, in this process."""
    main, out, err = importlib.import_module(f"scoresde.cli.{name}").main, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"scoresde-{name}", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(end.code)
    return Done(code, out.getvalue(), err.getvalue())


def sampled(options: Sequence[str], folder: Path, out: str, *arguments: str) -> dict[str, np.ndarray]:
    """The arrays of `scoresde-sample options… arguments… out=<out>` typed in `folder`, which has to succeed."""
    done = command("sample", *options, *arguments, f"out={out}", cwd=folder)
    assert done.code == 0, done.err
    return dict(np.load(folder / out / "samples.npz"))


def process(name: str, *arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    # without the W&B service of this process, which a process that is killed would leave in use
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment["PYTHONPATH"] = str(Path(scoresde.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", f"scoresde.cli.{name}", *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its SHA-256, every link with its target, every folder with an empty string.

    A link is not followed: W&B's leads to a log outside the folder, which its service may still be writing.
    """

    def content(path: Path) -> str:
        if path.is_symlink():
            return os.readlink(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def weights(folder: Path) -> dict[str, Tensor]:
    saved = latest(folder / "checkpoints")
    assert saved is not None
    return {f"{group}/{k}": v for group in ("weights", "ema", "optimizer") for k, v in saved.tensors[group].items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without headers, times of the day and rates."""
    found = [row for row in read_rows(folder / "metrics.jsonl") if "header" not in row]
    return [{k: v for k, v in row.items() if k not in ("time", "train/imgs_per_s")} for row in found]
