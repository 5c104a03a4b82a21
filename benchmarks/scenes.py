r"""Are words obeyed? Scenes of digits, drawn for sentences and judged by a LeNet that was trained elsewhere.

    python benchmarks/scene_data.py /folder/with/the/four/idx/files data/scenes
    scoresde-train experiment=scenes data.path=data/scenes/train.npz data.captions.path=data/scenes/train.txt \
      data.test_path=data/scenes/test.npz data.captions.test_path=data/scenes/test.txt out=runs/scenes
    python benchmarks/scenes.py run=runs/scenes data=data/scenes lenet=/path/to/lenet_mnist.npz

For sentences of the test split and for pairs of digits that training never saw (`held_out`), at each guidance scale:

    digits    of the digits that were asked for, the share that the LeNet finds at their places
    both      the share of scenes of which all digits are found
    relation  of "above" and "left of", the share with a digit on either side and nothing in between

And of edits by words, `edits` scenes of the test split, encoded under their sentence and decoded under one with another
digit in the place of the first:

    flipped   the share in which the LeNet then finds the new digit there, at each guidance scale of the decoding
    outside   the mean PSNR in dB between the scene and the edited one, outside that place (none where it is all)
    returned  the greatest difference of model data, encoded and decoded under the same sentence by the same solver

The place of a digit is a half of the canvas, or a quarter for a corner; what is in it is brought to the size and centre
of MNIST's digits. Beside "and" the digits may be on any sides. The row "real" holds what the judge finds in scenes of
the data.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import report
import torch
import torch.nn.functional as F
from guidance import LeNet
from omegaconf import DictConfig
from scene_data import CORNERS, SIDE, held_out
from torch import Tensor

import scoresde as S
from scoresde.diffusion.conditions import Cond, take
from scoresde.evaluate import figures
from scoresde.runs.run import Run

HALF = SIDE // 2
FIRST, SECOND = slice(0, HALF), slice(HALF, SIDE)
WHOLE = slice(0, SIDE)
DOWN, ACROSS = [(FIRST, WHOLE), (SECOND, WHOLE)], [(WHOLE, FIRST), (WHOLE, SECOND)]
QUARTERS = {
    name: (rows, columns)
    for name, (rows, columns) in zip(
        CORNERS, [(rows, columns) for rows in (FIRST, SECOND) for columns in (FIRST, SECOND)], strict=True
    )
}


def asked(sentence: str) -> tuple[list[int], list[list[tuple[slice, slice]]]]:
    """The digits of a sentence, and the places where they may be: any of these lists, one place for each."""
    digits = [int(word) for word in re.findall(r"\d", sentence)]
    if len(digits) == 1 and " in the " not in sentence:
        return digits, [[(WHOLE, WHOLE)]]
    if " in the " in sentence:
        return digits, [[QUARTERS[sentence.split(" in the ")[1]]]]
    if " and " in sentence:
        return digits, [DOWN, DOWN[::-1], ACROSS, ACROSS[::-1]]
    return digits, [DOWN if " above " in sentence else ACROSS]


def like_mnist(pixels: Tensor) -> Tensor:
    """What is in `pixels` (H, W), at most 20 pixels long and with its centre of mass in the middle of (28, 28)."""
    ink = pixels > 60
    if not bool(ink.any()):
        return pixels.new_zeros(28, 28)
    (top, bottom), (left, right) = ((int(k.min()), int(k.max()) + 1) for k in ink.nonzero().T)
    crop = pixels[top:bottom, left:right]
    scale = 20 / max(crop.shape)
    size = [max(1, round(scale * n)) for n in crop.shape]
    big = F.interpolate(crop[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    mass, out = big / big.sum(), pixels.new_zeros(28, 28)
    centre = [float((mass.sum(1 - k) * torch.arange(n)).sum()) for k, n in enumerate(size)]
    at = [min(max(round(13.5 - c), 0), 28 - n) for c, n in zip(centre, size, strict=True)]
    out[at[0] : at[0] + size[0], at[1] : at[1] + size[1]] = big
    return out


def judged(judge: LeNet, pixels: Tensor, sentences: list[str]) -> dict[str, list[float]]:
    """What the judge finds in scenes (n, 1, 32, 32): for each measure the results, one for each scene that has it."""
    found: dict[str, list[float]] = {"digits": [], "both": [], "relation": []}
    for scene, sentence in zip(pixels[:, 0].float(), sentences, strict=True):
        digits, choices = asked(sentence)
        best = max(
            sum(label == digit for label, digit in zip(labels, digits, strict=True))
            for labels in (
                judge.label(torch.stack([like_mnist(scene[place]) for place in places])[:, None]).tolist()
                for places in choices
            )
        )
        found["digits"] += [1.0] * best + [0.0] * (len(digits) - best)
        found["both"].append(float(best == len(digits)))
        if " above " in sentence or " left of " in sentence:
            ((first, second),) = choices
            seam = scene[HALF - 1 : HALF + 1] if " above " in sentence else scene[:, HALF - 1 : HALF + 1]
            shares = [bool((scene[place] > 60).sum() >= 8) for place in (first, second)]
            # a stroke that goes on across the seam is in neither half
            crossing = (seam > 60).all(0 if " above " in sentence else 1)
            found["relation"].append(float(all(shares) and not bool(crossing.any())))
    return found


def changed(sentence: str) -> str:
    """With another digit in the place of the first, of which training has seen the pair."""
    first, *others = (int(word) for word in re.findall(r"\d", sentence))
    for step in range(1, 10):
        digit = (first + 3 * step) % 10
        if not any(held_out(digit, other) or held_out(other, digit) for other in others):
            break
    return re.sub(r"\d", str(digit), sentence, count=1)


def edits(run: Run, judge: LeNet, raw: Tensor, sentences: list[str], cfg: DictConfig, out: report.Report) -> str:
    """What becomes of the scenes (n, 1, 32, 32) when another digit is asked for; a table."""
    flow, device = S.AdaptiveODE(rtol=cfg.rtol, atol=cfg.rtol), torch.device("cpu")
    keep = [k for k, each in enumerate(sentences) if " and " not in each][: cfg.edits]  # whose places are known
    raw, before = raw[keep], [sentences[k] for k in keep]
    after, x, n = [changed(each) for each in before], run.encode(raw[:]), len(keep)
    own, other = (run.cond({"text": each}, n) for each in (before, after))
    sampler = S.Sampler(flow, steps=1, denoise=False)
    z = torch.cat([flow.encode(run.denoiser, x[part], cond=take(own, part)) for part in parts(n, cfg.batch)])

    def decoded(scale: float, cond: Cond) -> Tensor:
        model = run.guided(None if scale == 1 else scale)
        return torch.cat([sampler(model, z[part], cond=take(cond, part)) for part in parts(n, cfg.batch)]).to(device)

    returned = float((decoded(1, own) - x).abs().max())
    out.add("returned", returned, rtol=float(cfg.rtol), measure="returned")
    rows = [["scale", "flipped, %", "outside, dB", "returned"]]
    for scale in cfg.scales:
        made = run.decode(decoded(float(scale), other))
        flips, decibels = [], []
        for old, new, sentence in zip(raw[:, 0].float(), made[:, 0].float(), after, strict=True):
            digits, choices = asked(sentence)
            place, rest = choices[0][0], torch.ones_like(old, dtype=torch.bool)
            rest[place] = False
            flips.append(float(judge.label(like_mnist(new[place])[None, None])[0] == digits[0]))
            if bool(rest.any()):
                error = float((old - new)[rest].square().mean())
                decibels.append(10 * math.log10(255**2 / max(error, 1e-2)))
        share, row = sum(flips) / n, [f"{scale:g}"]
        error = math.sqrt(share * (1 - share) / n)
        out.add("flipped", share, scale=row[0], stderr=error, measure="flipped")
        row.append(f"{100 * share:.1f} ± {100 * error:.1f}")
        if decibels:
            mean, of_mean = float(np.mean(decibels)), float(np.std(decibels) / math.sqrt(len(decibels)))
            out.add("outside", mean, scale=row[0], stderr=of_mean, measure="outside")
            row.append(f"{mean:.1f} ± {of_mean:.1f}")
        else:
            row.append("none")
        rows.append([*row, f"{returned:.1e}"])
        print(*rows[-1], sep="\t", flush=True)
        figures.sample_grid(made[:32].float(), raw[:32].float(), out.folder / f"edits_{row[0]}.png", columns=8)
    return f"{n} edits by a flow to {cfg.rtol:g}.\n\n{report.table(rows)}"


def parts(n: int, size: int) -> list[slice]:
    return [slice(k, k + size) for k in range(0, n, size)]


def drawn(run: Run, scale: float, sentences: list[str], cfg: DictConfig) -> Tensor:
    sampler = S.Sampler(S.DPMSolverPP(), S.LogSNRGrid(), steps=int(cfg.steps))
    guidance = None if scale == 1 else scale
    return run.sample(
        len(sentences), cond={"text": sentences}, guidance=guidance, sampler=sampler, batch_size=cfg.batch
    )


def main(cfg: DictConfig) -> None:
    run, judge, out = S.load(cfg.run, device="cpu"), LeNet(Path(cfg.lenet)), report.Report(cfg, "scenes")
    rows, pictures = [["sentences", "scale", "digits, %", "both, %", "relation, %"]], []
    edited = ""
    for part in ("test", "held_out"):
        if not Path(cfg.data, f"{part}.npz").exists():  # of single digits there are no pairs
            continue
        sentences = Path(cfg.data, f"{part}.txt").read_text(encoding="utf-8").splitlines()[: cfg.samples]
        real = torch.from_numpy(np.load(Path(cfg.data, f"{part}.npz"))["raw"][: cfg.samples])
        edited = edited or (edits(run, judge, real, sentences, cfg, out) if cfg.edits else "")
        for scale in (*cfg.scales, None):
            pixels = real if scale is None else drawn(run, float(scale), sentences, cfg)
            row = [part, "real" if scale is None else f"{scale:g}"]
            for measure, found in judged(judge, pixels, sentences).items():
                if not found:  # no sentence has a relation
                    row.append("none")
                    continue
                share = sum(found) / len(found)
                error = math.sqrt(share * (1 - share) / len(found))
                out.add(measure, share, part=part, scale=row[1], stderr=error, measure=measure)
                row.append(f"{100 * share:.1f} ± {100 * error:.1f}")
            rows.append(row)
            print(*row, sep="\t", flush=True)
            pictures.append(pixels[:16])
    shown = torch.cat(pictures).float()
    figures.sample_grid(shown, real[:16].float(), out.folder / "scenes_samples.png", columns=16)
    text = f"{cfg.samples} sentences each, {cfg.steps} network calls a sample, step {run.step:,} of {cfg.run}."
    out.close(f"{text}\n\n{report.table(rows)}\n\n{edited}")


if __name__ == "__main__":
    report.launch(main, "scenes")
