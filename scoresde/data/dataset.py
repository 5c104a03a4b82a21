"""A data set: raw values in memory, two splits, one codec."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..codecs.codec import Codec
from ..diffusion.conditions import Cond, move, take, told, unnamed
from ..noise.rng import Rng
from .embedder import Embedding
from .rows import Rows, checked, chunks, select, spots
from .statistics import Statistics, extremes, measured
from .text import Text

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples as they were stored.

    Attributes:
        raw: (N, *event), integers or float32; in memory, or `Rows` of files, of which only `raw[index]` is.
        labels: (N,) int64 class indices, or None.
        conditions: others than labels, by name: "vector" (N, d), "image" (N, C, *sizes) and "tokens" (N, L, d),
            float32 and of about unit variance, for nothing scales them; all NaN for a sample or token without one. And
            "text" (N, L) int32, sentences as `Dataset.text` reads them.
    """

    raw: Tensor | Rows
    labels: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        told = f", {' and '.join(self.named)}" if self.named else ""
        return f"Split({len(self):,} samples {tuple(self.raw.shape[1:])} of {self.raw.dtype}{told})"

    def to(self, device: torch.device) -> Split:
        """The split on `device`; samples that stay in files do so."""
        return self._each(lambda values: values.to(device) if isinstance(values, Tensor) else values)

    def take(self, index: Tensor) -> Split:
        """The samples `index` (n,), in memory."""
        return self._each(lambda values: values[index])

    def select(self, index: Tensor) -> Split:
        """The samples `index` (n,); those in files stay there."""
        return self._each(lambda values: select(values, index))

    @property
    def named(self) -> dict[str, Tensor]:
        """All conditions by name, the labels as "label" among them."""
        return ({} if self.labels is None else {"label": self.labels}) | dict(self.conditions)

    def cond(self, index: Tensor | slice, conditional: bool, device: torch.device) -> Cond:
        """The condition of the samples `index` for a network, on the device; None for one that is not conditional.

        The labels themselves if there are no others, else all by name.
        """
        if not conditional:
            return None
        return move(take(unnamed(self.named), index), device)

    def digest(self) -> str:
        """SHA-256 of samples, labels and other conditions; "some:…" where it is of some samples and all sizes: of
        more than 16 GiB, and of pictures that stay in their files.
        """
        found, some = hashlib.sha256(), spots(self.raw)
        for name, values in sorted({"raw": self.raw, **self.named}.items()):
            found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            for part in some if some is not None and name == "raw" else chunks(values):
                found.update(part.cpu().flatten().numpy().data)
        if some is None or isinstance(self.raw, Tensor):
            return found.hexdigest()
        for size in self.raw.sizes():
            found.update(size.encode())
        return f"some:{found.hexdigest()}"

    def _each(self, fn: Callable[[Any], Any]) -> Split:
        labels = None if self.labels is None else fn(self.labels)
        return Split(fn(self.raw), labels, {name: fn(values) for name, values in self.conditions.items()})


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and held-out samples, and how they become model data. Everything is checked here, once.

    Attributes:
        name: for logs and error messages.
        train, test: see `Split`; same event shape, labels and conditions in both or in neither.
        codec: raw ↔ model data.
        classes: labels are 0 … classes − 1; 0 for no labels.
        log_prob: raw samples (B, *event) -> exact log-density (B,) in nats, where it is known (the toys).
        class_names: one for each class; without, they are called by their numbers.
        known: of an excerpt: what is known of all the samples that it was taken from.
        files: those that training and held-out samples were read from, for messages; empty where no file was read.
        columns: names of the features of a table; empty for other data.
        checksums: of the files of a folder, by their names in it, where each is of few samples.
        validation: training samples that are kept to choose by what the test split must not choose; None for none.
        notes: what the reader decided, in words that a run begins with.
        numbers: of the points of a raw sample, as the atomic numbers of a molecule; empty for other data.
        moments: what the codec can store of the training samples (N, …), see `Codec.moments`; None for nothing.
        text: how sentences become the condition "text"; None where samples have no captions.
        embedder: of which samples, or what they are told as "vector", are embeddings; None for none.
        rate: of sound, raw samples (C, L) at so many frames a second; 0 for other data.

    Raises:
        TypeError: a dtype that the codec cannot read, or labels that are not int64.
        ValueError: an empty split, NaN, values or labels out of range, or shapes that differ.
    """

    name: str
    train: Split
    test: Split
    codec: Codec
    classes: int = 0
    log_prob: Callable[[Tensor], Tensor] | None = None
    class_names: tuple[str, ...] = ()
    known: Statistics | None = None
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)
    validation: Split | None = None
    notes: str = ""
    numbers: tuple[int, ...] = ()
    rate: int = 0
    moments: Tensor | None = None
    text: Text | None = None
    embedder: Embedding | None = None

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"{self.name}: {len(self.class_names)} class_names for classes={self.classes}.")
        for part, split in (("train", self.train), ("test", self.test)):
            where = f"{self.name}, {part} split"
            check_samples(split.raw, where)
            if split.raw.dtype.is_floating_point and split.raw.dtype != torch.float32:
                raise TypeError(f"{where}: raw holds {split.raw.dtype}; networks compute in float32: pass raw.float().")
            checked(self.codec.check, split.raw, f"{where}: raw")
            _check_conditions(split, self.classes, where)
        train, test = (
            {name: tuple(values.shape[1:]) for name, values in {"raw": split.raw, **split.conditions}.items()}
            for split in (self.train, self.test)
        )
        if train != test:
            raise ValueError(
                f"{self.name}: training samples have the shapes {train}, test samples {test}; names and shapes must "
                "agree (pad tokens with NaN)."
            )

    def __repr__(self) -> str:
        parts = f"train={self.train}, test={self.test}, codec={self.codec}"
        return f"Dataset({self.name!r}, {parts}{f', classes={self.classes}' if self.classes else ''})"

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample of model data, as networks, samplers and likelihoods see it."""
        return self.codec.encoded_shape(self.raw_shape)

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample."""
        return tuple(self.train.raw.shape[1:])

    @property
    def scaling(self) -> Codec:
        """The codec, as it was called before."""
        return self.codec

    @property
    def names_of_classes(self) -> tuple[str, ...]:
        """One for each class: its own, or its number."""
        return self.class_names or tuple(map(str, range(self.classes)))

    @functools.cached_property
    def statistics(self) -> Statistics:
        """What is known of all samples; of an excerpt, of all that it was taken from."""
        if self.known is not None:
            return self.known
        train, test = self.train, self.test
        raw, encode = (
            (train.raw, self.codec.encode) if self.moments is None else (self.moments, self.codec.redraw.transform)
        )
        found = measured(raw, encode, train.labels, train.conditions, self.codec.model_range, len(test))
        digests = {"train": train.digest(), "test": test.digest()}
        if self.checksums:
            digests["files"] = "\n".join(f"{checksum} {name}" for name, checksum in self.checksums.items())
        return replace(found, digests=digests)

    @functools.cached_property
    def pixels(self) -> Dataset:
        """The same samples below an autoencoder, where model data have the places of raw data: what operators and
        scores see. Itself elsewhere."""
        codec = self.codec.pixels
        if codec is self.codec:
            return self
        span = codec.model_range or extremes(codec.encode(self.train.raw[:1024]))
        return replace(self, codec=codec, moments=None, known=replace(self.statistics, span=span))

    def check_unaltered(self, digests: Mapping[str, str], whose: str, cure: str) -> None:
        """Refuses files that hold other samples than those of these `Statistics.digests`.

        Samples that were read from no file are named in a warning: another machine may round them in another way.

        Args:
            digests: of the splits; of one that is not among them nothing is known.
            whose: what is of the other samples, for the message.
            cure: what to do about it, a sentence.

        Raises:
            ValueError: a file has changed; names it.
        """
        own = self.statistics.digests
        for part, file in zip(("train", "test"), self.files or (self.name, self.name), strict=True):
            before = digests.get(part, own[part])
            if before == own[part] or (":" in before) != (":" in own[part]):  # of all, and of some, cannot be compared
                continue
            said = f"{file} has changed{self._where(digests)}: {whose} is of other samples under this name."
            if self.files:
                raise ValueError(f"{said} {cure}")
            _log.warning("%s", said)
            return

    def _where(self, digests: Mapping[str, str]) -> str:
        """Which files of a folder are others than those of these digests, or are no longer there."""
        before = {line[9:]: line[:8] for line in digests.get("files", "").splitlines()}
        names = sorted({name for name, _ in before.items() ^ self.checksums.items()}) if before else []
        return f" in {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names and self.checksums else ""

    @property
    def seen_classes(self) -> tuple[int, ...]:
        """The classes that some training sample has: of others a model knows nothing."""
        labels = self.statistics.labels
        return tuple(range(self.classes)) if labels is None else labels

    @property
    def unseen(self) -> str:
        """The names of the classes that no training sample has, in words; empty if there are none."""
        names = [name for k, name in enumerate(self.names_of_classes) if k not in set(self.seen_classes)]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    @property
    def complete(self) -> bool:
        """Whether it has every held-out sample, as an excerpt of many may not."""
        return len(self.test) == self.statistics.held_out

    def encode(self, raw: Tensor, rng: Rng | None = None) -> Tensor:
        """Model data of raw samples (B, *raw shape); `rng` dequantises, None takes bin centres."""
        return self.codec.encode(raw, rng=rng)

    def drawn(self, raw: Tensor, cond: Cond, rng: Rng, device: torch.device) -> tuple[Tensor, Cond]:
        """`drawn` under its codec."""
        return drawn(self.codec, raw, cond, rng, device)

    def decode(self, x: Tensor) -> Tensor:
        """Raw values of model data (B, *event)."""
        return self.codec.decode(x)


def drawn(codec: Codec, raw: Tensor, cond: Cond, rng: Rng, device: torch.device) -> tuple[Tensor, Cond]:
    """(model data of raw samples on the device, their condition `cond` with what is told of this very draw)."""
    found = codec.drawn(raw, rng)
    more = {name: value.to(device) for name, value in found.told.items()}
    return found.codec.transform(found.values, rng=rng).to(device), told(cond, more)


def hold_out(samples: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(train, test): each sample is in one of them, in the old order; a function of the arguments alone.

    Args:
        samples: all of them. Where they have labels, every class is split in the same proportion (stratified).
        fraction: share of the test split, in (0, 1).
        seed: of the permutation.

    Raises:
        ValueError: a fraction outside (0, 1), or one that leaves a side of the split empty.
    """
    if not (0 < fraction < 1):
        raise ValueError(f"test_fraction lies in (0, 1); got {fraction}.")
    n, labels = len(samples), samples.labels
    order = Rng(seed).permutation(n)
    groups = [order] if labels is None else [order[labels[order] == k] for k in labels.unique()]
    counts = [round(fraction * len(group)) for group in groups]
    test = torch.cat([group[:count] for group, count in zip(groups, counts, strict=True)])
    train = torch.cat([group[count:] for group, count in zip(groups, counts, strict=True)])
    if len(test) == 0 or len(train) == 0:
        raise ValueError(
            f"test_fraction={fraction} of {n} samples leaves {len(train)} to train on and {len(test)} to test; "
            "both must be at least 1. Add samples or change data.test_fraction."
        )
    return samples.select(train.sort().values), samples.select(test.sort().values)


def given(
    name: str, samples: Split, codec: Codec, class_names: tuple[str, ...] = (), numbers: tuple[int, ...] = ()
) -> Dataset:
    """Samples that a trained model is measured on, under its codec: all of them are held out."""
    try:
        checked(codec.check, samples.raw, f"{name}: raw")
    except (TypeError, ValueError) as error:  # without its advice, which is on how to make a codec
        raise type(error)(f"{str(error).partition('. ')[0].rstrip('.')}.") from error
    return Dataset(name, samples, samples, codec, count_classes(samples), class_names=class_names, numbers=numbers)


def count_classes(*splits: Split) -> int:
    """One more than the largest label, 0 without labels."""
    return 1 + max((int(split.labels.max()) for split in splits if split.labels is not None), default=-1)


def check_samples(raw: Tensor | Rows, where: str) -> None:
    """Refuses what holds no sample (N, *event)."""
    if raw.ndim < 2 or raw.numel() == 0:
        raise ValueError(f"{where}: expected at least one sample (N, *event); got shape {tuple(raw.shape)}.")


_RANKS = {"label": (1,), "vector": (2,), "image": (3, 4, 5), "tokens": (3,), "text": (2,)}
_DTYPES = {"label": torch.int64, "text": torch.int32}


def _check_conditions(split: Split, classes: int, where: str) -> None:
    n, labels = len(split), split.labels
    if unknown := split.conditions.keys() - (_RANKS.keys() - {"label"}):
        raise ValueError(f"{where}: conditions beside labels are vector, image, tokens, text; got {min(unknown)!r}.")
    for name, values in split.named.items():
        expected = _DTYPES.get(name, torch.float32)
        if values.dtype != expected:
            raise TypeError(f"{where}: the {name} holds {values.dtype}, expected {expected}: pass .to({expected}).")
        if values.ndim not in _RANKS[name] or len(values) != n:
            raise ValueError(
                f"{where}: the {name} has shape {tuple(values.shape)}. With N = {n} samples labels are ({n},), a "
                f"vector is ({n}, d), an image ({n}, C, *sizes), tokens are ({n}, L, d), text ({n}, L)."
            )
    if (labels is None) == bool(classes):
        some = "no " if labels is None else ""
        raise ValueError(f"{where}: there are {some}labels and classes={classes}; give their number, 0 for no labels.")
    if labels is not None and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"{where}: labels span {labels.min()} … {labels.max()}, expected 0 … {classes - 1} (classes={classes})."
        )
