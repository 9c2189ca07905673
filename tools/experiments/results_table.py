"""Print a run's results as the Markdown table that README and docs show.

usage: python -m tools.experiments.results_table runs/quickstart/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xray.evaluation.results_table import result_table


def main() -> None:
    print(result_table(json.loads(Path(sys.argv[1]).read_text())).markdown(), end="")


if __name__ == "__main__":
    main()
