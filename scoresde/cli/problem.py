"""An inverse problem as a command gives it: what was measured, read from files or made of clean samples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, build, taken
from ..data import Dataset
from ..data.folder import read_image
from ..data.source import existing, read_array
from ..evaluate.problem import Problem, affine
from ..inverse import Observation
from ..noise.rng import Rng
from .kinds import held_out

_NOISE = 2**62  # seeds of the noise in measurements are above those of samples


def read_problem(options: Mapping[str, Any], dataset: Dataset, allow: Sequence[str]) -> Problem | None:
    """The problem that a command describes, None for problem=none.

    Raises:
        ConfigError, ValueError, OSError: what was given does not fit; says what was expected and found.
    """
    node = options["problem"]
    if not isinstance(options["simulate"], bool):
        raise ConfigError(f"simulate is true or false; got {options['simulate']!r}.")
    if node is None:
        for key in ("input", "mask", "simulate"):
            if options[key] not in (None, False):
                raise ConfigError(
                    f"{key}={options[key]} is part of a problem; say which: problem=inpaint, superres, …."
                )
        return None
    if not isinstance(node, Mapping) or "operator" not in node:
        raise ConfigError("problem is a mapping with _target_: scoresde.Observation and an operator.")
    if options["input"] is None:
        raise ConfigError("A problem needs what was measured: input=photo.png, or input=test:0 for a held-out sample.")
    operator, mask = _operator(node["operator"], options["mask"], dataset.event_shape, allow)
    observation = build(node, allow, key="problem", y=None, operator=operator)
    given = _Measurement(dataset, observation, mask is not None)
    names = _names(options["input"], len(dataset.test))
    clean = [given.clean(name, options["simulate"]) for name in names]
    known = [x for x in clean if x is not None]
    if known and len(known) < len(names):
        raise ConfigError("Inputs are all test:… (or simulate=true), or all measured; got both.")
    ys = [
        given.read(name) if x is None else given.simulate(x, options["seed"])
        for name, x in zip(names, clean, strict=True)
    ]
    return Problem(observation, torch.stack(ys), given.seen, mask, torch.stack(known) if known else None, names)


def _operator(node: Any, path: Any, event: tuple[int, ...], allow: Sequence[str]) -> tuple[Any, Tensor | None]:
    """The operator, told what it asks for and the configuration does not say; and the mask, if that was part of it."""
    known, _ = taken(node, allow, key="problem.operator")
    partial = bool(node.get("_partial_"))
    asks = set(known) - set(node) if partial else set()
    if "mask" not in asks:
        if path is not None:
            raise ConfigError(f"mask={path}: {node['_target_']} takes no mask; problem=inpaint does.")
        mask = None
    elif path is None:
        raise ConfigError(
            "Give the mask, not 0 where the input is seen: mask=mask.png or mask=mask.npy; or the rectangle "
            "that is not seen, rows and columns: mask=hole:0-13x7-20."
        )
    else:
        mask = read_mask(path, event)
    facts = {name: value for name, value in (("mask", mask), ("event_shape", event)) if name in asks}
    return build(node, allow, key="problem.operator", **facts), mask


def _names(given: Any, count: int) -> list[str]:
    """Inputs one by one: test:3-5 is test:3, test:4 and test:5.

    Raises:
        ConfigError: no name, or a sample that is not there.
    """
    names: list[str] = []
    for name in given if isinstance(given, list) else [given]:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"input is a file, test:5, or a list of such: input=[a.png,b.png]; got {given!r}.")
        if not name.startswith("test:"):
            names.append(name)
            continue
        names += [f"test:{i}" for i in held_out(f"input={name}", name, count).tolist()]
    if not names:
        raise ConfigError("input is an empty list.")
    return names


class _Measurement:
    """Reads and makes measurements for one observation."""

    def __init__(self, dataset: Dataset, observation: Observation, masked: bool):
        self.dataset, self.observation, self.masked = dataset, observation, masked
        event = dataset.event_shape
        noise = Rng(0).normal((1, *event))
        observation.near(noise, observation.split({"y": observation(noise)})[0])  # refuses what is not linear
        self.seen = (observation(noise) != 0)[0]
        # of the constant 1: an operator that keeps it commutes with the scaling of the data
        self.unit = observation(torch.ones(1, *event))[0]
        self.shape = tuple(self.unit.shape)
        self.keeps = bool(((self.unit - 1)[self.seen].abs() < 1e-4).all())

    def clean(self, name: str, simulate: bool) -> Tensor | None:
        """The sample behind an input that is to be degraded; None for one that is measured."""
        dataset = self.dataset
        if name.startswith("test:"):
            return dataset.encode(dataset.test.raw[int(name[5:])][None])[0]
        if not simulate:
            return None
        values, picture = _values(name, dataset.event_shape, "a clean sample")
        self._check_range(name, values, picture)
        slope, offset = affine(dataset.scaling, picture)
        return slope * values + offset

    def simulate(self, x: Tensor, seed: int) -> Tensor:
        """y of a clean x (*event): its noise depends on x and the seed alone."""
        own = int(hashlib.sha256(x.numpy().tobytes()).hexdigest()[:15], 16)
        seen = self.observation(x[None])
        noise = Rng(seeds=[_NOISE + (own ^ seed)]).normal_like(seen)
        return torch.where(self.seen, seen + self.observation.std.to(seen) * noise, 0)[0]

    def read(self, name: str) -> Tensor:
        """y from a file, in model coordinates: A of raw values v becomes A of slope · v + offset."""
        try:
            values, picture = _values(name, self.shape, "what was measured")
        except ValueError as error:
            if self.shape == self.dataset.event_shape:
                raise
            raise ValueError(f"{error} To degrade a clean sample instead: simulate=true.") from error
        if picture and not self.keeps:
            raise ValueError(f"{name}: what this operator measures is no picture; give its values as .npy.")
        self._check_range(name, values[self.seen], picture)
        if not self.observation.linear:
            return values  # there is no rule: taken to be of model data
        slope, offset = affine(self.dataset.scaling, picture)
        return torch.where(self.seen, slope * values + offset * self.unit, 0)

    def _check_range(self, name: str, values: Tensor, picture: bool) -> None:
        """Refuses values that are none of the data, with noise, and pictures of data that have no range."""
        scaling = self.dataset.scaling
        bounded = scaling.levels is not None or scaling.bounded
        if picture and not bounded:
            raise ValueError(f"{name}: data without a range are in no picture; give their values as .npy.")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} holds NaN or infinite values.")
        if picture or not bounded or not self.keeps:
            return
        low, high = (0, scaling.levels - 1) if scaling.levels else (scaling.raw_low, scaling.raw_high)
        slack = 6 * float(self.observation.std.max()) / affine(scaling)[0] + 1e-6 * (high - low)
        if float(values.min()) < low - slack or float(values.max()) > high + slack:
            raise ValueError(
                f"{name}: expected values {low:g} … {high:g} as the data of the run have, found "
                f"{float(values.min()):g} … {float(values.max()):g}."
            )


def _values(name: str, shape: tuple[int, ...], what: str) -> tuple[Tensor, bool]:
    """Values of a file, float32 of `shape`, and whether they are those of a picture."""
    file = existing(name)
    if file.suffix == ".npy":
        values = read_array(file)
        if values.shape == (1, *shape) or (shape[0] == 1 and values.shape == shape[1:]):
            values = values.reshape(shape)
        if values.shape != shape:
            raise ValueError(f"{file}: expected {what} of shape {shape}, found {tuple(values.shape)}.")
        return torch.from_numpy(values.astype(np.float32)), False
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{file}: expected {what} of shape {shape} as .npy, which no picture holds.")
    pixels = read_image(file, shape[0])
    if tuple(pixels.shape) != shape:
        raise ValueError(
            f"{file}: expected {what} of {shape[2]} × {shape[1]} pixels, found {pixels.shape[2]} × {pixels.shape[1]}."
        )
    return pixels.float(), True


def read_mask(path: Any, event: tuple[int, ...]) -> Tensor:
    """(*event) bool from mask.png (one for all channels), mask.npy or a rectangle, hole:ROWSxCOLUMNS.

    Raises:
        ConfigError: the path is no text, or the rectangle is none of a sample.
        FileNotFoundError: there is no such file.
        ValueError: not of the size of a sample, more than two values, or nothing seen.
    """
    if not isinstance(path, str):
        raise ConfigError(f"mask is the name of a file, or hole:ROWSxCOLUMNS; got {path!r}.")
    if path.startswith("hole:"):
        return _without(path, event)
    file = existing(path)
    if file.suffix == ".npy":
        values = torch.from_numpy(read_array(file).astype(np.float32))
        shapes = {tuple(event), tuple(event[1:]), (1, *event[1:])} - {()}
    else:
        values = read_image(file, 1).float()
        shapes = {(1, *event[1:])} if len(event) == 3 else set()
    if tuple(values.shape) not in shapes:
        expected = f"{event[2]} × {event[1]} pixels" if len(event) == 3 else f"shape {event}, as .npy"
        found = " × ".join(map(str, reversed(values.shape[-2:]))) if len(event) == 3 else tuple(values.shape)
        raise ValueError(f"{file}: expected a mask of {expected} as the samples have, found {found}.")
    levels = values.unique().tolist()
    if len(levels) > 2 or (len(levels) == 2 and 0 not in levels):
        raise ValueError(
            f"{file}: expected a mask of two values, 0 (not seen) and another, found {len(levels)}: "
            f"{', '.join(f'{v:g}' for v in levels[:4])}{' …' if len(levels) > 4 else ''}. JPEG blurs masks; use PNG."
        )
    if levels == [0]:
        raise ValueError(f"{file}: expected a mask that is not 0 where the input is seen, found nothing seen.")
    return (values != 0).expand(event).clone()


def _without(hole: str, event: tuple[int, ...]) -> Tensor:
    """All of a sample but a rectangle: hole:0-13x7-20 has rows 0 to 13 and columns 7 to 20."""
    match = re.fullmatch(r"hole:(\d+)-(\d+)x(\d+)-(\d+)", hole)
    top, bottom, left, right = map(int, match.groups()) if match else (1, 0, 1, 0)
    if len(event) != 3 or not (top <= bottom < event[1] and left <= right < event[2]):
        raise ConfigError(
            f"mask={hole}: expected rows and columns of samples of shape {event}, counted from 0, as in hole:0-13x7-20."
        )
    seen = torch.ones(event, dtype=torch.bool)
    seen[:, top : bottom + 1, left : right + 1] = False
    if not bool(seen.any()):
        raise ConfigError(f"mask={hole}: expected some pixels that are seen, found none.")
    return seen
