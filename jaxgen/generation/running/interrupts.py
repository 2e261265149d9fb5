"""Holds back Ctrl-C while processes run a call together, so that all of them can end it together."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Ctrl-C, held back. A second one is not held back.

    Attributes:
        pending: whether there was one.
    """

    def __init__(self) -> None:
        self.pending, self._depth = False, 0
        self._before: Any = None

    @contextlib.contextmanager
    def held_back(self, passed_on: bool = False) -> Iterator[None]:
        """Raises what was held back at the end of the outermost context, unless another error is on its way.

        Signals reach the main thread only, so in other threads it does nothing.

        Args:
            passed_on: leaves what was held back to the next context, which begins soon.
        """
        if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
            yield
            return
        self._depth += 1
        if self._depth == 1:
            self._before = signal.signal(signal.SIGINT, self._hold)
        try:
            yield
        except BaseException:
            self.pending = False
            raise
        finally:
            self._depth -= 1
            if self._depth == 0:
                signal.signal(signal.SIGINT, self._before)
        if self._depth == 0 and not passed_on:
            self.raise_pending()

    def raise_pending(self) -> None:
        """Raises KeyboardInterrupt if one was held back; or calls the handler that the program has instead."""
        if self.pending:
            self.pending = False
            self._before(signal.SIGINT, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self._before(number, frame)
        self.pending = True


interrupts = Interrupts()
