"""Samples of tables, column by column: pictures, means and deviations, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data import Dataset
from ..runs.publish import publish, replacing

_SHOWN, _POINTS = 6, 2000  # columns and points of a picture


def pairs(made: Tensor, real: Tensor, names: Sequence[str], path: Path, *, sampler: str = "") -> Path:
    """Columns against each other, samples above the diagonal and real rows below it, histograms of both on it.

    Args:
        made, real: (n, D), raw values; the first six columns and 2,000 rows are drawn.
        names: of the columns.
        path: the PNG to write.
        sampler: by which the samples were made, for the title.
    """
    from matplotlib.figure import Figure

    names = names[:_SHOWN]
    x, y = (values.cpu().double().numpy()[:_POINTS, : len(names)] for values in (made, real))
    low, high = y.min(0), y.max(0)
    room = 0.05 * (high - low) + 1e-12
    figure = Figure(figsize=(1.7 * len(names) + 0.6, 1.7 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), len(names), squeeze=False, sharex="col")
    for (i, j), axes in np.ndenumerate(panels):
        axes.set_xlim(low[j] - room[j], high[j] + room[j])
        axes.tick_params(labelsize=5)
        if i == j:
            for values, colour, label in ((y, "C0", "real"), (x, "C1", "samples")):
                bins = np.linspace(low[i], high[i], 40)
                axes.hist(values[:, i], bins=bins, density=True, histtype="step", color=colour, label=label)
            axes.set_yticks([])
        else:
            axes.set_ylim(low[i] - room[i], high[i] + room[i])
            axes.scatter((x if i < j else y)[:, j], (x if i < j else y)[:, i], s=1, color="C1" if i < j else "C0")
        if i == len(names) - 1:
            axes.set_xlabel(names[j], fontsize=7)
        if j == 0:
            axes.set_ylabel(names[i], fontsize=7)
    panels[0, 0].legend(fontsize=5)
    figure.suptitle(f"above: samples{sampler and ' by '}{sampler}; below: real", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path


def moments(made: Mapping[str, Tensor], real: Tensor, names: Sequence[str]) -> dict[str, list[str]]:
    """Mean and deviation of each column, of held-out rows and of the samples of each sampler, as a table of text.

    Args:
        made: sampler -> (n, D), raw values.
        real: (m, D).
        names: of the columns.
    """
    table = {"column": list(names)}
    for name, values in {"real": real, **made}.items():
        values = values.double()
        mean, std = values.mean(0), values.std(0)
        error = std / math.sqrt(max(len(values), 1))
        table[f"{name}: mean"] = [f"{m:.4g} ± {e:.1g}" for m, e in zip(mean.tolist(), error.tolist(), strict=True)]
        table[f"{name}: deviation"] = [f"{s:.4g}" for s in std.tolist()]
    return table


def write_csv(raw: Tensor, dataset: Dataset, path: Path, *, labels: Tensor | None) -> None:
    """Samples (n, D) with the names of their columns, and the names of their classes where there are `labels` (n,)."""
    names = dataset.names_of_classes
    beside = {} if labels is None else {"label": [names[k] if k < len(names) else "" for k in labels.tolist()]}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*dataset.columns, *beside])
    rows = zip(raw.tolist(), *beside.values(), strict=True)
    writer.writerows([*(f"{value:.9g}" for value in row), *rest] for row, *rest in rows)
    publish(path, text.getvalue())
