"""Entry point of the command line."""

from __future__ import annotations

import signal


def main() -> None:
    """Run a command. Until its modules are imported, Ctrl-C ends the process at once."""
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from xray.commands.main import main as run

    if raises:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
