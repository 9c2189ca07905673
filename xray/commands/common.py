"""Helpers of all commands: arguments, errors as one line, and settings in the help text."""

from __future__ import annotations

import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeVar,
)

import typer

from xray import dist
from xray.agreement import is_lost_connection
from xray.errors import ConfigError, Preempted, TrainingError, XrayError
from xray.files import disk_is_full
from xray.urls import conceal, redact

if TYPE_CHECKING:
    import torch

    from data_pipelines.shards.source import Source

C = TypeVar("C", bound=Callable[..., None])
S = TypeVar("S")
SHARDS = "Folders, globs, {000..123} patterns or URLs of .tar shards"
DATA = f"{SHARDS}; folders or lists (.csv, .tsv, .jsonl, .json, .parquet) of pictures and clips"
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings")]
ModelName = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="An artifact, or released weights (xray import)")
]
ArtifactName = Annotated[str, typer.Argument(help="An artifact: a folder or a URL")]
EvalRecipe = Annotated[
    str, typer.Option(help="Take the data sets from section eval of this recipe")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
KeepRate = Annotated[
    float | None, typer.Option(min=0.01, max=1.0, help="Replaces the artifact's own")
]
Modality = Annotated[str, typer.Option(help="image or video (default: what there is)")]
Workers = Annotated[int, typer.Option(min=1, help="Processes")]
# 75 is EX_TEMPFAIL: run the same command again. A user's mistake is 2.
EXIT_CODES: dict[type[Exception], int] = {Preempted: 75, TrainingError: 1}
LONGEST = 2000  # characters of an error; a name may have 4,096
SETTING = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Print a user's error as one line; rank 0 prints an error that all ranks raise.

    The command gets URLs without their credentials, and no error or traceback shows them.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            try:
                command(*map(_concealed, args), **{k: _concealed(v) for k, v in kwargs.items()})
            except RuntimeError as error:
                if is_lost_connection(error):
                    raise TrainingError(
                        "another rank has ended or cannot be reached: its output says why; the "
                        f"same command continues from the last checkpoint ({error})"
                    ) from error
                # torch raises it from a signal handler, at any place.
                if "DataLoader worker (pid" not in str(error):
                    raise
                from data_pipelines.stream.workers import reporting_dead_workers

                with reporting_dead_workers():
                    raise
            finally:
                sys.stdout.flush()
            dist.leave()
        except (XrayError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                raise  # typer ends without a message and with exit code 1
            raise SystemExit(_report(error)) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
                raise
            print(f"xray: {_line(error)}; set a smaller batch_size", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            if dist.is_main():
                print(
                    "xray: interrupted; run the same command again to continue from what is saved",
                    file=sys.stderr,
                )
            raise SystemExit(130) from None
        except Exception:
            trace = traceback.format_exc()
            if redact(trace) == trace:
                raise
            sys.stderr.write(redact(trace))
            raise SystemExit(1) from None

    return run


def _report(error: XrayError | OSError) -> int:
    """Print an error as one line, and return the exit code.

    A rank whose error the others do not raise ends here.
    """
    agreed = isinstance(error, XrayError) and error.agreed
    if agreed:
        dist.leave()
    if dist.is_main() or not agreed:
        who = "xray" if dist.is_main() else f"xray, rank {dist.rank()}"
        advice = ": free space there, or write elsewhere" if disk_is_full(error) else ""
        print(f"{who}: {_line(error)}{advice}", file=sys.stderr)
    code = EXIT_CODES.get(type(error), 2)
    if not agreed and dist.world_size() > 1:
        sys.stderr.flush()
        os._exit(code)  # threads of collectives, which never end, could keep it alive
    return code


@contextmanager
def checking() -> Iterator[None]:
    """Check what was typed, before torch is imported and the ranks are connected.

    Every rank makes the same checks, so rank 0 alone prints the error.
    """
    try:
        yield
    except XrayError as error:
        raise error.on_all_ranks() from None


def check_artifact(name: str) -> None:
    """Raise ArtifactError if a local folder is no artifact; its files are verified later."""
    from data_pipelines.shards.remote import is_remote
    from xray.artifacts.artifact import find_manifest

    if not is_remote(name):
        find_manifest(name)


def check_model(name: str) -> None:
    """Raise ArtifactError if a local folder is neither an artifact nor released weights."""
    from xray.imports.place import is_released

    if not is_released(name):
        check_artifact(name)


def connected_device() -> torch.device:
    """Return the fastest device of this rank, after the ranks are connected."""
    device = dist.choose_device("auto")
    if dist.world_size() > 1:
        from xray.training.deepspeed_setup import init_distributed

        init_distributed(device)
    return device


def _concealed(value: Any) -> Any:
    """Conceal the URLs of an argument; settings, KEY=VALUE, are concealed when they are read."""
    if isinstance(value, list):
        return [_concealed(item) for item in value]
    setting = isinstance(value, str) and SETTING.match(value)
    return conceal(value) if isinstance(value, str) and not setting else value


def _line(error: Exception) -> str:
    """Return an error's text as one line, without credentials; a very long one is shortened."""
    text = " ".join(redact(str(error)).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def _reader_is_gone() -> bool:
    """Return True if nobody reads stdout any longer, as after `xray ... | head`."""
    poll = select.poll()
    poll.register(1, 0)  # poll always reports POLLERR
    return bool(poll.poll(0))


def settings(schema: type[S], items: Sequence[str] | None) -> S:
    """Build the config of a command from its KEY=VALUE arguments."""
    from xray.config.loading import build, kinds_of, parse_overrides

    return build(schema, parse_overrides(items or [], kinds_of(schema)))


def is_setting(item: str) -> bool:
    """Tell KEY=VALUE from a path or a pattern; what begins with an existing path is one."""
    return bool(SETTING.match(item)) and not os.path.exists(item.partition("/")[0])


def check_folder(folder: Path | str) -> None:
    """Raise ConfigError if a setting stands where the command takes a folder to write to."""
    if is_setting(str(folder)):
        raise ConfigError(f"{folder} is a setting: name the folder to write to before it")


def make_room(*files: Path | None) -> None:
    """Create the folders of the files that a command writes at its end; raises ConfigError."""
    for file in filter(None, files):
        if file.is_dir():
            raise ConfigError(f"{file} is a folder: name the file to write")
        file.parent.mkdir(parents=True, exist_ok=True)


def split_settings(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (data, settings) of a command's arguments; raises ConfigError without data."""
    given = [item for item in items if is_setting(item)]
    data = [item for item in items if item not in given]
    if not data:
        raise ConfigError("no data is named: give a path, a pattern or a URL")
    return data, given


def open_any(pattern: str, modality: Any, user: str, kinds: Sequence[str] | None = None) -> Source:
    """Open data for the command `user`; kinds: those that it takes, None for all."""
    from data_pipelines.ingest.plain_files import Request
    from data_pipelines.ingest.user_data import ALL, open_data

    return open_data(pattern, Request(Path(pattern).name, modality), kinds or ALL, user)


def open_shards(pattern: str, modality: str, user: str) -> Source:
    """Open shards for a command that writes a sidecar beside them."""
    return open_any(pattern, modality, user, ("shards",))


def takes(config: str, *given: str) -> Callable[[C], C]:
    """Decorate a command so that its help lists the fields of a config dataclass.

    config: `package.module:Class`, imported only for the help. given: fields that the command
    sets itself.
    """

    def mark(command: C) -> C:
        command.takes = (config, given)  # type: ignore[attr-defined]
        return command

    return mark
