"""The page of a sweep: nothing from elsewhere, nothing unescaped, curves and pictures that are those of the runs."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scoresde.runs.files import Run, read
from scoresde.sweep.curves import Curve, chart, hue, spans, thin
from scoresde.sweep.page import page, write_page

VOID = {"meta", "img", "br", "link"}
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'</style>"


class Page(HTMLParser):
    """Elements with their attributes, the text of each kind of element, and whether every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open[-1:]:
            self.text.setdefault(tag, []).append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def job(folder: Path, k: int, *, size: int = 8, state: str = "finished", **values: str) -> Run:
    """A job of a sweep with ten rows and a picture of `size` × `size` random-looking dots."""
    folder = folder / str(k)
    folder.mkdir(parents=True)
    overrides = [f"{name}={value}" for name, value in values.items()]
    record = {"status": state, "overrides": overrides, "error": "no data" if state == "failed" else ""}
    (folder / "job.json").write_text(json.dumps(record))
    if state == "finished":
        rows: list[dict[str, Any]] = [{"images": 64 * i, "train/loss": 4.0 / i + k} for i in range(1, 11)]
        rows += [{"images": 640, "eval/loss": 2.0 + k, "eval/bpd/ode": 1.5 + k, "eval/bpd_stderr": 0.1, "final": 1}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text(
            json.dumps({"images": 640, "bits_per_dim": {"mean": 1.5 + k, "stderr": 0.125}})
        )
        noise = bytes((i * i * 31 + k) % 251 for i in range(size * size))
        Image.frombytes("L", (size, size), noise).save(folder / "samples.png", compress_level=0)
    return read(folder)


@pytest.fixture
def three(tmp_path: Path) -> list[Run]:
    return [job(tmp_path, 0, sde="vp"), job(tmp_path, 1, sde="ve"), job(tmp_path, 2, sde="vq", state="failed")]


def test_the_page_has_every_run_in_table_curves_and_pictures(three: list[Run], tmp_path: Path) -> None:
    found = Page(page(three, title="a sweep", base=tmp_path))
    assert not found.open and found.text["h1"] == ["a sweep"]
    assert [row["data-run"] for row in found.all("tr") if "data-run" in row] == ["0", "1", "2"]
    heads = found.text["button"]
    assert heads == ["run", "bits/dim", "loss", "images", "state", "sde", "note"]
    assert {"1.5000 ± 0.1250", "2.5000 ± 0.1250", "640", "vp", "ve", "vq", "no data"} <= set(found.text["td"])
    pictures = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in found.all("img")]
    assert pictures == [(tmp_path / name / "samples.png").read_bytes() for name in "01"]
    assert any("no data" in text for text in found.text["p"])  # where the third picture would be
    charts = [figure for figure in found.all("figure") if figure["class"] == "chart"]
    assert len(charts) == 3
    titles = ["training loss", "held-out loss", "held-out bits/dim"]
    assert [c for c in found.text["figcaption"] if c in titles] == titles
    assert [label for label in found.text["text"] if label in titles] == titles  # of the vertical axes
    assert found.text["text"].count("images") == 3
    lines, entries = found.all("g", **{"class": "run"}), found.all("li", **{"class": "run"})
    assert [line["data-run"] for line in lines] == [entry["data-run"] for entry in entries] == ["0", "1"] * 3
    assert all(element["style"] == f"--h:{hue(int(element['data-run']))}" for element in (*lines, *entries))
    assert found.text["li"][:2] == ["0 · sde=vp: 0.4", "1 · sde=ve: 1.4"]  # the legend ends with the last value


def test_nothing_comes_from_elsewhere(three: list[Run], tmp_path: Path) -> None:
    """No address but those of this page and of its folder, and a rule by which the browser refuses any other."""
    text = page(three, title="a sweep", base=tmp_path)
    found = Page(text)
    for tag, attributes in found.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name, "")
            assert not value or value.startswith(("data:image/png", "#run-")), f"<{tag} {name}={value[:60]}>"
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|eval\(|innerHTML", text)
    (rule,) = found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert rule["content"].startswith("default-src 'none'; img-src data:;")
    assert not found.all("link") and not found.all("iframe")


def test_whatever_is_in_a_run_is_text(tmp_path: Path) -> None:
    """A title, folder, key, value, reason and label that look like HTML add no element and no attribute."""
    plain = [job(tmp_path / "a", 0, key="b"), job(tmp_path / "a", 1, key="c")]
    plain[0].state, plain[0].reason = "failed", "reason"
    key = HOSTILE.replace("=", ":")
    hostile = [job(tmp_path / "b", 0, **{key: HOSTILE}), job(tmp_path / "b", 1, **{key: "c"})]
    hostile[0].state, hostile[0].reason = "failed", HOSTILE
    a = Page(page(plain, title="title", base=tmp_path / "a"))
    b = Page(page(hostile, title=HOSTILE, base=tmp_path / "b"))
    assert [tag for tag, _ in a.elements] == [tag for tag, _ in b.elements]
    assert [list(attributes) for _, attributes in a.elements] == [list(attributes) for _, attributes in b.elements]
    assert b.text["h1"] == [HOSTILE] and HOSTILE in b.text["td"] and key in b.text["button"]
    assert a.text["script"] == b.text["script"]  # no datum is within the script


def test_pictures_beyond_the_limit_are_links(tmp_path: Path) -> None:
    """The first that fit are embedded; the page stays below the limit and a bit; a damaged one is said to be so."""
    runs = [job(tmp_path / "s p", k, size=200, seed=str(k)) for k in range(4)]
    size = (tmp_path / "s p" / "0" / "samples.png").stat().st_size
    limit = int(2.5 * size * 4 / 3)
    write_page(tmp_path / "page.html", runs, title="t", limit=limit)
    text = (tmp_path / "page.html").read_text()
    found = Page(text)
    assert len(found.all("img")) == 2 and len(text) < limit + 40_000
    links = [link["href"] for link in found.all("a") if not link["href"].startswith("#")]
    assert links == ["s%20p/2/samples.png", "s%20p/3/samples.png"]
    (tmp_path / "s p" / "0" / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (tmp_path / "s p" / "1" / "samples.png").unlink()
    (tmp_path / "s p" / "1" / "progress").mkdir()
    for step in (3, 12):
        Image.new("L", (step, 1)).save(tmp_path / "s p" / "1" / "progress" / f"step-{step:08d}.png")
    found = Page(page(runs[:2], title="t", base=tmp_path))
    assert "samples.png is damaged." in found.text["p"]
    (picture,) = found.all("img")  # the last one drawn during training
    newest = tmp_path / "s p" / "1" / "progress" / "step-00000012.png"
    assert base64.b64decode(picture["src"].partition(",")[2]) == newest.read_bytes()


def test_a_page_of_nothing_is_a_page(tmp_path: Path) -> None:
    assert Page(page([], title="none", base=tmp_path)).text["h1"] == ["none"]
    assert not Page(page([Run(tmp_path / "x")], title="one", base=tmp_path)).all("svg")


@pytest.mark.parametrize("log", [False, True])
def test_a_line_is_where_its_axes_say(log: bool) -> None:
    """Places in the picture are linear in the values, or in their logarithms, to the six decimals that are written."""
    points = [(64.0 * i, 5.0 + (1000.0 if log else 10.0) / i) for i in range(1, 65)]
    found = Page(chart("loss", [Curve("run", 7, points)]))
    (line,) = [place for place, (tag, a) in enumerate(found.elements) if tag == "g" and a.get("data-run") == "7"]
    drawn = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", found.elements[line + 1][1]["d"])]
    assert len(drawn) == len(points)
    for axis, is_log in ((0, True), (1, log)):  # 64 to 4,096 images: logarithmic
        values = [math.log(point[axis]) if is_log else point[axis] for point in points]
        places = [place[axis] for place in drawn]
        slope = (places[-1] - places[0]) / (values[-1] - values[0])
        assert (slope > 0) == (axis == 0)  # SVG counts from the top
        for value, place in zip(values, places, strict=True):
            assert place == pytest.approx(places[0] + slope * (value - values[0]), abs=1e-4)


def test_an_axis_is_logarithmic_where_positive_numbers_span_much() -> None:
    assert spans([1.0, 10.0], 10) and not spans([1.0, 9.9], 10) and not spans([0.0, 10.0], 10)
    assert not spans([-1.0, 10.0], 10) and not spans([5.0], 10)


def test_names_that_look_like_mathematics_are_names() -> None:
    """They stand in the legend, which matplotlib does not write: `$` and a leading `_` mean nothing there."""
    found = Page(chart("loss", [Curve("_a $x^$", 0, [(1.0, 2.0)]), Curve("$\\b$", 1, [(1.0, 2.0), (2.0, 2.0)])]))
    assert found.text["li"] == ["_a $x^$: 2", "$\\b$: 2"]


def test_a_page_without_matplotlib_says_what_curves_need(
    three: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Page(page(three, title="a sweep", base=tmp_path))
    assert found.text["p"].count("Learning curves need matplotlib: ") == 1 and not found.all("svg")
    assert "pip install 'scoresde[plot]'" in found.text["code"] and len(found.all("img")) == 2


def test_long_curves_are_means_of_neighbours_and_bad_numbers_are_left_out() -> None:
    """A straight line stays one, with its mean; NaN and infinity are no points."""
    points = [(float(i), 3.0 * i) for i in range(3000)]
    found = thin([*points, (1.0, math.nan), (math.inf, 1.0)])
    assert len(found) == 300 and all(y == pytest.approx(3 * x) for x, y in found)
    assert sum(x for x, _ in found) / 300 == pytest.approx(2999 / 2)
    assert chart("loss", [Curve("a", 0, [(1.0, math.nan)]), Curve("b", 1, [])]) == ""
    assert len({hue(k) for k in range(100)}) > 90 and min(abs(hue(i) - hue(j)) for i in range(6) for j in range(i)) > 20
