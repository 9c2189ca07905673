"""Print a run's results as the Markdown table that README and docs show.

usage: python tools/results_table.py runs/quickstart/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xray.evaluation.table import result_table


def main() -> None:
    print(result_table(json.loads(Path(sys.argv[1]).read_text())).markdown(), end="")


if __name__ == "__main__":
    main()
