"""Attention and group norm of bfloat16 on a CPU: PyTorch's kernels beside those of a training step.

    python benchmarks/halves.py
    python benchmarks/halves.py 'attention=[[1,4,4096,64]]'

Forward and backward, the ways in turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import report
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import measure

from scoresde.train.half import fast_half

Around = Callable[[], contextlib.AbstractContextManager[Any]]
WAYS: dict[str, Around] = {
    "PyTorch's": contextlib.nullcontext,
    "`SDPBackend.MATH`": lambda: sdpa_kernel(SDPBackend.MATH),
    "in a step": lambda: fast_half(torch.device("cpu")),
}


def attention(shape: list[int]) -> Callable[[], Tensor]:
    """Of (batch, heads, tokens, width), laid out as networks do."""
    batch, heads, tokens, width = shape
    given = [torch.randn(batch, tokens, heads, width).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    return lambda: F.scaled_dot_product_attention(*given)


def group_norm(shape: list[int]) -> Callable[[], Tensor]:
    """Of (batch, channels, side, groups) in channels_last."""
    batch, channels, side, groups = shape
    x = torch.randn(batch, channels, side, side).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.ones(channels, requires_grad=True) for _ in range(2))
    return lambda: F.group_norm(x, groups, weight, bias)


def ways(cfg: DictConfig, results: report.Report, name: str, call: Callable[[], Tensor], names: list[str]) -> list[str]:
    """A row: milliseconds of forward and backward in each way, and the last over the first."""
    upstream = torch.randn_like(call())

    def step(around: Around) -> Callable[[], None]:
        def run() -> None:
            with around():
                call().backward(upstream)

        return run

    best = [min(times) for times in measure(cfg, [step(WAYS[each]) for each in names])]
    for each, value in zip(names, best, strict=True):
        results.add(f"{name}/{each}", value, case=name, way=each)
    print(name, *(f"{value:.2f}" for value in best), flush=True)
    return [name, *(f"{value:.2f}" for value in best), f"{best[-1] / best[0]:.2f}"]


def halves(cfg: DictConfig) -> None:
    results = report.Report(cfg, "halves")
    torch.manual_seed(0)
    names = list(WAYS)
    first = [["batch x heads x tokens x width", *names, "ratio"]]
    first += [ways(cfg, results, "x".join(map(str, each)), attention(each), names) for each in cfg.attention]
    second = [["batch x channels x side, groups", names[0], names[2], "ratio"]]
    for each in cfg.group_norm:
        name = f"{each[0]}x{each[1]}x{each[2]}x{each[2]}, {each[3]}"
        second.append(ways(cfg, results, name, group_norm(each), [names[0], names[2]]))
    results.close(
        f"Milliseconds of forward and backward in bfloat16, {cfg.threads} threads, {cfg.clock} time, the fastest of "
        f"{cfg.rounds} rounds. Processor: {results.facts['processor']}.\n\n**Attention**\n\n{report.table(first)}\n\n"
        f"**Group norm, channels_last**\n\n{report.table(second)}"
    )


if __name__ == "__main__":
    report.launch(halves, "halves")
