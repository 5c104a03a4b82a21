"""The conditions of samples as evaluation needs them: gone through in turn, compared, and written down by name."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import Dataset
from ..diffusion.conditions import Cond, named

_CPU = torch.device("cpu")


def alike(cond: Cond, dataset: Dataset) -> Tensor:
    """(N,) bool: the held-out samples whose condition is one of those in `cond`; all of them where there is none."""
    own = dataset.test.cond(slice(None), True, _CPU)
    if cond is not None and own is not None:
        asked = set(_entries(cond))
        found = torch.tensor([entry in asked for entry in _entries(own)])
        if bool(found.any()):
            return found
    return torch.ones(len(dataset.test), dtype=torch.bool)


def condition_arrays(cond: Cond, inputs: int | None = None) -> dict[str, Tensor]:
    """Conditions by their names in `samples.npz`: `labels`, `cond_vector`, `cond_image`, `cond_tokens`, each (n, …), or
    (k, n, …) for the samples of the k inputs of a problem.
    """
    return {
        "labels" if name == "label" else f"cond_{name}": value if inputs is None else value.unflatten(0, (inputs, -1))
        for name, value in named(cond).items()
    }


def _entries(cond: Cond) -> list[bytes]:
    """The condition of each sample as bytes, to be compared."""
    parts = [value for _, value in sorted(named(cond).items())]
    return [b"".join(part[k].numpy().tobytes() for part in parts) for k in range(len(parts[0]))]
