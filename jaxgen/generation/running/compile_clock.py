"""The time this thread has spent compiling, which time limits and speeds exclude.

Timing a program's dispatch would count too much: on a GPU, the dispatch of a `while` blocks until its last step. So the
clock adds up the traces, lowerings and compiles that JAX reports, which are never nested.
"""

import threading

import jax


class _Spent(threading.local):
    seconds = 0.0


_spent = _Spent()


def compile_seconds() -> float:
    """Seconds that this thread has spent compiling so far, including tracing and loading programs from disk."""
    return _spent.seconds


def _add(event: str, duration_secs: float, **_: object) -> None:
    if event.startswith("/jax/core/compile/"):
        _spent.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)
