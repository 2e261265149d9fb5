"""Calls that are prepared and not run, for tests that look at their programs."""

from typing import Any

from jaxgen.base import Model
from jaxgen.generation.api import prepare_call
from jaxgen.generation.call import PreparedCall
from jaxgen.generation.request import Request


def prepared(model: Model, inputs: Any, **keywords: Any) -> PreparedCall:
    """What `generate` would run for these arguments."""
    return prepare_call(model, Request.of(inputs, None, keywords))
