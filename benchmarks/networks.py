"""Solvers on trained networks, beside other libraries: how near each comes to the end of the probability-flow ODE.

    python benchmarks/networks.py train --data /folder/with/the/data
    python benchmarks/networks.py measure --data /folder/with/the/data --budgets 5 10 20 --names digits_vp ethanol

The data are MNIST's four IDX files in `mnist/`, `cifar10_4000/images.npz` (x uint8 (n, 32, 32, 3)),
`spoken_digits/spoken_digits.npz` (samples int16, offsets) and `molecules/ethanol.npz` (positions (n, 9, 3)); the digits
come with scikit-learn and the points of the plane are drawn. Weights are written to --folder, outside the repository.
`features/lenet_mnist.npz`, the arrays of a LeNet-5, gives the LeNet-FD.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from endpoints import REFERENCE, SETS, Case, Estimate, Result, compare, jackknife, planned, rms, worth
from matplotlib.figure import Figure
from plain import Report, table
from quality import LIBRARIES
from recipes import RECIPES, facts, train
from recipes import load as load
from tqdm import tqdm

BUDGETS = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
COLUMNS = (*LIBRARIES, "DDIM", "default", "named", "fitted")
OURS = ("default", "named", "fitted")
TITLES = {
    "DDIM": "DDIM, best grid",
    "default": "`sample(budget=)`",
    "named": "ours, by name",
    "fitted": "`fit_sampler`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the networks that are not there yet")
    training.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(RECIPES)}")
    training.add_argument("--again", action="store_true", help="also those that are there")
    measuring = commands.add_parser("measure", help="compare solvers on the networks that are there")
    measuring.add_argument("--names", nargs="+", default=[], metavar="NAME", help="default: all that are trained")
    measuring.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), help="network calls")
    measuring.add_argument("--noises", type=int, default=16, help=f"in each of {SETS} sets, from 64 dimensions on")
    measuring.add_argument("--points", type=int, help="in each set below 64 dimensions; default 16 times --noises")
    measuring.add_argument("--fit", nargs="*", type=int, default=[5, 10, 20], help="budgets to fit a sampler for, too")
    measuring.add_argument(
        "--again", nargs="+", default=[], choices=COLUMNS, metavar="GROUP",
        help=f"measure these anew, of {', '.join(COLUMNS)}; all else that was measured on these noises is kept in "
        "--folder, so calls for some of the networks or budgets can be joined by one for all",
    )  # fmt: skip
    measuring.add_argument("--results", type=Path, help="folder; default results/networks beside this file")
    for command in (training, measuring):
        command.add_argument("--data", type=Path, default=Path(), help="folder of the data sets")
        command.add_argument("--folder", type=Path, default=Path("~/.cache/scoresde/networks"), help="of the weights")
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder = options.folder.expanduser()
    if unknown := sorted(set(options.names) - set(RECIPES)):
        raise SystemExit(f"{', '.join(unknown)}: no network of that name; there are {', '.join(RECIPES)}.")
    there = [name for name in RECIPES if (options.folder / f"{name}.safetensors").is_file()]
    if options.command == "measure":
        measure(options, options.names or there)
        return
    for name in options.names or RECIPES:
        if name in there and not options.again:
            print(f"{name}: there already")
            continue
        start = time.process_time()
        train(name, options.data, options.folder)
        print(f"{name}: trained in {time.process_time() - start:.0f} s of CPU", flush=True)


def measure(options: argparse.Namespace, names: list[str]) -> None:
    """All networks at all budgets: rows as they come, then the tables and the picture."""
    folder = options.results or Path(__file__).parent / "results" / "networks"
    kept = {key: vars(options)[key] for key in ("names", "budgets", "fit", "noises", "points", "threads")}
    report = Report(SimpleNamespace(results=str(folder), **kept), "networks")
    points = options.points or 16 * options.noises
    sizes = {name: SETS * (points if dims(name, options.folder) < 64 else options.noises) for name in names}
    known = {name: facts(name, options.folder) for name in names}
    total = sum(
        planned(float(known[name]["spread"]), dims(name, options.folder), n, options.budgets, options.fit)
        for name, n in sizes.items()
    )
    parts, rows = [], []
    with tqdm(total=total, unit="sample", unit_scale=True, mininterval=5) as bar:
        for name, n in sizes.items():
            bar.set_description(name)
            before = bar.n
            case = Case(name, options.folder, n // SETS, bar)
            bar.total += bar.n - before - REFERENCE * n
            found = compare(case, options.budgets, options.fit, options.again)
            text, new = section(case, found, options.data, report)
            parts.append(text)
            rows += new
            tqdm.write(text)
    picture(rows).savefig(folder / "networks.png", dpi=110)
    report.close("\n\n".join([summary(rows), "![error against network calls](networks.png)", *parts]))


def dims(name: str, folder: Path) -> int:
    return math.prod(json.loads(facts(name, folder)["shape"]))


def section(
    case: Case, found: dict[int, dict[str, Result]], data: Path, report: Report
) -> tuple[str, list[dict[str, Any]]]:
    """The tables of one network, and its rows for the summary."""
    lenet = data / "features" / "lenet_mnist.npz"
    quality = worth(case.name, RECIPES[case.name].data(data), lenet if lenet.is_file() else None)
    head = [
        "calls",
        *(TITLES.get(group, group) for group in COLUMNS),
        "`sample` / best peer",
        "by name / best peer",
        "fitted / best peer",
    ]
    errors, rows = [head], []
    values = [["calls", "best peer", *(TITLES[group] for group in COLUMNS[3:])]]
    for budget, best in found.items():
        peer = min((best[library] for library in LIBRARIES if library in best), key=lambda r: rms(r.squares))
        row: dict[str, Any] = {"network": case.name, "budget": budget}
        for group in COLUMNS:
            if group in best:
                estimate, ratio = best[group].error, best[group].over(peer)
                row[group], row[f"{group} / peer"] = estimate.value, ratio.value
                report.add("error", estimate.value, error=estimate.error, ratio=ratio.value, ratio_error=ratio.error,
                           network=case.name, budget=budget, group=group,
                           method=best[group].method, measured_at=best[group].commit)  # fmt: skip
        rows.append(row)
        cells = [f"{r.error}<br>{r.method}" if (r := best.get(group)) else "–" for group in COLUMNS]
        ratios = [str(best[group].over(peer)) if group in best else "" for group in OURS]
        errors.append([str(budget), *cells, *ratios])
        if quality is not None:
            made = {"peer": peer, **{group: best[group] for group in COLUMNS[3:] if group in best}}
            measured = {group: sampled(quality[1], r.x) for group, r in made.items()}
            for group, estimate in measured.items():
                report.add(quality[0], estimate.value, error=estimate.error, network=case.name, budget=budget,
                           group=group, method=made[group].method, measured_at=made[group].commit)  # fmt: skip
            values.append([str(budget), *(str(measured.get(g, "–")) for g in ("peer", *COLUMNS[3:]))])
    text = (
        f"## {case.name}\n\n{type(case.model.sde).__name__}, samples {case.shape}, spread of the data "
        f"{case.spread:.3g}; {case.n} noises. RMS distance per dimension to the end of the ODE; two solves of it, at "
        f"{case.rtol:g} and {10 * case.rtol:g}, are {case.gap:.1e} apart.\n\n{table(errors)}"
    )
    if quality is not None:
        text += f"\n\n{quality[0]} to held-out data; at the end of the ODE {sampled(quality[1], case.exact)}:\n\n"
        text += table(values)
    return text, rows


def sampled(quality: Any, x: torch.Tensor) -> Estimate:
    return jackknife(lambda chosen: quality(x[chosen]), len(x))


def summary(rows: list[dict[str, Any]]) -> str:
    """How often ours is ahead of the best of all peers, by budget."""
    kinds = ("median ratio", "≤ 1", "≤ 0.7", "worst")
    ours = [f"{TITLES[group]}: {kind}" for group in OURS for kind in kinds]
    lines = [["calls", "networks", *ours, "`sample` behind DDIM"]]
    for budget in sorted({row["budget"] for row in rows}):
        part, cells = [row for row in rows if row["budget"] == budget], []
        for group in OURS:
            there = [row for row in part if group in row or group != "fitted"]
            ratios = [row.get(f"{group} / peer", math.inf) for row in there]
            if not ratios:
                cells += ["–"] * 4
                continue
            cells += [f"{statistics.median(ratios):.2f}", str(sum(r <= 1 for r in ratios)),
                      str(sum(r <= 0.7 for r in ratios)), f"{max(ratios):.2f}"]  # fmt: skip
        behind = [row["network"] for row in part if row.get("default", float("inf")) > row.get("DDIM", 0)]
        lines.append([str(budget), str(len(part)), *cells, ", ".join(behind) or "none"])
    return (
        "Ratios are to the best of all peers' methods and grids on the same network and noises: below 1 is closer to "
        f"the end of the ODE than all of them.\n\n{table(lines)}"
    )


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Error against calls, one panel per network."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    height = -(-len(names) // 4)
    made = Figure(figsize=(14, 2.9 * height), layout="constrained")
    for axes, name in zip(made.subplots(height, 4, squeeze=False).flat, names, strict=False):
        for group in COLUMNS:
            points = [(row["budget"], row[group]) for row in rows if row["network"] == name and group in row]
            if not points:
                continue
            style = "--" if group in LIBRARIES else ":" if group == "DDIM" else "o-"
            axes.loglog(
                *zip(*points, strict=True), style, label=TITLES.get(group, group).strip("`"), markersize=3, linewidth=1
            )
        budgets = sorted({row["budget"] for row in rows if row["network"] == name})
        axes.set_xticks(budgets, [str(budget) for budget in budgets], fontsize=7)
        axes.minorticks_off()
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    made.axes[0].legend(fontsize=6)
    made.supxlabel("network calls", fontsize=8)
    made.supylabel("RMS distance to the end of the ODE", fontsize=8)
    return made


if __name__ == "__main__":
    main()
