"""Findings of a section of `gpu_check`, and the scale at which it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """Comparison of a measured value with its requirement."""

    name: str
    ok: bool
    found: Any  # value that JSON can hold
    want: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {self.found} (want {self.want})"


@dataclass(frozen=True)
class Number:
    """Measured value without a requirement; the unit is part of the name."""

    name: str
    value: Any  # value that JSON can hold

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        return f"       {self.name}: {value}"


@dataclass(frozen=True)
class Note:
    """Remark about something that could not be measured."""

    text: str

    def __str__(self) -> str:
        return f"note   {self.text}"


Finding = Check | Number | Note


@dataclass(frozen=True)
class Scale:
    """Size of the measurements: toy models for a test on a CPU, or real ones.

    until: value of `time.monotonic` after which a section begins no further measurement.
    """

    toy: bool
    until: float = float("inf")

    def left(self) -> float:
        """Return the seconds that remain for the section."""
        return self.until - time.monotonic()


Run = Callable[[torch.device, Scale], Iterator[Finding]]


@dataclass
class Section:
    """Result of a section: one line of `results.jsonl`.

    status: passed, failed (a check failed), crashed, timeout, or skipped.
    """

    section: str
    status: str = "passed"
    seconds: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Add a finding."""
        if isinstance(finding, Check):
            self.checks.append(asdict(finding))
            if not finding.ok:
                self.status = "failed"
        elif isinstance(finding, Number):
            self.numbers[finding.name] = finding.value
        else:
            self.notes.append(finding.text)

    @property
    def failed(self) -> bool:
        """True if a check failed or the section did not end."""
        return self.status in ("failed", "crashed", "timeout")
