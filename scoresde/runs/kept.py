"""What a run folder keeps of its data, in one file that training writes at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ConfigError, build, leaves_open
from ..data import Dataset
from ..data.excerpt import excerpt, packed, unpacked
from ..data.statistics import Statistics
from . import bundle
from .checkpoint import CheckpointError

FILE = "excerpt.safetensors"
_EMBEDDINGS = "scoresde.runs.embedded.embeddings"


def keep(folder: Path, dataset: Dataset, *, resumed: bool = False) -> None:
    """Writes the file, unless the run is resumed, which is on the same data, and it is there.

    Raises:
        OSError: it could not be written.
    """
    if not (resumed and (folder / FILE).exists()):
        bundle.write(folder / FILE, *packed(excerpt(dataset)))


def coded(dataset: Dataset, config: Mapping[str, Any], allow: Sequence[str], folder: Path | None = None) -> Dataset:
    """The data set under the codec that a configuration asks for, fitted to its training samples; or under its own.

    An autoencoder whose own run is gone is the one that `folder`, where a run may be that is to be resumed, keeps.

    Raises:
        ConfigError: it cannot be built, or does not suit the data.
    """
    node = config.get("codec")
    if not node:
        return dataset
    given = {"allow_targets": allow} if leaves_open(node, "allow_targets", allow, key="codec") else {}
    if node.get("run") and folder is not None and not Path(node["run"]).exists() and (folder / FILE).exists():
        node = {**node, "run": str(folder)}
    found: Dataset = build({**node, "_convert_": "all"}, allow, dataset, key="codec", **given)
    return found


def under_kept_codec(dataset: Dataset, folder: Path, allow: Sequence[str]) -> Dataset:
    """The data set under the codec that a run folder keeps, whatever another version would fit.

    Raises:
        CheckpointError: the file is damaged.
    """
    kept = recall(folder, allow)
    return dataset if kept is None or kept.codec == dataset.codec else replace(dataset, codec=kept.codec)


def network_behind(dataset: Dataset) -> str:
    """SHA-256 of the trained network that its latents or embeddings come from; empty where there is none."""
    return dataset.codec.digest or ("" if dataset.embedder is None else dataset.embedder.digest)


def recall(folder: Path, allow: Sequence[str] = ()) -> Dataset | None:
    """The excerpt in a run folder; None where there is none, as in folders of older versions.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    return unpack(path, *bundle.read(path), allow)


def unpack(path: Path, tensors: Mapping[str, Tensor], record: Any, allow: Sequence[str]) -> Dataset:
    """The excerpt that a file, `path`, holds.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        made = [build(record[key], allow, key=key) for key in ("codec", "embedder") if record.get(key)]
        return unpacked(tensors, record, *made)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no excerpt of data: {error!r:.300}.") from error


def read_data(
    folder: Path, config: Mapping[str, Any], allow: Sequence[str] = (), known: Statistics | None = None
) -> Dataset:
    """All of the data of a run, read again as its configuration says; `known` is what the folder kept of them.

    Raises:
        CheckpointError: they cannot be read, or are not those that it was trained on.
    """
    node = config["data"]
    if known is None and config.get("codec"):
        raise CheckpointError(f"{folder / FILE} is gone, which kept the codec that was fitted to the data of this run.")
    try:
        # of an older version, which did not ask what samples (A, B) are
        unsaid = leaves_open(node, "signals", allow, key="data") and not node.get("add_channel")
        dataset: Dataset = build(node, allow, key="data", **({"signals": True} if unsaid else {}))
    except (ConfigError, OSError, ImportError) as error:
        where = config["data"].get("path") if isinstance(config["data"], Mapping) else None
        raise CheckpointError(
            f"The data that {folder} was trained on cannot be read again: {error} "
            f"{'Put them back' if where is None else f'Put them back at {where}'}, or score data of your own: "
            "scoresde-likelihood run=… data=arrays data.path=…, run.log_likelihood(raw, …)."
        ) from error
    anew = (config.get("codec") or {}).get("_target_") == _EMBEDDINGS
    if known is not None and (anew or known.conditions.keys() - dataset.train.conditions.keys()):
        # which tells a stage of a cascade the picture that it refines, or makes embeddings of the samples
        dataset = coded(dataset, config, allow, folder)
    if known is not None:
        cure = "Put the file back as it was, or score what it holds now as data of your own: data=… data.path=…."
        try:
            dataset.check_unaltered(known.digests, str(folder), cure)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return dataset
