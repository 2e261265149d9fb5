"""The source of a conversion: its files besides the weights, and how to notice that they have changed."""

import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxgen.checkpoint.files import CheckpointError, contained, file_in, holds, lies_in
from jaxgen.checkpoint.float8 import KEYS, wide_dtype
from jaxgen.checkpoint.folder import INDEX, SINGLE_FILE, listed, weight_files
from jaxgen.checkpoint.source import MANIFEST, Source
from jaxgen.checkpoint.tokenizer import load_tokenizer

TEMPLATES = "additional_chat_templates"  # the only folder with files of a tokenizer
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5", ".index.json")


@contextlib.contextmanager
def unpacked(source: Source) -> Iterator[Source]:
    """A source whose folder holds config.json, generation_config.json and the files of the tokenizer.

    For a GGUF file the folder is temporary, and the tensors are still read from the file.
    """
    if not source.folder.is_file():
        yield source
        return
    generation = source.abstract.generation_config
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(source.raw, indent=2) + "\n")
        generation.to_json_file(folder / "generation_config.json")
        try:
            load_tokenizer(source.folder).save_pretrained(folder)
        except CheckpointError as error:
            source = replace(source, warnings=(*source.warnings, str(error)))
        yield replace(source, folder=folder)


def identity(folder: Path) -> list[object]:
    """The path of a folder, and the names, sizes and times of its files: JSON that changes whenever the folder does.

    For a GGUF file, the same facts about that file.
    """
    files = {path for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {folder}
    if holds(folder, INDEX):
        files |= {file_in(folder, name) for name in weight_files(folder)}
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(files)]
    return [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def converted_config(source: Source, dtype: np.dtype | None) -> bytes:
    """The content of config.json, with the conversion's changes."""
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
    """The files that are copied unchanged, by name, and a message about the files that are skipped."""
    copied: dict[str, Path] = {}
    skipped: list[str] = []
    used = {*weight_files(folder)} if holds(folder, INDEX) or holds(folder, SINGLE_FILE) else set()
    templates = folder / TEMPLATES
    paths: list[Path] = [
        *folder.iterdir(),
        *(templates.iterdir() if templates.is_dir() and lies_in(templates.resolve(), folder) else []),
    ]
    written = {"config.json", MANIFEST, INDEX, TEMPLATES, *used, *(name.split("/")[0] for name in used)}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if name in written:  # by the conversion itself
            continue
        if path.name.endswith(_WEIGHT_SUFFIXES) or not path.is_file():
            skipped.append(name)
        else:
            copied[name] = contained(path, folder)
    return copied, [f"{folder}: {listed(skipped)} are not part of the model and were skipped."] if skipped else []


def tokenizer_trouble(folder: Path) -> list[str]:
    """A message if the tokenizer cannot be read in this environment."""
    if not (folder / "tokenizer.model").exists() or (folder / "tokenizer.json").exists():
        return []
    if importlib.util.find_spec("sentencepiece"):
        return []
    return [f"{folder} has a tokenizer.model and no tokenizer.json: reading it needs `pip install sentencepiece`."]
