"""What a training step costs, beside the loops of other libraries on the same network and data.

    python benchmarks/train_step.py
    python benchmarks/train_step.py compiled=false rounds=4

The network is diffusers' UNet2DModel (32/64/64 channels, one layer a block, attention at 8x8: 1.1 M parameters), the
data scikit-learn's digits at 32x32. The other loops are written here after the published training scripts: what they
do in a step, in their order, with their optimizer and average. All take turns, a few steps each, so that whatever else
the machine does meets all of them. `bare` is forward, backward, fused AdamW and one foreach average on a batch that is
there already: what a step costs at least.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import report
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import scoresde as S
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.losses.denoising import StratifiedTimes
from scoresde.train.ema import EMA
from scoresde.train.half import fast_half
from scoresde.train.state import TrainingState
from scoresde.train.trainer import Trainer

Step = Callable[[], Any]


class Network(nn.Module):
    """UNet2DModel with the signature of the denoisers."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        self.unet = UNet2DModel(
            sample_size=32, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return self.unet(x, c_noise).sample


def digits() -> Dataset:
    """Scikit-learn's digits, each pixel four by four."""
    small = S.data.Digits()
    splits = [Split(split.raw.repeat_interleave(4, -1).repeat_interleave(4, -2)) for split in (small.train, small.test)]
    return Dataset("digits32", *splits, Scaling(levels=17))


def batches(dataset: Dataset, size: int) -> Callable[[], Tensor]:
    """What a loader hands to the other loops: shuffled floats in [-1, 1]."""
    x, order = dataset.train.raw.float() / 8 - 1, EpochOrder(len(dataset.train), size, 0)
    return lambda: x[order.next()]


def parameters_of(*modules: nn.Module) -> Sequence[list[nn.Parameter]]:
    return [list(module.parameters()) for module in modules]


def score_sde(network: nn.Module, batch: Callable[[], Tensor]) -> Step:
    """score_sde_pytorch: continuous VP, Adam, warm-up, clipping, an average kept parameter by parameter."""
    average = copy.deepcopy(network)
    optimizer, count = torch.optim.Adam(network.parameters(), lr=2e-4), 0
    weights, shadow = parameters_of(network, average)

    def step() -> None:
        nonlocal count
        x = batch()
        optimizer.zero_grad()
        t = torch.rand(x.shape[0]) * (1 - 1e-5) + 1e-5
        z = torch.randn_like(x)
        log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        mean, std = torch.exp(log_mean)[:, None, None, None] * x, torch.sqrt(1 - torch.exp(2 * log_mean))
        score = -network(mean + std[:, None, None, None] * z, 999 * t) / std[:, None, None, None]
        losses = torch.square(score * std[:, None, None, None] + z)
        torch.mean(0.5 * torch.sum(losses.reshape(len(x), -1), dim=-1)).backward()
        count += 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-4 * min(count / 5000, 1.0)
        torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm=1.0)
        optimizer.step()
        with torch.no_grad():
            for s, p in zip(shadow, weights, strict=True):
                s.sub_((1 - 0.9999) * (s - p))

    return step


def edm(network: nn.Module, batch: Callable[[], Tensor]) -> Step:
    """NVlabs/edm: its preconditioning and weighting, NaN gradients set to 0 one by one, Adam, EMA by copies."""
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    weights, shadow = parameters_of(network, average)

    def step() -> None:
        x = batch()
        optimizer.zero_grad(set_to_none=True)
        sigma = (torch.randn(len(x), 1, 1, 1) * 1.2 - 1.2).exp()
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        noisy = x + torch.randn_like(x) * sigma
        scale = (sigma**2 + 0.25).sqrt()
        inner = network(noisy / scale, (sigma.log() / 4).flatten())
        denoised = 0.25 / scale**2 * noisy + sigma * 0.5 / scale * inner
        (weight * (denoised - x) ** 2).sum().mul(1 / len(x)).backward()
        for p in weights:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        for s, p in zip(shadow, weights, strict=True):
            s.data.copy_(p.detach().lerp(s, 0.9999))

    return step


def diffusers(network: nn.Module, batch: Callable[[], Tensor]) -> Step:
    """The unconditional example of diffusers, without accelerate: its scheduler, AdamW, EMAModel."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 500))

    def step() -> None:
        x = batch()
        noise = torch.randn(x.shape)
        t = torch.randint(0, 1000, (len(x),)).long()
        F.mse_loss(network(scheduler.add_noise(x, noise, t), t).float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return step


def smalldiffusion(network: nn.Module, batch: Callable[[], Tensor]) -> Step:
    """smalldiffusion's training_loop: noise levels of a table, Adam, no average."""
    sigmas = torch.logspace(-2, 1.5, 200)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step() -> None:
        x = batch()
        sigma = sigmas[torch.randint(len(sigmas), (len(x),))][:, None, None, None]
        eps = torch.randn_like(x)
        optimizer.zero_grad()
        output = network((x + sigma * eps) / (sigma**2 + 1).sqrt(), sigma.flatten())
        nn.MSELoss()(output, eps).backward()
        optimizer.step()

    return step


def training(
    network: nn.Module, dataset: Dataset, size: int, *, autocast: str | None = None, channels_last: bool = False,
    compiled: bool = False,
) -> TrainingState:  # fmt: skip
    """As `scoresde-train` makes one."""
    denoiser = S.Preconditioned(network, S.VPSDE(), S.EDM(sigma_data=1.0), autocast=autocast)
    loss = S.DenoisingLoss(denoiser, StratifiedTimes())
    if channels_last:
        loss = loss.to(memory_format=torch.channels_last)
    average = EMA(loss)
    if compiled:
        network.compile()
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3, fused=True)
    return TrainingState(loss, optimizer, average, dataset, EpochOrder(len(dataset.train), size, 0), S.Rng(0))


def ours(network: nn.Module, dataset: Dataset, size: int, **how: Any) -> Step:
    run, trainer = training(network, dataset, size, **how), Trainer(images=10**9, batch_size=size, warmup=10_000)
    run.loss.train()
    return lambda: trainer.step(run)


def bare(network: nn.Module, dataset: Dataset, size: int, *, plain: bool = False, **how: Any) -> Step:
    """The same loss, optimizer and average as ours and nothing else; `plain` with PyTorch's own kernels for halves."""
    run = training(network, dataset, size, **how)
    x = run.batch()[0]
    weights, shadow = list(run.loss.parameters()), list(run.average.parameters())
    run.loss.train()

    def step() -> None:
        with contextlib.nullcontext() if plain else fast_half(run.device):
            run.loss(x, rng=run.rng).mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(shadow, weights, 1e-3)

    return step


class Entry(NamedTuple):
    library: str
    name: str
    make: Callable[[Callable[[], nn.Module], Dataset, int], Step]
    compiled: bool = False


def entry(name: str, loop: Callable[..., Step], **how: Any) -> Entry:
    library = "scoresde" if loop is ours else "bare"
    compiled = how.get("compiled", False)
    return Entry(library, name, lambda new, dataset, size: loop(new(), dataset, size, **how), compiled)


def peer(loop: Callable[[nn.Module, Callable[[], Tensor]], Step]) -> Entry:
    return Entry(loop.__name__, "fp32", lambda new, dataset, size: loop(new(), batches(dataset, size)))


ENTRIES = (
    peer(score_sde), peer(edm), peer(diffusers), peer(smalldiffusion),
    entry("fp32", bare),
    entry("fp32", ours),
    entry("fp32 channels_last", ours, channels_last=True),
    entry("bf16, PyTorch's kernels", bare, autocast="bfloat16", plain=True),
    entry("bf16 channels_last, PyTorch's kernels", bare, autocast="bfloat16", channels_last=True, plain=True),
    entry("bf16", bare, autocast="bfloat16"),
    entry("bf16", ours, autocast="bfloat16"),
    entry("bf16 channels_last", ours, autocast="bfloat16", channels_last=True),
    entry("fp32 compiled", ours, compiled=True),
    entry("bf16 compiled", ours, autocast="bfloat16", compiled=True),
    entry("bf16 compiled channels_last", ours, autocast="bfloat16", compiled=True, channels_last=True),
)  # fmt: skip
TINY = (peer(score_sde), peer(edm), peer(smalldiffusion), entry("fp32", bare), entry("fp32", ours))


def measure(cfg: DictConfig, steps: Sequence[Step]) -> list[list[float]]:
    """Milliseconds of a step, one number a round, of loops that take turns."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[cfg.clock]
    for step in steps:  # the first step allocates, the second is what compiled code needs to settle
        step()
        step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(cfg.rounds):
        for index, step in enumerate(steps):
            start = clock()
            for _ in range(cfg.steps):
                step()
            times[index].append(1e3 * (clock() - start) / cfg.steps)
    return times


def compare(
    cfg: DictConfig, results: report.Report, title: str, entries: Sequence[Entry], new: Callable[[], nn.Module],
    dataset: Dataset, size: int,
) -> str:  # fmt: skip
    """A table of loops on one network, the fastest round of each."""
    made = []
    for entry in entries:
        start = time.perf_counter()
        made.append(entry.make(new, dataset, size))
        made[-1]()
        if entry.compiled:
            print(f"{entry.name}: {time.perf_counter() - start:.0f} s to compile", flush=True)
    times = measure(cfg, made)
    best = [min(each) for each in times]
    peers = [t for t, e in zip(best, entries, strict=True) if e.library not in ("scoresde", "bare")]
    floor = {e.name: t for t, e in zip(best, entries, strict=True) if e.library == "bare"}
    lines = [["loop", "", "ms/step", "median", "images/s", "× best peer", "over bare"]]
    for each, fastest, e in zip(times, best, entries, strict=True):
        speed, over = min(peers) / fastest, fastest / floor[e.name] - 1 if e.name in floor else None
        results.add(
            f"{title}/{e.library} {e.name}", fastest, network=title, library=e.library, loop=e.name,
            median=statistics.median(each), speed=speed, over_bare=over,
        )  # fmt: skip
        name = f"**{e.library}**" if e.library == "scoresde" else e.library
        extra = "" if over is None or e.library != "scoresde" else f"{100 * over:+.1f} %"
        lines.append([name, e.name, f"{fastest:.2f}", f"{statistics.median(each):.2f}",
                      f"{1e3 * size / fastest:.0f}", f"{speed:.2f}", extra])  # fmt: skip
        print(" | ".join(lines[-1]), flush=True)
    return f"**{title}**, batch {size}\n\n{report.table(lines)}"


def average_cost(cfg: DictConfig, results: report.Report, dataset: Dataset) -> str:
    """The average's share of a step."""
    run = training(Network(), dataset, cfg.batch_size)
    trainer, keep = Trainer(images=10**9, batch_size=cfg.batch_size), torch.tensor(True)
    trainer.step(run)
    step, update = measure(
        cfg, [lambda: trainer.step(run), lambda: run.ema.update(run.loss, 10_000, cfg.batch_size, keep)]
    )
    share = min(update) / min(step)
    results.add("ema share", share, network="UNet2DModel", library="scoresde", loop="EMA")
    return f"The average takes {1e3 * min(update):.0f} µs, {100 * share:.2f} % of an fp32 step."


def rate(rank: int, world: int, port: int, size: int, rounds: int, out: Any) -> None:
    """Images per second of `world` processes with one thread each."""
    from scoresde.train.parallel import spread_over
    from scoresde.train.world import join

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    together = join(torch.device("cpu"))
    dataset = digits()
    loss = S.DenoisingLoss(S.Preconditioned(Network(), S.VPSDE(), S.EDM(sigma_data=1.0)), StratifiedTimes())
    average = EMA(loss)
    parallel = spread_over(together, loss, average)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3, fused=True)
    run = TrainingState(
        loss, optimizer, average, dataset, EpochOrder(len(dataset.train), size, 0), S.Rng(0), world=together,
        parallel=parallel,
    )  # fmt: skip
    trainer, best = Trainer(images=10**9, batch_size=size), float("inf")
    trainer.step(run)
    for _ in range(rounds):
        start = time.perf_counter()
        trainer.step(run)
        best = min(best, time.perf_counter() - start)
    together.close()
    if rank == 0:
        out.put(size / best)


def efficiency(cfg: DictConfig, results: report.Report) -> str:
    """Two processes against one, each on a core of its own."""
    context = torch.multiprocessing.get_context("spawn")
    speeds = []
    for world in (1, 2):
        out, port = context.Queue(), 29500 + os.getpid() % 2000 + world
        children = [
            context.Process(target=rate, args=(rank, world, port, cfg.batch_size, cfg.rounds, out))
            for rank in range(world)
        ]
        for child in children:
            child.start()
        speeds.append(out.get())
        for child in children:
            child.join()
    share = speeds[1] / (2 * speeds[0])
    results.add("2 ranks", share, network="UNet2DModel", library="scoresde", loop="DDP")
    return (
        f"One process with one thread: {speeds[0]:.0f} images/s; two (DDP over gloo): {speeds[1]:.0f}, "
        f"{100 * share:.0f} % of twice as many."
    )


def train_step(cfg: DictConfig) -> None:
    results = report.Report(cfg, "train_step")
    dataset = digits()
    entries = [entry for entry in ENTRIES if cfg.compiled or not entry.compiled]
    parts = [compare(cfg, results, "UNet2DModel, digits 32x32", entries, Network, dataset, cfg.batch_size)]
    parts.append(average_cost(cfg, results, dataset))
    if cfg.tiny:
        x = torch.randn(4096, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        toy = Dataset("normal", Split(x), Split(x), Scaling.identity())
        parts.append(compare(cfg, results, "MLP, 2-D", TINY, Tiny, toy, 512))
    if cfg.ranks:
        parts.append(efficiency(cfg, results))
    text = (
        f"{cfg.threads} threads, {cfg.clock} time, fastest and median of {cfg.rounds} rounds in which every loop takes "
        f"{cfg.steps} steps. `× best peer`: speed over that of the fastest other library's loop, which are fp32. "
        f"Processor: {results.facts['processor']}."
    )
    results.close("\n\n".join([text, *parts]))


class Tiny(nn.Module):
    """3-128-128-128-2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (3, 128, 128, 128, 2)
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), c_noise.reshape(-1, 1)], 1)).view_as(x)


if __name__ == "__main__":
    report.launch(train_step, "train_step")
