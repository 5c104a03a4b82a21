"""Every golden of the formats that scoresde reads, made by the peers' own code, against what it makes of them here.

    python benchmarks/interop.py --goldens /path/to/interop --out benchmarks/results/interop

The goldens are random networks, one folder a format: NAME.json with the arguments, NAME.npz with an input and the
output in float32 and float64, and the file as the peer writes it. The error is max|ours − theirs| / max|theirs|, in
float32, against their float64; what is allowed is three times the error of their own float32, at least 3e-6.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.diffusion.denoiser import Denoiser
from scoresde.interop import Imported, edm, guided_diffusion, read
from scoresde.interop.imported import Tensors
from scoresde.interop.read import FORMATS

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
            yield "x0", error(self.at_noise(denoiser, sigma, x, cond), truth)
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

    def at_noise(self, denoiser: Denoiser, sigma: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        """x̂_0 at x = x_0 + σ n, whatever the process scales it by."""
        t = denoiser.sde.time(-2 * sigma.double().log())
        alpha = denoiser.sde.marginal(t)[0].reshape(-1, 1, 1, 1)
        return denoiser((alpha * x).to(x.dtype), t, cond).x0


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=os.environ.get("SCORESDE_GOLDENS"), help="their folder")
    parser.add_argument("--out", type=Path, help="folder for README.md")
    chosen = parser.parse_args()
    if chosen.goldens is None:
        parser.error("--goldens, or the environment variable SCORESDE_GOLDENS, names the folder of the goldens")
    found = table(Path(chosen.goldens))
    print(found)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        text = f"# Foreign networks against the peers' own code\n\n{__doc__.partition(chr(10))[2].strip()}\n\n{found}\n"
        (chosen.out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
