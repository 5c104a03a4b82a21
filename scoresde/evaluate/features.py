"""What samples are compared by: their values, or the features of a network that the user has on disk."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import whole
from ..data import Dataset
from ..metrics.features import network_features
from ..runs.progress import track


class Features:
    """(n, *event) model data -> what the metrics get, on the CPU.

    Without a network these are the values themselves, with the shape of the event; a network makes (n, F) of them. Both
    sides are in model coordinates (pictures in [−1, 1]), and integer data are rounded to the centres of their bins
    first, samples too, so that rounding is not what is measured.

    Args:
        network: (B, *event) -> (B, F), a module of yours; None for none, or with a TorchScript `path`.
        path: a local file: the weights of `network` (.safetensors), or the whole of it as TorchScript (any other name).
        batch_size: samples at a time, ≥ 1.

    Raises:
        ValueError: no such file, one that cannot be read, or weights that are not those of the network.
    """

    def __init__(self, network: nn.Module | None = None, *, path: str | Path | None = None, batch_size: int = 256):
        self.batch_size, self.network, self.name = whole(batch_size, "features.batch_size"), network, "pixels"
        if network is not None:
            self.name = type(network).__name__
        if path is not None:
            file = Path(path)
            self.network, kind = _read(file, network), "TorchScript" if network is None else self.name
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            self.name = f"{kind} of {file.name} (SHA-256 {digest[:12]})"

    def to(self, device: torch.device) -> Features:
        """The same, computed on `device`."""
        if self.network is not None:
            self.network.to(device)
        return self

    def __call__(self, x: Tensor, dataset: Dataset) -> Tensor:
        """The features of model data x (n, *event).

        Raises:
            ValueError: the network does not take them, or does not return finite (n, F).
        """
        return self.of(dataset.decode(x), dataset)

    def of(self, raw: Tensor, dataset: Dataset) -> Tensor:
        """The features of raw samples, as `__call__` has them: of the pixels, where the model is of their latents."""
        x = dataset.pixels.encode(raw)
        shown = partial(track, label="features", total=-(-len(x) // self.batch_size))
        if self.network is None:
            return x.float()
        try:
            return network_features(self.network, x, self.batch_size, shown).float()
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            shape = tuple(x.shape[1:])
            raise ValueError(f"features: {self.name} does not take samples of shape {shape}: {error}") from error


def _read(path: Path, network: nn.Module | None) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"features.path={path} is no file; give the weights of features.network, or TorchScript.")
    if (path.suffix == ".safetensors") != (network is not None):
        raise ValueError(
            f"features.path={path}: .safetensors are weights and go with features.network._target_=my_package.MyNet; "
            "any other file is TorchScript and goes without."
        )
    try:
        if network is None:
            return torch.jit.load(path, map_location="cpu")
        from safetensors.torch import load_file

        network.load_state_dict(load_file(path))
        return network
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"features.path={path} cannot be read: {error}") from error
