"""Checkpoints: every bit comes back, a save that fails anywhere costs nothing, and what was damaged is never used."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forgery import sign
from torch import Tensor, nn

from scoresde import VPSDE, DenoisingLoss, Eps, Preconditioned, Rng
from scoresde.codecs import Scaling
from scoresde.data import Dataset, EpochOrder, Split
from scoresde.runs.checkpoint import Checkpoint, CheckpointError, latest, load, save
from scoresde.train.ema import EMA
from scoresde.train.state import TrainingState

RECORDS: dict[str, Any] = {"counters": {"step": 7, "images": 448}, "config": {"lr": 1e-3, "name": "ünï", "none": None}}


def groups(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Every dtype that weights, averages, moments and generators have; scalars, empty and strided tensors, NaN."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=g)
    return {
        "weights": {
            "float32": weight,
            "tied": weight,
            "strided": torch.randn(4, 6, generator=g).mT[::2],
            "bfloat16": torch.randn(7, generator=g).bfloat16(),
            "float16": torch.randn(7, generator=g).half(),
            "odd values": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        },
        "optimizer": {"net.weight/step": torch.tensor(3.0), "net.weight/exp_avg": torch.zeros(0, 3)},
        "random": {
            "noise": torch.Generator().manual_seed(seed).get_state(),
            "stats": torch.randn(5, generator=g, dtype=torch.float64),
            "int64": torch.tensor([2**62, -1]),
            "bool": torch.tensor([True, False]),
        },
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


def content(tensors: dict[str, dict[str, Tensor]], records: dict[str, Any]) -> Any:
    return {name: {k: bits(v) for k, v in group.items()} for name, group in tensors.items()}, records


def content_of(checkpoint: Checkpoint | None) -> Any:
    assert checkpoint is not None
    return content(checkpoint.tensors, checkpoint.records)


def test_every_bit_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 7, groups(), RECORDS)
    assert path.name == "step-00000007"
    back = load(path)
    assert content_of(back) == content(groups(), RECORDS)
    assert (back.step, back.path) == (7, path)
    assert content_of(latest(path.parent)) == content_of(back)


def test_what_was_loaded_does_not_depend_on_the_file(tmp_path: Path) -> None:
    """Tensors that only map the file would change, or end the process, when it is cut or taken away."""
    back = load(save(tmp_path, 7, groups(), RECORDS))
    for path in back.path.iterdir():
        path.write_bytes(b"")
    assert content_of(back) == content(groups(), RECORDS)


def test_latest_is_the_largest_step_and_none_where_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None and latest(tmp_path) is None
    for step in (2, 10, 123_456_789):  # the last has more digits than the name is padded to
        save(tmp_path, step, groups(step), {}, keep_last=3)
    newest = latest(tmp_path)
    assert newest is not None and newest.step == 123_456_789


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_last_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes").mkdir()
    for step in range(1, 6):
        save(tmp_path, step, groups(step), {}, keep_last=keep)
        expected = {f"step-{s:08d}" for s in range(max(1, step - keep + 1), step + 1)}
        assert {p.name for p in tmp_path.iterdir()} == {"notes", *expected}


def test_keep_last_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is a whole number of at least 1; got 0"):
        save(tmp_path, 1, groups(), {}, keep_last=0)
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """Stands for SIGKILL: no `except` of a save may see it, so whatever is on disk then stays there."""


class Saboteur:
    """Lets the first `calls` calls that change the disk pass and fails the next one half-way."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int, error: BaseException):
        self.left, self.error = calls, error
        patch.setattr(os, "rename", self.guard(os.rename))
        patch.setattr(os, "fsync", self.guard(os.fsync))
        patch.setattr(Path, "mkdir", self.guard(Path.mkdir))
        patch.setattr(Path, "write_text", self.guard(Path.write_text, self.cut))
        patch.setattr(safetensors.torch, "save_file", self.guard(safetensors.torch.save_file, lambda _, p: self.cut(p)))
        if isinstance(error, Killed):  # removals that fail with an OSError are allowed to: nothing depends on them
            patch.setattr(shutil, "rmtree", self.guard(shutil.rmtree, lambda p, **_: self.cut(next(p.iterdir()))))

    @staticmethod
    def cut(path: Path, *_: Any, **__: Any) -> None:
        path.touch()
        os.truncate(path, path.stat().st_size // 2)

    def guard(self, real: Callable[..., Any], damage: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left != -1:
                return real(*args, **kwargs)
            if damage is not None:
                damage(*args, **kwargs)
            raise self.error

        return call


def failures(tmp_path: Path, error: BaseException, prepare: Callable[[Path], None]) -> Iterator[tuple[Path, bool]]:
    """(folder, whether the save got through) of one save of step 2 for each call it can fail at."""
    for calls in range(1000):
        folder = tmp_path / str(calls)
        prepare(folder)
        with pytest.MonkeyPatch.context() as patch:
            saboteur = Saboteur(patch, calls, error)
            try:
                save(folder, 2, groups(2), {"n": 2}, keep_last=1)
            except (CheckpointError, Killed) as raised:
                assert isinstance(error, Killed) == isinstance(raised, Killed)
                if isinstance(raised, CheckpointError):
                    assert "No space left" in str(raised) and "MiB are free" in str(raised)
        if saboteur.left >= 0:
            assert calls > 10  # files, syncs and renames were all counted
            return
        yield folder, folder.joinpath("step-00000002").exists()
    raise AssertionError("no end of calls")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()], ids=["full", "killed"])
def test_a_save_that_fails_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, error: BaseException) -> None:
    """At whatever call it ends, the newest whole one is the previous or the new, bit for bit; the next save cleans."""
    published = 0
    for folder, done in failures(tmp_path, error, lambda folder: save(folder, 1, groups(1), {"n": 1}) and None):
        published += done
        step = 2 if done else 1
        assert content_of(latest(folder)) == content(groups(step), {"n": step})
        save(folder, 3, groups(3), {"n": 3}, keep_last=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert published >= 1  # the last calls come after the rename that publishes


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()], ids=["full", "killed"])
def test_replacing_a_damaged_one_costs_no_whole_one(tmp_path: Path, error: BaseException) -> None:
    """Training came past a damaged step again: until its successor is whole, the one before remains."""

    def prepare(folder: Path) -> None:
        save(folder, 1, groups(1), {"n": 1})
        (save(folder, 2, groups(0), {"n": 0}) / "random.safetensors").unlink()

    for folder, _ in failures(tmp_path, error, prepare):
        newest = latest(folder)
        assert newest is not None
        assert content_of(newest) == content(groups(newest.step), {"n": newest.step})
        save(folder, 3, groups(3), {"n": 3}, keep_last=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path) -> None:
    """A real write that the system refuses, in the middle of a tensor file."""
    save(tmp_path, 1, groups(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step-00000002 could not be written"):
            save(tmp_path, 2, {"weights": {"w": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert content_of(latest(tmp_path)) == content(groups(1), {})


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


FILES = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "counters.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "emptied", "deleted", "extended"])
def test_a_damaged_file_is_refused_and_the_one_before_taken(tmp_path: Path, caplog, name: str, harm: str) -> None:
    save(tmp_path, 1, groups(1), RECORDS)
    path = save(tmp_path, 2, groups(2), RECORDS) / name
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-1], "emptied": b"", "deleted": b"", "extended": whole + b"}"}[harm])
    if harm == "deleted":
        path.unlink()
    with pytest.raises(CheckpointError, match="step-00000002"):
        load(path.parent)
    with caplog.at_level(logging.WARNING):
        assert content_of(latest(tmp_path)) == content(groups(1), RECORDS)
    assert len(caplog.records) == 1 and name in caplog.text


@pytest.mark.parametrize(
    ("name", "stride"), [("weights.safetensors", 7), ("counters.json", 7), ("manifest.json", 1)], ids=lambda v: str(v)
)
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, name: str, stride: int) -> None:
    """Refused, or the content is the same (white space of the manifest). The manifest is the one file without a
    checksum, so each of its bits is tried."""
    tensors, records = {"weights": {"w": torch.arange(6.0)}}, {"counters": RECORDS["counters"]}
    path = save(tmp_path, 2, tensors, records)
    whole = (path / name).read_bytes()
    refused, places = 0, range(0, 8 * len(whole), stride)
    for place in places:
        flip(path / name, place // 8, bit=place % 8)
        try:
            back = load(path)
        except CheckpointError:
            refused += 1
        else:
            assert name == "manifest.json" and (back.step, content_of(back)) == (2, content(tensors, records))
        (path / name).write_bytes(whole)
    assert refused == len(places) if name != "manifest.json" else refused > 0.9 * len(places)


def test_all_damaged_is_none_not_a_guess(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step, groups(step), {}) / "weights.safetensors", -1)
    assert latest(tmp_path) is None


def test_a_damaged_newer_one_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    """Resumed from 10 because 20 is damaged, with another interval: 15 is written and must stay."""
    save(tmp_path, 10, groups(1), {})
    flip(save(tmp_path, 20, groups(2), {}) / "weights.safetensors", -1)
    save(tmp_path, 15, groups(3), {}, keep_last=1)
    assert content_of(latest(tmp_path)) == content(groups(3), {})
    assert not (tmp_path / "step-00000010").exists()


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save and a load with every pickler broken; and a pickle that the manifest names is not opened."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for module, name in [(pickle, n) for n in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")] + [
        (torch, "save"),
        (torch, "load"),
    ]:
        monkeypatch.setattr(module, name, broken)
    path = save(tmp_path, 1, groups(), RECORDS)
    assert content_of(load(path)) == content(groups(), RECORDS)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("weights.pt", "../outside.json", "/etc/passwd"):
        sign(path, {**manifest, "files": {name: {"bytes": 1, "sha256": "0"}}})
        with pytest.raises(CheckpointError, match="no file of a checkpoint"):
            load(path)


def training(network: nn.Module, samples: int = 64) -> TrainingState:
    loss = DenoisingLoss(Preconditioned(network, VPSDE(), Eps()))
    split = Split(torch.zeros(samples, 2))
    return TrainingState(
        loss,
        torch.optim.AdamW(loss.parameters(), fused=True),
        EMA(loss),
        Dataset("zeros", split, split, Scaling.identity()),
        EpochOrder(samples, 8, 0),
        Rng(0),
    )


class Net(nn.Module):
    def __init__(self, width: int, name: str = "inner"):
        super().__init__()
        self.add_module(name, nn.Linear(2, width))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: training(Net(5)), ("size mismatch", "network.inner.weight", "[4, 2]", "[5, 2]")),
        (lambda: training(Net(4, "outer")), ("network.outer.weight", "network.inner.weight")),
        (lambda: training(Net(4), samples=65), ("n=64", "n=65", "same data")),
    ],
    ids=["another width", "another layer", "other data"],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path, other, words) -> None:
    run = training(Net(4))
    path = save(tmp_path, 0, run.tensors(), run.records())
    with pytest.raises(CheckpointError, match="does not fit this run") as caught:
        other().restore(load(path))
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words)
