"""The runs of a folder as one HTML file: table, learning curves and pictures. It loads nothing from elsewhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence, Set
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from ..runs.files import Run, count_states, keys, measured
from ..runs.listing import fit, number, number_in, text
from ..runs.publish import publish
from .curves import Curve, chart, hue

# Pictures beyond this many characters are linked instead of embedded.
LIMIT = 10 * 2**20


def write_page(path: Path, runs: Sequence[Run], *, title: str, limit: int = LIMIT) -> None:
    """Publishes the page.

    Args:
        path: the file; links to pictures are relative to it.
        runs: in the order in which they are shown.
        title: a name for all of them together.
        limit: bytes of embedded pictures, ≥ 0; further ones are links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # names of folders may hold bytes that are no UTF-8, and files halves of characters
    publish(path, page(runs, title=title, base=path.parent, limit=limit).encode("utf-8", "replace"))


def page(runs: Sequence[Run], *, title: str, base: Path, limit: int = LIMIT) -> str:
    """The page as text; see `write_page`."""
    tables, differ, same = keys(runs)
    names = [name_of(run, table, differ) for run, table in zip(runs, tables, strict=True)]
    shared = " ".join(f"<code>{escape(f'{key}={text(value)}')}</code>" for key, value in same.items())
    parts = {
        kind: Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    }
    parts["title"], parts["differ"] = escape(title), escape(", ".join(differ)) or "nothing"
    parts["count"] = f"{len(runs)} run{'s' * (len(runs) != 1)}: {count_states(runs)}"
    parts["same"] = (
        f"<details><summary>What is the same in all: {len(same)} keys</summary>{shared}</details>" if same else ""
    )
    parts["heads"], parts["rows"] = _table(runs, tables, differ)
    parts["charts"], parts["cards"] = _charts(runs, names), _cards(runs, names, base, limit)
    return Template(parts.pop("html")).substitute(parts)


def name_of(run: Run, table: dict[str, Any], differ: Sequence[str]) -> str:
    """`3 · sde=vp seed=1`: the folder, and up to four of the keys that set the run apart."""
    parts = [f"{key.rpartition('.')[2]}={text(table[key])}" for key in differ if key in table][:4]
    return fit(" · ".join(filter(None, [run.folder.name, " ".join(parts)])), None)


def _table(runs: Sequence[Run], tables: Sequence[dict[str, Any]], differ: Sequence[str]) -> tuple[str, str]:
    """(headings, rows) of the table of all runs."""
    why, figures = any(run.reason for run in runs), ("bits/dim", "loss", "images")
    numeric = {key for key in differ if all(number_in(table.get(key)) is not None for table in tables)}
    kinds = {"run": "name"} | dict.fromkeys((*figures, *numeric), "number")
    heads = [
        f'<th class="{kinds.get(name, "")}" scope="col"><button type="button">{escape(name)}</button></th>'
        for name in ["run", *figures, "state", *differ, *["note"] * why]
    ]
    rows = []
    for k, (run, table) in enumerate(zip(runs, tables, strict=True)):
        dot, shown = f'<span class="dot" style="--h:{hue(k)}"></span>', measured(run)
        cells = [
            _cell(run.folder.name, f'{dot}<a href="#run-{k}">{escape(run.folder.name)}</a>', "name"),
            *(_cell(run.numbers[head], shown[head], "number") for head in figures),
            _cell(run.state, run.state, run.state),
            *(_cell(table.get(key), escape(text(table.get(key), "")), kinds.get(key, "")) for key in differ),
            *([_cell(run.reason, escape(run.reason), "why")] if why else []),
        ]
        rows.append(f'<tr data-run="{k}">{"".join(cells)}</tr>')
    return "".join(heads), "\n".join(rows)


def _cell(value: Any, inner: str, kind: str) -> str:
    """A cell that shows `inner`, which is HTML, and is sorted by `value`."""
    return f'<td class="{kind}" data-value="{escape(text(value, ""))}">{inner}</td>'


def _charts(runs: Sequence[Run], names: Sequence[str]) -> str:
    bits = {key for run in runs for row in run.rows for key in row if key.startswith("eval/bpd") and "std" not in key}
    measures = {"training loss": {"train/loss"}, "held-out loss": {"eval/loss"}, "held-out bits/dim": bits}
    drawn = ""
    for title, keys_of in measures.items():
        curves = [Curve(name, k, _points(run, keys_of)) for k, (run, name) in enumerate(zip(runs, names, strict=True))]
        try:
            drawn += chart(title, curves)
        except ImportError:
            drawn = "<p>Learning curves need matplotlib: <code>pip install 'scoresde[plot]'</code>.</p>"
            break
    return drawn and f'<h2>Learning curves</h2><div class="charts">{drawn}</div>'


def _points(run: Run, keys_of: Set[str]) -> list[tuple[Any, Any]]:
    """(images, value) of each row that has a number under one of the keys."""
    found = [(row.get("images"), row[key], row.get("final")) for row in run.rows for key in keys_of & row.keys()]
    known = [(x, y, final) for x, y, final in found if number(x) is not None and number(y) is not None]
    # the final number is measured on other held-out points than those during training: it is not on the same curve
    return [(x, y) for x, y, final in known if not final or all(end for _, _, end in known)]


def _cards(runs: Sequence[Run], names: Sequence[str], base: Path, left: int) -> str:
    """The last samples of each run; when `left` bytes of pictures are embedded, links to them."""
    cards = ""
    for k, (run, name) in enumerate(zip(runs, names, strict=True)):
        score = f"loss {run.loss:.5g}" if run.loss else run.state
        if run.bits is not None:
            score = f"{run.bits:.4f} bits/dim"
        body, used = _picture(run, name, base, left)
        left -= used
        cards += (
            f'<figure class="card" id="run-{k}" data-run="{k}" style="--h:{hue(k)}"><figcaption>'
            f'<span class="dot"></span>{escape(name)}<small>{escape(score)}</small></figcaption>{body}</figure>'
        )
    return cards and f'<h2>Samples</h2><div class="cards">{cards}</div>'


def _picture(run: Run, name: str, base: Path, left: int) -> tuple[str, int]:
    """(HTML of a run's last samples, bytes used): a picture, a link to it, or the reason why there is none."""
    progress = sorted((run.folder / "progress").glob("step-*.png"), reverse=True)
    path = next((p for p in (run.folder / "samples.png", *progress) if p.is_file()), None)
    if path is None:
        return f'<p class="none">No picture. {escape(run.reason)}</p>', 0
    try:
        size = path.stat().st_size * 4 // 3 + 4
        content = path.read_bytes() if size <= left else None
    except OSError as error:
        return f'<p class="none">The picture cannot be read: {escape(str(error))}</p>', 0
    if content is None:
        link = escape(quote(os.fsencode(os.path.relpath(path, base))))
        return f'<p class="none"><a href="{link}">{escape(path.name)}</a>, {size * 3 / 2**22:.1f} MB</p>', 0
    if not content.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in content[-16:]:
        return f'<p class="none">{escape(path.name)} is damaged.</p>', 0
    data = base64.b64encode(content).decode()
    return f'<img loading="lazy" alt="samples of {escape(name)}" src="data:image/png;base64,{data}">', len(data)
