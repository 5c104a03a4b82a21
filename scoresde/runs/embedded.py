"""Data sets as embeddings by an embedder that a run of its own has trained, and data sets that are told them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..codecs import Standardise
from ..config import ConfigError
from ..data import Dataset, Embedding, Split
from .checkpoint import CheckpointError
from .kept import recall
from .latent import check_digest, node_of, stored
from .load import load_run

__all__ = ["embeddings", "with_embedding"]


def embeddings(
    dataset: Dataset,
    *,
    run: str,
    digest: str | None = None,
    weights: str | float = "ema",
    cache: str | None = None,
    allow_targets: Sequence[str] = (),
) -> Dataset:
    """The embeddings of a data set in place of its samples, standardised, with the conditions of these: what a prior
    p(embedding | sentence) is trained on (Ramesh et al. 2022, sec. 2.2).

    They lie on a sphere, which they fill no neighbourhood of, so a density of them means nothing.

    Args:
        dataset: of the kind that the embedder was trained on.
        run: the output folder of scoresde-train with loss=embedder; or that of a model of or on its embeddings, which
            keeps the embedder.
        digest: SHA-256 that the embedder must have; None for any.
        weights: which of its weights, see `load`.
        cache: folder of the file that keeps embeddings; None for `embeddings` in the run's folder.
        allow_targets: names of networks of the user's own.

    Raises:
        ValueError: a run that is no embedder, another embedder than `digest`, or samples that do not suit it.
        CheckpointError: no run there.
    """
    splits, embedder, note = _embedded(dataset, run, digest, weights, cache, allow_targets)
    made: dict[str, Any] = {name: replace(split, raw=values) for name, (split, values) in splits.items()}
    codec = Standardise.of(made["train"].raw, integers=())
    how: dict[str, Any] = {"codec": codec, "embedder": embedder, "notes": note, "moments": None}
    return replace(dataset, name=f"embeddings of {dataset.name}", log_prob=None, columns=(), files=(), **made, **how)


def with_embedding(
    dataset: Dataset,
    *,
    run: str,
    digest: str | None = None,
    weights: str | float = "ema",
    cache: str | None = None,
    allow_targets: Sequence[str] = (),
) -> Dataset:
    """A data set whose samples are told their own embeddings, as the condition "vector": what a decoder p(sample |
    embedding) is trained on (Ramesh et al. 2022, sec. 2.1).

    Args:
        dataset, run, digest, weights, cache, allow_targets: as of `embeddings`.

    Raises:
        ValueError: as `embeddings`; or data that are told a vector already.
        CheckpointError: no run there.
    """
    if "vector" in dataset.train.conditions:
        raise ValueError(f"{dataset.name} has a vector as a condition, where that of the embedding would be.")
    splits, embedder, note = _embedded(dataset, run, digest, weights, cache, allow_targets)
    made: dict[str, Any] = {
        name: replace(split, conditions={**split.conditions, "vector": values})
        for name, (split, values) in splits.items()
    }
    return replace(dataset, embedder=embedder, notes=note, **made)


def embedder_of(folder: Path, weights: str | float = "ema", allow: Sequence[str] = ()) -> Embedding:
    """The embedder in a folder, on the CPU.

    Raises:
        ConfigError: a run that is no embedder, nor on embeddings of one.
        CheckpointError: no run there.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {folder}; codec.run=… is the output folder of scoresde-train with loss=embedder, or "
            "that of a model of or on its embeddings, which keeps the embedder."
        )
    kept = recall(folder, allow)
    if kept is not None and kept.embedder is not None:
        return kept.embedder
    found: Any = load_run(folder, allow=allow, device="cpu", weights=weights)
    if not found.embeds:
        raise ConfigError(
            f"codec.run={folder} is a run that trained {found.config['denoiser'].get('_target_')}, no embedder. "
            "experiment=unclip_embedder trains one."
        )
    node = dict(found.config["network"])
    text = node_of(node.pop("text"), {"vocabulary": found.dataset.text.tokenizer.size})
    node = {**node_of(node, {"event_shape": list(found.event_shape)}), "text": text}
    return Embedding(found.codec, found.denoiser.network, json.dumps(node, sort_keys=True))


def _embedded(
    dataset: Dataset, run: str, digest: str | None, weights: str | float, cache: str | None, allow: Sequence[str]
) -> tuple[dict[str, tuple[Split, Tensor]], Embedding, str]:
    """The splits by name with the embeddings of their samples, the embedder, and the notes on the data."""
    embedder = embedder_of(Path(run).expanduser(), weights, allow)
    check_digest(run, "embedder", embedder.digest, digest, "the embeddings of this model are by")
    splits = {"train": dataset.train, "test": dataset.test}
    splits |= {} if dataset.validation is None else {"validation": dataset.validation}
    folder, found, where = Path(cache or Path(run, "embeddings")).expanduser(), {}, ""
    for name, split in splits.items():

        def make(split: Split = split) -> Tensor:
            return embedder.of(split.raw)

        values, where = stored(folder, embedder.digest, split, "embeddings", make)
        found[name] = (split, values)
    note = f"Embeddings ({embedder.dim},) of {dataset.raw_shape} by the embedder in {run}, {where}."
    return found, embedder, "\n".join(filter(None, (dataset.notes, note)))
