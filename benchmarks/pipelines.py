"""Text-to-image pipelines of diffusers as runs: ten network calls by `run.sample(budget=10)` and by their own UniPC.

    python benchmarks/pipelines.py train=/tmp/pipelines minutes=2      # of one core, for each of four networks
    python benchmarks/pipelines.py in=/tmp/pipelines results=benchmarks/results/pipelines

Trained: Stable Diffusion's parts in small on the digits of scikit-learn, whose sentences say which: an AutoencoderKL
that makes 4 × 4 latents of 8 × 8 pixels, U-Nets that predict ε and v, and the transformer of Stable Diffusion 3, which
predicts the velocity of a flow; the text encoders keep their random weights. Untrained: those of the tests.
Distances are between latents that begin with the same noise: the root mean square of what is left to a fine solve,
over that of the fine solve, on average over seeds, with the standard error.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from diffusers import UniPCMultistepScheduler
from sklearn.datasets import load_digits
from torch import Tensor

import scoresde as S
from scoresde.interop import read
from scoresde.interop.folder import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import pipelines

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CALLS, KINDS = 10, ("epsilon", "v_prediction", "flow")
SEEDS = {"epsilon": 32, "v_prediction": 32, "flow": 8}  # whose 256 empty tokens of T5 cost the most
WIDE = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8}


def pictures() -> tuple[Tensor, Tensor]:
    """(N, 3, 8, 8) in [−1, 1], and which digits."""
    found = load_digits()
    return torch.tensor(found.images).float()[:, None].repeat(1, 3, 1, 1) / 8 - 1, torch.tensor(found.target)


def trained(module, minutes: float, loss, rate: float = 2e-3):
    """By Adam on `loss(rows)`, for so long on one core."""
    optimizer = torch.optim.Adam((p for p in module.parameters() if p.requires_grad), rate)
    start, count, average = time.process_time(), 0, 0.0
    while (passed := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - passed)
        optimizer.zero_grad()
        value = loss(torch.randint(1797, (64,)))
        value.backward()
        optimizer.step()
        average, count = 0.99 * average + 0.01 * value.item(), count + 1
    print(f"{type(module).__name__}: {count} steps, loss {average:.4f}", flush=True)
    return module.eval()


def small(kind: str, vae):
    """A pipeline of random weights around this autoencoder, wider than those of the tests, and what its network is."""
    torch.manual_seed(0)
    if kind == "flow":
        more = {"attention_head_dim": 16, "caption_projection_dim": 32}
        pipe, name = pipelines.three(t5=False), "transformer"
        vae = copy.deepcopy(vae)
        vae.register_to_config(shift_factor=0.0)
    else:
        pipe, name, more = pipelines.stable_diffusion(kind), "unet", WIDE
    old = getattr(pipe, name)
    pipe.register_modules(vae=vae, **{name: type(old)(**{**old.config, **more})})
    return pipe, name


def train(folder: Path, minutes: float) -> None:
    x, digit = pictures()
    vae = pipelines.autoencoder()
    for module in vae.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def reconstruction(rows: Tensor) -> Tensor:
        found = vae.encode(x[rows]).latent_dist
        return (vae.decode(found.sample()).sample - x[rows]).square().mean() + 1e-4 * found.kl().mean()

    trained(vae, minutes, reconstruction)
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=None)
    latents = latents * vae.config.scaling_factor
    for kind in KINDS:
        pipe, name = small(kind, vae)
        imported = read(pipelines.saved(pipe, folder / kind))
        model = imported.denoiser().train()
        model.network.inner.requires_grad_(True)
        text = imported.text.rows([f"a {WORDS[k]}" for k in digit.tolist()])
        loss = S.DenoisingLoss(model)

        def denoising(rows: Tensor, loss=loss, text=text) -> Tensor:
            told = torch.where(torch.rand(len(rows), 1) < 0.1, -1, text[rows])
            return loss(latents[rows], {"text": told}).mean()

        trained(model.network, minutes, denoising)
        getattr(pipe, name).load_state_dict(model.network.inner.state_dict())
        pipelines.saved(pipe, folder / kind)


def unipc(pipe, **more):
    config = pipe.scheduler.config
    if "beta_schedule" not in config:
        more |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.shift}
    return UniPCMultistepScheduler.from_config(config, **more)


def distances(pipe, run: S.Run, scale: float, seeds: int) -> dict[str, Tensor]:
    """Of every sampler and seed, to a fine solve."""
    said = [f"a {WORDS[k % 10]}" for k in range(seeds)]
    x = S.Rng(seeds=list(range(seeds))).normal((seeds, *run.event_shape))
    cond, guided = run.cond({"text": said}, seeds), run.guided(scale)
    with torch.no_grad():
        fine, finer = (S.Sampler(S.UniPC(3), S.LogSNRGrid(), steps=n)(guided, x, cond=cond) for n in (60, 120))
        sampler = run.sampler(CALLS, cond, scale)
        found = {
            "fine solve of half the steps": fine,
            f"run.sample, {type(sampler.step).__name__}": sampler(guided, x, cond=cond),
        }
        for name, more in (("", {}), (", trailing", {"timestep_spacing": "trailing"})):
            pipe.scheduler = unipc(pipe, **more)
            side = run.raw_shape[-1]
            how = {"height": side, "width": side, "num_inference_steps": CALLS, "output_type": "latent"}
            found[f"their UniPC{name}"] = pipe(said, guidance_scale=scale, latents=x.clone(), **how).images
    size = finer.flatten(1).square().mean(1).sqrt().mean()
    return {name: (each - finer).flatten(1).square().mean(1).sqrt() / size for name, each in found.items()}


def measure(source: Path | None) -> list[str]:
    lines = ["| weights | network | guidance | sampler | distance to the fine solve |", "|---|---|---|---|---|"]
    makers = {
        "epsilon": pipelines.stable_diffusion,
        "v_prediction": lambda: pipelines.stable_diffusion("v_prediction"),
        "flow": lambda: pipelines.three(t5=False),
    }
    for weights, kinds in (("trained", KINDS if source else ()), ("random", KINDS)):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                given = (
                    pipelines.saved(makers[kind](), Path(folder, "theirs")) if weights == "random" else source / kind
                )
                absent = ("text_encoder_3", "tokenizer_3") if kind == "flow" else ("safety_checker",)
                pipe = diffusers.DiffusionPipeline.from_pretrained(given, **dict.fromkeys(absent))
                pipe.set_progress_bar_config(disable=True)
                write(read(given), Path(folder, "run"))
                run, config = S.load(Path(folder, "run"), device="cpu"), pipe.scheduler
                for scale in (1.0, 3.0):
                    pipe.scheduler = config
                    for name, values in distances(pipe, run, scale, SEEDS[kind]).items():
                        error = float(values.std() / len(values) ** 0.5)
                        lines.append(f"| {weights} | {kind} | {scale:g} | {name} | {values.mean():.4f} ± {error:.4f} |")
                        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    told = dict(word.split("=", 1) for word in sys.argv[1:])
    if "train" in told:
        train(Path(told["train"]), float(told.get("minutes", 2)))
    else:
        lines = measure(Path(told["in"]) if "in" in told else None)
        if "results" in told:
            Path(told["results"]).mkdir(parents=True, exist_ok=True)
            Path(told["results"], "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
