"""`python -m scoresde.kernels`: which GPUs of this machine have kernels, why others do not, and whether they are right.

Exit code 1 if an op is wrong, or if SCORESDE_KERNELS is "require" and a GPU, or all of them, is missing its kernels.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import philox
from ..noise.address import Noise
from ..noise.switch import mode, using, why_not
from ..ops import dsm_loss, langevin, lincomb
from . import driver, nvrtc
from .cubin import Cache, refuse_shared
from .driver import SCALARS

SHAPE = (3, 5, 7, 11)  # samples of 385 numbers, an odd size for every kernel
ROUNDING = 32 * 2.0**-23  # by sums in float32, and by logarithm and cosine on two kinds of processor


class Check(NamedTuple):
    """Largest error of one op, and the error that rounding explains."""

    op: str
    dtype: torch.dtype
    error: float
    tolerance: float


def main() -> int:
    try:
        asked = mode()
    except ValueError as error:
        print(error)
        return 1
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = {device: _reason(device) for device in devices}  # first, as this fills the cache
    lines = {"mode": asked, "torch": _torch()}
    lines.update({"driver": _or_error(_driver), "NVRTC": _or_error(_nvrtc), "cache": _or_error(_cache)})
    for device, reason in reasons.items():
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        state = "available" if reason is None else f"not available: {reason}"
        lines[str(device)] = f"{name}, {'.'.join(map(str, capability))}: {state}"
    if not devices:
        lines["GPU"] = f"none: {why_not(torch.device('cuda', 0))}. All ops run on the torch reference"
    for label, line in lines.items():
        print(f"{label:8} {line}")
    right = _report(torch.device("cpu"), "off")
    for device in [device for device in devices if reasons[device] is None]:
        right &= _report(device, "require")
    if asked == "require" and (not devices or any(reasons.values())):
        print("\nThe kernels are required, and not all devices have them.")
        return 1
    return 0 if right else 1


def self_test(device: torch.device) -> Iterator[Check]:
    """Every op in every dtype on `device`, in the mode that is set, against the torch reference in float64."""
    for dtype in SCALARS:
        given = torch.Generator().manual_seed(0)
        x, y = (torch.randn(SHAPE, generator=given, dtype=torch.float64).to(dtype) for _ in range(2))
        a, b = (torch.rand(SHAPE[0], generator=given, dtype=torch.float64) + 0.5 for _ in range(2))
        seeds, draws = torch.tensor([1, 2**40, -3]), torch.tensor([7])
        z = philox.normals(philox.streams(seeds, 0, draws + 5, SHAPE[0]), x[0].numel()).view(SHAPE).double()
        noise = Noise(seeds.to(device), draws.to(device), 5, 0)
        found = _results(x.to(device), y.to(device), a.to(device), b.to(device), noise)
        with using("off"):
            expected = _results(x.double(), y.double(), a, b, z)
        for op, value in found.items():
            # in float64 only a sum without noise is exact to float64: noise is of float32 in every dtype
            exact = op == "lincomb" and dtype == torch.float64
            relative = 8 * torch.finfo(dtype).eps if exact else torch.finfo(value.dtype).eps + ROUNDING
            error = float((value.cpu().double() - expected[op]).abs().max())
            tolerance = relative * float(expected[op].abs().max())
            yield Check(op, dtype, math.inf if math.isnan(error) else error, tolerance)


def _results(x: Tensor, y: Tensor, a: Tensor, b: Tensor, noise: Tensor | Noise) -> dict[str, Tensor]:
    prediction = y.clone().requires_grad_()
    loss = dsm_loss(prediction, noise, a)
    return {
        "lincomb": lincomb(((a, x), (b, y))),
        "lincomb + z": lincomb(((a, x), (0.3, y)), (b, noise)),
        "langevin": langevin(x, y, a, 0.2, noise),
        "dsm_loss": loss.detach(),
        "gradient": torch.autograd.grad(loss.sum(), prediction)[0],
    }


def _report(device: torch.device, how: str) -> bool:
    """Prints the self-test of a device, and returns whether all ops are right."""
    names = [str(dtype).removeprefix("torch.") for dtype in SCALARS]
    print(f"\n{f'{device}, largest error':24}" + "".join(f"{name:>16}" for name in names))
    rows: dict[str, list[Check]] = {}
    try:
        with using(how):
            for check in self_test(device):
                rows.setdefault(check.op, []).append(check)
    except RuntimeError as error:
        print(f"failed: {error}")
        return False
    for op, checks in rows.items():
        cells = (f"{c.error:.1e}" + (" ok" if c.error <= c.tolerance else " WRONG") for c in checks)
        print(f"{op:24}" + "".join(f"{cell:>16}" for cell in cells))
    return all(check.error <= check.tolerance for checks in rows.values() for check in checks)


def _reason(device: torch.device) -> str | None:
    """Why the device has no kernels, for the first dtype that has none."""
    return next((reason for dtype in SCALARS if (reason := why_not(device, dtype)) is not None), None)


def _or_error(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except OSError as error:
        return str(error)


def _torch() -> str:
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.__version__}, {kind if torch.version.hip or torch.version.cuda else 'without CUDA'}"


def _driver() -> str:
    version = ctypes.c_int()
    driver.libcuda().cuDriverGetVersion(ctypes.byref(version))
    return f"up to CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _nvrtc() -> str:
    if torch.version.cuda is None:
        return "not looked for, as this torch is without CUDA"
    found = nvrtc.find(int(torch.version.cuda.split(".")[0]))
    return f"{found.version}, {found.path}"


def _cache() -> str:
    folder, sizes = Cache().folder(), []
    try:
        refuse_shared(folder)
        sizes = [file.stat().st_size for file in folder.glob("*.cubin")]
    except FileNotFoundError:
        pass  # it is made when the first kernel is compiled
    except OSError as error:
        return f"{folder}, not used: {error}"
    return f"{folder}, {len(sizes)} files, {sum(sizes) / 1000:.0f} kB"


if __name__ == "__main__":
    sys.exit(main())
