"""The files of a checkpoint folder, which comes from somebody else and may be broken or hostile.

Nothing outside the folder is opened unless its owner says so, nothing is waited for that is no file, and nothing is
parsed that is too large to be what it should be.
"""

import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any

# The index of a model of 700B parameters in 100,000 tensors would be as long; that of Llama 405B is 0.1 MB.
LARGEST_JSON = 8 << 20


class LinkedFolder(type(Path())):
    """A folder whose links may lead anywhere: its owner put them there."""


def checkpoint_folder(path: str | Path, follow_links: bool) -> Path:
    return LinkedFolder(path) if follow_links else Path(path)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file or tensor, what is wrong, and the way out."""


def file_in(folder: Path, name: str) -> Path:
    """The path of a file of a folder that something in the folder names.

    Raises:
        CheckpointError: if it is missing, no regular file, or lies outside.
    """
    check_name(name, folder)
    return contained(folder / name, folder)


def contained(path: Path, folder: Path) -> Path:
    """The path itself, of a regular file that lies in a folder.

    Links may lead anywhere in the folder, and from a snapshot in the cache of the Hugging Face hub to its blobs. Those
    of a `LinkedFolder` may lead anywhere.

    Raises:
        CheckpointError: if it is missing, no regular file, or lies outside.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. The checkpoint is incomplete; download it again.") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"{path} cannot be opened ({error}). Download it again.") from error
    if not lies_in(real, folder):
        raise CheckpointError(
            f"{path} is a link out of its folder, to {real}. If you made it, follow it by `follow_links=True` "
            "(--follow-links); else put the file itself in its place."
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file. Download it again.")
    return path


def lies_in(real: Path, folder: Path) -> bool:
    """Whether a path without links is one that a folder may lead to."""
    return isinstance(folder, LinkedFolder) or any(real.is_relative_to(root) for root in _roots(folder))


def check_name(name: str, said_by: Path) -> None:
    """Refuses what is no name of a file in the folder or in one of its folders."""
    parts = PurePosixPath(name).parts
    odd = not name.isprintable() or "\\" in name or any(part in ("/", "..") or len(part) > 255 for part in parts)
    if odd or not parts or ":" in name or len(name) > 1000:
        raise CheckpointError(f"{said_by} names {name[:300]!r} as a file, which is no file name in a folder.")


def holds(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name, whatever it is."""
    return (folder / name).is_symlink() or (folder / name).exists()


def read_text(folder: Path, name: str) -> str:
    """The text of one of the folder's small files.

    Raises:
        CheckpointError: as `file_in`, or if it is too large or not UTF-8.
    """
    path = file_in(folder, name)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, and at most {LARGEST_JSON} are read.")
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download it again.") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in one of the folder's files.

    Raises:
        CheckpointError: as `read_text`, or if it is no object or says something twice.
    """
    text = read_text(folder, name)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} holds no JSON object. Download it again.")
    return content


def parse_json(text: str | bytes) -> Any:
    """JSON whose objects have each key once: readers differ in which of two they believe.

    Raises:
        ValueError: if it is something else.
    """
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"`{name[:100]}` is there twice")
        content[name] = value
    return content


def _roots(folder: Path) -> list[Path]:
    real = folder.resolve()
    return [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]
