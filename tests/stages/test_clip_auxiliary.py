"""Options of the hashtag stage that the clip stage's auxiliary loss reads; the rest are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stages.clip_config import READ, check_unread
from stages.hashtag_config import HashtagOptions
from xray.errors import ConfigError


@dataclasses.dataclass
class WithANewOption(HashtagOptions):
    sharpness: float = 0.5


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else [1] if value is None else value * 2 + 1


def test_an_option_that_is_new_is_refused_until_it_is_read() -> None:
    check_unread(WithANewOption())
    with pytest.raises(ConfigError, match=r"hashtag\.sharpness=0.7 does nothing in the clip stage"):
        check_unread(WithANewOption(sharpness=0.7))


@pytest.mark.parametrize("item", dataclasses.fields(HashtagOptions), ids=lambda item: item.name)
def test_every_option_is_read_or_refused(item: Any) -> None:
    options = HashtagOptions()
    setattr(options, item.name, changed(getattr(options, item.name)))
    if item.name in READ:
        check_unread(options)
    else:
        with pytest.raises(ConfigError, match=rf"hashtag\.{item.name}="):
            check_unread(options)
