"""How long this thread has been compiling, which time limits and speeds leave out.

How long a dispatch takes does not tell: on a GPU the dispatch of a `while` blocks until its last step. JAX reports each
trace, lowering and compile by itself, none of them inside another.
"""

import threading
from typing import Any

import jax


class _Spent(threading.local):
    seconds = 0.0


_spent = _Spent()


def compile_seconds() -> float:
    """Seconds that this thread has spent compiling so far, from tracing to reading a kept program back from disk."""
    return _spent.seconds


def _add(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/"):
        _spent.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)
