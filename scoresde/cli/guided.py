"""The guidance that a command names, around the model of a run, and the run whose conditions samples have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import ConfigError, build
from ..diffusion.denoiser import Denoiser, model_device
from ..runs.load import LoadedRun, load_run
from .conditions import always_conditional, kinds_of


class _Guide(NamedTuple):
    """The run that a guidance needs: the option, the kind of run in words and in an example, whether a classifier.

    A class of the user's own takes either kind.
    """

    option: str
    what: str
    example: str
    is_classifier: bool | None


_GUIDES = {
    "scoresde.Auto": _Guide("auto", "a weaker model", "guide=runs/weak", False),
    "scoresde.Classifier": _Guide("classifier", "a classifier", "guide=runs/judge", True),
}
_OF_ONES_OWN = _Guide("a class of one's own", "a run", "guide=runs/other", None)


class Guided(NamedTuple):
    """A guided model.

    Attributes:
        denoiser: the model, guided.
        digest: of the checkpoint of its guide; None where it has none.
        conditioned: the run whose conditions samples have, that of the model or that of a classifier.
    """

    denoiser: Denoiser
    digest: str | None
    conditioned: LoadedRun


def check_guidance(node: Any, run: LoadedRun) -> None:
    """Refuses classifier-free guidance of a model that has no condition, or was never trained without one.

    Raises:
        ConfigError: it is one of these; says how to train one that can be guided.
    """
    if not isinstance(node, Mapping) or node.get("_target_") != "scoresde.ClassifierFree":
        return
    advice = "Train with conditional=true network.cond_dropout=0.1."
    if not run.conditional:
        raise ConfigError(f"guidance=cfg steers towards a condition, and {run.folder} was trained without. {advice}")
    if always_conditional(run):
        raise ConfigError(
            f"guidance=cfg also asks the model without its condition, and {run.folder} never was trained so "
            f"(network.cond_dropout=0). {advice}"
        )


def build_guidance(options: Mapping[str, Any], run: LoadedRun, allow: Sequence[str]) -> Guided:
    """The model of a run, guided as `guidance` and `guide` say, and called once so that a misfit shows at once.

    Raises:
        ConfigError: it cannot be built, or does not suit the model.
        CheckpointError: the guide's folder holds no run.
    """
    node, folder = options["guidance"], options["guide"]
    check_guidance(node, run)
    settings = node if isinstance(node, Mapping) else {}
    target = settings.get("_target_", "")
    kind = _OF_ONES_OWN if folder is not None and target in allow else _GUIDES.get(target)
    if kind is None and folder is not None:
        known = " or ".join(f"{guide.what} of guidance={guide.option}" for guide in _GUIDES.values())
        raise ConfigError(f"guide={folder} is {known}.")
    both = bool(settings.get("conditional", kind is None or not kind.is_classifier))
    if not both and always_conditional(run):
        raise ConfigError(f"{run.folder} always had its condition: tell it, too, guidance.conditional=true.")
    guide = None if kind is None else _load_guide(kind, options, run, allow, both=both)
    parts = [run.denoiser] if guide is None else [run.denoiser, guide.denoiser]
    guided = build(node, allow, *parts, key="guidance").to(model_device(run.denoiser)).eval()
    conditioned = run if guide is None or both else guide
    _try(guided, run, conditioned)
    return Guided(guided, None if guide is None else guide.digest, conditioned)


def _load_guide(
    kind: _Guide, options: Mapping[str, Any], run: LoadedRun, allow: Sequence[str], *, both: bool
) -> LoadedRun:
    """The run in `guide`, checked against `run`; `both` have the same condition, or only the guide has one."""
    folder, (option, what, example, classifier) = options["guide"], kind
    if not isinstance(folder, str):
        raise ConfigError(f"guidance={option} needs {what}, the folder of a run: {example}; got {folder!r}.")
    guide = load_run(Path(folder), allow=allow, device=options["device"])
    if classifier is not None and guide.draws == classifier:
        found = "a model of samples. One is trained by experiment=digits_classifier."
        if not guide.draws:
            found = "a classifier. Did you mean guidance=classifier?"
        raise ConfigError(f"guidance={option} needs {what}, and guide={folder} is {found}")
    same = [
        ("samples of shape", run.dataset.event_shape, guide.dataset.event_shape),
        ("data scaled by", run.dataset.scaling, guide.dataset.scaling),
    ]
    if both and classifier and not run.conditional:
        raise ConfigError(f"guidance.conditional=true tells {run.folder}, too, which was trained without conditions.")
    if both:
        own, other = ({name: str(kind) for name, kind in kinds_of(of).items()} for of in (run, guide))
        same += [("conditional", run.conditional, guide.conditional), ("the conditions", own, other)]
    for name, mine, others in same:
        if mine != others:
            raise ConfigError(f"guide={folder} has {name} {others}, and {run.folder} {mine}; they have to agree.")
    return guide


@torch.no_grad()
def _try(guided: Denoiser, run: LoadedRun, conditioned: LoadedRun) -> None:
    """One call on two samples: energies and the like that do not fit are refused before anything is drawn."""
    device = model_device(guided)
    x = run.dataset.encode(run.dataset.train.raw[:2]).to(device)
    cond = conditioned.dataset.train.cond(slice(2), conditioned.conditional, device)
    try:
        guided(x, torch.tensor(guided.sde.t_max), cond)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise ConfigError(f"guidance: {error}") from error
