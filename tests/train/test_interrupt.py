"""Ctrl-C: the update is completed and saved; a second one ends at once."""

from __future__ import annotations

import signal
import threading

import pytest

from simmim_fast.train.interrupt import Interrupt, ctrl_c_withheld


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_press_is_a_request_and_the_second_an_end():
    before = signal.getsignal(signal.SIGINT)
    interrupt = Interrupt()
    with interrupt.listening():
        press()
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before


def test_withheld_presses_are_lost():
    interrupt = Interrupt()
    with interrupt.listening():
        with ctrl_c_withheld():
            press()
        assert not interrupt.requested
        press()
    assert interrupt.requested


def test_other_threads_leave_the_handlers_alone():
    failures = []

    def listen() -> None:
        try:
            with Interrupt().listening(), ctrl_c_withheld():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert not failures
