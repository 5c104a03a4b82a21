"""All solvers on one trained network: distance to the end of its probability-flow ODE, and what the samples are worth.

Every solver starts from the same x_T, in float64 around the network, and ends at t_min with what noise is left there.
The noises come in sets; a standard error is the jackknife's over sets (Efron & Stein 1981), of ratios too, whose two
sides share their noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import guidance
import torch
import torch.nn.functional as F
from quality import Method, others, stepping
from recipes import facts, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import scoresde as S
from scoresde.data import Dataset
from scoresde.diffusion.conditions import take
from scoresde.diffusion.denoiser import DenoiserWrapper
from scoresde.metrics import frechet_distance, sliced_w2
from scoresde.runs.logger import provenance

SETS = 4
FINALISTS = 3  # methods of each library that are measured on all noises
REFERENCE = 500  # network calls of the reference, about


class Bound(DenoiserWrapper):
    """A network with a condition for every row, in its own precision, answering in that of x; it counts its samples."""

    def __init__(self, denoiser: S.Denoiser, cond: S.Cond, seen: Callable[[int], object]):
        super().__init__(denoiser)
        self.cond, self.seen, self.calls = cond, seen, 0
        self.dtype = next(denoiser.parameters()).dtype

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: S.Cond = None) -> S.Prediction:
        self.calls += 1
        self.seen(len(x))
        own = take(self.cond, slice(len(x))) if cond is None else cond
        found = self.denoiser(x.to(self.dtype), t, own)
        return S.Prediction(found.x0.to(x.dtype), found.eps.to(x.dtype), self.sde.at(t, x))


class Estimate(NamedTuple):
    value: float
    error: float

    def __str__(self) -> str:
        """The value to the digit that its error reaches."""
        if not (self.error > 0 and math.isfinite(self.value)):
            return f"{self.value:.3g}"
        power = math.floor(math.log10(self.error))
        if power < -3:
            scale = math.floor(math.log10(abs(self.value))) if self.value else power
            return f"{self.value / 10**scale:.{max(scale - power, 0)}f}e{scale} ± {self.error:.0e}"
        return f"{self.value:.{max(-power, 0)}f} ± {self.error:.{max(-power, 0)}f}"


def jackknife(statistic: Callable[[Tensor], float], n: int) -> Estimate:
    """A function of the rows (indices of 0 … n − 1), and its standard error over `SETS` equal sets of them."""
    sets = torch.arange(n).chunk(SETS)
    without = torch.tensor([statistic(torch.cat(sets[:k] + sets[k + 1 :])) for k in range(SETS)], dtype=torch.float64)
    return Estimate(statistic(torch.arange(n)), float(((SETS - 1) * without.var(correction=0)).sqrt()))


def rms(squares: Tensor) -> float:
    return float(squares.mean().sqrt())


class Result(NamedTuple):
    """Of one method at one budget: mean square per dimension of every sample's distance to its end, and the samples."""

    method: str
    squares: Tensor
    x: Tensor
    commit: str | None

    @property
    def error(self) -> Estimate:
        return jackknife(lambda rows: rms(self.squares[rows]), len(self.squares))

    def over(self, other: Result) -> Estimate:
        """The ratio of the errors."""
        return jackknife(lambda rows: rms(self.squares[rows]) / rms(other.squares[rows]), len(self.squares))


class Case:
    """One network and its reference.

    Args:
        name: of the recipe.
        folder: of the weights.
        noises: in each of the `SETS` sets.
        bar: counts samples that went through the network.

    Attributes:
        rtol: of the reference: 1e-8 below 64 dimensions, else 1e-6.
        exact: (N, *event), its ends; kept in `folder`. Below 64 dimensions the network runs in float64, for all.
        gap: RMS distance to a solve at 10 rtol, of which the reference's own error is about a tenth.
        key: of the name, the weights and the noises, in the names of files.
    """

    def __init__(self, name: str, folder: Path, noises: int, bar: tqdm):
        model, self.shape, self.conditions = load(name, folder)
        self.name, self.folder, self.n = name, folder, SETS * noises
        self.spread = float(facts(name, folder)["spread"])
        self.dims = math.prod(self.shape)
        self.model, self.rtol = (model.double(), 1e-8) if self.dims < 64 else (model, 1e-6)
        self.cond, self.seen = self.conditions(self.n), bar.update
        self.x = torch.cat([
            model.prior_sample((noises, *self.shape), rng=S.Rng(100 + k), dtype=torch.float64) for k in range(SETS)
        ])  # fmt: skip
        tensors = [*(value for _, value in sorted(self.model.state_dict().items())), self.x]
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in tensors)).hexdigest()[:12]
        self.key = f"{name}-{digest}-{self.n}-{self.rtol:g}"
        self.exact, loose = self._reference()
        self.gap = rms((self.exact - loose).square())

    def _reference(self) -> tuple[Tensor, Tensor]:
        path = self.folder / "references" / f"{self.key}.safetensors"
        if not path.is_file():
            bound, sde = Bound(self.model, self.cond, self.seen), self.model.sde
            t, s = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
            made = {
                key: S.AdaptiveODE(rtol, rtol).move(bound, self.x, t, s, cond=self.cond)
                for key, rtol in (("exact", self.rtol), ("loose", 10 * self.rtol))
            }
            path.parent.mkdir(exist_ok=True)
            save_file(made, path)
        ends = load_file(path)
        return ends["exact"], ends["loose"]

    def run(self, method: Method, budget: int, n: int) -> Result | None:
        """Over the first n noises; None where the method cannot keep to the budget, or fails."""
        denoiser = Bound(self.model, self.cond, self.seen)
        torch.manual_seed(0)
        try:
            x = method.solve(denoiser, self.x[:n], budget)
        except S.SolverError:
            return None
        if x is None or not bool(torch.isfinite(x).all()):
            return None
        assert denoiser.calls <= budget, (method.name, denoiser.calls, budget)
        return Result(method.name, (x - self.exact[:n]).square().flatten(1).mean(1), x, provenance()["commit"])


class Measured:
    """The results at one budget, in a file beside the references, so that a comparison goes on where it was stopped.

    Args:
        case: whose they are.
        budget: network calls.
        again: groups to forget.

    Attributes:
        best: group -> the best of the group.
        ranked: group -> names of its methods, the best first. A group has a place there once it has been measured.
    """

    def __init__(self, case: Case, budget: int, again: Sequence[str]):
        self.path = case.folder / "measured" / f"{case.key}-{budget}.safetensors"
        self.best: dict[str, Result] = {}
        self.ranked: dict[str, list[str]] = {}
        if not self.path.is_file():
            return
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            noted = json.loads(file.metadata()["groups"])
        for group in noted.keys() - set(again):
            self.ranked[group], commit = noted[group]
            if f"{group}/x" in tensors:
                found = tensors[f"{group}/squares"], tensors[f"{group}/x"]
                self.best[group] = Result(self.ranked[group][0], *found, commit)

    def add(self, group: str, names: Sequence[str], results: Sequence[Result | None]) -> None:
        """The best of the results of a group whose methods have these names, the best first; and writes the file."""
        there = sorted((r for r in results if r is not None), key=lambda r: rms(r.squares))
        best = [there[0].method] if there else []
        self.ranked[group] = [*best, *(name for name in names if name not in best)]
        self.best |= {group: there[0]} if there else {}
        tensors = {f"{group}/{k}": v for group, r in self.best.items() for k, v in (("squares", r.squares), ("x", r.x))}
        commits = {group: result.commit for group, result in self.best.items()}
        noted = {group: (names, commits.get(group)) for group, names in self.ranked.items()}
        self.path.parent.mkdir(exist_ok=True)
        save_file(tensors, self.path, {"groups": json.dumps(noted)})


def default(case: Case, budget: int) -> Method:
    """`sample(budget=)`, which has tried samplers on the network before, from noises of its own."""
    denoiser = Bound(case.model, None, case.seen)
    tried = S.pilot(denoiser, case.shape, budgets=[budget], cond=case.conditions(64))[budget]
    return Method("default", "sample(budget=)", False, lambda denoiser, x, _: tried.sampler(denoiser, x))


def fit_samples(dims: int) -> int:
    return min(max(4096 // dims, 16), 512)


def fitted(case: Case, budget: int) -> Method:
    """The sampler that is fitted to the network, on noises of its own."""
    samples = fit_samples(case.dims)
    denoiser, rng = Bound(case.model, None, case.seen), S.Rng(77)
    made = S.fit_sampler(
        denoiser, budget=budget, shape=case.shape, cond=case.conditions(samples), samples=samples, rng=rng
    )
    name = "fit_sampler" if made.is_fitted else "fit_sampler: the generic one"
    return Method("fitted", name, False, lambda denoiser, x, _: made.sampler(denoiser, x))


def named(c: float) -> list[Method]:
    """Our steps by name on our grids, told the spread of the data."""
    grids: dict[str, S.Grid] = {
        "LogSNR": S.LogSNRGrid(), "Karras": S.KarrasGrid(), "Uniform": S.UniformGrid(),
        "Logistic 1.5": S.LogisticGrid(c, 0.25, 1.5), "Logistic 2.5": S.LogisticGrid(c, 0.25, 2.5),
    }  # fmt: skip
    steps: dict[str, S.Step] = {
        "DDIM": S.DDIM(), "DPM++2": S.DPMSolverPP(2), "DPM++3": S.DPMSolverPP(3), "UniPC2": S.UniPC(2),
        "UniPC3": S.UniPC(3), "DEIS2": S.DEIS(2), "DEIS3": S.DEIS(3), "Adams3": S.Adams(3), "Adams3,3": S.Adams(3, 3),
        "Multistep2": S.Multistep(2, sigma_data=c), "Multistep3": S.Multistep(3, sigma_data=c),
        "Multistep2,3": S.Multistep(2, sigma_data=c, corrector=3),
        "Multistep3,4": S.Multistep(3, sigma_data=c, corrector=4),
    }  # fmt: skip
    return [
        Method("DDIM" if step == "DDIM" else "named", f"{step} {grid}", False, stepping(made, grids[grid]))
        for step, made in steps.items()
        for grid in grids
    ]


def methods(c: float) -> dict[str, list[Method]]:
    """All that are screened, by the group of which the best counts. An adaptive solver has no budget to keep to."""
    groups: dict[str, list[Method]] = {}
    for method in [*others(), *named(c)]:
        if not method.noisy and method.name != "dpm_adaptive":
            groups.setdefault(method.library, []).append(method)
    return groups


def compare(case: Case, budgets: list[int], fit: list[int], again: Sequence[str]) -> dict[int, dict[str, Result]]:
    """budget -> group -> the best of the group; "default" is `sample(budget=)`, "fitted" what
    `fit_sampler` makes at the budgets in `fit`.

    All methods run on the first set of noises, the best `FINALISTS` of each group on all. Above 20 calls only those run
    that were among the first eight of their group before, with fewer calls. What was measured before is kept, except
    for the groups in `again`.
    """
    found: dict[int, dict[str, Result]] = {}
    last: dict[str, list[str]] = {}
    for budget in sorted(budgets):
        here = Measured(case, budget, again)
        for group, candidates in methods(case.spread).items():
            if group not in here.ranked:
                first = last[group][:8] if budget > 20 and group in last else [m.name for m in candidates]
                screened = {
                    m: rms(r.squares)
                    for m in candidates
                    if m.name in first and (r := case.run(m, budget, case.n // SETS))
                }
                ranked = sorted(screened, key=lambda m: screened[m])
                here.add(group, [m.name for m in ranked], [case.run(m, budget, case.n) for m in ranked[:FINALISTS]])
        if "default" not in here.ranked:
            usual = default(case, budget)
            here.add("default", [usual.name], [case.run(usual, budget, case.n)])
        if budget in fit and "fitted" not in here.ranked:
            own = fitted(case, budget)
            here.add("fitted", [own.name], [case.run(own, budget, case.n)])
        found[budget], last = here.best, here.ranked
    return found


def planned(c: float, dims: int, n: int, budgets: list[int], fit: list[int]) -> int:
    """About how many samples `Case` and `compare` send through the network, the reference and the fits included."""
    groups = methods(c)
    total, least = REFERENCE * n + 1900 * fit_samples(dims) * len({*fit} & {*budgets}), min(budgets)
    for budget in budgets:
        tried = sum(len(group) for group in groups.values()) if budget <= max(20, least) else 8 * len(groups)
        total += budget * (tried * n // SETS + (FINALISTS * len(groups) + 1) * n)
    return total


def worth(name: str, dataset: Dataset, lenet: Path | None) -> tuple[str, Callable[[Tensor], float]] | None:
    """What says how good samples are: its name, and the number for model data x (n, *event), less is better.

    Of images, rounded to their grey levels: the Fréchet distance on the features of a LeNet, or on pixels averaged to
    8 × 8 or fewer; of everything else the sliced W2 distance. The other side is held-out data.
    """
    test = dataset.test.raw[:2000]
    if test.is_floating_point():
        return "sliced W2", lambda x: sliced_w2(x.float(), test, projections=64, rng=S.Rng(1))
    if name.startswith("mnist") and lenet is None:
        return None
    judge = guidance.LeNet(lenet) if name.startswith("mnist") else None

    def features(raw: Tensor) -> Tensor:
        if judge is not None:
            return judge(raw.float())
        return F.adaptive_avg_pool2d(dataset.encode(raw), 8 if raw.shape[1] == 1 else 4).flatten(1)

    known = features(test)
    title = "pixel FD" if judge is None else "LeNet-FD"
    return title, lambda x: frechet_distance(features(dataset.decode(x.float())), known)
