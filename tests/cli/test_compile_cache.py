"""Compiled programs are kept in a folder of the user's own, and the second process starts with them."""

import errno
import json
import os
import pwd
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxgen.cli import compile_cache
from jaxgen.cli.main import main


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


def told(folder: Path, model: Path) -> dict[str, float]:
    """What `jaxgen generate --json` says in a process of its own."""
    environment = {**os.environ, "JAXGEN_COMPILE_CACHE": str(folder)}
    options = ["generate", "Once upon a time", "--model", str(model), "--max-tokens=20", "--json"]
    command = [sys.executable, "-m", "jaxgen", *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_a_second_process_compiles_nothing(tmp_path: Path, chat_folder: Path) -> None:
    folder = tmp_path / "programs"

    def written() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in folder.glob("*-cache")}

    cold = told(folder, chat_folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    first = written()
    assert first
    warm = told(folder, chat_folder)
    assert warm["completions"] == cold["completions"] and written() == first
    for file in folder.glob("*-cache"):
        file.write_bytes(file.read_bytes()[:50])
    repaired = told(folder, chat_folder)
    assert repaired["completions"] == cold["completions"]
    assert written().keys() == first.keys() and all(file.stat().st_size > 50 for file in first)


def test_a_second_conversation_compiles_nothing(tmp_path: Path, chat_folder: Path) -> None:
    environment = {**os.environ, "JAXGEN_COMPILE_CACHE": str(tmp_path / "programs")}
    command = [sys.executable, "-m", "jaxgen", "chat", "--model", str(chat_folder), "--max-tokens", "8"]
    names = []
    for lines in ("hello there\nand then what happened to the fox?\nwho\n", "a fox\n/reset\nand then\n"):
        subprocess.run(command, input=lines, capture_output=True, text=True, check=True, env=environment)
        names.append({file.name for file in (tmp_path / "programs").glob("*-cache")})
    assert names[0] == names[1]
    assert [sum(name.startswith(f"jit_{program}-") for name in names[0]) for program in ("prefill", "advance")] == [
        1,
        1,
    ]


def test_the_folder_is_the_users_and_can_be_moved_or_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAXGEN_COMPILE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if sys.platform == "linux":
        assert compile_cache.default_folder() == tmp_path / "home" / ".cache" / "jaxgen" / "compiled"
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
    with pytest.raises(ValueError, match="can be written by other users"):
        compile_cache.enable(str(tmp_path))
    assert compile_cache.current() != tmp_path


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="can be written by other users"):
        compile_cache.enable(str(tmp_path))


def without_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as for a user that the system does not know


def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # where nobody can make a folder, not even root


def a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "jaxgen").mkdir()
    (tmp_path / "jaxgen" / "compiled").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def below_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "jaxgen").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def of_somebody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)


def there_but_not_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refused(**_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)


@pytest.mark.parametrize(
    "trouble", [without_home, read_only, a_file, below_a_file, of_somebody_else, there_but_not_writable]
)
def test_without_a_folder_to_keep_programs_in_there_is_one_warning_and_all_works(
    trouble: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JAXGEN_COMPILE_CACHE")
    trouble(monkeypatch, tmp_path)
    assert main(["generate", "Once upon a time", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time")
    assert err.count("Programs are not kept") == 1 and compile_cache.current() is None


def test_a_folder_that_was_asked_for_and_cannot_be_used_is_a_warning_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert compile_cache.enable(str(tmp_path / "file")) is None
    assert f"'{tmp_path / 'file'}'" in capsys.readouterr().err


def test_a_disk_that_is_full_is_said_once_and_a_damaged_program_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    folder = compile_cache.enable(str(tmp_path / "programs"))
    assert folder is not None
    (folder / "one-cache").write_text("program")
    for verb, name, error in [
        ("writing", "jit_a", "OSError: [Errno 28] No space left on device"),
        ("writing", "jit_b", "OSError: [Errno 28] No space left on device"),
        ("reading", "jit_c", "PermissionError: [Errno 13] Permission denied"),
    ]:
        message = f"Error {verb} persistent compilation cache entry for '{name}': {error}"
        warnings.showwarning(UserWarning(message), UserWarning, "compiler.py", 1)
    assert capsys.readouterr().err.count("No space left on device") == 1 and (folder / "one-cache").exists()
    message = "Error reading persistent compilation cache entry for 'jit_a': XlaRuntimeError: damaged"
    warnings.showwarning(UserWarning(message), UserWarning, "compiler.py", 1)
    assert "was damaged" in capsys.readouterr().err and not (folder / "one-cache").exists()
