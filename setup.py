"""Build of the package: setup.cfg has all metadata but the page for PyPI, which is made here.

PyPI draws no mermaid diagrams and has no files for relative links.
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?!https?:|#)(?P<path>[^)\s]+)\)")


def page(readme: str, source: str) -> str:
    """Return the README without its diagrams, and with links to the files of the repository.

    source: URL of the repository; if it is empty, links and images become plain text.
    """

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({source}/{kind}/main/{link['path']})"

    readme = re.sub(r"^```mermaid\n.*?^```\n+", "", readme, flags=re.DOTALL | re.MULTILINE)
    return LINK.sub(absolute if source else r"\g<text>", readme)


def source_url(config: str) -> str:
    """Return the URL of the repository that setup.cfg names in `project_urls`, or ""."""
    parser = ConfigParser()
    parser.read_string(config)
    lines = parser.get("metadata", "project_urls", fallback="").splitlines()
    urls = dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if "=" in line)
    return urls.get("Source", "").rstrip("/")


if __name__ == "__main__":
    url = source_url((HERE / "setup.cfg").read_text("utf-8"))
    setup(long_description=page((HERE / "README.md").read_text("utf-8"), url))
