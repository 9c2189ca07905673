"""Tables as terminal text, Markdown and HTML."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xray.reports.html import folded


def short(number: int) -> str:
    """Format a number with 3 digits and a suffix: 9600 -> 9.6k, 1000000000 -> 1B."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def figure(number: float) -> str:
    """Format a number with at least 2 digits, without an exponent: 0.037, 9.4, 4,000."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


PART = 24  # characters of a path or an id on the terminal, which may be broken
WORD = re.compile(r"\[[^\]]*\]|\S+")  # of a cell; an interval [low, high] is one
# A word or an interval, or a part of a name such as vit_base.mae
PIECE = re.compile(r"(?:\[[^\]]*\]|[^\s\[_./:-]+[_./:-]*|\S)\s*")
LONG = 40  # characters of a cell on a page; a column with longer ones is of texts, which wrap


def _longest(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def _wrapped(cell: str, width: int) -> str:
    """Return a cell for a column of this width; an interval that does not fit gets its own line.

    A name that is longer than the column breaks between its parts.
    """
    if _longest(cell) <= width:
        return cell
    lines = cell.replace(" [", "\n[").split("\n")
    long = [any(len(word) > width for word in WORD.findall(line)) for line in lines]
    return "\n".join(
        _in_parts(line, width) if breaks else line for line, breaks in zip(lines, long, strict=True)
    )


def _in_parts(name: str, width: int) -> str:
    """Break a name that is longer than this width between its parts."""
    if _longest(name) <= width:
        return name
    lines = [""]
    for piece in PIECE.findall(name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _cell(tag: str, content: str, text: bool) -> str:
    """Return a cell as HTML; one of a column of texts wraps, in the direction of its language."""
    return f"<{tag}{' class=text dir=auto' if text else ''}>{folded(content)}</{tag}>"


@dataclass
class ResultTable:
    """Table of text with a title and column heads; the first column names the row.

    prose: the other columns are sentences, which are not aligned to the right.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines below the table
    prose: bool = False

    def print(self) -> None:
        """Print the table on the terminal; if words would be broken, each row as a list."""
        console = Console(highlight=False)
        columns = list(zip(self.columns, *self.rows, strict=True))
        widths = _widths(columns, console.width - 3 * len(columns) - 1)
        if not widths:
            self._print_lists(console)
            return
        # Text, because rich would read a plain string as markup
        table = Table(title=Text(self.title), title_justify="left")
        for number, (column, width) in enumerate(zip(self.columns, widths, strict=True)):
            cells = [line for row in self.rows for line in row[number].split("\n")]
            text = number == 0 or self.prose or max(map(len, cells), default=0) > PART
            justify: Any = "left" if text else "right"
            head = Text(_in_parts(column, width))
            table.add_column(head, justify=justify, width=width, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(_wrapped(*cell)) for cell in zip(row, widths, strict=True)))
        console.print(table)
        self._print_notes()

    def _print_lists(self, console: Console) -> None:
        """Print each row as a list of its columns, for a terminal that is too narrow."""
        console.print(Text(self.title), soft_wrap=True)
        for name, *cells in self.rows:
            head = f"{self.columns[0]}: " if self.columns[0] else ""
            console.print(Text(head + " ".join(name.split())), soft_wrap=True)
            for column, cell in zip(self.columns[1:], cells, strict=True):
                if cell:
                    told = cell.replace("\n+", " +").replace("\n", ", ")
                    console.print(Text(f"   {column}: {told}"), soft_wrap=True)
        self._print_notes()

    def _print_notes(self) -> None:
        for note in self.notes:
            print(note)

    def html(self) -> str:
        """Return the table as HTML, with its title and notes."""
        lengths = [
            max(map(_longest, column)) for column in zip(self.columns, *self.rows, strict=True)
        ]
        texts = [number > 0 and length > LONG for number, length in enumerate(lengths)]
        cells = []
        for tag, row in [("th", self.columns), *(("td", row) for row in self.rows)]:
            cells.append("".join(map(_cell, itertools.repeat(tag), row, texts)))
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


def _unbroken(head: str, *cells: str) -> list[str]:
    """List the parts of a column's text that are not broken."""
    words = [word for cell in cells for word in WORD.findall(cell)]
    return [*words, *(piece.rstrip() for piece in PIECE.findall(head)), ""]


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Choose the width of each column so that no word is broken; [] if that does not fit."""
    words = [max(min(len(word), PART) for word in _unbroken(*column)) for column in columns]
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    while sum(widths) > room:
        # the first column, which names the rows, is wrapped last
        wide = [n for n, width in enumerate(widths) if n and width > words[n]]
        if not wide and widths[0] == words[0]:
            return []
        widths[max(wide, key=widths.__getitem__, default=0)] -= 1
    return widths
