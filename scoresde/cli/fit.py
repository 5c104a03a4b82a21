"""scoresde-fit: samplers that are fitted to a trained run, for budgets of network calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..checks import whole
from ..config import ConfigError
from ..diffusion.conditions import Cond, move
from ..diffusion.denoiser import Denoiser, model_device
from ..evaluate.shards import ranks
from ..noise.rng import Rng
from ..runs.load import chosen_run
from ..runs.progress import CallsShown
from ..runs.samplers import Model, keep
from ..sampling.fit_sampler import fit_sampler, samples_for
from ..sampling.pilot import pilot
from ._hydra import launch, read, refusing
from .conditions import choose_cond
from .guided import build_guidance


def main() -> None:
    """Entry point of `scoresde-fit`."""
    launch(fit, "fit")


def fit(cfg: DictConfig) -> None:
    """Writes samplers.json into the run's folder, one sampler after another."""
    with refusing():
        command = read(cfg)
        options = command.options
        budgets = choose_budgets(options["budgets"])
        run = chosen_run(options, command.allow)
        denoiser, guide, whose = build_guidance(options, run, command.allow)
        shape = run.dataset.event_shape
        samples = samples_for(shape) if options["samples"] is None else whole(options["samples"], "samples", 8)
        calls = whole(options["calls"], "calls")
        cond, said = choose_cond(options["cond"], samples, whose)
        model, seed = Model.of(run.digest, options, guide, cond), whole(options["seed"], "seed", 0)
    if ranks()[0]:
        return
    if said:
        print(said, flush=True)
    fit_all(run.folder, model, denoiser, shape, budgets, cond=cond, samples=samples, seed=seed, calls=calls)
    print(f"Used by scoresde-sample run={run.folder} budget=…")


def choose_budgets(budgets: Any) -> list[int]:
    """The list of a command, each a number of network calls.

    Raises:
        ConfigError, ValueError: it is none.
    """
    if not isinstance(budgets, list):
        raise ConfigError(f"A list of budgets is numbers of network calls, as in [5,10,20]; got {budgets!r}.")
    return [whole(budget, "Each budget, a number of network calls,") for budget in budgets]


def fit_all(
    folder: Path,
    model: Model,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    budgets: list[int],
    *,
    cond: Cond,
    samples: int,
    seed: int,
    calls: int,
) -> None:
    """Fits and keeps a sampler for each budget, and prints what it costs and what it gains.

    Raises:
        SolverError: the model returns values that are not finite.
    """
    cond = move(cond, model_device(denoiser))
    for budget in budgets:
        cost = calls + 3 * max(128, 6 * budget)
        print(f"Fitting a sampler of {budget} calls, by about {cost:,} calls on batches of {samples} …", flush=True)
        how: dict[str, Any] = {"rng": Rng(seed), "cond": cond, "samples": samples, "calls": calls}
        with CallsShown(denoiser, f"fitting {budget} calls, network calls", cost) as shown:
            fitted = fit_sampler(shown, budget=budget, shape=shape, **how)
        keep(folder, model, fitted)
        print(f"  {fitted}", flush=True)


def fit_or_try(
    folder: Path, model: Model, denoiser: Denoiser, shape: tuple[int, ...], budgets: list[int], *, cond: Cond
) -> None:
    """After training: fits a sampler for each budget, or, where none is asked for, chooses those of 5, 10 and 20 calls
    by a short trial (`scoresde.pilot`).

    Raises:
        SolverError: the model returns values that are not finite.
    """
    if budgets:
        fit_all(folder, model, denoiser, shape, budgets, cond=cond, samples=samples_for(shape), seed=0, calls=1100)
        return
    for found in pilot(denoiser, shape, budgets=(5, 10, 20), cond=move(cond, model_device(denoiser))).values():
        keep(folder, model, found)  # what was found is logged


if __name__ == "__main__":
    main()
