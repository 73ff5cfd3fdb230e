"""The command ``sidelight``, also as ``python -m sidelight``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C during its imports ends the process at once."""
    import signal

    handler = signal.getsignal(signal.SIGINT)
    # KeyboardInterrupt would print a traceback here, and pydantic may convert it to another error.
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sidelight.cli import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    # With ``python -m``, this is the working directory, which may contain downloads.
    if not sys.flags.safe_path:
        del sys.path[0]
    main()
