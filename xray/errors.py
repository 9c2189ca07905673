"""Errors that a user can act on; a command prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

E = TypeVar("E", bound="XrayError")


class XrayError(Exception):
    """Base class of all errors for the user."""

    agreed = False  # True if every rank raises it: then only rank 0 prints it
    parted = False  # True if the ranks can agree no more: one has stopped or is lost

    def on_all_ranks(self: E) -> E:
        """Mark this error as raised on every rank and return it."""
        self.agreed = True
        return self


class ConfigError(XrayError):
    """A setting that is unknown, has the wrong type, or conflicts with another."""


class ArtifactError(XrayError):
    """An artifact or checkpoint that is missing, changed, or belongs to another model."""


class NoArtifactError(ArtifactError):
    """A place without an artifact, such as that of a stage that has not run yet."""


class DataError(XrayError):
    """Shards or samples that cannot be used."""


class BadSample(DataError):  # noqa: N818 - the loader catches it and replaces the sample
    """One sample that cannot be used.

    cause: short reason, under which such samples are counted. detail: more about this sample.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.detail = cause, detail


class Killed(BadSample):
    """A sample whose decoding crashed or was ended at a limit; it is not tried again."""


class TrainingError(XrayError):
    """A run that cannot continue, such as one with a loss that is not finite."""


class Preempted(XrayError):  # noqa: N818 - not an error: the run was told to stop and saved
    """A run that saved a checkpoint and stopped because it was asked to."""


def brief(error: BaseException) -> str:
    """Return the first line of an error's text, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint such as "; did you mean 'x'?", or "" if no word is close."""
    match = closest(word, words)
    return f"; did you mean {match!r}?" if match else ""


def closest(word: str, words: Iterable[str]) -> str:
    """Return the word that is most like another one; "" if none is close."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), "")
