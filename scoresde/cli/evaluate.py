"""scoresde-evaluate: the whole final report of a trained run, again or with other samplers."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ..config import build, plain
from ..train import NullLogger, figures, held_out_loss
from . import folder as folders
from ._hydra import allowed, build_samplers, launch, output_folder, refusing
from .model import load_run, set_threads
from .report import Evaluation, check_samplers, list_files, report


def main() -> None:
    """Entry point of `scoresde-evaluate`."""
    launch(evaluate, "evaluate")


def evaluate(cfg: DictConfig) -> float:
    """Writes samples, pictures, summary.json and summary.md to a new folder; returns the objective."""
    folder = output_folder()
    with refusing():
        folders.fresh(folder)
        allow, options = allowed(cfg), plain(cfg)
        set_threads(options["threads"])
        evaluation = Evaluation(**options["evaluation"])
        if evaluation.pictures:
            figures.require()
        samplers = build_samplers(cfg, allow)
        likelihood = build(cfg.likelihood, allow)
        run = load_run(Path(cfg.run), allow=allow, device=options["device"], weights=options["weights"])
        check_samplers(samplers, run.denoiser)
        loss = build(run.config["loss"], allow, key="loss", denoiser=run.denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    value = held_out_loss(loss, run.dataset, conditional=run.conditional)
    facts = {
        "folder": str(folder),
        "run": str(run.folder),
        "step": run.step,
        "weights": options["weights"],
        "loss": value,
    }
    summary = report(
        run.denoiser, run.dataset, samplers, likelihood, evaluation=evaluation, seed=options["seed"],
        conditional=run.conditional, folder=folder, facts=facts, logger=NullLogger(),
    )  # fmt: skip
    files = {"samples": "samples.png", "trajectory": "trajectory.png", "arrays": "samples.npz", "summary": "summary.md"}
    print(list_files(folder, files))
    return summary["bits_per_dim"]["mean"] if evaluation.objective == "bits_per_dim" else value


if __name__ == "__main__":
    main()
