"""`quantkit` and `python -m quantkit`."""

from __future__ import annotations

import sys


def start() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends it as quietly as later."""
    try:
        from quantkit.cli import main  # half a second

        main(prog_name="quantkit")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
