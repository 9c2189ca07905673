"""Markdown table of a run's results, as README and docs show it.

python -m tools.experiments.results_table runs/quickstart/results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xray.evaluation.suites import result_table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of a run")
    results = json.loads(parser.parse_args().results.read_text("utf-8"))
    print(result_table(results).markdown(), end="")


if __name__ == "__main__":
    main()
