"""A file of experiments from someone else asks Hydra for nothing that runs code; what the user types still goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import PLAIN, TINY, command
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from scoresde.cli.foreign import CheckedLoader
from scoresde.config import Refusal, config_dir

SLURM = "defaults: [{override /hydra/launcher: submitit_slurm}]\nhydra: {launcher: {"
FILES = {
    "callback": ("hydra: {callbacks: {x: {_target_: trap.Spring}}}", "hydra.callbacks.x._target_=trap.Spring"),
    "ours replaced": ("hydra: {callbacks: {output_folder: {_target_: trap.Spring}}}", "=trap.Spring is not"),
    "callback by a reference": ("evil: {_target_: trap.Spring}\nhydra: {callbacks: {x: '${evil}'}}", "not a value yet"),
    "callback by its name": ("evil: trap.Spring\nhydra: {callbacks: {x: {_target_: '${evil}'}}}", "is not a name"),
    "in a launcher": (SLURM + "additional_parameters: {x: {_target_: trap.Spring}}}}", "x._target_=trap.Spring"),
    "in a sweeper": ("hydra: {sweeper: {params: {seed: {_target_: trap.Spring}}}}", "seed._target_=trap.Spring"),
    "commands of a launcher": (SLURM + "setup: [touch ran]}}", r"setup\[0\]=touch ran is taken from"),
    "environment": ("hydra: {job: {env_set: {LD_PRELOAD: ./x.so}}}", r"LD_PRELOAD is taken .* \+\+hydra.job.env_set"),
    "handler": ("hydra: {job_logging: {handlers: {x: {class: trap.Spring}}}}", "class=trap.Spring is not a name"),
    "factory": ("hydra: {hydra_logging: {filters: {x: {(): trap.Spring}}}}", r"x.\(\)=trap.Spring is not a name"),
    "object of a handler": (
        "hydra: {job_logging: {handlers: {x: {class: logging.StreamHandler, stream: 'ext://trap.spring'}}}}",
        "ext://trap.spring names an object",
    ),
    "log elsewhere": (
        "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, filename: /root/.bashrc}}}}",
        "filename=/root/.bashrc is taken from the command line alone",
    ),
}  # fmt: skip


def composed(folder: Path, text: str, *words: str) -> Any:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    path = create_config_search_path(config_dir())
    path.prepend("command-line", f"file://{folder}")
    return CheckedLoader(path).load_configuration("train", list(words), RunMode.RUN)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cannot_have_hydra_run_code(kind: str, tmp_path: Path) -> None:
    text, words = FILES[kind]
    with pytest.raises(Refusal, match=words):
        composed(tmp_path, text, "experiment=theirs")


def test_what_is_typed_and_what_is_harmless_is_taken(tmp_path: Path) -> None:
    text = (
        "hydra: {job: {env_set: {LD_X: a}}, callbacks: {x: {_target_: my.Own}}, sweep: {subdir: 'a/${hydra.job.num}'}}"
    )
    words = ("experiment=theirs", "allow_targets=[my.Own]", "++hydra.job.env_set.LD_X=a", "hydra/job_logging=default")
    assert composed(tmp_path, text, *words).hydra.callbacks.x._target_ == "my.Own"
    with pytest.raises(Refusal, match="LD_X is taken"):
        composed(tmp_path, text, *words[:2])


def test_submitit_is_given_no_secret(tmp_path: Path) -> None:
    """It pickles the configuration and the overrides of every job."""
    words = ("hydra/launcher=submitit_local", "experiment=theirs")
    assert composed(tmp_path, "seed: 1", *words).seed == 1
    with pytest.raises(
        Refusal, match=r"hydra.overrides.*\(\+hydra.job.env_set.PGPASSWORD=REDACTED\) reads as a secret"
    ):
        composed(tmp_path, "seed: 1", *words, "+hydra.job.env_set.PGPASSWORD=c4n4ry")


def test_the_command_builds_nothing_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swept experiment too, which Hydra composes job by job; and no folder is made."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    evil = "# @package _global_\nhydra: {callbacks: {x: {_target_: trap.Spring}}}\n"
    (tmp_path / "theirs" / "experiment" / "evil.yaml").write_text(evil)
    for words in (["experiment=evil"], ["-m", "experiment=demo,evil"]):
        done = command("train", *words[:-1], "--config-dir=theirs", words[-1], *TINY, *PLAIN, "out=made", cwd=tmp_path)
        assert done.code == 1 and "trap.Spring is not a name that a configuration may call" in done.err, done.err
        assert "Traceback" not in done.err and "Error executing" not in done.err and not (tmp_path / "made").exists()
