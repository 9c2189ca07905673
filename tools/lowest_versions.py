"""Print the lowest versions that setup.cfg allows, as constraints for pip.

python tools/lowest_versions.py > lowest.txt && pip install -c lowest.txt -e ".[dev,docs]"
"""

from __future__ import annotations

import argparse
import configparser
import re
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "setup.cfg"
REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(\[[\w,]+\])?>=(?P<bound>[\w.]+)(,<[\w.]+)?")


def lowest(file: Path = FILE) -> dict[str, str]:
    """Read the lower bound of every package that the extras `dev` and `docs` install.

    Raises ValueError for a requirement without a lower bound and for a package with two bounds.
    """
    config = configparser.ConfigParser()
    config.read_string(file.read_text("utf-8"))
    extras = config["options.extras_require"]
    lines = config["options"]["install_requires"] + extras["dev"] + extras["docs"]
    bounds: dict[str, str] = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        if line.startswith("#"):
            continue
        match = REQUIREMENT.fullmatch(line)
        if match is None:
            raise ValueError(f"{file}: {line!r} has no lower bound: write it as name>=version")
        if bounds.setdefault(match["name"], match["bound"]) != match["bound"]:
            raise ValueError(f"{file}: {match['name']} has two lower bounds")
    return bounds


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, bound in lowest().items():
        print(f"{name}=={bound}")


if __name__ == "__main__":
    main()
