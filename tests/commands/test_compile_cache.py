"""Compiled programs are kept in a folder of the user's own, and the second process starts with them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxgen.commands import compile_cache


@pytest.fixture(autouse=True)
def configuration() -> Iterator[None]:
    names = [
        "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]  # fmt: skip
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def told(folder: Path) -> dict[str, float]:
    """What `jaxgen generate --json` says in a process of its own."""
    environment = {**os.environ, "JAXGEN_COMPILE_CACHE": str(folder)}
    options = ["generate", "Once upon a time", "--max-tokens=20", "--json"]
    command = [sys.executable, "-m", "jaxgen", *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "programs"

    def written() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in folder.glob("*-cache")}

    cold = told(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    first = written()
    assert first
    warm = told(folder)
    assert warm["completions"] == cold["completions"] and written() == first
    for file in folder.glob("*-cache"):
        file.write_bytes(file.read_bytes()[:50])
    repaired = told(folder)
    assert repaired["completions"] == cold["completions"]
    assert written().keys() == first.keys() and all(file.stat().st_size > 50 for file in first)


def test_the_folder_is_the_users_and_can_be_moved_or_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAXGEN_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.enable() == tmp_path / "jaxgen" / "compiled" == compile_cache.current()
    assert compile_cache.enable(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    assert compile_cache.enable() == tmp_path / "elsewhere"  # as JAX was told
    monkeypatch.setenv("JAXGEN_COMPILE_CACHE", str(tmp_path / "by variable"))
    assert compile_cache.enable() == tmp_path / "by variable"
    assert compile_cache.enable("OFF") is None and compile_cache.current() is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ValueError, match="can be written by others"):
        compile_cache.enable(str(tmp_path))
    assert compile_cache.current() != tmp_path


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="can be written by others"):
        compile_cache.enable(str(tmp_path))
