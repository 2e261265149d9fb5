"""Checks of generation fields. Each returns the value in one type, or raises a ValueError that names the field."""

import math
import operator
from typing import Any, SupportsIndex, TypeGuard

import numpy as np


def is_float(value: object) -> TypeGuard[float | np.floating]:
    return isinstance(value, (float, np.floating))


def is_integer(value: object) -> TypeGuard[int | np.integer]:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def integer(name: str, value: SupportsIndex | None) -> int | None:
    """A Python int from an integer of any library; None stays None."""
    try:
        if isinstance(value, bool):
            raise TypeError("True and False are not counts")
        return None if value is None else operator.index(value)
    except TypeError as error:
        raise ValueError(f"`{name}`={value!r} must be an integer.") from error


def positive(name: str, value: SupportsIndex | None) -> int | None:
    """As `integer`, at least 1."""
    count = integer(name, value)
    if count is not None and count < 1:
        raise ValueError(f"`{name}`={count} must be at least 1.")
    return count


def number(name: str, value: object, default: float) -> float:
    """A finite float; the default in place of None."""
    if value is None:
        return default
    if not (is_float(value) or is_integer(value)) or not math.isfinite(value):
        raise ValueError(f"`{name}`={value!r} must be a finite number.")
    return float(value)


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """A tuple of token ids, from one id, a list or an array of them, or None."""
    if value is None:
        return ()
    tolist = getattr(value, "tolist", None)
    listed: Any = value if tolist is None else tolist()
    listed = [listed] if isinstance(listed, int) else listed
    try:
        if any(isinstance(token, bool) for token in listed):
            raise TypeError("True and False are not token ids")
        return tuple(operator.index(token) for token in listed)
    except TypeError as error:
        raise ValueError(f"`{name}`={value!r} must be a token id or a list of them: integers.") from error


def token_id(name: str, value: object) -> int | None:
    """One token id, or None."""
    ids = token_ids(name, value)
    if value is not None and (len(ids) != 1 or not -(2**31) <= ids[0] < 2**31):
        raise ValueError(f"`{name}`={value!r} must be one token id of at most 32 bits.")
    return ids[0] if ids else None
