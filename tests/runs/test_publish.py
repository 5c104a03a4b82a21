"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import scoresde
from scoresde.runs.checkpoint import save
from scoresde.runs.folder import prepare, write_config
from scoresde.runs.publish import content_of, publish, replacing

# Within a folder that has no name yet, beside the file that is then replaced, and `replacing` itself.
ALLOWED = {"runs/checkpoint.py", "diffusion/grids.py", "runs/publish.py", "kernels/cubin.py", "runs/wandb_logger.py"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    publish(path, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("full")))
            publish(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("killed")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    publish(path, "n€w")
    assert path.read_text(encoding="utf-8") == "n€w"


def test_nothing_in_the_package_is_written_in_place() -> None:
    """Every other file goes through `publish` or `replacing`, so a kill leaves the old one."""
    writes = re.compile(
        r"""write_(text|bytes)\(|open\((?!os\.devnull)[^)]*["'][wxa]b?["']|(savez\w*|savefig|np\.save|torch\.save)\((?!file\b)"""
    )
    root = Path(scoresde.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if writes.search(path.read_text("utf-8"))}
    assert found - ALLOWED - {"runs/logger.py", "sweep/curves.py", "data/readers/pack.py"} == set()
    # the last three append rows, draw into memory, and write the members of an archive that `replacing` holds


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", ".", "absent"):
        with pytest.raises(OSError):
            content_of(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12345")
    assert content_of(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match=r"file has 5 bytes, more than the 4"):
        content_of(tmp_path / "file", 4)


def test_a_run_whose_configuration_was_emptied_goes_on(tmp_path: Path) -> None:
    """As a kill left it before configurations were replaced whole; a folder of others is still refused."""
    config = {"seed": 0}
    (tmp_path / "config.yaml").write_bytes(b"")
    with pytest.raises(ValueError, match="which no run of scoresde made"):
        prepare(tmp_path, config, resume="auto", overwrite=False)
    save(tmp_path / "checkpoints", 3, {"weights": {"w": torch.zeros(1)}}, {"config": config})
    found = prepare(tmp_path, config, resume="auto", overwrite=False)
    assert found is not None and found.step == 3
    write_config(tmp_path, config, "scoresde-train")
    assert (tmp_path / "config.yaml").read_text().startswith("# scoresde")
