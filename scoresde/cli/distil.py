"""scoresde-distil: a flow map of a trained run, which draws samples in one network call or a few."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from ..config import ConfigError
from ..runs.load import chosen_run
from ._hydra import Command, launch
from .guided import build_guidance
from .plan import Lesson
from .train import train

_OF_TEACHER = ("run", "weights", "checkpoint", "guidance", "guide")


def main() -> None:
    """Entry point of `scoresde-distil`."""
    launch(distil, "distil")


def distil(cfg: DictConfig) -> float:
    """Trains as scoresde-train does, with its resume, sweeps and logs."""
    return train(cfg, lesson)


def lesson(command: Command) -> tuple[Command, Lesson]:
    """The command that trains the flow map of a run: its parts are those of the run, but what this command says.

    Raises:
        ConfigError: the run is a flow map itself or a classifier, or has parts that no flow map is made of.
        CheckpointError: the folder holds no run.
    """
    options = command.options
    run = chosen_run(options, command.allow, whole_data=True)
    if run.denoiser.told:
        raise ConfigError(
            f"run={run.folder} is a flow map already. Its own teacher can be distilled again: run="
            f"{(run.config.get('teacher') or {}).get('run', '…')}; or draw by it: scoresde-sample run={run.folder}."
        )
    node = options["loss"] if isinstance(options["loss"], dict) else {}
    if node.get("scales") and not (run.conditional and not run.always_conditional):
        raise ConfigError(
            f"loss.scales guides the teacher, and {run.folder} was not trained with and without a condition: "
            "conditional=true network.cond_dropout=0.1."
        )
    teacher = build_guidance(options, run, command.allow).denoiser
    own = {name: value for name, value in options.items() if name not in _OF_TEACHER}
    network = run.config.get("network") or {}
    if network.get("cond_dropout") and "cond_dropout" in node:  # the loss drops a condition for the teacher, too
        share = network["cond_dropout"] if node.get("cond_dropout") is None else node["cond_dropout"]
        own |= {"network": {**network, "cond_dropout": 0.0}, "loss": {**node, "cond_dropout": share}}
    told = ["end", "scale"] if node.get("scales") else ["end"]
    parts: dict[str, Any] = {
        "denoiser": {**run.config["denoiser"], "told": told},
        "teacher": {name: options[name] for name in _OF_TEACHER},
    }
    return replace(command, options={**run.config, **own, **parts}), Lesson(run, teacher)


if __name__ == "__main__":
    main()
