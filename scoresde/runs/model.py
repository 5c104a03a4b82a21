"""What was loaded of a run: the model, what is known of its data, and what it can be told."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..codecs import Codec
from ..config import ConfigError, build
from ..data import Dataset
from ..data import kinds as conditions
from ..data.kinds import Kind
from ..diffusion.conditions import Cond, unnamed
from ..diffusion.denoiser import Denoiser, model_device

Guidance = float | Mapping[str, Any] | None
"""The scale of classifier-free guidance, or what the files of conf/guidance hold; None for none."""

_CFG = "scoresde.ClassifierFree"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A trained model and its conditions; `Run` adds raw data.

    Attributes:
        folder: of the run, or the file that it was exported to.
        config: its resolved configuration.
        step: optimizer step of the checkpoint.
        digest: SHA-256 of the checkpoint's manifest, so of its weights.
        dataset: the samples that the folder keeps; all of the data where `whole_data` was called or the folder,
            written by an older scoresde, keeps none.
        denoiser: in eval mode, on the device, and measured; a classifier's run has that in its place.
        conditional: the network takes conditions.
        weights: which of the weights it has: "ema", "weights", or a length of average.
        allow: targets of the user's own that its configuration may name.
    """

    folder: Path
    config: dict[str, Any]
    step: int
    digest: str
    dataset: Dataset
    denoiser: Denoiser
    conditional: bool
    weights: str = "ema"
    allow: Sequence[str] = ()

    @property
    def draws(self) -> bool:
        """Whether samples can be drawn from its model, which is no classifier and the like."""
        return self.denoiser.draws

    @property
    def embeds(self) -> bool:
        """Whether its model is an embedder of samples and sentences."""
        return self.denoiser.kind == "an embedder"

    @property
    def codec(self) -> Codec:
        """Raw values to model data and back."""
        return self.dataset.codec

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample of model data, as the network sees it."""
        return self.dataset.event_shape

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return self.dataset.raw_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels; empty where the data have none."""
        return self.dataset.names_of_classes

    @property
    def always_conditional(self) -> bool:
        """Whether the network is known never to have been trained without its condition; a classifier never is."""
        if not self.draws:
            return self.conditional
        gaps = self.dataset.statistics.gaps
        dropped = (self.config.get("loss") or {}).get("cond_dropout")  # of a flow map
        return self.conditional and self.config["network"].get("cond_dropout") == 0 and not dropped and not gaps

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """The conditions that the model was trained with, by name; none for an unconditional one."""
        return conditions.kinds_of(self.dataset, always=self.always_conditional) if self.conditional else {}

    def cond(self, given: Any, n: int) -> Cond:
        """The conditions of n samples.

        Args:
            given: the name or number of a class, a list or tensor of such; so of any kind that is the only one; or a
                mapping by kind ("label", "vector", "image", "tokens", "text") of numbers, tensors, file names or
                sentences. Rows are repeated in turn. None goes through the classes, or through the conditions of
                held-out samples, in turn.

        Raises:
            ValueError, OSError: a kind that the model was not trained with, one that is missing, or values that are
                not of the kind.
        """
        if given is None:
            return conditions.in_turn(self.dataset, n, self.conditional)
        if not isinstance(given, Mapping):
            given = {next(iter(self.kinds)) if len(self.kinds) == 1 else "label": given}
        self.check_kinds(given)
        rows = {name: kind.rows(given[name]) for name, kind in self.kinds.items()}
        for name, values in rows.items():
            if len(values) > n:
                raise ValueError(f"cond has {len(values)} rows of {name} for {n} samples.")
        return unnamed({name: values[torch.arange(n) % len(values)] for name, values in rows.items()})

    def check_kinds(self, given: Mapping[str, Any]) -> None:
        """Refuses kinds of conditions that the model was not trained with, and some without others that it was.

        Raises:
            ConfigError: it is one of these.
        """
        listed = " and ".join(map(str, self.kinds.values()))
        for name, value in given.items():
            if name not in self.kinds:
                none = "without labels or other conditions (conditional=true)"
                what = f"with {listed}, and no {name}" if self.kinds else none
                raise ConfigError(f"cond.{name}={value}: {self.folder} was trained {what}.")
        if absent := [name for name in self.kinds if name not in given]:
            cure = f"give cond.{absent[0]}=… too, or cond=test:0-7 for all conditions of those held-out samples"
            raise ConfigError(f"{self.folder} was trained with {listed} together: {cure}.")

    def guided(self, guidance: Guidance, negative: str | None = None) -> Denoiser:
        """The model under guidance.

        Args:
            guidance: the scale of classifier-free guidance, 1 for none; or what the files of conf/guidance hold, a
                mapping with `_target_`. None is the model itself.
            negative: a sentence that it leads away from, in place of no condition.

        Raises:
            ConfigError: it cannot be built, or does not suit the model.
            ValueError: a sentence that the model cannot read.
        """
        node = self.guidance_node(guidance)
        led_from = self.led_from(negative, node)
        if guidance is None:
            return self.denoiser
        self.check_guidance(node)
        guided: Denoiser = build(node, self.allow, self.denoiser, key="guidance", **led_from)
        return guided.to(model_device(self.denoiser)).eval()

    def led_from(self, negative: str | None, node: Any) -> dict[str, Any]:
        """What classifier-free guidance is told besides its `node` of a negative sentence; nothing without one.

        Raises:
            ConfigError: another guidance, or a model without sentences.
            ValueError: a sentence that the model cannot read.
        """
        if negative is None:
            return {}
        if not isinstance(node, Mapping) or node.get("_target_") != _CFG:
            raise ConfigError(f"negative={negative!r} is of classifier-free guidance: guidance=cfg guidance.scale=3.")
        if "text" not in self.kinds:
            raise ConfigError(f"negative={negative!r}: {self.folder} was trained without sentences.")
        rows = self.kinds["text"].rows(negative)
        if len(rows) != 1:
            raise ConfigError(f"negative is one sentence, for all samples; got {len(rows)}.")
        return {"null": {"text": rows.to(model_device(self.denoiser))}}

    @staticmethod
    def guidance_node(guidance: Guidance) -> Any:
        """What `guidance` stands for, as the files of conf/guidance have it."""
        if guidance is None or isinstance(guidance, Mapping):
            return guidance
        return {"_target_": _CFG, "scale": float(guidance)}

    def check_guidance(self, node: Any) -> None:
        """Refuses classifier-free guidance of a model that has no condition, or was never trained without one.

        Raises:
            ConfigError: it is one of these; says how to train one that can be guided.
        """
        if isinstance(node, Mapping) and node.get("inner"):
            return self.check_guidance(node["inner"])
        if not isinstance(node, Mapping) or node.get("_target_") != _CFG:
            return None
        advice = "Train with conditional=true network.cond_dropout=0.1."
        if not self.conditional:
            raise ConfigError(
                f"guidance=cfg steers towards a condition, and {self.folder} was trained without. {advice}"
            )
        if self.always_conditional:
            why = f"and {self.folder} never was trained so (network.cond_dropout=0)"
            raise ConfigError(f"guidance=cfg also asks the model without its condition, {why}. {advice}")
