"""`scoresde.load`: a run, or the stages of a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from .cascade import Cascade
from .checkpoint import CheckpointError
from .load import MODEL_FILE, load_exported, load_run
from .run import Run


@overload
def load(  # type: ignore[overload-overlap]  # a str is a sequence, too, and the first that fits is taken
    path: Path | str,
    *,
    device: str = ...,
    weights: str | float = ...,
    checkpoint: str = ...,
    allow_targets: Sequence[str] = ...,
) -> Run: ...


@overload
def load(
    path: Sequence[Path | str],
    *,
    device: str = ...,
    weights: str | float = ...,
    checkpoint: str = ...,
    allow_targets: Sequence[str] = ...,
) -> Cascade: ...


def load(
    path: Path | str | Sequence[Path | str],
    *,
    device: str = "auto",
    weights: str | float = "ema",
    checkpoint: str = "latest",
    allow_targets: Sequence[str] = (),
) -> Run | Cascade:
    """A trained run, ready to sample and to score raw data. It needs its folder alone, wherever that lies.

        run = scoresde.load("runs/digits")
        raw = run.sample(16, budget=10)
        run.log_likelihood(raw, solver=scoresde.Budget(20)).bits_per_dim

    Args:
        path: the output folder of scoresde-train, or what `Run.export` or scoresde-export wrote; or a list of
            such, the stages of a `Cascade` from coarse to fine.
        device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is one.
        weights: "ema", "weights" (the last raw ones), or a number: the average of that length as a share of training
            (EDM2's σ_rel), made of the snapshots of ema=power.
        checkpoint: "latest", or "best": that with the lowest score.
        allow_targets: dotted names of networks and the like of your own, which the run's configuration may build.

    Raises:
        CheckpointError: no whole checkpoint there, or its weights do not fit its configuration.
        ConfigError: its configuration names something that may not be built; `allow_targets` allows it.
        ValueError: another argument outside these.
    """
    if not isinstance(path, (str, Path)):
        how: dict[str, Any] = {"device": device, "weights": weights, "checkpoint": checkpoint}
        return Cascade([load(each, **how, allow_targets=allow_targets) for each in path])
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"There is no {path.absolute()}; give the output folder of scoresde-train, or a file of run.export."
        )
    if (path / MODEL_FILE).is_file():
        path = path / MODEL_FILE
    if path.is_dir():
        return load_run(path, allow=allow_targets, device=device, weights=weights, checkpoint=checkpoint)
    run = load_exported(path, allow_targets, device)
    if weights not in ("ema", run.weights) or checkpoint != "latest":
        raise ValueError(
            f"{path} holds one set of weights, {run.weights}; weights= and checkpoint= choose in a folder."
        )
    return run
