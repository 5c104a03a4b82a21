"""A stage of a cascade beside the one before it: what it is told by that, and whether the two fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..config import ConfigError
from ..data import Split
from .run import Run


def check_fit(below: Run, run: Run) -> None:
    """Refuses a stage that was not trained to refine what the one before it draws.

    Raises:
        ConfigError: its size, codec or data are others, or what it is told.
    """
    if kind_of(run) == "vector":
        _check_embeddings(below, run)
        return
    if run.dataset.embedder is not None:
        raise ConfigError(f"{run.folder} draws embeddings, and is a first stage: run={run.folder} then={below.folder}.")
    made, needs = below.codec.whole, run.codec.below
    if needs is not None and needs != made:
        raise ConfigError(
            f"{run.folder} draws the details of {needs}, and {below.folder} draws {made}. The two are trained on "
            "one data set, with the same codec.level."
        )
    # of the same data: their first training samples are kept by both
    mine, theirs = (each.dataset.train.raw[:16] for each in (run, below))
    if needs is not None and not (mine.shape == theirs.shape and torch.equal(mine, theirs)):
        raise ConfigError(f"{run.folder} and {below.folder} were trained on different data; details belong to one.")
    shape = tuple(made.layout(torch.zeros((1, *_shape(below)), dtype=torch.float32, device="cpu")).shape[1:])
    told = run.kinds.get("image")
    if told is None or told.shape != shape:
        found = "no image" if told is None else str(told)
        raise ConfigError(
            f"{below.folder} draws pictures of shape {shape}, and {run.folder} is told {found}. A later stage has "
            f"codec=haar_details or codec=upsampled, conditional=true, and network.cond_image={list(shape)}."
        )


def _shape(run: Run) -> tuple[int, ...]:
    """Of model data of `whole` of a stage."""
    return run.codec.whole.encoded_shape(run.raw_shape)


def kind_of(run: Run) -> str:
    """Which of its conditions a later stage is told by the one before it."""
    return "vector" if run.dataset.embedder is not None and "vector" in run.dataset.test.conditions else "image"


def _check_embeddings(below: Run, run: Run) -> None:
    """Refuses a stage in front of a decoder that draws no embeddings by the embedder of this.

    Raises:
        ConfigError: says what it draws, and what it should.
    """
    wanted, found = run.dataset.embedder, below.dataset.embedder
    assert wanted is not None
    if found is None or kind_of(below) == "vector" or below.raw_shape != (wanted.dim,):
        raise ConfigError(
            f"{run.folder} is told embeddings ({wanted.dim},), and {below.folder} draws samples of shape "
            f"{below.raw_shape}. A prior draws them: experiment=unclip_prior codec=embeddings codec.run={run.folder}."
        )
    if found.digest != wanted.digest:
        raise ConfigError(
            f"{run.folder} is told embeddings by another embedder, {wanted.digest[:16]}…, than {below.folder} draws, "
            f"{found.digest[:16]}…. Train both with one codec.run."
        )


def without(run: Run, kind: str) -> Run:
    """The run as if it were not told a kind of condition."""
    if kind not in run.dataset.test.conditions:
        return run

    def less(split: Split) -> Split:
        return replace(split, conditions={name: v for name, v in split.conditions.items() if name != kind})

    dataset = run.dataset
    splits: Mapping[str, Any] = {"train": less(dataset.train), "test": less(dataset.test)}
    return replace(run, dataset=replace(dataset, **splits))
