"""Error of a sample that cannot be used."""

from __future__ import annotations

from xray.errors import DataError


class BadSample(DataError):  # noqa: N818 - it is counted and replaced, not raised to the user
    """A sample that cannot be used; `cause` groups the counts."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail
