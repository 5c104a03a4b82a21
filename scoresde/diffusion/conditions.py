"""Conditions: what a model is given beside x_t, and everything that is done with it.

A caller gives a tensor, a mapping of tensors by name ("label", "vector", "image", "tokens", "text"), or None for
nothing. It reaches the network, and every function of the caller's own, in the form in which it was given; whoever
reads it or makes another of it works on the mapping that `named` makes. The first dimension of every tensor counts
samples.

A sample may be without a condition in the midst of others: its floats are all NaN, its label is one more than the last,
and its text, integers (B, L) that number the parts of sentences from 0, is all `PADDING`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Cond = Tensor | Mapping[str, Tensor] | None
"""A condition, passed unread from the caller to the network; None is unconditional."""

PADDING = -1
"""What fills the rows of a text behind their ends; 0 is a token of many tokenizers."""


def named(cond: Cond, bare: str = "label") -> dict[str, Tensor]:
    """The tensors of a condition by name; a tensor by itself is called `bare`. Nothing is an empty mapping."""
    if cond is None:
        return {}
    return {bare: cond} if isinstance(cond, Tensor) else dict(cond)


def unnamed(parts: Mapping[str, Tensor], bare: str = "label") -> Cond:
    """A condition of these parts: the tensor itself where `bare` is all there is, None where there is nothing."""
    return parts[bare] if parts.keys() == {bare} else parts or None


def each(fn: Callable[[Tensor], Tensor], cond: Cond) -> Cond:
    """The condition of the same form that `fn` makes of every tensor."""
    return unnamed({name: fn(value) for name, value in named(cond, "").items()}, "")


def take(cond: Cond, rows: Tensor | slice) -> Cond:
    """The condition of the samples `rows`, a slice or indices (n,)."""
    return each(lambda value: value[rows], cond)


def move(cond: Cond, device: torch.device) -> Cond:
    """The condition on `device`."""
    return each(lambda value: value.to(device), cond)


def expand(cond: Cond, like: Tensor) -> Cond:
    """A condition with one entry, () or (1, *), for all samples of `like` (B, *event) and on its device.

    One that has B entries is only moved.
    """

    def expanded(value: Tensor) -> Tensor:
        value = (value[None] if value.ndim == 0 else value).to(like.device)
        return value.expand(len(like), *value.shape[1:]) if len(value) == 1 else value

    return each(expanded, cond)


def join(first: Cond, second: Cond) -> Cond:
    """The conditions of two batches, one behind the other; the shorter text is padded.

    Raises:
        ValueError: conditions of different kinds.
    """
    one, two = named(first, ""), named(second, "")
    if not one or one.keys() != two.keys():
        raise ValueError(
            f"Conditions of one batch are all tensors, or mappings with the same names; got {_described(first)} and "
            f"{_described(second)}."
        )
    return unnamed({name: torch.cat(_of_one_length(one[name], value)) for name, value in two.items()}, "")


def override(first: Cond, second: Cond) -> Cond:
    """`second` in place of `first`; where both are mappings, name by name. None replaces nothing."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {**first, **second}
    return first if second is None else second


def told(cond: Cond, more: Mapping[str, Tensor]) -> Cond:
    """The condition with others besides, or in place of its own; an unconditional one is told nothing."""
    return cond if cond is None or not more else unnamed(named(cond) | dict(more))


def one_entry(cond: Cond) -> Cond:
    """`cond`, which is to be kept for all samples.

    Raises:
        ValueError: it has several entries.
    """
    for value in named(cond).values():
        if value.ndim and len(value) != 1:
            raise ValueError(
                f"A condition that is kept has one entry, (1, …), for all samples; got shape {tuple(value.shape)}. "
                "What differs from sample to sample is given to the sampler, and picked by a function here."
            )
    return cond


def nothing(value: Tensor, label: int) -> Tensor:
    """The entry (1, *) like those of `value` (n, *) that says nothing: NaN, `PADDING` of a text, or else `label`."""
    none = torch.nan if value.is_floating_point() else label if value.ndim < 2 else PADDING
    return value.new_full((1, *value.shape[1:]), none)


def chosen(keep: Tensor, value: Tensor, null: Tensor) -> Tensor:
    """`value` (B, *) of the samples to `keep` (B,), and of the others `null`, (1, *) or (B, *)."""
    return torch.where(keep.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), value, null)


def filled(value: Tensor, start: int = 1) -> tuple[Tensor, Tensor]:
    """(`value` with 0 in place of NaN entries, which entries are there); an entry is all behind dimension `start`."""
    there = ~value.isnan().flatten(start).all(start)
    return value.masked_fill(~there.reshape(*there.shape, *[1] * (value.ndim - start)), 0), there


_TOLD = ("end", "scale")


def checked_told(told: Sequence[str]) -> tuple[str, ...]:
    """What a flow map is told beside its conditions: "end", the time it goes to, and "scale", that of its guidance.

    Raises:
        ValueError: another name, or one of them twice.
    """
    if not set(told) <= set(_TOLD) or len(set(told)) < len(told) or isinstance(told, str):
        raise ValueError(f"told is a list of {' and '.join(map(repr, _TOLD))}, each at most once; got {told!r}.")
    return tuple(told)


def tell(cond: Cond, **told: Tensor) -> Cond:
    """The condition with what a flow map is told besides; a tensor by itself goes under the name ""."""
    return {**named(cond, ""), **told}


def parted(cond: Cond, names: Sequence[str]) -> tuple[Cond, dict[str, Tensor]]:
    """The condition without these entries, in the form that it had before `tell`, and those of them that it has."""
    parts = named(cond, "")
    own = {name: parts.pop(name) for name in names if name in parts}
    return (unnamed(parts, "") if own else cond), own


def _of_one_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both; where they are texts, padded to the length of the longer one."""
    if first.is_floating_point() or first.ndim != 2:
        return first, second
    length = max(first.shape[1], second.shape[1])
    pad = torch.nn.functional.pad
    return pad(first, (0, length - first.shape[1]), value=PADDING), pad(
        second, (0, length - second.shape[1]), value=PADDING
    )


def _described(cond: Cond) -> str:
    return f"names {sorted(cond)}" if isinstance(cond, Mapping) else "nothing" if cond is None else "a tensor"
