"""The conditions of samples as evaluation needs them: gone through in turn, compared, and written down by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..diffusion.conditions import Cond, named

_CPU = torch.device("cpu")


def in_turn(dataset: Dataset, n: int, conditional: bool) -> Cond:
    """What sample k of n is told where nobody says: class k mod classes, or if there is more than labels, what held-out
    sample k mod their number is told. None for an unconditional model.
    """
    if not conditional:
        return None
    if dataset.test.told:
        return dataset.test.cond(torch.arange(n) % len(dataset.test), True, _CPU)
    return torch.arange(n) % dataset.classes if dataset.classes else None


def told_in_turn(dataset: Dataset, conditional: bool) -> str:
    """The same in words, for sentences; empty where classes are gone through, or nothing is told."""
    if not conditional or not dataset.test.told:
        return ""
    names = [*([] if dataset.test.labels is None else ["label"]), *dataset.test.told]
    return f" told the {' and '.join(names)} of the {len(dataset.test):,} held-out samples in turn"


def alike(cond: Cond, dataset: Dataset) -> Tensor:
    """(N,) bool, the held-out samples that are told the same as one of `cond`; all where none is."""
    own = dataset.test.cond(slice(None), True, _CPU)
    if cond is not None and own is not None:
        asked = set(_entries(cond))
        found = torch.tensor([entry in asked for entry in _entries(own)])
        if bool(found.any()):
            return found
    return torch.ones(len(dataset.test), dtype=torch.bool)


def told_arrays(cond: Cond, inputs: int | None = None) -> dict[str, Any]:
    """What samples were told, by its names in `samples.npz`: `labels`, `cond_vector`, `cond_image`, `cond_tokens`, each
    (n, …); of the k inputs of a problem (k, n, …).
    """
    rows = {"labels" if name == "label" else f"cond_{name}": value for name, value in named(cond).items()}
    return {
        name: (value if inputs is None else value.unflatten(0, (inputs, -1))).numpy() for name, value in rows.items()
    }


def _entries(cond: Cond) -> list[bytes]:
    """What each sample is told, to be compared."""
    parts = [value for _, value in sorted(named(cond).items())]
    return [b"".join(part[k].numpy().tobytes() for part in parts) for k in range(len(parts[0]))]
