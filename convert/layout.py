"""The files of a converted folder and of its original Hugging Face folder, and the position of each tensor in them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxgen import __version__
from jaxgen.checkpoint.files import CheckpointError, Json, check_name, file_in, holds, parse_json, read_text
from jaxgen.checkpoint.folder import INDEX, SINGLE_FILE, listed, weight_files
from jaxgen.checkpoint.safetensors_file import NAMES, StoredTensor, Tensor, header, header_text
from jaxgen.checkpoint.source import MANIFEST, NATIVE_FORMAT, Source, named_leaves

SHARD_BYTES = 5 * 10**9  # as in `save_pretrained` of transformers


@dataclass(frozen=True)
class Piece:
    """The values of one tensor in a file.

    Attributes:
        tensor: where the values come from.
        dtype: the dtype of the values in the file.
        offset: bytes from the start of the file.
    """

    tensor: Tensor
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes // self.tensor.dtype.itemsize * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """A safetensors file to write: its header, preceded by the header's length, and the pieces that fill the rest."""

    name: str
    header: bytes
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(piece.nbytes for piece in self.pieces)


# A tensor to be written: the parts that are stacked along the first axis, and the dtype.
_Entry = tuple[list[Tensor], np.dtype]


def native_files(source: Source, dtype: np.dtype | None, shard_bytes: int) -> list[File]:
    """The files of a converted folder: parameters by their paths, and the buffers, for converting back.

    The tensors of a parameter usually have one dtype and become one tensor. If not, each one becomes `PATH.NUMBER`.
    """
    entries: dict[str, _Entry] = {}
    for path, _ in named_leaves(source.abstract):
        parts = source.pieces[path]
        if dtype or len({part.dtype for part in parts}) == 1:
            entries[path] = (parts, dtype or parts[0].dtype)
        else:
            entries |= {f"{path}.{number}": ([part], part.dtype) for number, part in enumerate(parts)}
    entries |= {name: ([tensor], tensor.dtype) for name, tensor in source.buffers.items()}
    return _files(entries, shard_bytes, "flax")


def manifest(source: Source, digests: Mapping[str, str], copied: Mapping[str, str], *, exact: bool) -> str:
    """The text of a converted folder's jaxgen.json.

    Args:
        source: the source of the conversion.
        digests: SHA-256 by tensor.
        copied: SHA-256 by file, of the files without tensors.
        exact: whether every tensor kept its bytes, so that the original files can be restored.
    """
    content: dict[str, object] = {
        "format": NATIVE_FORMAT,
        "jaxgen": __version__,
        "parameters": {path: [tensor.name for tensor in tensors] for path, tensors in source.pieces.items()},
        "copies": source.copies,
        "sha256": {"tensors": digests, "files": copied},
    }
    parts = [*source.buffers.values(), *(tensor for tensors in source.pieces.values() for tensor in tensors)]
    if exact and all(isinstance(tensor, StoredTensor) for tensor in parts):
        text = read_text(source.folder, INDEX) if holds(source.folder, INDEX) else None
        headers = {name: header_text(file_in(source.folder, name)) for name in weight_files(source.folder)}
        content["source"] = {"index": text, "headers": headers}
    return json.dumps(content, indent=1) + "\n"


def hugging_face_files(source: Source, manifest: Json, shard_bytes: int | None) -> tuple[list[File], str | None]:
    """The files of the Hugging Face folder that a converted folder came from, and the text of their index.

    Args:
        source: the converted folder.
        manifest: its manifest.
        shard_bytes: maximum size of a file; None for the original files.
    """
    tensors = hugging_face_tensors(source, manifest)
    if shard_bytes is None and (origin := manifest.get("source")):
        return _original_files(source, tensors, origin), origin["index"]
    files = _files(
        {name: ([tensor], tensor.dtype) for name, tensor in tensors.items()}, shard_bytes or SHARD_BYTES, "pt"
    )
    return files, None if len(files) == 1 else index(files)


def hugging_face_tensors(source: Source, manifest: Json) -> dict[str, Tensor]:
    """The tensors of a converted folder under their original names."""
    tensors: dict[str, Tensor] = dict(source.buffers)
    for sources in source.sources.values():
        tensors |= sources
    if unknown := sorted(set(manifest["copies"].values()) - set(tensors)):
        raise CheckpointError(
            f"{source.folder / MANIFEST} is damaged: it lacks {listed(unknown)}. Convert the original again."
        )
    return tensors | {copy: tensors[original] for copy, original in manifest["copies"].items()}


def index(files: list[File]) -> str:
    """The text of model.safetensors.index.json for several files."""
    total = sum(piece.nbytes for file in files for piece in file.pieces)
    owners = {name: file.name for file in files for name in _names(file.header)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": owners}, indent=1) + "\n"


def _names(header: bytes) -> Iterator[str]:
    # the first 8 bytes are the length of the JSON
    return (name for name in json.loads(header[8:]) if name != "__metadata__")


def _files(entries: Mapping[str, _Entry], shard_bytes: int, kind: str) -> list[File]:
    """The tensors in order, with a new file whenever the next one would exceed the size. For `kind` see `header`."""
    shards: list[dict[str, _Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        size += _nbytes(entry)
        # A shard takes at least one tensor, however large.
        if shards[-1] and size > shard_bytes:
            shards.append({})
            size = _nbytes(entry)
        shards[-1][name] = entry
    single = kind == "pt" and len(shards) == 1
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    return [_file(SINGLE_FILE if single else name, shard, kind) for name, shard in zip(names, shards, strict=True)]


def _file(name: str, entries: Mapping[str, _Entry], kind: str) -> File:
    start, offsets = header({key: (dtype, _shape(parts)) for key, (parts, dtype) in entries.items()}, kind)
    pieces = []
    for key, (parts, dtype) in entries.items():
        offset = offsets[key]
        for part in parts:
            pieces.append(Piece(part, dtype, offset))
            offset += pieces[-1].nbytes
    return File(name, start, pieces)


def _shape(parts: list[Tensor]) -> tuple[int, ...]:
    if len(parts) == 1:
        return parts[0].shape
    return (sum(part.rows for part in parts), *parts[0].shape[1:])


def _nbytes(entry: _Entry) -> int:
    parts, dtype = entry
    return math.prod(_shape(parts)) * dtype.itemsize


def _original_files(source: Source, tensors: Mapping[str, Tensor], origin: Json) -> list[File]:
    """The original files, byte for byte, from the headers that the manifest keeps."""
    folder, prefix = source.folder, source.family.prefix
    files, remaining = [], dict(tensors)
    try:
        for name, text in origin["headers"].items():
            check_name(name, folder / MANIFEST)
            files.append(_original_file(name, text, remaining, prefix))
        owners = {key: file.name for file in files for key in _names(file.header)}
        if origin["index"] is not None and parse_json(origin["index"])["weight_map"] != owners:
            raise ValueError("its index and its headers disagree")
        if remaining or (origin["index"] is None and [*origin["headers"]] != [SINGLE_FILE]):
            raise ValueError(f"it says nothing about {listed(sorted(remaining))}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}. Convert the original again.") from error
    return files


def _name_in(tensors: Mapping[str, Tensor], name: str, prefix: str) -> str:
    """The name of a tensor after loading, which may have added or removed the prefix; see `checkpoint.source`."""
    names = (name, name.removeprefix(prefix), prefix + name)
    return next((known for known in names if known in tensors), name)


def _original_file(name: str, text: str, tensors: dict[str, Tensor], prefix: str) -> File:
    """One original file, from the text of its header; its tensors are removed from `tensors`."""
    entries = parse_json(text)
    entries.pop("__metadata__", None)
    encoded = text.encode()
    start = len(encoded).to_bytes(8, "little") + encoded
    pieces, end = [], 0
    # In the order of the data, which need not be that of the names. The data must have no gaps, as safetensors demands.
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = tensors.pop(_name_in(tensors, key, prefix))
        expected = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
        if entry != expected:
            raise ValueError(f"`{key}` is {expected}, not {entry}")
        pieces.append(Piece(tensor, tensor.dtype, len(start) + end))
        end += tensor.nbytes
    if not name.endswith(".safetensors"):
        raise ValueError(f"{name} is not a safetensors file")
    return File(name, start, pieces)
