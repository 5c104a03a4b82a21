"""scoresde-likelihood: held-out bits/dim of a trained run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from ..config import build, plain
from ..train.evaluation import choose_split, spread
from . import folder as folders
from ._hydra import allowed, launch, output_folder, refusing
from .model import load_run, set_threads


def main() -> None:
    """Entry point of `scoresde-likelihood`."""
    launch(likelihood, "likelihood")


def likelihood(cfg: DictConfig) -> float:
    """Writes likelihood.json and the value of each point; returns the mean for sweepers."""
    folder = output_folder()
    with refusing():
        folders.fresh(folder)
        allow, options = allowed(cfg), plain(cfg)
        set_threads(options["threads"])
        measure = build(cfg.likelihood, allow)
        run = load_run(Path(cfg.run), allow=allow, device=options["device"], weights=options["weights"])
        index = spread(len(choose_split(run.dataset, options["split"])), options["n"])
    bits = measure(
        run.denoiser, run.dataset, split=options["split"], points=options["n"], seed=options["seed"],
        conditional=run.conditional,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "run": str(run.folder), "step": run.step, "weights": options["weights"], "split": options["split"],
        "seed": options["seed"], "estimator": "probability-flow ODE", "likelihood": options["likelihood"],
        **{name: value for name, value in asdict(bits).items() if name != "values"},
    }  # fmt: skip
    (folder / "likelihood.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "bits_per_dim.npz", index=index.numpy(), bits_per_dim=bits.values.numpy())
    print(
        f"{bits.mean:.4f} ± {bits.stderr:.4f} bits/dim on {bits.points} points of {options['split']} "
        f"({bits.evaluations:.0f} evaluations, {bits.seconds:.1f} s). Values in {folder}"
    )
    return bits.mean


if __name__ == "__main__":
    main()
