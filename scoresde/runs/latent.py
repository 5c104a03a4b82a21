"""Data sets as latents of an autoencoder that a run of its own has trained: `codec=runs/autoencoder`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs import Autoencoder, Codec
from ..config import parameters
from ..data import Dataset, Split
from ..data.rows import chunks
from . import bundle
from .checkpoint import CheckpointError
from .kept import recall
from .load import load_run
from .objective import bins_of
from .progress import track

__all__ = ["latents"]


def latents(
    dataset: Dataset,
    *,
    run: str,
    digest: str | None = None,
    weights: str | float = "ema",
    cache: str | None = None,
    allow_targets: Sequence[str] = (),
) -> Dataset:
    """A data set under the codec of an autoencoder, with the moments of q(z | x) of its training samples.

    These are computed once, and kept in a file of `cache` that is called by the digests of the autoencoder and of the
    samples; a file that is damaged is made anew.

    Args:
        dataset: of the kind that the autoencoder was trained on.
        run: the output folder of scoresde-train with loss=autoencoder; or that of a model of its latents, which keeps
            the autoencoder.
        digest: SHA-256 that the autoencoder must have; None for any.
        weights: which of its weights, see `load`.
        cache: folder of the file; None for `latents` in the run's folder.
        allow_targets: names of networks of the user's own.

    Raises:
        ValueError: a run that is no autoencoder, another autoencoder than `digest`, or samples that do not suit it.
        CheckpointError: no run there.
    """
    codec = codec_of(Path(run).expanduser(), weights, allow_targets)
    check_digest(run, "autoencoder", codec.digest, digest, "the latents of this model are of")
    found = replace(dataset, codec=codec)  # which refuses samples of another kind
    shape = found.event_shape
    folder, make = Path(cache or Path(run, "latents")).expanduser(), partial(_moments, codec, dataset.train)
    moments, note = stored(folder, codec.digest, dataset.train, "moments", make)
    if not codec.std:
        codec = codec.scaled(chunks(moments))
    spread = ", ".join(f"{value:.4g}" for value in codec.std[:8])
    note = (
        f"Latents {shape} of {dataset.raw_shape} by the autoencoder in {run}, {note}; deviations of their channels, "
        f"which model data are divided by: {spread}{', …' if len(codec.std) > 8 else ''}."
    )
    notes = "\n".join(filter(None, (dataset.notes, note)))
    return replace(found, codec=codec, moments=moments, notes=notes)


def codec_of(folder: Path, weights: str | float = "ema", allow: Sequence[str] = ()) -> Autoencoder:
    """The codec of the autoencoder in a folder, on the CPU.

    Raises:
        ValueError: a run that is no autoencoder, nor of latents of one.
        CheckpointError: no run there.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}; codec=… is the output folder of scoresde-train with loss=autoencoder, or "
            "that of a model of its latents, which keeps the autoencoder."
        )
    kept: Any = recall(folder, allow)
    if kept is not None and kept.codec.digest:
        return kept.codec  # type: ignore[no-any-return]
    found: Any = load_run(folder, allow=allow, device="cpu", weights=weights)
    if not found.denoiser.encodes:
        raise ValueError(
            f"codec={folder} is a run that trained {found.config['denoiser'].get('_target_')}, no autoencoder. "
            "experiment=mnist_autoencoder trains one."
        )
    node = node_of(found.config["network"], {"event_shape": list(found.event_shape), **bins_of(found.codec)})
    return Autoencoder(found.codec, found.denoiser.network, node=json.dumps(node, sort_keys=True))


def check_digest(run: str, kind: str, found: str, wanted: str | None, why: str) -> None:
    """Refuses another trained network in `run` than the one that a model was made with; None takes any.

    Raises:
        ValueError: names both.
    """
    if wanted is not None and found != wanted:
        raise ValueError(
            f"The {kind} in {run} is {found[:16]}…, and {wanted[:16]}… is asked for, which {why}. Put the folder back "
            "as it was; or train another model in another folder, out=…."
        )


def node_of(node: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The node that makes a network of a run: a partial one with those of the facts that it was told of the data."""
    facts = facts if node.get("_partial_") else {}
    told = {name: value for name, value in facts.items() if name in parameters(node["_target_"])[0]}
    return {"_convert_": "all", **told, **{name: value for name, value in node.items() if name != "_partial_"}}


def stored(folder: Path, digest: str, split: Split, name: str, make: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """What a network of this digest makes of the samples of a split, from a file in `folder` or else made now and kept
    there; and where it is, in words."""
    key = hashlib.sha256(f"{digest} {split.digest()}".encode()).hexdigest()[:16]
    path, facts = folder / f"{key}.safetensors", {"codec": digest, "samples": len(split)}
    try:
        tensors, records = bundle.read(path)
        if records == facts:
            return tensors[name], f"read from {path}"
    except (CheckpointError, KeyError):
        pass
    made = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        bundle.write(path, {name: made}, facts)
    except OSError as error:
        return made, f"which are kept in memory alone, as {path} cannot be written ({error.strerror})"
    return made, f"kept in {path}"


def _moments(codec: Codec, split: Split) -> Tensor:
    parts = list(chunks(split.raw))
    made: list[Any] = [codec.moments(part) for part in track(parts, "encoding, parts", len(parts))]
    return torch.cat(made)
