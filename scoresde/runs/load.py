"""From a configuration to a data set and a denoiser; and from a run folder back to both."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import whole
from ..config import ConfigError, build, build_network, leaves_open, resolved
from ..data import Dataset
from ..data.dataset import hold_out
from ..diffusion.denoiser import Denoiser, model_device
from ..noise import switch
from ..noise.rng import Rng
from . import bundle
from .checkpoint import CheckpointError, best, latest
from .kept import network_behind, read_data, recall, unpack
from .objective import bins_of
from .posthoc import reconstruct
from .progress import doing
from .run import Run
from .text import build_text

_NEEDED = {"data", "network", "denoiser", "sde", "parameterization", "conditional"}  # what a model is rebuilt from
_log = logging.getLogger(__name__)
MODEL_FILE = "model.safetensors"
"""What a folder of scoresde-export format=safetensors holds the run in."""


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, and `torchrun`'s processes take one GPU each.

    Raises:
        ValueError: it is unknown, or this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device={name} cannot be used here: {str(error).splitlines()[0]} Try device=auto.") from error
    return device


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves them alone."""
    if threads is not None:
        torch.set_num_threads(whole(threads, "threads", otherwise="null"))


def choose_kernels(kernels: str | bool | None, device: torch.device) -> None:
    """Sets where CUDA kernels run: auto, off or require; None leaves it to SCORESDE_KERNELS.

    Raises:
        ValueError: the mode is unknown, or kernels are required and `device` cannot have them.
    """
    switch.use("off" if kernels is False else kernels)  # type: ignore[arg-type]  # YAML reads off as false
    if switch.mode() == "require" and (reason := switch.why_not(device)):
        raise ValueError(f"kernels are required, and {device} cannot have them: {reason}. Try kernels=auto.")


def build_denoiser(config: Mapping[str, Any], dataset: Dataset, allow: Sequence[str]) -> Denoiser:
    """The denoiser of a resolved configuration, or what is trained in its place, freshly initialised."""
    classes, node = dataset.classes if config["conditional"] else 0, config["denoiser"]
    augment = build(config["augment"], allow, key="augment") if config.get("augment") else None
    told: dict[str, Any] = {"classes": classes, "cond_augment": augment.told if augment else 0}
    told |= {"told": list(node["told"])} if node.get("told") else {}
    if dataset.numbers and not config["network"].get("numbers"):
        told["numbers"] = dataset.numbers
    if leaves_open(config["network"], "levels", allow, key="network"):
        told |= bins_of(dataset.codec)
    network = dict(resolved(config["network"]))
    if text := build_text(network.pop("text", None), dataset, allow, conditional=config["conditional"]):
        told["text"] = text
    network = build_network(network, allow, key="network", event_shape=dataset.event_shape, **told)
    facts = {"network": network, "sde": build(config["sde"], allow, key="sde")}
    if leaves_open(node, "parameterization", allow, key="denoiser"):
        facts["parameterization"] = build(config["parameterization"], allow, key="parameterization")
    if leaves_open(node, "event_shape", allow, key="denoiser"):
        facts["event_shape"] = dataset.event_shape
    denoiser = build(node, allow, key="denoiser", **facts)
    if denoiser.draws:
        # data that do not vary have no scale
        denoiser.data_std = dataset.statistics.data_std or denoiser.data_std
    return denoiser


def prepare(denoiser: Denoiser, dataset: Dataset, seed: int) -> str:
    """Lets the denoiser take what it wants from the training data, chosen by validation data or a part of them. Returns
    the notes on the data, and what it took, each behind a new line.
    """
    said = [dataset.notes]
    if denoiser.draws and denoiser.fits:
        with doing("fitting what the network starts from"):
            said.append(denoiser.prepare(*_some(dataset, denoiser.fits, seed)))
    return "".join(f"\n{each}" for each in said if each)


def _some(dataset: Dataset, count: int, seed: int) -> list[Tensor]:
    """Up to `count` samples of model data to learn from, and others to choose by."""
    train, chosen_by = dataset.train, dataset.validation
    if chosen_by is None:
        train, chosen_by = hold_out(train, 0.1, seed)
    rng, parts = Rng(seed), []
    for split in (train, chosen_by):
        n = min(count, len(split))  # evenly spaced, for files are often sorted
        parts.append(dataset.encode(split.raw[torch.arange(n) * len(split) // n], rng))
    return parts


def start_from(denoiser: Denoiser, trained: Denoiser) -> None:
    """Gives a flow map the weights of a denoiser, which it then equals whatever it is told.

    Raises:
        ConfigError: the network is another.
    """
    try:
        missing, unknown = denoiser.load_state_dict(trained.state_dict(), strict=False)
    except RuntimeError as error:
        raise ConfigError(f"The weights of the teacher do not fit the flow map: {error}") from error
    if wrong := [*unknown, *(name for name in missing if ".told." not in name)]:
        raise ConfigError(f"The teacher's weights are of another network than the flow map's: {', '.join(wrong[:5])}.")


@torch.no_grad()
def check_fit(denoiser: Denoiser, dataset: Dataset, *, conditional: bool) -> None:
    """One forward pass on two samples: a network that does not fit the data is refused before anything is written."""
    split, device = dataset.train, model_device(denoiser)
    cond = split.cond(slice(2), conditional, device)
    denoiser.eval()  # so that dropout draws nothing
    try:
        denoiser(dataset.encode(split.raw[:2]).to(device), torch.tensor(denoiser.sde.t_max), cond)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise ValueError(f"network does not take samples of shape {dataset.event_shape}: {error}") from error


def chosen_run(options: Mapping[str, Any], allow: Sequence[str], *, whole_data: bool = False) -> Run:
    """`load_run` as the keys run, device, kernels, weights and checkpoint of a command say.

    Args:
        whole_data: with all of the data; where they are gone, with what the folder keeps of them, in words. They are
            read, too, where the command names held-out samples (test:5) and the folder keeps a part of them only.

    Raises:
        ConfigError: it is a run that draws no samples.
    """
    choose_kernels(options["kernels"], choose_device(options["device"]))
    chosen = {name: options[name] for name in ("device", "weights", "checkpoint")}
    run = load_run(Path(options["run"]), allow=allow, **chosen)
    if run.denoiser.encodes:
        raise ConfigError(
            f"run={run.folder} is an autoencoder, of which there are no samples and no likelihood but that of its own "
            f"summary. A model of its latents has both: scoresde-train codec={run.folder}."
        )
    if run.embeds:
        raise ConfigError(
            f"run={run.folder} is an embedder, of which there are no samples and no likelihood. A model of its "
            f"embeddings has both: scoresde-train codec=embeddings codec.run={run.folder}."
        )
    if not run.draws:
        raise ConfigError(
            f"run={run.folder} is a classifier, of which there are no samples and no likelihood. It guides those of "
            f"another run: scoresde-sample run=… guidance=classifier guide={run.folder} cond.label=…."
        )
    if not whole_data:
        return with_named(run, options)
    try:
        return run.whole_data()
    except CheckpointError as error:
        kept, all_of_them = len(run.dataset.test), run.dataset.statistics.held_out
        if run.dataset.known is None or options.get("split") == "train" or not all_of_them:
            raise
        _log.warning("%s The folder keeps %d of the %d held-out samples, which are measured.", error, kept, all_of_them)
        return run


def with_named(run: Run, options: Mapping[str, Any]) -> Run:
    """The run with all of its data if a command names held-out samples and the folder keeps a part of them only."""
    named = any("test:" in str(options.get(key)) for key in ("input", "cond", "edit"))
    return run.whole_data() if named and not run.dataset.complete else run


@torch.inference_mode(False)  # weights that were made in it could not be differentiated later
def load_run(
    folder: Path,
    *,
    allow: Sequence[str] = (),
    device: str = "auto",
    weights: str | float = "ema",
    checkpoint: str = "latest",
) -> Run:
    """Rebuilds the model of a run from the configuration and weights of a checkpoint.

    Args:
        folder: the run's output folder.
        allow: targets of the user's own, from this command line; the run's configuration cannot add any.
        device: where to put it.
        weights: "ema", "weights" (the last raw ones), or a number: the average of that length as a share of training
            (EDM2's σ_rel), made of the snapshots of ema=power.
        checkpoint: "latest", or "best": that with the lowest score.

    Raises:
        CheckpointError: no whole checkpoint there, or its weights do not fit its configuration.
        ConfigError: its configuration names something that may not be built.
    """
    length = None if isinstance(weights, (str, bool)) else weights
    if length is None and weights not in ("ema", "weights"):
        raise ValueError(f"weights is ema, weights, or a length between 0 and 0.29; got {weights!r}.")
    scored = "checkpoint with a score (trainer.keep_best makes them)"
    kinds = {"latest": (latest, "whole checkpoint"), "best": (best, scored)}
    if checkpoint not in list(kinds):
        raise ValueError(f"checkpoint is latest or best; got {checkpoint!r}.")
    find, what = kinds[checkpoint]
    found = find(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder} holds no {what}; run=… is the output folder of scoresde-train.")
    try:
        tensors = found.tensors[str(weights)] if length is None else reconstruct(folder / "averages", length)
    except KeyError as error:
        raise CheckpointError(f"{found.path} holds no weights called {error}.") from error
    config = _configuration(found.records.get("config"), f"The record config.json in {found.path}")
    dataset = recall(folder, allow) or read_data(folder, config, allow)
    digest = hashlib.sha256((found.path / "manifest.json").read_bytes()).hexdigest()
    return _rebuilt(
        folder, config, dataset, tensors, device, allow, step=found.step, digest=digest, weights=str(weights)
    )


@torch.inference_mode(False)
def load_exported(path: Path, allow: Sequence[str], device: str) -> Run:
    """The run that `Run.export` wrote to a file.

    Raises:
        CheckpointError: the file is damaged, or another.
    """
    tensors, records = bundle.read(path)
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if not model or {"config", "data", "step", "digest", "weights"} - set(records):
        raise CheckpointError(f"{path} holds no run; run.export(path) writes such a file.")
    config = _configuration(records["config"], f"The record config in {path}")
    dataset = unpack(
        path, {name: value for name, value in tensors.items() if name not in model}, records["data"], allow
    )
    facts = {name: records[name] for name in ("step", "digest", "weights")}
    return _rebuilt(path, config, dataset, model, device, allow, **facts)


def _configuration(config: Any, where: str) -> dict[str, Any]:
    """A configuration that was stored, for measuring: in full precision, however it was trained."""
    missing = _NEEDED - set(config) if isinstance(config, dict) else _NEEDED
    if missing or not isinstance(config["denoiser"], dict) or not isinstance(config["conditional"], bool):
        raise CheckpointError(
            f"{where} is no configuration of a run: it needs "
            f"{', '.join(sorted(missing)) or 'denoiser to be a mapping and conditional to be true or false'}."
        )
    full = {"autocast": None} if "autocast" in config["denoiser"] else {}
    return {**config, "denoiser": {**config["denoiser"], **full}}


def _rebuilt(
    path: Path,
    config: dict[str, Any],
    dataset: Dataset,
    tensors: Mapping[str, Tensor],
    device: str,
    allow: Sequence[str],
    **facts: Any,
) -> Run:
    """The run in `path` with these weights, its model on the device and measured."""
    digest = (config.get("codec") or {}).get("digest")
    if digest and digest != (found := network_behind(dataset)):
        what = "autoencoder than that of its latents" if dataset.embedder is None else "embedder than its own"
        raise CheckpointError(
            f"{path} keeps another {what}, {found[:16] or 'none'} in place of {digest[:16]}. Put excerpt.safetensors "
            "back as it was."
        )
    denoiser, conditional = build_denoiser(config, dataset, allow), bool(config["conditional"])
    try:
        denoiser.load_state_dict(tensors, assign=True)  # in the dtype that they have, whatever torch's default is
    except RuntimeError as error:
        raise CheckpointError(f"The weights in {path} do not fit its configuration: {error}") from error
    denoiser = denoiser.to(choose_device(device)).eval().requires_grad_(False)
    if denoiser.draws and (data_std := dataset.statistics.data_std) > 0:
        place, first = model_device(denoiser), slice(16)
        x0, cond = dataset.encode(dataset.train.raw[first]).to(place), dataset.train.cond(first, conditional, place)
        denoiser.measure(x0, cond, data_std=data_std)
    return Run(path, config, dataset=dataset, denoiser=denoiser, conditional=conditional, allow=allow, **facts)
