"""Stopping on SIGTERM and Ctrl-C, at whatever moment they come.

A Python signal handler runs only between bytecodes of the main thread, and so not during minutes inside the compiler.
A thread that reads the signal's wake-up pipe runs at once: while nothing would be lost it ends the process on the
spot, otherwise it sets a flag that the loop asks for after every step, preview and save.

Imports nothing slow, so that the program can listen before it imports JAX.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which a second signal is the first one's echo: make and job runners signal the whole group and pass the
# signal on as well.
ONE_REQUEST = 2.0


class StopRequest:
    """Whether someone asked the run to stop, and by which signal. Make one, in the main thread, before anything slow.

    Attributes:
        nothing_to_lose: True while the process can end at once: at the start, while compiling and restoring, as long
            as this process has not taken a step; and again when all is saved.
        writing: a lock to hold while files are written that must not stay half-written.
        signal: what was asked for, None if nothing was.
    """

    def __init__(self):
        self.nothing_to_lose = True
        self.writing = threading.Lock()
        self.signal: signal.Signals | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = [signal.getsignal(number) for number in STOP_SIGNALS]
        self.listen()
        threading.Thread(target=self._watch, daemon=True, name="stop-request").start()

    def listen(self) -> None:
        """Takes over the signals; once more after ``jax.distributed`` has taken SIGTERM for itself."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # without a handler of Python's the pipe stays silent

    def close(self) -> None:
        """Gives the signals back, for programs that go on after a run."""
        signal.set_wakeup_fd(-1)
        for number, handler in zip(STOP_SIGNALS, self._before):
            signal.signal(number, handler)
        self._writer.close()  # which ends the thread

    def _watch(self) -> None:
        first = 0.0
        while word := self._reader.recv(1):
            if word[0] not in STOP_SIGNALS:
                continue
            asked = signal.Signals(word[0])
            if self.nothing_to_lose:
                with self.writing:
                    _say(f"{asked.name}: stopping at once; nothing is lost, the same command continues")
                    os._exit(exit_status(self.signal or asked))
            if self.signal is not None:
                if time.monotonic() - first < ONE_REQUEST:
                    continue
                _say(f"{asked.name} again: stopping at once; the last checkpoint stands, the same command continues")
                os._exit(128 + asked)
            self.signal, first = asked, time.monotonic()
            _say(f"{asked.name}: saving after this step, then stopping; once more to stop at once")

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective where there are several: all call it at the same step."""
        import jax

        if jax.process_count() == 1:
            return self.signal is not None
        import numpy as np
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
    before = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{before}{text}\n")
    sys.stderr.flush()
