"""Which format a file is of, and its network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import diffusers_folder, dit, edm, edm2, guided_diffusion, k_diffusion, pipeline, score_sde
from .imported import Imported
from .pickles import ForeignFileError
from .torch_files import load, refusing

FORMATS = ("edm", "edm2", "score_sde", "guided_diffusion", "dit", "sit", "k_diffusion", "diffusers")


def read(path: Path | str, *, args: Mapping[str, Any] | None = None, format: str | None = None) -> Imported:
    """The network in a file of another project. Nothing in the file is executed.

    Args:
        path: of the file.
        args: what the file does not say: the constructor's arguments, flags or configuration, as its project has them.
        format: one of `FORMATS`; None finds out.

    Raises:
        ForeignFileError: it cannot be read, is of none of the formats, or needs arguments that are not given.
        OSError: there is no such file.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ForeignFileError(f"format is one of {', '.join(FORMATS)}; got {format!r}.")
    if path.is_dir():
        with refusing(path):
            return (pipeline if pipeline.holds(path) else diffusers_folder).read(path, args)
    if format == "k_diffusion" or (path.is_file() and k_diffusion.holds(path)):
        with refusing(path):
            return k_diffusion.read(path, args)
    content = load(path)
    with refusing(path):
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, and no network")
        kind = _kind(content) if format is None else format
        if kind == "edm":
            return edm.read(path, content)
        if kind == "edm2":
            return edm2.read(path, content)
        if kind == "score_sde":
            return score_sde.read(path, content, args)
        if kind == "guided_diffusion":
            return guided_diffusion.read(path, content, args)
        return dit.read(path, content, args, kind)


def _kind(content: Mapping[str, Any]) -> str:
    """The format, by names that only it has."""
    average = content.get("ema")
    inner = average if isinstance(average, dict) else content
    if "class_name" in inner:
        return "edm2" if inner["class_name"] == "Precond" else "edm"
    if "shadow_params" in inner:
        return "score_sde"
    if "time_embed.0.weight" in inner:
        return "guided_diffusion"
    if "x_embedder.proj.weight" in inner:
        raise ValueError("DiT and SiT have the same tensors: say which it is, format=dit or format=sit")
    found = ", ".join(map(str, list(inner)[:4]))
    raise ValueError(f"it is of none of the formats {', '.join(FORMATS)}; it begins with {found:.200}")
