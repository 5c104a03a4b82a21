"""`scoresde.load`: a run folder that was moved, its data gone, samples and scores raw data like the run it was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command, sampled

import scoresde
from scoresde import DDIM, Budget, ClassifierFree, Exact, Rng, Sampler, log_likelihood
from scoresde.codecs import Scaling
from scoresde.data import Arrays, Dataset, Split
from scoresde.data.excerpt import excerpt, packed, unpacked
from scoresde.data.kinds import kinds_of
from scoresde.runs.checkpoint import CheckpointError
from scoresde.runs.load import load_run
from scoresde.runs.run import Run

DOCS = Path(__file__).parents[2] / "docs" / "python.md"
OPTIONS = tuple(option for option in TINY if not option.startswith("data"))
SAMPLER = Sampler(DDIM(), steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`moved`, a run on small integers of three classes, which was `run`; its data were in `gone.npz`."""
    folder, generator = tmp_path_factory.mktemp("load"), np.random.default_rng(0)
    labels = generator.integers(0, 3, 200)
    np.savez(
        folder / "data.npz", x=(labels[:, None] * 3 + generator.integers(0, 4, (200, 2))).astype("uint8"), y=labels
    )
    train = command(
        "train", *OPTIONS, *PLAIN, "data=arrays", f"data.path={folder}/data.npz", "data.key=x", "data.label_key=y",
        "data.levels=11", "conditional=true", "network.cond_dropout=0.3", "evaluate_at_end=false", "out=run",
        cwd=folder,
    )  # fmt: skip
    assert train.code == 0, train.err
    (folder / "with-data").mkdir()
    shutil.copytree(folder / "run", folder / "with-data" / "old")
    (folder / "with-data" / "old" / "excerpt.safetensors").unlink()
    # as it is loaded from all of the data, like the folders of before
    before = load_run(folder / "with-data" / "old")
    (folder / "elsewhere").mkdir()
    (folder / "run").rename(folder / "elsewhere" / "moved")
    (folder / "data.npz").rename(folder / "gone.npz")
    moved = scoresde.load(folder / "elsewhere" / "moved")
    assert (moved.denoiser.data_std, moved.denoiser.roughness) == (before.denoiser.data_std, before.denoiser.roughness)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return scoresde.load(str(folder / "elsewhere" / "moved"))


def test_the_session_in_the_docs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (page,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "runs").mkdir()
    shutil.copytree(folder / "elsewhere" / "moved", tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(page, names)
    assert names["raw"].shape == (16, 2) and bool(names["score"].bits_per_dim.isfinite().all())


def test_it_is_what_was_trained(run: Run) -> None:
    assert run.event_shape == (2,) and run.classes == ("0", "1", "2") and run.config["seed"] == 0
    assert isinstance(run.codec, scoresde.Codec) and run.codec == Scaling(levels=11)
    assert run.denoiser.data_std == pytest.approx(run.dataset.statistics.data_std) and run.denoiser.roughness < np.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_draw_samples_and_a_likelihood_asks_for_32(run: Run, dtype: torch.dtype) -> None:
    """The state stays float32, and the last prediction is that of float32 weights to their precision.

    Of 4 layers each rounds its input, weights and output, by half an epsilon at most: 4 · 3/2 epsilon of what it is.
    """
    half = scoresde.load(run.folder).to(dtype=dtype)
    x, t, cond = torch.randn(8, 2), torch.tensor(0.5), torch.arange(8) % 3
    eps, exact = half.denoiser(x, t, cond).eps, run.denoiser(x, t, cond).eps
    assert eps.dtype == torch.float32
    assert float((eps - exact).abs().max()) < 6 * torch.finfo(dtype).eps * float(exact.abs().max())
    made = half.sample(3, sampler=SAMPLER, progress=False)
    assert made.shape == (3, 2) and made.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"run.to\(dtype=torch.float32\) first"):
        half.log_likelihood(made, solver=Budget(5))


def test_the_state_of_torch_changes_nothing(run: Run) -> None:
    torch.set_default_dtype(torch.float64)
    with torch.inference_mode():
        again = scoresde.load(run.folder)
    torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in again.denoiser.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in again.denoiser.parameters())
    assert torch.equal(*(one.sample(3, sampler=SAMPLER, progress=False) for one in (run, again)))


def test_samples_are_raw_and_each_depends_on_its_seed_alone(run: Run) -> None:
    made = run.sample(7, sampler=SAMPLER, rng=Rng(3), progress=False)
    assert made.dtype == torch.uint8 and made.shape == (7, 2)
    assert torch.equal(made, run.sample(7, sampler=SAMPLER, rng=Rng(3), batch_size=2, progress=False))
    rng = Rng(3)
    again = [run.sample(7, sampler=SAMPLER, rng=rng, progress=False) for _ in range(2)]
    assert torch.equal(again[0], made) and not torch.equal(again[1], made)  # a stream goes on


def test_the_command_makes_the_same_samples_without_the_data(folder: Path, run: Run) -> None:
    options = ["run=elsewhere/moved", "pictures=false", "threads=1", *PLAIN[1:], "seeds=[5,6]", "cond.label=1"]
    made = sampled(options, folder, "drawn")
    mine = run.sample(2, cond=1, sampler=SAMPLER, rng=Rng(seeds=[5, 6]), progress=False)
    np.testing.assert_array_equal(made["ddim"], mine)


def test_a_likelihood_is_that_of_raw_values(run: Run) -> None:
    raw = torch.tensor([[0, 3], [5, 5], [9, 6]], dtype=torch.uint8)
    how = {"divergence": Exact(), "solver": Budget(12)}
    mine = run.log_likelihood(raw, **how, rng=Rng(seeds=[1, 2, 3]), batch_size=2, progress=False)
    whole = log_likelihood(run.denoiser, raw, scaling=run.codec, rng=Rng(seeds=[1, 2, 3]), **how)
    torch.testing.assert_close(mine.log_prob, whole.log_prob)
    torch.testing.assert_close(mine.bits_per_dim, -whole.log_prob / (2 * np.log(2)))
    assert mine.stderr.shape == (3,) and mine.evaluations == 2 * whole.evaluations
    told = run.log_likelihood(raw, **how, cond=[0, 1, 2], rng=Rng(seeds=[1, 2, 3]), progress=False)
    assert not torch.equal(told.log_prob, mine.log_prob)


def test_raw_values_may_come_as_an_array(run: Run) -> None:
    raw = np.array([[0, 3]], dtype=np.int64)
    assert torch.equal(run.encode(raw), run.encode(torch.tensor([[0, 3]])))
    assert torch.equal(run.decode(run.encode(raw)), torch.tensor([[0, 3]], dtype=torch.uint8))


def test_an_exported_file_is_the_run(run: Run, tmp_path: Path) -> None:
    path = run.export(tmp_path / "one.safetensors")
    again = scoresde.load(path)
    assert (again.digest, again.step, again.classes) == (run.digest, run.step, run.classes)
    assert (again.denoiser.data_std, again.denoiser.roughness) == (run.denoiser.data_std, run.denoiser.roughness)
    how = {"budget": 5, "cond": 2, "guidance": 1.5, "progress": False}
    assert torch.equal(again.sample(3, **how), run.sample(3, **how))
    assert scoresde.load(again.export(tmp_path / "two.safetensors")).digest == run.digest
    with pytest.raises(ValueError, match="holds one set of weights, ema"):
        scoresde.load(path, weights="weights")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"one.safetensors is no whole file of scoresde"):
        scoresde.load(path)
    with pytest.raises(CheckpointError, match=r"holds no run; run.export"):
        scoresde.load(run.folder / "excerpt.safetensors")


def test_guidance_is_a_scale_or_what_conf_has(run: Run) -> None:
    how = {"cond": 2, "sampler": SAMPLER, "rng": Rng(seeds=[4]), "progress": False}
    node = {"_target_": "scoresde.ClassifierFree", "_partial_": True, "scale": 3.0, "rescale": 0.0}
    mine = run.sample(1, **how, guidance=3)
    x = SAMPLER(ClassifierFree(run.denoiser, 3.0), (1, 2), cond=torch.tensor([2]), rng=Rng(seeds=[4]))
    assert torch.equal(mine, run.decode(x))
    assert torch.equal(run.sample(1, **how | {"rng": Rng(seeds=[4])}, guidance=node), mine)


def test_the_held_out_samples_are_measured_without_the_data(folder: Path) -> None:
    """They are few, and kept whole."""
    options = ("run=elsewhere/moved", "n=4", "threads=1", "likelihood.solver.rtol=1e-2", "likelihood.solver.atol=1e-2")
    done = command("likelihood", *options, "out=scored", cwd=folder)
    assert done.code == 0 and (folder / "scored" / "likelihood.json").exists(), done.err
    assert "cannot be read again" in done.out + done.err
    assert re.search(r"keeps (\d+) of the \1 held-out samples", done.out + done.err)


def test_it_is_shown_in_a_line(run: Run) -> None:
    assert repr(run) == f"Run({str(run.folder)!r}: samples of data (2,) given label, step {run.step})"


def test_conditions_are_names_numbers_or_a_mapping(run: Run) -> None:
    for given in ("1", 1, [1], torch.tensor(1), {"label": 1}, {"label": ["1"]}):
        assert torch.equal(run.cond(given, 3), torch.tensor([1, 1, 1]))
    assert torch.equal(run.cond([2, 0], 3), torch.tensor([2, 0, 2]))
    assert torch.equal(run.cond(None, 4), torch.tensor([0, 1, 2, 0]))


def test_classes_are_called_by_name() -> None:
    split = Split(torch.zeros(4, 1), torch.tensor([0, 1, 2, 0]))
    dataset = Dataset("d", split, split, Scaling.identity(), 3, class_names=("2", "cat", "1"))
    kind = kinds_of(dataset, always=False)["label"]
    assert kind.rows("cat").tolist() == [1]
    assert kind.rows(["1", "2", "cat"]).tolist() == [2, 0, 1] and kind.rows([0]).tolist() == [0]
    with pytest.raises(ValueError, match="class 2 is called '1', and another is called '2'"):
        kind.rows(2)
    with pytest.raises(ValueError, match=r"a class 0 … 2 \(called 2, cat, 1\), or a list; got 'dog'"):
        kind.rows("dog")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda run: run.sample(0), "n, the number of samples, is a whole number"),
        (lambda run: run.sample(2, budget=5, sampler=SAMPLER), "not both"),
        (lambda run: run.sample(2, cond=3), "a class 0 … 2"),
        (lambda run: run.sample(2, cond="cat"), "a class 0 … 2"),
        (lambda run: run.sample(2, cond=[0, 1, 2]), "3 rows of label for 2 samples"),
        (lambda run: run.sample(2, cond={"vector": [1.0]}), "trained with a class 0 … 2, and no vector"),
        (lambda run: run.sample(2, rng=Rng(seeds=[1])), "one seed for each sample"),
        (lambda run: run.log_likelihood(torch.zeros(2, dtype=torch.uint8), solver=Budget(5)), r"raw\[None\]"),
        (lambda run: run.log_likelihood(torch.zeros(1, 3, dtype=torch.uint8), solver=Budget(5)), r"\(B, 2\)"),
        (lambda run: run.log_likelihood(torch.full((1, 2), 12), solver=Budget(5)), "integers 12 … 12"),
        (lambda run: run.to(dtype=torch.int32), "torch.bfloat16"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(run: Run, wrong, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        wrong(run)


def test_other_data_are_scored_under_the_codec_of_the_run(run: Run) -> None:
    """Which their own loader would have scaled otherwise."""
    split = Split(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8))
    mine = run.adopt(Dataset("other", split, split, Scaling(levels=256)))
    assert mine.scaling == mine.codec == run.codec and torch.equal(mine.test.raw, split.raw)
    with pytest.raises(ValueError, match=r"of shape \(3,\).*on \(2,\)"):
        wide = Split(torch.zeros(2, 3, dtype=torch.uint8))
        run.adopt(Dataset("other", wide, wide, Scaling(levels=256)))


def test_data_that_are_asked_for_and_gone_are_missed_in_words(folder: Path, run: Run) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read again: .*no file .*data.npz"):
        run.whole_data()
    with pytest.raises(CheckpointError, match=r"cannot be read again: .*no file .*data.npz"):
        scoresde.load(folder / "with-data" / "old")  # of an older version, which keeps nothing


def test_a_damaged_excerpt_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "elsewhere" / "moved", tmp_path / "run")
    path = tmp_path / "run" / "excerpt.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), b"", content[:40]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"excerpt.safetensors is no whole file"):
            scoresde.load(tmp_path / "run")


def test_an_excerpt_has_what_it_was_taken_from(tmp_path: Path) -> None:
    """Evenly spaced held-out samples with their conditions, and the numbers of all; packed, it is the same."""
    generator = np.random.default_rng(0)
    v = generator.standard_normal((4000, 3)).astype("float32")
    v[::100] = np.nan
    np.savez(tmp_path / "x.npz", x=generator.random((4000, 700)), v=v)
    whole = Arrays(f"{tmp_path}/x.npz", "x", cond_keys={"vector": "v"}, raw_low=0, raw_high=1, test_fraction=0.5)
    few = excerpt(whole)
    size = 4 * 703
    assert len(few.test) == 2**20 // size and len(few.train) == 16 and not few.complete and whole.complete
    assert few.statistics == whole.statistics and few.statistics.gaps and few.statistics.held_out == 2000
    assert torch.equal(few.test.raw[1], whole.test.raw[2000 // len(few.test)])
    tensors, record = packed(few)
    again = unpacked(tensors, record, Scaling())
    assert again.statistics == few.statistics and torch.equal(again.test.raw, few.test.raw)
    assert torch.equal(again.test.conditions["vector"].isnan(), few.test.conditions["vector"].isnan())
