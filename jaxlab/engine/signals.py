"""Ctrl-C and SIGTERM: heard at once, obeyed at the next step, and never waited for longer than the grace allows."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType

SAVED = 75  # EX_TEMPFAIL, which schedulers take as "start me again"


class Stop:
    """Knows whether somebody asked the run to stop; a context manager that puts the old handlers back.

    Python runs a signal handler only between its own instructions, so not inside a long compilation. The number of the
    signal is therefore also written to a socket by the interpreter itself, and a thread that listens there ends the
    process with exit code 75 when the grace is over.

    Args:
        grace: seconds between the signal and the end; 0 waits as long as it takes.
    """

    def __init__(self, grace: float = 0.0):
        self.grace = grace
        self.requested = False
        self._over = threading.Event()

    def __enter__(self) -> Stop:
        """Installs the handlers; outside the main thread whoever called handles signals."""
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._old = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
            if self.grace > 0:
                self._reader, self._writer = socket.socketpair()
                self._writer.setblocking(False)
                self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Puts the old handlers back."""
        self._over.set()
        if self._main:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            if self.grace > 0:
                signal.set_wakeup_fd(self._wakeup)
                self._writer.close()
                self._watcher.join()
                self._reader.close()  # not before: a second signal would find nobody at the other end

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: leave now
        self.requested = True

    def _watch(self) -> None:
        if not self._reader.recv(1):
            return
        if not self._over.wait(self.grace):
            print(
                f"jaxlab: {self.grace:g} s of grace are over; the last checkpoint stands", file=sys.stderr, flush=True
            )
            os._exit(SAVED)
