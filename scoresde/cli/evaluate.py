"""scoresde-evaluate: the whole final report of a trained run, again or with other samplers."""

from __future__ import annotations

from omegaconf import DictConfig

from ..evaluate import figures
from ..evaluate.evaluation import held_out_loss
from ..evaluate.report import Evaluation, Report, check_samplers, list_files
from ..runs.load import build_loss, chosen_run
from ..runs.logger import NullLogger
from ._hydra import launch, read, refusing


def main() -> None:
    """Entry point of `scoresde-evaluate`."""
    launch(evaluate, "evaluate")


def evaluate(cfg: DictConfig) -> float:
    """Writes samples, pictures and a summary to a new folder; returns the objective (NaN on ranks above 0)."""
    with refusing():
        command = read(cfg)
        folder, options, allow = command.folder, command.options, command.allow
        if not command.is_due("summary.json"):
            return float("nan")
        evaluation = Evaluation(**options["evaluation"])
        if evaluation.pictures:
            figures.require()
        samplers, likelihood = command.samplers(), command.build("likelihood")
        run = chosen_run(options, allow, whole_data=True)
        check_samplers(samplers, run.denoiser)
        loss = build_loss(run.config, run.denoiser, allow)
        shards = command.shards(run)
    report = Report(run.denoiser, run.dataset, run.conditional, samplers, likelihood, evaluation, seed=options["seed"])
    measured = report.measure(shards)
    if measured is None:
        return float("nan")
    value = held_out_loss(loss, run.dataset, conditional=run.conditional)
    facts = {"folder": str(folder), "run": str(run.folder), "step": run.step, "weights": options["weights"]}
    summary = report.write(*measured, folder, facts | {"loss": value}, NullLogger())
    shards.clear()
    print(list_files(folder))
    return summary["bits_per_dim"]["mean"] if evaluation.objective == "bits_per_dim" else value


if __name__ == "__main__":
    main()
