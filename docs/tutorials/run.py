"""Runs the tutorials: writes what each block prints below it, and keeps the picture that a page saves.

python docs/tutorials/run.py            # all of them; or some: images table
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

FOLDER = Path(__file__).resolve().parent
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n.*?^```\n)?", re.DOTALL | re.MULTILINE)


def run(page: Path) -> tuple[str, dict[str, Any]]:
    """The page with what its blocks print, run in turn in the present folder, and the names that they leave."""
    names: dict[str, Any] = {}
    torch.manual_seed(0)

    def executed(match: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(match[1], str(page), "exec"), names)
        said = printed.getvalue()
        return f"```python\n{match[1]}```\n" + (f"\n```\n{said}```\n" if said else "")

    return BLOCK.sub(executed, page.read_text(encoding="utf-8")), names


def main() -> None:
    chosen = [page for page in PAGES if page.stem in sys.argv[1:]] or PAGES
    for page in chosen:
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            text, _ = run(page)
            for picture in Path(scratch).glob(f"{page.stem}.png"):
                (FOLDER / picture.name).write_bytes(picture.read_bytes())
        page.write_text(text, encoding="utf-8")
        print(f"{page.name}: {os.times().user:.0f} s of processor time so far", flush=True)


if __name__ == "__main__":
    main()
