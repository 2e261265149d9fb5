"""Where a checkpoint comes from, a folder or the Hugging Face hub, and what is in its folder besides the weights."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoint.files import CheckpointError, checkpoint_folder, contained, file_in, holds, lies_in
from jaxgen.checkpoint.float8 import KEYS, wide_dtype
from jaxgen.checkpoint.load import INDEX, MANIFEST, SINGLE_FILE, Source, listed, weight_files

TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "README.md",
    f"{TEMPLATES}/*",
]
_PICKLES = ["*.bin", "*.pth"]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".index.json")
_OTHER_LAYOUTS = ["consolidated*.safetensors", "original/*", "onnx/*"]  # the same weights once more


def local_folder(src: str | Path, allow_pickle: bool, follow_links: bool = False) -> Path:
    """The folder, after the download of what a hub id names.

    Raises:
        CheckpointError: if it is neither a folder nor such an id, or the hub does not give it.
    """
    if Path(src).is_dir():
        return checkpoint_folder(src, follow_links)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(src)) or Path(src).exists():
        raise CheckpointError(f"{src} is not a folder, nor the id of a model on the Hugging Face hub (owner/name).")
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, *(_PICKLES if allow_pickle else [])]
    try:
        return Path(snapshot_download(str(src), allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS))
    except Exception as error:  # of the hub, of HTTP or of the network
        raise CheckpointError(f"{src} is not a folder here, and the hub does not give it: {error}") from error


def identity(folder: Path) -> list[Any]:
    """What changes if a folder does, as far as can be seen without reading it."""
    files = {path for path in folder.iterdir() if path.is_file()}
    if holds(folder, INDEX):
        files |= {file_in(folder, name) for name in weight_files(folder)}
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(files)]
    return [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def converted_config(source: Source, dtype: np.dtype | None) -> bytes:
    """config.json as it is, or with what the conversion changed."""
    content = dict(source.raw)
    quantised = [content.pop(key) for key in KEYS if key in content]
    embedding = source.family.embedding
    rows = source.pieces[embedding][0].rows
    resized = rows != source.abstract.config.vocab_size  # by an adapter
    if dtype is not None or any(quantised):
        name = str(dtype or wide_dtype(source.raw, source.own_dtype(embedding)))
        content |= {key: name for key in ("dtype", "torch_dtype") if key in content} or {"dtype": name}
    elif not resized:
        return file_in(source.folder, "config.json").read_bytes()
    if resized:
        content["vocab_size"] = rows
    return json.dumps(content, indent=2).encode() + b"\n"


def other_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files that are copied as they are, by name, and a word about what is not."""
    found, left_out = {}, []
    used = {*weight_files(folder)} if holds(folder, INDEX) or holds(folder, SINGLE_FILE) else set()
    templates = folder / TEMPLATES
    paths: list[Path] = [
        *folder.iterdir(),
        *(templates.iterdir() if templates.is_dir() and lies_in(templates.resolve(), folder) else []),
    ]
    skipped = {"config.json", MANIFEST, INDEX, TEMPLATES, *used, *(name.split("/")[0] for name in used)}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if name in skipped:
            continue
        if path.name.endswith(_WEIGHT_SUFFIXES) or not path.is_file():
            left_out.append(name)
        else:
            found[name] = contained(path, folder)
    return found, [f"{folder}: {listed(left_out)} are no part of the model and left out."] if left_out else []


def tokenizer_oddities(folder: Path) -> list[str]:
    """What keeps the tokenizer from being read here."""
    if not (folder / "tokenizer.model").exists() or (folder / "tokenizer.json").exists():
        return []
    if importlib.util.find_spec("sentencepiece"):
        return []
    return [f"{folder} has a tokenizer.model and no tokenizer.json: reading it needs `pip install sentencepiece`."]
