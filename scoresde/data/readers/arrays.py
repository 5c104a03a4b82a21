"""Arrays of your own, from .npy, .npz, HDF5 and NetCDF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...codecs import Codec, Scaling
from ..dataset import Dataset, Split, check_samples, count_classes, given, hold_out
from ..rows import Rows, checked, extent
from . import arrow, hdf5
from .captions import Captions, beside
from .npy import stored
from .source import absent, existing, explained, misfit, only, unpacked_bytes

# What a packed file may have beside its samples.
_PACKED = {"label": "labels", "class_names": "class_names"}

# What makes labels of other kinds class indices, by the letter of their dtype.
_ADVICE = {
    "f": "Store labels.astype(int).",
    "b": "Store labels.astype(int).",
    "U": "Number the names: np.unique(labels, return_inverse=True)[1].",
    "S": "Number the names: np.unique(labels, return_inverse=True)[1].",
}


class Axes(NamedTuple):
    """What is said of the axes of stored samples, see `Arrays`."""

    channels_last: bool
    add_channel: bool
    signals: bool


def Arrays(
    path: str,
    key: str | None = None,
    label_key: str | None = None,
    cond_keys: Mapping[str, str] | None = None,
    test_path: str | None = None,
    levels: int | None = None,
    raw_low: float | None = None,
    raw_high: float | None = None,
    channels_last: bool = False,
    add_channel: bool = False,
    signals: bool = False,
    test_fraction: float = 0.1,
    seed: int = 0,
    codec: Codec | None = None,
    lazy: bool | None = None,
    offset: int | None = None,
    captions: str | Captions | None = None,
) -> Dataset:
    """Samples (N, *event) of a file of NumPy, HDF5 or NetCDF. Nothing is unpickled.

    Integers are read as offset … offset + levels − 1 and dequantised; floats are kept as float32 and need their range,
    which is checked. Values that use less than half of the declared range, all at one end, are refused.

    Args:
        path: .npy, .npz, .h5, .hdf5, .nc or .arrow file, or a folder of save_to_disk of the package datasets.
        key: array of the file to read, in HDF5 its path inside; None if it holds a single one, or for .npy.
        label_key: array of the file with class indices (N,), integers ≥ 0; None for none.
        cond_keys: arrays of the file with other conditions, by their names: {"vector": key, "image": key, "tokens":
            key}, floats as in `Split.conditions`, or bools, which become 0 and 1.
        test_path: file of the test split, with the same keys; None holds out `test_fraction` instead.
        levels, offset: number of integer values (None means 256 for uint8 alone), and the least of them (None is 0).
        raw_low, raw_high: range of floats.
        channels_last, signals: samples are stored (…, C) and become (C, …); are signals of A channels, (A, B).
        add_channel: samples are stored without a channel axis and get one of size 1, and an image beside them, too.
        test_fraction, seed: of the split, in (0, 1), and ≥ 0; by class where there are labels.
        codec: of a model that is measured on these samples, in place of levels and range; all are held out.
        captions: a file of sentences, one for each sample, see `Captions`.
        lazy: samples stay in the file, .npy or uncompressed .npz, and are read batch by batch; None: above 1 GiB.

    Raises:
        FileNotFoundError, TypeError, ValueError: a file is missing or damaged, values are neither integers nor real
            floats, a key is unknown, or `Dataset` refuses it.
    """
    file = existing(path, folder=arrow.is_arrow(Path(path)) and Path(path).is_dir())
    keys = dict(cond_keys or {}) | ({} if label_key is None else {"label": label_key})
    axes = Axes(channels_last, add_channel, signals or codec is not None)
    train, names = (read := partial(_read_split, key=key, keys=keys, axes=axes, lazy=lazy))(file)
    if codec is not None:
        (train,), text = beside(captions, train)
        return replace(given(file.name, train, codec, names), text=text)
    scaling = _scaling(train.raw, levels, offset, raw_low, raw_high, file)
    if test_path is None:
        (train,), text = beside(captions, train)
        train, test = hold_out(train, test_fraction, seed)
    else:
        test = _test_split(existing(test_path, folder=file.is_dir()), read, scaling, names)
        (train, test), text = beside(captions, train, test)
    classes, files = len(names) or _classes(train, test, f"{file}[{keys.get('label')}]"), (path, test_path or path)
    return Dataset(file.stem, train, test, scaling, classes, class_names=names, files=files, text=text)


def _test_split(where: Path, read: Callable[..., Any], scaling: Scaling, names: tuple[str, ...]) -> Split:
    """That of a file of its own, which has the values and classes of the training samples."""
    test, found = read(where)
    checked(scaling.check, test.raw, f"{where}: raw")
    if found != names:
        expected = "the classes of the training samples, " + (", ".join(names) or "which have no names")
        raise misfit(f"{where}[class_names]", expected, ", ".join(found) or "none")
    return test


def _classes(train: Split, test: Split, where: str) -> int:
    """Their number; the network holds a row for each."""
    classes, n = count_classes(train, test), len(train) + len(test)
    if classes > n:
        found, advice = f"{classes - 1} in {n} samples", "Number the classes without gaps."
        raise misfit(where, "classes 0, 1, 2 …", found, advice)
    return classes


def _read_split(
    path: Path, key: str | None, keys: dict[str, str], axes: Axes, lazy: bool | None
) -> tuple[Split, tuple[str, ...]]:
    """The samples of a file with all that stands beside them, and the names of their classes where a packed file has
    them: `keys` has the key of the labels and other conditions.
    """
    keys = dict(keys)
    arrange = partial(_arranged, path=path, axes=axes)
    raw, others = _load(path, key, keys, arrange, lazy)
    names = tuple(map(str, others.pop("class_names", ())))
    labels = others.pop("label", None)
    for name, values in others.items():
        if values.dtype.kind not in "fb" or np.isinf(values).any():
            found = f"{values.dtype}{' with infinite ones' if values.dtype.kind == 'f' else ''}"
            raise ValueError(
                f"{path}[{keys[name]}]: the condition {name!r} is floats, NaN where there is none, or a mask of bools; "
                f"found {found}."
            )
    conditions = {name: torch.from_numpy(values.astype(np.float32)) for name, values in others.items()}
    if axes.add_channel and "image" in conditions and conditions["image"].ndim < raw.ndim:
        conditions["image"] = conditions["image"][:, None]
    if labels is None:
        return Split(raw, conditions=conditions), names
    return Split(raw, _labels(labels, len(raw), f"{path}[{keys['label']}]"), conditions), names


def _labels(values: np.ndarray, n: int, where: str) -> Tensor:
    """Class indices (n,) int64."""
    advice, found = _ADVICE.get(values.dtype.kind, ""), f"{values.dtype} {values.shape}"
    if values.shape != (n,):
        advice = "Take labels[:, 0]." if values.shape == (n, 1) else "One-hot rows become labels.argmax(1)."
    elif values.dtype.kind in "ui" and n:
        least, most = int(values.min()), int(values.max())
        if least >= 0 and most < 2**31:
            return torch.from_numpy(values.astype(np.int64))
        found += f" with minimum {least}" if least < 0 else f" with maximum {most}"
        advice = "Number the classes from 0."
    raise misfit(where, f"({n},) integers ≥ 0, one class per sample", found, advice)


def _load(
    path: Path, key: str | None, keys: dict[str, str], arrange: Callable[[np.ndarray], Tensor], lazy: bool | None
) -> tuple[Tensor | Rows, dict[str, np.ndarray]]:
    """The samples, and by name what has a key beside them; of a file of `scoresde-pack` all without a key."""
    if arrow.is_arrow(path):
        return arrow.read_arrow(path, key, keys, arrange)
    if path.suffix.lower() in (".csv", ".parquet"):
        raise misfit(path, "a .npy or .npz file", "a table", "data=table reads it, as experiment=table does.")
    if path.suffix in hdf5.SUFFIXES:
        values, others = hdf5.read_hdf5(path, key, keys)
        return arrange(values), others
    content = stored(path, None, arrange, lazy)
    if content is None:
        with explained(path, "a .npy or .npz file"):
            content = np.load(path, allow_pickle=False)
    if not isinstance(content, np.lib.npyio.NpzFile):
        if key is not None or keys:
            raise ValueError(
                f"{path} is one array without keys: leave data.key and data.label_key out, or store an .npz."
            )
        return arrange(content) if isinstance(content, np.ndarray) else content, {}
    with content:
        names = content.files
        if key is None and not keys and "raw" in names and set(names) <= {"raw", *_PACKED.values()}:
            key = "raw"
            keys |= {name: at for name, at in _PACKED.items() if at in names}
        first = key or only(path, names)
        if unknown := [at for at in (first, *keys.values()) if at not in names]:
            raise absent(path, unknown[0], names)
        raw = stored(path, first, arrange, lazy)
        others = {name: member(content, at, path) for name, at in keys.items()}
        return arrange(member(content, first, path)) if raw is None else raw, others


def member(content: Any, name: str, path: Path) -> np.ndarray:
    """One array of an .npz file."""
    (entry,) = (info for info in content.zip.infolist() if info.filename in (name, f"{name}.npy"))
    if entry.file_size > unpacked_bytes(entry.compress_size):
        found = f"one that unpacks to {entry.file_size:,} bytes, {entry.file_size // max(entry.compress_size, 1)} times"
        raise misfit(f"{path}[{name}]", "an array", f"{found} its own", "If that is right, store it as .npy.")
    with explained(path, "a .npy or .npz file"):
        values = content[name]
    if not isinstance(values, np.ndarray):
        raise misfit(f"{path}[{name}]", "an array of NumPy's", "another file")
    return values


def _tensor(values: np.ndarray, path: Path) -> Tensor:
    """Integers in the smallest type that torch computes with, floats in float32; in this machine's order of bytes."""
    kind = values.dtype.kind
    if kind not in "uif":
        advice = " Store masks as uint8 and set levels=2." if kind == "b" else ""
        raise TypeError(f"{path}: expected integers or real floats, found dtype {values.dtype}.{advice}")
    if values.size and values.dtype.itemsize > 4 and kind != "i":
        low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        if kind == "u" and int(high) >= 2**63:
            raise misfit(path, "integers below 2^63", int(high), "Shift or scale them.")
        if kind == "f" and (far := [end for end in (low, high) if np.finfo(np.float32).max < abs(end) < np.inf]):
            raise misfit(path, "numbers that float32 holds, up to 3.4e38", f"{far[0]:.6g}", "Scale them.")
    kept = np.float32 if kind == "f" else np.uint8 if values.dtype == np.uint8 else np.int64
    raw = torch.from_numpy(values.astype(kept, order="C"))
    check_samples(raw, str(path))
    return raw


def _arranged(values: np.ndarray, path: Path, axes: Axes) -> Tensor:
    """Samples (n, C, …) of what is stored."""
    if axes.add_channel and axes.channels_last:
        raise ValueError("channels_last and add_channel exclude each other: the channel axis is there or it is not.")
    raw = _tensor(values, path)
    if not any(axes):
        _ask(tuple(raw.shape[1:]), path)
    return raw[:, None] if axes.add_channel else _channels_first(raw, axes.channels_last, path)


def _channels_first(raw: Tensor, channels_last: bool, path: Path) -> Tensor:
    """Images that look the other way round are refused, not turned."""
    event = tuple(raw.shape[1:])
    if channels_last and len(event) < 2:
        raise misfit(path, "samples (…, C) for channels_last", f"samples of shape {event}")
    first, last = event[0] in (1, 3, 4), event[-1] in (1, 3, 4)
    if len(event) == 3 and first != last and last != channels_last:
        advice = "(H, W, C), expected (C, H, W). Set" if last else "(C, H, W) already. Leave out"
        raise ValueError(f"{path}: samples of shape {event} look like {advice} channels_last=True.")
    return raw.movedim(-1, 1).contiguous() if channels_last else raw


def _ask(event: tuple[int, ...], path: Path) -> None:
    """Refuses samples (A, B), both above 4 and at most 8 to 1: the first axis may be of channels or not."""
    if len(event) == 2 and min(event) > 4 and max(event) <= 8 * min(event):
        raise ValueError(
            f"{path}: samples of shape {event} may be pictures or fields without a channel axis, or signals of "
            f"{event[0]} channels and {event[1]} places. Say which: add_channel=True or signals=True."
        )


def _scaling(
    raw: Tensor | Rows,
    levels: int | None,
    offset: int | None,
    raw_low: float | None,
    raw_high: float | None,
    path: Path,
) -> Scaling:
    low, high = extent(raw)
    found = f"{low:.7g} … {high:.7g}"
    if raw.dtype.is_floating_point:
        checked(Scaling.identity().check, raw, f"{path}: raw")  # NaN has no range
        if levels is not None or offset is not None:
            raise TypeError(
                f"{path}: levels={levels}, offset={offset} are for integers, found {raw.dtype} in {found}. Store the "
                "integers themselves, or give raw_low and raw_high."
            )
        if raw_low is None or raw_high is None:
            raise ValueError(f"{path}: floats need their range: give raw_low and raw_high. Found {found}.")
        scaling = Scaling(raw_low=raw_low, raw_high=raw_high)
    else:
        if raw_low is not None or raw_high is not None:
            raise ValueError(f"{path}: raw_low and raw_high are for floats; integers take levels=…. Found {raw.dtype}.")
        if levels is None and raw.dtype != torch.uint8:
            advice = f" Set offset={low} and levels={high - low + 1}." if low < 0 else ""
            raise ValueError(f"{path}: integers other than uint8 need levels=…. Found {found}.{advice}")
        levels = 256 if levels is None else levels
        scaling = Scaling(levels=levels, offset=offset or 0)
        raw_low, raw_high = scaling.offset, scaling.offset + levels - 1
    checked(scaling.check, raw, f"{path}: raw")
    if not low < (raw_low + raw_high) / 2 < high:
        option = "raw_low, raw_high" if raw.dtype.is_floating_point else "offset, levels"
        raise ValueError(
            f"{path}: values span {found}, one half of the declared {raw_low:g} … {raw_high:g}. Declare the range that "
            f"the data use ({option})."
        )
    return scaling
