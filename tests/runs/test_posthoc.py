"""Averages made afterwards, against the same averages taken along the way; and files that are not what they were."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scoresde.runs.posthoc import coefficients, reconstruct, write_snapshot
from scoresde.train.ema import PowerEMA, exponent

YES = torch.tensor(True)
BATCH, STEPS = 5, 4096
TRACKED = (0.05, 0.1)


class Net(nn.Module):
    """Two parameters, a float and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4).requires_grad_(False)
        for p in self.linear.parameters():
            nn.init.constant_(p, 3.0)  # far from 0, so that coefficients which do not sum to 1 would show
        self.register_buffer("scale", torch.full((2,), 0.3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


@pytest.fixture(scope="module")
def walk() -> Tensor:
    """(STEPS, 36) float64: weights after each step, a random walk of total length about 1 from 3."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(STEPS, 36, generator=generator, dtype=torch.float64) / math.sqrt(STEPS)
    return 3 + steps.cumsum(0)


def direct(walk: Tensor, sigma: float, step: int = STEPS) -> Tensor:
    """The power average after `step` steps, by its definition."""
    tau = torch.arange(step + 1, dtype=torch.float64) / step
    return (tau ** (exponent(sigma) + 1)).diff() @ walk[:step]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors["linear.weight"].flatten(), tensors["linear.bias"]]).double()


def holding(values: Tensor, calls: int = 0) -> Net:
    net = Net()
    net.linear.weight.copy_(values[:32].reshape(4, 8))
    net.linear.bias.copy_(values[32:])
    net.get_buffer("calls").fill_(calls)
    return net


def snapshots(folder: Path, walk: Tensor, count: int, **options: torch.dtype) -> Path:
    """`count` snapshots, evenly spaced, of averages by their definition."""
    for step in range(STEPS // count, STEPS + 1, STEPS // count):
        shadows = {str(sigma): holding(direct(walk, sigma, step), step) for sigma in TRACKED}
        write_snapshot(folder, shadows, BATCH * step, TRACKED, **options)
    return folder


def test_snapshots_of_training_give_the_average_of_another_length(tmp_path: Path, walk: Tensor) -> None:
    """The whole way: `PowerEMA` along the path, a snapshot every 256 steps, another length and another end."""
    average = PowerEMA(holding(walk[0]), sigma_rel=TRACKED)
    module = Net()
    for step in range(1, STEPS + 1):
        module.linear.weight.copy_(walk[step - 1, :32].reshape(4, 8))
        module.linear.bias.copy_(walk[step - 1, 32:])
        module.get_buffer("calls").fill_(step)
        average.update(module, BATCH * step, BATCH, YES)
        if step % 256 == 0:
            write_snapshot(tmp_path, average.shadows, BATCH * step, average.sigma_rel)
    for end, bound in ((STEPS, 1e-3), (STEPS // 2, 8e-3)):
        made = reconstruct(tmp_path, 0.07, BATCH * end)
        exact = direct(walk, 0.07, end)
        moved = float((walk[end - 1] - exact).norm())
        # twice what the same combination of exact averages leaves of a random walk, with 16 and with 8 snapshots
        assert float((flat(made) - exact).norm()) < bound * moved and moved > 0.3
        module.load_state_dict(made)  # names, shapes, buffers
        assert int(made["calls"]) == end and made["linear.bias"].dtype == torch.float32
        assert torch.equal(made["scale"], torch.full((2,), 0.3))
    assert torch.equal(
        reconstruct(tmp_path, 0.07)["linear.bias"], reconstruct(tmp_path, 0.07, BATCH * STEPS)["linear.bias"]
    )


@pytest.mark.parametrize("sigma", [0.04, 0.07, 0.15, 0.2])
def test_errors_fall_with_the_number_of_snapshots(sigma: float, walk: Tensor) -> None:
    """The profile's as n^-2 (piecewise power functions with kinks at n places), a random walk's weights as n^-3.

    The walk integrates the misfit, which alternates between the snapshots: one order more. In float64, for float32
    files end at 1e-7.
    """
    exact = direct(walk, sigma)
    moved = float((walk[-1] - exact).norm())
    counts, profile, weights = (16, 32, 64), [], []
    for count in counts:
        pairs = [(step, s) for step in range(STEPS // count, STEPS + 1, STEPS // count) for s in TRACKED]
        share, error = coefficients(pairs, (STEPS, sigma))
        made = sum(c * direct(walk, s, step) for c, (step, s) in zip(share, pairs, strict=True))
        assert float(share.sum()) == pytest.approx(1, abs=1e-10)
        profile.append(error)
        weights.append(float((made - exact).norm()) / moved)
    slopes = [float(np.polyfit(np.log(counts), np.log(values), 1)[0]) for values in (profile, weights)]
    assert slopes[0] == pytest.approx(-2, abs=0.3) and slopes[1] == pytest.approx(-3, abs=0.6)
    assert weights[-1] < 1e-3


def test_the_error_is_that_of_the_profile() -> None:
    """‖Σ c_i p_i − p‖/‖p‖ by quadrature of the profiles themselves."""
    pairs = [(images, sigma) for images in (30.0, 70.0, 100.0) for sigma in TRACKED]
    n = 400_000
    tau = 100 * (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def profile(images: float, sigma: float) -> Tensor:
        gamma = exponent(sigma)
        return torch.where(tau < images, (gamma + 1) * (tau / images) ** gamma / images, 0)

    for sigma in (0.03, 0.08, 0.2, 12**-0.5):
        share, error = coefficients(pairs, (100.0, sigma))
        target = profile(100.0, sigma)

        def misfit(share: np.ndarray, target: Tensor = target) -> float:
            made = sum(c * profile(*pair) for c, pair in zip(share, pairs, strict=True))
            return float((made - target).norm() / target.norm())

        assert misfit(share) == pytest.approx(error, rel=1e-4)
        # the least of all with this sum: any step that keeps it is a step up
        for seed in range(5):
            step = np.random.default_rng(seed).normal(size=len(share))
            assert misfit(share + 1e-2 * (step - step.mean())) > error


@pytest.mark.parametrize("sigma", TRACKED)
def test_what_was_tracked_comes_back(sigma: float, tmp_path: Path, walk: Tensor) -> None:
    made = reconstruct(snapshots(tmp_path, walk, 4), sigma)
    # float32 rounding of numbers about 3, of 8 files with coefficients of 1e-8 or one of 1
    torch.testing.assert_close(flat(made), direct(walk, sigma), rtol=0, atol=1e-6)


def test_bfloat16_files_cost_what_is_said(tmp_path: Path, walk: Tensor) -> None:
    """Σ|c_i| 2^-9 |θ| bounds the difference, √Σc² of it is what random roundings leave; the file is half as long."""
    full, half = (snapshots(tmp_path / name, walk, 16, dtype=dtype)
                  for name, dtype in (("full", torch.float32), ("half", torch.bfloat16)))  # fmt: skip
    pairs = [(step, s) for step in range(256, STEPS + 1, 256) for s in TRACKED]
    share, _ = coefficients(pairs, (STEPS, 0.07))
    difference = flat(reconstruct(half, 0.07)) - flat(reconstruct(full, 0.07))
    assert 0 < float(difference.abs().max()) <= np.abs(share).sum() * 2**-9 * float(walk.abs().max())
    # of numbers in [2, 4): spacing 2^-6, so 2^-6/√12 each
    assert float(difference.std()) < 2 * np.sqrt((share**2).sum()) * 2**-6 / math.sqrt(12)
    stored = load_file(next(iter(sorted(half.iterdir()))))
    assert stored["0/linear.weight"].dtype == torch.bfloat16 and stored["buffers/scale"].dtype == torch.float32


def test_lengths_that_cannot_be_made_are_refused(tmp_path: Path, walk: Tensor) -> None:
    """Out of range; far from what was tracked with few snapshots; possible with more."""
    few, many = snapshots(tmp_path / "few", walk, 2), snapshots(tmp_path / "many", walk, 32)
    for sigma in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="share of training"):
            reconstruct(many, sigma)
    for sigma in (0.02, 0.2):
        with pytest.raises(ValueError, match=r"cannot be made from 2 snapshots of lengths \[0.05, 0.1\].*more often"):
            reconstruct(few, sigma)
        exact = direct(walk, sigma)
        error = float((flat(reconstruct(many, sigma)) - exact).norm()) / float((walk[-1] - exact).norm())
        assert error < 0.02
    with pytest.raises(ValueError, match="cannot be made"):
        reconstruct(many, 0.2, max_error=1e-4)


def test_snapshots_that_are_missing_are_named(tmp_path: Path, walk: Tensor) -> None:
    with pytest.raises(ValueError, match="holds no snapshots"):
        reconstruct(tmp_path / "nowhere", 0.1)
    folder = snapshots(tmp_path / "some", walk, 4)
    with pytest.raises(ValueError, match=f"no snapshot at 7000 images; the nearest is at {BATCH * STEPS // 4}"):
        reconstruct(folder, 0.1, 7000)
    (folder / f"images-{BATCH * STEPS:012d}.safetensors").unlink()
    assert int(reconstruct(folder, 0.1)["calls"]) == 3 * STEPS // 4


def test_a_damaged_snapshot_is_never_used(tmp_path: Path, walk: Tensor) -> None:
    """R6: every cut, every single flipped bit of the head and of samples of the rest, and a file under another name."""
    folder = snapshots(tmp_path, walk, 4)
    path = sorted(folder.iterdir())[1]
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    flips = [8 * byte + (byte * 5) % 8 for byte in range(head)] + list(range(8 * head, 8 * len(whole), 37))
    cases = [whole[:size] for size in range(0, len(whole), 61)]
    for bit in flips:
        spoiled = bytearray(whole)
        spoiled[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(spoiled))
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged.*Remove it"):
            reconstruct(folder, 0.07)
    path.write_bytes((folder / f"images-{BATCH * STEPS:012d}.safetensors").read_bytes())
    with pytest.raises(ValueError, match="name differs"):
        reconstruct(folder, 0.07)
    path.write_bytes(whole)
    reconstruct(folder, 0.07)
    path.unlink()  # as the message says
    reconstruct(folder, 0.07)


def test_tied_weights_and_passing_buffers_fit_the_module_again(tmp_path: Path) -> None:
    """Names are those of `state_dict`: both of a weight that is shared, none of a buffer that is not kept."""
    net = Net()
    net.again = net.linear
    net.register_buffer("cache", torch.zeros(3), persistent=False)
    for images in (50, 100):
        write_snapshot(tmp_path, {"ema": net, "ema-0.1": net}, images, TRACKED)
    made = reconstruct(tmp_path, 0.08)
    assert made.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():  # constants come back: the coefficients sum to 1
        torch.testing.assert_close(made[name], value, rtol=1e-6, atol=0)


def test_snapshots_of_another_module_are_refused(tmp_path: Path, walk: Tensor) -> None:
    folder = snapshots(tmp_path, walk, 4)
    other = copy.deepcopy(Net())
    other.linear = nn.Linear(8, 5).requires_grad_(False)
    write_snapshot(folder, {"ema": other, "ema-0.1": other}, BATCH * STEPS, TRACKED)
    with pytest.raises(ValueError, match="another module"):
        reconstruct(folder, 0.07)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, walk: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of the calls, and a disk that fails at each of them: the old file is whole and nothing else is left."""
    net, calls = holding(walk[-1]), []
    path = write_snapshot(tmp_path, {"ema": net}, 100, [0.1])
    before = path.read_bytes()
    real_replace, real_fsync = os.replace, os.fsync

    def failing(name: str) -> None:
        def stop(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, name, stop)

    for name in ("fsync", "replace"):
        failing(name)
        with pytest.raises(OSError, match="No space"):
            write_snapshot(tmp_path, {"ema": holding(walk[0])}, 100, [0.1])
        monkeypatch.setattr(os, "fsync", real_fsync)
        monkeypatch.setattr(os, "replace", real_replace)
        assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b))[1])
    write_snapshot(tmp_path, {"ema": holding(walk[0])}, 100, [0.1])
    assert calls == ["fsync", "replace", "fsync"] and path.read_bytes() != before


def test_what_is_written_is_checked(tmp_path: Path) -> None:
    shadows = {"ema": Net()}
    for images in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="images is a whole number"):
            write_snapshot(tmp_path, shadows, images, [0.1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 shadows need"):
        write_snapshot(tmp_path, shadows, 5, [0.1, 0.2])
    with pytest.raises(ValueError, match="share of training"):
        write_snapshot(tmp_path, shadows, 5, [0.5])
    assert list(tmp_path.iterdir()) == []
