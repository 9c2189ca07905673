"""Access to the model hub: one request decides whether libraries ask it or only read its cache.

Without a network, huggingface_hub and the libraries on it try each request six times, for up to a
minute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from xray.errors import brief
from xray.hub import advice, silence


@contextlib.contextmanager
def hub(instead: str) -> Iterator[Callable[[Exception], str]]:
    """Let libraries ask the hub if it answers, else only read its cache.

    instead: advice on how to name files that were downloaded by hand. Yields a function that
    describes an error of a library in one line.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    cause = silence()

    def explain(error: Exception) -> str:
        chain: list[BaseException | None] = [error]  # open_clip raises RuntimeError from OSError
        while chain[-1] is not None:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        if not cause or not any(isinstance(link, OSError) for link in chain):
            return advice(error) or brief(error)
        return f"it is not in the cache, and {cause}: {instead}"

    constants.HF_HUB_OFFLINE = bool(cause)
    try:
        yield explain
    finally:
        constants.HF_HUB_OFFLINE = offline
