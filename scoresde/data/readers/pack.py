"""Pictures or arrays of a folder, a tar or a zip in one file, whose samples can be read from where they lie."""

from __future__ import annotations

import bz2
import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .pictures import opened, pixels
from .source import existing, explained, misfit, read_array, unpacked_bytes

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_LARGEST = 1 << 28  # bytes of one file in an archive
_PACKERS: tuple[tuple[bytes, Any], ...] = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open))
_XZ = b"\xfd7zXZ"

Tracked = Callable[[Iterable[Any], str, int], Iterable[Any]]


class Entry(NamedTuple):
    """A file in a source: its name with `/`, and what reads it."""

    name: str
    read: Callable[[], bytes]


class Packed(NamedTuple):
    """What was written: number of samples, shape and type of one, names of the classes."""

    samples: int
    shape: tuple[int, ...]
    dtype: np.dtype
    classes: tuple[str, ...]


def pack(
    source: Path,
    target: BinaryIO,
    *,
    size: int | None = None,
    grey: bool | None = None,
    track: Tracked = lambda items, label, total: items,
) -> Packed:
    """Writes all samples of `source` as an uncompressed .npz: raw (N, *event), and labels and class_names where the
    samples lie in folders of classes. `data=arrays data.path=…` reads it as it is.

    A sample is a picture, decoded as `ImageFolder` does, or a .npy array; all have one shape and type. The source is
    read twice, once for its names, and no more than a sample of it is in memory. Nothing is unpacked to the disk.

    Args:
        source: a folder, a tar (also .gz, .bz2) or a zip.
        target: the file, open for writing and seekable.
        size, grey: of pictures, see `ImageFolder`.
        track: shows progress: (items, label, total) -> items.

    Raises:
        ValueError: no samples, samples that differ, or an archive that is damaged, encrypted, holds links, devices or
            paths that lead out of it, or unpacks to far more than its size.
    """
    names = [entry.name for entry in entries(source)]
    if not names:
        raise misfit(source, f"pictures ({', '.join(PICTURES)}) or arrays (.npy)", "none")
    labels, classes = _classes(source, names)
    samples = ((entry.name, _sample(f"{source}/{entry.name}", entry, size, grey)) for entry in entries(source))
    tracked = iter(track(samples, "packing", len(names)))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as content:
        with content.open("raw.npy", "w", force_zip64=True) as raw:
            _, first = next(tracked)
            shape = (len(names), *first.shape)
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(raw, header)  # type: ignore[arg-type]
            raw.write(first.tobytes())
            for name, sample in tracked:
                if (sample.shape, sample.dtype) != (first.shape, first.dtype):
                    expected = f"{first.dtype} {first.shape} as in {names[0]}"
                    cure = "" if name.endswith(".npy") else "Give --size to cut and resize all of them."
                    raise misfit(f"{source}/{name}", expected, f"{sample.dtype} {sample.shape}", cure)
                raw.write(sample.tobytes())
        for name, values in (("labels", labels), ("class_names", np.array(classes))) if classes else ():
            with content.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    return Packed(len(names), first.shape, first.dtype, classes)


def entries(source: Path) -> Iterator[Entry]:
    """The samples of a folder, a tar or a zip in the order of their names, of a tar in its own.

    Raises:
        ValueError: see `pack`.
    """
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            if _meant(name) and not path.is_dir():
                yield Entry(name, existing(path).read_bytes)
        return
    file = existing(source)
    with file.open("rb") as start:
        magic = start.read(8)
    yield from _of_zip(file) if magic.startswith(b"PK") else _of_tar(file, magic)


def _meant(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not hidden and path.suffix.lower() in (*PICTURES, ".npy")


def _check_entry(source: Path, name: str, size: int, total: int) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise misfit(source, "names inside the archive", repr(name))
    if size > _LARGEST:
        raise misfit(f"{source}/{name}", f"at most {_LARGEST:,} bytes a sample", f"{size:,}")
    most = unpacked_bytes(source.stat().st_size)
    if total > most:
        raise misfit(source, f"at most {most:,} bytes when it is unpacked", "more", "If that is right, unpack it.")


def _of_zip(source: Path) -> Iterator[Entry]:
    total = 0
    with explained(source, "a zip"):
        content = zipfile.ZipFile(source)
    with content:
        for info in sorted(content.infolist(), key=lambda info: info.filename):
            where, kind = f"{source}/{info.filename}", stat.S_IFMT(info.external_attr >> 16)
            total += info.file_size
            _check_entry(source, info.filename, info.file_size, total)
            if info.flag_bits & 1:
                raise misfit(where, "a file that is not encrypted", "an encrypted one")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise misfit(where, "a file", "a link or a device")
            if info.is_dir() or not _meant(info.filename):
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise misfit(where, "a file that is stored or deflated", f"method {info.compress_type}")

            def read(info: zipfile.ZipInfo = info, where: str = where) -> bytes:
                with explained(Path(where), "a whole file"), content.open(info) as member:
                    return member.read(info.file_size + 1)  # its checksum is compared at the end

            yield Entry(info.filename, read)


class _Bounded(io.RawIOBase):
    """A stream of which no more than `most` bytes are read, and at most `_LARGEST` at once."""

    def __init__(self, file: BinaryIO, most: int, source: Path):
        self.file, self.most, self.source = file, most, source

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST or self.file.tell() + size > self.most + tarfile.RECORDSIZE:
            found = "more: names or sizes that no archive of samples has"
            raise misfit(self.source, f"at most {self.most:,} bytes when it is unpacked", found)
        return self.file.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        if place > self.most + tarfile.RECORDSIZE:
            raise misfit(self.source, f"at most {self.most:,} bytes when it is unpacked", "more")
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()


def _of_tar(source: Path, magic: bytes) -> Iterator[Entry]:
    if magic.startswith(_XZ):
        raise misfit(source, "a tar, .tar.gz, .tar.bz2 or zip", "an .xz file", "Unpack it first: xz -d.")
    unpack = next((unpack for start, unpack in _PACKERS if magic.startswith(start)), open)
    most, total = unpacked_bytes(source.stat().st_size), 0
    with unpack(source, "rb") as file, _tar(source, _Bounded(file, most, source)) as content:
        while (info := _next(content, source)) is not None:
            where = f"{source}/{info.name}"
            total += info.size
            _check_entry(source, info.name, info.size, total)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise misfit(where, "a file", "a link, a device or a file with holes")
            if _meant(info.name):

                def read(info: tarfile.TarInfo = info, where: str = where) -> bytes:
                    with explained(Path(where), "a whole file"):
                        member = content.extractfile(info)
                        return b"" if member is None else member.read()

                yield Entry(info.name.removeprefix("./"), read)
            content.members.clear()  # type: ignore[attr-defined]  # or all of them would be kept
        with explained(source, "a whole tar"):
            file.seek(content.offset)  # type: ignore[attr-defined]
            if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() - content.offset < tarfile.BLOCKSIZE:  # type: ignore[attr-defined]
                raise ValueError("it ends without its last block: it is truncated")


def _tar(source: Path, file: Any) -> tarfile.TarFile:
    with explained(source, "a tar, .tar.gz, .tar.bz2 or zip"):
        return tarfile.open(fileobj=file, mode="r:")


def _next(content: tarfile.TarFile, source: Path) -> tarfile.TarInfo | None:
    with explained(source, "a whole tar"):
        return content.next()


def _sample(where: str, entry: Entry, size: int | None, grey: bool | None) -> np.ndarray:
    content = io.BytesIO(entry.read())
    if not entry.name.lower().endswith(".npy"):
        return pixels(Path(where), opened(Path(where), content), size, grey)
    sample = read_array(Path(where), content)
    if sample.dtype.kind not in "uif" or not sample.ndim:
        raise misfit(where, "an array of integers or floats", f"{sample.dtype} {sample.shape}")
    return np.ascontiguousarray(sample)


def _classes(source: Path, names: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and names of classes: the folders that samples lie in, if these are several."""
    parents = [PurePosixPath(name).parent for name in names]
    own = sorted(set(parents))
    if len(own) == 1:
        return np.zeros(len(names), np.int64), ()
    if len({parent.parent for parent in own}) > 1 or PurePosixPath() in own:
        found = ", ".join(str(parent) for parent in own[:4])
        raise misfit(source, "samples in one folder, or in one folder for each class", f"some in {found}")
    number = {parent: k for k, parent in enumerate(own)}
    return np.array([number[parent] for parent in parents], np.int64), tuple(parent.name for parent in own)
