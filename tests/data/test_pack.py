"""scoresde-pack: one file of a folder, a tar or a zip, the same samples, and no archive that harms."""

from __future__ import annotations

import io
import os
import signal
import stat
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import start, wait
from PIL import Image

from scoresde.cli.pack import main, write
from scoresde.data import Arrays, ImageFolder
from scoresde.data.rows import Rows

G = np.random.default_rng(0)


def png(value: int | None = None, size: tuple[int, int] = (5, 4)) -> bytes:
    out = io.BytesIO()
    values = G.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values if value is None else np.full_like(values, value)).save(out, "png")
    return out.getvalue()


PICTURES = {f"{kind}/{k}.png": png() for kind in ("cat", "dog") for k in range(6)}


def as_folder(path: Path, files: dict[str, bytes] = PICTURES) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def as_tar(path: Path, files: dict[str, bytes] = PICTURES, mode: str = "w", **more: Any) -> Path:
    with tarfile.open(path, mode) as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in more.items():
                setattr(info, key, value)
            out.addfile(info, io.BytesIO(content))
    return path


def as_zip(path: Path, files: dict[str, bytes] = PICTURES, method: int = zipfile.ZIP_STORED, attr: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = method, attr
            out.writestr(info, content)
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.bz2", "zip", "deflated"])
def test_a_packed_file_holds_what_the_folder_does(tmp_path: Path, kind: str) -> None:
    folder = as_folder(tmp_path / "pictures")
    source = {
        "folder": lambda: folder,
        "zip": lambda: as_zip(tmp_path / "x.zip"),
        "deflated": lambda: as_zip(tmp_path / "x.zip", method=zipfile.ZIP_DEFLATED),
    }.get(kind, lambda: as_tar(tmp_path / f"x.{kind}", mode=f"w:{kind.removeprefix('tar').removeprefix('.')}"))()
    said = write(source, tmp_path / "x.npz")
    assert said.startswith("12 samples (3, 4, 5) of uint8, 2 classes")
    ours, theirs = Arrays(str(tmp_path / "x.npz"), lazy=True), ImageFolder(str(folder))
    assert isinstance(ours.train.raw, Rows) and ours.class_names == theirs.class_names == ("cat", "dog")
    for one, other in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert one.labels is not None and other.labels is not None
        assert torch.equal(one.raw[:], other.raw[:]) and torch.equal(one.labels, other.labels)
    # NumPy reads it too, and the two halves of a data set may be two files
    assert np.load(tmp_path / "x.npz")["raw"].shape == (12, 3, 4, 5)
    assert len(Arrays(str(tmp_path / "x.npz"), test_path=str(tmp_path / "x.npz"), lazy=True).train) == 12


def test_arrays_of_one_sample_each_are_packed_as_they_are(tmp_path: Path) -> None:
    samples = G.normal(size=(5, 7)).astype(np.float32)
    for k, sample in enumerate(samples):
        np.save(tmp_path / f"{k}.npy", sample)
    write(tmp_path, tmp_path / "out.npz")
    assert np.array_equal(np.load(tmp_path / "out.npz")["raw"], samples)


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def cut(path: Path, by: int) -> Path:
    os.truncate(path, path.stat().st_size - by)
    return path


def encrypted(path: Path) -> Path:
    content = bytearray(as_zip(path).read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    path.write_bytes(content)
    return path


def flipped(path: Path) -> Path:
    content = bytearray(as_zip(path).read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    return path


def link(path: Path, kind: bytes) -> Path:
    return as_tar(path, {"a.png": b""}, type=kind, linkname="/etc/passwd")


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "leads out of a tar": (lambda p: as_tar(p / "x.tar", {"../a.png": png()}), "names inside the archive"),
    "begins at the root": (lambda p: as_zip(p / "x.zip", {"/a.png": png()}), "names inside the archive"),
    "link": (lambda p: link(p / "x.tar", tarfile.SYMTYPE), "found a link, a device"),
    "hard link": (lambda p: link(p / "x.tar", tarfile.LNKTYPE), "found a link, a device"),
    "pipe": (lambda p: link(p / "x.tar", tarfile.FIFOTYPE), "found a link, a device"),
    "device": (lambda p: link(p / "x.tar", tarfile.CHRTYPE), "found a link, a device"),
    "link in a zip": (
        lambda p: as_zip(p / "x.zip", {"a.png": b"/etc/passwd"}, attr=(stat.S_IFLNK | 0o777) << 16),
        "found a link or a device",
    ),
    "encrypted": (lambda p: encrypted(p / "x.zip"), "found an encrypted one"),
    "damaged in a zip": (lambda p: flipped(p / "x.zip"), "damaged or other"),
    "truncated zip": (lambda p: cut(as_zip(p / "x.zip"), 30), "damaged or other"),
    "truncated tar": (lambda p: cut(as_tar(p / "x.tar"), 10_240 + 700), "damaged or other"),
    "tar that ends between two files": (
        lambda p: cut(as_tar(p / "x.tar", {"a.png": png(), "b.png": png()}), 10_240 - 2 * 1024),
        "damaged or other|truncated",
    ),
    "truncated gzip": (lambda p: cut(as_tar(p / "x.tar.gz", mode="w:gz"), 40), "damaged or other"),
    "bomb in a tar": (
        lambda p: as_tar(p / "x.tar.gz", {"a.npy": bytes((1 << 28) + 1)}, mode="w:gz"),
        "at most 268,435,456 bytes a sample",
    ),
    "bomb of many": (
        lambda p: as_zip(p / "x.zip", {f"{k}.npy": bytes(1 << 24) for k in range(18)}, zipfile.ZIP_DEFLATED),
        "at most 268,435,456 bytes when it is unpacked",
    ),
    "header that promises too much": (
        lambda p: as_zip(
            p / "x.zip", {"a.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,)}")}
        ),
        "damaged or other",
    ),
    "objects": (
        lambda p: as_zip(p / "x.zip", {"a.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}")}),
        "found dtype object",
    ),
    "no picture": (lambda p: as_zip(p / "x.zip", {"a.png": b"text"}), "x.zip/a.png: expected an image"),
    "other sizes": (lambda p: as_zip(p / "x.zip", {"a.png": png(), "b.png": png(size=(9, 9))}), "b.png: .*Give --size"),
    "classes beside none": (
        lambda p: as_zip(p / "x.zip", {"a.png": png(), "c/b.png": png()}),
        "one folder for each class",
    ),
    "nothing": (lambda p: as_zip(p / "x.zip", {"readme.txt": b""}), "found none"),
    "xz": (lambda p: as_tar(p / "x.tar.xz", mode="w:xz"), "Unpack it first"),
    "no archive": (lambda p: as_folder(p, {"x.tar": b"text" * 1000}) / "x.tar", "damaged or other"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_by_name_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE[name]
    (tmp_path / "in").mkdir()
    source, target = make(tmp_path / "in"), tmp_path / "out" / "x.npz"
    target.parent.mkdir()
    begin = time.monotonic()
    with pytest.raises((ValueError, TypeError), match=words) as refused:
        write(source, target)
    assert str(source) in str(refused.value)
    assert list(target.parent.iterdir()) == [] and time.monotonic() - begin < 20  # seconds: 5 of a bomb, beside others


def test_a_stopped_packing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_folder(tmp_path / "in", {f"{k}.png": png(7, (64, 64)) for k in range(3000)})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("sys.argv", ["scoresde-pack", str(source), str(tmp_path / "out" / "x.npz")])
    pid = start(lambda: os._exit(_code(main)))
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in (tmp_path / "out").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 143 and list((tmp_path / "out").iterdir()) == []


def _code(act: Callable[[], None]) -> int:
    try:
        act()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def test_what_is_there_is_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = as_folder(tmp_path / "in"), tmp_path / "x.npz"
    target.write_bytes(b"mine")
    monkeypatch.setattr("sys.argv", ["scoresde-pack", str(source), str(target)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert target.read_bytes() == b"mine" and "--overwrite" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["scoresde-pack", str(source), str(target), "--overwrite"])
    main()
    assert f"data.path={target}" in capsys.readouterr().out and len(np.load(target)["labels"]) == 12
