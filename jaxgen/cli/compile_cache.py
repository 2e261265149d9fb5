"""Compiled programs kept between processes: JAX's persistent compilation cache, in a folder of the user.

JAX runs the programs in it without checks, so whoever may write to the folder may run code as the user.
"""

import contextlib
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TextIO

import jax
from platformdirs import user_cache_path

_MOST_BYTES = 2 << 30


def default_folder() -> Path:
    """`jaxgen/compiled` in the user's cache folder. Raises RuntimeError if there is no home folder."""
    folder = user_cache_path("jaxgen", appauthor=False) / "compiled"
    if not folder.is_absolute():  # a ~ that could not be expanded
        raise RuntimeError("there is no home folder")
    return folder


def current() -> Path | None:
    """The folder in use; None if programs are not kept."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    return Path(folder) if folder else None


def enable(where: str | None = None) -> Path | None:
    """Keeps compiled programs in a folder, created with mode 0700 if needed. If that fails, it warns and continues
    without.

    Args:
        where: the folder, or "off"; by default `$JAXGEN_COMPILE_CACHE`, else the folder that JAX is configured with,
            else `default_folder()`.

    Returns:
        The folder, or None if programs are not kept.

    Raises:
        ValueError: if other users may write to the folder that was asked for.
    """
    if where is None:
        where = os.environ.get("JAXGEN_COMPILE_CACHE")
    if where is None and (configured := current()):
        return configured
    if where == "":
        raise ValueError("the compile cache has an empty name. Pass a folder, or off.")
    if where is not None and where.lower() == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    try:
        folder = Path(where) if where else default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass  # the folder is writable
    except (OSError, RuntimeError, ValueError) as error:
        if where and isinstance(error, ValueError):
            raise
        _warn(f"{error}" if isinstance(error, ValueError) else f"the compile cache cannot be used ({error}).")
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    # Also programs that compile in less than a second: there are many before the first token.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _repair_when_warned(folder)
    return folder


def check(folder: Path) -> None:
    """Raises ValueError if other users may write to the folder."""
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.getuid() or mode & 0o022:
        raise ValueError(
            f"the compile cache {folder} (owner {status.st_uid}, mode {mode:04o}) can be written by other users, and "
            "you would run their programs. Make it yours (chmod 700), or pass another folder or off to "
            "`--compile-cache`."
        )


def _repair_when_warned(folder: Path) -> None:
    """Empties the folder when JAX warns of a damaged entry, which it would neither use nor replace.

    Trouble with the folder itself, such as a full disk, is reported once.
    """
    show, failed = warnings.showwarning, []

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if "persistent compilation cache entry" not in text:
            show(message, category, filename, lineno, file, line)
        # A damaged entry, not a system error or a lock that could not be acquired.
        elif "reading" in text and "[Errno" not in text and ": Timeout:" not in text:
            with contextlib.suppress(OSError):
                for entry in folder.glob("*-cache"):
                    entry.unlink(missing_ok=True)
            print(f"jaxgen: a cached program was damaged; {folder} was emptied", file=sys.stderr)
        elif not failed:
            failed.append(text)
            _warn(f"the compile cache {folder} fails ({text.rpartition(': ')[2]}).")

    warnings.showwarning = showwarning


def _warn(trouble: str) -> None:
    print(f"jaxgen: {trouble} Programs are not kept; the next process compiles them again", file=sys.stderr)
