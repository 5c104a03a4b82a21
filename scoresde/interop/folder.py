"""A run folder of a network of another project, on which every command works that does not train it further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..codecs import Codec, Scaling
from ..data import Dataset, Split
from ..data.statistics import Statistics
from ..data.text import Text
from ..diffusion.denoiser import Denoiser
from ..noise.rng import Rng
from ..runs import checkpoint, kept, lock
from ..runs.folder import prepare, write_config
from .imported import Imported
from .pickles import ForeignFileError

_FEW = 16
_LOSS = {  # of scoresde-evaluate
    "_target_": "scoresde.DenoisingLoss",
    "times": {"_target_": "scoresde.losses.StratifiedTimes", "t_min": None},
    "weighting": {"_target_": "scoresde.losses.Simple"},
    "coupling": {"_target_": "scoresde.losses.Independent"},
    "uncertainty": None,
}


def _loss(imported: Imported) -> dict[str, Any]:
    """The loss that scoresde-evaluate measures: DDPM's; of EDM2's networks the one whose weights have been learned."""
    if imported.uncertainty is None:
        return _LOSS
    channels = imported.uncertainty["linear.weight"].shape[1]
    return _LOSS | {
        "times": {"_target_": "scoresde.losses.LogNormalTimes", "mean": -0.4, "std": 1.0, "t_min": None},
        "weighting": {"_target_": "scoresde.losses.EDMWeighting", "sigma_data": imported.sigma_data},
        "uncertainty": {"_target_": "scoresde.nn.LogVariance", "channels": channels},
    }


def codec_of(imported: Imported) -> Codec:
    """Its own; or 8-bit pictures in the range that the network was trained with; of latents the numbers themselves."""
    if imported.codec is not None:
        return imported.codec
    return Scaling.identity() if imported.span is None else Scaling(*imported.span, levels=256)


def no_data() -> Dataset:
    """Stands for the data of an imported network in its configuration.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "a network of another project was imported without data; scoresde-import … data=… imports it with some."
    )


def stand_in(imported: Imported) -> Dataset:
    """What a run folder keeps where no data are given: the shape, the range and the classes, and samples of no meaning.

    Its statistics say that it is of no samples; the standard deviation is that of `sigma_data`, or a usual one.
    """
    codec, n = codec_of(imported), _FEW if imported.codec is None else 2  # which are encoded whenever it is loaded
    shape = imported.event_shape if imported.codec is None else imported.codec.network.event_shape
    raw = torch.full((n, *shape), 127 if codec.raw_dtype == torch.uint8 else 0, dtype=codec.raw_dtype, device="cpu")
    labels = torch.arange(n, device="cpu") % imported.classes if imported.classes else None
    low, high = imported.span or (-4.0, 4.0)
    usual = 1.0 if imported.span is None else (high - low) / 4
    known = Statistics(
        data_std=imported.sigma_data if imported.scale_input else usual,
        span=(low, high),
        conditions={},
        gaps=False,
        training=0,
        held_out=0,
        labels=tuple(range(imported.classes)),
    )
    split = Split(raw, labels)
    return captioned(Dataset(imported.path.name, split, split, codec, imported.classes, known=known), imported.text)


def captioned(dataset: Dataset, text: Text | None) -> Dataset:
    """The data set with its sentences as a text reads them; without any, each is empty. None leaves it alone."""
    if text is None:
        return dataset
    splits = []
    for split in (dataset.train, dataset.test):
        own = [dataset.text.sentence(row) for row in split.conditions["text"]] if dataset.text else [""] * len(split)
        splits.append(replace(split, conditions={"text": text.rows(own, dataset.name)}))
    return replace(dataset, train=splits[0], test=splits[1], text=text)


def fitting(dataset: Dataset, imported: Imported) -> Dataset:
    """Data of the user's, for a network: with as many classes as it has.

    Raises:
        ForeignFileError: their shape or labels are not the network's.
    """
    if imported.codec is not None:
        dataset = replace(dataset, codec=imported.codec)
    dataset = captioned(dataset, imported.text)
    if dataset.event_shape != imported.event_shape:
        raise ForeignFileError(
            f"{dataset.name}: samples {dataset.event_shape}; the network takes {imported.event_shape}."
        )
    if not imported.classes:
        return dataset
    if not 0 < dataset.classes <= imported.classes:
        raise ForeignFileError(
            f"{dataset.name} has {dataset.classes} classes, and the network {imported.classes}: labels are its own, "
            "data.label_key=…."
        )
    names = dataset.class_names if dataset.classes == imported.classes else ()
    return replace(dataset, classes=imported.classes, class_names=names)


@torch.no_grad()
def checked(denoiser: Denoiser, dataset: Dataset, conditional: bool) -> str:
    """One forward pass on noise, in words.

    Raises:
        ForeignFileError: it fails, or is not finite.
    """
    sde = denoiser.sde
    t = sde.time(torch.tensor(0.0, dtype=torch.float64, device="cpu")).clamp(
        sde.t_min, sde.t_max
    )  # as much noise as data
    x = sde.perturb(torch.zeros(1, *dataset.event_shape, device="cpu"), t, Rng(0).normal((1, *dataset.event_shape)))
    cond = dataset.train.cond(slice(1), conditional, torch.device("cpu"))
    try:
        found = denoiser(x, t, cond).x0
    except (RuntimeError, ValueError, TypeError) as error:
        raise ForeignFileError(f"The network does not run on {tuple(x.shape)}: {error!s:.300}") from error
    if not bool(found.isfinite().all()):
        raise ForeignFileError("What the network says of noise is not finite.")
    return f"one call at t = {float(t):.4g}, where log(sigma/alpha) is 0: x0 of standard deviation {found.std():.3g}"


def write(
    imported: Imported,
    folder: Path,
    *,
    dataset: Dataset | None = None,
    data: Mapping[str, Any] | None = None,
    command: str = "scoresde-import",
    overwrite: bool = False,
) -> str:
    """Writes the run folder; returns what a forward pass gave, in words.

    Args:
        imported: the network.
        folder: where to; it is made.
        dataset: data of the user's to measure it on, coded by `codec_of`; None where there are none.
        data: what the dataset was built from, a node with `_target_`.
        command: what its config.yaml begins with.
        overwrite: replace a run that is there.

    Raises:
        ForeignFileError: the network does not run, or the data do not fit it. Nothing is written then.
        ValueError: the folder holds a run already.
        OSError, CheckpointError: it cannot be written.
    """
    conditional = imported.classes > 0 or imported.text is not None
    found = stand_in(imported) if dataset is None else fitting(dataset, imported)
    denoiser = imported.denoiser()
    said = checked(denoiser, found, conditional)
    groups = {"ema": denoiser.state_dict()}
    groups["weights"] = imported.denoiser("weights").state_dict() if imported.raw_weights else groups["ema"]
    if imported.uncertainty is not None:
        own = {f"uncertainty.{name}": value for name, value in imported.uncertainty.items()}
        groups |= {"ema-loss": own, "weights-loss": own}
    config = {
        "sde": imported.sde,
        "network": imported.network,
        "denoiser": imported.denoiser_node,
        "parameterization": imported.parameterization,
        "loss": _loss(imported),
        "data": dict(data) if data is not None else {"_target_": "scoresde.interop.no_data"},
        "conditional": conditional,
        "sigma_data": imported.sigma_data,
        "seed": 0,
        "imported": {"path": str(imported.path), "format": imported.format, "licence": imported.licence},
    }
    with lock.hold(folder):
        prepare(folder, config, resume=False, overwrite=overwrite)
        write_config(folder, config, command)
        kept.keep(folder, found)
        checkpoint.save(folder / "checkpoints", 0, groups, {"config": config})
    return said
