"""scoresde-sample: samples from a trained run, of a class or of what a measurement leaves open."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from ..config import ConfigError, plain
from ..train import figures
from ..train.evaluation import digest_of
from . import folder as folders
from ._hydra import allowed, build_samplers, choice, launch, output_folder, refusing
from .conditions import beside, by_name, choose_cond
from .guided import build_guidance
from .model import chosen_run, set_threads
from .problem import read_problem
from .report import check_samplers, layout, list_files, sampling_jobs, write_samples
from .restored import Method, choose_method, measured, write_restored


def main() -> None:
    """Entry point of `scoresde-sample`."""
    launch(sample, "sample")


def choose_seeds(seeds: Any, seed: Any, n: Any) -> list[int]:
    """The given list, or n consecutive ones that start at seed · n.

    Raises:
        ConfigError: seeds that are not a list of whole numbers ≥ 0, or n < 1.
    """
    if seeds is not None:
        if not isinstance(seeds, list) or not seeds or not all(_whole(value, 0) for value in seeds):
            raise ConfigError(f"seeds is a list of whole numbers, one per sample, as in seeds=[0,1,2]; got {seeds!r}.")
        return seeds
    if not _whole(n, 1) or not _whole(seed, 0):
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
        denoiser, guide = build_guidance(options, run, allow)
        problem = read_problem(options, run.dataset, allow)
        own, inputs = len(seeds), 1 if problem is None else len(problem.inputs)
        cond, said = choose_cond(options["cond"], own, run, inputs=problem and problem.inputs)
        method = Method(denoiser, samplers, options["batch_size"])
        if problem is not None:
            method = choose_method(
                problem, options["posterior"], denoiser, samplers, allow, n=own, batch_size=options["batch_size"]
            )
        given = {
            "given": problem and problem.digest, "guide_checkpoint": guide, "told": cond is not None and digest_of(cond)
        }  # fmt: skip
        shards = folders.share(folder, options | {name: value for name, value in given.items() if value}, run)
    if said and not shards.rank:
        print(said, flush=True)
    jobs = sampling_jobs(
        method.samplers, method.denoiser, run.dataset.event_shape, seeds=seeds * inputs,
        cond=cond if problem is None else beside(problem.told(own), cond), batch_size=method.batch_size,
    )  # fmt: skip
    for job in jobs.values():
        shards.work(job)
    if shards.rank:
        return
    made = {name: shards.result(job) for name, job in jobs.items()}
    columns = ["sampler", "NFE", "seconds", "samples"]
    rows = [[name, f"{s.evaluations:.0f}", f"{s.seconds:.1f}", str(len(s.x))] for name, s in made.items()]
    labels = by_name(cond).get("label")
    record = {
        "run": str(run.folder), "step": run.step, "weights": options["weights"], "seeds": seeds,
        "guidance": options["guidance"], "cond": options["cond"], "labels": None if labels is None else labels.tolist(),
        "samplers": {name: plain(cfg.sampler if name == choice("sampler") else cfg.samplers[name]) for name in made},
        "cost": {name: {"nfe": s.evaluations, "seconds": s.seconds} for name, s in made.items()},
    }  # fmt: skip
    if problem is None:
        write_samples(made, run.dataset, folder, seeds=seeds, pictures=options["pictures"])
    else:
        write_restored(problem, made, run.dataset, folder, seeds=seeds, pictures=options["pictures"])
        quality = measured(problem, made, run.dataset)
        record |= {
            "problem": options["problem"], "posterior": options["posterior"], "inputs": problem.inputs,
            "mask": options["mask"], "restored": quality,
        }  # fmt: skip
        keys = list(next(iter(quality.values())))
        columns += [_TITLES[key] for key in keys]
        rows = [[*row, *(f"{quality[row[0]][key]:.3g}" for key in keys)] for row in rows]
    folders.finish(folder / "summary.json", record)
    shards.clear()
    print(layout(columns, rows))
    print(list_files(folder, _FILES))


_TITLES = {
    "residual": "residual", "std": "of noise", "psnr_mean": "PSNR of mean", "psnr_sample": "of a sample"
}  # fmt: skip
_FILES = {
    "restored": "restored.png", "samples": "samples.png", "trajectory": "trajectory.png", "arrays": "samples.npz"
}  # fmt: skip


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


if __name__ == "__main__":
    main()
