"""Ctrl-C is held back while processes run a call together."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxgen.generation.running.interrupts import Interrupts


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which ignores interrupts there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_is_raised_at_the_end_of_the_outermost_context() -> None:
    interrupts, reached = Interrupts(), []
    with pytest.raises(KeyboardInterrupt), interrupts.held_back():
        with interrupts.held_back():
            press()
            reached.append("inner")
        assert interrupts.pending
        reached.append("outer")
    assert reached == ["inner", "outer"] and not interrupts.pending
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_not_held_back() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt), interrupts.held_back():
        press()
        press()
        raise AssertionError("not reached")
    with interrupts.held_back():
        pass  # nothing is left of it


def test_an_error_on_its_way_takes_the_place_of_the_interrupt() -> None:
    interrupts = Interrupts()
    with pytest.raises(ValueError, match="broken"), interrupts.held_back():
        press()
        raise ValueError("broken")
    with interrupts.held_back():
        pass


def test_an_interrupt_can_be_passed_on_to_the_next_context() -> None:
    interrupts = Interrupts()
    with interrupts.held_back(passed_on=True):
        press()
    with interrupts.held_back(), pytest.raises(KeyboardInterrupt):
        interrupts.raise_pending()
    assert not interrupts.pending


def test_the_handler_of_the_program_is_called_in_place_of_the_default_one() -> None:
    called: list[Any] = []
    signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    interrupts = Interrupts()
    with interrupts.held_back():
        press()
        assert not called
    assert called == [signal.SIGINT]


def test_other_threads_are_left_alone() -> None:
    interrupts, handlers = Interrupts(), []

    def in_thread() -> None:
        with interrupts.held_back():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
