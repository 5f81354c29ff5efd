"""Errors that are the user's to mend: a command line prints their one line and exits with 2; no traceback.

Everything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """A bad argument, file or setting. The message names the value, what is allowed, and the next step."""


class CheckpointError(UserError):
    """Weights that are missing, damaged, or do not fit the network they are meant for."""


def reason_of(error: object, limit: int = 200) -> str:
    """An error's words for a message of one line, cut to ``limit`` characters; its class where it has none."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= limit else f"{words[: limit - 3]}..."


def counted(count: int, noun: str) -> str:
    """A number and what it counts, as in "1 frame" and "2 frames"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def run_command_line(main: Callable[[], int | None]) -> None:
    """Runs a command's ``main`` and turns the user's mistakes into one line on stderr and exit status 2.

    Ctrl-C ends the process at once with 130: an orderly end would wait for a program that is being compiled, and
    crash in it. What a ``KeyboardInterrupt`` says, such as the next step, stands behind "interrupted". Letters that the
    output has no bytes for, such as those of a caption where it takes ASCII, are written as their numbers.
    """
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
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
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            print(": ".join(["interrupted", *map(str, error.args)]), file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as error:
        if platforms := _platforms_that_are_not_here(error):
            reason = reason_of(error) if isinstance(error, RuntimeError) else "there is no such device here"
            print(
                f"error: JAX cannot run on JAX_PLATFORMS={platforms}, as the environment asks ({reason}); "
                "unset JAX_PLATFORMS, or give it the value cpu",
                file=sys.stderr,
            )
            sys.exit(2)
        if "cudnn" in str(error).lower():
            hint = "XLA's own forms need no cuDNN: --kernels xla, or --compute.kernels xla in training"
            print(f"hint: {hint}", file=sys.stderr, flush=True)
        raise
    sys.exit(status or 0)


def _platforms_that_are_not_here(error: Exception) -> str | None:
    """What ``JAX_PLATFORMS`` holds, where the error is that JAX found none of these when it looked for devices."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    looked = frame.f_code.co_name == "backends" and frame.f_globals.get("__name__") == "jax._src.xla_bridge"
    return os.environ.get("JAX_PLATFORMS") if looked and isinstance(error, (AssertionError, RuntimeError)) else None
