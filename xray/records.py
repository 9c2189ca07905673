"""JSON files that xray wrote: each is read as the type that it must have."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xray.errors import ArtifactError, XrayError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def parse_record(content: str | bytes, schema: type[T]) -> T:
    """Parse JSON to a type, such as `dict[str, float]` or a dataclass, whose fields are checked.

    Raises ValueError, with one line that says what is wrong where, for anything else: text that is
    not JSON or not UTF-8, that is nested too deeply, or that has other keys or types.
    """
    from pydantic import ValidationError

    try:
        adapter: TypeAdapter[T] = _adapter(schema)  # type: ignore[arg-type]
        return adapter.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def read_record(
    path: Path, schema: type[T], kind: type[XrayError] = ArtifactError, advice: str = ""
) -> T:
    """Read a JSON file as a type; raises `kind`, with the advice, if it is missing or damaged."""
    try:
        return parse_record(path.read_bytes(), schema)
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror}{advice}") from error
    except ValueError as error:
        raise kind(f"{path} cannot be read: {error}{advice}") from error


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)
