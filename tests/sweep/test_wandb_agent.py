"""The sweep.yaml of docs/sweeps.md: what `wandb agent` makes of it is a command line that scoresde-train reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from scoresde.config import config_dir

TEXT = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text("utf-8")


def test_the_agent_gives_keys_without_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])
    chosen = {"optim.lr": 0.00123, "sde": "ve"}
    assert chosen.keys() == sweep["parameters"].keys()
    words = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    words["program"] = [sweep["program"]]
    # as `Agent._command_run` of W&B puts a command together
    line = [text for word in create_sweep_command(sweep["command"]) for text in words.get(word[2:-1], [word])]
    assert line[0] == "scoresde-train" and not any(word.startswith("-") for word in line)
    monkeypatch.setenv("WANDB_RUN_ID", "x7y2")
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides=line[1:])
    assert (config.out, config.resume, config.optim.lr) == ("runs/agent/x7y2", "auto", 0.00123)
    assert config.sde._target_ == "scoresde.VESDE"
    assert sweep["metric"] == {"name": "eval/bpd/ode", "goal": "minimize"}
