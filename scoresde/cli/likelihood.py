"""scoresde-likelihood: held-out bits/dim of a trained run."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from omegaconf import DictConfig

from ..config import build, plain
from ..evaluate.evaluation import choose_split, evenly_spaced
from ..evaluate.shards import fresh, share
from ..runs import folder as folders
from ..runs.load import chosen_run, set_threads
from ._hydra import allowed, launch, output_folder, refusing


def main() -> None:
    """Entry point of `scoresde-likelihood`."""
    launch(likelihood, "likelihood")


def likelihood(cfg: DictConfig) -> float:
    """Writes likelihood.json and the value of each point; returns the mean for sweepers (NaN on ranks above 0)."""
    folder = output_folder()
    with refusing():
        if not fresh(folder, "likelihood.json"):
            return float("nan")
        allow, options = allowed(cfg), plain(cfg)
        set_threads(options["threads"])
        measure = build(cfg.likelihood, allow)
        run = chosen_run(options, allow)
        index = evenly_spaced(len(choose_split(run.dataset, options["split"])), options["n"])
        shards = share(folder, options, run)
    job = measure.job(
        run.denoiser, run.dataset, split=options["split"], points=options["n"], seed=options["seed"],
        conditional=run.conditional,
    )  # fmt: skip
    if shards.rank:
        shards.work(job)
        return float("nan")
    bits = shards.result(job)
    record = {
        "run": str(run.folder), "step": run.step, "weights": options["weights"], "split": options["split"],
        "seed": options["seed"], "likelihood": options["likelihood"],
        **{name: value for name, value in asdict(bits).items() if name != "values"},
    }  # fmt: skip
    np.savez_compressed(folder / "bits_per_dim.npz", index=index.numpy(), bits_per_dim=bits.values.numpy())
    folders.finish(folder / "likelihood.json", record)
    shards.clear()
    print(
        f"{bits.mean:.4f} ± {bits.stderr:.4f} bits/dim on {bits.points} points of {options['split']} "
        f"({bits.evaluations:.0f} evaluations, {bits.seconds:.1f} s). Values in {folder}"
    )
    return bits.mean


if __name__ == "__main__":
    main()
