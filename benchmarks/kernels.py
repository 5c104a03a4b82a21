"""What the fused ops buy: bytes per second beside a copy, and whole samplers beside the loop that others write.

    python benchmarks/kernels.py
    python benchmarks/kernels.py 'sizes=[67108864]' 'ops=[lincomb]'     # 2^26 elements, one op

Four columns: eager torch as the peers write it; the best by hand in eager torch, in place and with coefficients as
numbers where it can; torch.compile of the first; and ours. On a GPU ours is the kernel, required: the fallback cannot
be timed in its place. Without one it is the reference, and is called so. Columns take turns, the cache is overwritten
before each, and the median of CUDA events counts (wall time on a CPU). Bandwidth counts the bytes that an op has to
move at least, against `y.copy_(x)` of the same size in the same run.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from kernels_samplers import samplers
from torch import Tensor

import scoresde as S
from scoresde import ops

try:
    import report
except ImportError:  # a machine without Hydra
    import plain as report  # type: ignore[no-redef]

Calls = dict[str, Callable[[], Any]]
PEER, HAND, COMPILED, KERNEL, REFERENCE = "eager", "best eager", "torch.compile", "kernel", "reference"
BYTES_ONLY, NOISE_ONLY = "noise off", "noise only"


class Batch:
    """What the ops read, of about `elements` elements; `wide` coefficients broadcast in the dtype of the batch."""

    def __init__(self, elements: int, event: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.shape = (max(elements // math.prod(event), 1), *event)
        self.dtype, self.device, self.rng = dtype, device, S.Rng(0)
        self.x, self.y = (self.normal() for _ in range(2))
        self.a, self.b, self.c = (torch.rand(self.shape[0], device=device, dtype=torch.float64) for _ in range(3))
        self.wide = [c.to(dtype).view(-1, *[1] * len(event)) for c in (self.a, self.b, self.c)]

    def normal(self) -> Tensor:
        return torch.randn(self.shape, dtype=self.dtype, device=self.device)


# A predictor: a x + b score + c z.


def lincomb(batch: Batch, compile: Callable[..., Any]) -> Calls:
    x, y, (a, b, c) = batch.x, batch.y, batch.wide
    room = torch.empty_like(x)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return a * x + b * y + c * torch.randn_like(x)

    return {
        PEER: lambda: eager(x, y),
        HAND: lambda: room.normal_().mul_(0.1).add_(x, alpha=0.9).add_(y, alpha=0.3),
        COMPILED: functools.partial(compile(eager), x, y),
        KERNEL: lambda: ops.lincomb(((batch.a, x), (batch.b, y)), (batch.c, batch.rng.noise(x))),
        BYTES_ONLY: lambda: ops.lincomb(((batch.a, x), (batch.b, y))),
        NOISE_ONLY: lambda: batch.rng.normal_like(x),
    }


# The Langevin corrector, with the norms of score and noise of every sample.


def langevin(batch: Batch, compile: Callable[..., Any]) -> Calls:
    x, y, sigma, column = batch.x, batch.y, batch.wide[0], (-1, *[1] * (len(batch.shape) - 1))
    room = torch.empty_like(x)

    def size(z: Tensor, eps: Tensor) -> Tensor:
        ratio = 0.16 * z.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)
        return (2 * ratio**2).clamp(max=1.0).view(column)

    def eager(x: Tensor, eps: Tensor) -> Tensor:
        z = torch.randn_like(x)
        h = size(z, eps)
        return x - h * sigma * eps + (2 * h).sqrt() * sigma * z

    def hand() -> Tensor:
        z = room.normal_()
        h = size(z, y)
        return z.mul_((2 * h).sqrt() * sigma).add_(x).addcmul_(y, -h * sigma)

    return {
        PEER: lambda: eager(x, y),
        HAND: hand,
        COMPILED: functools.partial(compile(eager), x, y),
        KERNEL: lambda: ops.langevin(x, y, batch.a, 0.16, batch.rng.noise(x), measured=True),
        BYTES_ONLY: lambda: ops.lincomb(((batch.a, x), (batch.b, y))),
        NOISE_ONLY: lambda: batch.rng.normal_like(x),
    }


# The loss w ‖ε̂ − ε‖²/D of every sample and its gradient; the others keep ε, which was drawn for x_t.


def dsm_loss(batch: Batch, compile: Callable[..., Any]) -> Calls:
    z, weight, wide = batch.y, batch.a.to(torch.float32), batch.wide[0]
    prediction, room = batch.x.requires_grad_(), torch.empty_like(batch.x)
    kept, scale = batch.x.detach(), 2 / math.prod(batch.shape[1:])

    def eager(prediction: Tensor) -> Tensor:
        return (weight * (prediction - z).square().flatten(1).mean(1)).sum()

    def hand() -> tuple[Tensor, Tensor]:
        difference = torch.sub(kept, z, out=room)
        loss = difference.flatten(1).norm(dim=1).square() * weight
        return loss, difference.mul_(scale * wide)

    def ours() -> Tensor:
        return ops.dsm_loss(prediction, batch.rng.noise(prediction), batch.a).sum()

    compiled = compile(eager)
    return {
        PEER: lambda: torch.autograd.grad(eager(prediction), prediction),
        HAND: hand,
        COMPILED: lambda: torch.autograd.grad(compiled(prediction), prediction),
        KERNEL: lambda: torch.autograd.grad(ours(), prediction),
        NOISE_ONLY: lambda: batch.rng.normal_like(kept),
    }


class Op(NamedTuple):
    make: Callable[[Batch, Callable[..., Any]], Calls]
    passes: int  # tensors that it reads and writes at least


OPS = {"lincomb": Op(lincomb, 3), "langevin": Op(langevin, 4), "dsm_loss": Op(dsm_loss, 3)}

GOALS = (  # op, dtype, what (share of a copy, or speed over a column), at least
    ("lincomb", "float32", "copy", 0.90),
    ("lincomb", "bfloat16", "copy", 0.75),
    *((op, "float32", PEER, least) for op, least in (("lincomb", 4.0), ("langevin", 3.0), ("dsm_loss", 4.5))),
    *((op, "float32", COMPILED, least) for op, least in (("lincomb", 1.0), ("langevin", 1.4), ("dsm_loss", 1.5))),
)
LARGE = 2**26  # elements from which on the goals hold


class Clock:
    """Medians of calls that take turns, in milliseconds."""

    def __init__(self, device: torch.device, rounds: int, flush: int):
        self.device, self.rounds = device, rounds
        self.flush = torch.empty(flush * 2**20 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        for call in calls.values():  # compiles, allocates, chooses algorithms
            for _ in range(3):
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return {name: statistics.median(each) for name, each in times.items()}

    def once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def measure(cfg: Any, op: Op, elements: int, dtype: str, clock: Clock) -> dict[str, float] | None:
    """Milliseconds of every column, of a copy, and of the bytes and the noise alone; None if they do not fit."""
    torch.compiler.reset()  # else the code of every size before is kept
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        batch = Batch(elements, cfg.event, getattr(torch, dtype), clock.device)
        calls = op.make(batch, functools.partial(torch.compile, dynamic=False))
        if not cfg.compiled:
            del calls[COMPILED]
        room = torch.empty_like(batch.y)
        return clock({**calls, "copy": lambda: room.copy_(batch.y)})
    except torch.OutOfMemoryError:
        return None


def limit(times: Mapping[str, float], passes: int) -> str:
    """What keeps the kernel from being faster, by what its bytes and its noise take alone."""
    whole, copy, noise = times[KERNEL], passes / 2 * times["copy"], times[NOISE_ONLY]
    shares = f"a copy of its bytes takes {copy / whole:.0%} of its time, its noise alone {noise / whole:.0%}"
    if BYTES_ONLY in times:
        shares += f", the sum without noise {times[BYTES_ONLY] / whole:.0%}"
    if copy >= 0.9 * whole:
        return f"bytes ({shares})"
    if noise >= 0.8 * whole:
        return f"the rate of integer and special-function instructions ({shares})"
    if times.get(BYTES_ONLY, 0) >= 0.8 * whole:
        return f"access to memory, short of a copy's ({shares})"
    return f"neither alone: too few warps to overlap the two ({shares})"


def ops_table(cfg: Any, results: Any, device: torch.device, sizes: Sequence[int]) -> list[str]:
    clock, ours = Clock(device, cfg.rounds, cfg.flush), KERNEL if device.type == "cuda" else REFERENCE
    columns = [PEER, HAND, *([COMPILED] if cfg.compiled else []), KERNEL]
    heads = [ours if column == KERNEL else column for column in columns]
    lines = [
        [
            "op",
            "dtype",
            "elements",
            *(f"{head}, ms" for head in heads),
            "GB/s",
            "of a copy",
            *(f"× {head}" for head in heads[:-1]),
        ]
    ]
    missing, verdicts = [], []
    for name in cfg.ops:
        for dtype in cfg.dtypes:
            for elements in sizes:
                times = measure(cfg, OPS[name], elements, dtype, clock)
                if times is None:
                    missing.append(f"{name} {dtype} 2^{math.log2(elements):.3g}")
                    continue
                size = elements * getattr(torch, dtype).itemsize
                share = OPS[name].passes / 2 * times["copy"] / times[KERNEL]
                speeds = {column: times[column] / times[KERNEL] for column in columns[:-1]}
                for column, milliseconds in times.items():
                    shown = ours if column == KERNEL else column
                    results.add(
                        f"{name}/{dtype}/{elements}/{shown}",
                        milliseconds,
                        op=name,
                        dtype=dtype,
                        elements=elements,
                        column=shown,
                        unit="ms",
                    )
                lines.append(
                    [
                        name,
                        dtype,
                        f"2^{math.log2(elements):.3g}",
                        *(f"{times[c]:.4g}" for c in columns),
                        f"{1e-6 * OPS[name].passes * size / times[KERNEL]:.3g}",
                        f"{share:.0%}",
                        *(f"{speed:.2f}" for speed in speeds.values()),
                    ]
                )
                print(" | ".join(lines[-1]), flush=True)
                if device.type == "cuda" and elements >= LARGE:
                    verdicts += judge(name, dtype, elements, share, speeds, limit(times, OPS[name].passes))
    parts = [report.table(lines)]
    if missing:
        parts.append(f"Left out, as they do not fit: {', '.join(missing)}.")
    if verdicts:
        parts.append("\n".join(["Goals, from 2^26 elements on:", "", *verdicts]))
    return parts


def judge(op: str, dtype: str, elements: int, share: float, speeds: Mapping[str, float], limited_by: str) -> list[str]:
    found = {"copy": share, **speeds}
    lines = []
    for goal_op, goal_dtype, what, least in GOALS:
        if (goal_op, goal_dtype) == (op, dtype) and what in found:
            reached = found[what] >= least
            aim = f"{least:.0%} of a copy" if what == "copy" else f"{least}× {what}"
            value = f"{found[what]:.0%}" if what == "copy" else f"{found[what]:.2f}×"
            tail = "reached" if reached else f"**missed**; limited by {limited_by}"
            lines.append(f"- {op} {dtype} 2^{math.log2(elements):.3g}, {aim}: {value}, {tail}.")
    return lines


def main(cfg: Any) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    device = torch.device(device)
    gpu = device.type == "cuda"
    ops.use("require" if gpu else "off")
    if not gpu and cfg.results is None:
        cfg.results = "benchmarks/results/cpu"
    results = report.Report(cfg, "kernels")
    sizes = list(cfg.sizes) if cfg.sizes else [2**k for k in ((20, 22, 24, 26, 28, 30) if gpu else (12, 16))]
    where = (
        f"{torch.cuda.get_device_name(device)}; ours is the kernel, required."
        if gpu
        else "**No GPU here**: ours is the torch reference, on a CPU. These figures only show that the benchmark runs."
    )
    text = (
        f"{where} Median of {cfg.rounds} rounds in turns. GB/s counts the bytes that have to move; `of a copy` is that "
        "against `copy_` of the same size in the same run; `×` is the speed of ours over a column."
    )
    parts = [text, *ops_table(cfg, results, device, sizes)]
    if cfg.samplers:
        parts += samplers(cfg, results, device, report.table)
    results.close("\n\n".join(parts))


if __name__ == "__main__":
    report.launch(main, "kernels")
