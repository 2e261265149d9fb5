"""The weight converter: a Hugging Face folder -> the native folder, which loads without rearranging anything.

The native folder holds the model's own parameters (fused, in the orientation the model multiplies) as safetensors named
by their paths, the source's config and tokenizer files byte for byte, and a manifest, written last, that says where
every parameter came from. It stands beside the package in the source tree and ships inside it as `jaxgen.convert`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxgen import __version__
from jaxgen.checkpoint import INDEX, MANIFEST, NATIVE_FORMAT, Source, named_leaves, open_folder
from jaxgen.safetensors_file import CheckpointError, write

__all__ = ["convert_checkpoint"]

_SHARD_BYTES = 4_000_000_000
_TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".msgpack", ".h5")


def convert_checkpoint(src: str | Path, dst: str | Path) -> Path:
    """Converts a Hugging Face folder, one parameter at a time; every parameter keeps its bits and its dtype.

    Args:
        src: a folder with config.json and safetensors; only read.
        dst: the native folder to make; it must not exist yet. It appears once it is complete.

    Returns:
        `dst`.

    Raises:
        CheckpointError: if the source is incomplete or broken (see `jaxgen.load`), or the destination exists.
    """
    source, target = open_folder(src), Path(dst)
    if (source.folder / MANIFEST).exists():
        raise CheckpointError(f"{source.folder} is converted already. Pass the original Hugging Face folder.")
    if target.exists():
        raise CheckpointError(f"{target} exists already. Remove it or choose another destination.")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_weights(source, partial)
        for file in source.folder.iterdir():
            if file.is_file() and not file.name.endswith((*_WEIGHT_SUFFIXES, ".index.json")):
                shutil.copyfile(file, partial / file.name)
        if (source.folder / _TEMPLATES).is_dir():
            shutil.copytree(source.folder / _TEMPLATES, partial / _TEMPLATES)
        manifest = {
            "format": NATIVE_FORMAT,
            "jaxgen": __version__,
            "parameters": {path: [tensor.name for tensor in tensors] for path, tensors in source.pieces.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_weights(source: Source, folder: Path) -> None:
    shards = _shards(source)
    total = sum(_bytes(dtype, shape) for shard in shards for dtype, shape in shard.values())
    arrays = _with_progress(source.parameters(), total)
    index = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / name, shard, arrays)
        index |= dict.fromkeys(shard, name)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")


def _shards(source: Source) -> list[dict[str, tuple[np.dtype, tuple[int, ...]]]]:
    """The parameters' dtypes and shapes by file, in the order of the model's leaves."""
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for path, leaf in named_leaves(source.abstract):
        entry = (source.own_dtype(path), leaf.shape)
        size += _bytes(*entry)
        if shards[-1] and size > _SHARD_BYTES:
            shards.append({})
            size = _bytes(*entry)
        shards[-1][path] = entry
    return shards


def _with_progress(arrays: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting weights", delay=2) as bar:
        for array in arrays:
            yield array
            bar.update(array.nbytes)


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * dtype.itemsize
