"""Sphinx configuration of the manual; `make docs` builds it into site/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.docs.reference import fill  # noqa: E402
from xray.version import __version__  # noqa: E402

project = "xray"
version = release = __version__
copyright = "the authors of xray, Apache-2.0"
extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["results"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # as GitHub's, so that links work in both
suppress_warnings = ["myst.header"]
highlight_language = "text"  # of blocks without a language
smartquotes = False  # they would change "" and --options
html_theme = "furo"
html_title = f"xray {__version__}"
html_static_path = ["static"]
html_css_files = ["xray.css"]
html_show_sourcelink = False
html_copy_source = False
# Nothing is loaded from another host, neither at build time nor in the browser.
html_theme_options = {"top_of_page_buttons": []}
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([\w/]+)\.md\)")


def contents(text: str) -> str:
    """Make the site's navigation from the sections of index.md and the pages that they link."""
    parts = HEADING.split(text)
    trees = [
        f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(LINK.findall(body)) + "\n```"
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
        if LINK.search(body)
    ]
    return "\n\n".join([text, *trees])


def read(app: Any, name: str, source: list[str]) -> None:
    """Fill a page's generated parts before it is parsed."""
    text = fill(source[0])
    source[0] = contents(text) if name == "index" else text


def setup(app: Any) -> None:
    """Register the generated parts."""
    app.connect("source-read", read)
