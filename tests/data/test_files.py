"""Files that cannot be read whole are refused by name, or read right: arrays, pictures, and what is no file."""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.cli.conditions import choose_cond
from scoresde.codecs import Scaling
from scoresde.data import Arrays, Dataset, Idx, ImageFolder, Split
from scoresde.data.excerpt import excerpt, packed, unpacked
from scoresde.data.kinds import in_turn, kinds_of
from scoresde.data.readers.pictures import read_image
from scoresde.data.readers.source import existing, read_array

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
CT = rng.integers(-1024, 3000, (40, 1, 4, 4))
FLOATS = rng.uniform(-1, 1, (40, 3))
RANGE = {"raw_low": -1, "raw_high": 1}


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


# Arrays -------------------------------------------------------------------------------------------------------------


def test_signed_integers_are_told_how_to_be_read_and_that_works(tmp_path: Path) -> None:
    for dtype in (np.int16, np.int32, ">i2"):
        path = save(tmp_path / "ct.npz", x=CT.astype(dtype))
        for keywords in ({}, {"levels": 4024}):
            with pytest.raises(ValueError, match=r"[Ss]et offset=-10\d\d.* levels=\d+") as caught:
                Arrays(path, **keywords)
        offset, levels = map(int, re.findall(r"offset=(-\d+).* levels=(\d+)", str(caught.value))[0])
        assert (offset, levels) == (CT.min(), CT.max() - CT.min() + 1)
        data = Arrays(path, levels=levels, offset=offset)
        assert int(data.train.raw.min()) < 0 and torch.equal(
            data.decode(data.encode(data.test.raw)).long(), data.test.raw.long()
        )


@pytest.mark.parametrize("how", [lambda x: x.astype(">f8"), np.asfortranarray, lambda x: x.astype("<f2"), lambda x: x])
def test_any_order_of_bytes_and_of_axes_is_read_as_it_is(
    tmp_path: Path, how: Callable[[np.ndarray], np.ndarray]
) -> None:
    values = how(FLOATS)
    data = Arrays(save(tmp_path / "x.npz", x=values, y=np.arange(40).astype(">i8") % 2), "x", "y", **RANGE)
    raw = torch.cat([data.train.raw, data.test.raw])
    assert raw.is_contiguous() and raw.dtype == torch.float32
    assert sorted(raw.flatten().tolist()) == sorted(values.astype(np.float32).flatten().tolist())


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (np.where(FLOATS > 0.9, np.nan, FLOATS), ValueError, "NaN or infinite"),
        (np.where(FLOATS > 0.9, np.inf, FLOATS), ValueError, "NaN or infinite"),
        (np.where(FLOATS > 0.9, 1e300, FLOATS), ValueError, "float32 holds.*1e\\+300"),
        (np.full((9, 2), 2**64 - 1, np.uint64), ValueError, "below 2\\^63, found 18446744073709551615"),
        (FLOATS[:0], ValueError, "at least one sample"),
        (np.float64(3), ValueError, "at least one sample"),
        (np.zeros(3, "f4,i4"), TypeError, "integers or real floats"),
    ],
)
def test_values_that_no_model_takes_are_refused_by_name(tmp_path: Path, values: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=rf"x\.npz.*{words}"):
        Arrays(save(tmp_path / "x.npz", x=values), **RANGE)


class Opened:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([[Opened()] * 2] * 2)
    np.save("x.npy", objects, allow_pickle=True)
    np.savez("x.npz", x=objects, allow_pickle=True)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(TypeError, match=rf"{name}: expected numbers, found dtype object"):
            Arrays(name, key=None if name == "x.npy" else "x")
    with pytest.raises(TypeError, match="found dtype object"):
        read_array(Path("x.npy"))
    Path("y.npy").write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match="damaged or other"):
        Arrays("y.npy")
    assert not Path("unpickled").exists()


def member(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("x.npy", content)
    return str(path)


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def test_a_small_file_that_unpacks_to_a_large_one_is_refused_unread(tmp_path: Path) -> None:
    path, n = tmp_path / "bomb.npz", (1 << 28) + 1
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w") as inner:
        inner.write(header(f"({n}, 1)"))
        for _ in range(257):
            inner.write(bytes(1 << 20))
    with pytest.raises(ValueError, match=r"bomb\.npz\[x\]: .*unpacks to 269.* store it as \.npy"):
        Arrays(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"no array",
        header("(9999999999999, 9999999)"),
        header("(99999999999999999999,)"),
        header("(" * 3000),
        header("x"),
    ],
)
def test_damaged_members_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"x\.np[yz].*(damaged|another file)"):
        Arrays(member(tmp_path / "x.npz", content))
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npy.*damaged"):
        Arrays(str(tmp_path / "x.npy"))


def test_an_idx_file_that_promises_or_unpacks_too_much_is_refused(tmp_path: Path) -> None:
    promise = struct.pack(">HBB3I", 0, 8, 3, 4_000_000_000, 4_000_000_000, 4_000_000_000) + bytes(100)
    path = tmp_path / "train-images-idx3-ubyte"
    for content, words in ((promise, "truncated"), (gzip.compress(promise), "truncated")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}.*{words}"):
            Idx(str(tmp_path), labels=False)
    packer = zlib.compressobj(9, wbits=31)
    path.write_bytes(b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(258)), packer.flush()]))
    with pytest.raises(ValueError, match=rf"{path}.*268,435,456 bytes when it is unpacked"):
        Idx(str(tmp_path), labels=False)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy: expected a file, found a pipe"):
        Arrays(str(tmp_path / "x.npy"))
    (tmp_path / "y.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(FileNotFoundError, match=r"y\.npy is a link to .*gone\.npy, and nothing is there"):
        existing(tmp_path / "y.npy")


# Classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(40) - 1, "minimum -1. Number the classes from 0"),
        (np.arange(40) % 2 / 1, r"float64.*labels\.astype\(int\)"),
        (np.arange(40) % 2 == 0, r"bool.*labels\.astype\(int\)"),
        (np.array(["cat", "dog"])[np.arange(40) % 2], r"<U3.*np\.unique\(labels, return_inverse=True\)"),
        (np.arange(40)[:, None], r"Take labels\[:, 0\]"),
        (np.eye(40, dtype=int), r"labels\.argmax\(1\)"),
        (np.full(40, 2**63, np.uint64), "maximum 9223372036854775808"),
        (np.r_[np.zeros(39, int), 50], "without gaps"),
    ],
)
def test_labels_that_are_no_classes_are_told_how_to_become_some(tmp_path: Path, labels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.npz\[y\].*{words}"):
        Arrays(save(tmp_path / "x.npz", x=FLOATS, y=labels), "x", "y", **RANGE)


def test_a_class_without_a_training_sample_is_named_and_not_drawn_unasked(tmp_path: Path) -> None:
    data = Arrays(save(tmp_path / "x.npz", x=FLOATS, y=np.array([1, 3])[np.arange(40) % 2]), "x", "y", **RANGE)
    assert (data.classes, data.seen_classes, data.unseen) == (4, (1, 3), "0, 2")
    few = excerpt(data)
    kept = unpacked(*packed(few), data.scaling)
    for known in (data, few, kept):
        assert in_turn(known, 5, True).tolist() == [1, 3, 1, 3, 1]
    old = packed(few)[1]
    del old["statistics"]["labels"], old["statistics"]["digests"]  # as of a folder that does not say
    assert unpacked(packed(few)[0], old, data.scaling).seen_classes == (0, 1, 2, 3)
    run: Any = SimpleNamespace(kinds=kinds_of(data, always=False), check_kinds=dict, dataset=data, folder="runs/mine")
    asked = {label: choose_cond({"label": label}, 2, run) for label in (0, 3)}
    assert asked[0][0].tolist() == [0, 0] and "No training sample of runs/mine has class 0" in asked[0][1]
    assert asked[3][1] == ""
    whole = Dataset("all", data.train, data.test, data.scaling, 20)
    assert whole.unseen == "0, 2, 4, 5, 6, 7, 8, 9 and 10 more"


def test_another_file_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    path, held = save(tmp_path / "x.npz", x=FLOATS), save(tmp_path / "held.npz", x=FLOATS[:9])
    first = Arrays(path, test_path=held, **RANGE)
    digests = unpacked(*packed(excerpt(first)), first.scaling).statistics.digests

    def look(digests: dict[str, str] = digests) -> None:
        Arrays(path, test_path=held, **RANGE).check_unaltered(digests, "runs/mine", "Mend it.")

    look()
    save(tmp_path / "held.npz", x=FLOATS[1:10])
    with pytest.raises(ValueError, match=rf"^{held} has changed: runs/mine is of other samples.*Mend it\."):
        look()
    save(tmp_path / "x.npz", x=FLOATS[::-1])
    with pytest.raises(ValueError, match=rf"^{path} has changed"):
        look()
    look({})  # of an older run
    a = Split(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
    assert a.digest() != Split(a.raw, torch.tensor([0, 1, 1])).digest() != Split(a.raw).digest()


# Pictures -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(colour: int, channels: int) -> bytes:
    rows = rng.integers(0, 65536, (4, 6, channels)).astype(">u2")
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", 6, 4, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(bits: int, samples: int, *, kind: int = 1, extra: int | None = None, photometric: int = 2) -> bytes:
    """An uncompressed TIFF of 4 × 6 pixels, all of whose fields lie behind its directory."""
    data = rng.integers(0, 128, 24 * samples * bits // 8, dtype=np.uint8).tobytes()
    fields: dict[int, tuple[int, list[int]]] = {
        256: (3, [6]), 257: (3, [4]), 258: (3, [bits] * samples), 259: (3, [1]), 262: (3, [photometric]),
        273: (4, [0]), 277: (3, [samples]), 278: (3, [4]), 279: (4, [len(data)]), 339: (3, [kind] * samples),
    }  # fmt: skip
    if extra is not None:
        fields[338] = (3, [extra])
    end, tail, directory = 8 + 2 + 12 * len(fields) + 4, b"", b""
    fields[273] = (4, [end + sum(2 * len(v) for t, v in fields.values() if t == 3 and len(v) > 2)])
    for tag, (form, values) in sorted(fields.items()):
        body = struct.pack(f"<{len(values)}{'H' if form == 3 else 'I'}", *values).ljust(4, b"\0")
        if len(body) > 4:
            body, tail = struct.pack("<I", end + len(tail)), tail + body
        directory += struct.pack("<HHI", tag, form, len(values)) + body
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4) + tail + data


def drawn(form: str, mode: str = "RGB", **how: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, form, **how)
    return file.getvalue()


TWO = {"save_all": True, "append_images": [Image.fromarray(PIXELS[::-1])]}
LOST = {
    "deep.png": (deep_png(2, 3), "16 bits"),
    "deep grey.png": (deep_png(0, 1), "16 bits"),
    "deep alpha.png": (deep_png(6, 4), "16 bits"),
    "deep.tif": (tiff(16, 3), "16 bits"),
    "signed.tif": (tiff(8, 3, kind=2), "signed"),
    "floats.tif": (tiff(32, 1, kind=3, photometric=1), "32 bits"),
    "four.tif": (tiff(8, 4, extra=0), "further channels"),
    "pages.tif": (drawn("TIFF", **TWO), "2 frames"),
    "moving.gif": (drawn("GIF", **TWO), "2 frames"),
    "moving.png": (drawn("PNG", **TWO), "2 frames"),
    "moving.webp": (drawn("WEBP", **TWO), "2 frames"),
    "print.jpg": (drawn("JPEG", "CMYK"), "CMYK"),
    "alpha.png": (drawn("PNG", "RGBA"), "transparency"),
    "palette.png": (drawn("PNG", "P", transparency=0), "transparency"),
    "cut.jpg": (drawn("JPEG")[:-20], "damaged"),
    "cut.png": (drawn("PNG")[:-30], "damaged"),
    "nothing.png": (b"", "0 bytes"),
    "text.png": (b"<svg></svg>", "damaged or other"),
}


@pytest.mark.parametrize("name", LOST)
def test_pictures_that_are_not_read_whole_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Wherever they are read: as training data, and as what a command is given."""
    content, words = LOST[name]
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    for read in (lambda: ImageFolder(str(tmp_path)), lambda: read_image(tmp_path / name, 3)):
        with pytest.raises(ValueError) as caught:
            read()
        assert name in str(caught.value) and words in str(caught.value), caught.value


def test_grey_pictures_are_read_as_they_are(tmp_path: Path) -> None:
    """Of 8 bits and of 16, without a word; either in colours only as asked, and not both."""
    shallow, deep = PIXELS[..., 0], rng.integers(0, 65536, (4, 6)).astype(np.uint16)
    for name, values in (("a.png", shallow), ("b.png", deep), ("c.tif", deep)):
        Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"b\.png: expected an 8-bit grey image .* as a\.png is, found .* 16 bits"):
        ImageFolder(str(tmp_path))
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    data = ImageFolder(str(tmp_path), test_fraction=0.5)
    assert data.scaling.levels == 65536 and data.event_shape == (1, 4, 6)
    both = torch.cat([data.train.raw, data.test.raw])
    assert torch.equal(both[:, 0], torch.from_numpy(np.stack([deep, deep]).astype(np.int32)))
    smaller = ImageFolder(str(tmp_path), size=4, test_fraction=0.5).train.raw  # the central square, as it is
    assert torch.equal(smaller[0, 0], both[0, 0, :, 1:5])
    with pytest.raises(ValueError, match="expected an 8-bit RGB image, found mode I;16"):
        ImageFolder(str(tmp_path), grey=False)
    assert torch.equal(read_image(tmp_path / "a.png", 1, deep=True), both[0])
    with pytest.raises(ValueError, match="16 bits"):
        read_image(tmp_path / "a.png", 1)
    for name in ("a.png", "c.tif"):
        Image.fromarray(shallow).save(tmp_path / name)
    data = ImageFolder(str(tmp_path), test_fraction=0.5)
    assert data.scaling.levels == 256 and torch.equal(data.test.raw[0, 0], torch.from_numpy(shallow.copy()))


def grid(folder: Path, parts: str, names: str, count: int = 3) -> None:
    """Pictures of one value each, whose values tell them apart."""
    for part in parts.split():
        for name in names.split() or [""]:
            for i in range(count):
                path = folder / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4), 10 * i + len(part), np.uint8)).save(path)


def test_folders_say_what_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid(tmp_path, "train test val", "cat flower")
    grid(tmp_path, "train", "bird")
    with caplog.at_level(logging.INFO, "scoresde"):
        data = ImageFolder(str(tmp_path))
    assert "trained on train, test is held out; val is left out" in caplog.text
    assert data.class_names == ("bird", "cat", "flower") and data.test.labels is not None
    assert data.train.raw.unique().tolist() == [5, 15, 25] and data.test.raw.unique().tolist() == [4, 14, 24]
    assert data.test.labels.tolist() == [1, 1, 1, 2, 2, 2]  # numbered as in training
    given = ImageFolder(str(tmp_path), codec=Scaling(levels=256))
    assert torch.equal(given.test.raw, data.test.raw)  # a model is not measured on what is trained on
    shutil.rmtree(tmp_path / "test")
    assert ImageFolder(str(tmp_path)).test.raw.unique().tolist() == [3, 13, 23]  # of val
    grid(tmp_path, "val", "whale")
    with pytest.raises(ValueError, match=r"val: expected classes of .*train, found whale"):
        ImageFolder(str(tmp_path))
    grid(tmp_path, "more", "cat")
    with pytest.raises(ValueError, match="expected train and val alone, as splits, found more"):
        ImageFolder(str(tmp_path))


def test_what_is_passed_over_and_what_changed_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid(tmp_path, "a b", "", 4)
    (tmp_path / "a" / "x.HEIC").write_bytes(b"x")
    (tmp_path / "b" / "notes.txt").write_bytes(b"x")
    data = ImageFolder(str(tmp_path), test_fraction=0.25)
    assert "1 files are passed over that are not read: x.HEIC" in caplog.text
    digests = unpacked(*packed(excerpt(data)), data.scaling).statistics.digests
    data.check_unaltered(digests, "runs/mine", "Mend it.")
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(tmp_path / "b" / "2.png")
    (tmp_path / "a" / "3.png").unlink()
    with pytest.raises(ValueError, match=rf"^{tmp_path} has changed in a/3\.png, b/2\.png: runs/mine is of other"):
        ImageFolder(str(tmp_path), test_fraction=0.25).check_unaltered(digests, "runs/mine", "Mend it.")


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("tag", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_pictures_are_turned_as_their_tag_says(tmp_path: Path, form: str, tag: int, turns: int) -> None:
    exif = Image.Exif()
    exif[274] = tag
    path = tmp_path / "a.picture"
    path.write_bytes(drawn(form, exif=exif, **({"lossless": True} if form == "WEBP" else {})))
    assert np.array_equal(read_image(path, 3).permute(1, 2, 0), np.rot90(PIXELS, turns))


def test_what_a_folder_of_pictures_would_leave_out_is_named(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / "cat" / f"{i}.png")
    assert ImageFolder(str(tmp_path)).class_names == ("cat",)
    for place, content, words in (
        ("cat/9.png", lambda path: path.symlink_to("gone.png"), r"9\.png is a link to gone\.png"),
        ("dog", lambda path: path.symlink_to("gone"), r"dog is a link to gone"),
        ("cat/8.png", lambda path: os.mkfifo(path), r"8\.png: expected a file, found a pipe"),
    ):
        path = tmp_path / place
        content(path)
        with pytest.raises((ValueError, OSError), match=words):
            ImageFolder(str(tmp_path))
        path.unlink()
    (tmp_path / "cat" / "deeper").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "cat" / "deeper" / "x.png")
    with pytest.raises(ValueError, match=r"deeper/x\.png: .*found one that lies deeper"):
        ImageFolder(str(tmp_path))
