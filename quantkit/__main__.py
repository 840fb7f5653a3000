"""`quantkit` and `python -m quantkit`."""

from __future__ import annotations

import sys


def start() -> None:
    """Run the command line.

    Handles Ctrl-C during the import of the package, and errors of the operating system outside of
    commands, e.g. help that cannot be printed.
    """
    try:
        from quantkit.cli.main import main

        main(prog_name="quantkit")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    except OSError as error:
        from quantkit.cli.console import format_os_error

        sys.stderr.write(f"error: {format_os_error(error)}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    start()
