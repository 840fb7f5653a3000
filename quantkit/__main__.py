"""`quantkit` and `python -m quantkit`."""

from __future__ import annotations

import sys


def start() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends it as quietly as later.

    So does help that cannot be printed: commands say for themselves what the operating system refused.
    """
    try:
        from quantkit.cli.main import main  # half a second

        main(prog_name="quantkit")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    except OSError as fault:
        from quantkit.cli.console import format_os_error

        sys.stderr.write(f"error: {format_os_error(fault)}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    start()
