"""Stopping on SIGTERM and Ctrl-C, at whatever moment they come.

A Python signal handler runs only between bytecodes of the main thread, and so not during minutes inside the compiler.
A thread that reads the signal's wake-up pipe runs at once: while nothing would be lost it ends the process on the
spot, otherwise it sets a flag that the loop asks for after every step, preview and save.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

import jax
import numpy as np


class StopRequest:
    """Whether someone asked the run to stop, and by which signal. Make one, in the main thread, before anything slow.

    ``nothing_to_lose`` is True while the process can end at once: at the start and while compiling, when no step has
    been taken since the last checkpoint.
    """

    def __init__(self):
        self.nothing_to_lose = True
        self.signal: signal.Signals | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # without a handler of Python's the pipe stays silent
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True, name="stop-request").start()

    def _watch(self) -> None:
        while True:
            number = self._reader.recv(1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            name = signal.Signals(number).name
            if self.nothing_to_lose:
                _say(f"{name}: stopping at once; no step was taken since the last checkpoint, nothing is lost")
                os._exit(exit_status(signal.Signals(number)))
            if self.signal is not None:
                _say(f"{name} again: stopping at once; the last checkpoint stands")
                os._exit(130)
            self.signal = signal.Signals(number)
            _say(f"{name}: saving after this step, then stopping; once more to stop at once")

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective where there are several: all call it at the same step."""
        if jax.process_count() == 1:
            return self.signal is not None
        from jax.experimental import multihost_utils

        asked = bool(np.any(multihost_utils.process_allgather(np.asarray(self.signal is not None))))
        if asked and self.signal is None:
            self.signal = signal.SIGTERM
        return asked


def exit_status(stop: signal.Signals | None) -> int:
    """0 after SIGTERM, a scheduler's ordinary way to end a job; 130 after Ctrl-C, as shells expect."""
    return 130 if stop == signal.SIGINT else 0


def _say(text: str) -> None:
    # print() may be in the middle of a line of the progress bar's; one write is not torn
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()
