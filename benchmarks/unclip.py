r"""unCLIP: do sampled embeddings say the sentence, and decoded pictures the digit? Variations and interpolations.

    python benchmarks/scene_data.py /folder/with/the/four/idx/files data/things --single
    scoresde-train experiment=unclip_embedder … out=runs/embedder        # docs/text.md has the four commands
    python benchmarks/unclip.py runs=runs data=data/things lenet=/path/to/lenet_mnist.npz

`runs` holds embedder, prior and decoder. For sentences of the test split:

    retrieval  of embeddings, the share whose most similar sentence of all that training has is the right one: of real
               pictures ("real"), and sampled by the prior for the sentences, at each guidance scale
    digits     of decoded pictures, the share in which a LeNet that was trained elsewhere finds the digit of the
               sentence; "real" is what it finds in pictures of the test split
    told       the mean cosine of the angle between the embedding of a decoded picture and that which it was told
    variations of test pictures, the share with the same digit; and the root mean square difference, in levels of 255,
               of two variations of one picture, beside that of two test pictures with one sentence
    ends       the share of interpolations between two test pictures that begin with the digit of the one and end with
               that of the other
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from guidance import LeNet
from omegaconf import DictConfig
from scenes import like_mnist
from torch import Tensor

import scoresde as S
from scoresde.evaluate import figures


def found(judge: LeNet, pixels: Tensor, digits: list[int]) -> Tensor:
    """(n,) bool: whether the judge finds the digit in each picture (n, 1, 16, 16)."""
    labels = judge.label(torch.stack([like_mnist(each) for each in pixels[:, 0].float()])[:, None])
    return labels == torch.tensor(digits)


def share(right: Tensor) -> tuple[float, float]:
    """Of true entries, with its standard error."""
    mean = float(right.double().mean())
    return mean, math.sqrt(mean * (1 - mean) / len(right))


def distance(first: Tensor, second: Tensor) -> float:
    """Root mean square difference of pairs of pictures."""
    return float((first.double() - second.double()).square().mean().sqrt())


def main(cfg: DictConfig) -> None:
    out, judge = report.Report(cfg, "unclip"), LeNet(Path(cfg.lenet))
    embedder, chain = (
        S.load(Path(cfg.runs, "embedder"), device="cpu"),
        S.load([Path(cfg.runs, name) for name in ("prior", "decoder")], device="cpu"),
    )
    prior, decoder = chain.runs
    text, network = embedder.dataset.text, embedder.denoiser.network
    assert text is not None
    sentences = Path(cfg.data, "test.txt").read_text(encoding="utf-8").splitlines()
    real = torch.from_numpy(np.load(Path(cfg.data, "test.npz"))["raw"])
    known = sorted(set(Path(cfg.data, "train.txt").read_text(encoding="utf-8").splitlines()))
    with torch.no_grad():
        words = network.words(text.rows(known))
    asked, digits = sentences[: cfg.samples], [int(re.findall(r"\d", words)[0]) for words in sentences]
    sampler = S.Sampler(S.DPMSolverPP(), S.LogSNRGrid(), steps=int(cfg.steps))
    how: dict[str, Any] = {"sampler": sampler, "batch_size": int(cfg.batch), "progress": False}
    rows = [["what", "scale", "value"]]

    def say(what: str, scale: str, value: float, error: float | None = None, unit: str = "%") -> None:
        out.add(what, value, scale=scale, stderr=error, what=what)
        by = 100 if unit == "%" else 1
        digits = "" if error is None else f" ± {by * error:.1f}"
        rows.append([what, scale, f"{by * value:.{1 if by == 100 else 3}f}{digits} {unit}".strip()])
        print(*rows[-1], sep="\t", flush=True)

    def retrieved(embeddings: Tensor, of: list[str]) -> Tensor:
        best = network.similarity(embeddings, words).argmax(1).tolist()
        return torch.tensor([known[k] == each for k, each in zip(best, of, strict=True)])

    say("retrieval", "real", *share(retrieved(decoder.embed(real), sentences)))
    say("digits", "real", *share(found(judge, real, digits)))
    pictures = [real[:16]]
    for scale in cfg.scales:
        guidance = None if scale == 1 else float(scale)
        drawn = prior.sample(len(asked), cond={"text": asked}, guidance=guidance, **how)
        say("retrieval", f"{scale:g}", *share(retrieved(drawn, asked)))
        made = chain.sample(len(asked), cond={"text": asked}, guidance=guidance, **how)
        say("digits", f"{scale:g}", *share(found(judge, made, digits[: len(asked)])))
        assert decoder.dataset.embedder is not None
        told = decoder.dataset.embedder.on_sphere(drawn)  # the same seeds: what the chain told its decoder
        say("told", f"{scale:g}", float(torch.cosine_similarity(decoder.embed(made), told).mean()), unit="")
        pictures.append(made[:16])
    given, each = real[: cfg.pictures], 4
    guidance = None if cfg.variation_scale == 1 else float(cfg.variation_scale)
    varied = decoder.variations(given, each, guidance=guidance, **how)
    of_given = [digit for digit in digits[: len(given)] for _ in range(each)]
    say("variations", f"{cfg.variation_scale:g}", *share(found(judge, varied.flatten(0, 1), of_given)))
    say("variations differ", f"{cfg.variation_scale:g}", distance(varied[:, ::2], varied[:, 1::2]), unit="levels")
    alike = defaultdict(list)
    for k, words_of in enumerate(sentences):
        alike[words_of].append(k)
    pairs = [(ks[0], ks[1]) for ks in alike.values() if len(ks) > 1]
    first, second = (real[[pair[k] for pair in pairs]] for k in (0, 1))
    say("test pictures of one sentence differ", "real", distance(first, second), unit="levels")
    ways = [
        decoder.interpolation(real[[k, k + 1]], 8, guidance=guidance, rng=S.Rng(k), **how)
        for k in range(0, 2 * int(cfg.ways), 2)
    ]
    ends = torch.stack([found(judge, way[[0, -1]], digits[2 * k : 2 * k + 2]).all() for k, way in enumerate(ways)])
    say("ends", f"{cfg.variation_scale:g}", *share(ends))
    shown = torch.cat([*pictures, varied[:4].flatten(0, 1), *ways[:4]]).float()
    figures.sample_grid(shown, real[:16].float(), out.folder / "unclip_samples.png", columns=16)
    text_of = (
        f"{len(asked)} sentences, {cfg.steps} network calls a sample of each stage, {len(known)} sentences to choose "
        f"from, {len(given)} test pictures with {each} variations each. Picture: a row of the test split, a row for "
        "the same sentences at each scale, variations of its first four, interpolations between pairs of it."
    )
    out.close(f"{text_of}\n\n{report.table(rows)}")


if __name__ == "__main__":
    report.launch(main, "unclip")
