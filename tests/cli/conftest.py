"""What the tests of commands share."""

from pathlib import Path

import pytest

import jaxgen


@pytest.fixture(autouse=True)
def only_one_layer_of_the_bundled_model(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxgen, "BUNDLED_MODEL", one_layer)
    monkeypatch.setattr("jaxgen.cli.terminal.BUNDLED_MODEL", one_layer)
