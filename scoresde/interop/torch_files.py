"""Files of torch, and pickles with its tensors in them, read as data: see `pickles`."""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .pickles import ForeignFileError, Machine, add_items, expected

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which torch's older files begin
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_NUMPY = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "u4": "I", "b1": "?"}  # as `struct` calls them


def load(path: Path) -> Any:
    """What a pickle or a torch file holds: dictionaries, lists, tuples, sets, numbers, text, bytes and tensors.

    Modules, namespaces and other objects are dictionaries of their attributes; one of `torch_utils.persistence` has
    "class_name" among them. Tensors of one storage share it.

    Raises:
        ForeignFileError: a file that is damaged, holds other names or instructions, or claims more than it has.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ForeignFileError(f"{path} is no regular file.")
    with refusing(path), open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            return _load_zip(file)
        if start[:1] != b"\x80":
            raise ValueError(f"expected a pickle or a torch file, and it begins with {start!r}")
        return _load_plain(file)


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Errors in a file's content, with its path before them."""
    try:
        yield
    except ForeignFileError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, zipfile.BadZipFile) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ForeignFileError(f"{path} cannot be read: {kind}{error!s:.500}.") from error
    except (EOFError, struct.error, RuntimeError) as error:
        raise ForeignFileError(f"{path} is damaged: {error!s:.300}.") from error


def _load_zip(file: BinaryIO) -> Any:
    """torch's files since 1.6: stored (not compressed) members, `data.pkl` and `data/0`, `data/1`, …"""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two of its members have the same name")
        if any(info.compress_type or info.file_size != info.compress_size for info in members.values()):
            raise ValueError("its members are compressed, which torch never does")
        if sum(info.file_size for info in members.values()) > size:
            raise ValueError(f"its members claim more than the {size:,} bytes that it has")
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"expected one member data.pkl of a torch file, found {len(roots)}")
        order = f"{roots[0]}byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        storages: dict[str, Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in storages:
                storages[key] = _numbers(archive.read(f"{roots[0]}data/{key}"), dtype)
            return storages[key]

        program = archive.read(f"{roots[0]}data.pkl")
        return Machine(_NAMES, len(program), _stored(storage)).run(io.BytesIO(program))


def _load_plain(file: BinaryIO) -> Any:
    """A pickle; or torch's older files, five of them and the numbers of the storages after."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            claimed = sum(values.nbytes for values in storages.values()) + count * dtype.itemsize
            if count < 0 or claimed > size:
                raise ValueError(f"its storages claim more than the {size:,} bytes that it has")
            storages[key] = torch.empty(count, dtype=dtype, device="cpu")
        return storages[key]

    plain = Machine(_NAMES, size)
    found = plain.run(file)
    if found != _MAGIC:
        return found
    if plain.run(file) != _PROTOCOL or plain.run(file).get("little_endian") is not True:
        raise ValueError("it is of another protocol of torch, or not little-endian")
    found = Machine(_NAMES, size, _stored(storage)).run(file)
    for key in plain.run(file):
        values = storages[key]
        if struct.unpack("<q", file.read(8))[0] != len(values):
            raise ValueError(f"storage {key} has another length than was said")
        values.copy_(_numbers(file.read(values.nbytes), values.dtype))
    return found


def _numbers(content: bytes, dtype: torch.dtype) -> Tensor:
    if len(content) % dtype.itemsize:
        raise ValueError(f"{len(content)} bytes are no whole numbers of {dtype}")
    if not content:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _stored(storage: Callable[[str, torch.dtype, int], Tensor]) -> Callable[[Any], Tensor]:
    """Reads a reference to a storage: (key, dtype, count) is what it says."""

    def read(said: Any) -> Tensor:
        kind, name, key, _, count, *view = expected(said, tuple)
        if kind != "storage" or name not in _DTYPES or any(part is not None for part in view):
            raise ValueError(f"expected a storage of torch, found {kind!s:.40} {name!s:.40}")
        if type(key) is not str or type(count) is not int:
            raise ValueError("the name or length of a storage is none")
        found = storage(key, _DTYPES[name], count)
        if found.dtype != _DTYPES[name] or len(found) != count:
            raise ValueError(f"a storage of {len(found)} {found.dtype} is said to have {count} {_DTYPES[name]}")
        return found

    return read


def _persistent_object(said: Any) -> dict[str, Any]:
    """An object of EDM's classes: its attributes. The source that comes with it is left where it is."""
    meta = expected(said, dict)
    state: dict[str, Any] = expected(meta.get("state"), dict)
    state["class_name"] = expected(meta.get("class_name"), str)
    return state


def _storage(content: Any) -> Tensor:
    found: Tensor = expected(_load_plain(io.BytesIO(expected(content, bytes))), Tensor)
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    numbers = (offset, *expected(size, tuple), *expected(stride, tuple))
    if len(size) != len(stride) or len(size) > 8 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError(f"a tensor has no size: offset {offset!s:.40}, {size!s:.80}, {stride!s:.80}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(expected(storage, Tensor)) or (math.prod(size) and last >= len(storage)):
        raise ValueError(f"a tensor {size!s:.80} claims more than the {len(storage):,} numbers of its storage")
    return torch.as_strided(storage, size, stride, offset)


def _bytes(text: Any, encoding: Any) -> bytes:
    """Bytes as pickles had them before they had bytes."""
    if encoding != "latin1":
        raise ValueError(f"expected bytes as text in latin1, found {encoding!s:.40}")
    return str(expected(text, str)).encode("latin1")


def _numpy_scalar(dtype: Any, content: Any = b"") -> Any:
    (kind,) = expected(dtype, tuple)
    if kind not in _NUMPY:
        raise ValueError(f"expected a number of NumPy, found one of type {kind!s:.40}")
    return struct.unpack(f"<{_NUMPY[kind]}", expected(content, bytes))[0]


def _ordered(items: Any = ()) -> dict[Any, Any]:
    if items:
        raise ValueError("a mapping is made of a list, which no checkpoint of this kind does")
    return OrderedDict()


# What the names that checkpoints need stand for, as data.
_NAMES: dict[str, Callable[..., Any] | None] = {
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent_object,
    "torch._utils _rebuild_parameter": lambda tensor, *rest: expected(tensor, Tensor),
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch.storage _load_from_bytes": _storage,
    "torch.nn.modules.container ModuleDict": lambda: {},
    "collections OrderedDict": _ordered,
    "dnnlib.util EasyDict": lambda: {},
    "argparse Namespace": lambda: {},
    "builtins set": lambda items: add_items(expected(items, list), set()),
    "__builtin__ set": lambda items: add_items(expected(items, list), set()),
    "_codecs encode": _bytes,
    "numpy dtype": lambda kind, *rest: (expected(kind, str),),
    "numpy.core.multiarray scalar": _numpy_scalar,
    "numpy._core.multiarray scalar": _numpy_scalar,
    **dict.fromkeys(_DTYPES),
}
