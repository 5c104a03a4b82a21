"""Samplers that were fitted to a run, in one file of its folder: to which model, for which budget, and how good."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import essential
from ..diffusion.conditions import Cond, named
from ..diffusion.denoiser import Denoiser
from ..sampling.default import default_sampler
from ..sampling.fitted import FittedSampler, build_sampler
from ..sampling.pilot import chosen_sampler
from ..sampling.sampler import Sampler
from . import bundle
from .publish import content_of, publish
from .redact import redacted

_FILE = "samplers.json"
_UNGUIDED = {"_target_": "scoresde.Blend", "_partial_": True, "others": []}  # guidance=none


@dataclass(frozen=True)
class Model:
    """What a sampler is fitted to.

    Attributes:
        checkpoint: SHA-256 of the checkpoint's manifest, so of its weights.
        weights: which of its weights, the key `weights` of a command.
        guidance: that key of a command; None where there is none.
        guide: SHA-256 of the checkpoint of a guide; None where there is none.
        cond: the kinds of conditions that the model is told.
    """

    checkpoint: str
    weights: str
    guidance: Any
    guide: str | None
    cond: list[str]

    @classmethod
    def of(cls, digest: str, options: Mapping[str, Any], guide: str | None, cond: Cond) -> Model:
        guidance = None if options["guidance"] == _UNGUIDED else redacted(options["guidance"])
        return cls(digest, str(options["weights"]), guidance, guide, sorted(named(cond)))


def keep(folder: Path, model: Model, fitted: FittedSampler) -> None:
    """Adds a fitted sampler to the file of a run, in place of any for the same budget, guidance and conditions.

    Raises:
        ValueError: the file that is there cannot be read.
    """
    names = ("budget", "error", "error_stderr", "generic", "generic_stderr", "calls", "log_snr", "rows", "data_std")
    record = asdict(model) | {name: getattr(fitted, name) for name in names}
    others = [other for other in read(folder) if _use(other) != _use(record)]
    kept = {"samplers": [*others, record], "sha256": _digest([*others, record])}
    publish(folder / _FILE, json.dumps(kept, indent=2) + "\n")


def recall(
    folder: Path, model: Model, budget: int, denoiser: Denoiser, shape: Sequence[int], cond: Cond = None
) -> tuple[Sampler, str]:
    """The sampler of a budget: that of the file of a run, or else that of `sample`; and a sentence that says which.

    Args:
        folder: of the run.
        model: what the sampler is for.
        budget: network calls of a sample.
        denoiser: the model under its guidance.
        shape: of one sample.
        cond: conditions, on the device of the model.

    Raises:
        ValueError: the file cannot be read, or its sampler for this use was fitted to other weights.
    """
    wanted = asdict(model) | {"budget": budget}
    found = next((record for record in read(folder) if _use(record) == _use(wanted)), None)
    again = f"scoresde-fit run={folder} budgets=[{budget}]"
    if found is None and "end" in denoiser.told:
        return default_sampler(denoiser, budget), f"{budget} steps of the flow map."
    if found is None:
        said = (
            f"{budget} calls by the sampler that was nearest to the exact end in a short trial on this model: none is "
            f"fitted for this budget and guidance ({again} does)."
        )
        return chosen_sampler(denoiser, shape, budget, cond), said
    if found["checkpoint"] != model.checkpoint:
        raise ValueError(
            f"The sampler for {budget} calls in {folder / _FILE} was fitted to other weights, of the checkpoint "
            f"{found['checkpoint'][:12]}…, and these are of {model.checkpoint[:12]}…. Fit it to these: {again}; or "
            "choose a sampler yourself: sampler=ddim sampler.steps=…."
        )
    sampler = build_sampler(denoiser, budget, *(found[name] for name in ("log_snr", "rows", "data_std")))
    kind = "generic sampler, which no fitted one beat" if found["log_snr"] is None else "fitted sampler"
    error = f"{found['error']:.3g} ± {found['error_stderr']:.1g}"
    return sampler, f"{budget} calls by the {kind}: {error} from the exact end on noise that the fit had not seen."


def _use(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a sampler is chosen by; the checkpoint has to be right besides."""
    return essential(record["guidance"]), *(record[name] for name in ("budget", "weights", "guide", "cond"))


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's folder, or of the file that it was exported to; none where it has none.

    Raises:
        ValueError: the file cannot be read.
    """
    if folder.is_file():
        exported: list[dict[str, Any]] = bundle.records_of(folder)["samplers"]
        return exported
    path = folder / _FILE
    try:
        found = json.loads(content_of(path))
        records = found["samplers"]
        for record in records:
            _check(record)
        if found.get("sha256", _digest(records)) != _digest(records):
            raise ValueError("its SHA-256 differs from what was written")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a file of scoresde-fit: {error!r}. Remove it; scoresde-fit run={folder} makes it again."
        ) from error
    return records


def _digest(records: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _check(record: Any) -> None:
    """Refuses what `keep` would not write; whether knots and weights belong together `build_sampler` checks."""
    texts, numbers = ("checkpoint", "weights"), ("error", "error_stderr", "generic", "generic_stderr")
    _use(record)
    kinds: dict[str, tuple[type, ...]] = {"budget": (int,), **dict.fromkeys(texts, (str,))}
    kinds |= dict.fromkeys(numbers, (int, float)) | {"data_std": (int, float, type(None))}
    kinds |= dict.fromkeys(("log_snr", "rows"), (list, type(None)))
    for name, kind in kinds.items():
        if type(record[name]) not in kind:
            raise ValueError(f"{name} is {record[name]!r}")
    _all_numbers(record["log_snr"] or [])
    for row in record["rows"] or []:
        _all_numbers(row)


def _all_numbers(values: Sequence[Any]) -> None:
    if not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{values!r:.80} are not all numbers")
