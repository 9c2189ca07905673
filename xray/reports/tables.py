"""Tables as terminal text, Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def short(number: int) -> str:
    """Format a number with 3 digits and a suffix: 9600 -> 9.6k, 1000000000 -> 1B."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def figure(number: float) -> str:
    """Format a number with at least 2 digits, without an exponent: 0.037, 9.4, 4,000."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


NAME = 24  # longest row name, in characters, that is never wrapped


@dataclass
class ResultTable:
    """Table of text with a title and column heads; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines below the table

    def print(self) -> None:
        """Print the table on the terminal."""
        # Text, because rich would read a plain string as markup
        table = Table(title=Text(self.title), title_justify="left")
        names = [line for row in [self.columns, *self.rows] for line in row[0].split("\n")]
        for number, column in enumerate(self.columns):
            justify: Any = "left" if number == 0 else "right"
            no_wrap = number == 0 and max(map(len, names)) <= NAME
            table.add_column(Text(column), justify=justify, overflow="fold", no_wrap=no_wrap)
        for row in self.rows:
            table.add_row(*map(Text, row))
        Console(highlight=False).print(table)
        for note in self.notes:
            print(note)

    def html(self) -> str:
        """Return the table as HTML, with its title and notes."""
        cells = ["".join(f"<th>{html.escape(c)}</th>" for c in self.columns)]
        cells += ["".join(f"<td>{html.escape(str(c))}</td>" for c in row) for row in self.rows]
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        title = f"<h2>{html.escape(self.title)}</h2>"
        return f"{title}<div class=wide><table>{body}</table></div>{notes}"

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown, without its title."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        cells = [
            [cell.replace("|", "\\|").replace("\n", "<br>") for cell in row]
            for row in (self.columns, rule, *self.rows)
        ]
        return "".join(f"| {' | '.join(row)} |\n" for row in cells)
