"""Every golden of the formats that scoresde reads, made by the peers' own code, against what it makes of them here.

    python benchmarks/interop.py --goldens /path/to/interop --out benchmarks/results/interop

The goldens are random networks, one folder a format: NAME.json with the arguments, NAME.npz with an input and the
output in float32 and float64, and the file as the peer writes it. The error is max|ours − theirs| / max|theirs|, in
float32, against their float64; what is allowed is three times the error of their own float32, at least 3e-6.

Then `sample(budget=20)` and `log_likelihood` of imported networks that nobody has measured, beside the sampler and the
likelihood of their own project, written down from its formula and run finely. As random networks are rough beyond what
any solver follows, the last layer is a tenth of the golden's there. Distances are root mean squares over the standard
deviation of the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scoresde
from scoresde.diffusion.denoiser import Denoiser
from scoresde.diffusion.prediction import Prediction
from scoresde.interop import Imported, edm, guided_diffusion, read
from scoresde.interop.imported import Tensors
from scoresde.interop.read import FORMATS
from scoresde.nn import LogVariance

SUFFIXES = {
    "edm": "pkl",
    "edm2": "pkl",
    "score_sde": "pth",
    "guided_diffusion": "pt",
    "dit": "pt",
    "sit": "pt",
    "k_diffusion": "safetensors",
}


class Golden:
    """One golden.

    Args:
        path: of its JSON file.
    """

    def __init__(self, path: Path):
        self.path, self.kind = path, path.parent.name
        self.meta: dict[str, Any] = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.file = path.with_suffix(f".{SUFFIXES[self.kind]}")

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.path.stem}"

    @property
    def allowed(self) -> float:
        return max(3 * self.meta["float32_error"], 3e-6)

    @property
    def args(self) -> dict[str, Any] | None:
        """What the file does not say."""
        if self.kind == "score_sde":
            return self.meta["config"]
        if self.kind == "guided_diffusion":
            return self.meta["args"] | self.meta["diffusion"]
        return self.meta["args"] if self.kind in ("dit", "sit") else None

    def tensors(self) -> Tensors:
        """The weights that are beside the arrays, where there is no file."""
        found = {n.removeprefix("weights/"): v for n, v in self.arrays.items() if n.startswith("weights/")}
        return Tensors(found, self.path)

    def imported(self) -> Imported | None:
        if self.file.exists():
            return read(self.file, args=self.args, format=self.kind)
        if self.kind == "guided_diffusion":
            named = {n.removeprefix("weights/"): v for n, v in self.arrays.items() if n.startswith("weights/")}
            return guided_diffusion.read(self.path, named, self.args)
        return None

    def cond(self, classes: int) -> Tensor | None:
        labels = self.arrays.get("class_labels")
        if labels is None:
            return None
        return torch.where(labels.sum(1) == 0, classes, labels.argmax(1)) if labels.is_floating_point() else labels

    @torch.no_grad()
    def errors(self) -> Iterator[tuple[str, float]]:
        """(what is compared, its error)."""
        imported = self.imported()
        if imported is None:
            node, weights, shape = edm.build_network(self.meta["cls"], self.meta["args"], self.tensors())
            bare = Imported(self.path, "", "", node, {}, {}, weights, shape, classes=node.pop("classes"))
            out = bare.build_network()(self.arrays["x"], self.arrays["noise_labels"], self.cond(bare.classes))
            yield "F", error(out, self.arrays["out64"])
            return
        denoiser, cond = imported.denoiser(), self.cond(imported.classes)
        x, truth = self.arrays["x"], self.arrays["out64"]
        if "sigma" in self.arrays:
            sigma = self.arrays["sigma"]
            yield "x0", error(self.at_noise(denoiser, sigma, x, cond).x0, truth)
            if imported.outputs == 2:  # of this one the bare network's input is there, x divided by √(1 + σ²)
                share = self.at_noise(denoiser, sigma, x, cond).share
                yield "v", error(2 * share - 1, self.arrays["inner_F"][:, x.shape[1] :])
            if imported.uncertainty is not None:
                learned = LogVariance(imported.uncertainty["linear.weight"].shape[1])
                learned.load_state_dict(imported.uncertainty)
                yield "u", error(learned(-2 * sigma.double().log()), self.arrays["logvar64"].flatten())
            if self.kind == "k_diffusion":
                scale = (imported.sigma_data**2 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
                yield "F", error(imported.build_network()(x / scale, sigma.log() / 4, cond), self.arrays["inner_F64"])
            return
        t = self.arrays["t"].double()
        if self.kind == "score_sde":
            found = denoiser(x, t.float(), None)
            yield "score", error(found.score, self.arrays["score64"])
            last = imported.denoiser("weights")(x, t.float(), None)
            ours = last.eps if "eps" in self.meta["output"] else last.score
            yield "last weights", error(ours, self.arrays["out32_model"])
        elif self.kind == "sit":
            found = denoiser(x, 1 - t, cond)
            yield "velocity", error(-found.velocity, truth)
        else:
            found = denoiser(x, (t + 1) / 1000, cond)
            yield "eps", error(found.eps, truth[:, : x.shape[1]])
            if imported.outputs == 2:
                yield "v", error(2 * found.share - 1, truth[:, x.shape[1] :])

    def at_noise(self, denoiser: Denoiser, sigma: Tensor, x: Tensor, cond: Tensor | None) -> Prediction:
        """The prediction at x = x_0 + σ n, whatever the process scales it by."""
        t = denoiser.sde.time(-2 * sigma.double().log())
        alpha = denoiser.sde.marginal(t)[0].reshape(-1, 1, 1, 1)
        return denoiser((alpha * x).to(x.dtype), t, cond)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def goldens(root: Path) -> list[Golden]:
    """Those of formats that are read here."""
    return [Golden(path) for path in sorted(root.glob("*/*.json")) if path.parent.name in FORMATS]


def table(root: Path) -> str:
    """A line for each golden, as Markdown."""
    lines = ["| golden | parameters | compared | error | allowed | |", "|---|---|---|---|---|---|"]
    for golden in goldens(root):
        for what, found in golden.errors():
            verdict = "ok" if found <= golden.allowed else "**too large**"
            parameters = f"{golden.meta['parameters']:,}"
            lines.append(f"| {golden.name} | {parameters} | {what} | {found:.1e} | {golden.allowed:.1e} | {verdict} |")
    rest = sorted({path.parent.name for path in root.glob("*/*.json")} - set(FORMATS))
    return "\n".join([*lines, *(f"| {name} | | not read here | | | |" for name in rest)])


def calm(root: Path, name: str) -> tuple[Imported, Denoiser, Any]:
    """(a golden, its denoiser, its bare network in float64), with a tenth of the last layer."""
    imported = Golden(root / f"{name}.json").imported()
    assert imported is not None
    weights = {n: 0.1 * v if "outlet." in n else v for n, v in imported.weights.items()}
    imported = replace(imported, weights=weights)
    return imported, imported.denoiser(), imported.build_network().double()


def heun(network: Any, x: Tensor, label: Tensor, steps: int) -> Tensor:
    """EDM's sampler (Karras et al. 2022, alg. 1, without churn; sigma_data 0.5), from x = σ_max z."""
    place = torch.arange(steps).double() / (steps - 1)
    grid = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        c_in = (sigma**2 + 0.25).rsqrt()
        inner = network(c_in * x, (sigma.log() / 4).expand(len(x)), label)
        return (x - 0.25 * c_in**2 * x - 0.5 * sigma * c_in * inner) / sigma

    for here, there in itertools.pairwise([*grid, torch.zeros(()).double()]):
        first = slope(x, here)
        end = x + (there - here) * first
        x = end if there == 0 else x + (there - here) / 2 * (first + slope(end, there))
    return x


def ddim(network: Any, x: Tensor, label: Tensor | None, steps: int) -> Tensor:
    """The last sample by diffusers' DDIMScheduler, for the linear table."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        eps = network(x, t.double().expand(len(x)), label)[:, : x.shape[1]]
        x = scheduler.step(eps, t, x).prev_sample
    return x


def samplers(root: Path) -> Iterator[str]:
    """Lines of a table: `sample(budget=20)`, and their own sampler with as many calls, from a fine run of it."""
    for name, theirs, order, coarse, most in (
        ("edm/edm_precond", heun, 2, 10, 100),
        ("dit/dit_learned_sigma", ddim, 1, 20, 1000),
        ("guided_diffusion/unet_legacy_order", ddim, 1, 20, 1000),
    ):
        imported, denoiser, network = calm(root, name)
        shape, label = (4, *imported.event_shape), torch.arange(4) if imported.classes else None
        x = denoiser.prior_sample(shape, rng=scoresde.Rng(seeds=[0, 1, 2, 3])).double()
        with torch.no_grad():
            few, half, fine = (theirs(network, x, label, n) for n in (coarse, most // 2, most))
            found = scoresde.sample(denoiser, shape, budget=20, cond=label, rng=scoresde.Rng(seeds=[0, 1, 2, 3]))
        best = fine + (fine - half) / (2**order - 1)
        far = [float((each - best).square().mean().sqrt() / best.std()) for each in (found, few, fine)]
        yield f"| {name} | {theirs.__name__} | {far[0]:.1e} | {far[1]:.1e} | {far[2]:.1e} |"


def likelihoods(root: Path) -> Iterator[str]:
    """Lines of a table: the likelihood of score_sde, d log p/dt of its flow from 1e-5 to 1 with one probe, and ours.

    Theirs by RK4 evenly in the root of t, in float64; ours by the same probe.
    """
    for name in ("score_sde/ddpmpp_subvp",):
        imported, denoiser, _ = calm(root, name)
        exact, shape = imported.denoiser().double(), (1, *imported.event_shape)
        x0 = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + sum(imported.span or (0.0,)) / 2
        probe = scoresde.Hutchinson(1).probes(x0, scoresde.Rng(seeds=[7])).reshape(shape).double()

        def rate(x: Tensor, root: float, exact=exact, probe=probe) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            flow = 2 * root * exact(x, torch.tensor(root**2, dtype=torch.float64)).velocity
            (back,) = torch.autograd.grad(flow, x, probe)
            return flow.detach(), (back * probe).sum()

        ends, dims, start = [], math.prod(shape), math.sqrt(1e-5)
        for steps in (16, 32):
            x, total, h = x0.double(), torch.zeros(()).double(), (1 - start) / steps
            for k in range(steps):
                at = start + k * h
                k1, d1 = rate(x, at)
                k2, d2 = rate(x + h / 2 * k1, at + h / 2)
                k3, d3 = rate(x + h / 2 * k2, at + h / 2)
                k4, d4 = rate(x + h * k3, at + h)
                x, total = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
            nats = -0.5 * float(x.square().sum()) - dims / 2 * math.log(2 * math.pi) + float(total)
            ends.append(-nats / dims / math.log(2))
        how: dict[str, Any] = {"divergence": scoresde.Hutchinson(1), "t_min": 1e-5, "rng": scoresde.Rng(seeds=[7])}
        ours = scoresde.log_likelihood(denoiser, x0, scoresde.Tolerance(1e-4, 1e-4), **how)
        bits = -float(ours.log_prob) / dims / math.log(2)
        yield f"| {name} | {bits:.4f} | {ends[1]:.4f} | {abs(bits - ends[1]):.0e} | {abs(ends[1] - ends[0]):.0e} |"


def solvers(root: Path) -> str:
    return "\n".join(
        [
            "| golden | their sampler | sample(budget=20) | theirs, 20 calls | theirs, fine |",
            "|---|---|---|---|---|",
            *samplers(root),
            "",
            "| golden | ours, bits/dim | theirs | apart | theirs in 16 and 32 steps, apart |",
            "|---|---|---|---|---|",
            *likelihoods(root),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=os.environ.get("SCORESDE_GOLDENS"), help="their folder")
    parser.add_argument("--out", type=Path, help="folder for README.md")
    chosen = parser.parse_args()
    if chosen.goldens is None:
        parser.error("--goldens, or the environment variable SCORESDE_GOLDENS, names the folder of the goldens")
    found = f"{table(Path(chosen.goldens))}\n\n{solvers(Path(chosen.goldens))}"
    print(found)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        text = f"# Foreign networks against the peers' own code\n\n{__doc__.partition(chr(10))[2].strip()}\n\n{found}\n"
        (chosen.out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
