"""Data that a command is given to measure a run on, in place of the run's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, leaves_open
from ..data import Dataset, Split
from ..data.dataset import count_classes
from ..runs.run import Run
from ._hydra import Command

_AXES = ("channels_last", "add_channel", "size", "grey")  # keys of data that say how a file becomes samples


def with_given(command: Command, run: Run) -> Run:
    """The run with the samples that `data` names as its held-out ones, under its codec; the run itself for data=null.

    Where they come without the conditions that the network can do without, it is measured without.

    Raises:
        ConfigError: they cannot be read, or are not such samples and conditions as the run was trained on.
    """
    node, own = command.options["data"], run.dataset
    if node is None:
        return run
    trained = f"{run.folder} was trained on samples of shape {own.raw_shape}, {own.codec.expects}."
    how: dict[str, Any] = {"codec": own.codec} if leaves_open(node, "codec", command.allow, key="data") else {}
    if own.columns and "columns" in node and node["columns"] is None:
        how["columns"] = list(own.columns)  # those of the run, in its order, whatever else the file has
    try:
        found: Dataset = command.build("data", **how)
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{error} {trained}") from error
    if found.raw_shape != own.raw_shape:
        cures = " and ".join(f"data.{key}" for key in _AXES if key in node)
        cure = f" How a file becomes samples is said by {cures}." if cures else ""
        raise ConfigError(f"{found.name} holds samples of shape {found.raw_shape}, and {trained}{cure}")
    if found.rate and own.rate and found.rate != own.rate:
        said = f"{found.name} is sound at {found.rate} Hz, {run.folder} was trained at {own.rate} Hz"
        raise ConfigError(f"{said}: data.rate={own.rate} resamples it.")
    return measured_on(run, found)


def measured_on(run: Run, found: Dataset) -> Run:
    """The run with the held-out samples of another data set, under its own codec, and with the conditions that it has.

    Raises:
        ConfigError: values, a shape or conditions that the run was not trained on.
    """
    own = run.dataset
    try:
        held = run.adopt(found).test
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error} {run.folder} was trained on {own.codec.expects}.") from error
    kept, conditional = _conditions(held, found, run)
    known = own.known and replace(own.known, held_out=len(held))
    if conditional:
        test = Split(held.raw, kept.pop("label", None), kept)
        dataset = replace(own, name=found.name, test=test, known=known)
    else:  # the labels, if any, are noted beside the numbers, and go nowhere else
        none = None if held.labels is None else torch.zeros(len(own.train), dtype=torch.int64)
        train, test = Split(own.train.raw, none), Split(held.raw, held.labels)
        dataset = Dataset(found.name, train, test, own.codec, count_classes(test), own.log_prob, known=known)
    return replace(run, dataset=dataset, conditional=conditional)


def _conditions(held: Split, found: Dataset, run: Run) -> tuple[dict[str, Tensor], bool]:
    """The conditions that the model is told, by name, and whether there are any."""
    told = {name: values for name, values in held.named.items() if name in run.kinds}
    if not told:
        if run.always_conditional:
            names = " and ".join(run.kinds)
            cure = "data.label_key=…, data.cond_keys={vector: …}, or a sub-folder per class"
            raise ConfigError(f"{run.folder} was never trained without a {names}, which {found.name} lacks: {cure}.")
        return {}, False
    run.check_kinds(told)
    if "label" in told:
        told["label"] = _labels(told["label"], found, run)
    for name, values in told.items():
        kind = run.kinds[name]
        sizes = [own if own == -1 else size for own, size in zip(kind.shape, values.shape[1:], strict=False)]
        if name != "label" and tuple(sizes) != kind.shape:
            raise ConfigError(f"{found.name}: the {name} is {tuple(values.shape[1:])}; {run.folder} was told {kind}.")
    return told, True


def _labels(labels: Tensor, found: Dataset, run: Run) -> Tensor:
    """Labels as the run numbers its classes: by their names where both have names."""
    names = found.class_names if run.dataset.class_names else ()
    if unknown := [name for name in names if name not in run.classes]:
        raise ConfigError(f"{found.name} has the class {unknown[0]}; {run.folder} knows {', '.join(run.classes)}.")
    if int(labels.max()) >= len(run.classes):
        raise ConfigError(f"{found.name} has class {int(labels.max())}; {run.folder} knows {run.kinds['label']}.")
    return torch.tensor([run.classes.index(name) for name in names])[labels] if names else labels
