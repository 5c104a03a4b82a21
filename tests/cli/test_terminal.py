"""A terminal that is gone, full, closed or not UTF-8 costs nothing but what it would have shown."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import PLAIN, TINY

import scoresde
from scoresde.runs.redact import Stream, guard


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # as they were, whatever guards them in a test
    monkeypatch.setattr(sys, "stderr", sys.stderr)


def test_what_cannot_be_shown_is_written_around() -> None:
    shown = io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True)
    guard()
    Stream(shown).write("1.2 ± 0.3 … größe 图 \udcff")
    assert shown.buffer.getvalue().decode() == "1.2 +- 0.3 ... gr\\xf6\\xdfe \\u56fe \\udcff"  # type: ignore[attr-defined]


def test_a_stream_that_is_lost_takes_everything() -> None:
    full = Stream(open("/dev/full", "w"))  # noqa: SIM115
    read, write = os.pipe()
    os.close(read)
    pipe, closed, none = Stream(os.fdopen(write, "w")), Stream(io.StringIO()), Stream(None)
    closed._stream.close()
    for stream, lost in ((full, True), (pipe, False), (closed, True), (none, False)):
        for _ in range(2):
            assert stream.write("x" * 100_000) == 100_000
            stream.flush()
        assert stream.lost is lost and not stream.isatty()


def test_a_run_is_whole_without_a_terminal(tmp_path: Path) -> None:
    """Standard output is full and ASCII, standard error closed; what only prints fails, and says so by its status."""
    words = " ".join([*TINY, *PLAIN, "trainer.images=64", "out=run"])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(scoresde.__file__).parents[1])}
    for line, code in ((f"train {words} >/dev/full 2>&-", 0), ("runs . >/dev/full", 1), ("runs . | head -c 1", 0)):
        shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m scoresde.cli.{line}"]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert {"summary.json", "samples.npz", "summary.md"} <= {path.name for path in (tmp_path / "run").iterdir()}
