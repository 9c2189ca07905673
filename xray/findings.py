"""What a check of this computer says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken"]  # missing: something is slower or left out without it


@dataclass(frozen=True)
class Finding:
    """A row of the table; lacks: what does not work, or less well, and what to do."""

    what: str
    found: str
    lacks: str = ""
    state: State = "ok"
