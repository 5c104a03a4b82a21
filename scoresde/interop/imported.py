"""A network of another project as what builds it here, its weights, and what its file says of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import whole
from ..codecs import Autoencoder
from ..config import ConfigError, build, build_network
from ..data.text import Text
from ..diffusion.denoiser import Preconditioned
from .pickles import ForeignFileError

Node = dict[str, Any]
_LARGEST = 4096  # pixels of a side; a file may claim any


@dataclass(frozen=True)
class Imported:
    """What a file of another project holds.

    Attributes:
        path: the file.
        format: in words.
        licence: of the weights that its project published, in words.
        network, sde, parameterization: nodes with `_target_`, as a configuration has them.
        weights: of the network by our names; the average, where the file has one.
        raw_weights: the last ones, where the file has them beside the average.
        event_shape: of a sample.
        noise_input: a node, or None for ¼ log(σ/α).
        scale_input, sigma_data: see `Preconditioned`.
        span: the range of the data that the network was trained with; None where they are latents.
        classes: number of labels; 0 for none.
        codec: raw data to model data; None for 8-bit pictures in `span`, or latents as they are.
        text: how sentences become conditions; None where there are none.
        outputs: 2 where the network learns the variance of reverse steps beside their mean, see `Split`.
        uncertainty: of `nn.LogVariance`, where the loss has learned a weight of each noise level.
        unknown: what the file does not say, in words.
    """

    path: Path
    format: str
    licence: str
    network: Node
    sde: Node
    parameterization: Node
    weights: Mapping[str, Tensor] = field(repr=False)
    event_shape: tuple[int, ...]
    raw_weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    noise_input: Node | None = None
    scale_input: bool = False
    sigma_data: float = 1.0
    span: tuple[float, float] | None = (-1.0, 1.0)
    classes: int = 0
    codec: Autoencoder | None = None
    text: Text | None = None
    outputs: int = 1
    uncertainty: Mapping[str, Tensor] | None = field(default=None, repr=False)
    unknown: tuple[str, ...] = ()

    @property
    def denoiser_node(self) -> Node:
        """What the files of conf/denoiser hold."""
        return {
            "_target_": "scoresde.Split" if self.outputs == 2 else "scoresde.Preconditioned",
            "sigma_data": self.sigma_data,
            "noise_input": self.noise_input,
            "scale_input": self.scale_input,
            "autocast": None,
        }

    def build_network(self, weights: str = "ema") -> nn.Module:
        """The network with its weights, "ema" or "weights" (the last ones), in eval mode.

        Raises:
            ForeignFileError: the weights do not make the network that the file says they do.
        """
        chosen = self.weights if weights == "ema" or self.raw_weights is None else self.raw_weights
        try:
            with torch.device("meta"):  # shapes without memory, whatever sizes the file claims
                expected = self._network().state_dict()
            check_shapes(expected, chosen)
            network = self._network()
            network.load_state_dict(chosen)
        except (ConfigError, RuntimeError, ValueError) as error:
            raise ForeignFileError(f"{self.path} does not hold the network that it says: {error!s:.800}") from error
        return network.eval().requires_grad_(False)

    def _network(self) -> nn.Module:
        """The network, freshly initialised, with what reads its sentences."""
        node, facts = dict(self.network), dict[str, Any](event_shape=self.event_shape, classes=self.classes)
        if self.text is not None:
            size = self.text.tokenizer.size
            facts["text"] = build_network(node.pop("text"), key="network.text", classes=0, vocabulary=size)
        made: nn.Module = build_network(node, **facts)
        return made

    def denoiser(self, weights: str = "ema") -> Preconditioned:
        """The denoiser around it; x_t, t and conditions are those of `sde`."""
        parts = {name: build(vars(self)[name], key=name) for name in ("sde", "parameterization")}
        found: Preconditioned = build(self.denoiser_node, key="denoiser", network=self.build_network(weights), **parts)
        return found.eval()

    def summary(self) -> str:
        """What was understood, line by line."""
        count = sum(values.numel() for name, values in self.weights.items() if not name.endswith("omega"))
        labels = f"{self.classes} classes" if self.classes else "sentences" if self.text else "no classes"
        data = "latents, whose range the file does not say" if self.span is None else f"data in {list(self.span)}"
        data = data if self.codec is None else f"latents by {self.codec}"
        lines = {
            "format": self.format,
            "network": f"{_said(self.network)}, {count:,} parameters",
            "process": _said(self.sde),
            "output": _said(self.parameterization) + ", and the variance of a step" * (self.outputs == 2),
            "told": "log(sigma/alpha) / 4" if self.noise_input is None else _said(self.noise_input),
            "data": f"{self.event_shape}, {data}, {labels}",
            "weights": "the average and the last ones" if self.raw_weights else "one set",
            "licence": self.licence,
            "not known": "; ".join(self.unknown) or "nothing that is needed",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _said(node: Node) -> str:
    """A node as a line of code; long lists are cut."""
    inner = node.get("network")
    shown = {n: v for n, v in node.items() if not n.startswith("_") and v is not None and n != "network"}
    args = [f"{name}={value!s:.60}" for name, value in shown.items()]
    name = node["_target_"].rpartition(".")[2]
    return f"{name}({', '.join([*([_said(inner)] if inner else []), *args])})"


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of a network, by names and shapes.

    Raises:
        ValueError: the first that is missing, too many, or of another shape.
    """
    for name in sorted(expected.keys() | found.keys()):
        sizes = [tuple(each[name].shape) if name in each else None for each in (expected, found)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} is expected to have shape {sizes[0]}, and has {sizes[1]}.")


class Tensors:
    """The tensors of a file by their names there, each of which is taken once.

    Args:
        named: the tensors.
        path: of the file, for messages.
    """

    def __init__(self, named: Mapping[str, Any], path: Path):
        self.path, self._left = path, dict(named)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Tensor:
        """A tensor in float32; it must be there.

        Raises:
            ForeignFileError: it is not, or is none of floating-point numbers.
        """
        value = self._left.pop(name, None)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            near = ", ".join(list(self._left)[:4])
            raise ForeignFileError(f"{self.path} has no tensor {name}, which its network needs; it has {near} ….")
        return value.detach().float().contiguous()

    def layers(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Weights and biases of layers, by our names for them -> theirs."""
        ends = ("weight", "bias")
        return {f"{ours}.{end}": self.take(f"{theirs}.{end}") for ours, theirs in names.items() for end in ends}

    def drop(self, *endings: str) -> None:
        """Leaves out tensors that have no effect, by the ends of their names."""
        self._left = {name: value for name, value in self._left.items() if not name.endswith(endings)}

    def done(self) -> None:
        """Refuses a file with more tensors than its network has: it would be another network.

        Raises:
            ForeignFileError: some are left.
        """
        if self._left:
            names = ", ".join(list(self._left)[:4])
            raise ForeignFileError(
                f"{self.path} has {len(self._left)} tensors that its network does not need: {names}."
            )


@dataclass(frozen=True)
class Arguments:
    """The constructor's arguments that a file gives, each looked up once, with the default that its project has."""

    given: Mapping[str, Any]
    path: Path
    used: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any) -> Any:
        self.used.add(name)
        return self.given.get(name, default)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, small enough to be meant."""
        try:
            number = whole(self.get(name, default), name, least)
        except ValueError as error:
            raise ForeignFileError(f"{self.path}: {error}") from error
        if number > 1 << 20:
            raise ForeignFileError(f"{self.path}: {name}={number} is no size of a network.")
        return number

    def wholes(self, name: str, default: Iterable[int] = ()) -> list[int]:
        value = self.get(name, list(default))
        if not isinstance(value, (list, tuple)) or len(value) > 16 or not all(type(n) is int for n in value):
            raise ForeignFileError(f"{self.path}: {name} is a list of a few whole numbers; got {value!s:.80}.")
        return list(value)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ForeignFileError(f"{self.path}: {name} is a number; got {value!s:.80}.")
        return float(value)

    def only(self, name: str, default: Any, *known: Any) -> Any:
        """A choice, of which these are known here."""
        value = self.get(name, default)
        if value not in known:
            listed = " or ".join(map(repr, known))
            raise ForeignFileError(f"{self.path}: {name}={value!s:.80} is not known here, {listed} is.")
        return value

    def size(self, name: str) -> int:
        """The side of a picture."""
        number = self.whole(name)
        if number > _LARGEST:
            raise ForeignFileError(f"{self.path}: pictures of {name}={number} pixels are more than {_LARGEST}.")
        return number

    def done(self, *idle: str) -> None:
        """Refuses arguments that nobody asked for, but for those that change no output.

        Raises:
            ForeignFileError: names them.
        """
        if unknown := sorted(set(map(str, self.given)) - self.used - set(idle)):
            raise ForeignFileError(f"{self.path}: the argument {unknown[0]:.80} is not known here.")


def with_outlet_negated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the network that says minus what another one says."""
    return {name: -value if name.startswith("outlet.") else value for name, value in weights.items()}
