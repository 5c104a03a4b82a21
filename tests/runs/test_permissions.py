"""Who may read and write what a run leaves: the umask decides, and a folder that refuses is told."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import PLAIN, TINY, command
from permissions import NOBODY, ordinary

from scoresde.evaluate.shards import Job, Shards
from scoresde.runs.checkpoint import CheckpointError, latest, load, save

QUICK = (*TINY, *PLAIN, "trainer.images=128", "evaluate_at_end=false")


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Under /tmp itself, because pytest's own folder is closed to others; owned by the ordinary user."""
    path = Path(tempfile.mkdtemp()).resolve()
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    for below in (path, *path.rglob("*")):
        if below.is_dir():
            below.chmod(0o700)
    shutil.rmtree(path)


def keep(folder: Path, step: int) -> Path:
    return save(folder, step, {"weights": {"w": torch.full((3,), float(step))}}, {"config": {"seed": 0}}, keep_last=3)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o007, 0o077, 0o000], ids=oct)
def test_checkpoints_and_batches_have_the_modes_of_the_umask(mask: int, tmp_path: Path) -> None:
    """Whatever the libraries that write them choose: 0666 for files and 0777 for folders, less the umask."""

    def batch(index: int) -> Iterator[dict[str, torch.Tensor]]:
        yield {"x": torch.zeros(2)}

    with umask(mask):
        keep(tmp_path / "checkpoints", 1)
        Shards(tmp_path / "batches", {"a": 1}).work(Job("job", 1, 1, batch, list))
    found = modes(tmp_path)
    assert len(found) == 9
    for name, mode in found.items():
        whole = 0o777 if (tmp_path / name).is_dir() else 0o666
        assert oct(mode) == oct(whole & ~mask), name


@pytest.mark.parametrize("mask", [0o007, 0o077], ids=oct)
def test_a_run_has_the_modes_of_the_umask(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        done = command("train", *QUICK, "out=run", cwd=tmp_path)
    assert done.code == 0, done.err
    for name, mode in modes(tmp_path / "run").items():
        assert not mode & mask, f"{name} is {oct(mode)}"
        assert mode & 0o600 == 0o600


def test_a_folder_that_may_not_be_written_is_told(folder: Path) -> None:
    """With its name; what was there before is as it was, and nothing half is left."""
    with ordinary():
        keep(folder, 1)
        folder.chmod(0o555)
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*Permission denied"):
            keep(folder, 2)
        found = latest(folder)
        assert found is not None and found.step == 1 and [path.name for path in folder.iterdir()] == ["step-00000001"]
        folder.chmod(0o755)
        assert load(keep(folder, 2)).step == 2


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "manifest.json", "."])
def test_what_may_not_be_read_is_passed_over(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ordinary():
        keep(folder, 1)
        (keep(folder, 2) / name).chmod(0)
        with caplog.at_level(logging.WARNING):
            found = latest(folder)
        assert found is not None and found.step == 1
        assert len(caplog.records) == 1 and "Permission denied" in caplog.text and "step-00000002" in caplog.text
        with pytest.raises(CheckpointError, match="Permission denied"):
            load(folder / "step-00000002")


def test_a_shared_folder_keeps_its_group(folder: Path) -> None:
    """Group-writable with the set-group-ID bit: checkpoints of one member can be read by all others, and replaced."""
    folder.chmod(0o2775)
    with umask(0o002):
        path = keep(folder, 1)
    assert all(file.stat().st_gid == folder.stat().st_gid for file in (path, *path.iterdir()))
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o664 for file in path.iterdir())
    with ordinary():  # another member
        found = latest(folder)
        assert found is not None and found.step == 1 and keep(folder, 2).name == "step-00000002"


@pytest.mark.parametrize("out", ["closed/run", "closed"])
def test_a_command_says_where_it_may_not_write(out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o555)
    monkeypatch.setenv("HOME", str(folder))
    with ordinary():
        done = command("train", *QUICK, f"out={folder}/{out}", cwd=folder)
    assert done.code == 1 and "Traceback" not in done.err, done.err
    assert "Permission denied" in done.err.splitlines()[-1] and "closed" in done.err.splitlines()[-1]
    assert list((folder / "closed").iterdir()) == []
