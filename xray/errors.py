"""Errors a user can act on: each prints as one line and ends the command with exit code 2."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound="XrayError")


class XrayError(Exception):
    """The base of every error meant for the user."""

    agreed = False  # raised on every rank alike, so that one may speak for all

    def on_all_ranks(self: E) -> E:
        """This error, raised on every rank alike."""
        self.agreed = True
        return self


class ConfigError(XrayError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""


class ArtifactError(XrayError):
    """An artifact or a checkpoint that is missing, changed, or of another model."""


class DataError(XrayError):
    """Shards or samples that cannot be used."""


class TrainingError(XrayError):
    """A run that must not go on: a loss or a gradient that is not finite."""


class Preempted(XrayError):  # noqa: N818 - not an error: the run was told to stop and saved
    """A run that saved a checkpoint because a scheduler asked it to end."""


def brief(error: Exception) -> str:
    """The first line of an error's text, not too long for a log."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
