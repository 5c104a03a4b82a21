"""A trained run as a folder that others can use, with a card."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..diffusion.conditions import Cond
from ..diffusion.denoiser import Denoiser
from ..noise.rng import Rng
from ..runs.load import MODEL_FILE
from ..runs.model import Guidance
from ..runs.publish import publish
from ..runs.run import Run
from ..sampling.sampler import Sampler
from . import program, to_diffusers
from .card import card

FORMATS = ("safetensors", "torch_export", "onnx", "diffusers")
_TRIED = 16  # conditions that a sampler is chosen on, where none was fitted
_TOLERANCE = 1e-5  # of a program against the model, relative to the largest number


def export(
    run: Run, folder: Path, format: str, *, budgets: Sequence[int] | None = None, guidance: Guidance = None
) -> list[str]:
    """Writes a run into a folder; the names of the files, the card last.

    Args:
        run: the run, on the CPU in float32.
        folder: where to.
        format: one of `FORMATS`. "safetensors" is all that `scoresde.load` needs; "torch_export" and "onnx" are
            the denoiser, and a whole sampler for each budget, as programs that need no scoresde. "diffusers" is a
            folder for its from_pretrained, where the network is one of theirs.
        budgets: network calls of the samplers; None for 10 with torch_export and none with onnx, where a sampler takes
            long to write. A budget that `scoresde-fit` knows has its fitted steps.
        guidance: the scale of classifier-free guidance of the programs; None for none.

    Raises:
        ConfigError: another format, or a run that it cannot hold.
        ImportError: a package is missing.
        ValueError: a program does not give what the model does, or cannot be made: a sampler that draws noise, say.
        OSError: it cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is one of {', '.join(FORMATS)}; got {format!r}.")
    files: dict[str, bytes] = {}
    told = [10] if budgets is None and format == "torch_export" else list(budgets or [])
    if format != "safetensors":
        if not run.draws:
            raise ConfigError(
                f"{run.folder} is {run.denoiser.kind}; format=safetensors holds it, and no other format does."
            )
        if format == "onnx":
            program.require_onnx()
        files = to_diffusers.files(run) if format == "diffusers" else _programs(run, format, told, guidance)
    text = card(run, format, told)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "safetensors":
        run.export(folder / MODEL_FILE)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        publish(folder / name, content)
    publish(folder / "README.md", text)
    return [MODEL_FILE, "README.md"] if format == "safetensors" else [*files, "README.md"]


def _programs(run: Run, format: str, budgets: Sequence[int], guidance: Guidance) -> dict[str, bytes]:
    """The files of the programs, each held against the model on numbers that it was not made with."""
    denoiser, ending = run.guided(guidance), "pt2" if format == "torch_export" else "onnx"
    kinds, made = list(run.kinds), {}
    for budget in [None, *budgets]:
        inputs, check = (_example(run, n) for n in (2, 3))
        if budget is None:
            module: torch.nn.Module = program.DenoiserProgram(denoiser)
            times = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float32, device="cpu") * denoiser.sde.t_max
            inputs, check = ((x, times[: len(x)], *cond) for x, *cond in (inputs, check))
            names = ["x", "t", *kinds], ["x0", "eps"]
        else:
            sampler = run.sampler(budget, run.cond(None, _TRIED), guidance)
            module, names = program.SamplerProgram(denoiser, sampler), (["x", *kinds], ["x0"])
            _hold(module(*check), _sampled(sampler, denoiser, *check), f"The sampler of {budget} calls")
        found = program.exported(module, tuple(inputs))
        _hold(found.module()(*check), module(*check), "The exported program")
        name = f"denoiser.{ending}" if budget is None else f"sampler-{budget}.{ending}"
        made[name] = program.to_torch(found) if format == "torch_export" else program.to_onnx(found, *names)
    return made


def _example(run: Run, n: int) -> tuple[Any, ...]:
    """x_T of n samples, and conditions of them where the run has any."""
    x = run.denoiser.prior_sample((n, *run.event_shape), rng=Rng(n), dtype=torch.float32, device="cpu")
    cond = run.cond(None, n)
    return (x,) if cond is None else (x, cond)


def _sampled(sampler: Sampler, denoiser: Denoiser, x: Tensor, cond: Cond = None) -> Tensor:
    return sampler(denoiser, x, cond=cond)


@torch.no_grad()
def _hold(found: Any, right: Any, what: str) -> None:
    """Raises ValueError where two answers differ by more than rounding."""
    pairs = [(found, right)] if isinstance(found, Tensor) else itertools.zip_longest(found, right)
    for one, other in pairs:
        off = float((one - other).abs().max() / other.abs().max())
        if not off <= _TOLERANCE:
            raise ValueError(
                f"{what} is off by {off:.2g} of the largest number, more than {_TOLERANCE:g}: it has steps that are no "
                "linear combinations of what the network says, or the network computes in half precision."
            )


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Uploads a folder to the Hugging Face hub; its address.

    Args:
        folder: what to upload.
        repository: "owner/name", which is made where it is not there.
        private: whether others may see it, if it is made.

    Raises:
        ImportError: huggingface_hub is missing.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "push= uploads by huggingface_hub, which is not installed: pip install huggingface_hub."
        ) from error
    api = HfApi()
    made = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(folder), ignore_patterns=[".*"])
    return str(made)
