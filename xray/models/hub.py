"""Access to the model hub: one request decides whether libraries ask it or only read its cache.

Without a network, huggingface_hub and the libraries on it try each request six times, for up to a
minute. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT and proxies are respected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from xray.errors import brief


@contextlib.contextmanager
def hub(instead: str) -> Iterator[Callable[[Exception], str]]:
    """Let libraries ask the hub if it answers, else only read its cache.

    instead: advice on how to name files that were downloaded by hand. Yields a function that
    describes an error of a library in one line.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    cause = "HF_HUB_OFFLINE is set" if offline else _silence()

    def explain(error: Exception) -> str:
        chain: list[BaseException | None] = [error]  # open_clip raises RuntimeError from OSError
        while chain[-1] is not None:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        if not cause or not any(isinstance(link, OSError) for link in chain):
            return brief(error)
        return f"it is not in the cache, and {cause}: {instead}"

    constants.HF_HUB_OFFLINE = bool(cause)
    try:
        yield explain
    finally:
        constants.HF_HUB_OFFLINE = offline


def _silence() -> str:
    """Ask the hub once; return why it does not answer, or "" if it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the types depend on the HTTP library
        return f"{constants.ENDPOINT} does not answer ({brief(error)})"
    return ""
