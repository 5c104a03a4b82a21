"""scoresde-sample: samples from a trained run, of a class or of what a measurement leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..checks import whole
from ..config import ConfigError
from ..diffusion.denoiser import Cond
from ..evaluate import figures
from ..evaluate.conditions import condition_arrays
from ..evaluate.evaluation import Drawing, Samples, digest_of
from ..evaluate.problem import Problem
from ..evaluate.report import check_samplers, list_files, write_samples
from ..evaluate.restored import measured, write_restored
from ..evaluate.shards import Job
from ..runs import folder as folders
from ..runs.listing import layout
from ..runs.load import LoadedRun, chosen_run
from ._hydra import Command, launch, read, refusing
from .conditions import choose_cond
from .guided import build_guidance
from .problem import Method, choose_method, read_problem

_TITLES = {"residual": "residual", "std": "of noise", "psnr_mean": "PSNR of mean", "psnr_sample": "of a sample"}


def main() -> None:
    """Entry point of `scoresde-sample`."""
    launch(sample, "sample")


def choose_seeds(seeds: Any, seed: Any, n: Any) -> list[int]:
    """The given list, or n consecutive ones that start at seed · n.

    Raises:
        ValueError: seeds that are not a list of whole numbers ≥ 0, or n < 1.
    """
    if seeds is None:
        n, seed = whole(n, "n"), whole(seed, "seed", 0)
        return list(range(seed * n, (seed + 1) * n))
    if not isinstance(seeds, list) or not seeds:
        raise ConfigError(f"seeds is a list of whole numbers, one per sample, as in seeds=[0,1,2]; got {seeds!r}.")
    return [whole(value, f"each of seeds={seeds}", 0) for value in seeds]


@dataclass(frozen=True)
class Plan:
    """What a command asks for, read and checked.

    Attributes:
        options: its values by key.
        run: the model.
        problem: what is to be restored, if that is asked.
        seeds: one per sample, of every input alike.
        cond: the condition of each sample, without measurements.
        said: a sentence about that, where there is more to know.
        method: what is sampled, by what.
        digests: of what the options only name and the samples depend on.
    """

    options: dict[str, Any]
    run: LoadedRun
    problem: Problem | None
    seeds: list[int]
    cond: Cond
    said: str
    method: Method
    digests: dict[str, str]

    @property
    def inputs(self) -> int | None:
        """Number of inputs of the problem, None where there is none."""
        return None if self.problem is None else len(self.problem.inputs)


def sample(cfg: DictConfig) -> None:
    """Writes samples.npz and pictures to a new folder, prints what they cost."""
    with refusing():
        command = read(cfg)
        if not command.is_due("summary.json"):
            return
        plan = make_plan(command)
        shards = command.shards(plan.run, **plan.digests)
    if plan.said and not shards.rank:
        print(plan.said, flush=True)
    jobs = jobs_of(plan)
    for job in jobs.values():
        shards.work(job)
    if shards.rank:
        return
    made = {name: shards.result(job) for name, job in jobs.items()}
    table = write(plan, made, command.folder)
    shards.clear()
    print(table)
    print(list_files(command.folder))


def make_plan(command: Command) -> Plan:
    """Reads, builds and checks everything before the first sample.

    Raises:
        ConfigError, ValueError, TypeError, OSError, RuntimeError: something that cannot be carried out.
    """
    options, allow = command.options, command.allow
    seeds = choose_seeds(options["seeds"], options["seed"], options["n"])
    if options["pictures"]:
        figures.require()
    samplers = command.samplers()
    run = chosen_run(options, allow)
    check_samplers(samplers, run.denoiser)
    denoiser, guide, whose = build_guidance(options, run, allow)
    problem = read_problem(options, run.dataset, allow)
    cond, said = choose_cond(options["cond"], len(seeds), whose, problem=problem)
    method = Method(denoiser, samplers, options["batch_size"])
    if problem is not None:
        method = choose_method(problem, options["posterior"], method, allow, cond=cond, n=len(seeds))
    digests = {
        "given": None if problem is None else problem.digest,
        "guide_checkpoint": guide,
        "told": None if cond is None else digest_of(cond),
    }
    known = {name: digest for name, digest in digests.items() if digest}
    return Plan(options, run, problem, seeds, cond, said, method, known)


def jobs_of(plan: Plan) -> dict[str, Job[Samples]]:
    """The work by sampler: a sample for each seed, or for each seed and input."""
    seeds, cond, method = plan.seeds, plan.cond, plan.method
    if plan.problem is not None:
        cond = plan.problem.condition(len(seeds), cond)
        seeds = seeds * len(plan.problem.inputs)
    drawing = Drawing(plan.run.dataset.event_shape, seeds, cond, method.batch_size)
    return drawing.jobs(method.denoiser, method.samplers)


def write(plan: Plan, made: Mapping[str, Samples], folder: Path) -> str:
    """Arrays, pictures and at last `summary.json`. Returns a table of costs, and of how good restored samples are."""
    dataset, problem, pictures, restored = plan.run.dataset, plan.problem, plan.options["pictures"], {}
    if problem is None:
        write_samples(made, dataset, folder, seeds=plan.seeds, pictures=pictures)
    else:
        write_restored(problem, made, dataset, folder, cond=plan.cond, seeds=plan.seeds, pictures=pictures)
        restored = measured(problem, made, dataset)
    folders.finish(folder / "summary.json", record_of(plan, made, restored))
    return table_of(made, restored)


def record_of(plan: Plan, made: Mapping[str, Samples], restored: Mapping[str, Any]) -> dict[str, Any]:
    """What `summary.json` holds."""
    options, labels = plan.options, condition_arrays(plan.cond, plan.inputs).get("labels")
    chosen, *others = made
    record = {
        "run": str(plan.run.folder),
        "step": plan.run.step,
        "weights": options["weights"],
        "seeds": plan.seeds,
        **{name: options[name] for name in ("guidance", "guide", "cond")},
        "labels": None if labels is None else labels.tolist(),
        "samplers": {chosen: options["sampler"], **{name: options["samplers"][name] for name in others}},
        "cost": {name: {"nfe": s.evaluations, "seconds": s.seconds} for name, s in made.items()},
    }
    if plan.problem is None:
        return record
    own = {name: options[name] for name in ("problem", "posterior", "mask")}
    return record | own | {"inputs": plan.problem.inputs, "restored": dict(restored)}


def table_of(made: Mapping[str, Samples], restored: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each sampler."""
    columns: dict[str, Sequence[Any]] = {
        "sampler": list(made),
        "NFE": [f"{samples.evaluations:.0f}" for samples in made.values()],
        "seconds": [f"{samples.seconds:.1f}" for samples in made.values()],
        "samples": [len(samples.x) for samples in made.values()],
    }
    for key in next(iter(restored.values()), {}):
        columns[_TITLES[key]] = [f"{restored[name][key]:.3g}" for name in made]
    return layout(columns, None)[0]


if __name__ == "__main__":
    main()
