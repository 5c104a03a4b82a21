"""docs/networks.md, by the letter: each file of it, in an empty folder, by each of its commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from scoresde import Rng
from scoresde.cli._hydra import read
from scoresde.cli.plan import Plan, assemble
from scoresde.config import ConfigError, build_network, config_dir
from scoresde.train.world import Alone

PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text("utf-8")
FILES: dict[str, str] = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"^scoresde-train (.*)$", PAGE, re.M)
SMALL = ("threads=1", "evaluation.pictures=false", "trainer.images=128", "trainer.batch_size=64", "out=run")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With the files of the page, and nothing of it imported or on the path before."""
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    HydraConfig.instance().cfg = None
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def plan(*words: str) -> Plan:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        told = [*words, "hydra.runtime.output_dir=out"]
        HydraConfig.instance().set_config(compose("train", told, return_hydra_config=True))
        return assemble(read(compose("train", list(words))), Alone())


def test_files_are_short() -> None:
    assert len(FILES) == 5 and len(COMMANDS) == 6
    for name, body in FILES.items():
        assert sum(bool(line.strip()) for line in body.splitlines()) <= 15, name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.search(r"=([a-z]+\.\w+)", command)[1])
def test_a_part_of_ones_own_is_trained_with(folder: Path, command: str) -> None:
    made = plan(*shlex.split(command), *SMALL)
    target, (part,) = (
        re.search(r"(\S+)\._target_=(\S+)", command).groups(),
        re.findall(r"allow_targets=\[(\S+)\]", command),
    )
    key, named = target
    node = made.config
    for name in key.split("."):
        node = node[name]
    typed = {word.removeprefix(f"++{key}.").split("=")[0] for word in command.split() if word.startswith(f"++{key}.")}
    assert named == part and set(node) - {"_partial_"} == {"_target_", *typed}
    before = [p.detach().clone() for p in made.training.loss.parameters()]
    made.training.loss.train()
    made.trainer.step(made.training)
    after = list(made.training.loss.parameters())
    assert int(made.training.tally.skipped) == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (sampler,) = made.samplers.values()
    sampler.steps, denoiser = 3, made.training.average.denoiser
    cond = torch.tensor([0, 1]) if made.config["conditional"] else None
    assert sampler(denoiser, (2, *made.training.dataset.event_shape), cond=cond, rng=Rng(0)).isfinite().all()


def test_the_working_directory_comes_last_and_for_what_is_allowed_alone(folder: Path) -> None:
    """So that no file there stands in for a package, and a configuration alone imports nothing from it."""
    with pytest.raises(ConfigError, match=r"net\.Net is not a name that a configuration may call"):
        plan("network._target_=net.Net", *SMALL)
    assert str(folder) not in sys.path and "net" not in sys.modules
    plan("network._target_=net.Net", "allow_targets=[net.Net]", "data=8gaussians", *SMALL)
    assert sys.path[-1] == str(folder)


def test_what_a_users_file_raises_is_said(folder: Path) -> None:
    (folder / "broken.py").write_text("import math\nx = 1 / 0\n")
    for target, said in {
        "broken.Net": "ZeroDivisionError: division by zero",
        "lost.Net": "No module named 'lost'",
    }.items():
        with pytest.raises(ConfigError, match=f"{target} cannot be imported: .*{said}.*its file in {folder}"):
            plan(f"network._target_={target}", f"allow_targets=[{target}]", *SMALL)


def test_a_published_target_keeps_the_keys_that_it_has(folder: Path) -> None:
    times = "loss.times._target_=scoresde.losses.UniformTimes"
    made = plan("network._target_=scoresde.nn.MLP", "network.width=16", "data=8gaussians", times, *SMALL)
    assert "blocks" not in made.config["network"] and made.config["network"]["width"] == 16
    assert made.config["network"]["embedding"] == "fourier"
    assert made.config["loss"]["times"] == {"_target_": "scoresde.losses.UniformTimes", "t_min": None}


def test_a_network_that_cannot_be_told_of_classes_is_refused(folder: Path) -> None:
    (folder / "plain.py").write_text("class Net:\n    def __init__(self, event_shape): self.shape = event_shape\n")
    node = {"_target_": "plain.Net", "_partial_": True}
    assert build_network(node, ["plain.Net"], event_shape=(2,), classes=0).shape == (2,)
    with pytest.raises(ConfigError, match=r"network: plain\.Net has no parameter 'classes'"):
        build_network(node, ["plain.Net"], event_shape=(2,), classes=3)
