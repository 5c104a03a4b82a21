"""scoresde-sample: samples from a trained run, of a class or of what a measurement leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config import ConfigError, plain
from ..diffusion.denoiser import Cond
from ..evaluate import figures
from ..evaluate.conditions import told_arrays
from ..evaluate.evaluation import Samples, digest_of
from ..evaluate.report import check_samplers, layout, list_files, sampling_jobs, write_samples
from ..evaluate.restored import Method, choose_method, measured, write_restored
from ..evaluate.shards import Job, fresh, share
from ..runs import folder as folders
from ..runs.load import LoadedRun, chosen_run, set_threads
from ._hydra import allowed, build_samplers, choice, launch, output_folder, refusing
from .conditions import beside, choose_cond
from .guided import build_guidance
from .problem import Problem, read_problem


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


@dataclass(frozen=True)
class Plan:
    """What a command asks for, read and checked.

    Attributes:
        options: its configuration.
        run: the model.
        problem: what is to be restored, if that is asked.
        seeds: one per sample, of every input alike.
        cond: what each sample is told, without measurements.
        said: a sentence about that, where more is to be known.
        method: what is sampled, by what.
        facts: digests of what the configuration only names, on which the samples depend, too.
    """

    options: dict[str, Any]
    run: LoadedRun
    problem: Problem | None
    seeds: list[int]
    cond: Cond
    said: str
    method: Method
    facts: dict[str, str]


def sample(cfg: DictConfig) -> None:
    """Writes samples.npz and pictures to a new folder, prints what they cost."""
    folder = output_folder()
    with refusing():
        if not fresh(folder, "summary.json"):
            return
        plan = read_plan(cfg)
        shards = share(folder, plan.options | plan.facts, plan.run)
    if plan.said and not shards.rank:
        print(plan.said, flush=True)
    jobs = jobs_of(plan)
    for job in jobs.values():
        shards.work(job)
    if shards.rank:
        return
    made = {name: shards.result(job) for name, job in jobs.items()}
    table = write(plan, made, folder)
    shards.clear()
    print(table)
    print(list_files(folder, _FILES))


def read_plan(cfg: DictConfig) -> Plan:
    """All that is read, built and checked before the first sample.

    Raises:
        ConfigError, ValueError, TypeError, OSError, RuntimeError: something that cannot be carried out.
    """
    allow, options = allowed(cfg), plain(cfg)
    seeds = choose_seeds(options["seeds"], options["seed"], options["n"])
    set_threads(options["threads"])
    if options["pictures"]:
        figures.require()
    samplers = build_samplers(cfg, allow)
    run = chosen_run(options, allow)
    check_samplers(samplers, run.denoiser)
    denoiser, guide, whose = build_guidance(options, run, allow)
    problem = read_problem(options, run.dataset, allow)
    cond, said = choose_cond(options["cond"], len(seeds), whose, problem=problem)
    method = choose_method(
        problem, options["posterior"], denoiser, samplers, allow,
        cond=cond, n=len(seeds), batch_size=options["batch_size"],
    )  # fmt: skip
    digests = {
        "given": problem and problem.digest, "guide_checkpoint": guide,
        "told": None if cond is None else digest_of(cond),
    }  # fmt: skip
    facts = {name: digest for name, digest in digests.items() if digest}
    return Plan(options, run, problem, seeds, cond, said, method, facts)


def jobs_of(plan: Plan) -> dict[str, Job[Samples]]:
    """What is to be done, by sampler: a sample for each seed, or for each seed and input."""
    problem, seeds, cond = plan.problem, plan.seeds, plan.cond
    if problem is not None:
        seeds, cond = seeds * len(problem.inputs), beside(problem.told(len(seeds)), cond)
    return sampling_jobs(
        plan.method.samplers, plan.method.denoiser, plan.run.dataset.event_shape,
        seeds=seeds, cond=cond, batch_size=plan.method.batch_size,
    )  # fmt: skip


def write(plan: Plan, made: Mapping[str, Samples], folder: Path) -> str:
    """Arrays, pictures and at last `summary.json`. Returns a table of costs, and of how good restored samples are."""
    dataset, problem, restored = plan.run.dataset, plan.problem, {}
    if problem is None:
        write_samples(made, dataset, folder, seeds=plan.seeds, pictures=plan.options["pictures"])
    else:
        write_restored(
            problem, made, dataset, folder, cond=plan.cond, seeds=plan.seeds, pictures=plan.options["pictures"]
        )
        restored = measured(problem, made, dataset)
    folders.finish(folder / "summary.json", record_of(plan, made, restored))
    return table_of(made, restored)


def record_of(plan: Plan, made: Mapping[str, Samples], restored: Mapping[str, Any]) -> dict[str, Any]:
    """What `summary.json` holds."""
    options, problem = plan.options, plan.problem
    labels = told_arrays(plan.cond, None if problem is None else len(problem.inputs)).get("labels")
    record = {
        "run": str(plan.run.folder), "step": plan.run.step, "weights": options["weights"], "seeds": plan.seeds,
        "guidance": options["guidance"], "guide": options["guide"], "cond": options["cond"],
        "labels": None if labels is None else labels.tolist(),
        "samplers": {
            name: options["sampler"] if name == choice("sampler") else options["samplers"][name] for name in made
        },
        "cost": {name: {"nfe": s.evaluations, "seconds": s.seconds} for name, s in made.items()},
    }  # fmt: skip
    if problem is None:
        return record
    return record | {
        "problem": options["problem"], "posterior": options["posterior"], "inputs": problem.inputs,
        "mask": options["mask"], "restored": dict(restored),
    }  # fmt: skip


def table_of(made: Mapping[str, Samples], restored: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each sampler."""
    keys = list(next(iter(restored.values()), {}))
    rows = [
        [name, f"{s.evaluations:.0f}", f"{s.seconds:.1f}", str(len(s.x)), *(f"{restored[name][k]:.3g}" for k in keys)]
        for name, s in made.items()
    ]
    return layout(["sampler", "NFE", "seconds", "samples", *(_TITLES[key] for key in keys)], rows)


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
