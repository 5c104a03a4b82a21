"""The weights of U-Nets of other projects under the names that `UNet` has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .imported import Tensors


class Place(NamedTuple):
    """A layer of a `UNet`: what it is, its name, the part of the network that it is in, the level, the number there."""

    kind: str
    ours: str
    part: str
    level: int = 0
    number: int = 0


@dataclass(frozen=True)
class Layout:
    """Which layers a `UNet` has.

    Attributes:
        sides: the resolution of each level.
        blocks: residual blocks per level.
        attended: which levels have attention.
        attend_all, middle: attention after every block on the way up; in the middle.
        pyramid: x is added to each level.
        resample: "block" or "conv", what halves and doubles.
    """

    sides: Sequence[int]
    blocks: int
    attended: Sequence[bool]
    attend_all: bool = False
    middle: bool = True
    pyramid: bool = False
    resample: str = "block"

    def node(self, width: int, multipliers: Sequence[int]) -> dict[str, Any]:
        """The node of a configuration that makes a `UNet` of these layers, for its other arguments to be added."""
        return {
            "_target_": "scoresde.nn.UNet",
            "_partial_": True,
            "width": width,
            "multipliers": multipliers,
            "blocks": self.blocks,
            "attention": [side for side, has in zip(self.sides, self.attended, strict=True) if has],
            **({"attend_all": True} if self.attend_all else {}),
            "middle_attention": self.middle,
        }

    def places(self) -> Iterator[Place]:
        """Its layers in the order of use."""
        yield Place("conv", "inlet", "inlet")
        for level, attended in enumerate(self.attended):
            if level:
                yield Place(self.resample, f"downs.{level - 1}", "down", level)
                if self.pyramid:
                    yield Place("conv", f"pyramid.{level - 1}.conv", "pyramid", level)
            for index in range(self.blocks):
                yield Place("block", f"encoder.{level}.{index}.0", "encoder", level, index)
                if attended:
                    yield Place("attention", f"encoder.{level}.{index}.1", "encoder", level, index)
        last = len(self.attended) - 1
        yield Place("block", "middle.0", "middle", last, 0)
        if self.middle:
            yield Place("attention", "middle.1", "middle", last, 0)
        yield Place("block", f"middle.{1 + self.middle}", "middle", last, 1)
        for at, level in enumerate(reversed(range(len(self.attended)))):
            if at:
                yield Place(self.resample, f"ups.{at - 1}", "up", level)
            for index in range(self.blocks + 1):
                yield Place("block", f"decoder.{at}.{index}.0", "decoder", level, index)
                if self.attended[level] and (self.attend_all or index == self.blocks):
                    yield Place("attention", f"decoder.{at}.{index}.1", "decoder", level, index)
        yield Place("norm", "norm", "norm")
        yield Place("conv", "outlet", "outlet")


class Names(NamedTuple):
    """What the layers of a residual block and of attention are called, by our names for them."""

    block: Mapping[str, str]
    attention: Mapping[str, str]


def unet_weights(
    layout: Layout,
    tensors: Tensors,
    names: Names,
    theirs: Callable[[Place], str],
    attention: Callable[[Place, str], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The weights of all layers but those of the embedding.

    Args:
        layout: which there are.
        tensors: of the file.
        names: see `Names`.
        theirs: a place -> the beginning of its tensors' names in the file.
        attention: (a place, that beginning) -> its weights by our names; None takes `names.attention`.
    """
    found: dict[str, Tensor] = {}
    for place in layout.places():
        start = theirs(place)
        pieces = {"": ""}
        if place.kind == "attention":
            if attention is not None:
                found |= {f"{place.ours}.{name}": value for name, value in attention(place, start).items()}
                continue
            pieces = dict(names.attention)
        elif place.kind == "block":
            pieces = {o: t for o, t in names.block.items() if o != "skip" or f"{start}.{t}.weight" in tensors}
        elif place.kind == "conv" and place.part in ("down", "up"):
            pieces = {"conv": ""}
        for ours, theirs_piece in pieces.items():
            for last in ("weight", "bias"):
                value = tensors.take(".".join(filter(None, (start, theirs_piece, last))))
                found[".".join(filter(None, (place.ours, ours, last)))] = value
    return found


def rows_of_qkv(value: Tensor, heads: int, order: str) -> Tensor:
    """The rows (3C, …) of a layer that makes queries, keys and values, in our order: which of the three, head, channel.

    Args:
        value: the rows.
        heads: number of heads.
        order: how they lie, of "w" (which), "h" (head) and "c" (channel), the slowest first.
    """
    sizes = {"w": 3, "h": heads, "c": len(value) // (3 * heads)}
    split = value.unflatten(0, tuple(sizes[letter] for letter in order))
    rest = range(3, split.ndim)
    return split.permute(*(order.index(letter) for letter in "whc"), *rest).flatten(0, 2).contiguous()


def with_none(rows: Tensor) -> Tensor:
    """A table of labels with a last row for none, zeros."""
    return torch.cat([rows, torch.zeros_like(rows[:1])])


def swapped_halves(weight: Tensor) -> Tensor:
    """A layer of waves that are sine, then cosine, for ours, which are cosine, then sine."""
    return torch.cat([*reversed(weight.chunk(2, 1))], 1).contiguous()


def geometric(count: int, *, last: bool) -> Tensor:
    """Frequencies from 1 down to 1/10000, with the `last` one or just short of it."""
    steps = count - 1 if last else count
    return (10_000.0 ** (-torch.arange(count, dtype=torch.float64, device="cpu") / max(1, steps))).float()
