"""The files of a checkpoint folder, which was made by somebody else and may be broken or hostile.

Nothing outside the folder is opened unless the caller allows it. Only regular files are opened, as a pipe would block.
No JSON is parsed that is too large to be a config or an index.
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

# Bytes. The index of a model with 100,000 tensors would be that long; that of Llama 405B has 0.1 MB.
LARGEST_JSON = 8 << 20

MOST_LAYERS = 256  # Llama 405B has 126; a limit keeps a broken config from making a long list

Json = Mapping[str, Any]  # a JSON object, such as a config.json


class LinkedFolder(type(Path())):
    """A folder whose links may lead anywhere, because the caller passed `follow_links`."""


def checkpoint_folder(path: str | Path, follow_links: bool) -> Path:
    return LinkedFolder(path) if follow_links else Path(path)


class CheckpointError(ValueError):
    """Raised for an unusable checkpoint. The message names the file or tensor, what is wrong, and what to do."""


def file_in(folder: Path, name: str) -> Path:
    """The path of a file in a folder, by a name that was read from the checkpoint.

    Raises:
        CheckpointError: if it is missing, not a regular file, or outside the folder.
    """
    check_name(name, folder)
    return contained(folder / name, folder)


def contained(path: Path, folder: Path) -> Path:
    """The path itself, if it is a regular file in the folder.

    Links may lead anywhere in the folder, and from a snapshot in the Hugging Face hub's cache to its blobs. The links
    of a `LinkedFolder` may lead anywhere.

    Raises:
        CheckpointError: if it is missing, not a regular file, or outside the folder.
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
            f"{path} is a link out of its folder, to {real}. If you trust it, pass `follow_links=True` "
            "(--follow-links); otherwise replace it with the file itself."
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file. Download it again.")
    return path


def lies_in(real: Path, folder: Path) -> bool:
    """Whether links in the folder may lead to this resolved path."""
    return isinstance(folder, LinkedFolder) or any(real.is_relative_to(root) for root in _roots(folder))


def check_name(name: str, said_by: Path) -> None:
    """Raises a CheckpointError unless the name is a relative path of a file inside the folder."""
    parts = PurePosixPath(name).parts
    # Refuses paths that are absolute or name a drive on Windows too, and names too long to open.
    odd = not name.isprintable() or "\\" in name or any(part in ("/", "..") or len(part) > 255 for part in parts)
    if odd or not parts or ":" in name or len(name) > 1000:
        raise CheckpointError(f"{said_by} names {name[:300]!r} as a file, but that is not a path inside the folder.")


def holds(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name: a file, a folder or a link, even a broken one."""
    return (folder / name).is_symlink() or (folder / name).exists()


def read_text(folder: Path, name: str) -> str:
    """The text of a small file in the folder.

    Raises:
        CheckpointError: as `file_in`, or if it is too large or not UTF-8.
    """
    path = file_in(folder, name)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; the limit is {LARGEST_JSON}. Download it again."
            )
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download it again.") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder.

    Raises:
        CheckpointError: as `read_text`, or if it is not an object or has a key twice.
    """
    text = read_text(folder, name)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} does not hold a JSON object. Download it again.")
    return content


def refuse_placeholder(path: Path, start: bytes) -> None:
    """Raises a CheckpointError if the first bytes of a weight file show that it was not downloaded."""
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder.")
    if not any(start):
        raise CheckpointError(f"{path} begins with zeros: it was not downloaded to the end. Download it again.")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON in which no object has a key twice: readers disagree about which of the two values counts.

    Raises:
        ValueError: if it is not JSON, holds NaN or Infinity, or has a key twice.
    """
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content: dict[str, object] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"`{name[:100]}` appears twice")
        content[name] = value
    return content


def _roots(folder: Path) -> list[Path]:
    # The hub's cache:  CACHE/     models--owner--name/snapshots/COMMIT/config.json -> ../../blobs/HASH
    #                   parents[2] parents[1]          parent    real
    # A file that models share is in CACHE/blobs, and then blobs/HASH is a link to it.
    real = folder.resolve()
    if real.parent.name != "snapshots":
        return [real]
    shared = [real.parents[2] / "blobs"] if real.parents[1].name.startswith("models--") else []
    return [real, real.parents[1] / "blobs", *shared]
