"""Error type for a sample that cannot be used."""

from __future__ import annotations

from xray.errors import DataError


class BadSample(DataError):  # noqa: N818 - the loader catches it and replaces the sample
    """Error for one sample that cannot be used.

    cause: short reason, under which such samples are counted. detail: more about this sample.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail
