"""The guidance that a command names, around the model of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError, build, parameters
from ..denoiser import Denoiser
from .kinds import always_told, kinds_of
from .model import LoadedRun, load_run


def check_guidance(node: Any, run: LoadedRun) -> None:
    """Refuses classifier-free guidance of a model that has no condition, or never was without.

    Raises:
        ConfigError: it is one of these; says how to train one that can be guided.
    """
    if not isinstance(node, Mapping) or node.get("_target_") != "scoresde.ClassifierFree":
        return
    advice = "Train with conditional=true network.cond_dropout=0.1."
    if not run.conditional:
        raise ConfigError(f"guidance=cfg steers towards a condition, and {run.folder} was trained without. {advice}")
    if always_told(run):
        raise ConfigError(
            f"guidance=cfg also asks the model without its condition, and {run.folder} never was trained so "
            f"(network.cond_dropout=0). {advice}"
        )


def build_guidance(options: Mapping[str, Any], run: LoadedRun, allow: Sequence[str]) -> tuple[Denoiser, str | None]:
    """The guided denoiser, and the digest of the checkpoint of its guide if it has one.

    Raises:
        ConfigError: it cannot be built, or does not suit the model.
        CheckpointError: the guide's folder holds no run.
    """
    node, folder = options["guidance"], options["guide"]
    check_guidance(node, run)
    asks = (
        parameters(node["_target_"])[0] if isinstance(node, Mapping) and isinstance(node.get("_target_"), str) else []
    )
    if "guide" not in asks:
        if folder is not None:
            raise ConfigError(f"guide={folder} is the weaker model of guidance=auto.")
        return build(node, allow, key="guidance", denoiser=run.denoiser), None
    if not isinstance(folder, str):
        raise ConfigError(f"guidance=auto needs a weaker model, the folder of a run: guide=runs/weak; got {folder!r}.")
    guide = load_run(Path(folder), allow=allow, device=options["device"])
    for what, own, other in (
        ("samples of shape", run.dataset.event_shape, guide.dataset.event_shape),
        ("conditional", run.conditional, guide.conditional),
        ("the conditions", *({name: kind.shape for name, kind in kinds_of(of).items()} for of in (run, guide))),
    ):
        if own != other:
            raise ConfigError(f"guide={folder} has {what} {other}, and {run.folder} {own}; they have to agree.")
    return build(node, allow, key="guidance", denoiser=run.denoiser, guide=guide.denoiser), guide.digest
