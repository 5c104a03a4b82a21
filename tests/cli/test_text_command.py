"""Sentences on the command line: what is typed is what the library is told; edits by words; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, command, sampled

import scoresde as S

DRAW = ("run=run", "pictures=false", "threads=1")
STEPS = ("sampler=ddim", "sampler.steps=4")
RUN = tuple(word for word in TINY if not word.startswith(("data", "network")))
NET = ("network.width=8", "network.multipliers=[1]", "network.blocks=1", "network.cond_dropout=0.2", "conditional=true")
TEXT = ("text=transformer", "network.text.width=8", "network.text.depth=1", "network.text.heads=2")
DATA = ("data=arrays", "data.path=x.npz", "captions=file", "data.captions.path=c.txt", "data.captions.tokenizer=words")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on squares that are bright or dark, as their sentences say; the data are gone afterwards."""
    folder, generator = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    bright = generator.integers(2, size=200)
    pixels = generator.integers(0, 60, (200, 1, 4, 4)) + 190 * bright[:, None, None, None]
    np.savez(folder / "x.npz", raw=pixels.astype(np.uint8))
    (folder / "c.txt").write_text("".join(f"a {('dark', 'bright')[k]} square, yes\n" for k in bright))
    done = command("train", *RUN, *NET, *TEXT, *DATA, "logger=jsonl", "evaluate_at_end=false", "out=run", cwd=folder)
    assert done.code == 0, done.err
    (folder / "x.npz").rename(folder / "moved.npz")
    (folder / "c.txt").rename(folder / "moved.txt")
    return folder


def test_typed_in_a_file_and_in_python(place: Path, tmp_path: Path) -> None:
    """One sentence with a comma, a list, a file: the samples of the run in Python with the same seeds and sentences."""
    run = S.load(place / "run")
    sampler = S.Sampler(S.DDIM(), steps=4)
    bright, dark = "a bright square, yes", "a dark square"
    (place / "s.txt").write_text(f"{dark}\n{bright}\n")
    cases = {f"cond.text={bright}": [bright], f"cond.text=[{dark},a bright square]": [dark, "a bright square"],
             "cond.text=s.txt": [dark, bright], "cond.text=[s.txt,test:2]": [dark, bright, 2]}  # fmt: skip
    text = run.dataset.text
    assert text is not None
    for k, (words, sentences) in enumerate(cases.items()):
        made = sampled((*DRAW, *STEPS, words, "n=3", "guidance=cfg"), place, str(tmp_path / str(k)))
        told = [text.sentence(run.dataset.test.conditions["text"][s]) if s == 2 else s for s in sentences]
        own = run.sample(
            3, cond={"text": told}, sampler=sampler, guidance=2.0, rng=S.Rng(seeds=range(3)), progress=False
        )
        np.testing.assert_array_equal(made["ddim"] if "ddim" in made else made["samples"], own.numpy())
        assert torch.equal(torch.from_numpy(made["cond_text"]), run.cond({"text": told}, 3)["text"])
    led = sampled(
        (*DRAW, *STEPS, f"cond.text={bright}", f"negative={dark}", "guidance=cfg", "n=3"), place, str(tmp_path / "n")
    )
    own = run.sample(
        3, cond=bright, negative=dark, sampler=sampler, guidance=2.0, rng=S.Rng(seeds=range(3)), progress=False
    )
    np.testing.assert_array_equal(led["ddim"] if "ddim" in led else led["samples"], own.numpy())
    exported = S.load(run.export(tmp_path / "one.safetensors"))
    again = exported.sample(3, cond=bright, sampler=sampler, rng=S.Rng(1), progress=False)
    assert torch.equal(again, run.sample(3, cond=bright, sampler=sampler, rng=S.Rng(1), progress=False))


def test_edits_by_words(place: Path, tmp_path: Path) -> None:
    """Under its own sentence a picture comes back; under another it is what the library decodes; SDEdit and inpainting
    hear the sentence, too."""
    run = S.load(place / "run")
    ode, dark = S.AdaptiveODE(rtol=1e-6, atol=1e-6), "a dark square"
    np.save(place / "f.npy", run.dataset.test.raw[0].numpy())
    text = run.dataset.text
    assert text is not None
    own = text.sentence(run.dataset.test.conditions["text"][0])
    tight = ("edit.flow.rtol=1e-6", "edit.flow.atol=1e-6")
    words = (*DRAW, "edit=words", *tight)
    back = sampled(
        (*words, "edit.input=f.npy", f"edit.before.text={own}", f"cond.text={own}"), place, str(tmp_path / "a")
    )
    np.testing.assert_array_equal(back["samples"][:, 0], back["given"])  # pixels: half a level is 4e-3
    made = sampled((*words, "edit.input=test:0-1", f"cond.text={dark}", "edit.level=2"), place, str(tmp_path / "b"))
    x0 = run.encode(run.dataset.test.raw[:2])
    start = run.denoiser.sde.time(torch.tensor(-2 * np.log(2.0), dtype=torch.float64))
    z = ode.encode(run.denoiser, x0, cond={"text": run.dataset.test.conditions["text"][:2]}, to=start)
    end = torch.tensor(run.denoiser.sde.t_min, dtype=torch.float64)
    there = ode.move(run.denoiser, z, start, end, cond=run.cond(dark, 2))
    expected = run.decode(there).numpy().astype(int)
    assert np.abs(made["samples"][:, 0].astype(int) - expected).max() <= 1  # a level that is rounded either way
    x = run.encode(run.dataset.test.raw[:1])
    made = sampled((*DRAW, "edit=sdedit", *STEPS, "grid=uniform", "edit.input=test:0", f"cond.text={dark}", "n=1"),
                   place, str(tmp_path / "c"))  # fmt: skip
    sampler = S.Sampler(S.DDIM(), S.UniformGrid(), steps=4)
    drawn = S.sdedit(run.denoiser, x, sampler, 0.5, cond=run.cond(dark, 1), rng=S.Rng(seeds=[0]))
    assert np.abs(made["samples"][0].astype(int) - run.decode(drawn).numpy().astype(int)).max() <= 1
    hole = ("problem=inpaint", "mask=hole:0-1x0-3", "input=test:0", "sampler.steps=4", "n=2")
    told = {
        s: sampled((*DRAW, *hole, f"cond.text={s}"), place, str(tmp_path / f"on-{s[2]}"))
        for s in (dark, "a bright square")
    }
    assert not np.array_equal(told[dark]["samples"], told["a bright square"]["samples"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cond.text=a purple square",), "'a purple square': the word 'purple' is in no caption; known are"),
        (("cond.text=a a a a a a a",), "has 7 tokens, and 5 are read at most. Shorten it"),
        (("cond.label=3",), "was trained with a sentence of up to 5 tokens (words), and no label"),
        (("negative=a square",), "is of classifier-free guidance: guidance=cfg"),
        (("guidance=cfg", "negative=a purple square"), "the word 'purple' is in no caption"),
        (("cond.text=nothing.txt",), "There is no file"),
        (("edit=words", "edit.input=test:0"), "say which: 'cond.text=a 7', cond.label=7"),
        (("edit=words", "edit.input=moved.npz", "cond.text=square"), "moved.npz"),
    ],
)  # fmt: skip
def test_refused_before_the_first_step(place: Path, words: tuple[str, ...], message: str) -> None:
    done = command("sample", *DRAW, *words, "out=refused", cwd=place)
    assert done.code == 1 and message in done.err and not (place / "refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (NET, "has captions, and the network no text encoder to read them: take text=transformer"),
        ((*NET[:3], *TEXT), "network.text reads captions, and the network is told none: conditional=true"),
        ((*NET, *TEXT, "data.captions=null"), "is told none: data.captions=captions.txt and conditional=true"),
        ((*NET, *TEXT, "data.captions.length=2"), "has 5 tokens, and 2 are read at most"),
        ((*NET, *TEXT, "data.captions.crop=true"), "crop=true shortens sentences to a length, so give it"),
    ],
)  # fmt: skip
def test_training_is_refused_before_a_folder_is_made(place: Path, words: tuple[str, ...], message: str) -> None:
    data = [word.replace("=x.npz", "=moved.npz").replace("=c.txt", "=moved.txt") for word in DATA]
    if "data.captions=null" in words:
        data = [word for word in data if "captions" not in word]
        words = tuple(word for word in words if word != "data.captions=null")
    done = command("train", *RUN, *data, *words, "logger=jsonl", "out=never", cwd=place)
    assert done.code == 1 and message in done.err and not (place / "never").exists()


def test_a_sentence_for_a_run_without_text(place: Path) -> None:
    done = command("train", *TINY, "logger=jsonl", "evaluate_at_end=false", "out=plain", cwd=place)
    assert done.code == 0, done.err
    done = command("sample", "run=plain", "cond.text=a 3", cwd=place)
    assert done.code == 1 and "cond.text=a 3: plain was trained without labels or other conditions" in done.err
