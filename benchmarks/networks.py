"""Solvers on trained networks, beside other libraries: how near each comes to the end of the probability-flow ODE.

    python benchmarks/networks.py train --data /folder/with/the/data
    python benchmarks/networks.py train moons_relu ethanol --data /folder/with/the/data

The data are MNIST's four IDX files in `mnist/`, `cifar10_4000/images.npz` (x uint8 (n, 32, 32, 3)),
`spoken_digits/spoken_digits.npz` (samples int16, offsets) and `molecules/ethanol.npz` (positions (n, 9, 3)); the digits
come with scikit-learn and the points of the plane are drawn. Weights are written to --folder, outside the repository.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from recipes import RECIPES, train
from recipes import load as load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the networks that are not there yet")
    training.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(RECIPES)}")
    training.add_argument("--data", type=Path, default=Path(), help="folder of the data sets")
    training.add_argument("--again", action="store_true", help="also those that are there")
    training.add_argument("--folder", type=Path, default=Path("~/.cache/scoresde/networks"), help="of the weights")
    training.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.folder.expanduser()
    if unknown := sorted(set(options.names) - set(RECIPES)):
        raise SystemExit(f"{', '.join(unknown)}: no network of that name; there are {', '.join(RECIPES)}.")
    for name in options.names or RECIPES:
        if (folder / f"{name}.safetensors").is_file() and not options.again:
            print(f"{name}: there already")
            continue
        start = time.process_time()
        train(name, options.data, folder)
        print(f"{name}: trained in {time.process_time() - start:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
