"""Pictures: whole PNGs of the stated size, generated beside real, each tile where it belongs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scoresde.evaluate import figures


class Drawn:
    """Keeps the figure that a function draws, and writes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.figure: Any = None
        write = figures._write

        def keep(figure: Any, path: Path) -> Path:
            self.figure = figure
            return write(figure, path)

        monkeypatch.setattr(figures, "_write", keep)

    def images(self) -> list[np.ndarray]:
        return [np.asarray(axes.images[0].get_array()) for axes in self.figure.axes]

    def titles(self) -> list[str]:
        return [axes.get_title() for axes in self.figure.axes]


def png(path: Path, figure: Any) -> np.ndarray:
    """Pixels of a PNG that is whole and as large as the figure at 150 dots per inch."""
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == tuple(int(150 * inches) for inches in figure.get_size_inches())
        return np.asarray(image.convert("L"), dtype=float)


def levels(*values: float, event: Sequence[int] = (1, 2, 3)) -> Tensor:
    """One constant image per value."""
    return torch.tensor(values)[:, None, None, None].expand(len(values), *event).clone()


def test_samples_are_drawn_beside_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images of 2 × 3 in two columns: rows of tiles with a white line between, grey by the range of the real
    ones, values outside it cut, the tile that is missing white. In the PNG the dark block is on the left."""
    drawn = Drawn(monkeypatch)
    path = figures.sample_grid(levels(-1, 0, 7), levels(-1, 1, 1), tmp_path / "below" / "s.png", columns=2)
    assert drawn.titles() == ["generated", "real"]
    made, real = drawn.images()
    assert made.shape == real.shape == (2 * 3, 2 * 4)
    for picture, greys in ((made, (0, 0.5, 1, 1)), (real, (0, 1, 1, 1))):
        for k, value in enumerate(greys):
            row, column = 3 * (k // 2), 4 * (k % 2)
            assert np.allclose(picture[row : row + 2, column : column + 3], value), k
        assert np.allclose(picture[2::3], 1) and np.allclose(picture[:, 3::4], 1)
    pixels = png(path, drawn.figure)
    figures.sample_grid(levels(*[-1.0] * 64), levels(-1, *[1.0] * 63), path)
    pixels = png(path, drawn.figure)
    dark, middle = pixels < 64, pixels.shape[1] // 2
    assert dark[:, :middle].mean() > 0.3 and dark[:, middle:].mean() < 0.1


@pytest.mark.parametrize(
    ("event", "shape"),
    [((3, 4, 5), (5, 12, 3)), ((2, 4, 5), (5, 12)), ((3, 6), (4, 14)), ((1, 3, 4, 5), (5, 12))],
    ids=["colour", "two channels", "signal", "volume"],
)
def test_every_kind_of_event_becomes_a_picture(tmp_path: Path, monkeypatch, event, shape) -> None:
    """Two samples side by side: colour as colour, a signal as a strip of its channels, a volume by its middle slice."""
    drawn = Drawn(monkeypatch)
    x = torch.rand(2, *event, generator=torch.Generator().manual_seed(0))
    path = figures.sample_grid(x, x, tmp_path / "s.png", columns=2)
    picture = drawn.images()[0]
    assert picture.shape == shape
    middle = {3: lambda v: v.permute(1, 2, 0) if event[0] == 3 else v[0], 2: lambda v: v, 4: lambda v: v[0, 1]}
    tile = middle[len(event)](((x - x.min()) / (x.max() - x.min()))[1])
    np.testing.assert_allclose(picture[: tile.shape[0], shape[1] // 2 : -1], tile, atol=1e-6)
    png(path, drawn.figure)


def test_points_are_scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    made, real = torch.randn(9, 2), torch.randn(5, 2)
    png(figures.sample_grid(made, real, tmp_path / "s.png"), drawn.figure)
    assert drawn.titles() == ["generated", "real"]
    for axes, points in zip(drawn.figure.axes, (made, real), strict=True):
        np.testing.assert_allclose(axes.collections[0].get_offsets(), points)
    png(figures.trajectory(torch.stack([made, made / 2]), [1.0, 0.001], tmp_path / "t.png"), drawn.figure)
    assert drawn.titles() == ["t = 1", "t = 0.001"]
    np.testing.assert_allclose(drawn.figure.axes[1].collections[0].get_offsets(), made / 2)


def test_a_trajectory_has_a_column_per_time_and_a_row_per_sample(tmp_path: Path, monkeypatch) -> None:
    """Each frame in its own range, as the noise of a VE process is hundreds of times as wide as the data."""
    drawn = Drawn(monkeypatch)
    frames = torch.stack([levels(-50, 0, 50), levels(-1, 1, 0)])
    png(figures.trajectory(frames, [1.0, 0.5], tmp_path / "t.png"), drawn.figure)
    assert drawn.titles() == ["t = 1", "t = 0.5"]
    for picture, greys in zip(drawn.images(), ((0, 0.5, 1), (0, 1, 0.5)), strict=True):
        assert picture.shape == (3 * 3, 4)
        assert [float(picture[3 * row, 0]) for row in range(3)] == pytest.approx(greys)


def test_the_loss_curve_shows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against images seen; a NaN, which the record holds as text, is left out; logarithmic where all is positive."""
    drawn = Drawn(monkeypatch)
    rows: list[dict[str, Any]] = [
        {"header": {}, "step": 0}, {"images": 10, "train/loss": 2.0}, {"images": 20, "train/loss": "nan"},
        {"images": 30, "train/loss": 0.5}, {"images": 30, "eval/loss": 0.75},
    ]  # fmt: skip
    png(figures.loss_curve(rows, tmp_path / "loss.png"), drawn.figure)
    (axes,) = drawn.figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "train/loss": [[10, 2], [30, 0.5]],
        "eval/loss": [[30, 0.75]],
    }
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "images seen"
    figures.loss_curve([*rows, {"images": 40, "train/loss": -1.0}], tmp_path / "loss.png")
    assert drawn.figure.axes[0].get_yscale() == "linear"
    png(figures.loss_curve([], tmp_path / "loss.png"), drawn.figure)


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[plot\]', or set pictures=false"):
        figures.require()
