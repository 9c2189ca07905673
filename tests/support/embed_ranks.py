"""Runs `xray ARGS...` as one rank, with parts so small that every rank gets some."""

from __future__ import annotations

from xray.commands.main import main
from xray.search import embed

if __name__ == "__main__":
    embed.LEAST = 16
    main()
