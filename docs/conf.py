"""How Sphinx makes the site: `make docs`. The pages are Markdown, the reference is read from the docstrings."""

from __future__ import annotations

import re
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util.logging import getLogger

import scoresde

log = getLogger(__name__)

project = "scoresde"
author = copyright = "The scoresde authors"
release = version = scoresde.__version__

# Pages lie where GitHub shows them, so that a link between two of them is the same in both places.
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/**.md",
    "README.md",
    "examples/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = ["benchmarks/reliability"]
# Tables of results begin with a second-level heading, and are found through benchmarks/README.md.
suppress_warnings = ["myst.header", "toc.not_included"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
highlight_language = "text"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "literal"

html_theme = "furo"
html_title = "scoresde"
html_math_renderer = "mathml"  # formulas are part of the page: no script is fetched
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", plain)
    app.connect("env-check-consistency", complete)


def formula(page: Any, node: Any) -> None:
    """LaTeX as MathML, which browsers draw themselves."""
    inline = node.tagname == "math"
    drawn = convert(node.astext(), display="inline" if inline else "block")
    # between log and its argument there is a thin space, which latex2mathml leaves out
    page.body.append(re.sub(r"(<mi>log</mi>)(?!<mo stretchy)", r'\1<mspace width="0.17em"/>', drawn))
    raise SkipNode


def plain(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with some marks of reStructuredText: *event and |x| in formulas are none."""
    for k, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+|\*\*[^*\s][^*]*\*\*|(?<![\w(,*])\*[^*\s][^*,)]*[^*\s]\*(?!\w))", line)
        parts[::2] = [re.sub(r"([|]|\*(?! )|(?<=\w)_\b)", r"\\\1", part) for part in parts[::2]]
        lines[k] = "".join(parts)


def complete(app: Any, env: Any) -> None:
    """Every public name is in the reference, once."""
    entries = {name.rpartition(".")[2] for name, *_ in env.get_domain("py").get_objects()}
    for name in sorted({*scoresde.__all__} - entries - {"nn"}):
        log.warning("scoresde.%s has no entry in docs/api", name)
