r"""Averages of any length, after training: least squares on snapshots of power-function averages.

A snapshot i taken at t_i images with exponent γ_i is ∫ p_i(τ) θ(τ) dτ with p_i(τ) = (γ_i+1) τ^{γ_i}/t_i^{γ_i+1} on
[0, t_i]. The average of another length has a profile p of the same form, and Σ_i c_i p_i ≈ p gives its weights as
Σ_i c_i θ̂_i (Karras et al. 2024, EDM2, sec. 3.2 and app. C). Here the c_i also sum to 1, so that what never moved is
kept exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import whole
from .publish import publish

Tensors = dict[str, Tensor]


def exponent(sigma_rel: float) -> float:
    """γ ≥ 0 of the profile (γ+1) τ^γ on [0, 1] whose standard deviation is `sigma_rel` (EDM2, app. C).

    The variance is (γ+1)/((γ+2)²(γ+3)), so γ is the largest root of (γ+2)²(γ+3) − (γ+1)/σ².

    Raises:
        ValueError: outside (0, 1/√12]: the longest is the plain mean, γ = 0.
    """
    if not 0 < sigma_rel <= 12**-0.5 + 1e-12:
        raise ValueError(f"sigma_rel is a share of training in (0, 0.2887], the last the plain mean; got {sigma_rel}.")
    ratio = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max()))


def write_snapshot(
    folder: Path | str,
    shadows: Mapping[str, nn.Module],
    images: int,
    sigma_rel: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes `folder/images-XXXXXXXXXXXX.safetensors`, whole or not at all.

        write_snapshot(folder, ema.shadows, run.images, ema.sigma_rel)

    Args:
        folder: of the snapshots of one run; made if it is not there.
        shadows: averages of one module (or of the same part of it), as of `PowerEMA`.
        images: seen so far, ≥ 1.
        sigma_rel: length of each shadow.
        dtype: of the stored parameters. bfloat16 halves the file and adds errors of 2^-9 per snapshot, which a
            reconstruction multiplies by its coefficients (a norm of 0.5 to 3 for lengths from 0.04 to 0.28).

    Raises:
        ValueError: there are no images, another number of lengths than of shadows, or a length out of range.
        OSError: it could not be written; what was there before is unchanged.
    """
    from safetensors.torch import save

    images = whole(images, "images")
    if len(shadows) != len(sigma_rel):
        raise ValueError(f"{len(shadows)} shadows need as many sigma_rel; got {list(sigma_rel)}.")
    for sigma in sigma_rel:
        exponent(sigma)
    tensors: Tensors = {}
    for index, module in enumerate(shadows.values()):
        weights = dict(module.named_parameters(remove_duplicate=False))
        tensors |= {f"{index}/{name}": p.detach().to("cpu", dtype) for name, p in weights.items()}
        buffers = {name: value for name, value in module.state_dict().items() if name not in weights}
        tensors |= {f"buffers/{name}": value.detach().cpu() for name, value in buffers.items()}
    # copies, because safetensors refuses tensors that share memory
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    facts = {"images": str(images), "sigma_rel": json.dumps([float(sigma) for sigma in sigma_rel])}
    path = Path(folder) / _name(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, save(tensors, {**facts, "sha256": digest(tensors, facts)}))
    return path


def reconstruct(
    folder: Path | str, sigma_rel: float, images: int | None = None, *, max_error: float = 0.1
) -> dict[str, Tensor]:
    """The average of length `sigma_rel` after `images` images: name -> float32 tensor, for `load_state_dict`.

    Parameters are combined in float64; buffers are those of the last snapshot.

    Args:
        folder: of the snapshots.
        sigma_rel: in (0, 1/√12]. What lies between the lengths that were tracked is represented well by a few
            snapshots; what is shorter needs more of them, spread over the last images.
        images: the end of the average, at one of the snapshots; None for the last. Later snapshots are not used.
        max_error: largest ‖Σ c_i p_i − p‖ / ‖p‖ that is accepted, > 0: see `coefficients`.

    Raises:
        ValueError: the length is out of range or cannot be represented by these snapshots, there is no snapshot, or one
            is damaged or of another module.
    """
    exponent(sigma_rel)
    paths = {_images(path): path for path in Path(folder).glob(f"images-{'[0-9]' * 12}.safetensors")}
    if not paths:
        raise ValueError(f"{folder} holds no snapshots (images-….safetensors); write_snapshot makes them in training.")
    images = max(paths) if images is None else images
    if images not in paths:
        near = min(paths, key=lambda count: abs(count - images))
        raise ValueError(f"{folder} has no snapshot at {images} images; the nearest is at {near}.")
    used = [path for count, path in sorted(paths.items()) if count <= images]
    profiles = [(_images(path), sigma) for path in used for sigma in _read(path)[0]]
    found, error = coefficients(profiles, (images, sigma_rel))
    if not error <= max_error:
        raise ValueError(
            f"sigma_rel={sigma_rel} at {images} images cannot be made from {len(used)} snapshots of lengths "
            f"{sorted({sigma for _, sigma in profiles})}: the profile would be off by {error:.0%} of its norm, more "
            f"than max_error={max_error:.0%}. Write snapshots more often, or choose a length nearer to those tracked."
        )
    share = iter(found.tolist())
    total: Tensors = {}
    tensors: Tensors = {}
    for path in used:
        lengths, tensors = _read(path)
        for index in range(len(lengths)):
            part, factor = _group(tensors, index), next(share)
            if total and {n: v.shape for n, v in part.items()} != {n: v.shape for n, v in total.items()}:
                raise ValueError(f"{path} is of another module than the snapshots before it.")
            total = {name: total.get(name, 0.0) + factor * value.double() for name, value in part.items()}
    return {name: value.float() for name, value in total.items()} | _group(tensors, "buffers")


def coefficients(profiles: Sequence[tuple[float, float]], target: tuple[float, float]) -> tuple[np.ndarray, float]:
    """(c (n,), ‖Σ c_i p_i − p‖ / ‖p‖): the least-squares combination of profiles (images, sigma_rel), with Σ c_i = 1.

    The error is that of the profile in L²[0, t]. That of the weights is far smaller as a rule, for what is missed is
    rough in τ and the weights are not.
    """
    t = np.array([*(images for images, _ in profiles), target[0]], dtype=np.float64) / target[0]
    gamma = np.array([exponent(sigma) for _, sigma in (*profiles, target)], dtype=np.float64)
    norm = (gamma + 1) / np.sqrt((2 * gamma + 1) * t)
    gram = _inner(t, gamma) / np.outer(norm, norm)  # of unit profiles: the scales differ by t^-1
    n = len(profiles)
    system = np.block([[gram[:n, :n], 1 / norm[:n, None]], [1 / norm[None, :n], np.zeros((1, 1))]])
    right = np.append(gram[:n, n], 1 / norm[n])
    unit = np.linalg.lstsq(system, right, rcond=1e-14)[0][:n]
    error = 1 - 2 * unit @ gram[:n, n] + unit @ gram[:n, :n] @ unit
    return unit * norm[n] / norm[:n], float(np.sqrt(max(error, 0.0)))


def _inner(t: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """∫ p_i p_j dτ = (γ_i+1)(γ_j+1)/(γ_i+γ_j+1) · (t_<)^{γ_>} / (t_>)^{γ_>+1}, γ_> being that of the later one."""
    low, high = np.minimum.outer(t, t), np.maximum.outer(t, t)
    later = np.where(t[:, None] >= t[None, :], gamma[:, None], gamma[None, :])
    return np.outer(gamma + 1, gamma + 1) / (np.add.outer(gamma, gamma) + 1) * (low / high) ** later / high


def _name(images: int) -> str:
    return f"images-{images:012d}.safetensors"


def _images(path: Path) -> int:
    return int(path.stem.removeprefix("images-"))


def _read(path: Path) -> tuple[list[float], Tensors]:
    """(lengths, tensors) of a snapshot.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
            # copies: what is read is mapped from the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        stored, lengths = facts.pop("sha256"), json.loads(facts["sigma_rel"])
        if stored != digest(tensors, facts) or path.name != _name(int(facts["images"])):
            raise ValueError("its SHA-256 or its name differs from what was written")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}. Remove it to go on without it, or restore a copy.") from error
    return lengths, tensors


def _group(tensors: Mapping[str, Tensor], group: int | str) -> Tensors:
    start = f"{group}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """SHA-256 of names, shapes, types and bytes, and of what the file says of itself."""
    made = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        made.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        made.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
