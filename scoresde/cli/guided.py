"""The guidance that a command names, around the model of a run, and whose conditions it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import ConfigError, build, taken
from ..diffusion.denoiser import Denoiser, model_device
from ..runs.load import LoadedRun, load_run
from .kinds import always_told, kinds_of

# what `guide` is, by the parameter that takes it
_GUIDES = {
    "guide": ("auto", "a weaker model", "guide=runs/weak"),
    "log_prob": ("classifier", "a classifier", "guide=runs/judge"),
}


class Guided(NamedTuple):
    """A guided model.

    Attributes:
        denoiser: the model, guided.
        digest: of the checkpoint of its guide; None where it has none.
        told: the run whose conditions samples are told, that of the model or that of a classifier.
    """

    denoiser: Denoiser
    digest: str | None
    told: LoadedRun


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


def build_guidance(options: Mapping[str, Any], run: LoadedRun, allow: Sequence[str]) -> Guided:
    """The model of a run, guided as `guidance` and `guide` say, and asked once so that what does not fit is told now.

    Raises:
        ConfigError: it cannot be built, or does not suit the model.
        CheckpointError: the guide's folder holds no run.
    """
    node, folder = options["guidance"], options["guide"]
    check_guidance(node, run)
    asks = taken(node, allow, key="guidance")[0]
    part = next((name for name in _GUIDES if name in asks and name not in node), None)
    if part is None and folder is not None:
        known = " or ".join(f"{what} of guidance={option}" for option, what, _ in _GUIDES.values())
        raise ConfigError(f"guide={folder} is {known}.")
    told_too = bool(node.get("conditional", part != "log_prob"))
    if not told_too and always_told(run):
        raise ConfigError(
            f"{run.folder} never was trained without its condition: tell it, too, guidance.conditional=true."
        )
    guide = None if part is None else _load_guide(part, options, run, allow, told_too=told_too)
    parts = {"denoiser": run.denoiser} | ({} if part is None or guide is None else {part: guide.denoiser})
    guided = build(node, allow, key="guidance", **parts).to(model_device(run.denoiser)).eval()
    told = run if guide is None or told_too else guide
    _try(guided, run, told)
    return Guided(guided, None if guide is None else guide.digest, told)


def _load_guide(
    part: str, options: Mapping[str, Any], run: LoadedRun, allow: Sequence[str], *, told_too: bool
) -> LoadedRun:
    """The run in `guide`, of which `told_too` is whether both are told the same condition."""
    folder, (option, what, example) = options["guide"], _GUIDES[part]
    if not isinstance(folder, str):
        raise ConfigError(f"guidance={option} needs {what}, the folder of a run: {example}; got {folder!r}.")
    guide = load_run(Path(folder), allow=allow, device=options["device"])
    if guide.draws != (part == "guide"):
        found = "a model of samples" if guide.draws else "a classifier"
        cure = "One is trained by experiment=digits_classifier." if guide.draws else "Did you mean guidance=classifier?"
        raise ConfigError(f"guidance={option} needs {what}, and guide={folder} is {found}. {cure}")
    same = [
        ("samples of shape", run.dataset.event_shape, guide.dataset.event_shape),
        ("data scaled by", run.dataset.scaling, guide.dataset.scaling),
    ]
    if told_too and part == "log_prob" and not run.conditional:
        raise ConfigError(f"guidance.conditional=true tells {run.folder}, too, which was trained without conditions.")
    if told_too:
        own, other = ({name: str(kind) for name, kind in kinds_of(of).items()} for of in (run, guide))
        same += [("conditional", run.conditional, guide.conditional), ("the conditions", own, other)]
    for name, mine, others in same:
        if mine != others:
            raise ConfigError(f"guide={folder} has {name} {others}, and {run.folder} {mine}; they have to agree.")
    return guide


@torch.no_grad()
def _try(guided: Denoiser, run: LoadedRun, told: LoadedRun) -> None:
    """One call on two samples: energies and the like that do not fit are refused before anything is drawn."""
    device = model_device(guided)
    x, cond = run.dataset.encode(run.dataset.train.raw[:2]).to(device), told.dataset.train
    try:
        guided(x, torch.tensor(guided.sde.t_max), cond.cond(slice(2), told.conditional, device))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise ConfigError(f"guidance: {error}") from error
