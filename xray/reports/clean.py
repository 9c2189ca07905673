"""Table of the files that `xray data clean` removes and keeps."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.checks.clean import KINDS, Derived
from xray.reports.tables import ResultTable
from xray.words import count


def clean_table(title: str, gone: Sequence[Derived], kept: Sequence[Derived]) -> ResultTable:
    """Make the table of derived files, a row per kind."""
    table = ResultTable(title, ("kind", "files", "MB", "holds", "made again by", ""))
    for kind in KINDS.values():
        for state, items in (("remove", gone), ("keep", kept)):
            sizes = [item.size for item in items if item.kind == kind]
            if sizes:
                megabytes = f"{sum(sizes) / 1e6:,.2f}"
                table.rows.append(
                    (kind.name, f"{len(sizes):,}", megabytes, kind.holds, kind.again, state)
                )
    return table


def total(items: Sequence[Derived]) -> str:
    """Return number and size of files, such as `3 files (0.12 MB)`."""
    size = sum(item.size for item in items) / 1e6
    return f"{count(len(items), 'file')} ({size:,.2f} MB)"
