"""Inverse problems as they are typed: restored samples against the closed-form posterior of a Gaussian, in the units
of the files, and mistakes that are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, tree
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import scoresde.cli.sample
from scoresde import (
    VPSDE,
    Blur,
    ColourMix,
    DownSample,
    GaussianMixtureDenoiser,
    Mask,
    Rng,
)
from scoresde.cli.problem import read_mask, read_problem
from scoresde.codecs import Scaling
from scoresde.config import config_dir, resolved
from scoresde.data import Dataset, Split
from scoresde.evaluate.figures import restored
from scoresde.runs.run import Run

FAST = ("run=run", "sampler=dpmpp", "sampler.steps=20", "grid=log_snr", "threads=1", "pictures=false")
LUMA = torch.tensor([[0.299, 0.587, 0.114]])
HALF = (torch.arange(4) < 2).expand(1, 4, 4)  # the left half


def smooth(channels: int, size: int) -> Tensor:
    """(D, D): neighbouring pixels, and channels of one, are alike; standard deviation 0.3."""
    at = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    space = torch.exp(-0.5 * (torch.cdist(at, at) / 1.5) ** 2)
    colours = 0.6 + 0.4 * torch.eye(channels, dtype=torch.float64)
    return 0.09 * (0.9 * torch.kron(colours, space) + 0.1 * torch.eye(channels * size**2))


def gaussian(channels: int, levels: int | None = 256, size: int = 4) -> tuple[GaussianMixtureDenoiser, Dataset]:
    """p(x) = N(0.1, smooth), and 20 held-out samples of it in integer `levels`, or in raw units −5 … 5."""
    event = (channels, size, size)
    p = GaussianMixtureDenoiser(torch.full((1, *event), 0.1), smooth(channels, size)[None], torch.ones(1), VPSDE())
    scaling = Scaling(levels=levels) if levels else Scaling(-1, 1, None, -5, 5)
    raw = scaling.decode(p.sample(40, rng=Rng(3)).float().clamp(-0.999, 0.999))
    return p, Dataset("gaussian", Split(raw[:20]), Split(raw[20:]), scaling)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[GaussianMixtureDenoiser, Dataset]]:
    """The command in `tmp_path`, with an exact model as the run that it loads."""
    (tmp_path / "run").mkdir()

    def use(*arguments, **options) -> tuple[GaussianMixtureDenoiser, Dataset]:
        p, dataset = gaussian(*arguments, **options)
        model = Run(Path("run"), {"network": {}}, 1, "exact", dataset, p, conditional=False)
        monkeypatch.setattr(scoresde.cli.sample, "chosen_run", lambda options, allow: model)
        return p, dataset

    return use


def sampled(folder: Path, *arguments: str) -> dict[str, np.ndarray]:
    done = command("sample", *FAST, *arguments, cwd=folder)
    assert done.code == 0, done.err
    return dict(np.load(folder / next(a[4:] for a in arguments if a.startswith("out=")) / "samples.npz"))


def posterior(p: GaussianMixtureDenoiser, a: Tensor, y: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of x | y = A x + std · noise, by dense algebra."""
    mean, cov = p.means[0], smooth(p.event_shape[0], p.event_shape[1])
    gain = cov @ a.mT @ torch.linalg.inv(a @ cov @ a.mT + std**2 * torch.eye(len(a)))
    return mean + gain @ (y.double() - a @ mean), (cov - gain @ a @ cov).diagonal().sqrt()


def dense(operator: Callable[[Tensor], Tensor], event: tuple[int, ...]) -> Tensor:
    """(rows that are not 0, D)."""
    a = operator(torch.eye(int(np.prod(event)), dtype=torch.float64).reshape(-1, *event)).flatten(1).mT
    return a[(a != 0).any(1)]


def picture(path: Path, pixels: np.ndarray) -> None:
    """Writes (C, H, W) uint8."""
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)


CASES = {
    "superres": (1, DownSample(2), ("problem.operator.factor=2",)),
    "deblur": (1, Blur(0.7), ("problem.operator.std=0.7",)),
    "colourise": (3, ColourMix(LUMA), ()),
    "inpaint": (1, Mask(HALF), ("mask=mask.png",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_restored_pictures_are_of_the_posterior(name: str, tmp_path: Path, known) -> None:
    """Mean and standard deviation of 300 samples against the closed form: with 48 entries, 4.5 standard errors
    (s/√n of the mean, s/√2n of s), and 3 % of the prior's 0.3 for 14 steps of order 2."""
    channels, operator, more = CASES[name]
    p, dataset = known(channels)
    # what was measured, as a camera would write it
    clean = dataset.encode(dataset.test.raw[:1])
    pixels = ((operator(clean)[0] + 1) * 128).floor().clamp(0, 255).numpy().astype(np.uint8)
    picture(tmp_path / "y.png", pixels)
    picture(tmp_path / "mask.png", 255 * HALF.numpy().astype(np.uint8))
    made = sampled(
        tmp_path, f"problem={name}", "posterior=mmps", "input=y.png", "problem.std=0.1", "posterior.tolerance=1e-6",
        "posterior.iterations=64", *more, "sampler.steps=14", "n=300", "out=o",
    )  # fmt: skip
    y = 2 * (torch.from_numpy(pixels).double() + 0.5) / 256 - 1
    a = dense(operator, p.event_shape)
    mean, std = posterior(p, a, y.flatten() if name != "inpaint" else y[HALF], 0.1)
    n, width = 300, 256 / 2  # levels to a unit of model data
    got, spread = (torch.from_numpy(made[key][0]).double().flatten() for key in ("mean", "std"))
    assert bool(((got - ((mean + 1) * width - 0.5)).abs() < width * (4.5 * std / n**0.5 + 0.01)).all())
    assert bool(((spread - width * std).abs() < width * (4.5 * std / (2 * n) ** 0.5 + 0.01)).all())
    # the arrays agree among themselves, and say what was given in the units of the file
    assert made["samples"].shape == (1, n, *p.event_shape) and made["samples"].dtype == np.uint8
    where = HALF.numpy() if name == "inpaint" else np.ones(pixels.shape, bool)
    np.testing.assert_allclose(made["given"][0][where], pixels[where], atol=1e-3)
    assert np.isnan(made["given"][0][~where]).all() and "truth" not in made
    assert ("mask" in made) == (name == "inpaint")


@pytest.mark.parametrize("method", ["diffpir", "dps", "mmps", "pigdm", "repaint", "replacement", "smc", "tmpd"])
def test_every_method_restores(method: str, tmp_path: Path, known) -> None:
    """A x of its samples misses y by about the noise (exactly so: E r² = (y − A m)² + diag A Σ Aᵀ), where the prior's
    misses by its own spread of 0.3; and seven others are no worse than three times the exact one."""
    p, _ = known(1)
    more = {"smc": ("sampler.steps=40",), "repaint": ("posterior.jump=2", "posterior.repeats=3")}.get(method, ())
    made = sampled(
        tmp_path, "problem=superres", "problem.operator.factor=2", f"posterior={method}", "input=[test:0,test:1]",
        "n=64", "problem.std=0.05", *more, "out=o",
    )  # fmt: skip
    record = json.loads((tmp_path / "o" / "summary.json").read_text())
    a, squares = dense(DownSample(2), p.event_shape), []
    ys = (torch.from_numpy(made["given"]) + 0.5) / 128 - 1
    for y in ys:
        mean, _ = posterior(p, a, y.flatten(), 0.05)
        cov = torch.linalg.inv(torch.linalg.inv(smooth(1, 4)) + a.mT @ a / 0.05**2)
        squares.append((y.flatten() - a @ mean) ** 2 + (a @ cov @ a.mT).diagonal())
    exact = float(torch.stack(squares).mean().sqrt())
    found = record["restored"]["dpmpp"]
    assert exact / 3 < found["residual"] < 3 * exact and found["std"] == 0.05
    if method in ("mmps", "pigdm"):  # 512 numbers: 10 % are 3 standard errors
        assert found["residual"] == pytest.approx(exact, rel=0.1 if method == "mmps" else 0.3)
    assert record["posterior"]["_target_"].startswith("scoresde.") and record["inputs"] == ["test:0", "test:1"]
    # of the mean of a posterior, better than of its samples
    assert found["psnr_mean"] > found["psnr_sample"] + 1


def test_held_out_samples_are_degraded_with_noise_of_their_own(tmp_path: Path, known) -> None:
    dataset = known(1, size=8)[1]
    options = ("problem=superres", "problem.operator.factor=2", "problem.std=0.2", "posterior=pigdm", "n=3")
    made = sampled(tmp_path, *options, "input=[test:4-9,test:0]", "batch_size=5", "out=a")
    index = [4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(made["truth"], dataset.test.raw[index].numpy())
    assert made["inputs"].tolist() == [f"test:{i}" for i in index]
    clean = DownSample(2)(dataset.test.raw[index].double()).numpy()
    noise = (made["given"] - clean) / 128
    # 7 × 16 draws: 3.5 standard errors of the mean and of the standard deviation
    assert abs(noise.mean()) < 3.5 * 0.2 / 112**0.5 and abs(noise.std() / 0.2 - 1) < 3.5 / 224**0.5
    assert all(np.abs(noise[i] - noise[j]).min() > 1e-4 for i in range(7) for j in range(i))
    # an input alone: the same noise and, to round-off, the same samples
    alone = sampled(tmp_path, *options, "input=test:0", "out=b")
    assert np.array_equal(alone["given"][0], made["given"][-1])
    assert np.abs(alone["samples"][0].astype(int) - made["samples"][-1].astype(int)).max() <= 1
    # PSNR from the arrays, in levels; samples there are cut to whole ones
    record = json.loads((tmp_path / "a" / "summary.json").read_text())["restored"]["dpmpp"]
    error = ((made["mean"] - made["truth"]) ** 2).mean()
    assert record["psnr_mean"] == pytest.approx(10 * np.log10(256**2 / error), abs=0.01)
    # the same sample from a file
    np.save(tmp_path / "clean.npy", dataset.test.raw[0].numpy())
    picture(tmp_path / "clean.png", dataset.test.raw[0].numpy())
    both = sampled(tmp_path, *options, "input=[clean.npy,clean.png]", "simulate=true", "out=c")
    assert all(np.array_equal(both[key][k], alone[key][0]) for key in ("truth", "given") for k in (0, 1))
    other = sampled(tmp_path, *options, "input=clean.png", "simulate=true", "seed=1", "out=d")
    assert np.abs(other["given"] - alone["given"]).min() > 0


@pytest.mark.parametrize("levels", [17, None])
def test_arrays_are_in_the_units_of_the_data(levels: int | None, tmp_path: Path, known) -> None:
    """Of a projection, which keeps no mean, y of raw values v is A v: its samples fit it in those units."""
    dataset = known(1, levels)[1]
    node = ("problem=deblur", "problem.operator._target_=scoresde.RandomProjection", "~problem.operator.edges",
            "~problem.operator.std", "+problem.operator._partial_=true", "+problem.operator.rows=6")  # fmt: skip
    matrix = Rng(0).normal((1, 96), dtype=torch.float64).reshape(6, 16) / 4
    v = dataset.test.raw[2].double().flatten()
    np.save(tmp_path / "y.npy", (matrix @ v).numpy())
    made = sampled(tmp_path, *node, "input=y.npy", "problem.std=0.001", "posterior=pigdm", "n=20", "out=o")
    np.testing.assert_allclose(made["given"][0], matrix @ v, rtol=1e-5, atol=1e-4)
    slope = 2 / (levels or 10)
    gap = torch.from_numpy(made["mean"][0]).double().flatten() @ matrix.mT - matrix @ v
    # far below the spread of A v under the prior, 0.3/slope
    assert float(gap.abs().max()) < 0.02 / slope
    # a picture spans the range of the data: level p of 256 is (p + 1/2)/256 of it
    picture(tmp_path / "flat.png", np.full((1, 2, 2), 200, np.uint8))
    made = sampled(tmp_path, "problem=superres", "problem.operator.factor=2", "input=flat.png", "n=1", "out=p")
    raw = 200.5 / 256 * 17 - 0.5 if levels else -5 + 10 * 200.5 / 256
    np.testing.assert_allclose(made["given"], raw, rtol=1e-5)


def files(folder: Path) -> None:
    """Right and wrong ones for samples of 1 × 4 × 4 in 256 levels."""
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (1, 4, 4), np.uint8), rng.integers(0, 256, (3, 4, 4), np.uint8)
    picture(folder / "grey.png", grey)
    picture(folder / "colour.png", colour)
    picture(folder / "small.png", grey[:, :2, :2])
    Image.fromarray(rng.integers(0, 256, (4, 4, 4), np.uint8), "RGBA").save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 60000, (4, 4), np.uint16)).save(folder / "deep.png")
    half = 255 * HALF.numpy().astype(np.uint8)
    picture(folder / "mask.png", half)
    picture(folder / "empty.png", 0 * half)
    picture(folder / "shades.png", grey)
    picture(folder / "narrow.png", half[:, :, 1:3])
    (folder / "text.png").write_text("hello")
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "none.png").touch()
    (folder / "dir.png").mkdir()
    for name, values in {
        "nan": np.full((1, 4, 4), np.nan), "far": np.full((1, 4, 4), 300.0), "low": np.full((4, 4), -90.0),
        "words": np.array(["a"]), "object": np.array([{}], dtype=object), "wide": np.zeros((1, 4, 5)),
        "two": np.array([[0, 1, 2, 0]] * 4),
    }.items():  # fmt: skip
        np.save(folder / f"{name}.npy", values, allow_pickle=True)


# told where the command line is read
COMMANDS = {
    "problem=inpant input=grey.png": "There is no problem=inpant. Did you mean 'inpaint'?",
    "input=grey.png": "input=grey.png is part of a problem; say which: problem=inpaint",
    "problem=inpaint mask=mask.png": "A problem needs what was measured: input=photo.png",
    "problem=superres problem.operator.factr=2": "Did you mean 'problem.operator.factor'?",
    "problem=superres input=grey.png": "of 1 × 1 pixels, found 4 × 4. To degrade a clean sample instead: simulate=true",
    "problem=superres input=test:0 posterior=mmsp": "There is no posterior=mmsp. Did you mean 'mmps'?",
    "problem=superres input=test:0 posterior.iterations=0": "posterior: iterations is a whole number of at least 1",
    "problem=superres input=test:0 posterior=smc batch_size=4": "The n=16 particles of an input move together",
    "problem=superres input=test:0 guidance=cfg": "guidance=cfg steers towards a condition, and run was",
    "problem=superres input=test:0 cond.label=3": "cond.label=3: run was trained without labels",
    "problem=superres input=test:0 n=0": "n is a whole number of at least 1; got 0",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_wrong_command_is_told_and_leaves_no_folder(words: str, tmp_path: Path, known) -> None:
    known(1)
    files(tmp_path)
    before = tree(tmp_path)
    done = command("sample", *FAST, *words.split(), "out=wrong", cwd=tmp_path)
    lines = [line.strip() for line in done.err.splitlines() if line.strip().startswith("error: ")]
    assert done.code == 1 and "Traceback" not in done.err and COMMANDS[words] in lines[-1], done.err
    assert tree(tmp_path) == before


INPAINT, SUPER = "name=inpaint mask=mask.png ", "name=superres operator.factor=2 "
WRONG = {
    "name=none input=grey.png": "input=grey.png is part of a problem",
    "name=none mask=mask.png": "mask=mask.png is part of a problem",
    "name=none simulate=true": "simulate=True is part of a problem",
    "name=superres input=grey.png simulate=maybe": "simulate is true or false; got 'maybe'",
    "name=inpaint input=grey.png": "Give the mask, .* mask=mask.png",
    SUPER + "input=small.png mask=mask.png": "scoresde.DownSample takes no mask",
    INPAINT + "input=lost.png": "There is no file .*lost.png (the nearest folder that exists is",
    INPAINT + "input=dir.png": "dir.png: expected a file, found a folder",
    INPAINT + "input=text.png": "text.png: expected an image, found a damaged or other file",
    INPAINT + "input=pointer.png": "pointer.png is a Git-LFS pointer",
    INPAINT + "input=none.png": "none.png is empty (0 bytes)",
    INPAINT + "input=small.png": "small.png: expected what was measured of 4 × 4 pixels, found 2 × 2",
    INPAINT + "input=colour.png": "colour.png: expected a grey image, found colours",
    INPAINT + "input=alpha.png": "alpha.png: expected a grey or RGB image, found mode RGBA with transparency",
    INPAINT + "input=deep.png": "deep.png: expected a single 8-bit image, found 16 bits a channel",
    INPAINT + "input=nan.npy": "nan.npy holds NaN or infinite values",
    INPAINT + "input=far.npy": "far.npy: expected values 0 … 255 as the data of the run have, found 300 … 300",
    INPAINT + "input=low.npy": "low.npy: expected values 0 … 255 as the data of the run have, found -90 … -90",
    INPAINT + "input=wide.npy": "wide.npy: expected what was measured of shape (1, 4, 4), found (1, 4, 5)",
    INPAINT + "input=words.npy": "words.npy: expected an array of numbers, found dtype <U1",
    INPAINT + "input=object.npy": "object.npy: expected numbers, found dtype object",
    INPAINT + "input=far.npy simulate=true": "far.npy: expected values 0 … 255",
    INPAINT + "input=test:20": "input=test:20: held-out samples are test:0 … test:19",
    INPAINT + "input=test:7-5": "input=test:7-5: held-out samples are test:0 … test:19",
    INPAINT + "input=test:x": "input=test:x: held-out samples are test:0 … test:19",
    INPAINT + "input=3": "input is a file, test:5, or a list of such: .*got 3",
    INPAINT + "input=[]": "input is an empty list",
    INPAINT + "input=[test:0,grey.png]": "Inputs are all test:… (or simulate=true), or all measured",
    INPAINT + "input=grey.png std=-1": "problem: std is a noise level, ≥ 0",
    "name=inpaint input=grey.png mask=lost.png": "There is no file",
    "name=inpaint input=grey.png mask=3": "mask is the name of a file, or hole:ROWSxCOLUMNS; got 3",
    "name=inpaint input=grey.png mask=hole:0-4x1-2": "mask=hole:0-4x1-2: expected rows .* shape (1, 4, 4)",
    "name=inpaint input=grey.png mask=hole:1": "expected rows and columns",
    "name=inpaint input=grey.png mask=hole:0-3x0-3": "expected some pixels that are seen",
    "name=inpaint input=grey.png mask=empty.png": "expected a mask that is not 0 where the input is seen, found",
    "name=inpaint input=grey.png mask=shades.png": "expected a mask of two values, 0 (not seen) and another, found",
    "name=inpaint input=grey.png mask=two.npy": "found 3: 0, 1, 2. JPEG blurs masks; use PNG",
    "name=inpaint input=grey.png mask=narrow.png": "expected a mask of 4 × 4 pixels as the samples have, found 2 × 4",
    "name=superres operator.factor=3 input=grey.png": "An axis of 4 has no blocks of 3",
    "name=superres operator.factor=two input=grey.png": "problem.operator.factor is a whole number; got 'two'",
    "name=superres operator.fctor=2 input=grey.png": "problem.operator.fctor: .*Did you mean 'factor'?",
    "name=superres operator._target_=os.system input=grey.png": "problem.operator._target_=os.system is not a name",
    "name=deblur input=grey.png": "too wide for an axis of 4; lower std",
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_told(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = OmegaConf.from_dotlist(words.split())
    node = OmegaConf.load(Path(config_dir(), "problem", f"{given.name}.yaml")).problem
    node = node and OmegaConf.merge(node, {key: given[key] for key in ("operator", "std") if key in given})
    options = {"input": None, "mask": None, "simulate": False, "seed": 0, **resolved(given), "problem": resolved(node)}
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        read_problem(options, gaussian(1)[1], [])
    assert all(part.strip() in str(caught.value) for part in WRONG[words].split(".*")), caught.value


def test_masks_are_read_as_they_are_drawn(tmp_path: Path) -> None:
    """White or any other one value is seen; one plane is for all channels; an array may have one for each."""
    drawn = 255 * HALF.numpy().astype(np.uint8)
    picture(tmp_path / "a.png", drawn)
    picture(tmp_path / "b.png", drawn // 255)
    Image.fromarray(drawn[0] > 0).save(tmp_path / "c.png")
    np.save(tmp_path / "d.npy", HALF[0].numpy())
    for name in ("a.png", "b.png", "c.png", "d.npy"):
        assert torch.equal(read_mask(str(tmp_path / name), (3, 4, 4)), HALF.expand(3, 4, 4))
    own = torch.arange(3) == 1
    np.save(tmp_path / "e.npy", own[:, None, None].expand(3, 4, 4).numpy())
    assert read_mask(str(tmp_path / "e.npy"), (3, 4, 4)).sum((1, 2)).tolist() == [0, 16, 0]
    np.save(tmp_path / "f.npy", own.numpy())
    assert torch.equal(read_mask(str(tmp_path / "f.npy"), (3,)), own)
    with pytest.raises(ValueError, match=r"expected a mask of shape \(3,\), as \.npy"):
        read_mask(str(tmp_path / "a.png"), (3,))
    assert torch.equal(read_mask("hole:0-3x2-3", (3, 4, 4)), HALF.expand(3, 4, 4))
    spot = read_mask("hole:1-1x0-2", (2, 3, 4))
    assert [index.tolist() for index in torch.where(~spot)] == [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 2, 0, 1, 2]]


def test_it_goes_on_where_it_stopped_and_another_input_is_another_job(tmp_path: Path, known, monkeypatch) -> None:
    """Two ranks; rank 0 stops before it writes. With another picture under the same name nothing is taken over."""
    known(1)
    files(tmp_path)
    words = (*FAST, "problem=superres", "problem.operator.factor=2", "input=[small.png,test.png]", "n=6",
             "batch_size=4", "posterior=pigdm")  # fmt: skip
    picture(tmp_path / "test.png", np.full((1, 2, 2), 90, np.uint8))
    whole = command("sample", *words, "out=whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    calls = [0]
    forward = GaussianMixtureDenoiser.forward

    def counted(self, x, *arguments):
        calls[0] += len(x) == 4  # of batches, not of what is tried before on less
        return forward(self, x, *arguments)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(GaussianMixtureDenoiser, "forward", counted)
    for rank in "10":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            patch.setenv("RANK", rank)
            patch.setattr(scoresde.cli.sample, "write_restored", stop)
            assert command("sample", *words, "out=stopped", cwd=tmp_path).code == (0 if rank == "1" else 130)
    assert sorted(path.name for path in tmp_path.glob("stopped/batches/*/*")) == [
        f"{i:06d}.safetensors" for i in range(3)
    ]
    assert calls[0] == 3 * 21
    saved = (tmp_path / "small.png").read_bytes()
    picture(tmp_path / "small.png", np.full((1, 2, 2), 91, np.uint8))
    done = command("sample", *words, "out=stopped", cwd=tmp_path)
    assert done.code == 1 and "given" in done.err and calls[0] == 3 * 21, done.err
    (tmp_path / "small.png").write_bytes(saved)
    done = command("sample", *words, "out=stopped", cwd=tmp_path)
    assert done.code == 0 and calls[0] == 3 * 21, done.err
    a, b = (np.load(tmp_path / name / "samples.npz") for name in ("whole", "stopped"))
    assert all(np.array_equal(a[key], b[key]) for key in a) and a["samples"].shape == (2, 6, 1, 4, 4)


def shown(path: Path) -> np.ndarray:
    """The colours of areas in a picture, (n, 3): not those of the edges of letters."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return colours[counts > 500].astype(float)


def test_the_picture_shows_what_there_is(tmp_path: Path, known) -> None:
    """Rows of given, truth, mean, deviation and samples, in the colours that the arrays hold."""
    known(3)
    picture(tmp_path / "mask.png", 255 * HALF.numpy().astype(np.uint8))
    done = command(
        "sample", *FAST[:-1], "problem=inpaint", "mask=mask.png", "input=[test:0,test:1]", "n=4", "out=o",
        "+sampler@samplers.ddim=ddim", "samplers.ddim.steps=5", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert all((tmp_path / "o" / f"{name}.png").exists() for name in ("restored", "restored-ddim", "trajectory"))
    assert "restored" in done.out and "PSNR of mean" in done.out and "residual" in done.out
    made = np.load(tmp_path / "o" / "samples.npz")
    assert {"samples", "samples-ddim", "mean", "std-ddim", "truth", "given", "mask"} <= set(made)
    found = shown(tmp_path / "o" / "restored.png")
    for level in made["truth"].transpose(0, 2, 3, 1).reshape(-1, 3)[::5]:
        # bin centres of −1 … 1 as shares of the range, at 8 bits
        assert np.abs(found - (level + 0.5) / 256 * 255).max(1).min() <= 1


def test_holes_are_a_chequerboard(tmp_path: Path) -> None:
    """Black and white are the limits, what is not seen is in two greys, and without a truth its column is left out."""
    y, made = torch.full((1, 1, 14, 14), -1.0), torch.ones(1, 3, 1, 14, 14)
    seen = torch.arange(14).expand(1, 14, 14) < 7
    restored(y, made, None, tmp_path / "a.png", seen=seen, limits=(-1.0, 1.0))
    restored(y, made, None, tmp_path / "b.png", limits=(-1.0, 1.0))
    with_hole, without = (shown(tmp_path / name) for name in ("a.png", "b.png"))
    for grey in (0.55, 0.75):
        assert np.abs(with_hole - grey * 255).max(1).min() <= 1
    assert all([0, 0, 0] in x.tolist() and [255, 255, 255] in x.tolist() for x in (with_hole, without))


def test_vectors_are_restored_too(tmp_path: Path, known, monkeypatch) -> None:
    """Of a ring of eight, the first coordinate is given: the second is one of two, each half of the time."""
    from scoresde.data import EightGaussians

    toy = EightGaussians()
    p = GaussianMixtureDenoiser(toy.means, toy.std**2, torch.ones(8), VPSDE())
    run = Run(Path("run"), {"network": {}}, 1, "exact", toy.dataset(train=64, test=8), p, conditional=False)
    monkeypatch.setattr(scoresde.cli.sample, "chosen_run", lambda options, allow: run)
    (tmp_path / "run").mkdir(exist_ok=True)
    slope, offset = run.dataset.encode(torch.ones(1, 2)) - run.dataset.encode(torch.zeros(1, 2)), 0
    x = toy.means[toy.means[:, 0].abs().argsort()[2]]  # with a twin above or below
    np.save(tmp_path / "y.npy", np.array([float(x[0] / slope[0, 0]), np.nan]))
    np.save(tmp_path / "mask.npy", np.array([1, 0]))
    done = command(
        "sample", *FAST[:-1], "problem=inpaint", "input=y.npy", "mask=mask.npy", "n=200", "problem.std=0.1", "out=o",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0 and (tmp_path / "o" / "restored.png").exists(), done.err
    made = np.load(tmp_path / "o" / "samples.npz")["samples"][0] * float(slope[0, 0]) + offset
    assert np.abs(made[:, 0] - float(x[0])).mean() < 2 * (toy.std**-2 + 0.1**-2) ** -0.5
    up = (made[:, 1] > 0).mean()
    # symmetric, so exact whatever the method: 4 standard errors
    assert abs(up - 0.5) < 4 * 0.5 / 200**0.5 and np.abs(np.abs(made[:, 1]) - abs(float(x[1]))).mean() < 3 * toy.std


def test_the_guide_runs() -> None:
    """docs/control.md, its blocks in turn; what it promises of them is so."""
    page = (Path(config_dir()).parent / "docs" / "control.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for text in re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        exec(text, names)
    # one of two Gaussians that end √10 standard deviations from the border, by a trained classifier: 97 in 100, but for
    # three standard errors of the share among 200 samples
    assert (names["chosen"][:, 0] > 0).double().mean() > 0.97 - 3 * (0.97 * 0.03 / 200) ** 0.5 and names[
        "found"
    ].label.all()
    # x + its neighbour is 0.9 and 0.1 to within the noise, by the prior's 0.1
    residual = names["seen"](names["x"]) - names["seen"].y
    assert 0.05 < float(residual.square().mean().sqrt()) < 0.2
    # seldom to the other side, which is seven times as far as the noise is high; mostly there when told to go
    same = torch.sign(names["near"][:, 0]) == torch.sign(names["x0"][:, 0])
    assert float(same.float().mean()) > 0.9 and not torch.allclose(names["near"], names["x0"], atol=0.1)
    assert float((names["moved"][:, 0] > 0).float().mean()) > 0.8
    assert float((names["pulled"][:, 0] > 0).float().mean()) > 0.6
