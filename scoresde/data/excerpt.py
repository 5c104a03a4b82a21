"""A few samples of a data set, and what is known of all: what a run folder keeps, as tensors and a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs.codec import Codec
from .dataset import Dataset, Split
from .embedder import Embedding
from .statistics import Statistics
from .text import text_of

_BYTES = 1 << 20  # of held-out samples; the data sets in `conf` of up to some thousand small samples are kept whole
_FEWEST = 16


def excerpt(dataset: Dataset) -> Dataset:
    """The first 16 training samples, and evenly spaced held-out ones: a mebibyte of them, at least 16."""
    train, test = dataset.train, dataset.test
    size = sum(values[0].numel() * values.element_size() for values in (test.raw, *test.conditions.values()))
    kept = min(len(test), max(_FEWEST, _BYTES // size))
    return dataclasses.replace(
        dataset,
        train=train.take(torch.arange(min(_FEWEST, len(train)), device="cpu")),
        test=test.take(torch.arange(kept, device="cpu") * len(test) // kept),
        log_prob=None,
        validation=None,
        moments=None,
        known=dataset.statistics,
    )


def packed(dataset: Dataset) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a data set by name, and a record of JSON with all that is no tensor.

    Raises:
        TypeError: its codec is no dataclass.
    """
    record = {
        "name": dataset.name,
        "codec": _recipe(dataset.codec),
        "codec_digest": dataset.codec.digest,
        "classes": dataset.classes,
        "class_names": list(dataset.class_names),
        "columns": list(dataset.columns),
        "numbers": list(dataset.numbers),
        "rate": dataset.rate,
        "text": dataset.text and dataset.text.record(),
        "embedder": None if dataset.embedder is None else _recipe(dataset.embedder),
        "statistics": dataclasses.asdict(dataset.statistics),
    }
    splits = {"train": dataset.train, "test": dataset.test}
    tensors = {f"{part}.raw": split.raw[:] for part, split in splits.items()}
    tensors |= {f"codec.{name}": values for name, values in dataset.codec.tensors().items()}
    if dataset.embedder is not None:
        tensors |= {f"embedder.{name}": values for name, values in dataset.embedder.tensors().items()}
    tensors |= {f"{part}.{name}": values for part, split in splits.items() for name, values in split.named.items()}
    return tensors, record


def unpacked(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], codec: Codec, embedder: Embedding | None = None
) -> Dataset:
    """The data set that `packed` was given, where the codec and the embedder are built as the record says.

    Raises:
        KeyError, TypeError, ValueError: they are not what `packed` makes.
    """

    def of(part: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{part}."): v for name, v in tensors.items() if name.startswith(f"{part}.")}

    def split(part: str) -> Split:
        named = of(part)
        return Split(named.pop("raw"), named.pop("label", None), named)

    codec = codec.restored(of("codec"))
    if codec.digest != record.get("codec_digest", ""):
        raise ValueError(f"its autoencoder is {codec.digest}, expected {record['codec_digest']}")
    known = dict(record["statistics"])
    known["span"] = _pair(known["span"])
    known["labels"] = None if known.get("labels") is None else tuple(map(int, known["labels"]))
    known["conditions"] = {name: _pair(span) for name, span in known["conditions"].items()}
    return Dataset(
        record["name"],
        split("train"),
        split("test"),
        codec,
        record["classes"],
        class_names=tuple(map(str, record["class_names"])),
        known=Statistics(**known),
        columns=tuple(map(str, record.get("columns", ()))),
        numbers=tuple(map(int, record.get("numbers", ()))),
        rate=int(record.get("rate", 0)),
        text=text_of(record["text"]) if record.get("text") else None,
        embedder=None if embedder is None else embedder.restored(of("embedder")),
    )


def _recipe(value: Any) -> Any:
    """What `config.build` makes a codec of again, and the codecs in it: its target and its fields."""
    if isinstance(value, tuple):
        return [_recipe(each) for each in value]
    if value is None or isinstance(value, (bool, int, float, str, dict)):
        return value
    module = type(value).__module__
    if module.startswith("scoresde."):
        module = module.rpartition(".")[0]  # our packages publish what is in their modules
    fields = {name: _recipe(of) for name, of in value.recipe().items()}
    as_they_are = {"_convert_": "all"} if any(isinstance(field, list) for field in fields.values()) else {}
    return {"_target_": f"{module}.{type(value).__name__}", **as_they_are, **fields}


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)
