"""What all commands share: settings on the command line, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from xray import dist
from xray.errors import Preempted, TrainingError, XrayError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings"),
]
# 75 is EX_TEMPFAIL: run the same command again. A user's mistake is 2.
EXIT_CODES: dict[type[Exception], int] = {Preempted: 75, TrainingError: 1}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Print a user's error as one line; rank 0 speaks for ranks that agreed on it."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            dist.leave()
        except (XrayError, OSError) as error:
            agreed = isinstance(error, XrayError) and error.agreed
            if agreed:
                dist.leave()
            if dist.is_main() or not agreed:
                who = "xray" if dist.is_main() else f"xray, rank {dist.rank()}"
                print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(EXIT_CODES.get(type(error), 2)) from None
        except KeyboardInterrupt:
            if dist.is_main():
                print(
                    "xray: interrupted; the same command goes on from what is saved",
                    file=sys.stderr,
                )
            raise SystemExit(130) from None

    return run


ArtifactName = Annotated[str, typer.Argument(help="An artifact: a folder, or a URL")]
