"""No secret that a command was given, by whatever way, is in anything that it writes or prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import PLAIN, TINY, Done, command
from omegaconf import OmegaConf

from scoresde.runs.checkpoint import latest
from scoresde.runs.redact import HIDDEN, guard, redacted, redacted_text

CANARY = "c4n4ry"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # as they were, whatever guards them in a test
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY", "DB_PASS"):
        monkeypatch.setenv(name, f"{CANARY}-{name.lower()}")
    monkeypatch.setenv("SHORT_KEY", "1")  # found everywhere, so not hidden
    monkeypatch.setenv("KEYBOARD", "us-layout-altgr")
    monkeypatch.setenv("PWD", "/a/working/directory")  # no password


@pytest.mark.parametrize(
    "text",
    [
        "+logger.api_key=CANARY", "++my_token=CANARY", "a=1 +x.password='CANARY x' b=2", "+token=CANARY,CANARY seed=1",
        "+tokens.token=[CANARY, CANARY]", "hydra.job.env_set.WANDB_API_KEY=CANARY", "API-KEY: CANARY",
        "secret = CANARY",        "+x={token:CANARY,b:3}",
        "api_key: CANARY\nb: 3\n", '{"token": "CANARY and more", "b": 1}', "passwd=CANARY",
        "data.path=https://user:CANARY@host/x", "https://CANARY@host", r"x=https\://user\:CANARY@host", "s3://key:CANARY@bucket?x=1",
        "https://host/x?access_token=CANARY&y=1", "ssh://user:CANARY@host:22/x",
        "could not open https://u:p@CANARY@host",
        "postgres://u:CANARY@h/db", "x" + CANARY + "-hf_token" + "x", f"failed with {CANARY}-wandb_api_key",
        "PWD=CANARY",
        f"{CANARY}-my_password", f"{CANARY}-aws_secret_access_key", f"{CANARY}-db_pass", "private-key=CANARY",
        "PGPASSWORD=CANARY", "dbPassword: CANARY", "accessToken=CANARY", "https://h/x?a=1&X-Amz-Signature=CANARY&b=2",
        "Authorization: Bearer CANARY", "-H 'Authorization: Basic CANARY'", "sent Bearer CANARY12 to it",
        "sk_live_CANARY", "x-api-key: CANARY", "clientSecret2=CANARY", "AccountKey=CANARY;b", "smtp_pass=CANARY",
        "my_credentials: CANARY", "client_secret=CANARY", "passphrase=CANARY", "+logger.apiKey=CANARY",
    ],
)  # fmt: skip
def test_secrets_are_hidden_in_text(text: str) -> None:
    hidden = redacted_text(text.replace("CANARY", CANARY))
    assert CANARY not in hidden and HIDDEN in hidden
    assert redacted_text(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "sde=vp network.width=64 seed=1", "data.key=images data.label_key=labels", "n_tokens=5 tokens=7 monkey=3",
        "full_key: sde.beta_max", "https://host/x?y=1", "git@github.com:a/b", "ssh://git@github.com/a/b", "a@b.org",
        "the token is wrong", "There is no key 'x'. Did you mean 'key'?", "KeyError: 'a'", "secretary=1",
        "SHORT_KEY is 1", "compass=3", "design: 4", "author=me", "forward_pass: 2", "Basic functionality", "monkeys=3",
        "keyboard us-layout-altgr", "in /a/working/directory",
        "out=runs/2026-01-01_00-00-00", "tokenizer=bpe", "", "x: 1",
    ],
)  # fmt: skip
def test_all_else_stays(text: str) -> None:
    assert redacted_text(text) == text


def test_secrets_are_hidden_in_configurations() -> None:
    """By their name at any depth, and in any text; what stands below a secret's name is hidden as a whole."""
    tree = {
        "seed": 0, "data": {"key": "images", "label_key": "y", "path": f"https://u:{CANARY}@h/x"},
        "api_key": CANARY, "token": 12345678, "list": [1, None, {"password": [CANARY, {"a": CANARY}]}],
        "credentials": {"user": CANARY, "more": [{"x": CANARY}]}, "use_token": True, "no_token": None, "f": 1.5,
        "text": f"{CANARY}-hf_token",
    }  # fmt: skip
    made = redacted(tree)
    assert CANARY not in json.dumps(made) and "12345678" not in json.dumps(made)
    assert made["seed"] == 0 and made["f"] == 1.5 and made["use_token"] is True and made["no_token"] is None
    assert made["data"] == {"key": "images", "label_key": "y", "path": f"https://{HIDDEN}@h/x"}
    assert made["list"] == [1, None, {"password": [HIDDEN, {"a": HIDDEN}]}]
    assert made["credentials"] == {"user": HIDDEN, "more": [{"x": HIDDEN}]}
    assert redacted(made) == made and tree["api_key"] == CANARY
    assert yaml.safe_load(redacted_text(yaml.safe_dump(tree)))["api_key"] == HIDDEN
    assert json.loads(redacted_text(json.dumps({"token": CANARY, "a": [1]}))) == {"token": HIDDEN, "a": [1]}


SECRETS = (
    "--config-dir=../mine", "experiment=private", f"+hydra.job.env_set.SOME_SECRET={CANARY}-hydra",
    f"+hydra.job.env_set.REMOTE=https://user:{CANARY}-url@host/x",
)  # fmt: skip
PRIVATE = f"""# @package _global_
my_token: {CANARY}-override
dbPassword: {CANARY}-joined
tracking:
  password: {CANARY}-below
  headers: {{Authorization: Bearer {CANARY}-header, Cookie: a={CANARY}}}
remote: https://user:{CANARY}-url@host/x?X-Amz-Signature={CANARY}
mirrors: ["https://{CANARY}-list@host"]
home: ${{oc.env:HF_TOKEN}}
"""
NETWORK = f"""
import os
from scoresde.nn import MLP
class Breaks(MLP):
    calls = 0
    def forward(self, *args):
        Breaks.calls += 1
        if Breaks.calls > 1 + int(os.environ["BREAK_AFTER"]):
            raise RuntimeError("refused: https://user:{CANARY}-error@host, token={CANARY}-message, "
                               + os.environ["HF_TOKEN"])
        return super().forward(*args)
"""


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository whose remote has a password; a network that breaks with secrets in its message."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    remote = f"https://user:{CANARY}-remote@host/x.git"
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=folder, check=True)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "private.yaml").write_text(PRIVATE)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "breaking.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "breaking", raising=False)
    return folder


def found_in(cwd: Path, done: Done) -> list[str]:
    """Everything with a canary in it: files below the folder (git's own aside), stdout and stderr."""
    files = [path for path in cwd.rglob("*") if path.is_file() and ".git" not in path.relative_to(cwd).parts]
    assert files
    found = [str(path.relative_to(cwd)) for path in files if CANARY.encode() in path.read_bytes()]
    return found + [name for name in ("out", "err") if CANARY in getattr(done, name)]


QUICK = (*TINY, *PLAIN, "trainer.images=128", "evaluate_at_end=false")
BREAKING = ("network._target_=breaking.Breaks", "allow_targets=[breaking.Breaks]")


def test_a_run_keeps_no_secret(cwd: Path) -> None:
    """In config.yaml and its first line, checkpoints, metrics, what is printed; and it can be resumed."""
    done = command("train", *SECRETS, *QUICK, "out=run", cwd=cwd)
    assert done.code == 0, done.err
    assert found_in(cwd, done) == []
    first = (cwd / "run" / "config.yaml").read_text().splitlines()[0]
    assert f"SOME_SECRET={HIDDEN}" in first and f"https://{HIDDEN}@host/x" in first and "sampler=ddim" in first
    kept: Any = OmegaConf.to_container(OmegaConf.load(cwd / "run" / "config.yaml"))
    assert kept["tracking"] == {"password": HIDDEN, "headers": {"Authorization": HIDDEN, "Cookie": HIDDEN}}
    assert kept["my_token"] == kept["dbPassword"] == kept["home"] == HIDDEN and kept["seed"] == 0
    saved = latest(cwd / "run" / "checkpoints")
    assert saved is not None and saved.records["config"] == kept
    done = command("train", *SECRETS, *QUICK, "out=run", "resume=auto", cwd=cwd)
    assert done.code == 0 and "Resuming" in done.out and found_in(cwd, done) == []


def test_a_sweep_keeps_no_secret(cwd: Path) -> None:
    """Hydra logs the overrides of every job and keeps them in multirun.yaml; job.json and sweep.csv have them too."""
    done = command("train", "-m", *SECRETS, "seed=0,1", *QUICK, "out=sweep", cwd=cwd)
    assert done.code == 0, done.err
    assert (cwd / "sweep" / "multirun.yaml").is_file() and "seed=1" in done.out
    assert found_in(cwd, done) == []
    assert yaml.safe_load((cwd / "sweep" / "multirun.yaml").read_text())["hydra"]["mode"] == "MULTIRUN"
    overrides = json.loads((cwd / "sweep" / "0" / "job.json").read_text())["overrides"]
    assert "experiment=private" in overrides and "seed=0" in overrides


def test_an_error_tells_no_secret(cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Before training (a refusal), within a job of a sweep (logged with its trace), and at the end of a process."""
    monkeypatch.setenv("BREAK_AFTER", "-1")
    done = command("train", *SECRETS, *QUICK, *BREAKING, "out=refused", cwd=cwd)
    assert done.code == 1 and "refused: https://" in done.err and not (cwd / "refused").exists()
    assert CANARY not in done.out + done.err
    monkeypatch.setenv("BREAK_AFTER", "1")
    sys.modules["breaking"].Breaks.calls = 0
    done = command("train", "-m", *SECRETS, "seed=0", *QUICK, *BREAKING, "out=sweep", cwd=cwd)
    assert done.code == 1 and "RuntimeError: refused" in done.out and "Traceback" in done.out
    assert found_in(cwd, done) == []
    assert "refused" in json.loads((cwd / "sweep" / "0" / "job.json").read_text())["error"]
    sys.modules["breaking"].Breaks.calls = 0
    with pytest.raises(RuntimeError, match="refused") as caught:
        command("train", *QUICK, *BREAKING, "out=run", cwd=cwd)
    guard()
    sys.excepthook(caught.type, caught.value, caught.tb)  # as the interpreter does
    printed = capsys.readouterr().err
    assert "RuntimeError: refused: https://" in printed and CANARY not in printed


@pytest.mark.parametrize(
    "override",
    [
        f"+logger.api_key={CANARY}", f"seed=https://u:{CANARY}@h", f"my_token={CANARY}", f"sde._target_=https://u:{CANARY}@h",
        f"+my_token={CANARY} x", f"trainer.images=token={CANARY}", f"data.path=https://u:{CANARY}@h/x",
    ],
)  # fmt: skip
def test_a_refusal_repeats_no_secret(override: str, cwd: Path) -> None:
    done = command("train", *QUICK, "data=arrays", "data.path=x", override, "out=run", cwd=cwd)
    assert done.code == 1 and done.err.strip().splitlines()[-1].startswith("error: ")
    assert CANARY not in done.out + done.err, done.err
    assert not (cwd / "run").exists()
