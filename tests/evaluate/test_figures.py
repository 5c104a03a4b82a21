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
from scoresde.evaluate.strips import animation


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
    [((3, 4, 5), (5, 12, 3)), ((2, 4, 5), (5, 12))],
    ids=["colour", "two channels"],
)
def test_every_kind_of_event_becomes_a_picture(tmp_path: Path, monkeypatch, event, shape) -> None:
    """Two samples side by side: colour as colour, of two channels the first."""
    drawn = Drawn(monkeypatch)
    x = torch.rand(2, *event, generator=torch.Generator().manual_seed(0))
    path = figures.sample_grid(x, x, tmp_path / "s.png", columns=2)
    picture = drawn.images()[0]
    assert picture.shape == shape
    scaled = ((x - x.min()) / (x.max() - x.min()))[1]
    tile = scaled.permute(1, 2, 0) if event[0] == 3 else scaled[0]
    np.testing.assert_allclose(picture[: tile.shape[0], shape[1] // 2 : -1], tile, atol=1e-6)
    png(path, drawn.figure)


def test_videos_are_strips_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame beside frame with a light line behind each, in every picture of samples; and a GIF of all."""
    drawn, x = Drawn(monkeypatch), torch.rand(3, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0, 0], x[0, 0, 0, 0, 1] = 0, 1
    png(figures.sample_grid(x, x, tmp_path / "s.png"), drawn.figure)
    picture = drawn.images()[0]
    assert picture.shape == (3 * 6, 4 * 7 + 1)
    for k, t in ((0, 0), (1, 2), (2, 3)):
        np.testing.assert_allclose(picture[6 * k : 6 * k + 5, 7 * t : 7 * t + 6], x[k, 0, t], atol=1e-6)
        assert (picture[6 * k : 6 * k + 5, 7 * t + 6] == 1).all()
    seen = torch.zeros(1, 4, 5, 6, dtype=torch.bool)
    seen[:, :2] = True
    made = x[:, None].expand(-1, 2, -1, -1, -1, -1)
    png(figures.restored(x * seen, made, x, tmp_path / "r.png", seen=seen, limits=(0.0, 1.0)), drawn.figure)
    given, truth, mean, *_ = drawn.images()
    assert truth.shape == mean.shape == (5, 4 * 7)
    np.testing.assert_allclose(given[:, :6], truth[:, :6], atol=1e-6)
    assert set(np.unique(given[:, 14:20]).tolist()) <= {0.55, 0.75}  # what is not seen
    with Image.open(animation(x, tmp_path / "s.gif", (0.0, 1.0), columns=2)) as moving:
        assert moving.n_frames == 4 and moving.size == (2 * 7 * 10, 2 * 6 * 10)
        for t in range(4):
            moving.seek(t)
            grey = np.asarray(moving.convert("L"))[5:50:10, 5:60:10]
            np.testing.assert_allclose(grey, 255 * x[0, 0, t], atol=1)


def drawn_lines(axes: Any) -> list[list[float]]:
    return [line.get_ydata().tolist() for line in axes.lines]


@pytest.mark.parametrize("event", [(2, 6), (5,)], ids=["channels", "vector"])
def test_signals_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: tuple[int, ...]) -> None:
    """A line per channel, on axes with numbers, in the range of the real ones; five generated beside one real are two
    rows of four, whose other places are empty. Vectors of many entries are signals of one channel."""
    drawn = Drawn(monkeypatch)
    x = torch.rand(5, *event, generator=torch.Generator().manual_seed(0))
    png(figures.sample_grid(x, x[:1] / 2, tmp_path / "s.png", sampler="heun"), drawn.figure)
    axes = drawn.figure.axes
    assert len(axes) == 16 and drawn.titles()[0] == "" and axes[0].get_title("left") == "generated by heun"
    assert axes[4].get_title("left") == "real" and drawn.figure.get_supxlabel() == "position"
    assert drawn_lines(axes[1]) == x[1].reshape(-1, event[-1]).tolist()
    assert drawn_lines(axes[4]) == (x[0] / 2).reshape(-1, event[-1]).tolist()
    assert drawn_lines(axes[8]) == x[4].reshape(-1, event[-1]).tolist()
    assert [axes[k].axison for k in (0, 3, 4, 5, 8, 9)] == [True, True, True, False, True, False]
    low, high = axes[0].get_ylim()
    assert low < float(x[0].min() / 2) and float(x[0].max() / 2) < high < float(x[0].max())
    png(figures.trajectory(torch.stack([50 * x, x]), [1.0, 0.5], tmp_path / "t.png"), drawn.figure)
    axes = drawn.figure.axes
    assert len(axes) == 10 and [axes[k].get_title("left") for k in (0, 1)] == ["t = 1", "t = 0.5"]
    assert drawn_lines(axes[3]) == x[1].reshape(-1, event[-1]).tolist() and axes[2].get_ylim()[1] > 10
    made = torch.stack([x, x + 1])
    png(figures.restored(x[:2], made, None, tmp_path / "r.png"), drawn.figure)
    axes = drawn.figure.axes
    assert [axes[k].get_title("left") for k in range(3)] == ["given", "mean ± std", "samples"]
    np.testing.assert_allclose(drawn_lines(axes[4]), made[1].mean(0).reshape(-1, event[-1]), atol=1e-6)
    band = axes[1].collections[0].get_paths()[0].vertices[:, 1].max()
    assert band == pytest.approx(float((x.mean(0) + x.std(0, correction=0)).reshape(-1, event[-1])[0].max()), abs=1e-5)
    assert len(axes[5].lines) == 5 * (event[0] if len(event) > 1 else 1)


def test_many_samples_are_drawn_in_part_and_their_sampler_is_named(tmp_path: Path, monkeypatch) -> None:
    drawn = Drawn(monkeypatch)
    figures.sample_grid(levels(*[0.0] * 500), levels(*[1.0, 0.0] * 250), tmp_path / "s.png", sampler="pc")
    assert drawn.titles() == ["generated by pc", "real"]
    assert [image.shape for image in drawn.images()] == [(16 * 3, 8 * 4)] * 2


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


def ticks(axis: Any) -> list[str]:
    """The labels that can be seen."""
    low, high = sorted(axis.get_view_interval())
    axis.figure.draw_without_rendering()
    both = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1.get_text() for tick in both if low <= tick.get_loc() <= high and tick.label1.get_text()]


def test_scores_and_noise_levels_are_drawn_with_their_errors(tmp_path: Path, monkeypatch) -> None:
    """A panel for each number and cost, a point per sampler, a dashed line for a row that costs nothing."""
    drawn = Drawn(monkeypatch)
    costs = {"network calls": {"a": 10.0, "b": 20.0}, "seconds": {"a": 1.0, "b": 3.0}}
    scores = {
        "a": {"kernel": (0.5, 0.1), "recall": (0.9, 0.0)},
        "b": {"kernel": (0.2, 0.1)},
        "data": {"kernel": (0, 0)},
    }
    png(figures.score_chart(costs, scores, tmp_path / "s.png"), drawn.figure)
    axes = drawn.figure.axes
    assert [(one.get_xlabel(), one.get_ylabel()) for one in axes] == [
        (cost, name) for cost in costs for name in ("kernel", "recall")
    ]
    (bars,) = axes[2].containers[1].lines[2]
    assert bars.get_segments()[0].tolist() == [[3.0, pytest.approx(0.1)], [3.0, pytest.approx(0.3)]]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["data", "a", "b"]
    png(figures.noise_chart([1.0, 10.0], {"held out": [(0.5, 0.1), (0.1, 0.2)]}, tmp_path / "n.png"), drawn.figure)
    (axes,) = drawn.figure.axes
    assert axes.get_xscale() == "log" and axes.containers[0].lines[0].get_xydata().tolist() == [[1, 0.5], [10, 0.1]]


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
    assert not any("10^" in label for label in ticks(axes.yaxis)) and len(ticks(axes.yaxis)) >= 3
    thousands = [{"images": 1000 * k, "train/loss": 0.9 * 0.7**k} for k in range(40)]
    for rows_of, low in ((thousands[:2], 0.63), (thousands, 0.9 * 0.7**39)):
        figures.loss_curve(rows_of, tmp_path / "loss.png")
        labels = ticks(drawn.figure.axes[0].yaxis)
        assert len(labels) >= 3 and all(float(label) >= low / 2 for label in labels), labels
    assert "10k" in ticks(drawn.figure.axes[0].xaxis)
    figures.loss_curve([*rows, {"images": 40, "train/loss": -1.0}], tmp_path / "loss.png")
    assert drawn.figure.axes[0].get_yscale() == "linear"
    png(figures.loss_curve([], tmp_path / "loss.png"), drawn.figure)


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[plot\]', or set pictures=false"):
        figures.require()
