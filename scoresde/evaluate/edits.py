"""Given samples, changed: from which state each sample starts, and by what it is drawn from there."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import positive
from ..data import Dataset
from ..diffusion.conditions import Cond, move, named, take
from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import UniformGrid
from ..noise.rng import Rng
from ..ops.broadcast import expand_as_batch
from ..runs.publish import replacing
from ..sampling import AdaptiveODE, Sampler
from ..sampling.edit import From, attribute, interpolate
from . import figures
from .conditions import condition_arrays
from .evaluation import Samples, by_suffix

Words = str | list[str]


class Part(NamedTuple):
    """Some of the samples: all that is given, model data (·, *event), by key; of each sample (b,) its row and where it
    is in it, from 0 to 1; their conditions, and their noise; and what is said of the samples as they were given.
    """

    x: Mapping[str, Tensor]
    rows: Tensor
    share: Tensor
    cond: Cond
    rng: Rng
    before: Cond = None


class Edit(abc.ABC):
    """A change of given samples; each becomes n.

    Attributes:
        words: what is given, by key: names of files or of held-out samples.
        flow: by which samples are encoded and decoded; None where a sampler is needed.
        before: what is said of the given samples, as `cond` of a command says it; None for nothing.
        needs_cond: samples are drawn under a condition, which has to be said.
        from_noise: samples are drawn from noise, told what was given by `told`.
        one_noise: and all n of a row from the same.
    """

    words: dict[str, Words]
    flow: AdaptiveODE | None = None
    before: Any = None
    needs_cond = from_noise = one_noise = False

    def told(self, embed: Callable[[str], Tensor], rows: Tensor, share: Tensor) -> Tensor:
        """The embeddings (N, dim) that samples from noise are told; `embed` is of what is given by key, rows and
        share (N,) as in `Part`."""
        raise NotImplementedError

    def rows(self, names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
        """What becomes n samples each: names, and samples (k, *event)."""
        return names, x

    def samplers(self, samplers: Mapping[str, Sampler], model: Denoiser) -> dict[str, Sampler]:
        """What draws from the start."""
        return {"ode": Sampler(self.flow, steps=1, denoise=False)} if self.flow else dict(samplers)

    def start(self, model: Denoiser, part: Part) -> Tensor:
        """The states (b, *event) that the samples of a part start from; not asked of an edit `from_noise`."""
        raise NotImplementedError


class SDEdit(Edit):
    """Noised up to a level and drawn from there (`sdedit`): what is finer than the level is drawn anew.

    Args:
        input: photo.png, x.npy, test:5, test:0-7, or a list.
        level: noise level σ/α > 0, in units of model data.
    """

    def __init__(self, input: Words, level: float):
        self.words, self.level = {"input": input}, positive(level, "level", "a noise level sigma/alpha")

    def samplers(self, samplers: Mapping[str, Sampler], model: Denoiser) -> dict[str, Sampler]:
        return {
            name: Sampler(sampler.step, From(sampler.grid_for(model), self.level), sampler.steps, sampler.denoise)
            for name, sampler in samplers.items()
        }

    def start(self, model: Denoiser, part: Part) -> Tensor:
        x0 = part.x["input"][part.rows]
        return model.sde.perturb(x0, From(UniformGrid(), self.level).start(model.sde), part.rng.noise(x0))


class Interpolation(Edit):
    """From each sample to the next, both ends included, on the sphere of latents (`interpolate`).

    Args:
        input: two samples or more: [a.png,b.png], test:0-3.
        flow: encodes and decodes.
    """

    def __init__(self, input: Words, flow: AdaptiveODE):
        self.words, self.flow = {"input": input}, flow

    def rows(self, names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
        return _pairs(names, x)

    def start(self, model: Denoiser, part: Part) -> Tensor:
        assert self.flow is not None
        a, b = (self.flow.encode(model, part.x["input"][part.rows + k], cond=part.cond) for k in (0, 1))
        return interpolate(a, b, part.share)


def _pairs(names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
    if len(names) < 2:
        raise ValueError(f"An interpolation is between two samples or more: edit.input=[a.png,b.png]; got {names}.")
    return [f"{a} to {b}" for a, b in pairwise(names)], x[:-1]


class Attribute(Edit):
    """Moved by a multiple of the mean latent of samples with an attribute less that of samples without (`attribute`).

    Args:
        input, having, lacking: photo.png, x.npy, test:5, test:0-7, or lists.
        flow: encodes and decodes.
        strength: the multiple at the end of a row, which begins with 0.
    """

    def __init__(self, input: Words, having: Words, lacking: Words, flow: AdaptiveODE, strength: float = 1.0):
        self.words, self.flow = {"input": input, "having": having, "lacking": lacking}, flow
        self.strength = float(strength)

    def start(self, model: Denoiser, part: Part) -> Tensor:
        assert self.flow is not None

        def mean_of(key: str) -> Tensor:
            given = part.x[key]
            same = take(part.cond, torch.zeros(len(given), dtype=torch.int64))
            return self.flow.encode(model, given, cond=same)  # type: ignore[union-attr]

        z = self.flow.encode(model, part.x["input"][part.rows], cond=part.cond)
        return z + expand_as_batch(self.strength * part.share.to(z), z) * attribute(
            mean_of("having"), mean_of("lacking")
        )


class Retold(Edit):
    """Encoded by the flow under one condition and decoded under another: what they tell of differently, changes.

    Under the same condition the samples come back.

    Args:
        input: photo.png, x.npy, test:5, test:0-7, or a list.
        flow: encodes and decodes.
        before: what is true of the input, by kind, as in `cond`: {"text": "a 3"}. All null: its own conditions, where
            it is a held-out sample. None: encoded without a condition.
        level: noise level σ/α > 0 up to which it is encoded; the lower, the more of it stays. None: to the latent.
    """

    needs_cond = True

    def __init__(self, input: Words, flow: AdaptiveODE, before: Any = None, level: float | None = None):
        self.words, self.flow = {"input": input}, flow
        said = isinstance(before, Mapping) and any(value is not None for value in before.values())
        self.before = before if said or not isinstance(before, Mapping) else "input"
        self.level = None if level is None else positive(level, "level", "a noise level sigma/alpha")

    def samplers(self, samplers: Mapping[str, Sampler], model: Denoiser) -> dict[str, Sampler]:
        assert self.flow is not None
        grid = UniformGrid() if self.level is None else From(UniformGrid(), self.level)
        return {"ode": Sampler(self.flow, grid, 1, denoise=False)}

    def start(self, model: Denoiser, part: Part) -> Tensor:
        assert self.flow is not None
        to = None if self.level is None else From(UniformGrid(), self.level).start(model.sde)
        return self.flow.encode(model, part.x["input"][part.rows], cond=part.before, to=to)


class Variations(Edit):
    """Drawn from noise, told the embedding of what is given (Ramesh et al. 2022, sec. 3.1): what that knows, stays.

    Args:
        input: photo.png, x.npy, test:5, test:0-7, or a list.
    """

    from_noise = True

    def __init__(self, input: Words):
        self.words = {"input": input}

    def told(self, embed: Callable[[str], Tensor], rows: Tensor, share: Tensor) -> Tensor:
        return embed("input")[rows]


class EmbeddingInterpolation(Edit):
    """From each sample to the next, on the sphere of embeddings and from one noise (Ramesh et al. 2022, sec. 3.2).

    Args:
        input: two samples or more: [a.png,b.png], test:0-3.
    """

    from_noise = one_noise = True

    def __init__(self, input: Words):
        self.words = {"input": input}

    def rows(self, names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
        return _pairs(names, x)

    def told(self, embed: Callable[[str], Tensor], rows: Tensor, share: Tensor) -> Tensor:
        found = embed("input")
        return interpolate(found[rows], found[rows + 1], share)


@dataclass(frozen=True)
class Edited:
    """An edit with its samples.

    Attributes:
        edit: the change.
        x: what is given, model data (·, *event), by key.
        inputs: k names.
        truth: (k, *event), what is changed.
        n: samples of each.
        before: what is said of the given samples, a condition of k; None for nothing.
    """

    edit: Edit
    x: Mapping[str, Tensor]
    inputs: list[str]
    truth: Tensor
    n: int
    before: Cond = None

    @property
    def digest(self) -> str:
        """SHA-256 of what is given: another picture under the same name is another edit."""
        given = [*self.x.values(), *named(self.before).values()]
        return hashlib.sha256(b"".join(values.numpy().tobytes() for values in given)).hexdigest()

    def seeds(self, seeds: Sequence[int]) -> list[int]:
        """Of all k n samples, where those of one input have `seeds`."""
        return (self.n * [seeds[0]] if self.edit.one_noise else list(seeds)) * len(self.inputs)

    def condition(self, cond: Cond, dataset: Dataset) -> Cond:
        """What all k n samples are told: `cond`, and where they are drawn from noise, embeddings of what is given."""
        if not self.edit.from_noise:
            return cond
        assert dataset.embedder is not None
        embedder, (rows, share) = dataset.embedder, self._places(slice(None))
        vector = self.edit.told(lambda key: embedder.of(dataset.decode(self.x[key])), rows, share)
        return {**named(cond), "vector": vector}

    def _places(self, part: slice) -> tuple[Tensor, Tensor]:
        """The row of each of some samples, and where it is in that, from 0 to 1."""
        index = torch.arange(len(self.inputs) * self.n)[part]
        return index // self.n, (index % self.n).double() / max(self.n - 1, 1)

    def start(self, model: Denoiser, part: slice, cond: Cond, rng: Rng, device: torch.device) -> Tensor:
        """The states that the samples `part` of all k n start from."""
        rows, share = self._places(part)
        x = {name: values.to(device) for name, values in self.x.items()}
        before = self.before
        own = None if before is None else move(take(before, rows), device)
        return self.edit.start(model, Part(x, rows.to(device), share.to(device), cond, rng, own))


def write_edited(
    edited: Edited, made: Mapping[str, Samples], dataset: Dataset, folder: Path, *, seeds: Sequence[int], pictures: bool
) -> None:
    """`samples.npz`, in the coordinates of the raw data: given (k, *event), samples (k, n, *event) of the first sampler
    and, with their names, of others, and conditions; and `edited.png`, a row of n for each.
    """
    k, cond = len(edited.inputs), next(iter(made.values())).cond
    arrays: dict[str, Any] = {"given": dataset.decode(edited.truth), "inputs": edited.inputs, "seeds": seeds}
    arrays |= condition_arrays(cond, k)
    for suffix, samples in by_suffix(made):
        arrays[f"samples{suffix}"] = dataset.decode(samples.x).unflatten(0, (k, -1))
        if pictures:
            path = folder / f"edited{suffix}.png"
            made_raw, given = dataset.decode(samples.x), arrays["given"]
            figures.sample_grid(made_raw, given, path, columns=min(edited.n, 16), beside="given")
    with replacing(folder / "samples.npz") as file:
        np.savez_compressed(file, **arrays)
