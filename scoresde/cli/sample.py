"""scoresde-sample: samples from a trained run."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from ..config import ConfigError, plain
from ..train import figures
from . import folder as folders
from ._hydra import allowed, build_samplers, choice, launch, output_folder, refusing
from .model import chosen_run, set_threads
from .report import check_samplers, layout, list_files, sampling_jobs, write_samples


def main() -> None:
    """Entry point of `scoresde-sample`."""
    launch(sample, "sample")


def choose_seeds(seeds: Any, seed: Any, n: Any) -> list[int]:
    """The given list, or n consecutive ones that start at seed · n.

    Raises:
        ConfigError: seeds that are not a list of whole numbers ≥ 0, or n < 1.
    """

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if seeds is not None:
        if not isinstance(seeds, list) or not seeds or not all(whole(value, 0) for value in seeds):
            raise ConfigError(f"seeds is a list of whole numbers, one per sample, as in seeds=[0,1,2]; got {seeds!r}.")
        return seeds
    if not whole(n, 1) or not whole(seed, 0):
        raise ConfigError(f"n is at least 1 and seed at least 0, both whole numbers; got n={n!r}, seed={seed!r}.")
    return list(range(seed * n, (seed + 1) * n))


def sample(cfg: DictConfig) -> None:
    """Writes samples.npz and pictures to a new folder, prints what they cost."""
    folder = output_folder()
    with refusing():
        if not folders.fresh(folder, "summary.json"):
            return
        allow, options = allowed(cfg), plain(cfg)
        seeds = choose_seeds(options["seeds"], options["seed"], options["n"])
        set_threads(options["threads"])
        if options["pictures"]:
            figures.require()
        samplers = build_samplers(cfg, allow)
        run = chosen_run(options, allow)
        check_samplers(samplers, run.denoiser)
        shards = folders.share(folder, options, run)
    jobs = sampling_jobs(
        samplers, run.denoiser, run.dataset, seeds=seeds, conditional=run.conditional, batch_size=options["batch_size"]
    )
    for job in jobs.values():
        shards.work(job)
    if shards.rank:
        return
    made = {name: shards.result(job) for name, job in jobs.items()}
    write_samples(made, run.dataset, folder, seeds=seeds, pictures=options["pictures"])
    rows = [[name, f"{s.evaluations:.0f}", f"{s.seconds:.1f}", str(len(s.x))] for name, s in made.items()]
    record = {
        "run": str(run.folder), "step": run.step, "weights": options["weights"], "seeds": seeds,
        "samplers": {name: plain(cfg.sampler if name == choice("sampler") else cfg.samplers[name]) for name in made},
        "cost": {name: {"nfe": s.evaluations, "seconds": s.seconds} for name, s in made.items()},
    }  # fmt: skip
    folders.finish(folder / "summary.json", record)
    shards.clear()
    print(layout(("sampler", "NFE", "seconds", "samples"), rows))
    print(list_files(folder, {"samples": "samples.png", "trajectory": "trajectory.png", "arrays": "samples.npz"}))


if __name__ == "__main__":
    main()
