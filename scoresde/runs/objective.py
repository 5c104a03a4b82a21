"""What a run trains, a denoiser or in its place a classifier, an autoencoder or an embedder, with its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..codecs import Codec
from ..config import ConfigError, build
from ..diffusion.denoiser import Denoiser
from ..losses.denoising import DenoisingLoss
from ..losses.loss import Loss

# What a loss trains in the place of a denoiser, by its `kind`.
_TRAINS = {
    "scoresde.ClassifierLoss": "a classifier",
    "scoresde.AutoencoderLoss": "an autoencoder",
    "scoresde.ContrastiveLoss": "an embedder",
    "scoresde.DenoisingLoss": "a denoiser",
}


def check_objective(config: Mapping[str, Any]) -> None:
    """Refuses what is trained in the place of a denoiser if it is told what it cannot take, or is to be sampled.

    Raises:
        ConfigError: it is one of these.
    """
    kind = _TRAINS.get(_target(config["loss"]), "a denoiser")
    if kind == "a denoiser":
        return
    encodes, what = kind == "an autoencoder", kind.capitalize()
    if kind == "a classifier" and not config["conditional"]:
        raise ConfigError("A classifier learns labels, which conditional=true tells it.")
    if kind == "an embedder" and not (config["conditional"] and config["network"].get("text")):
        cure = "captions=file data.captions.path=captions.txt text=transformer conditional=true"
        raise ConfigError(f"An embedder learns which sentence belongs to a sample, and is told none: {cure}.")
    if encodes and config["conditional"]:
        raise ConfigError("An autoencoder takes no conditions, which the model of its latents does: conditional=false.")
    if config["fit"]:
        raise ConfigError(f"{what} draws no samples, so no sampler is fitted to it: fit=[].")
    if (config["evaluate_at_end"] and not encodes) or config["trainer"].get("sample_every"):
        raise ConfigError(
            f"{what} has no samples and no bits/dim; it is measured by its held-out loss: evaluate_at_end=false "
            "trainer.sample_every=0."
            if not encodes
            else f"{what} has no samples to draw on the way, only reconstructions at the end: trainer.sample_every=0."
        )


def build_loss(config: Mapping[str, Any], trained: Any, allow: Sequence[str], teacher: Denoiser | None = None) -> Loss:
    """The loss of a resolved configuration, around what it trains.

    Of a flow map without the teacher that it had, the loss is that of a denoiser, which it is where s = t.

    Raises:
        ConfigError: it cannot be built, or the loss and what it trains do not match.
    """
    target, kind = _target(config["loss"]), trained.kind
    if kind != _TRAINS.get(target, kind):
        raise ConfigError(
            f"{target} does not train a {_target(config['denoiser'])}. A classifier takes network=classifier, "
            "denoiser=classifier and loss=classifier together, as in experiment=digits_classifier; an autoencoder all "
            "three of that name, as in experiment=mnist_autoencoder, and so does an embedder."
        )
    if config.get("teacher") and teacher is None:
        return DenoisingLoss(trained)
    taught = {} if teacher is None else {"teacher": teacher}
    loss: Loss = build(config["loss"], allow, trained, key="loss", **taught)
    return loss


def bins_of(codec: Codec) -> dict[str, Any]:
    """What the decoder of an autoencoder is told of integers; nothing of floats.

    Raises:
        ConfigError: integers that are not in bins of one width in every place, as columns of several kinds.
    """
    if not codec.discrete:
        return {}
    if codec.levels is None or codec.affine is None or codec.model_range is None:
        raise ConfigError(
            f"An autoencoder has a probability for integers that all have the same levels; these data are by {codec}."
        )
    low, high = codec.model_range
    return {"levels": codec.levels, "low": low, "high": high}


def _target(node: Any) -> Any:
    """The target of a part of a configuration; None where there is none."""
    return node.get("_target_") if isinstance(node, Mapping) else None
