"""Warnings to the caller of `generate`."""

import logging
import sys
import warnings

logger = logging.getLogger("jaxgen.generation")
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Logs a message once per process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns as from the caller's line outside of jaxgen."""
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "jaxgen":
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)
