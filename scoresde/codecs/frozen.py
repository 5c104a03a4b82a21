"""A trained network that data are read by, with what a run folder needs to keep it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .codec import Codec


class Frozen:
    """What a frozen dataclass of a codec, a network and the JSON of the node that makes the network can do.

    Attributes:
        base: raw data to what the network sees.
        network: taken as it is, in eval mode and without gradients of its weights.
        node: JSON of the node of a configuration that makes the network, so that a run folder can keep it.
    """

    base: Codec
    network: Any
    node: str

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, of what they are the weights of, and of the codec below; not of other numbers, which
        another machine may measure a digit differently."""
        if "_digest" not in vars(self):
            found = hashlib.sha256(f"{self.base!r} {self.node}".encode())
            for name, value in sorted(self.tensors().items()):
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            object.__setattr__(self, "_digest", found.hexdigest())
        return str(vars(self)["_digest"])

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return {name: value.detach() for name, value in self.network.state_dict().items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> Any:
        """It with these weights.

        Raises:
            ValueError: they are those of another network.
        """
        try:
            self.network.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the weights of the {type(self).__name__.lower()} do not fit: {error!s:.300}") from error
        return dataclasses.replace(cast(Any, self))

    def recipe(self) -> dict[str, Any]:
        """Its fields as a configuration has them, with the network as the node that makes it."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(cast(Any, self))}
        return fields | {"network": json.loads(self.node)}
