"""scoresde-sample: samples from a trained run, of a class or of what a measurement leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from ..checks import whole
from ..config import ConfigError
from ..diffusion.conditions import Cond
from ..evaluate import figures
from ..evaluate.conditions import condition_arrays
from ..evaluate.edits import Edited, write_edited
from ..evaluate.evaluation import Drawing, Samples, digest_of
from ..evaluate.problem import Problem, decoded, measured, write_restored
from ..evaluate.report import check_samplers, list_files, write_samples
from ..runs import folder as folders
from ..runs.listing import layout
from ..runs.load import chosen_run
from ..runs.run import Run
from ..runs.samplers import Model
from ..runs.stage import without
from ._hydra import Command, launch, read, refusing
from .budget import of_budget
from .cascade import chosen_cascade, stages_of
from .conditions import choose_cond
from .edit import read_edit
from .guided import build_guidance
from .problem import Method, choose_method, read_problem

_TITLES = {"residual": "residual", "std": "of noise", "psnr_mean": "PSNR of mean", "psnr_sample": "of a sample"}


def main() -> None:
    """Entry point of `scoresde-sample`."""
    launch(sample, "sample")


def draw_cascade(command: Command) -> None:
    """The same of a cascade."""
    options = command.options
    with refusing():
        seeds = choose_seeds(options["seeds"], options["seed"], options["n"])
        whole(options["batch_size"], "batch_size")
        if options["pictures"]:
            figures.require()
        cascade, samplers = chosen_cascade(options, command.allow), command.samplers()
        cond, said = choose_cond(options["cond"], len(seeds), cascade.told.plain)
        drawing, digests = stages_of(command, cascade, samplers, seeds, cond)
        shards = command.shards(cascade.whole, **digests)
    if not shards.rank:
        print("\n".join(filter(None, [str(cascade), said])), flush=True)
    made = drawing.made(shards)
    if shards.rank:
        return
    write_samples(made, cascade.dataset, command.folder, seeds=seeds, pictures=options["pictures"])
    names = ("weights", "guidance", "cond", "then", "stage", "samplers", "budget", "sampler")
    residuals = {name: drawing.residual(name) for name in made}
    measures = next(iter(residuals.values()))
    cost = {name: {"nfe": s.evaluations, "seconds": s.seconds} for name, s in made.items()}
    record = {"run": str(cascade.runs[0].folder), "steps": [run.step for run in cascade.runs], "seeds": seeds}
    record |= {name: options[name] for name in names} | {"cost": cost, "residual": residuals}
    folders.finish(command.folder / "summary.json", record)
    shards.clear()
    columns: dict[str, Sequence[Any]] = {
        "sampler": list(made),
        "network calls": [f"{samples.evaluations:.0f}" for samples in made.values()],
        "seconds": [f"{samples.seconds:.1f}" for samples in made.values()],
        "samples": [len(samples.x) for samples in made.values()],
    }
    columns |= {key: [f"{each[key]:.2g}" for each in residuals.values()] for key in measures}
    print(layout(columns, None)[0])
    if "residual" in measures:
        print("residual: the greatest distance, in raw units, from the low resolution that the last stage was told.")
    else:
        print("cosine: of the angle between the embedding of a sample and that which the decoder was told, on average.")
    print(list_files(command.folder))


def choose_seeds(seeds: Any, seed: Any, n: Any) -> list[int]:
    """The given list, or n consecutive ones that start at seed · n.

    Raises:
        ValueError: seeds that are not a list of whole numbers ≥ 0, or n < 1.
    """
    if seeds is None:
        n, seed = whole(n, "n"), whole(seed, "seed", 0)
        whole((seed + 1) * n, "(seed + 1) n, up to which the seeds of samples go,")
        return list(range(seed * n, (seed + 1) * n))
    if not isinstance(seeds, list) or not seeds:
        raise ConfigError(f"seeds is a list of whole numbers, one per sample, as in seeds=[0,1,2]; got {seeds!r}.")
    return [whole(value, f"each of seeds={seeds}", 0) for value in seeds]


def sample(cfg: DictConfig) -> None:
    """Writes samples.npz and pictures to a new folder, prints what they cost."""
    with refusing():
        command = read(cfg)
        options, allow = command.options, command.allow
        if not command.is_due("summary.json"):
            return
        if options["then"] is not None:
            return draw_cascade(command)
        seeds = choose_seeds(options["seeds"], options["seed"], options["n"])
        whole(options["batch_size"], "batch_size")
        if options["pictures"]:
            figures.require()
        run = chosen_run(options, allow)
        samplers = command.samplers(run.denoiser.told)
        check_samplers(samplers, run.denoiser)
        denoiser, guide, conditioned = build_guidance(options, run, allow)
        problem, edited = read_problem(options, run.dataset, allow), read_edit(command, run, len(seeds))
        if edited is not None and edited.edit.from_noise:
            conditioned = without(conditioned, "vector")
        cond, said = choose_cond(options["cond"], len(seeds), conditioned, problem=problem or edited)
        method, every, given = Method(denoiser, samplers, options["batch_size"]), seeds, cond
        # of what the options only name, and the samples depend on
        digests = {} if guide is None else {"guide_checkpoint": guide}
        if cond is not None:
            digests["told"] = digest_of(cond)
        if options["budget"] is not None:
            sampler, how = of_budget(command, run, denoiser, Model.of(run.digest, options, guide, cond), cond)
            _, *others = samplers.items()
            method = Method(denoiser, {f"budget-{options['budget']}": sampler, **dict(others)}, options["batch_size"])
            said, digests["sampler"] = f"{said}\n{how}".strip(), how
        if problem is not None:
            method = choose_method(
                problem, options["posterior"], method, allow, codec=run.codec, cond=cond, n=len(seeds)
            )
            every, given = seeds * len(problem.inputs), problem.condition(len(seeds), cond)
            digests["given"] = problem.digest
        if edited is not None:
            method = Method(denoiser, edited.edit.samplers(samplers, denoiser), options["batch_size"])
            check_samplers(method.samplers, denoiser)
            every, given = edited.seeds(seeds), edited.condition(cond, run.dataset)
            digests["given"] = edited.digest
        shards = command.shards(run, **digests)
    if said and not shards.rank:
        print(said, flush=True)
    start = None if edited is None or edited.edit.from_noise else edited.start
    drawing = Drawing(run.dataset.event_shape, every, given, method.batch_size, start=start)
    jobs = drawing.jobs(method.denoiser, method.samplers)
    for job in jobs.values():
        shards.work(job)
    if shards.rank:
        return
    made = {name: shards.result(job) for name, job in jobs.items()}
    table = write(command, run, problem, edited, seeds, cond, made)
    shards.clear()
    print(table)
    print(list_files(command.folder))


def write(
    command: Command,
    run: Run,
    problem: Problem | None,
    edited: Edited | None,
    seeds: list[int],
    cond: Cond,
    made: Mapping[str, Samples],
) -> str:
    """Arrays, pictures and at last `summary.json`. Returns a table of costs, and of how good restored samples are."""
    folder, options, restored = command.folder, command.options, dict[str, dict[str, float]]()
    if edited is not None:
        write_edited(edited, made, run.dataset, folder, seeds=seeds, pictures=options["pictures"])
    elif problem is None:
        write_samples(made, run.dataset, folder, seeds=seeds, pictures=options["pictures"])
    else:
        shown, pixels = decoded(run.codec, made), run.dataset.pixels
        write_restored(problem, shown, pixels, folder, cond=cond, seeds=seeds, pictures=options["pictures"])
        restored = measured(problem, shown, pixels)
    given = problem or edited
    labels = condition_arrays(cond, None if given is None else len(given.inputs)).get("labels")
    chosen, *others = made
    record = {
        "run": str(run.folder),
        "step": run.step,
        "weights": options["weights"],
        "seeds": seeds,
        **{name: options[name] for name in ("guidance", "guide", "cond")},
        "labels": None if labels is None else labels.tolist(),
        "samplers": {
            chosen: options["budget"] or options["sampler"],
            **{name: options["samplers"][name] for name in others},
        },
        "cost": {name: {"nfe": s.evaluations, "seconds": s.seconds} for name, s in made.items()},
    }
    if problem is not None:
        record |= {name: options[name] for name in ("problem", "posterior", "mask")}
        record |= {"inputs": problem.inputs, "restored": restored}
    if edited is not None:
        record |= {"edit": options["edit"], "inputs": edited.inputs}
    folders.finish(folder / "summary.json", record)
    columns: dict[str, Sequence[Any]] = {
        "sampler": list(made),
        "network calls": [f"{samples.evaluations:.0f}" for samples in made.values()],
        "seconds": [f"{samples.seconds:.1f}" for samples in made.values()],
        "samples": [len(samples.x) for samples in made.values()],
    }
    for key in next(iter(restored.values()), {}):
        columns[_TITLES[key]] = [f"{restored[name][key]:.3g}" for name in made]
    return layout(columns, None)[0]


if __name__ == "__main__":
    main()
