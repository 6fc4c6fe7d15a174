"""Ctrl-C as a request to stop at the end of the update, when weights and optimizer agree."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Interrupt:
    """Whether the user asked to stop.

    Attributes:
        requested: Ctrl-C was pressed inside `listening()`.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this block the first Ctrl-C sets `requested`, and the second raises KeyboardInterrupt."""
        with _handled_by(self._request):
            yield

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def ctrl_c_withheld() -> Iterator[None]:
    """Processes that are started in this block never receive the Ctrl-C, which a terminal sends to all of them."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
