"""scoresde-pack: pictures or arrays of a folder, a tar or a zip in one file that training reads batch by batch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .. import __version__
from ..checks import whole
from ..data.readers.pack import pack
from ..data.readers.source import existing
from ..runs.progress import track
from ..runs.publish import replacing
from ..train.signals import Interrupted, Signals


def main() -> None:
    """Entry point of `scoresde-pack`."""
    parser = argparse.ArgumentParser(prog="scoresde-pack", description=__doc__)
    parser.add_argument("source", type=Path, help="a folder, a .tar, .tar.gz, .tar.bz2 or a .zip")
    parser.add_argument("target", type=Path, help="the file to write, .npz")
    parser.add_argument("--size", type=int, help="cut pictures to their central square and resize it to so many pixels")
    colours = parser.add_mutually_exclusive_group()
    colours.add_argument("--grey", dest="grey", action="store_true", default=None, help="make pictures grey")
    colours.add_argument("--colour", dest="grey", action="store_false", help="refuse grey pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    chosen = parser.parse_args()
    if chosen.target.suffix != ".npz":
        parser.error(f"{chosen.target}: the file that is written ends in .npz")
    if chosen.target.exists() and not chosen.overwrite:
        parser.error(f"{chosen.target} is there already; give another name, or --overwrite")
    with Signals() as signals:
        try:
            with signals.interruptible():
                print(write(chosen.source, chosen.target, chosen.size, chosen.grey))
        except Interrupted:
            sys.exit(signals.code)  # what was written so far is gone
        except (ValueError, TypeError, OSError, ImportError) as error:
            sys.exit(f"error: {error}")


def write(source: Path, target: Path, size: int | None = None, grey: bool | None = None) -> str:
    """Packs `source` into the file `target`, which is there whole or not at all; in words what it holds.

    Raises:
        OSError, ValueError: see `pack`.
    """
    size = None if size is None else whole(size, "--size")
    source = existing(source, folder=Path(source).is_dir())
    existing(target.absolute().parent, folder=True)
    with replacing(target) as file:
        found = pack(source, file, size=size, grey=grey, track=track)
    classes = f", {len(found.classes)} classes" if found.classes else ""
    kind = "" if str(found.dtype) == "uint8" else " data.raw_low=… data.raw_high=…"
    kind = " data.levels=65536" if str(found.dtype) == "uint16" else kind
    return (
        f"{found.samples:,} samples {found.shape} of {found.dtype}{classes} in {target}\n"
        f"scoresde-train data=arrays data.path={target}{kind}"
    )


if __name__ == "__main__":
    main()
