"""The output folder of a run: which files it holds, and when an earlier run there is continued, replaced or refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import renamed, walk
from .checkpoint import Checkpoint, latest
from .files import MARK, marked
from .publish import publish
from .redact import redacted, redacted_text

# What a run writes.
_FILES = (
    "config.yaml", "metrics.jsonl", "loss.png", "samples.png", "samples.npz", "trajectory.png", "summary.json",
    "summary.md", "failed.json", "samplers.json", "samples-*.png", "samples.gif",
    "samples-*.gif", "trajectory-*.png", "progress/step-*.png",
    "excerpt.safetensors", "checkpoints/step-*", "checkpoints/.step-*", "averages/images-*", "batches/step-*",
    "reconstructions.png", "latents/*.safetensors",
    "samples/[0-9]*.wav", "samples-*/[0-9]*.wav", "spectrograms.png", "spectrograms-*.png",
)  # fmt: skip
# Keys that define a run: a checkpoint made with another value belongs to another run.
_IDENTITY = (
    "seed", "conditional", "sigma_data", "sde", "network", "parameterization", "denoiser", "loss", "data", "optim",
    "ema", "augment", "codec",
    "trainer.batch_size", "trainer.accumulate", "trainer.warmup", "trainer.clip", "trainer.loss_scale",
)  # fmt: skip
# What changes no sample that was read before: answers to questions about the data, and where they are kept; an
# autoencoder is known by its digest, wherever it lies.
_ANSWERS = ("data.signals", "data.grey", "data.lazy", "codec.run", "codec.cache")


def prepare(folder: Path, config: Mapping[str, Any], *, resume: str | bool, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to continue from, or None for a fresh start in a folder that holds no run.

    Args:
        folder: the output folder.
        config: resolved configuration of this command.
        resume: "auto" continues the run that is there, if any.
        overwrite: true removes the files of the run that is there, and nothing else.

    Raises:
        ValueError: the folder holds a run or files of the same names, and neither resume nor overwrite is given; the
            run there has another configuration; or all its checkpoints are damaged.
    """
    if resume not in (False, "auto", "never"):
        raise ValueError(f"resume is auto or false; got {resume!r}.")
    if not isinstance(overwrite, bool):
        raise ValueError(f"overwrite is true or false; got {overwrite!r}.")
    if resume == "auto" and overwrite:
        raise ValueError("resume=auto continues a run and overwrite=true replaces it; give one of the two.")
    held = [path for pattern in _FILES for path in sorted(folder.glob(pattern))]
    if not held:
        return None
    names = ", ".join(sorted({path.relative_to(folder).parts[0] for path in held}))
    # older versions wrote config.yaml in place, so that a kill could empty it
    if not marked(folder / "config.yaml") and latest(folder / "checkpoints") is None:
        raise ValueError(f"{folder} holds {names}, which no run of scoresde made. Choose another folder: out=….")
    if overwrite:
        _remove(held, folder)
        return None
    if resume != "auto":
        raise ValueError(
            f"{folder} holds a run already ({names}). Continue it with resume=auto, replace it with overwrite=true, "
            "or choose another folder: out=…."
        )
    checkpoint = latest(folder / "checkpoints")
    if checkpoint is None and any((folder / "checkpoints").glob("step-*")):
        raise ValueError(f"No checkpoint in {folder / 'checkpoints'} is whole. Start again with overwrite=true.")
    if checkpoint is not None:
        _check_identity(checkpoint, config)
    return checkpoint


def write_config(folder: Path, config: Mapping[str, Any], command: str) -> None:
    """`config.yaml`, whose first line is the command and marks the folder, which is there, as a run."""
    from omegaconf import OmegaConf

    text = f"{MARK}: {redacted_text(command)}\n{OmegaConf.to_yaml(redacted(config))}"
    publish(folder / "config.yaml", text)


@contextlib.contextmanager
def blamed(folder: Path, step: Callable[[], int]) -> Iterator[None]:
    """Writes `failed.json`, the reason and the step reached, if the `with` block raises; removes an earlier one."""
    path = folder / "failed.json"
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        finish(path, {"reason": f"{type(error).__name__}: {error}", "step": step()})
        raise


def finish(path: Path, record: Mapping[str, Any]) -> None:
    """Publishes a record, without secrets: the file shows that a command has ended."""
    publish(path, json.dumps(redacted(record), indent=2) + "\n")


def _remove(held: list[Path], folder: Path) -> None:
    # config.yaml marks the folder as ours, so it goes last: an interrupted removal can be repeated
    for path in sorted(held, key=lambda path: path.name == "config.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_identity(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    saved, here = (_leaves(renamed(tree)) for tree in (checkpoint.records.get("config", {}), config))
    for key in sorted(saved.keys() | here.keys()):
        same_run = any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in _IDENTITY)
        before, now = (None if tree.get(key) == [] else tree.get(key) for tree in (saved, here))  # no list is none
        if same_run and key not in _ANSWERS and before != now:
            raise ValueError(
                f"The run in {checkpoint.path.parent.parent} was made with {key}={saved.get(key)}, and this command "
                f"says {key}={here.get(key)}. Resuming takes the same command; another run takes another out=…."
            )


def _leaves(config: Any) -> dict[str, Any]:
    """What a configuration holds besides its mappings and lists, `{"sde.beta_max": 20.0, …}`, and the empty ones."""
    return {key: value for key, value in walk(config) if not (value and isinstance(value, (dict, list)))}
