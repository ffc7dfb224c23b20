"""A limit on the time that what a recipe brings (an expression, a template) may take."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class TooSlow(Exception):
    """The time is over; the message says how long it was."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what is done inside when it takes too long.

    By a signal, which regular expressions and templates look at, too. There is none on Windows and outside of the main
    thread: there is no limit there.

    Raises:
        TooSlow: The time is over.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise TooSlow(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
