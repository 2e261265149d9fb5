"""Compiled programs kept between processes: JAX's persistent compilation cache, in a folder of the user's own.

Programs are loaded and run as they are, so whoever may write to the folder may run code as the user.
"""

import contextlib
import os
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_path

_MOST_BYTES = 2 << 30


def default_folder() -> Path:
    """Raises RuntimeError if there is no home folder."""
    folder = user_cache_path("jaxgen", appauthor=False) / "compiled"
    if not folder.is_absolute():  # it begins with a ~ that stands for nothing
        raise RuntimeError("there is no home folder")
    return folder


def current() -> Path | None:
    """The folder in use."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    return Path(folder) if folder else None


def enable(where: str | None = None) -> Path | None:
    """Keeps programs in a folder, made with mode 0700 if needed. If that is impossible it warns: all works without.

    Args:
        where: the folder, "off" for none; by default `$JAXGEN_COMPILE_CACHE`, else what JAX was told already, else
            `jaxgen/compiled` in the user's cache folder.

    Returns:
        The folder, or None.

    Raises:
        ValueError: if others may write to the folder that was asked for.
    """
    if where is None:
        where = os.environ.get("JAXGEN_COMPILE_CACHE")
    if where is None and (told := current()):
        return told
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
            pass  # it can be written to
    except (OSError, RuntimeError, ValueError) as error:
        if where and isinstance(error, ValueError):
            raise
        _warn(f"{error}" if isinstance(error, ValueError) else f"the compile cache cannot be used ({error}).")
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    # Also what takes less than a second, of which there is a lot before the first token.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _repair_when_warned(folder)
    return folder


def check(folder: Path) -> None:
    """Raises ValueError if others may write to the folder."""
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.getuid() or mode & 0o022:
        raise ValueError(
            f"the compile cache {folder} (owner {status.st_uid}, mode {mode:04o}) can be written by others, who could "
            "have you run their programs. Make it yours (chmod 700), or pass `--compile-cache` another folder or off."
        )


def _repair_when_warned(folder: Path) -> None:
    """Empties the folder when JAX warns of a damaged entry, which it would neither use nor replace.

    What the folder itself is to blame for, such as a full disk, is said once.
    """
    show, failed = warnings.showwarning, []

    def showwarning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        text = str(message)
        if "persistent compilation cache entry" not in text:
            show(message, *args, **kwargs)
        elif "reading" in text and "[Errno" not in text and ": Timeout:" not in text:
            with contextlib.suppress(OSError):
                for file in folder.glob("*-cache"):
                    file.unlink(missing_ok=True)
            print(f"jaxgen: a kept program was damaged; {folder} is emptied and filled anew", file=sys.stderr)
        elif not failed:
            failed.append(text)
            _warn(f"the compile cache {folder} fails ({text.rpartition(': ')[2]}).")

    warnings.showwarning = showwarning


def _warn(trouble: str) -> None:
    print(f"jaxgen: {trouble} Programs are not kept, and compile again in the next process", file=sys.stderr)
