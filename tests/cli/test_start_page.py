"""docs/start.md, by the letter: its files in an empty folder, and what each of its trainings is built of."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from scoresde.cli._hydra import read
from scoresde.cli.plan import assemble
from scoresde.config import config_dir
from scoresde.train.world import Alone

PAGE = (Path(__file__).parents[2] / "docs" / "start.md").read_text("utf-8")
FILES: dict[str, str] = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
TRAININGS = re.findall(r"^scoresde-train (?!-m)(.*)$", PAGE, re.M)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files of the page, and the data that the first of them makes."""
    folder = tmp_path_factory.mktemp("start")
    for name, body in FILES.items():
        (folder / name).write_text(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path("make_data.py")
    return folder


@pytest.fixture
def folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in FILES:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(place)
    yield place
    HydraConfig.instance().cfg = None
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("line", TRAININGS, ids=lambda line: re.search(r"out=runs/(\w+)", line)[1])
def test_a_training_begins(folder: Path, line: str) -> None:
    """Data are read, network, process and loss are built, and a step is taken, which is skipped if not finite."""
    words = [*shlex.split(line, comments=True), "threads=1", "trainer.batch_size=16"]
    words += ["denoiser.components=2"] if "experiment=table" in line else []  # all of them take seconds
    with initialize_config_dir(config_dir(), version_base="1.3"):
        told = [*words, "hydra.runtime.output_dir=out"]
        HydraConfig.instance().set_config(compose("train", told, return_hydra_config=True))
        plan = assemble(read(compose("train", words)), Alone())
    data, denoiser = plan.training.dataset, plan.training.loss.denoiser
    plan.training.loss.train()
    plan.trainer.step(plan.training)
    assert int(plan.training.tally.skipped) == 0
    if "experiment=images" in line:
        assert data.class_names == tuple(f"digit-{k}" for k in range(10)) and data.raw_shape == (1, 8, 8)
    if "mysde.Line" in line:
        assert type(denoiser.sde).__name__ == "Line" and denoiser.sde.sigma_max == 8.0
    if "mynet.Net" in line:
        assert type(denoiser.network).__name__ == "Net"


def test_the_page_has_what_it_promises() -> None:
    assert FILES.keys() == {"make_data.py", "mynet.py", "mysde.py", "theirs.py"} and len(TRAININGS) == 4
    assert re.search(r"^scoresde-train -m ", PAGE, re.M) and re.search(r"^scoresde-import ", PAGE, re.M)
