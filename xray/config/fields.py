"""Helpers to declare config fields."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import field
from typing import Any


def runtime(default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """Declare a field that does not change the result; the hash of the config leaves it out."""
    return field(default=default, default_factory=factory, metadata={"runtime": True})


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint such as "; did you mean 'x'?", or "" if no word is close."""
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
