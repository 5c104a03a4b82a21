"""An inverse problem as a command gives it: the operator, what was measured, a mask, and how it is solved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codecs import Codec
from ..config import ConfigError, build, leaves_open
from ..data import Dataset
from ..data.by_name import held_out, hole, mask_in_file, names_held_out
from ..diffusion.conditions import Cond, named
from ..diffusion.denoiser import Denoiser, model_device
from ..evaluate.problem import Measurement, Problem, through
from ..inverse.observation import WithoutMeasurement
from ..sampling import Sampler


class Method(NamedTuple):
    """How a problem is solved: what is sampled, by what, and how many samples at a time."""

    denoiser: Denoiser
    samplers: dict[str, Sampler]
    batch_size: int


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
                raise ConfigError(f"{key}={options[key]} is part of a problem; say which: problem=inpaint, superres.")
        return None
    if not isinstance(node, Mapping) or "operator" not in node:
        raise ConfigError("problem is a mapping with _target_: scoresde.Observation and an operator.")
    if options["input"] is None:
        raise ConfigError("A problem needs what was measured: input=photo.png, or input=test:0 for a held-out sample.")
    dataset = dataset.pixels
    operator, mask = _operator(node["operator"], options["mask"], dataset.event_shape, allow)
    measurement = Measurement(dataset, build(node, allow, key="problem", y=None, operator=operator))
    inputs = names_of(options["input"], len(dataset.test), "input")
    return measurement.problem(inputs, mask, simulate=options["simulate"], seed=options["seed"])


def _operator(node: Any, words: Any, event: tuple[int, ...], allow: Sequence[str]) -> tuple[Any, Tensor | None]:
    """The operator, and the mask if it has one.

    One that is `_partial_` is given the mask and the shape of a sample, where it has an argument for them.
    """
    facts: dict[str, Any] = {}
    for name in ("mask", "event_shape"):
        if leaves_open(node, name, allow, key="problem.operator") and node.get("_partial_"):
            facts[name] = read_mask(words, event) if name == "mask" else event
    mask = facts.get("mask")
    if mask is None and words is not None:
        raise ConfigError(f"mask={words}: {node['_target_']} takes no mask; problem=inpaint does.")
    return build(node, allow, key="problem.operator", **facts), mask


def read_mask(words: Any, event: tuple[int, ...]) -> Tensor:
    """(*event) bool from mask.png (one for all channels), mask.npy or a rectangle, hole:ROWSxCOLUMNS.

    Raises:
        ConfigError, ValueError, OSError: it is none of these, or does not fit a sample.
    """
    if words is None:
        hidden = "the rectangle that is not seen, rows and columns: mask=hole:0-13x7-20"
        raise ConfigError(f"Give the mask, not 0 where the input is seen: mask=mask.png or mask=mask.npy; or {hidden}.")
    if not isinstance(words, str):
        raise ConfigError(f"mask is the name of a file, or hole:ROWSxCOLUMNS; got {words!r}.")
    return (hole if words.startswith("hole:") else mask_in_file)(words, event)


def names_of(given: Any, count: int, key: str) -> list[str]:
    """Inputs one by one: test:3-5 is test:3, test:4 and test:5, of `count` held-out samples."""
    names: list[str] = []
    words = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ConfigError(f"{key} is a file, test:5, or a list of such: {key}=[a.png,b.png]; got {given!r}.")
        held = held_out(word, count, key).tolist() if names_held_out(word) else None
        names += [word] if held is None else [f"test:{i}" for i in held]
    if not names:
        raise ConfigError(f"{key} is an empty list.")
    return names


def choose_method(
    problem: Problem, node: Any, plain: Method, allow: Sequence[str], *, codec: Codec, cond: Cond, n: int
) -> Method:
    """The posterior method that `node` describes, around a method that knows nothing of the problem. Of a model of
    latents the operator goes through the decoder of `codec`, so methods that want a linear one refuse it.

    It is a denoiser around the denoiser, or steps around or instead of those of the samplers. The n particles of an
    input move together, in a batch of their own.

    Raises:
        ConfigError, ValueError: it cannot be built, or does not fit; or n particles are more than a batch, or have
            different conditions.
    """
    denoiser, samplers, batch_size = plain
    observation = copy.deepcopy(through(codec, problem.observation)).to(model_device(denoiser))
    if leaves_open(node, "denoiser", allow, key="posterior"):
        posterior = build(node, allow, key="posterior", denoiser=denoiser, observation=observation)
        return plain._replace(denoiser=posterior)
    if "particles" in node:
        _check_particles(cond, n, batch_size)
        batch_size, node = n, {**node, "particles": node.get("particles") or n}
    takes_step, steps = leaves_open(node, "step", allow, key="posterior"), {}
    for name, sampler in samplers.items():
        around = {"step": sampler.step} if takes_step else {}
        step = build(node, allow, key="posterior", observation=observation, **around)
        steps[name] = Sampler(step, sampler.grid, sampler.steps, sampler.denoise)
    return Method(WithoutMeasurement(denoiser, observation), steps, batch_size)


def _check_particles(cond: Cond, n: int, batch_size: int) -> None:
    together = f"The n={n} particles of an input move together"
    if n > batch_size:
        raise ConfigError(f"{together}: batch_size is at least {n}.")
    for name, rows in named(cond).items():
        each = rows.unflatten(0, (-1, n)).nan_to_num()
        if not torch.equal(each, each[:, :1].expand_as(each)):
            raise ConfigError(f"{together} under one condition: cond.{name} has one row, or is input.")
