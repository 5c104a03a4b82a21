"""scoresde-evaluate: the whole final report of a trained run, again or with other samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..config import ConfigError, build
from ..data.kinds import in_turn
from ..evaluate import figures
from ..evaluate.cascade import CascadeReport, OfCascade
from ..evaluate.evaluation import evenly_spaced, held_out_loss
from ..evaluate.report import Evaluation, Report, check_samplers, list_files
from ..evaluate.scoring import Scoring, check_rank
from ..runs.load import choose_device, chosen_run
from ..runs.objective import build_loss
from ..runs.run import Run
from ._hydra import Command, launch, read, refusing
from .cascade import chosen_cascade, stages_of
from .given import with_given


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
        if options["then"] is not None:
            return evaluate_cascade(command, evaluation)
        likelihood, logger = command.build("likelihood"), command.build("logger")
        run = with_given(command, chosen_run(options, allow, whole_data=options["data"] is None))
        samplers = command.samplers(run.denoiser.told)
        evenly_spaced(len(run.dataset.test), evaluation.points, "evaluation.points")
        likelihood.job(run.denoiser, run.dataset, seed=options["seed"])  # refused now, not after the samples
        versus = compared(run, options, allow)
        for each in filter(None, (run, versus)):
            check_samplers(samplers, each.denoiser)
        scoring = scoring_of(command).tried(run.dataset, evaluation.samples)
        check_rank(evaluation.rank_by, [*["sliced-W2"] * (len(run.raw_shape) == 1), *scoring.names])
        loss = build_loss(run.config, run.denoiser, allow)
        digests = {"points": run.dataset.test.digest()} | ({} if versus is None else {"versus": versus.digest})
        shards = command.shards(run, **digests)
    model = (run.denoiser, run.dataset, run.conditional)
    report = Report(*model, samplers, likelihood, evaluation, seed=options["seed"], scoring=scoring, versus=versus)
    measured = report.measure(shards)
    if measured is None:
        return float("nan")
    value = held_out_loss(loss, run.dataset, conditional=run.conditional)
    facts = {"folder": str(folder), "run": str(run.folder), "step": run.step, "weights": options["weights"]}
    with command.logging(logger):
        summary = report.write(*measured, folder, facts | {"loss": value}, logger)
        for name in ("samples", "trajectory") if evaluation.pictures else ():
            logger.image(f"eval/{name}", folder / f"{name}.png", step=run.step, images=0)
    shards.clear()
    print(list_files(folder))
    return summary["bits_per_dim"]["mean"] if evaluation.objective == "bits_per_dim" else value


def evaluate_cascade(command: Command, evaluation: Evaluation) -> float:
    """The same of a cascade, which has no loss."""
    options = command.options
    with refusing():
        if evaluation.objective != "bits_per_dim":
            raise ConfigError(
                "A cascade has a loss for each stage and none of its own: evaluation.objective=bits_per_dim."
            )
        cascade = chosen_cascade(options, command.allow, whole_data=options["data"] is None)
        likelihood, logger = OfCascade(command.build("likelihood"), cascade), command.build("logger")
        run = with_given(command, cascade.whole)
        evenly_spaced(len(run.dataset.test), evaluation.points, "evaluation.points")
        seeds = [options["seed"] * evaluation.samples + k for k in range(evaluation.samples)]
        cond, how = in_turn(run.dataset, len(seeds), run.conditional), {**options, "batch_size": evaluation.batch_size}
        stages, digests = stages_of(replace(command, options=how), cascade, command.samplers(), seeds, cond)
        scoring = scoring_of(command).tried(run.dataset, evaluation.samples)
        check_rank(evaluation.rank_by, scoring.names)
        shards = command.shards(run, points=run.dataset.test.digest(), **digests)
    model = (run.denoiser, run.dataset, run.conditional)
    samplers = stages.samplers[-1]
    report = CascadeReport(
        *model, samplers, likelihood, evaluation, seed=options["seed"], scoring=scoring, stages=stages
    )
    measured = report.measure(shards)
    if measured is None:
        return float("nan")
    facts = {"folder": str(command.folder), "run": str(cascade.runs[0].folder), "then": options["then"]}
    facts |= {"step": run.step, "weights": options["weights"]}
    with command.logging(logger):
        summary = report.write(*measured, command.folder, facts, logger)
    shards.clear()
    print(list_files(command.folder))
    return summary["bits_per_dim"]["mean"]


def compared(run: Run, options: Mapping[str, Any], allow: Sequence[str]) -> Run | None:
    """The run of versus=….

    Raises:
        ValueError: its samples are of another kind than those of the first.
    """
    if options["versus"] is None:
        return None
    other = chosen_run({**options, "run": options["versus"]}, allow)
    kinds = [f"samples of shape {each.event_shape} by {each.codec}" for each in (run, other)]
    if (run.event_shape, run.codec) != (other.event_shape, other.codec):
        raise ValueError(f"versus={other.folder} makes {kinds[1]}; run={run.folder} makes {kinds[0]}: not comparable.")
    return other


def scoring_of(command: Command) -> Scoring:
    """The metrics of the command line, and the features that they are of.

    Raises:
        ConfigError: one of them cannot be built.
    """
    nodes = command.options["metrics"]
    for name, node in nodes.items() if isinstance(nodes, dict) else [("", nodes)]:
        if not isinstance(node, dict):
            key = f"metrics.{name}".rstrip(".")
            raise ConfigError(
                f"{key} is a mapping with _target_, as in +metrics.mine._target_=my.metric; got {node!r}."
            )
    # a metric is a function, and its keys are keyword arguments of it
    metrics = {
        name: build({**node, "_partial_": True}, command.allow, key=f"metrics.{name}") for name, node in nodes.items()
    }
    settings = {"features": command.options["features"], **nodes}
    optional = HydraConfig.get().runtime.choices["metrics"] == "default"
    features = command.build("features").to(choose_device(command.options["device"]))
    return Scoring(metrics, features, settings, optional)


if __name__ == "__main__":
    main()
