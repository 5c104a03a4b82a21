"""Writes solvers.md: every exported step on every SDE under every parameterisation, as they are and as they run.

    python docs/solvers.py

Orders, costs and citations are read from the steps; whether one is stochastic, and what it works with, is found out
by running it. A class that is exported appears by itself, with its default arguments, unless `ARGUMENTS` has others.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import scoresde
import scoresde.sampling
from scoresde import (
    SDE,
    Denoiser,
    GaussianMixtureDenoiser,
    Parameterization,
    Preconditioned,
    Rng,
    SolverError,
    Step,
)

ARGUMENTS = {
    "AdaptiveODE": ("1e-3, 1e-3", "1e-3, 1e-3, 'torchdiffeq'", "1e-3, 1e-3, 'scipy'"),
    "DDIM": ("", "eta=1.0"),
    "DEIS": ("order=2", "order=3", "order=4"),
    "DPMSolver": ("order=2", "order=3", "order=2, eta=1.0"),
    "DPMSolverPP": ("order=2", "order=3", "order=2, eta=1.0"),
    "EulerMaruyama": ("", "probability_flow=True"),
    "Multistep": ("order=4, sigma_data=None",),
    "PredictorCorrector": ("ReverseDiffusion(), Langevin()", "DDIM(), AnnealedLangevin()"),
    "ReverseDiffusion": ("", "probability_flow=True"),
    "SASolver": ("", "predictor=3, corrector=4, tau=0.0"),
    "UniPC": ("order=2", "order=3"),
    "TableSDE": ("sigmas=torch.logspace(-2, 1.7, 232).double()",),
}  # fmt: skip
OTHERS = ("FlowMap",)  # which solves nothing: it moves by a model that is told where it goes
LABELS = {"TableSDE": ("TableSDE, NCSN",)}

MEAN, VAR = torch.tensor([1.5, -0.5]), 0.25
SPAN = (-4.0, 7.0)  # log-SNR
HEADER = """# Solvers

Written by `python docs/solvers.py`, which runs every row; `tests/test_docs.py` fails where it is not what that writes.
A row is a step as it is typed, with its default arguments where it shows none.

- **Order**: of convergence, as the step declares it and the tests measure it: along the probability-flow ODE, or in law
  (torchsde: path by path) where there is noise. Correctors stay at their time.
- **Calls** of the network, a step; *+ n* more in a run of {steps}.
- **Noise**: whether two runs from one starting point differ.
- The column of an SDE holds ✓ where two things were found. {steps} steps from log-SNR {high:g} to {low:g} bring a
  Gaussian within half a standard deviation and a factor of 2 of its exact mean and spread. And under **each** of
  {parameterizations}
  a network that outputs the exact target leads to the same end as the exact score, to 1e-6 of its size. Where only some
  do, they are named.

"""
STEPS = 24

_INNER = r"(?:[^()]|\([^()]*\))*"  # one level of brackets inside
_YEAR = r"\b(?:19|20)\d\d[a-z]?\b"
BRACKETED = rf"\(({_INNER}{_YEAR}{_INNER})\)"
INLINE = rf"([A-Z][\w-]+ (?:et al\.|& [A-Z]\w+) {_YEAR} \([^()]*\))"


def exported(module: object, base: type) -> Iterator[tuple[str, object]]:
    """(label, object) of each class below `base` that `module` exports, in alphabetical order."""
    names = {**vars(scoresde), **vars(scoresde.sampling), "torch": torch}
    for name in sorted(module.__all__, key=str.lower):
        kind = getattr(module, name)
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind) and name not in OTHERS:
            for index, arguments in enumerate(ARGUMENTS.get(name, ("",))):
                label = LABELS[name][index] if name in LABELS else f"{name}({arguments})"
                yield label, eval(f"{name}({arguments})", names)


def exact(sde: SDE) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(MEAN[None], VAR, torch.ones(1), sde)


def oracle(denoiser: Denoiser, parameterization: Parameterization) -> Preconditioned:
    """A network whose output is the exact F* of `parameterization`."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        p = denoiser(x, t)
        return parameterization.target(p.x0, p.eps, p.scales)

    return Preconditioned(
        network, denoiser.sde, parameterization, sigma_data=denoiser.data_std, noise_input=lambda sde, t: t,
        scale_input=False,
    )  # fmt: skip


def run(step: Step, denoiser: Denoiser, steps: int, span: tuple[float, float] = SPAN, seed: int = 0) -> Tensor:
    """x at the end (64, 2), float64, of a run over `span` in log-SNR, which adaptive steps take in one.

    It starts on points with the mean and the spread of the exact law.
    """
    times = denoiser.sde.time(torch.linspace(*span, 1 + (steps if step.evaluations else 1), dtype=torch.float64))
    if step.order == 0:  # a corrector
        times = times[-1].expand(steps + 1)
    z = Rng(1).normal((64, 2), dtype=torch.float64)
    mean, std = law(denoiser.sde, times[0])
    x = mean + std * (z - z.mean(0)) / z.std(0, correction=0)
    state, rng = step.init(x), Rng(2 + seed)
    with torch.no_grad():
        for t, s in pairwise(times):
            x, state = step(denoiser, x, t, s, state, cond=None, rng=rng)
    return x


def law(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean (2,) and standard deviation () of x_t."""
    alpha, sigma = sde.marginal(t)
    return alpha * MEAN, (alpha**2 * VAR + sigma**2).sqrt()


def reaches_the_law(step: Step, sde: SDE) -> bool:
    try:
        x = run(step, exact(sde), STEPS)
    except (SolverError, ValueError):
        return False
    mean, std = law(sde, sde.time(torch.tensor(SPAN[1], dtype=torch.float64)))
    shift, ratio = (x.mean(0) - mean).abs() / std, x.std(0, correction=0) / std
    return bool((shift < 0.5).all() and (ratio > 0.5).all() and (ratio < 2).all())


def agreeing(step: Step, sde: SDE, parameterizations: Mapping[str, Parameterization]) -> list[str]:
    """The parameterisations under which four steps end where they do on the exact score."""
    names, x = [], run(step, exact(sde), 4, (-1.0, 1.0))
    for name, parameterization in parameterizations.items():
        y = run(step, oracle(exact(sde), parameterization), 4, (-1.0, 1.0))
        if bool((x - y).abs().max() <= 1e-6 * x.abs().max()):
            names.append(name)
    return names


def noisy(step: Step) -> bool:
    first, second = (run(step, exact(scoresde.VPSDE()), 4, seed=seed) for seed in (0, 1))
    return not torch.equal(first, second)


def calls(step: Step) -> str:
    """Per step, and what comes on top in a run."""
    if step.evaluations is None:
        return "adaptive"
    more = step.count(STEPS) - STEPS * step.evaluations
    return f"{step.evaluations}" + (f" + {more}" if more else "")


def described(step: Step) -> tuple[str, str]:
    """(what it does, with its formula; where that is from) of the first lines of the docstring."""
    text = " ".join(re.split(r"\n(?:Args|Attributes|Raises):", inspect.getdoc(type(step)) or "")[0].split())
    found = [part for groups in re.findall(f"{BRACKETED}|{INLINE}", text) for part in "".join(groups).split("; ")]
    # what a bracket says before it names anybody is left out
    sources = [re.sub(r"^[a-z].*?, (?=[A-Z])", "", part).rstrip(".") for part in found if re.search(_YEAR, part)]
    first = re.split(r"(?<!App)(?<!eq)(?<!alg)(?<!al)(?<!sec)[.:] (?=[A-Z(])", re.sub(BRACKETED, "", text))[0]
    first = re.sub(r" +(?=[.,:;])", "", " ".join(first.split())).rstrip(".:")
    return first.replace("|", "\\|"), "; ".join(dict.fromkeys(sources)).replace("|", "\\|") or "–"


def table() -> str:
    """The text of solvers.md."""
    sdes, parameterizations = dict(exported(scoresde, SDE)), dict(exported(scoresde, Parameterization))
    parameterizations = {name.removesuffix("()"): value for name, value in parameterizations.items()}
    columns = [
        "step",
        "order",
        "calls",
        "noise",
        *(name.removesuffix("()") for name in sdes),
        "what it does",
        "paper and equation",
    ]
    rows = [columns, ["---"] * len(columns)]
    for label, step in exported(scoresde.sampling, Step):
        cells = []
        for sde in sdes.values():
            names = agreeing(step, sde, parameterizations) if reaches_the_law(step, sde) else []
            cells.append("✓" if len(names) == len(parameterizations) else ", ".join(names) or "–")
        order = f"{step.order:g}" if step.order else "corrector"
        rows.append([f"`{label}`", order, calls(step), "yes" if noisy(step) else "no", *cells, *described(step)])
    header = HEADER.format(steps=STEPS, high=SPAN[0], low=SPAN[1],
                           parameterizations=", ".join(f"`{name}`" for name in parameterizations))  # fmt: skip
    return header + "".join("| " + " | ".join(row) + " |\n" for row in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(__file__).with_suffix(".md").write_text(table(), encoding="utf-8")
