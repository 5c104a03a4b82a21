"""Data that stay in their files: the same values, order and noise as in memory, and files that change are noticed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.data import Arrays, ImageFolder, Loader, rows
from scoresde.data.dataset import Split, hold_out
from scoresde.data.order import EpochOrder
from scoresde.data.rows import DataLost, Rows, chunks, extent

VALUES = np.random.default_rng(0).integers(0, 256, (300, 5, 4, 3), dtype=np.uint8)
LABELS = np.arange(300) % 4


def save(path: Path, values: np.ndarray = VALUES, **beside: Any) -> str:
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        np.savez(path, x=values, **beside)
    return str(path)


@pytest.mark.parametrize(
    ("name", "stored", "keywords"),
    [
        ("x.npy", VALUES, {"channels_last": True}),
        ("x.npy", VALUES[..., 0], {"add_channel": True}),
        ("x.npy", VALUES.astype(">i2"), {"levels": 256, "channels_last": True}),
        ("x.npy", VALUES[..., 0].astype(">f8") / 255, {"raw_low": 0, "raw_high": 1}),
        ("x.npz", VALUES.reshape(300, -1), {"key": "x", "label_key": "y"}),
    ],
)
def test_samples_that_stay_in_a_file_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stored: np.ndarray, keywords: dict[str, Any]
) -> None:
    monkeypatch.setattr(rows, "_CHUNK", 300)  # many parts
    path = save(tmp_path / name, stored, y=LABELS, other=np.zeros(3))
    lazy, here = (Arrays(path, **keywords, lazy=lazy) for lazy in (True, False))
    for one, other in ((lazy.train, here.train), (lazy.test, here.test)):
        assert isinstance(one.raw, Rows) and isinstance(other.raw, torch.Tensor)
        assert one.raw.shape == tuple(other.raw.shape) and one.raw.dtype == other.raw.dtype
        assert torch.equal(torch.cat(list(chunks(one.raw))), other.raw) and len(list(chunks(one.raw))) > 1
        for index in (torch.tensor([7, 3, 3, -1]), slice(2, 9, 3), [1, 0], torch.arange(len(one)) % 5 == 0):
            assert torch.equal(one.raw[index], other.raw[index])
        assert torch.equal(one.raw[torch.tensor(3)], other.raw[3]) and extent(one.raw) == extent(other.raw)
        assert torch.equal(pickle.loads(pickle.dumps(one.raw))[:], other.raw)
    # also what a checkpoint compares, so that a run may go on either way
    assert lazy.statistics == here.statistics


def test_what_does_not_fit_is_refused_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK", 300)
    values = VALUES.reshape(300, -1).astype(np.float32)
    values[250, 7] = np.nan
    path = save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=r"x\.npy: raw\[\d+:\] holds 1 NaN"):
        Arrays(path, raw_low=0, raw_high=255, lazy=True)
    with pytest.raises(ValueError, match="outside the declared"):
        Arrays(save(tmp_path / "y.npy", np.nan_to_num(values)), raw_low=0, raw_high=100, lazy=True)
    with pytest.raises(IndexError, match="300 samples"):
        Arrays(save(tmp_path / "z.npy"), lazy=True, channels_last=True).train.raw.rows[torch.tensor([300])]  # type: ignore


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: np.savez_compressed(path, VALUES), "compressed"),
        (lambda path: np.save(path, np.asfortranarray(VALUES)), "in the order of Fortran"),
    ],
)
def test_a_file_that_cannot_be_read_in_place_is_told_the_cure(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / ("x.npz" if "comp" in words else "x.npy")
    make(path)
    with pytest.raises(ValueError, match=f"{path}.*{words}.*np.ascontiguousarray"):
        Arrays(str(path), lazy=True, channels_last=True)
    assert len(Arrays(str(path), channels_last=True).train) == 270  # without being asked it is read whole


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "x.npy"))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"expected 18,000 bytes for the shape .*found 17,999: it is truncated"):
        Arrays(str(path), lazy=True, channels_last=True)


@pytest.mark.parametrize("change", ["shorter", "written", "replaced", "gone"])
def test_a_file_that_changes_under_the_run_is_an_error_and_no_signal(tmp_path: Path, change: str) -> None:
    """A mapped file that is cut ends the process by SIGBUS; these are read."""
    path = Path(save(tmp_path / "x.npy"))
    raw = Arrays(str(path), lazy=True, channels_last=True).train.raw
    again = pickle.loads(pickle.dumps(raw))  # as a worker has it, which opens the file later
    assert len(raw[:]) == 270
    if change == "shorter":
        os.truncate(path, 4000)
    elif change == "written":
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"\0")
    else:
        path.unlink()
        if change == "replaced":
            save(path)
    with pytest.raises(DataLost, match=r"x\.npy: .*(changed since|no longer be opened)"):
        again[:]
    if change in ("shorter", "written"):  # what was opened before is still the file that it was in the other cases
        with pytest.raises(DataLost, match="changed since"):
            raw[:]
    else:
        raw[:]


def test_a_digest_of_too_much_is_of_places_all_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_HASHED", 1 << 10)
    monkeypatch.setattr(rows, "_SPOT", 60)
    monkeypatch.setattr(rows, "_SPOTS", 100)  # of one sample each, so of every third
    path = Path(save(tmp_path / "x.npy"))

    def digest() -> str:
        return Split(Arrays(str(path), lazy=True, channels_last=True, test_path=str(path)).train.raw).digest()

    before = digest()
    assert before.startswith("some:") and digest() == before
    for place in (128, 128 + 151 * 60, path.stat().st_size - 1):  # the first sample, one amid them, the last
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert digest() != before
        before = digest()


def test_holding_out_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Arrays(save(tmp_path / "x.npz", VALUES.reshape(300, -1), y=LABELS), "x", "y", lazy=True)
    monkeypatch.setattr(rows.Stored, "read", None)
    train, test = hold_out(data.train, 0.2, 3)
    assert (len(train), len(test)) == (216, 52) and isinstance(test.raw, Rows)


def order() -> EpochOrder:
    return EpochOrder(300, 32, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_order_and_the_position_is_of_what_was_taken(tmp_path: Path, workers: int) -> None:
    raw = Arrays(save(tmp_path / "x.npy"), lazy=True, channels_last=True, test_path=save(tmp_path / "t.npy")).train.raw
    values, plain, ours = torch.from_numpy(VALUES).movedim(-1, 1), order(), order()
    loader, torch_state = Loader(raw, ours, rank=1, size=2, workers=workers), torch.get_rng_state()
    for step in range(25):  # beyond the end of an epoch
        if step == 12:  # back to where a checkpoint was written, while others are read ahead
            for each in (plain, ours):
                each.load_state_dict({"epoch": 3, "position": 64, "n": 300, "seed": 5})
        index, found = loader.next()
        expected = plain.next()[16:]
        assert torch.equal(index, expected) and torch.equal(found, values[expected])
        assert ours.state_dict() == plain.state_dict()
    loader.close()
    assert torch.equal(torch.get_rng_state(), torch_state)  # dropout draws from there


def test_what_a_worker_cannot_read_is_said_as_it_was(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "x.npy"))
    loader = Loader(Arrays(str(path), lazy=True, channels_last=True).train.raw, EpochOrder(270, 32, 5), workers=1)
    loader.next()
    os.truncate(path, 4000)
    with pytest.raises(DataLost, match=r"^\S+x\.npy: expected the file that was opened, found \w+ one"):
        for _ in range(5):
            loader.next()


def test_pictures_that_stay_in_their_files_are_those_in_memory(tmp_path: Path) -> None:
    for k in range(20):
        (tmp_path / "in" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(VALUES[k]).save(tmp_path / "in" / "ab"[k % 2] / f"{k}.png")
    folder = str(tmp_path / "in")
    lazy, here = (ImageFolder(folder, size=4, lazy=lazy) for lazy in (True, False))
    for one, other in ((lazy.train, here.train), (lazy.test, here.test)):
        assert isinstance(one.raw, Rows) and torch.equal(one.raw[:], other.raw[:])
        assert one.labels is not None and other.labels is not None and torch.equal(one.labels, other.labels)
    assert lazy.class_names == here.class_names and lazy.train.digest().startswith("some:")
    again = pickle.loads(pickle.dumps(lazy.train.raw))
    (tmp_path / "in" / "a" / "0.png").write_bytes(b"text")
    with pytest.raises(DataLost, match=r"0\.png: expected an image"):
        again[:]
    with pytest.raises(ValueError, match=r"0\.png: expected an image"):
        ImageFolder(folder, lazy=True)
    Image.fromarray(VALUES[0]).save(tmp_path / "in" / "a" / "0.png")
    Image.fromarray(VALUES[0, 1:]).save(tmp_path / "in" / "b" / "19.png")
    with pytest.raises(DataLost, match=r"19\.png: expected 4 × 5 pixels"):
        ImageFolder(folder, lazy=True).train.raw[:]


def test_a_data_set_of_arrow_files_is_that_in_memory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Array3D((5, 4, 3), "uint8"), kind=datasets.ClassLabel(names=["a", "b", "c", "d"])
    )
    content = datasets.Dataset.from_dict({"image": VALUES, "kind": LABELS}, features=features)
    content.save_to_disk(tmp_path / "folder")
    (file,) = (tmp_path / "folder").glob("*.arrow")
    keys = {"label_key": "kind", "channels_last": True}
    here = Arrays(save(tmp_path / "x.npz", VALUES, y=LABELS), "x", "y", channels_last=True)
    for path in (tmp_path / "folder", file):
        data = Arrays(str(path), **keys)
        assert data.class_names == ("a", "b", "c", "d")
        for one, other in ((data.train, here.train), (data.test, here.test)):
            assert isinstance(one.raw, Rows) and torch.equal(one.raw[:], other.raw[:])
            assert one.labels is not None and other.labels is not None and torch.equal(one.labels, other.labels)
    again = pickle.loads(pickle.dumps(data.train.raw))
    os.truncate(file, 1000)
    with pytest.raises(DataLost, match="it has changed since"):
        again[:]
    with pytest.raises(ValueError, match=r"\.arrow: expected a data set of the package datasets, found a damaged"):
        Arrays(str(file), **keys)
