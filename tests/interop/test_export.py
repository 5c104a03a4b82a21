"""What a run is exported to: a card, one file for us, and programs that run without us."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command
from torch import Tensor, nn

import scoresde
from scoresde import DDIM, EDM, VPSDE, AdaptiveODE, DPMSolverPP, Heun, Preconditioned, Rng, Sampler, UniPC
from scoresde.interop import export as exports
from scoresde.interop.export import export, push
from scoresde.interop.program import SamplerProgram
from scoresde.nn import MLP
from scoresde.runs.run import Run

# without scoresde: its import fails, as in an environment that does not have it
ALONE = """
import sys
sys.modules["scoresde"] = None
import numpy, torch
given = numpy.load("given.npz")
x, t, label = (torch.from_numpy(given[name]) for name in ("x", "t", "label"))
with torch.no_grad():
    x0, eps = torch.export.load("denoiser.pt2").module()(x, t, label)
    end = torch.export.load("sampler-4.pt2").module()(x, label)
numpy.savez("found.npz", x0=x0, eps=eps, end=end)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 200)
    np.savez(folder / "data.npz", x=(labels[:, None] + 0.1 * generator.normal(size=(200, 2))).astype("f4"), y=labels)
    done = command(
        "train", *(option for option in TINY if not option.startswith("data")), *PLAIN, "data=arrays",
        f"data.path={folder}/data.npz", "data.key=x", "data.label_key=y", "data.raw_low=-1", "data.raw_high=3",
        "conditional=true", "out=run", cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return scoresde.load(folder / "run")


def given(run: Run, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.linspace(0.05, 0.9, n)
    return Rng(9).normal((n, *run.event_shape)), t, torch.arange(n) % 3


def assert_near(found: Tensor, right: Tensor) -> None:
    assert float((found - right).abs().max()) <= 1e-5 * float(right.abs().max())


def test_the_file_is_the_run_and_the_card_says_what_it_is(folder: Path, run: Run) -> None:
    done = command("export", "run=run", "out=given-away", cwd=folder)
    assert done.code == 0, done.err
    again = scoresde.load(folder / "given-away")
    raw = [each.sample(6, sampler=Sampler(DDIM(), steps=4), progress=False) for each in (run, again)]
    assert torch.equal(*raw) and again.digest == run.digest
    card = (folder / "given-away" / "README.md").read_text("utf-8")
    for line in (
        "Licence of the weights: (to be filled in)",
        "`VPSDE(",
        f"SHA-256 {run.digest}",
        "bits/dim (bpd/ode, 4",
    ):
        assert line in card
    assert "| conditions | a class 0 … 2 |" in card and "given-away/README.md is the card" in done.out
    done = command("export", "run=run", "out=given-away", cwd=folder)
    assert done.code == 1 and "holds the results of a command already" in done.err


def test_programs_run_without_us(folder: Path, run: Run) -> None:
    """In a process of its own, on a batch of another size than they were made with."""
    done = command("export", "run=run", "format=torch_export", "budgets=[4]", "out=programs", cwd=folder)
    assert done.code == 0, done.err
    x, t, label = given(run)
    np.savez(folder / "programs" / "given.npz", x=x, t=t, label=label)
    alone = subprocess.run([sys.executable, "-c", ALONE], cwd=folder / "programs", capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    found = {name: torch.from_numpy(value) for name, value in np.load(folder / "programs" / "found.npz").items()}
    right = run.denoiser(x, t, label)
    assert_near(found["x0"], right.x0)
    assert_near(found["eps"], right.eps)
    assert_near(found["end"], run.sampler(4, run.cond(None, 16))(run.denoiser, x, cond=label))
    card = (folder / "programs" / "README.md").read_text("utf-8")
    assert "sampler-4.pt2" in card and ", t (B,), label)" in card


def test_onnx_is_the_denoiser(folder: Path, run: Run) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is an optional package")
    pytest.importorskip("onnxscript", reason="onnxscript is an optional package")
    assert export(run, folder / "onnx", "onnx") == ["denoiser.onnx", "README.md"]
    session = runtime.InferenceSession(folder / "onnx" / "denoiser.onnx")
    x, t, label = given(run)
    found = session.run(None, {"x": x.numpy(), "t": t.numpy(), "label": label.numpy()})
    right = run.denoiser(x, t, label)
    assert_near(torch.from_numpy(found[0]), right.x0)
    assert_near(torch.from_numpy(found[1]), right.eps)


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize(
    "step", [DDIM(), UniPC(3), Heun(), scoresde.Multistep(3, sigma_data=None, corrector=3)], ids=repr
)
def test_a_program_is_the_sampler(step, denoise: bool) -> None:
    """The factors that unit vectors give are those of the steps."""
    torch.manual_seed(0)
    net = MLP((2,), width=8, depth=1)
    nn.init.normal_(net.outlet.weight)
    denoiser = Preconditioned(net, VPSDE(), EDM(0.5), sigma_data=0.5).eval()
    sampler = Sampler(step, steps=5, denoise=denoise)
    made, x = SamplerProgram(denoiser, sampler), Rng(1).normal((3, 2))
    assert len(made.times) == sampler.evaluations
    with torch.no_grad():
        assert_near(made(x), sampler(denoiser, x))


def test_what_no_program_can_hold_is_refused(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, words in [
        (DPMSolverPP(2, eta=1.0), "draws noise, and a program has none"),
        (AdaptiveODE(), "decides as it goes how many steps"),
    ]:
        with pytest.raises(ValueError, match=words):
            SamplerProgram(run.denoiser, Sampler(step, steps=3))
    with pytest.raises(ValueError, match="format is one of safetensors, torch_export"):
        export(run, folder / "none", "pickle")
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"format=onnx needs onnx and onnxscript: pip install 'scoresde\[onnx\]'"):
        export(run, folder / "none", "onnx")
    monkeypatch.setattr(exports, "_sampled", lambda *_: torch.ones(3, 2))  # as of steps that are not linear
    with pytest.raises(ValueError, match="The sampler of 3 calls is off by"):
        export(run, folder / "none", "torch_export", budgets=[3])
    assert not (folder / "none").exists()


def test_a_push_is_by_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never tried on the network: what is asked of their package, and the words where it is missing."""
    asked = []

    class HfApi:
        def create_repo(self, repository, *, private, exist_ok):
            asked.append((repository, private, exist_ok))
            return f"https://example.org/{repository}"

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
            asked.append((repo_id, folder_path, ignore_patterns))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    assert push(tmp_path, "me/mine") == "https://example.org/me/mine"
    assert asked == [("me/mine", True, True), ("me/mine", str(tmp_path), [".*"])]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        push(tmp_path, "me/mine")
