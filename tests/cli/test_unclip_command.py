"""unCLIP as it is typed: three runs, the chain of two of them, edits through embeddings, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, Done, command, sampled

import scoresde as S
from scoresde.runs.checkpoint import CheckpointError
from scoresde.runs.kept import keep, recall

RUN = tuple(word for word in TINY if not word.startswith(("data", "network")))
DATA = ("data=arrays", "data.path=x.npz", "logger=jsonl", "evaluate_at_end=false", "conditional=true")
CAPTIONS = ("captions=file", "data.captions.path=c.txt", "data.captions.tokenizer=words", "text=transformer",
            "network.text.width=8", "network.text.depth=1", "network.text.heads=2")  # fmt: skip
READER = ("network=embedder", "denoiser=embedder", "loss=embedder", "network.dim=4", "network.width=8")
MLP = ("network=mlp", "network.width=8", "network.depth=1", "network.cond_dropout=0.2")
DRAW = ("pictures=false", "threads=1", *PLAIN[1:])


def trained(folder: Path, *words: str) -> Done:
    done = command("train", *RUN, *DATA, *words, cwd=folder)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three runs on squares that are bright or dark, whose embedder is gone afterwards."""
    folder, generator = tmp_path_factory.mktemp("unclip"), np.random.default_rng(0)
    bright = generator.integers(2, size=200)
    pixels = generator.integers(0, 60, (200, 1, 4, 4)) + 190 * bright[:, None, None, None]
    np.savez(folder / "x.npz", raw=pixels.astype(np.uint8))
    (folder / "c.txt").write_text("".join(f"a {('dark', 'bright')[k]} square\n" for k in bright))
    assert "retrieval" in trained(folder, *CAPTIONS, *READER, "out=reader").out
    said = trained(folder, *CAPTIONS, *MLP, "codec=embeddings", "codec.run=reader", "out=prior").out
    assert "Embeddings (4,) of (1, 4, 4) by the embedder in reader, kept in reader/embeddings/" in said
    trained(folder, *MLP, "codec=with_embedding", "codec.run=reader", "network.cond_dim=4", "out=decoder")
    shutil.move(folder / "reader", folder / "moved")
    return folder


def test_typed_and_in_python_alike(place: Path, tmp_path: Path) -> None:
    """The chain and both edits draw what the library draws from the same seeds, without the embedder's own folder."""
    chain, sampler = S.load([place / "prior", place / "decoder"]), S.Sampler(S.DDIM(), steps=4)
    made = sampled(("run=prior", "then=decoder", *DRAW, "cond.text=a dark square", "n=3"), place, str(tmp_path / "a"))
    own = chain.sample(3, cond={"text": "a dark square"}, sampler=sampler, rng=S.Rng(seeds=range(3)), progress=False)
    np.testing.assert_array_equal(made["ddim"], own.numpy())
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert -1 <= summary["residual"]["ddim"]["cosine"] <= 1
    decoder = chain.runs[1]
    raw, how = decoder.dataset.test.raw[:2], {"sampler": sampler, "progress": False}
    varied = sampled(
        ("run=decoder", *DRAW, "edit=variations", "edit.input=test:0-1", "n=2"), place, str(tmp_path / "b")
    )
    own = decoder.variations(raw, 2, rng=S.Rng(seeds=[0, 1, 0, 1]), **how)
    np.testing.assert_array_equal(varied["samples"], own.numpy())
    way = sampled(
        ("run=decoder", *DRAW, "edit=embedding_interpolation", "edit.input=test:0-1", "n=3"), place, str(tmp_path / "c")
    )
    own = decoder.interpolation(raw, 3, rng=S.Rng(seeds=[0]), **how)
    np.testing.assert_array_equal(way["samples"][0], own.numpy())
    torch.testing.assert_close(torch.from_numpy(way["cond_vector"][0, [0, 2]]), decoder.embed(raw), atol=1e-6, rtol=0)
    exported = S.load(decoder.export(tmp_path / "one.safetensors"))
    assert torch.equal(exported.embed(raw), decoder.embed(raw))


REFUSED = {
    "sample run=moved": "is an embedder, of which there are no samples",
    "sample run=prior edit=variations edit.input=test:0": "the embedding of its input, and prior is told none",
    "sample run=decoder edit=variations edit.input=test:0 cond.vector=[1,2,3,4]": "cond.vector",
    "sample run=decoder then=prior": "is a first stage: run=prior then=decoder",
    "likelihood run=prior then=decoder": "no exact likelihood",
    "train data=arrays data.path=x.npz codec=embeddings codec.run=nowhere": "There is no folder nowhere",
    "train data=arrays data.path=x.npz codec=with_embedding codec.run=moved codec.digest=abc": "is asked for",
    "train data=arrays data.path=x.npz loss=embedder denoiser=embedder network=embedder": "learns which sentence",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_fit_is_refused(line: str, place: Path) -> None:
    name, *words = line.split()
    done = command(name, *words, "out=refused", cwd=place)
    assert done.code == 1 and REFUSED[line] in done.err, done.err
    assert not (place / "refused").exists()


def test_another_embedder_in_the_folder_is_found_out(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "decoder", tmp_path / "run")
    kept = recall(tmp_path / "run")
    assert kept is not None and kept.embedder is not None
    kept.embedder.network.log_scale.data += 1
    keep(tmp_path / "run", kept)
    with pytest.raises(CheckpointError, match="keeps another embedder than its own"):
        S.load(tmp_path / "run")
