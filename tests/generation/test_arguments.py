"""ARGUMENTS.md is true: it is what the code says, and the tests it names exist."""

import inspect
from pathlib import Path

import arguments
import pytest

import jaxgen
from jaxgen.generation import config

TESTS = Path(__file__).parents[1]


def test_the_table_is_the_one_the_code_makes() -> None:
    assert arguments.FILE.read_text() == arguments.table(), "run `python tests/scripts/arguments.py`"


@pytest.mark.parametrize("name", sorted(set(arguments.SHOWN_BY.values())))
def test_the_test_that_shows_it_exists(name: str) -> None:
    file, function = name.split("::")
    assert f"def {function}(" in (TESTS / file).read_text()


def test_what_is_shown_is_a_field_or_an_argument() -> None:
    parameters = set(inspect.signature(jaxgen.generate).parameters) | config.MODEL_INPUTS
    assert set(arguments.SHOWN_BY) <= config.SUPPORTED | parameters | {"trust_remote_code"}
    assert set(arguments.SHOWN_BY) >= config.SUPPORTED


@pytest.mark.oracle
def test_every_argument_of_transformers_is_in_the_table() -> None:
    from transformers import GenerationMixin

    table = arguments.table()
    for name in inspect.signature(GenerationMixin.generate).parameters:
        assert name in ("self", "kwargs") or f"| `{name}` |" in table, name
