"""Where a checkpoint comes from: a folder, or the Hugging Face hub."""

import re
from pathlib import Path

from jaxgen.folder import CheckpointError

_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "README.md",
    "additional_chat_templates/*",
]
_PICKLES = ["*.bin", "*.pth"]
_OTHER_LAYOUTS = ["consolidated*.safetensors", "original/*", "onnx/*"]  # the same weights once more


def local_folder(src: str | Path, allow_pickle: bool) -> Path:
    """The folder, after the download of what a hub id names.

    Raises:
        CheckpointError: if it is neither a folder nor such an id, or the hub does not give it.
    """
    if Path(src).is_dir():
        return Path(src)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(src)) or Path(src).exists():
        raise CheckpointError(f"{src} is not a folder, nor the id of a model on the Hugging Face hub (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, *(_PICKLES if allow_pickle else [])]
    try:
        return Path(snapshot_download(str(src), allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS))
    except Exception as error:  # of the hub, of HTTP or of the network
        raise CheckpointError(f"{src} is not a folder here, and the hub does not give it: {error}") from error
