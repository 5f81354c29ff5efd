"""Errors that are the user's to mend: a command line prints their one line and exits with 2; no traceback.

Everything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A bad argument, file or setting. The message names the value, what is allowed, and the next step."""


class CheckpointError(UserError):
    """Weights that are missing, damaged, or do not fit the network they are meant for."""


def run_command_line(main: Callable[[], int | None]) -> None:
    """Runs a command's ``main`` and turns the user's mistakes into one line on stderr and exit status 2."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough of it, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (UserError, FileNotFoundError) as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
