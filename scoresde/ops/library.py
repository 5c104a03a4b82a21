r"""The ops of `torch.ops.scoresde`: schemas, shapes for `torch.compile`, gradients, and which code runs where.

On a GPU that `switch` finds fit they are the kernels of `csrc`, everywhere else the reference. Noise is regenerated in
the backward pass, never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import cuda
from ..noise.address import Noise
from . import reference
from .switch import enabled, launch

_OPS = torch.ops.scoresde


def lincomb(
    inputs: Sequence[Tensor], coefficients: Sequence[Tensor], std: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Σ c_i x_i + std z of one to five tensors of one shape (B, *event) and dtype."""
    return _OPS.lincomb(inputs, coefficients, std, *_flat(noise))


def langevin(x: Tensor, eps: Tensor, sigma: Tensor, snr: float, measured: bool, noise: Noise) -> Tensor:
    """`reference.langevin` with z drawn as it is needed."""
    return _OPS.langevin(x, eps, sigma, snr, measured, *noise)


def perturb_and_target(
    x0: Tensor, eps: Tensor | None, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor, noise: Noise | None
) -> tuple[Tensor, Tensor]:
    """(α x_0 + σ ε, p x_0 + q ε), ε given or drawn."""
    return _OPS.perturb_and_target(x0, eps, alpha, sigma, p, q, *_flat(noise))


def dsm_loss(
    prediction: Tensor,
    weight: Tensor,
    x0: Tensor | None = None,
    p: Tensor | None = None,
    q: Tensor | None = None,
    eps: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """(B,) w ‖F − p x_0 − q ε‖²/D, ε given or drawn; q None is 1, x_0 None leaves it out."""
    return _OPS.dsm_loss(prediction, weight, x0, p, q, eps, *_flat(noise))


def normal(shape: Sequence[int], dtype: torch.dtype, noise: Noise) -> Tensor:
    """Standard normals of `shape`, on the device of `noise`."""
    return _OPS.normal(shape, dtype, *noise)


def rademacher(shape: Sequence[int], dtype: torch.dtype, noise: Noise) -> Tensor:
    """Signs −1 and +1 of `shape`, on the device of `noise`."""
    return _OPS.rademacher(shape, dtype, *noise)


def bits(shape: Sequence[int], noise: Noise) -> Tensor:
    """64 random bits for each entry of `shape`, int64; always made on the CPU."""
    return _OPS.bits(shape, *noise)


def normal_like(x: Tensor, noise: Noise) -> Tensor:
    """Those of `noise` for x. Half types are rounded once, at the end of a sum: until then noise is float32."""
    return normal(x.shape, torch.promote_types(x.dtype, torch.float32), noise)


def _flat(noise: Noise | None) -> tuple[Any, ...]:
    return (None, None, 0, 0) if noise is None else noise


# The reference, wherever there is no kernel.


def _lincomb(inputs: list[Tensor], coefficients: list[Tensor], std: Tensor | None, *flat: Any) -> Tensor:
    terms = tuple(zip(coefficients, inputs, strict=True))
    return reference.lincomb(terms, None if std is None else (std, _drawn(inputs[0], flat)))


def _langevin(x: Tensor, eps: Tensor, sigma: Tensor, snr: float, measured: bool, *flat: Any) -> Tensor:
    return reference.langevin(x, eps, _drawn(x, flat), sigma, snr, measured)


def _perturb_and_target(
    x0: Tensor, eps: Tensor | None, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor, *flat: Any
) -> tuple[Tensor, Tensor]:
    return reference.perturb_and_target(x0, _drawn(x0, flat) if eps is None else eps, alpha, sigma, p, q)


def _dsm_loss(
    prediction: Tensor,
    weight: Tensor,
    x0: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    eps: Tensor | None,
    *flat: Any,
) -> Tensor:
    eps = _drawn(prediction, flat) if eps is None else eps
    return reference.dsm_loss(prediction, eps, weight, x0, 0.0 if p is None else p, 1.0 if q is None else q)


def _drawn(x: Tensor, flat: tuple[Any, ...]) -> Tensor:
    # half types are rounded once, at the end of a sum: until then noise is float32
    return reference.normal(x.shape, torch.promote_types(x.dtype, torch.float32), Noise(*flat))


def _normal(shape: Sequence[int], dtype: torch.dtype, *flat: Any) -> Tensor:
    return reference.normal(shape, dtype, Noise(*flat))


def _rademacher(shape: Sequence[int], dtype: torch.dtype, *flat: Any) -> Tensor:
    return reference.rademacher(shape, dtype, Noise(*flat))


def _bits(shape: Sequence[int], *flat: Any) -> Tensor:
    return reference.bits(shape, Noise(*flat))


# The kernels, on CUDA.


def _lincomb_cuda(inputs: list[Tensor], coefficients: list[Tensor], std: Tensor | None, *flat: Any) -> Tensor:
    if not _fit(inputs[0], *inputs[1:]):
        return _lincomb(inputs, coefficients, std, *flat)
    inputs = _alike(*inputs)
    out = torch.empty_like(inputs[0])
    noise = None if std is None else Noise(*flat)
    cuda.lincomb(launch, out, inputs, [c.double() for c in coefficients], _double(std), noise)
    return out


def _langevin_cuda(x: Tensor, eps: Tensor, sigma: Tensor, snr: float, measured: bool, *flat: Any) -> Tensor:
    if not _fit(x, eps):
        return _langevin(x, eps, sigma, snr, measured, *flat)
    x, eps = _alike(x, eps)
    out = torch.empty_like(x)
    cuda.langevin(launch, out, x, eps, sigma.double(), snr, Noise(*flat), measured)
    return out


def _perturb_and_target_cuda(
    x0: Tensor, eps: Tensor | None, alpha: Tensor, sigma: Tensor, p: Tensor, q: Tensor, *flat: Any
) -> tuple[Tensor, Tensor]:
    given = () if eps is None else (eps,)
    if not _fit(x0, *given):
        return _perturb_and_target(x0, eps, alpha, sigma, p, q, *flat)
    x0, *rest = _alike(x0, *given)
    noisy, target = torch.empty_like(x0), torch.empty_like(x0)
    factors = [c.double() for c in (alpha, sigma, p, q)]
    cuda.perturb_and_target(launch, noisy, target, x0, factors, rest[0] if rest else Noise(*flat))
    return noisy, target


def _dsm_loss_cuda(
    prediction: Tensor,
    weight: Tensor,
    x0: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    eps: Tensor | None,
    *flat: Any,
) -> Tensor:
    given = [x for x in (x0, eps) if x is not None]
    if not _fit(prediction, *given):
        return _dsm_loss(prediction, weight, x0, p, q, eps, *flat)
    prediction, *given = _alike(prediction, *given)
    if x0 is not None:
        x0, *given = given
    loss = prediction.new_empty(len(prediction), dtype=torch.promote_types(prediction.dtype, torch.float32))
    noise = given[0] if given else Noise(*flat)
    cuda.dsm_loss(launch, loss, prediction, x0, _double(p), _double(q), weight.double(), noise)
    return loss


def _normal_cuda(shape: Sequence[int], dtype: torch.dtype, *flat: Any) -> Tensor:
    noise = Noise(*flat)
    if not enabled(noise.seeds.device, dtype):
        return _normal(shape, dtype, *flat)
    out = torch.empty(tuple(shape), dtype=dtype, device=noise.seeds.device)
    cuda.lincomb(launch, out if out.ndim else out[None], [], [], None, noise)
    return out


def _rademacher_cuda(shape: Sequence[int], dtype: torch.dtype, *flat: Any) -> Tensor:
    noise = Noise(*flat)
    if not enabled(noise.seeds.device, dtype):
        return _rademacher(shape, dtype, *flat)
    out = torch.empty(tuple(shape), dtype=dtype, device=noise.seeds.device)
    cuda.rademacher(launch, out if out.ndim else out[None], noise)
    return out


def _fit(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernel takes these: what it does not, other dtypes or shapes that broadcast, the reference does."""
    return enabled(x.device, x.dtype) and all(other.shape == x.shape and other.dtype == x.dtype for other in others)


def _alike(x: Tensor, *others: Tensor) -> list[Tensor]:
    """All in the memory format of the first: contiguous, or channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    kept = not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return [each.contiguous(memory_format=last if kept else torch.contiguous_format) for each in (x, *others)]


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


# Shapes, for torch.compile.


def _fake_lincomb(inputs: list[Tensor], *_: Any) -> Tensor:
    return torch.empty_like(inputs[0])


def _fake_langevin(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_perturb_and_target(x0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0)


def _fake_dsm_loss(prediction: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=torch.promote_types(prediction.dtype, torch.float32))


def _fake_made(shape: Sequence[int], dtype: torch.dtype, seeds: Tensor, *_: Any) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=seeds.device)


def _fake_bits(shape: Sequence[int], seeds: Tensor, *_: Any) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.int64, device=seeds.device)


LIBRARY: torch.library.Library = torch.library.Library("scoresde", "DEF")
_AT = "Tensor seeds, Tensor draws, SymInt draw, SymInt row"
_MAYBE_AT = "Tensor? seeds, Tensor? draws, SymInt draw, SymInt row"

for _schema, _anywhere, _on_cuda, _fake in (
    (
        f"lincomb(Tensor[] inputs, Tensor[] coefficients, Tensor? std, {_MAYBE_AT}) -> Tensor",
        _lincomb, _lincomb_cuda, _fake_lincomb,
    ),
    (
        f"langevin(Tensor x, Tensor eps, Tensor sigma, float snr, bool measured, {_AT}) -> Tensor",
        _langevin, _langevin_cuda, _fake_langevin,
    ),
    (
        "perturb_and_target(Tensor x0, Tensor? eps, Tensor alpha, Tensor sigma, Tensor p, Tensor q, "
        f"{_MAYBE_AT}) -> (Tensor, Tensor)",
        _perturb_and_target, _perturb_and_target_cuda, _fake_perturb_and_target,
    ),
    (
        "dsm_loss(Tensor prediction, Tensor weight, Tensor? x0, Tensor? p, Tensor? q, Tensor? eps, "
        f"{_MAYBE_AT}) -> Tensor",
        _dsm_loss, _dsm_loss_cuda, _fake_dsm_loss,
    ),
    (f"normal(SymInt[] shape, ScalarType dtype, {_AT}) -> Tensor", _normal, _normal_cuda, _fake_made),
    (f"rademacher(SymInt[] shape, ScalarType dtype, {_AT}) -> Tensor", _rademacher, _rademacher_cuda, _fake_made),
    (f"bits(SymInt[] shape, {_AT}) -> Tensor", _bits, _bits, _fake_bits),
):  # fmt: skip
    _name = LIBRARY.define(_schema)
    LIBRARY.impl(_name, _anywhere, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"scoresde::{_name}", _fake, lib=LIBRARY)
