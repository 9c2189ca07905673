"""Hashtags of a sample, as a field of its JSON file has them."""

from __future__ import annotations

import re
from typing import Any

from xray.errors import BadSample

HASH = re.compile("[#\uff03]")


def listed_hashtags(value: Any) -> list[str]:
    """Return the tags of a list or of a text, as they are spelled.

    A text may be "a b", "#a #b", "#a, #b" or "#a#b". Entries of a list that are neither text nor
    whole numbers are left out. Raises BadSample for any other value.
    """
    value = value or []
    if isinstance(value, str):
        words = (word.strip(",;") for word in value.split())
        return [tag for word in words for tag in (HASH.split(word) if HASH.match(word) else [word])]
    if not isinstance(value, list):
        raise BadSample("broken hashtags", f"{type(value).__name__}, not a list")
    return [str(tag) for tag in value if isinstance(tag, str | int)]


def joined_hashtags(value: Any) -> str:
    """Return the tags of a field as one caption, without their #; raises BadSample."""
    tags = (tag.strip().lstrip("#\uff03") for tag in listed_hashtags(value))
    return " ".join(" ".join(tags).split())
