"""Held-out nats of tables by `experiment=table` as it is, beside a Gaussian mixture, a KDE and a spline flow.

    python benchmarks/tables.py                                  # every table, three seeds; it goes on where it was
    python benchmarks/tables.py --tables iris wine --seeds 1     # some of them
    python benchmarks/tables.py --methods scoresde mixture       # the flow needs zuko

A seed is of the split, the network and the noise. All methods get the same training, validation and test rows, as
`data=table` splits them, dequantised and standardised alike, and all of them choose by the validation rows: the
mixture its components (1 … 40), the KDE its width, the flow and scoresde when to stop. Nats are of raw columns:
log p(x) and the log-volume of the codec. Tables are scikit-learn's, and made-up ones in the manner of UCI's (`MADE`).
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from scoresde import Rng
from scoresde.data import Table

Named = tuple[np.ndarray, list[str]]


def power() -> Named:
    """As the power plant's: seasons, a column of few values, saturation, a curve, rounded to 0.01."""
    r, n = np.random.default_rng(0), 9568
    t = 19.6 - 8 * np.cos(r.uniform(0, 2 * np.pi, n)) + 3.2 * r.standard_normal(n)
    levels = np.sort(r.uniform(25, 82, 60))
    v = np.interp(t, [2, 15, 25, 37], [40, 44, 62, 76]) + 6 * r.standard_normal(n)
    v = levels[np.abs(v[:, None] - levels).argmin(1)] + 0.3 * r.standard_normal(n)
    ap = 1013 + 5.9 * r.standard_normal(n) - 0.25 * (t - 19)
    rh = 100 - abs(18 * r.standard_normal(n)) - 1.1 * np.clip(t - 10, 0, None) + 0.12 * (ap - 1013)
    rh = np.clip(rh, 25, 100.2 + 0.1 * r.standard_normal(n))
    pe = 497 - 1.9 * t - 0.25 * (v - 54) + 0.06 * (ap - 1013) - 0.15 * (rh - 73) + 0.02 * (t - 20) ** 2
    return np.round(np.c_[t, v, ap, rh, pe + 3.2 * r.standard_t(6, n)], 2), ["AT", "V", "AP", "RH", "PE"]


def arm() -> Named:
    """As kin8nm: eight uniform angles, and how far the end of the arm is from a point, with noise."""
    r, n = np.random.default_rng(0), 8192
    a = r.uniform(-np.pi / 2, np.pi / 2, (n, 8))
    turned, lengths = 0.7 * a.cumsum(1), np.array([0.2, 0.18, 0.15, 0.13, 0.11, 0.09, 0.08, 0.06])
    x, y = (lengths * np.cos(turned)).sum(1), (lengths * np.sin(turned)).sum(1)
    return np.c_[a, np.hypot(x - 0.1, y - 0.1) + 0.05 * r.standard_normal(n)], [
        *(f"theta{k}" for k in range(1, 9)),
        "y",
    ]


def protein() -> Named:
    """As the protein structures': heavy tails over decades, near relations, two modes."""
    r, n = np.random.default_rng(0), 20_000
    k, z = r.gamma(3, 1, n), r.standard_normal((n, 4))
    area = 6000 * np.exp(0.35 * np.log(k) + 0.25 * z[:, 0])
    part = 0.3 + 0.04 * z[:, 1]
    far = 12 + 3 * r.standard_normal(n) + 0.0002 * (area - 9000)
    columns = {
        "rmsd": np.where(r.random(n) < 0.5, r.gamma(2, 1, n), far).clip(0) + 0.01 * r.random(n),
        "area": area,
        "nonpolar": area * part,
        "fraction": part + 0.003 * z[:, 2],
        "deviation": area**1.1 * 0.02 * (1 + 0.1 * z[:, 3]),
        "mass": area * 140 * (1 + 0.02 * r.standard_normal(n)),
        "energy": np.exp(0.5 * r.standard_t(4, n)) * area * 0.3,
        "penalty": np.clip(r.poisson(20 * k), 0, 350) + r.random(n),
        "distance": 38 - 3 * np.log(k) + 2 * r.standard_t(4, n),
    }
    return np.stack(list(columns.values()), 1), list(columns)


def rings() -> Named:
    """Three rings, one above another."""
    r, n = np.random.default_rng(0), 6000
    t, k = r.uniform(0, 2 * np.pi, n), r.integers(0, 3, n)
    radius = np.array([1, 2.2, 3.4])[k] + 0.12 * r.standard_normal(n)
    height = k + 0.5 * np.sin(3 * t) + 0.1 * r.standard_normal(n)
    return np.c_[100 + 30 * radius * np.cos(t), 0.01 * radius * np.sin(t), 1e4 * height], ["a", "b", "c"]


def accounts() -> Named:
    """Columns with an exact relation, rounded: a density on what is almost a plane."""
    r, n = np.random.default_rng(0), 4000
    net = r.gamma(2, 50, n)
    tax, cycle = 0.4 * net + 20 * r.standard_normal(n), 3 * np.sin(net / 40) + 0.2 * r.standard_normal(n)
    return np.round(np.c_[net, tax, net + tax, cycle], 4), ["net", "tax", "gross", "cycle"]


def bundled(load: Callable[[], object]) -> Callable[[], Named]:
    def make() -> Named:
        bunch = load()
        return np.asarray(bunch.data, float), [name.replace(",", "") for name in bunch.feature_names]  # type: ignore[attr-defined]

    return make


MADE: dict[str, Callable[[], Named]] = {
    "iris": bundled(datasets.load_iris),
    "wine": bundled(datasets.load_wine),
    "diabetes": bundled(datasets.load_diabetes),
    "cancer": bundled(datasets.load_breast_cancer),
    "accounts": accounts,
    "rings": rings,
    "arm": arm,
    "power": power,
    "protein": protein,
}


def write(name: str, folder: Path) -> Path:
    values, names = MADE[name]()
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(values.tolist())
    return path


def trained(path: Path, seed: int, folder: Path) -> dict[str, float]:
    """`experiment=table` as it is."""
    out = folder / f"{path.stem}-{seed}"
    start = time.time()
    words = ["experiment=table", f"data.path={path}", f"data.seed={seed}", f"seed={seed}", f"out={out}", "logger=jsonl"]
    subprocess.run([sys.executable, "-m", "scoresde.cli.train", *words, "resume=auto"], check=True)
    summary = json.loads((out / "summary.json").read_text())
    data, made = Table(str(path), seed=seed), torch.from_numpy(np.load(out / "samples.npz")["multistep"])
    factor = -np.log(2) * data.raw_shape[0]
    real, made = data.train.raw[:].double(), made.double()
    std = real.std(0)
    return {
        "nats": factor * summary["bits_per_dim"]["mean"],
        "error": abs(factor) * summary["bits_per_dim"]["stderr"],
        "seconds": time.time() - start,
        "mean_off": float(((made.mean(0) - real.mean(0)) / std).abs().max()),
        "std_off": float((made.std(0) / std - 1).abs().max()),
    }


def mixture(train: Tensor, chosen_by: Tensor, test: Tensor, seed: int) -> np.ndarray:
    best, found = -np.inf, None
    for count in [k for k in (1, 2, 3, 4, 6, 8, 12, 16, 20, 25, 30, 35, 40) if k == 1 or 2 * k <= len(train)]:
        model = GaussianMixture(count, random_state=seed).fit(train)
        if (value := model.score(chosen_by)) > best:
            best, found = value, model.score_samples(test)
    assert found is not None
    return found


def kde(train: Tensor, chosen_by: Tensor, test: Tensor, seed: int) -> np.ndarray:
    models = [KernelDensity(bandwidth=width).fit(train) for width in np.geomspace(0.03, 1, 12)]
    return max(models, key=lambda model: model.score(chosen_by[:2000])).score_samples(test)


def flow(train: Tensor, chosen_by: Tensor, test: Tensor, seed: int) -> np.ndarray:
    """Neural spline flow, three transforms of two layers of 64, stopped by validation."""
    import zuko

    torch.manual_seed(seed)
    model = zuko.flows.NSF(train.shape[1], transforms=3, hidden_features=(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    best, found, since = -np.inf, None, 0
    for _ in range(200):
        for batch in train[torch.randperm(len(train))].split(256):
            optimizer.zero_grad()
            (-model().log_prob(batch).mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            since += 1
            if (value := float(model().log_prob(chosen_by).mean())) > best:
                best, found, since = value, model().log_prob(test).numpy(), 0
        if since == 10:
            break
    assert found is not None
    return found


BASELINES = {"mixture": mixture, "kde": kde, "flow": flow}


def measured(method: str, path: Path, seed: int, folder: Path) -> dict[str, float]:
    if method == "scoresde":
        return trained(path, seed, folder)
    start, data = time.time(), Table(str(path), seed=seed)
    assert data.validation is not None
    train, chosen_by, test = (data.encode(part.raw[:], Rng(seed)) for part in (data.train, data.validation, data.test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = BASELINES[method](train, chosen_by, test, seed)
    nats = found + data.codec.log_volume(data.test.raw[:], test).numpy()
    return {"nats": nats.mean(), "error": nats.std() / len(nats) ** 0.5, "seconds": time.time() - start}


def report(rows: list[dict], methods: list[str]) -> str:
    """Mean over the seeds ± its standard error; of one seed, that over the test rows."""
    lines = [
        "| table | " + " | ".join(methods) + " | largest error of a mean, of a deviation | seconds |",
        "|---" * (len(methods) + 3) + "|",
    ]
    for name in dict.fromkeys(row["table"] for row in rows):
        cells = []
        for method in methods:
            own = [row for row in rows if row["table"] == name and row["method"] == method]
            nats = np.array([row["nats"] for row in own])
            many = len(own) > 1
            error = nats.std(ddof=1) / len(own) ** 0.5 if many else own[0]["error"] if own else 0.0
            cells.append(f"{nats.mean():.3f} ± {error:.3f} ({len(own)})" if own else "–")
        own = [row for row in rows if row["table"] == name and row["method"] == "scoresde"]
        off = [f"{np.mean([row[key] for row in own]):.1%}" for key in ("mean_off", "std_off")] if own else ["–"]
        seconds = f"{np.mean([row['seconds'] for row in own]):.0f}" if own else "–"
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(off)} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", nargs="+", default=list(MADE))
    parser.add_argument("--methods", nargs="+", default=["scoresde", *BASELINES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/tables"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in range(options.seeds):
        for name in options.tables:
            path = write(name, options.folder)
            for method in options.methods:
                if any((row["table"], row["method"], row["seed"]) == (name, method, seed) for row in rows):
                    continue
                row = {"table": name, "method": method, "seed": seed, **measured(method, path, seed, options.folder)}
                rows.append(
                    {key: float(value) if isinstance(value, np.floating) else value for key, value in row.items()}
                )
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
    print(report(rows, options.methods))


if __name__ == "__main__":
    main()
