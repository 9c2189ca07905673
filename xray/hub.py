"""The Hugging Face Hub: if it answers, what its errors mean, and `hf://` addresses.

huggingface_hub finds the token itself: HF_TOKEN, or that of `hf auth login`. No code of xray reads
it. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT and proxies are respected.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from xray.errors import ConfigError, brief

SCHEME = "hf://"
LOGIN = "run `hf auth login`, or set HF_TOKEN"
_ADDRESS = re.compile(
    r"hf://((?P<kind>models|datasets|spaces|buckets)/)?"
    r"(?P<name>(?!(models|datasets|spaces|buckets)/)[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(pr|convert)/[\w.-]+|[^/]+))?(/(?P<path>.*))?"
)


@dataclass(frozen=True)
class Address:
    """A place on the hub: `hf://[datasets/]ORG/NAME[@REVISION][/PATH]`."""

    kind: str  # models, datasets, spaces or buckets
    name: str  # ORG/NAME
    revision: str  # a branch, tag or commit; "" for the default branch
    path: str


def is_hub(url: str) -> bool:
    """Return True for an address on the hub."""
    return url.startswith(SCHEME)


def parse_address(url: str) -> Address:
    """Parse an `hf://` address; raises ConfigError for one that names no repository."""
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise ConfigError(
            f"{url} is no address on the hub, such as hf://ORG/NAME, hf://ORG/NAME@REVISION or "
            "hf://datasets/ORG/NAME/FOLDER"
        )
    kind, revision, path = (match[key] or "" for key in ("kind", "revision", "path"))
    return Address(kind or "models", match["name"], revision, path)


def silence() -> str:
    """Ask the hub once; return why it does not answer, or "" if it does.

    Without a network, huggingface_hub and the libraries on it try each request six times, for up
    to a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the types depend on the HTTP library
        return f"{constants.ENDPOINT} does not answer ({brief(error)})"
    return ""


def advice(error: BaseException) -> str:
    """Return what an error of the hub means and what to do, in one line; "" for other errors."""
    if "huggingface_hub.errors" not in sys.modules:  # then the error is not from it
        return ""
    return next(filter(None, map(_advice, _causes(error))), "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that caused it: fsspec and others raise errors of their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _advice(error: BaseException) -> str:
    from huggingface_hub import errors
    from huggingface_hub.utils import get_token

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if not isinstance(error, errors.HfHubHTTPError):
        return ""
    name = getattr(error, "repo_id", None) or "the repository"
    if isinstance(error, errors.GatedRepoError):
        first = f"accept the conditions on the page of {name}"
        return f"its owner restricts access: {first}" + ("" if get_token() else f", then {LOGIN}")
    known = get_token() is not None
    if isinstance(error, errors.RepositoryNotFoundError):
        other = "your token does not give access to it" if known else f"is private: {LOGIN}"
        return f"{name} does not exist on the hub, or {other}"
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept your token" if known else f"the hub wants a token: {LOGIN}"
    return "your token does not permit this" if status == 403 else ""
