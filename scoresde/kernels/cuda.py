"""Calls of the kernels in csrc/kernels.cu: which, on what grid, with what in between.

Tensors are as `arguments.py` says. Nothing is launched for a batch without elements, and ValueError is raised where a
batch or a sample is too large for one launch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..noise.address import Noise
from ..ops.switch import SCALARS
from .arguments import (
    BLOCK,
    WARP,
    Coefficient,
    Counters,
    Finish,
    Layout,
    Lincomb,
    Perturb,
    Signs,
    Squares,
    quads_of,
    quads_per_thread,
)

# (kernel, scalar, grid, block, arguments, device): `driver.Driver.launch`, or the emulator of the tests
Launch = Callable[[str, str, int, int, Sequence[ctypes.Structure], torch.device], None]

# partial sums of a batch: enough blocks for any GPU, few enough to add up in no time
PARTIALS = 2**15


def _run(launch: Launch, name: str, like: Tensor, threads: int, args: ctypes.Structure) -> None:
    launch(name, SCALARS[like.dtype], -(-like.shape[0] * threads // BLOCK), BLOCK, [args], like.device)


def _shares(like: Tensor) -> tuple[int, int]:
    """Quads and threads of one sample, for kernels that treat each element by itself."""
    quads = quads_of(like)
    return quads, -(-quads // quads_per_thread(like.shape[0], quads))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _either(noise: Noise | Tensor | None) -> tuple[Tensor | None, Noise | None]:
    return (noise, None) if isinstance(noise, Tensor) else (None, noise)


def lincomb(
    launch: Launch,
    out: Tensor,
    inputs: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    std: Tensor | None,
    noise: Noise | None,
) -> None:
    """`out = Σ coefficients[i] inputs[i] + std z` (B, *event), of at most five inputs; `out` may be one of them."""
    if not out.numel():
        return
    quads, threads = _shares(out)
    args = Lincomb(
        layout=Layout.of([out, *inputs], quads, threads),
        out=out.data_ptr(),
        std=Coefficient.of(std),
        noise=Counters.of(noise),
    )
    for i, (x, c) in enumerate(zip(inputs, coefficients, strict=True)):
        args.inputs[i], args.coefficients[i] = x.data_ptr(), Coefficient.of(c)
    _run(launch, f"lincomb_{len(inputs)}", out, threads, args)


def perturb_and_target(
    launch: Launch,
    noisy: Tensor,
    target: Tensor,
    x0: Tensor,
    coefficients: Sequence[Tensor | None],
    noise: Noise | Tensor,
) -> None:
    """`noisy = alpha x0 + sigma z` and `target = p x0 + q z` (B, *event), from one read of x0.

    Args:
        coefficients: alpha, sigma, p, q.
        noise: where z is to be found, or z (B, *event) itself.
    """
    if not x0.numel():
        return
    eps, counters = _either(noise)
    quads, threads = _shares(x0)
    alpha, sigma, p, q = map(Coefficient.of, coefficients)
    args = Perturb(
        layout=Layout.of([x for x in (x0, noisy, target, eps) if x is not None], quads, threads),
        noisy=noisy.data_ptr(),
        target=target.data_ptr(),
        x0=x0.data_ptr(),
        eps=_pointer(eps),
        alpha=alpha,
        sigma=sigma,
        p=p,
        q=q,
        noise=Counters.of(counters),
    )
    _run(launch, "perturb_and_target", x0, threads, args)


def rademacher(launch: Launch, out: Tensor, noise: Noise) -> None:
    """Fills `out` (B, *event) with the −1 and 1 of a draw."""
    if out.numel():
        quads, threads = _shares(out)
        args = Signs(layout=Layout.of([out], quads, threads), out=out.data_ptr(), noise=Counters.of(noise))
        _run(launch, "rademacher", out, threads, args)


def _squares(
    launch: Launch,
    name: str,
    a: Tensor,
    noise: Noise | Tensor | None = None,
    x0: Tensor | None = None,
    p: Tensor | None = None,
    q: Tensor | None = None,
) -> Tensor:
    """(B, parts, 2): the two sums of kernel `name` for each sample, in parts."""
    eps, counters = _either(noise)
    samples, quads = a.shape[0], quads_of(a)
    most = quads_per_thread(samples, quads)
    # threads that add up together: a power of two, and a warp where the sample has as many quads
    group = min(BLOCK, 1 << (max(min(quads, WARP), quads // most).bit_length() - 1))
    parts = max(1, min(quads // (most * group), PARTIALS // samples))
    sums = torch.empty(samples, parts, 2, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    args = Squares(
        layout=Layout.of([x for x in (a, x0, eps) if x is not None], quads, parts * group),
        group=group,
        partials=sums.data_ptr(),
        a=a.data_ptr(),
        x0=_pointer(x0),
        eps=_pointer(eps),
        p=Coefficient.of(p),
        q=Coefficient.of(q),
        noise=Counters.of(counters),
    )
    _run(launch, name, a, parts * group, args)
    return sums


def _finish(launch: Launch, name: str, like: Tensor, sums: Tensor, factor: Tensor, **fields: float) -> None:
    """Adds up `sums` (B, parts, 2) and lets kernel `name` make of them what it makes, with one `factor` () or (B,)."""
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
        measured: ‖z‖² of this noise in the numerator of h, where `Langevin` has its mean D (Song et al. 2021, alg. 4).
    """
    if not x.numel():
        return
    sums = _squares(launch, "norms_and_noise", eps, noise) if measured else _squares(launch, "norms", eps)
    slope, std = (torch.empty(x.shape[0], dtype=torch.float64, device=x.device) for _ in range(2))
    step = {"eps": slope.data_ptr(), "std": std.data_ptr()}
    _finish(launch, "finish_langevin", eps, sums, sigma, snr=snr, measured=measured, **step)
    lincomb(launch, out, [x, eps], [None, slope], std, noise)


def dsm_loss(
    launch: Launch,
    loss: Tensor,
    a: Tensor,
    x0: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    weight: Tensor,
    noise: Noise | Tensor,
) -> None:
    """`loss[k] = weight Σ (a − p x0 − q z)²/D`, for each sample: (B,) in float32, or in float64 where `a` is.

    NaN where samples have no elements, as their mean is.

    Args:
        x0: (B, *event), or None for no such term.
        weight: () or (B,), not None.
        noise: where z is to be found, or z (B, *event) itself.
    """
    if not a.numel():
        loss.fill_(math.nan)
        return
    sums = _squares(launch, "squared_error", a, noise, x0, p, q)
    _finish(launch, "finish_loss", a, sums, weight, loss=loss.data_ptr())
