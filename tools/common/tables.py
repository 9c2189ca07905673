"""Tables that the tools print and write as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean


@dataclass(frozen=True)
class Table:
    """Markdown table with a title; `str` returns its text."""

    title: str
    heads: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        return f"\n{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_tables(tables: Iterable[Table], machine: str, path: Path | None) -> None:
    """Print each table when it is ready; write all tables and the machine's name to `path`."""
    printed = []
    for table in tables:
        print(table, flush=True)
        printed.append(asdict(table))
    if path:
        path.write_text(
            json.dumps({"hardware": machine, "tables": printed}, indent=2) + "\n", "utf-8"
        )


def spread(values: Sequence[float]) -> str:
    """Format the mean of values and half their range, with one decimal."""
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.1f} ± {half:.1f}" if len(values) > 1 else f"{values[0]:.1f}"
