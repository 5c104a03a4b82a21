"""scoresde-runs: every state told from files alone, whatever they look like, in a table that fits the window."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import process

from scoresde.cli.runs import arrange, describe, main
from scoresde.runs.files import find, newest_checkpoint, read
from scoresde.runs.listing import differing, fit, layout
from scoresde.sweep.page import page

CONFIG = """# scoresde: scoresde-train
seed: {seed}
evaluate_at_end: {evaluate}
sde: {{_target_: scoresde.{sde}, {argument}}}
optim: {{lr: {lr}}}
trainer: {{images: 640}}
"""


def make(
    folder: Path, *, images: int = 640, seed: int = 0, sde: str = "VPSDE", argument: str = "beta_max: 20.0",
    lr: float | str = 1e-3, evaluate: bool = True, final: bool = False, checkpoint: int | None = None,
    **records: Any,
) -> Path:  # fmt: skip
    """A run folder as training leaves it; `records` are its JSON files."""
    folder.mkdir(parents=True)
    text = CONFIG.format(seed=seed, sde=sde, argument=argument, lr=lr, evaluate=str(evaluate).lower())
    (folder / "config.yaml").write_text(text)
    rows = [{"header": {}, "step": 0}, {"step": 5, "images": 320, "train/loss": 9.0, "eval/loss": 7.5}]
    rows.append({"step": images // 64, "images": images, "train/loss": 8.0})
    if final:
        rows.append({"step": images // 64, "images": images, "eval/loss": 6.25, "final": 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint is not None:
        saved = folder / "checkpoints" / f"step-{checkpoint:08d}"
        saved.mkdir(parents=True)
        (saved / "weights.safetensors").write_bytes(b"12345678")
        (saved / "manifest.json").write_text(json.dumps({"files": {"weights.safetensors": {"bytes": 8}}}))
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def summary(bits: float, images: int = 640) -> dict[str, Any]:
    return {"step": images // 64, "images": images, "loss": 6.5, "bits_per_dim": {"mean": bits, "stderr": 0.01}}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A run whose lock another process would hold: another open file of the same path is as good to flock."""
    folder = make(tmp_path / "held", checkpoint=5, failed={"reason": "an older failure"})
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write('{"pid": 4242, "host": "node7", "started": 0}')
        file.flush()
        yield folder


def test_a_run_is_running_while_its_lock_is_held_and_not_longer(held: Path) -> None:
    assert (read(held).state, read(held).reason) == ("running", "process 4242 on node7")
    left = make(held.parent / "left", checkpoint=5)
    (left / ".lock").write_text('{"pid": 4242, "host": "node7"}')  # its process was killed
    assert (read(left).state, read(left).reason) == ("resumable", "at step 5")


@pytest.mark.parametrize(
    ("given", "state", "reason"),
    [
        ({"summary": summary(1.5)}, "finished", ""),
        ({"summary": summary(1.5, 320), "images": 320, "checkpoint": 5}, "resumable", "at step 5"),  # made longer since
        ({"evaluate": False, "final": True, "checkpoint": 10}, "finished", ""),
        ({"evaluate": False, "final": False, "checkpoint": 10}, "resumable", "at step 10"),
        ({"evaluate": False, "final": True, "images": 320, "checkpoint": 5}, "resumable", "at step 5"),
        ({"evaluate": True, "final": True, "checkpoint": 10}, "resumable", "at step 10"),
        ({}, "empty", ""),
        ({"failed": {"reason": "TrainingDiverged: nan", "step": 7}}, "failed", "TrainingDiverged: nan"),
        ({"failed": {"reason": "full disk"}, "checkpoint": 5}, "failed", "full disk; resumable at step 5"),
        ({"job": {"status": "failed", "error": "no data"}}, "failed", "no data"),
        ({"job": {"status": "running", "host": "elsewhere", "pid": 1}}, "failed", "ended without a word"),
        ({"job": {"status": "stopped"}, "checkpoint": 5}, "resumable", "at step 5"),
        ({"job": {"status": "running", "host": os.uname().nodename, "pid": os.getpid()}}, "running",
         "process of this test"),
        ({"job": {"status": "failed", "error": "x"}, "summary": summary(1.5)}, "failed", "x"),
    ],
)  # fmt: skip
def test_the_state_of_a_run(tmp_path: Path, given: dict[str, Any], state: str, reason: str) -> None:
    folder = make(tmp_path / "run", **given)
    if "job" in given and "summary" in given:  # the job's record is the newer one
        os.utime(folder / "summary.json", (0, 0))
    run = read(folder)
    assert (run.state, run.reason) == (state, reason.replace("of this test", str(os.getpid())))


def test_a_checkpoint_counts_if_its_files_are_all_there_with_their_sizes(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", checkpoint=5)
    newer = folder / "checkpoints" / "step-00000009"
    newer.mkdir()
    assert newest_checkpoint(folder) == 5
    (newer / "manifest.json").write_text('{"files": {"weights.safetensors": {"bytes": 8}}}')
    (newer / "weights.safetensors").write_bytes(b"1234567")  # cut by one byte
    assert newest_checkpoint(folder) == 5
    (newer / "weights.safetensors").write_bytes(b"12345678")
    assert newest_checkpoint(folder) == 9


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "job.json", "failed.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe\x00garbage", b"{", b"[" * 100_000, b'["a", 1, null]', b"a: &a [*a]", b"null", b"\n\n}{\n{}\n",
        b'{"a": ' * 60 + b"1" + b"}" * 60,
    ],
)  # fmt: skip
def test_damaged_files_are_named_and_nothing_is_raised(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever is in one file, the others are still read."""
    folder = make(tmp_path / "run", checkpoint=5, summary=summary(1.5), job={"overrides": ["seed=0"]})
    (folder / name).write_bytes(content)
    run = read(folder)
    harmless = content in (b"", b"a: &a [*a]", b"null") or content.startswith(b'{"a"')
    damaged = not harmless or name.endswith(".json")
    if name == "metrics.jsonl" and content.count(b"\n") == 0:
        damaged = False  # one line without an end is a line that is being written
    if name == "config.yaml" and content == b"":
        damaged = True  # no mapping
    assert (name in run.reason) == damaged or name == "config.yaml"
    assert run.bits == (None if name == "summary.json" else 1.5)
    text = describe([run], tmp_path)
    assert page([run], title="t", base=tmp_path)
    assert text.splitlines()[-1].startswith("run") and "Traceback" not in text


BIG, LAUGHS = (
    "9" * 400,
    "a: &a [1]\n" + "".join(f"b{n}: &b{n} [*{a}, *{a}]\n" for n, a in enumerate(["a", *[f"b{n}" for n in range(40)]])),
)


# rows, and a summary, of other types and sizes than a run writes
_ROWS = '[1]\n"a"\n{"step": "a", "images": null, "eval/loss": {}}\n'
_SUMMARY = f'{{"images": {BIG}, "step": {BIG}, "bits_per_dim": {{"mean": {BIG}}}}}'


def odd_folders(root: Path) -> dict[str, str]:
    """Folders that look like runs and are not, with the file that `reason` names; ""  where the run is only odd."""
    files: dict[str, tuple[str, str | None, str]] = {
        "row of 400 digits": ("metrics.jsonl", f'{{"step": 1, "images": {BIG}, "eval/loss": {BIG}}}\n', ""),
        "rows of another type": ("metrics.jsonl", _ROWS, "metrics.jsonl"),
        "summary of 400 digits": ("summary.json", _SUMMARY, ""),
        "a number of 5000 digits": ("summary.json", f'{{"images": {"9" * 5000}}}', "summary.json"),
        "a job of 400 digits": ("job.json", f'{{"status": "running", "pid": {BIG}, "overrides": [{BIG}, [[1]]]}}', ""),
        "a lock of 400 digits": (".lock", f'{{"pid": {BIG}}}', ""),
        "a deep job": ("job.json", '{"overrides": [' + "[" * 400 + "]" * 400 + "]}", "job.json"),
        "aliases without end": ("config.yaml", f"# scoresde: x\n{LAUGHS}", "config.yaml"),
        "a deep configuration": ("config.yaml", "# scoresde: x\na: " + "[" * 90 + "]" * 90, "config.yaml"),
        "a long hexadecimal": ("config.yaml", f"# scoresde: x\nseed: 0x{'f' * 9000}", "config.yaml"),
        "a huge configuration": ("config.yaml", f"# scoresde: x\na: {'x' * 300_000}", "config.yaml"),
        "odd text": ("failed.json", json.dumps({"reason": "\ud800\x1b[31m\n" * 3}), ""),
    }  # fmt: skip
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "job.json", "failed.json", ".lock"):
        files[f"a pipe as {name}"] = (name, None, "" if name == ".lock" else name)
    for folder, (name, content, _) in files.items():
        path = make(root / folder) / name
        path.unlink(missing_ok=True)
        os.mkfifo(path) if content is None else path.write_text(content)
    (make(root / "a deep manifest", checkpoint=1) / "checkpoints/step-00000001/manifest.json").write_text("[" * 100_000)
    manifest = make(root / "a pipe as manifest", checkpoint=1) / "checkpoints/step-00000001/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    return {folder: named for folder, (_, _, named) in files.items()} | {
        "a deep manifest": "",
        "a pipe as manifest": "",
    }


def test_no_folder_hides_another(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Numbers without end, aliases without end, pipes and deep nesting: each is one line of the table."""
    odd = odd_folders(tmp_path / "runs")
    make(tmp_path / "runs" / "right", summary=summary(1.5))
    for words in ([], ["--json"], ["--html", str(tmp_path / "page.html")], ["--sort", "seed"]):
        monkeypatch.setattr("sys.argv", ["scoresde-runs", str(tmp_path / "runs"), *words])
        main()
        shown = capsys.readouterr().out
        assert all(name in shown for name in [*odd, "right"]) and "1.5" in shown
    for folder, named in odd.items():
        reason = read(tmp_path / "runs" / folder).reason
        assert named in reason and ("damaged" in reason) == bool(named), folder


def test_whatever_reading_one_run_raises_is_its_reason(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(folder: Path) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr("scoresde.runs.files._read", broken)
    assert "damaged: MemoryError('no room')" in read(tmp_path).reason


def test_numbers_come_from_the_files_that_hold_them(tmp_path: Path) -> None:
    run = read(make(tmp_path / "a", summary=summary(1.5), final=True))
    assert (run.bits, run.stderr, run.loss, run.step, run.images, run.goal) == (1.5, 0.01, 6.25, 10, 640, 640)
    run = read(make(tmp_path / "b", images=448))
    assert (run.bits, run.loss, run.step, run.images) == (None, 7.5, 7, 448)


def test_runs_are_found_below_a_folder_in_natural_order(tmp_path: Path) -> None:
    for name in ("s/10", "s/2", "deep/er/run", "s/2/checkpoints/inner", "s/2/wandb/inner"):
        make(tmp_path / name)
    (tmp_path / "s" / "2" / "sample").mkdir()
    (tmp_path / "s" / "2" / "sample" / ".lock").touch()  # samples are drawn there
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("model: theirs")
    (tmp_path / "s" / "multirun.yaml").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in find(tmp_path)] == ["deep/er/run", "s/2", "s/10"]
    assert list(find(tmp_path / "s" / "2")) == [tmp_path / "s" / "2"]


def test_what_differs_is_a_column_and_what_does_not_is_said_once() -> None:
    """Arguments of two classes are no difference of their own; those of one class are."""
    vp, ve = {"sde": "VPSDE", "sde.beta_max": 20.0, "seed": 0}, {"sde": "VESDE", "sde.sigma_max": 50.0, "seed": 0}
    assert differing([vp, ve]) == (["sde"], {"seed": 0})
    assert differing([vp, vp | {"sde.beta_max": 10.0}, ve]) == (["sde", "sde.beta_max"], {"seed": 0})
    assert differing([vp, {}, vp]) == ([], vp)
    assert differing([{"a": 1}, {"b": 2}])[0] == ["a", "b"]
    assert differing([]) == ([], {})


def test_the_table_says_what_differs_and_sorts(tmp_path: Path) -> None:
    runs = [
        read(make(tmp_path / "a", seed=10, summary=summary(1.75))),
        read(make(tmp_path / "b", seed=9, sde="VESDE", argument="sigma_max: 50.0", summary=summary(1.25))),
        read(make(tmp_path / "c", seed=11)),
    ]
    text = describe(runs, tmp_path)
    lines = text.splitlines()
    assert lines[0] == f"3 runs below {tmp_path}: 2 finished, 1 empty"
    assert "evaluate_at_end=True" in lines[1] and "seed" not in lines[1]
    head, _, *body = (line.split() for line in lines[-5:])
    assert head == ["run", "seed", "sde", "step", "images", "bits/dim", "loss", "state"]
    assert body[0] == ["a", "10", "VPSDE", "10", "640", "1.7500", "±", "0.0100", "7.5", "finished"]
    assert [run.folder.name for run in arrange(runs, "bits/dim")] == ["b", "a", "c"]
    assert [run.folder.name for run in arrange(runs, "seed")] == ["b", "a", "c"]  # 9 before 10
    assert [run.folder.name for run in arrange(runs, "sde")] == ["b", "a", "c"]
    with pytest.raises(ValueError, match="no run has 'sed'"):
        arrange(runs, "sed")


def test_jobs_of_one_sweep_are_told_apart_by_their_overrides(tmp_path: Path) -> None:
    """A resumed job, another device and a job that was refused before it had a configuration change nothing."""
    jobs = [["sde=vp", "out=s"], ["sde=ve", "out=s", "resume=auto", "device=cpu"]]
    runs = [read(make(tmp_path / str(i), job={"status": "finished", "overrides": o})) for i, o in enumerate(jobs)]
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "job.json").write_text('{"status": "failed", "error": "no", "overrides": ["sde=vq"]}')
    lines = describe([*runs, read(tmp_path / "2")], tmp_path).splitlines()
    assert lines[-5].split()[:3] == ["run", "sde", "step"]
    assert [line.split()[1] for line in lines[-3:]] == ["vp", "ve", "vq"]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_is_wider_than_the_window(tmp_path: Path, width: int) -> None:
    """Twelve differing keys, a long folder and an error of 3,000 characters; what was left out is named."""
    runs = []
    for i in range(3):
        run = read(make(tmp_path / ("long" * 30) / str(i), failed={"reason": f"reason {i} " + "x y " * 750}))
        run.config |= {f"group.{'k' * j}": f"{i}" * 40 for j in range(1, 13)}
        runs.append(run)
    lines = describe(runs, tmp_path, width=width).splitlines()
    assert max(map(len, lines[1:])) <= width
    assert any(line.startswith("also different: ") for line in lines)
    assert all(f"reason {i}" in lines[i - 3] and lines[i - 3].split()[0].endswith(f"/{i}") for i in range(3))


def test_long_cells_lose_their_middle() -> None:
    assert fit("abcdefghij", 10) == "abcdefghij" and fit("abcdefghijk", 10) == "abcde…hijk"
    assert fit("a\n\x1b[31mb\tc", 20) == "a [31mb c"  # no control character reaches the terminal
    assert layout({"run": ["a"], "k": ["1"], "state": ["x"]}, 80) == ("run  k  state\n─────────────\na    1  x", [])


def test_a_table_that_is_not_for_a_terminal_is_plain_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No name, value or reason is cut, no column left out; markup and colours mean nothing, even where forced."""
    name, reason = "long" * 40, "[bold]reason[/bold] " + "x y " * 200
    for i in range(2):
        make(tmp_path / name / f"{i}", lr=f"1e-{i}", failed={"reason": reason})
    monkeypatch.setattr(sys, "argv", ["scoresde-runs", str(tmp_path)])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == [f"{name}/0", f"{name}/1"]
    assert all(line.endswith(f"failed: {' '.join(reason.split())}") for line in lines[-2:])
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_json_has_everything_and_is_json(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = make(tmp_path / "a", lr=".nan", summary=summary(float("nan")), final=True)
    monkeypatch.setattr(sys, "argv", ["scoresde-runs", str(tmp_path), "--json"])
    main()
    (found,) = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["folder"] == str(folder) and found["state"] == "finished" and found["loss"] == 6.25
    assert found["bits"] is None and found["config"]["optim.lr"] is None and found["config"]["sde"] == "VPSDE"


def test_the_command_needs_neither_torch_nor_hydra(tmp_path: Path) -> None:
    """Its own process, its table, and none of the packages that take seconds to import."""
    make(tmp_path / "a", summary=summary(1.5))
    (tmp_path / "a" / ".lock").write_text("{}")  # asking who holds it is part of the work
    code = (
        "import sys; sys.argv = ['scoresde-runs', sys.argv[1]]; from scoresde.cli.runs import main; main(); "
        "heavy = {'torch', 'numpy', 'hydra', 'omegaconf', 'scipy', 'wandb'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1.5000 ± 0.0100" in done.stdout


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    running = process("runs", "nowhere", cwd=tmp_path)
    out, err = running.communicate(timeout=600)
    assert running.returncode == 2 and "nowhere is no folder" in err and not out
