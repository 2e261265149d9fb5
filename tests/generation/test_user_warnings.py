"""Warnings point at the caller's line, and some are said once in a process."""

import logging
import warnings
from typing import Any

import pytest

import jaxgen
from jaxgen.generation import user_warnings


@pytest.mark.parametrize("way", ["generate", "stream", "prepare"])
def test_a_warning_points_at_the_line_that_called_jaxgen(way: str) -> None:
    model = jaxgen.load(jaxgen.BUNDLED_MODEL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(jaxgen, way)(model, [[5, 6]], max_length=None, max_new_tokens=None)
    (warning,) = (each for each in caught if "model-agnostic default" in str(each.message))
    assert warning.filename == __file__ and warning.category is UserWarning


def test_what_is_said_once_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(user_warnings, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        for message in ("one", "two", "one"):
            user_warnings.warn_once(message)
    assert [record.message for record in caplog.records] == ["one", "two"]
