"""Commands on runs that were imported, as their user types them: fit, distil, likelihood and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command
from peer_files import as_torch_file, dit_tensors, song_tensors, write_edm

import scoresde
from scoresde.config import build_network

FEW = ("evaluation.points=4", "evaluation.samples=4", "evaluation.pictures=false", "logger=jsonl")


def done(name: str, *arguments: str, cwd: Path) -> str:
    found = command(name, *arguments, cwd=cwd)
    assert found.code == 0, found.err
    return found.out


def dit(path: Path) -> None:
    """A state dict of DiT with a learned variance, of small weights."""
    torch.manual_seed(0)
    node = {"_target_": "scoresde.nn.DiT", "patch": 2, "width": 8, "depth": 1, "heads": 2, "outputs": 2, "classes": 3}
    net = build_network(
        node | {"event_shape": (1, 4, 4), "embedding": "sinusoidal", "embedding_scale": 0.01}, classes=0
    )
    path.write_bytes(as_torch_file(theirs(net)))


def theirs(net) -> dict[str, torch.Tensor]:
    drawn = {name: 0.1 * torch.randn_like(v) for name, v in net.state_dict().items() if "omega" not in name}
    return dit_tensors(drawn, net.positions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of EDM and of DiT, each with data to be measured on."""
    where, rng = tmp_path_factory.mktemp("imported"), np.random.default_rng(0)
    np.savez(where / "edm.npz", x=rng.integers(0, 256, (40, 2, 8, 8), np.uint8), y=np.arange(40) % 3)
    np.savez(where / "dit.npz", x=rng.normal(size=(40, 1, 4, 4)).astype(np.float32), y=np.arange(40) % 3)
    write_edm(where / "edm.pkl", {n: 0.3 * v for n, v in song_tensors(0).items()}, sigma_data=0.5)
    dit(where / "dit.pt")
    given = {
        "edm": ("edm.pkl", "data.path=edm.npz", "data.label_key=y", "data.levels=256"),
        "dit": ("dit.pt", "format=dit", "args.num_heads=2", "args.num_classes=3", "args.class_dropout_prob=0.1",
                "data.path=dit.npz", "data.label_key=y"),
    }  # fmt: skip
    for name, words in given.items():
        done("importing", *words, "data=arrays", "data.key=x", f"out={name}", cwd=where)
    return where


def test_a_learned_variance_is_kept(folder: Path) -> None:
    """likelihood=vlb goes by it, and so does the ancestral step: without it both would say what variance=0 says."""
    said = done("likelihood", "run=dit", "likelihood=vlb", "likelihood.terms=4", "n=4", "out=bound", cwd=folder)
    assert "of a bound for the data by the steps of its table" in said
    run = scoresde.load(folder / "dit", device="cpu")
    assert run.denoiser.heads == 2
    x, label = torch.zeros(2, 1, 4, 4), torch.tensor([0, 2])
    learned, least = (
        scoresde.Sampler(scoresde.Ancestral(variance), steps=3)(run.denoiser, x, cond=label, rng=scoresde.Rng(0))
        for variance in (None, 0.0)
    )
    assert learned.isfinite().all() and not torch.allclose(learned, least, atol=1e-3)


def test_fit(folder: Path) -> None:
    done("fit", "run=dit", "budgets=[3]", "calls=20", "samples=8", cwd=folder)
    assert (folder / "dit" / "samplers.json").is_file()
    assert scoresde.load(folder / "dit", device="cpu").sample(2, budget=3, progress=False).shape == (2, 1, 4, 4)


def test_distil(folder: Path) -> None:
    """Of a network with two outputs, too; without data it says how to give them."""
    few = ("trainer.images=8", "trainer.batch_size=4", "loss.steps=2", "trainer.evaluate_every=0", *FEW)
    done("distil", "run=dit", "out=fast", *few, cwd=folder)
    said = done("sample", "run=fast", "n=2", "sampler.steps=1", "pictures=false", "out=drawn", cwd=folder)
    assert "flow_map" in said
    done("importing", "edm.pkl", "out=bare", cwd=folder)
    refused = command("distil", "run=bare", "out=none", *few, cwd=folder)
    assert refused.code == 1 and "scoresde-import … data=… imports it with some" in refused.err
    assert not (folder / "none").exists()


def test_evaluate(folder: Path) -> None:
    how = ("likelihood=budget", "likelihood.solver.calls=4", "sampler=ddim", "sampler.steps=2")
    done("evaluate", "run=edm", "out=report", *how, *FEW, cwd=folder)
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert np.isfinite(summary["bits_per_dim"]["mean"])
