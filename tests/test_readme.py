"""README and docs are run: their Python to the numbers it promises, their commands as far as their configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import scoresde as S
from scoresde.cli.typed import typed
from scoresde.config import config_dir

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
BLOCKS = {
    path.name: re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE) for path, text in PAGES.items()
}
PYTHON = [text for language, text in BLOCKS["README.md"] if language == "python"]
# These take no configuration: tests/runs/test_runs.py, tests/cli/test_doctor.py, tests/data/test_pack.py, tests/interop
COMMANDS = sorted(
    {
        line
        for blocks in BLOCKS.values()
        for _, text in blocks
        for line in text.replace("\\\n", " ").splitlines()
        if re.match(r"(scoresde-(?!runs|doctor|pack|import)|torchrun|srun)", line)
    }
)


def test_the_first_example_reaches_the_truth() -> None:
    """Held against the exact density: log p of the trained model within 0.05 nats of it, moments within 0.15."""
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(PYTHON[0], names)
    assert abs(float((names["result"].log_prob - names["exact"].log_prob(names["data"][:256])).mean())) < 0.05
    assert PYTHON[0].count("\n") <= 25 and PAGES[ROOT / "README.md"].count("\n") <= 150


def test_few_network_calls(tmp_path, monkeypatch) -> None:
    """On an exact mixture: samples are finite, log p within its own error bar five times over."""
    monkeypatch.chdir(tmp_path)
    model = S.GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.05, torch.ones(2), S.VPSDE())
    names: dict[str, Any] = {"S": S, "model": model, "data": model.sample(64, rng=S.Rng(0))}
    exec(PYTHON[1], names)
    exact = model.log_prob(names["data"][:16], t=model.sde.t_min)
    assert bool(((names["result"].log_prob - exact).abs() < 5 * names["result"].stderr).all())
    assert bool(torch.isfinite(names["x"]).all()) and (tmp_path / "grid.json").is_file()


def test_networks_from_elsewhere() -> None:
    (text,) = [text for language, text in BLOCKS["networks.md"] if text.startswith("# network(x, i)")]
    exec(text, {"torch": torch, "S": S, "network": lambda x, t, cond: 0 * x})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: line.split("#")[0].strip())
def test_commands_compose(command: str) -> None:
    words = shlex.split(re.sub(r"^.*-m scoresde\.cli\.", "scoresde-", command), comments=True)
    program, words = words[0], words[1:]
    overrides = [word for word in words if not word.startswith("-")]
    if "-m" in words:  # the first job of the sweep
        overrides = [re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in overrides]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        compose(program.removeprefix("scoresde-"), typed(overrides))


def test_training_from_python(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = [text for language, text in BLOCKS["training.md"] if language == "python"]
    names: dict[str, Any] = {}
    exec(text, names)
    assert names["state"].images == 640 and names["state"].step == 10


def test_the_page_of_text() -> None:
    names: dict[str, Any] = {}
    own, theirs, embedded = (text for language, text in BLOCKS["text.md"] if language == "python")
    exec(own, names)
    assert names["loss"].shape == (2,) and bool(torch.isfinite(names["x"]).all())
    exec(embedded, names)
    assert names["loss"].shape == (2,) and names["alike"].shape == (2, 2) and bool(names["alike"].isfinite().all())
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    exec(theirs, names)
    assert names["pictures"].shape == (2, 3, 4, 4) and names["pictures"].dtype == torch.uint8


def test_the_page_of_few_steps() -> None:
    """The map after three steps: what its samples were drawn with is what they are measured with, and not the ODE's."""
    names: dict[str, Any] = {}
    for language, text in BLOCKS["few_steps.md"]:
        if language == "python":
            exec(text, names)
    drawn, found = names["drawn"].log_prob, names["found"].log_prob
    torch.testing.assert_close(found, drawn, rtol=0, atol=1e-3)
    assert not torch.allclose(names["ode"].log_prob, drawn, atol=1e-2)


def test_the_page_of_likelihood() -> None:
    """Its blocks in turn: densities and draws within their error bars, bounds below them, classes by their side."""
    names: dict[str, Any] = {}
    for language, text in BLOCKS["likelihood.md"]:
        if language != "python":
            continue
        exec(text, names)
        if "log_likelihood(model, x" in text:
            found, model = names["found"], names["model"]
            exact = model.log_prob(names["x"], model.sde.t_min)
            assert float((found.log_prob - exact).abs().max()) < 1e-3 and bool(found.stderr.isfinite().all())
    drawn, of_drawn = names["drawn"], names["of_drawn"]
    torch.testing.assert_close(of_drawn.log_prob, model.log_prob(drawn, model.sde.t_min), rtol=0, atol=0.05)
    assert names["bpd"].shape == (8,) and float(names["bpd"].min()) > 0
    for name in ("bound", "chain", "tight"):  # on average: the draws of 64 samples
        assert float((names[name].log_prob - exact).mean()) < 0.1, name
    right = names["x"][:8, 0] > 0
    assert torch.equal(names["answer"].label.bool(), right)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pictures_and_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([\w./-]+)\)", PAGES[page]):
        assert (page.parent / target).is_file(), target
