"""Vectors, images and tokens as they are typed: what the command is told is what the library is told, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, Done, command
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import scoresde.cli.sample
from scoresde import (
    DDIM,
    ClassifierFree,
    Mask,
    Observation,
    PiGDM,
    Rng,
    Sampler,
    bits_per_dim,
    log_likelihood,
)
from scoresde.cli.conditions import choose_cond
from scoresde.config import ConfigError
from scoresde.evaluate.problem import Problem
from scoresde.evaluate.report import real_beside
from scoresde.likelihood.tolerance import Tolerance
from scoresde.runs.load import load_run
from scoresde.runs.run import Run

DRAW = ("sampler=ddim", "sampler.steps=4", "pictures=false", "threads=1")
SAMPLER = Sampler(DDIM(), steps=4)
TRAIN = tuple(option for option in TINY if not option.startswith(("data", "network", "trainer.images")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs, trained for moments: `vec` of pairs told a vector, `all` of small images told all else at once."""
    folder, generator = tmp_path_factory.mktemp("conditions"), np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).clip(-3, 3)  # noqa: E731
    v, c, t, y = draw(200, 2), draw(200, 1, 4, 4), draw(200, 3, 2), generator.integers(0, 3, 200)
    t[::2, 2] = np.nan
    np.savez(folder / "v.npz", x=0.5 * v + 0.1 * draw(200, 2), v=v)
    np.savez(folder / "c.npz", x=0.5 * c, c=c, t=t, y=y)
    common = (*TRAIN, *PLAIN, "data=arrays", "data.key=x", "data.raw_low=-3", "data.raw_high=3", "conditional=true",
              "network.cond_dropout=0.3", "optim.lr=0.01", "trainer.images=1280")  # fmt: skip
    for words in (
        ("network=mlp", "network.width=16", "network.depth=1", f"data.path={folder}/v.npz", "data.cond_keys={vector:v}",
         "network.cond_dim=2", "out=vec"),
        ("network.width=8", "network.multipliers=[1]", "network.blocks=1", f"data.path={folder}/c.npz",
         "data.label_key=y", "data.cond_keys={image:c,tokens:t}", "network.cond_image=[1,4,4]", "network.cond_tokens=2",
         "out=all"),
    ):  # fmt: skip
        done = command("train", *common, *words, cwd=folder)
        assert done.code == 0, done.err
    np.save(folder / "v.npy", draw(3, 2))
    np.save(folder / "t.npy", draw(2, 5, 2).astype(np.float32))
    pixels = generator.integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "x.png")
    Image.fromarray(pixels[:3]).save(folder / "small.png")
    np.save(folder / "text.npy", np.array(["a", "b"]))
    np.save(folder / "large.npy", 255 * np.ones((4, 4)))
    np.save(folder / "gap.npy", np.array([[1.0, np.nan]]))
    np.save(folder / "mask.npy", np.array([1, 0]))
    np.save(folder / "half.npy", np.arange(4) < np.full((4, 1), 2))
    yield folder


@pytest.fixture(scope="module")
def vec(folder: Path) -> Run:
    return load_run(folder / "vec")


@pytest.fixture(scope="module")
def everything(folder: Path) -> Run:
    return load_run(folder / "all")


def drawn(folder: Path, run: str, out: str, *arguments: str) -> tuple[dict[str, np.ndarray], Done]:
    done = command("sample", *DRAW, f"run={run}", *arguments, f"out={out}", cwd=folder)
    assert done.code == 0, done.err
    return dict(np.load(folder / out / "samples.npz")), done


def made(run: Run, n: int, cond: object, *, guided: float | None = None) -> np.ndarray:
    denoiser = run.denoiser if guided is None else ClassifierFree(run.denoiser, guided)
    x = SAMPLER(denoiser, (n, *run.dataset.event_shape), cond=cond, rng=Rng(seeds=range(n)))
    return run.dataset.decode(x).numpy()


def test_a_vector_is_typed_or_in_a_file_of_rows(folder: Path, vec: Run) -> None:
    rows = torch.from_numpy(np.load(folder / "v.npy")).float()
    cases = {
        "cond.vector=[0.3,-1]": torch.tensor([0.3, -1]).expand(4, 2),
        "cond.vector=[[0.3,-1],[1,1]]": torch.tensor([[0.3, -1], [1, 1]]).repeat(2, 1),
        "cond.vector=v.npy": rows[[0, 1, 2, 0]],
        "cond.vector=[v.npy,test:5]": torch.cat([rows, vec.dataset.test.conditions["vector"][5:6]]),
    }
    for index, (words, told) in enumerate(cases.items()):
        arrays, _ = drawn(folder, "vec", f"v{index}", words, "n=4", "guidance=cfg")
        assert np.array_equal(arrays["ddim"], made(vec, 4, {"vector": told}, guided=2.0)), words
        assert np.array_equal(arrays["cond_vector"], told.numpy())
    parts, _ = drawn(folder, "vec", "parts", "cond.vector=v.npy", "n=4", "guidance=cfg", "batch_size=3")
    whole = np.load(folder / "v2" / "samples.npz")["ddim"]
    np.testing.assert_allclose(parts["ddim"], whole, rtol=0, atol=1e-4)  # round-off of 4 steps in other batches
    assert np.abs(made(vec, 4, None) - whole).max() > 1e-2  # it is heard
    assert json.loads((folder / "v2" / "summary.json").read_text())["cond"]["vector"] == "v.npy"


def test_all_kinds_together(folder: Path, everything: Run) -> None:
    """Of held-out samples, each in turn; or from a list, a picture and a file of tokens."""
    test, cpu = everything.dataset.test, torch.device("cpu")
    index = torch.tensor([2, 3, 4, 2])
    arrays, _ = drawn(folder, "all", "test", "cond=test:2-4", "n=4", "guidance=cfg")
    assert np.array_equal(arrays["ddim"], made(everything, 4, test.cond(index, True, cpu), guided=2.0))
    assert np.array_equal(arrays["labels"], test.labels[index].numpy())
    each = [f"cond.{name}=test:2-4" for name in ("label", "image", "tokens")]
    again, _ = drawn(folder, "all", "each", *each, "n=4", "guidance=cfg")
    assert np.array_equal(again["ddim"], arrays["ddim"])
    image = everything.whole_data().dataset.train.conditions["image"]
    low, high = image.min(), image.max()
    pixels = torch.from_numpy(np.array(Image.open(folder / "x.png")))[None, None]
    tokens = torch.from_numpy(np.load(folder / "t.npy"))
    arrays, _ = drawn(folder, "all", "files", "cond.label=[0,2,1]", "cond.image=x.png", "cond.tokens=t.npy", "n=4")
    told = {
        "label": torch.tensor([0, 2, 1, 0]), "tokens": tokens.repeat(2, 1, 1),
        "image": (low + pixels / 255 * (high - low)).expand(4, 1, 4, 4),
    }  # fmt: skip
    np.testing.assert_allclose(arrays["cond_image"], told["image"].numpy(), atol=1e-6)
    told["image"] = torch.from_numpy(arrays["cond_image"])  # single precision rounds the scaling
    assert np.array_equal(arrays["ddim"], made(everything, 4, told))
    # tokens of other lengths are filled up with NaN
    rows = everything.kinds["tokens"].rows(["test:0", str(folder / "t.npy")])
    assert torch.equal(rows[0, :3].nan_to_num(9), test.conditions["tokens"][0].nan_to_num(9)) and rows.shape == (
        3,
        5,
        2,
    )
    assert bool(rows[0, 3:].isnan().all()) and torch.equal(rows[1:], tokens)


def test_where_nothing_is_said_held_out_samples_are_gone_through(folder: Path, everything: Run) -> None:
    """In the sample command, and in what training and evaluation show at their end."""
    test, cpu = everything.dataset.test, torch.device("cpu")
    arrays, done = drawn(folder, "all", "turn", "n=23")
    assert len(test) == 19 and "given the label and image and tokens of the 19 held-out samples in turn" in done.out
    expected = made(everything, 23, test.cond(torch.arange(23) % 19, True, cpu))
    assert np.array_equal(arrays["ddim"], expected)
    shown = np.load(folder / "all" / "samples.npz")
    first = made(everything, 4, test.cond(slice(4), True, cpu))
    assert np.array_equal(shown["ddim"], first)
    # and beside them the samples whose conditions these are
    cond = test.cond(torch.tensor([7, 3, 3]), True, cpu)
    assert torch.equal(real_beside(cond, everything.dataset, 8), everything.dataset.encode(test.raw[[3, 7]]))
    cond = {**cond, "image": cond["image"] + 1}
    assert len(real_beside(cond, everything.dataset, 8)) == 8


def test_a_measurement_and_a_vector_together(folder: Path, vec: Run) -> None:
    words = ("problem=inpaint", "mask=mask.npy", "input=[test:1,test:6]", "problem.std=0.1", "grid=own", "n=3")
    arrays, _ = drawn(
        folder, "vec", "both", *words, "cond.vector=[[0.3,-1],[1,1]]", "guidance=cfg", "guidance.scale=1.5"
    )  # fmt: skip
    told = torch.tensor([[0.3, -1], [1, 1], [0.3, -1]])
    for y, samples in zip(torch.from_numpy(arrays["given"]).nan_to_num() / 3, arrays["samples"], strict=True):
        seen = Observation(y, Mask(torch.tensor([True, False])), 0.1)
        method = PiGDM(ClassifierFree(vec.denoiser, 1.5), seen)
        x = SAMPLER(method, (3, 2), cond={"vector": told}, rng=Rng(seeds=range(3)))
        # y has been to raw units and back, in another batch
        np.testing.assert_allclose(samples, vec.dataset.decode(x).numpy(), rtol=0, atol=1e-4)


def test_every_input_is_told_what_belongs_to_itself(folder: Path, everything: Run) -> None:
    """All kinds at once, for two samples of each of three inputs, in batches of other sizes; or one of the kinds. What
    was told is beside the samples."""
    words = ("problem=inpaint", "mask=half.npy", "problem.std=0.1", "grid=own", "guidance=cfg", "n=2")
    arrays, _ = drawn(folder, "all", "own", *words, "input=[test:3,test:9-10]", "cond=input", "batch_size=4")
    test, seen, index = everything.dataset.test, torch.arange(4).expand(1, 4, 4) < 2, (3, 9, 10)
    for i, given, samples in zip(index, torch.from_numpy(arrays["given"]).nan_to_num(), arrays["samples"], strict=True):
        method = PiGDM(ClassifierFree(everything.denoiser, 2.0), Observation(given / 3, Mask(seen), 0.1))
        cond = test.cond(torch.tensor([i, i]), True, torch.device("cpu"))
        x = SAMPLER(method, (2, 1, 4, 4), cond=cond, rng=Rng(seeds=range(2)))
        # y has been to raw units and back, in other batches
        np.testing.assert_allclose(samples, everything.dataset.decode(x).numpy(), rtol=0, atol=1e-4)
    told = {"labels": test.labels, "cond_image": test.conditions["image"], "cond_tokens": test.conditions["tokens"]}
    for name, values in told.items():
        assert np.array_equal(arrays[name], values[list(index)].unsqueeze(1).repeat_interleave(2, 1).numpy(), True)
    labels = [[int(test.labels[i])] * 2 for i in index]
    assert json.loads((folder / "own" / "summary.json").read_text())["labels"] == labels
    # a label of each sample, beside the input's own
    own = ("cond.image=input", "cond.tokens=input", "cond.label=[2,0]")
    other, _ = drawn(folder, "all", "one", *words, "input=test:9-10", *own)
    assert other["labels"].tolist() == [[2, 0]] * 2 and np.array_equal(other["cond_image"], arrays["cond_image"][1:])
    assert json.loads((folder / "one" / "summary.json").read_text())["labels"] == [[2, 0]] * 2
    # nothing told is nothing said
    free, _ = drawn(folder, "all", "free", *words, "input=test:9")
    assert not {"labels", "cond_image", "cond_tokens"} & set(free)


def test_particles_of_each_input_are_told_its_own(folder: Path) -> None:
    """They move in a batch for each input, as those of an input alone do that is told the same by name."""
    words = ("problem=inpaint", "mask=mask.npy", "problem.std=0.1", "posterior=smc", "guidance=cfg", "n=4")
    both, _ = drawn(folder, "vec", "smc", *words, "input=test:5-6", "cond.vector=input")
    alone, _ = drawn(folder, "vec", "smc6", *words, "input=test:6", "cond.vector=test:6")
    assert np.array_equal(both["samples"][1], alone["samples"][0])
    assert np.array_equal(both["cond_vector"][1], alone["cond_vector"][0])
    wrong, _ = drawn(folder, "vec", "smc5", *words, "input=test:6", "cond.vector=test:5")
    assert np.abs(wrong["samples"] - alone["samples"]).max() > 1e-2  # it is heard
    mixed = command("sample", *DRAW, "run=vec", *words, "input=test:6", "cond.vector=test:5-6", "out=no", cwd=folder)
    assert mixed.code == 1 and "move together under one condition: cond.vector has one row" in mixed.err, mixed.err


def test_inputs_with_their_own_conditions_go_on_where_they_stopped(folder: Path) -> None:
    words = (*DRAW, "run=vec", "problem=inpaint", "mask=mask.npy", "input=test:2-3", "n=2", "out=half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoresde.cli.sample, "write_restored", stop)
        assert command("sample", *words, "cond=input", cwd=folder).code == 130
    batches = {path: path.read_bytes() for path in folder.glob("half/batches/*/*")}
    other = command("sample", *words, "cond=test:2-3", cwd=folder)
    assert other.code == 1 and "half/batches holds batches made with" in other.err, other.err
    assert batches and {path: path.read_bytes() for path in folder.glob("half/batches/*/*")} == batches
    assert command("sample", *words, "cond=input", cwd=folder).code == 0


def test_what_no_input_is_known_to_be_told_is_refused(vec: Run) -> None:
    """A file among the inputs, a model that was trained with other samples held out, and no problem at all."""
    test, seen = vec.dataset.test, torch.ones(2, dtype=torch.bool)
    truth = vec.dataset.encode(test.raw[[1, 4]])

    def problem(truth: Tensor, *inputs: str) -> Problem:
        return Problem(Observation(None, Mask(seen)), truth, seen, None, truth, list(inputs))

    cond, _ = choose_cond("input", 2, vec, problem=problem(truth, "test:1", "test:4"))
    assert isinstance(cond, dict) and torch.equal(cond["vector"], test.conditions["vector"][[1, 1, 4, 4]])
    others = "vec, which knows each vector, holds out other samples"
    for given, words in (
        (problem(truth, "test:1", "x.png"), "cond.vector=input: no vector is known of x.png, which is a file"),
        (problem(truth.flip(0), "test:1", "test:4"), others),
        (problem(truth, "test:1", "test:20"), others),
        (None, "cond.vector=input is the vector of what a problem is given; say which: problem=inpaint input=test:0-7"),
    ):
        with pytest.raises(ConfigError) as error:
            choose_cond({"vector": "input"}, 2, vec, problem=given)
        assert words in str(error.value)


def test_held_out_samples_keep_their_own_conditions(folder: Path, vec: Run) -> None:
    settings = ("likelihood.solver.rtol=1e-3", "likelihood.solver.atol=1e-3", "n=5", "out=nats", "threads=1")
    done = command("likelihood", "run=vec", *settings, cwd=folder)
    assert done.code == 0, done.err
    found, test = np.load(folder / "nats" / "bits_per_dim.npz"), vec.dataset.test
    index = torch.from_numpy(found["index"])

    def bits(told: Tensor) -> np.ndarray:
        result = log_likelihood(
            vec.denoiser, test.raw[index], Tolerance(1e-3, 1e-3), cond={"vector": told}, rng=Rng(seeds=index.tolist()),
            scaling=vec.dataset.scaling,
        )  # fmt: skip
        return bits_per_dim(result.log_prob, (2,)).double().numpy()

    assert np.array_equal(found["bits_per_dim"], bits(test.conditions["vector"][index]))
    assert np.abs(found["bits_per_dim"] - bits(test.conditions["vector"][index + 1])).max() > 1e-3


def stop(*_, **__) -> None:
    raise KeyboardInterrupt


def test_another_file_under_the_same_name_is_another_command(folder: Path) -> None:
    np.save(folder / "mine.npy", np.array([1.0, 0.5]))
    words = (*DRAW, "run=vec", "cond.vector=mine.npy", "n=4", "out=stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoresde.cli.sample, "write_samples", stop)
        assert command("sample", *words, cwd=folder).code == 130
    np.save(folder / "mine.npy", np.array([1.0, 0.6]))
    done = command("sample", *words, cwd=folder)
    assert done.code == 1 and "stopped/batches holds batches made with told=" in done.err, done.err
    np.save(folder / "mine.npy", np.array([1.0, 0.5]))
    assert command("sample", *words, cwd=folder).code == 0


WRONG = {
    "vec cond.vector=[1,2,3]": "expected a vector of shape (2,), or several, (n, 2) | got [1, 2, 3] of shape (3,)",
    "vec cond.vector=0.5": "got 0.5 of shape ()",
    "vec cond.vector=[[1,2],[3]]": "got [[1, 2], [3]]",
    "vec cond.vector=[a,b]": "got 'a'",
    "vec cond.vector=[true,1]": "got [True, 1]",
    "vec cond.vector=[]": "got []",
    "vec cond.vector=[1,.nan]": "NaN or infinite numbers among others",
    "vec cond.vector=[1,1e60]": "NaN or infinite numbers among others",
    "vec cond.vector=gap.npy": "gap.npy: expected a vector | NaN or infinite",
    "vec cond.vector=[1,200]": "cond.vector: numbers from 1 to 200 are far from those | -3 … 3",
    "vec cond.vector=lost.npy": "There is no file | lost.npy",
    "vec cond.vector=text.npy": "text.npy: expected an array of numbers, found dtype <U1",
    "vec cond.vector=x.png": "expected a vector of shape (2,), which no picture holds; give it as .npy",
    "vec cond.vector=test:20": "cond.vector=test:20: held-out samples are test:0 … test:19",
    "vec cond=test:x": "=test:x: held-out samples are",
    "vec cond=input": "cond.vector=input is the vector of what a problem is given",
    "vec cond=7": "cond is a mapping with the keys label, vector, image, tokens | got 7",
    "vec cond.colour=7": "cond is a mapping with the keys label",
    "vec cond.label=1": "cond.label=1: | vec was trained with a vector of shape (2,), and no label",
    "all cond.image=input cond.tokens=test:0 cond.label=0": "cond.image=input is the image of what a problem is",
    "all cond.label=1 cond.image=x.png": "together: give cond.tokens=… too, or cond=test:0-7",
    "all cond.image=test:0 cond.tokens=test:0 cond.label=3": "cond.label is a class 0 … 2, or a list; got 3",
    "all cond.label=0 cond.tokens=test:0 cond.image=small.png": "small.png: expected an image | shape (1, 3, 4)",
    "all cond.label=0 cond.tokens=test:0 cond.image=large.npy": "large.npy: numbers from 255 to 255 are far from those",
    "all cond.label=0 cond.image=test:0 cond.tokens=[1,2]": "tokens of shape (L, 2), or several, (n, L, 2)",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told(words: str, vec: Run, everything: Run, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    name, *typed = words.split()
    cond = OmegaConf.to_container(OmegaConf.from_dotlist(typed))["cond"]
    with pytest.raises((ValueError, OSError)) as error:
        choose_cond(cond, 4, {"vec": vec, "all": everything}[name])
    assert all(part in str(error.value) for part in WRONG[words].split(" | "))


@pytest.mark.parametrize("words", ["cond.vector=[1,nan]", "cond.vector=lost.npy", "cond=test:99", "cond.tokens=t.npy"])
def test_a_refused_command_leaves_no_folder(words: str, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    done = command("sample", *DRAW, "run=vec", words, "out=wrong", cwd=folder)
    last = done.err.strip().splitlines()[-1]
    assert done.code == 1 and last.startswith("error: ") and "Traceback" not in done.err, done.err
    assert {path.name for path in folder.iterdir()} == before
