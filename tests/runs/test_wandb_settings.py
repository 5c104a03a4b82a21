"""What W&B is told: keys of the logger, W&B's own variables where they say nothing, and what to type afterwards."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from offline import OfflineRun, offline_runs
from wandb_server import Server

from scoresde.runs.logger import RunFacts
from scoresde.runs.wandb_logger import WandbLogger

VARIABLES = {
    "WANDB_PROJECT": "their-project", "WANDB_ENTITY": "their-team", "WANDB_NAME": "their name",
    "WANDB_RUN_GROUP": "their-group", "WANDB_TAGS": "a,b c", "WANDB_NOTES": "their\nnotes", "WANDB_JOB_TYPE": "probe",
}  # fmt: skip


def logged(folder: Path, steps: range = range(1, 4), *, sweep: str | None = None, **keys) -> None:
    """A run of a few rows in `folder`, which is made."""
    folder.mkdir(exist_ok=True)
    logger = WandbLogger(finish_timeout=600, **keys)
    logger.start(RunFacts(folder, "0123456789ab", {"seed": 1}, group=sweep))
    for step in steps:
        logger.log({"train/loss": 1 / step}, step=step, images=8 * step)
    logger.close()


def told(run: OfflineRun) -> tuple:
    return run.project, run.entity, run.name, run.group, run.tags, run.notes, run.job_type, run.id


def test_what_the_command_does_not_say_the_variables_do(tmp_path: Path, monkeypatch) -> None:
    logged(tmp_path / "plain")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    keys = {"project": "p", "entity": "e", "name": "n", "group": "g", "tags": ["t", "u"], "notes": "o", "job_type": "j"}
    logged(tmp_path / "said", sweep="sweep", **keys)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    monkeypatch.setenv("WANDB_RESUME", "never")
    logged(tmp_path / "unsaid")
    (plain,), (said,) = offline_runs(tmp_path / "plain"), offline_runs(tmp_path / "said")
    assert not (tmp_path / "unsaid" / "wandb").exists()
    (unsaid,) = offline_runs(tmp_path / "elsewhere")
    assert told(plain) == ("scoresde", "", "plain", "", [], "", "train", "0123456789ab")
    assert told(said) == ("p", "e", "n", "g", ["t", "u"], "o", "j", "0123456789ab")
    assert told(unsaid) == ("their-project", "their-team", "their name", "their-group", ["a", "b c"], "their\nnotes",
                            "probe", "abc")  # fmt: skip


def test_an_empty_variable_says_nothing_and_no_tags_are_a_choice(tmp_path: Path, monkeypatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_TAGS", "theirs")
    logged(tmp_path / "run", sweep="sweep", tags=[])
    (run,) = offline_runs(tmp_path / "run")
    assert told(run) == ("scoresde", "", "run", "sweep", [], "", "train", "0123456789ab")


@pytest.mark.parametrize(
    ("variables", "key", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_MODE": ""}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": "online"}, None, "online"),
        ({"WANDB_MODE": "dryrun"}, None, "offline"),  # so W&B called them before
        ({"WANDB_MODE": "run"}, None, "online"),
        ({"WANDB_MODE": "disabled"}, "offline", "offline"),
        ({"WANDB_MODE": "nonsense"}, "disabled", "disabled"),
        ({"WANDB_SWEEP_ID": "x"}, None, "online"),  # wandb agent hears of nothing else
        ({"WANDB_SWEEP_ID": "x", "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_SWEEP_ID": "x"}, "offline", "offline"),
    ],
)
def test_the_mode_is_the_key_then_the_variable_then_offline(variables, key, mode, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert WandbLogger(mode=key).mode == mode


def test_disabled_by_the_variable_starts_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_RESUME", "true")
    monkeypatch.setattr(subprocess, "Popen", None)
    logged(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "keys", "words"),
    [
        ({"WANDB_MODE": "shared"}, {}, "WANDB_MODE is 'offline', 'online' or 'disabled'; got 'shared'"),
        ({"WANDB_RESUME": "true"}, {}, "WANDB_RESUME is 'allow', 'must', 'never' or 'auto'; got 'true'"),
        ({"WANDB_PROJECT": "a/b"}, {}, "The project of a W&B run holds none of .*; got 'a/b' with '/'"),
        ({}, {"project": "a:b"}, "The project of a W&B run holds none of .*; got 'a:b' with ':'"),
        ({"WANDB_RUN_ID": "a,b"}, {}, "The id of a W&B run holds none of .*; got 'a,b' with ','"),
        ({}, {"tags": ["a", ""]}, "A tag has 1 to 64 characters; got ''"),
        ({}, {"tags": ["a" * 65]}, "A tag has 1 to 64 characters; got 'aaa"),
    ],
)
def test_what_wandb_would_refuse_is_refused_before_the_run(variables, keys, words, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        WandbLogger(**keys)


def test_one_tag_or_several_in_a_text(tmp_path: Path) -> None:
    assert [WandbLogger(tags=tags).said["tags"] for tags in ("a", "a,b", [1, "c"], 3)] == [
        ["a"],
        ["a", "b"],
        ["1", "c"],
        ["3"],
    ]


def test_no_secret_is_in_a_key(monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-value")
    assert WandbLogger(notes="as s3cr3t-value says").said["notes"] == "as REDACTED says"


def sync_line(log: pytest.LogCaptureFixture) -> list[str]:
    """The `wandb sync` line that was said last, as a shell takes it."""
    (line,) = [record.getMessage() for record in log.records if "wandb sync" in record.getMessage()]
    log.clear()
    return shlex.split(line.partition("To upload the run to W&B: ")[2])


def test_the_line_at_the_end_uploads_every_start_of_the_run(tmp_path: Path, caplog, monkeypatch) -> None:
    """Rows 1 to 3, then 4 to 5 by a second start, from a folder with a space: one run with five rows."""
    caplog.set_level(logging.INFO)
    folder, server = tmp_path / "my run", Server()
    logged(folder, range(1, 4))
    assert sync_line(caplog) == ["wandb", "sync", str(offline_runs(folder)[0].folder)]
    logged(folder, range(4, 6))
    line = sync_line(caplog)
    assert line == ["wandb", "sync", *(str(run.folder) for run in offline_runs(folder))] and len(line) == 4
    access = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "c0ffee" + "0" * 34}
    beside = Path(sys.executable).with_name(line[0])  # which need not be on the path
    done = subprocess.run(
        [str(beside), *line[1:]], env={**os.environ, **access}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert {run: [row["step"] for row in rows.values()] for run, rows in server.history.items()} == {
        "0123456789ab": [1, 2, 3, 4, 5]
    }
    monkeypatch.setenv("WANDB_SILENT", "True")
    logged(folder, range(6, 7))
    assert not caplog.records


def test_a_sweep_does_not_give_all_its_jobs_one_id(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    logged(tmp_path / "job", sweep="sweep")
    assert [run.id for run in offline_runs(tmp_path / "job")] == ["0123456789ab"]
    assert "WANDB_RUN_ID=abc is the name of one run; the jobs of a sweep have their own." in caplog.messages
