"""Calls of the kernels in csrc/kernels.cu: which kernel, on what grid, with which tensors in between.

Tensors are as `arguments.py` says. Nothing is launched for a batch without elements, and every function raises
ValueError if a batch or a sample is too large for one launch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..noise.address import Noise
from .arguments import (
    BLOCK,
    WARP,
    Coefficient,
    Counters,
    Finish,
    Layout,
    Lincomb,
    Squares,
    quads_of,
    quads_per_thread,
)
from .driver import SCALARS

# takes (kernel, scalar, grid, block, arguments, device): `driver.Driver.launch`, or the emulator of the tests
Launch = Callable[[str, str, int, int, Sequence[ctypes.Structure], torch.device], None]

# Partial sums of a batch: enough blocks for any GPU, and few enough that adding them up costs nothing.
PARTIALS = 2**15


def _run(launch: Launch, name: str, like: Tensor, threads: int, args: ctypes.Structure) -> None:
    launch(name, SCALARS[like.dtype], -(-like.shape[0] * threads // BLOCK), BLOCK, [args], like.device)


def lincomb(
    launch: Launch,
    out: Tensor,
    inputs: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    std: Tensor | None,
    noise: Noise | None,
    name: str | None = None,
) -> None:
    """`out = Σ coefficients[i] inputs[i] + std z` (B, *event), of at most five inputs; `out` may be one of them.

    Args:
        name: of the kernel. Default: that of so many inputs.
    """
    if not out.numel():
        return
    quads = quads_of(out)
    threads = -(-quads // quads_per_thread(out.shape[0], quads))
    args = Lincomb(
        layout=Layout.of([out, *inputs], quads, threads),
        out=out.data_ptr(),
        std=Coefficient.of(std),
        noise=Counters.of(noise),
    )
    for i, (x, c) in enumerate(zip(inputs, coefficients, strict=True)):
        args.inputs[i], args.coefficients[i] = x.data_ptr(), Coefficient.of(c)
    _run(launch, name or f"lincomb_{len(inputs)}", out, threads, args)


def rademacher(launch: Launch, out: Tensor, noise: Noise) -> None:
    """Fills `out` (B, *event) with the −1 and 1 of a draw."""
    lincomb(launch, out, [], [], None, noise, "rademacher")


def _squares(launch: Launch, name: str, a: Tensor, noise: Noise | Tensor | None = None) -> Tensor:
    """(B, parts, 2): the two sums of kernel `name` for each sample, in parts."""
    eps, counters = (noise, None) if isinstance(noise, Tensor) else (None, noise)
    samples, quads = a.shape[0], quads_of(a)
    most = quads_per_thread(samples, quads)
    # threads that add up together: a power of two, and a warp where the sample has as many quads
    group = min(BLOCK, 1 << (max(min(quads, WARP), quads // most).bit_length() - 1))
    parts = max(1, min(quads // (most * group), PARTIALS // samples))
    sums = torch.empty(samples, parts, 2, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    args = Squares(
        layout=Layout.of([a] if eps is None else [a, eps], quads, parts * group),
        group=group,
        partials=sums.data_ptr(),
        a=a.data_ptr(),
        eps=None if eps is None else eps.data_ptr(),
        noise=Counters.of(counters),
    )
    _run(launch, name, a, parts * group, args)
    return sums


def _finish(launch: Launch, name: str, like: Tensor, sums: Tensor, factor: Tensor, **fields: float) -> None:
    """Runs kernel `name`, which adds up `sums` (B, parts, 2) and computes its result with `factor`, () or (B,)."""
    samples, parts, _ = sums.shape
    group = min(BLOCK, 1 << (parts - 1).bit_length())
    args = Finish(
        samples=samples,
        parts=parts,
        group=group,
        partials=sums.data_ptr(),
        factor=Coefficient.of(factor),
        elements=like.numel() // samples,
        **fields,
    )
    _run(launch, name, like, group, args)


def langevin(
    launch: Launch, out: Tensor, x: Tensor, eps: Tensor, sigma: Tensor, snr: float, noise: Noise, measured: bool
) -> None:
    """`out = x − (h/σ) eps + √(2h) z`, with the h of each sample, as in `sampling.steps.Langevin`; `out` may be `x`.

    Two passes over memory: one for the squares of eps, one for the step; z is made in registers.

    Args:
        sigma: () or (B,), not None.
        measured: h has ‖z‖² of this noise in its numerator, in place of its mean D (Song et al. 2021, alg. 4).
    """
    if not x.numel():
        return
    sums = _squares(launch, "norms_and_noise", eps, noise) if measured else _squares(launch, "norms", eps)
    slope, std = (torch.empty(x.shape[0], dtype=torch.float64, device=x.device) for _ in range(2))
    step = {"eps": slope.data_ptr(), "std": std.data_ptr()}
    _finish(launch, "finish_langevin", eps, sums, sigma, snr=snr, measured=measured, **step)
    lincomb(launch, out, [x, eps], [None, slope], std, noise)


def dsm_loss(launch: Launch, loss: Tensor, a: Tensor, weight: Tensor, noise: Noise | Tensor) -> None:
    """`loss[k] = weight Σ (a − z)²/D` for each sample: (B,), in float64 if `a` is, else in float32.

    It is NaN where samples have no elements, like their mean.

    Args:
        weight: () or (B,), not None.
        noise: the address of z, or z (B, *event) itself.
    """
    if not a.numel():
        loss.fill_(math.nan)
        return
    sums = _squares(launch, "squared_error", a, noise)
    _finish(launch, "finish_loss", a, sums, weight, loss=loss.data_ptr())
