"""The guidance that a command names, around the model of a run, and the run whose conditions samples have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ConfigError, build
from ..diffusion.denoiser import Denoiser, model_device
from ..runs.load import check_fit, load_run, with_named
from ..runs.run import Run

_CLASSIFIER = "scoresde.Classifier"
# guidance that needs another run: its option, that run in words, and an example
_GUIDES = {
    "scoresde.Auto": ("auto", "a weaker model", "guide=runs/weak"),
    _CLASSIFIER: ("classifier", "a classifier", "guide=runs/judge"),
}


class Guided(NamedTuple):
    """A guided model.

    Attributes:
        denoiser: the model, guided.
        digest: of the checkpoint of its guide; None where it has none.
        conditioned: the run whose conditions samples have, that of the model or that of a classifier.
    """

    denoiser: Denoiser
    digest: str | None
    conditioned: Run


def build_guidance(options: Mapping[str, Any], run: Run, allow: Sequence[str]) -> Guided:
    """The model of a run, guided as `guidance` and `guide` say, and called once so that a misfit shows at once.

    Raises:
        ConfigError: it cannot be built, or does not suit the model.
        CheckpointError: the guide's folder holds no run.
    """
    node, folder = options["guidance"], options["guide"]
    run.check_guidance(node)
    settings = node if isinstance(node, Mapping) else {}
    target = settings.get("_target_")
    needed = target in _GUIDES or (folder is not None and target in allow)  # a class of one's own may take a guide
    if folder is not None and not needed:
        known = " or ".join(f"{what} of guidance={option}" for option, what, _ in _GUIDES.values())
        raise ConfigError(f"guide={folder} is {known}.")
    both = bool(settings.get("conditional", target != _CLASSIFIER))
    if not both and run.always_conditional:
        raise ConfigError(f"{run.folder} always had its condition: tell it, too, guidance.conditional=true.")
    guide = _load_guide(target, options, run, allow, both=both) if needed else None
    guides = [] if guide is None else [guide.denoiser]
    led_from = run.led_from(options.get("negative"), node)
    guided = build(node, allow, run.denoiser, *guides, key="guidance", **led_from).to(model_device(run.denoiser)).eval()
    conditioned = run if guide is None or both else guide
    try:  # one call, so that energies and the like that do not fit are refused before anything is drawn
        check_fit(guided, conditioned.dataset, conditional=conditioned.conditional)
    except ValueError as error:
        raise ConfigError(f"guidance: {error.__cause__}") from error
    return Guided(guided, guide.digest if guide else None, conditioned)


def _load_guide(target: Any, options: Mapping[str, Any], run: Run, allow: Sequence[str], *, both: bool) -> Run:
    """The run in `guide`, checked against `run`; `both` have the same condition, or only the guide has one."""
    folder, is_classifier = options["guide"], target == _CLASSIFIER
    option, what, example = _GUIDES.get(target, ("a class of one's own", "a run", "guide=runs/other"))
    if not isinstance(folder, str):
        raise ConfigError(f"guidance={option} needs {what}, the folder of a run: {example}; got {folder!r}.")
    guide = with_named(load_run(Path(folder), allow=allow, device=options["device"]), options)
    if target in _GUIDES and guide.draws == is_classifier:
        found = "a model of samples. One is trained by experiment=digits_classifier."
        if not guide.draws:
            found = f"{guide.denoiser.kind}. Did you mean guidance=classifier?"
        raise ConfigError(f"guidance={option} needs {what}, and guide={folder} is {found}")
    if both and is_classifier and not run.conditional:
        raise ConfigError(f"guidance.conditional=true tells {run.folder}, too, which was trained without conditions.")
    mine, others = _facts(run, both), _facts(guide, both)
    for name, own in mine.items():
        if own != others[name]:
            raise ConfigError(f"guide={folder} has {name} {others[name]}, and {run.folder} {own}; they have to agree.")
    return guide


def _facts(run: Run, both: bool) -> dict[str, Any]:
    """What two runs have to agree in; `both` are given conditions."""
    facts = {"samples of shape": run.dataset.event_shape, "data scaled by": run.codec}
    kinds = {name: str(kind) for name, kind in run.kinds.items()}
    return facts | ({"conditional": run.conditional, "the conditions": kinds} if both else {})
