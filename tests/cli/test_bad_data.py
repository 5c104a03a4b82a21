"""Data that is not what it was said to be is refused by the command before the first step, and no folder is left.

What the readers refuse in detail is in test_data.py; here the whole way is taken, and the message must hold the file,
what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command
from permissions import ordinary
from PIL import Image

from scoresde.data import Arrays, EpochOrder

rng = np.random.default_rng(0)
BYTES = rng.integers(0, 256, (96, 8, 8, 3), np.uint8)  # (N, H, W, C)
BYTES[0, 0, 0] = 0, 0, 255
UNIT = (BYTES / 255).transpose(0, 3, 1, 2)
VECTORS = rng.uniform(-1, 1, (96, 2))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


def poisoned(value: float) -> np.ndarray:
    values = UNIT.copy()
    values[5, 1, 2, 3] = value
    return values


# what is stored, further overrides, words of the message
CASES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "bytes as float": (
        BYTES.astype(np.float32).transpose(0, 3, 1, 2), ("data.raw_low=0", "data.raw_high=1"), ("0 … 255",),
    ),
    "bytes as float in -1 … 1": (
        BYTES[..., 0].astype(float)[:, None], ("data.raw_low=-1", "data.raw_high=1"), ("255",),
    ),
    "0 … 1 declared as -1 … 1": (UNIT, ("data.raw_low=-1", "data.raw_high=1"), ("0 … 1", "one half", "-1 … 1")),
    "-1 … 1 declared as 0 … 1": (2 * UNIT - 1, ("data.raw_low=0", "data.raw_high=1"), ("-1 … 1", "raw_low=0")),
    "0 … 15 declared as bytes": (BYTES[..., :1].transpose(0, 3, 1, 2) // 16, (), ("0 … 15", "0 … 255", "levels")),
    "no range": (UNIT, (), ("raw_low and raw_high", "0 … 1")),
    "one NaN pixel": (poisoned(np.nan), ("data.raw_low=0", "data.raw_high=1"), ("finite", "1 NaN", "18432")),
    "one infinite pixel": (poisoned(np.inf), ("data.raw_low=0", "data.raw_high=1"), ("finite", "1 NaN or infinite")),
    "channels last": (BYTES, (), ("(8, 8, 3)", "(H, W, C)", "channels_last=True")),
    "channels first, said to be last": (
        BYTES.transpose(0, 3, 1, 2), ("data.channels_last=true",), ("(3, 8, 8)", "already"),
    ),
    "empty": (BYTES[:0], (), ("at least one sample", "(0, 8, 8, 3)")),
    "one sample": (VECTORS[:1], ("data.raw_low=-1", "data.raw_high=1"), ("at least 1", "one half")),
    "batch larger than the set": (
        VECTORS[:40], ("data.raw_low=-1", "data.raw_high=1"), ("fewer than trainer.batch_size=64", "at most"),
    ),
    "complex": (VECTORS * 1j, (), ("complex128", "real floats")),
    "truth values": (VECTORS > 0, (), ("bool", "levels=2")),
    "objects": (np.array([[None, 1], [2, "x"]], object), (), ("object", "numbers")),
    "text": (np.array([["a", "b"]]), (), ("<U1", "integers or real floats")),
    "dates": (np.array([["2020-01-01"]], "datetime64[D]"), (), ("datetime64", "integers or real floats")),
    "half of it": (lambda content: content[: len(content) // 2], (), ("damaged",)),
    "nothing": (lambda content: b"", (), ("0 bytes",)),
    "Git LFS pointer": (lambda content: POINTER, (), ("git lfs pull",)),
    "something else": (lambda content: b"x" * 1000, (), ("damaged or other",)),
}  # fmt: skip
LABELS: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
    "negative": (np.arange(96) % 3 - 1, ("integers ≥ 0", "minimum -1")),
    "floats": (np.zeros(96), ("integers", "float64")),
    "NaN": (np.full(96, np.nan), ("integers", "float64")),
    "too few": (np.zeros(95, int), ("(96,)", "(95,)")),
    "one-hot": (np.eye(96, dtype=int), ("(96,)", "(96, 96)")),
    "with a gap of 10^9": (np.r_[np.zeros(95, int), 10**9], ("0, 1, 2 …", "1000000000", "without gaps")),
}


def refused(cwd: Path, *overrides: str) -> str:
    """The message; nothing was trained or written."""
    before = {path.relative_to(cwd) for path in cwd.rglob("*")}
    plain = [word for word in TINY if not word.startswith("data")]
    done = command("train", *plain, *PLAIN, "trainer.images=64", "evaluate_at_end=false", *overrides, cwd=cwd)
    last = (done.err.strip().splitlines() or [""])[-1]
    assert done.code == 1 and last.startswith("error: ") and "Traceback" not in done.err, done.err
    assert "Training" not in done.out and {path.relative_to(cwd) for path in cwd.rglob("*")} == before
    return last


@pytest.mark.parametrize("case", CASES)
def test_bad_arrays_end_the_command(case: str, tmp_path: Path) -> None:
    values, overrides, words = CASES[case]
    path = tmp_path / "data.npy"
    damage: Callable[[bytes], bytes] | None = values if callable(values) else None
    np.save(path, BYTES if damage else values, allow_pickle=True)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    message = refused(tmp_path, "data=arrays", f"data.path={path}", "data.test_fraction=0.25", *overrides)
    named = case not in ("one sample", "batch larger than the set")  # these are of the split, not of the file
    assert (str(path) in message or not named) and ("data" in message or "batch" in message)
    found = [word for word in words if word in message]
    assert found == list(words) or (case == "one sample" and found), message


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels_end_the_command(kind: str, tmp_path: Path) -> None:
    labels, words = LABELS[kind]
    path = tmp_path / "data.npz"
    np.savez(path, x=VECTORS, y=labels)
    message = refused(
        tmp_path, "data=arrays", f"data.path={path}", "data.key=x", "data.label_key=y", "data.raw_low=-1",
        "data.raw_high=1", "conditional=true",
    )  # fmt: skip
    assert all(word in message for word in [str(path), "y", *words]), message


def test_missing_and_unreadable_files_end_the_command(tmp_path: Path) -> None:
    assert "nowhere.npy" in refused(tmp_path, "data=arrays", "data.path=nowhere.npy")
    assert str(tmp_path) in refused(tmp_path, "data=arrays", f"data.path={tmp_path}")
    np.save(tmp_path / "data.npy", VECTORS)
    (tmp_path / "data.npy").chmod(0)
    with pytest.raises((OSError, ValueError), match=r"[Pp]ermission.*data\.npy|data\.npy.*[Pp]ermission"), ordinary():
        Arrays(str(tmp_path / "data.npy"), raw_low=-1, raw_high=1)
    assert "mnist" in refused(tmp_path, "data=mnist", f"data.path={tmp_path / 'mnist'}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("grey among colours", "mode L"), ("another size", "6 × 5"), ("cut", "damaged"), ("pointer", "git lfs pull")],
)
def test_bad_pictures_end_the_command(kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(BYTES[i]).save(tmp_path / "images" / f"{i}.png")
    path = tmp_path / "images" / "7.png"
    if kind == "grey among colours":
        Image.fromarray(BYTES[7, ..., 0]).save(path)
    elif kind == "another size":
        Image.fromarray(BYTES[7, :5, :6]).save(path)
    else:
        path.write_bytes(POINTER if kind == "pointer" else path.read_bytes()[:50])
    message = refused(tmp_path, "data=image_folder", f"data.path={path.parent}")
    assert "7.png" in message and words in message, message


def test_what_is_right_is_not_refused(tmp_path: Path) -> None:
    """Doubles become float32; uint8 fills its range; the whole declared range may be used, but for one half."""
    np.save(tmp_path / "x.npy", 2 * UNIT - 1)
    data = Arrays(str(tmp_path / "x.npy"), raw_low=-1, raw_high=1)
    assert data.train.raw.dtype == torch.float32 and data.event_shape == (3, 8, 8)
    np.save(tmp_path / "b.npy", BYTES)
    assert Arrays(str(tmp_path / "b.npy"), channels_last=True).train.raw.dtype == torch.uint8


@pytest.mark.parametrize("drop_last", [True, False])
def test_no_batch_is_empty(drop_last: bool) -> None:
    """Also where the samples are a multiple of the batch: the last batch of an epoch is whole, and the next begins."""
    order = EpochOrder(12, 4, 0, drop_last=drop_last)
    sizes = [len(order.next()) for _ in range(9)]
    assert sizes == [4] * 9
